"""Instruction templates: those we ship, the older form in five keys, and what requests replace in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from llamaserve.chat.instruction_templates import FiveKeys, InstructionTemplate, InstructionTemplates, Overrides
from llamaserve.chat.renderer import Refusal, render
from llamaserve.chat.template import RenderJob
from llamaserve.errors import InvalidRequest, RegistryError

SYSTEM = {"role": "system", "content": "S"}
TALK = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "r"},
]
TURN = "<|user|> <|user-message|>\n<|bot|> <|bot-message|></s>\n"
FIVE = FiveKeys(TURN, "U:", "B:", "<|system-message|>\n\n", "D")


def written(source: str | None, messages: list[dict[str, Any]], **options: Any) -> str:
    assert source is not None
    return render(RenderJob(source, messages, "<s>", "</s>", **options))


CHATML = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\nr<|im_end|>\n"
VICUNA = "USER: q ASSISTANT: a</s>USER: r ASSISTANT:"
HASHES = "### User:\nq\n\n### {0}:\na\n\n### User:\nr\n\n### {0}:\n"
# What each writes for a system text and TALK, as the pages that are named in the files show it.
SHIPPED = {
    "Airoboros-v1.2": f"S {VICUNA}",
    "Alpaca": "S\n\n" + HASHES.format("Response").replace("User", "Instruction"),
    "ChatML": f"<|im_start|>system\nS<|im_end|>\n{CHATML}<|im_start|>assistant\n",
    "Gemma": (
        "<s><start_of_turn>user\nS\n\nq<end_of_turn>\n<start_of_turn>model\na<end_of_turn>\n"
        "<start_of_turn>user\nr<end_of_turn>\n<start_of_turn>model\n"
    ),
    "Guanaco": "S\n\n### Human: q\n### Assistant: a\n### Human: r\n### Assistant:",
    "Llama-v2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nq [/INST] a </s><s>[INST] r [/INST]",
    "Llama-v3": (
        "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\na<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "r<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "Metharme": "<|system|>S<|user|>q<|model|>a<|user|>r<|model|>",
    "Mistral": "<s>[INST] S\n\nq [/INST] a</s>[INST] r [/INST]",
    "Open Assistant": (
        "<|system|>S<|endoftext|><|prompter|>q<|endoftext|><|assistant|>a<|endoftext|>"
        "<|prompter|>r<|endoftext|><|assistant|>"
    ),
    "OpenChat": (
        "S<|end_of_turn|>GPT4 Correct User: q<|end_of_turn|>GPT4 Correct Assistant: a<|end_of_turn|>"
        "GPT4 Correct User: r<|end_of_turn|>GPT4 Correct Assistant:"
    ),
    "Orca Mini": "### System:\nS\n\n" + HASHES.format("Response"),
    "Phi-3": ("<|system|>\nS<|end|>\n<|user|>\nq<|end|>\n<|assistant|>\na<|end|>\n<|user|>\nr<|end|>\n<|assistant|>\n"),
    "Samantha": f"<|im_start|>system\nS<|im_end|>\n{CHATML}<|im_start|>assistant\n",
    "StableBeluga2": "### System:\nS\n\n" + HASHES.format("Assistant"),
    "Starchat-Beta": (
        "<|system|>\nS<|end|>\n<|user|>\nq<|end|>\n<|assistant|>\na<|end|>\n<|user|>\nr<|end|>\n<|assistant|>\n"
    ),
    "Tulu": "<|system|>\nS\n<|user|>\nq\n<|assistant|>\na</s>\n<|user|>\nr\n<|assistant|>\n",
    "Vicuna-v1.1": f"S {VICUNA}",
    "WizardLM": f"S {VICUNA}",
    "Zephyr": "<|system|>\nS</s>\n<|user|>\nq</s>\n<|assistant|>\na</s>\n<|user|>\nr</s>\n<|assistant|>\n",
}


def test_each_shipped_template_writes_the_format_of_its_models() -> None:
    known = InstructionTemplates()
    assert {name: written(known.get(name).source, [SYSTEM, *TALK]) for name in known.names()} == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_each_shipped_template_shows_any_order_of_roles_and_continues(name: str) -> None:
    source = InstructionTemplates().get(name).source
    answer = {"role": "assistant", "content": "<1>"}
    mixed = [answer, SYSTEM, answer, {"role": "user", "content": "<2>"}, {"role": "user", "content": "<3>"}, SYSTEM]
    shown = written(source, mixed)
    assert shown.count("<1>") == 2
    assert "<2>" in shown
    assert "<3>" in shown
    unfinished = written(source, [*TALK, answer], continue_final_message=True)
    assert unfinished.endswith("<1>")
    assert written(source, TALK, add_generation_prompt=False) in written(source, [*TALK, answer])


@pytest.mark.parametrize("name", SHIPPED)
def test_no_shipped_template_leaves_out_what_tools_say(name: str) -> None:
    source = InstructionTemplates().get(name).source
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}]
    for message in (
        {"role": "tool", "tool_call_id": "1", "content": "4"},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ):
        with pytest.raises(Refusal, match="has no form for tools"):
            written(source, [*TALK, message])


def test_none_is_the_model_s_own_and_the_word_none_is_alpaca() -> None:
    known = InstructionTemplates()
    assert known.get(None) == InstructionTemplate()
    assert known.get("None") == known.get("alpaca") == known.get("Alpaca")


def test_an_unknown_name_is_refused_with_names_like_it() -> None:
    for name, near in {
        "lama-v3": "Llama-v3",
        "vicuna": "Vicuna-v1.1",
        "../Alpaca": "Alpaca",
        "qqqqqq": "ChatML",
    }.items():
        with pytest.raises(InvalidRequest, match=rf"no instruction template '{name}'; there is .*{near}") as caught:
            InstructionTemplates().get(name)
        assert caught.value.param == "instruction_template"


def test_the_default_system_text_needs_a_conversation_without_one() -> None:
    assert written(FIVE.jinja(), TALK) == "D\n\nU: q\nB: a</s>\nU: r\nB:"
    assert written(FIVE.jinja(), [SYSTEM, *TALK[:1]]) == "S\n\nU: q\nB:"
    assert written(FIVE.jinja(), [*TALK[:1], SYSTEM]) == "U: q\nS\n\nB:"
    assert written(FiveKeys(TURN, "U:", "B:", FIVE.context, "").jinja(), TALK[:1]) == "\n\nU: q\nB:"
    assert written(FiveKeys(TURN, "U:", "B:", FIVE.context, None).jinja(), TALK[:1]) == "U: q\nB:"


def test_a_context_without_a_place_for_the_system_text_stays() -> None:
    source = FiveKeys(TURN, "U:", "B:", "Talk.\\n", "D").jinja()
    assert written(source, TALK[:1]) == "Talk.\nU: q\nB:"
    assert written(source, [SYSTEM, *TALK[:1]]) == "Talk.\nS\n\nU: q\nB:"


def test_newlines_may_be_two_characters_and_names_empty() -> None:
    source = FiveKeys("<|user|><|user-message|>\\n<|bot|><|bot-message|>\\n\n").jinja()
    assert written(source, TALK) == "q\na\n\nr\n"


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    ["{{ 1 }}", "{% raw %}", "'}}", '"%}', "\\'", "\\x41", "\r\n", "{#", "#}", "\u2028", "\U0001f600", "\\"]
)


@given(texts, texts, texts, texts, texts, texts)
def test_texts_in_five_keys_reach_the_prompt_whatever_they_are(
    user: str, bot: str, between: str, end: str, context: str, system: str
) -> None:
    def shown(text: str) -> str:
        return text.replace("\\n", "\n")

    turn = f"<|user|><|user-message|>{between}<|bot|> <|bot-message|>{end}"
    source = FiveKeys(turn, user, bot, f"{context}<|system-message|>", system).jinja()
    first = f"{shown(user)}q{shown(between)}{shown(bot)}"
    second = f"{shown(user)}r{shown(between)}{shown(bot + ' ').rstrip(' ')}"
    assert written(source, TALK) == f"{shown(context)}{system.strip()}{first} a{shown(end)}{second}"
    assert source.isascii()
    assert source.isprintable()


FILES: dict[str, tuple[str, str]] = {
    "T.jinja": ("{{ messages[0].content }}\n", "q"),
    "T.jinja2": ("{{ messages[0].content }}", "q"),
    "T.yaml": ("instruction_template: |-\n  {{ messages[0].content }}\n  !", "q\n!"),
    "T.yml": ('user: "U:"\nbot: "B:"\nturn_template: "<|user|><|user-message|>\\n<|bot|><|bot-message|>"', "U:q\nB:"),
    "T.json": (json.dumps({"user": "U:", "turn_template": TURN, "context": "c"}), "cU: q\n"),
}


@pytest.mark.parametrize(("name", "content", "expected"), [(k, *v) for k, v in FILES.items()], ids=FILES)
def test_forms_of_files(tmp_path: Path, name: str, content: str, expected: str) -> None:
    (tmp_path / name).write_text(content)
    known = InstructionTemplates(tmp_path)
    assert "T" in known.names()
    assert written(known.get("t").source, TALK[:1]) == expected


def test_an_operator_s_file_stands_before_ours(tmp_path: Path) -> None:
    (tmp_path / "alpaca.jinja").write_text("mine")
    assert InstructionTemplates(tmp_path).get("None").source == "mine"


WRONG: dict[str, tuple[str, str]] = {
    "no turn": ("user: a", "turn_template: the turn must have <|user|>, <|user-message|>"),
    "no order": ('turn_template: "<|bot|><|bot-message|><|user|><|user-message|>"', "in this order"),
    "twice": (f"turn_template: {json.dumps(TURN + '<|user|>')}", "once, and no <|round|>"),
    "twice before": (f"turn_template: {json.dumps('<|bot|>' + TURN)}", "once, and no <|round|>"),
    "round": (f"turn_template: {json.dumps('<|round|>' + TURN)}", "once, and no <|round|>"),
    "no text": ("turn_template: [1]", "turn_template must be a text"),
    "template that is no text": ("instruction_template: 1", "instruction_template must be a text"),
    "plain jinja": ("{{ messages }}", "can't be read"),
}


@pytest.mark.parametrize(("content", "reason"), WRONG.values(), ids=WRONG)
def test_wrong_files(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "T.yaml").write_text(content)
    with pytest.raises(RegistryError) as caught:
        InstructionTemplates(tmp_path).get("T")
    assert caught.value.message.startswith("instruction template T.yaml: ")
    assert reason in caught.value.message


OVERRIDDEN: dict[str, tuple[str | None, Overrides, str]] = {
    "all": (
        "ChatML",
        Overrides(TURN, "U:", "B:", "(<|system-message|>)", "D"),
        "(D)U: q\nB: a</s>\nU: r\nB:",
    ),
    "system text": ("Vicuna-v1.1", Overrides(system_message="Be brief."), f"Be brief. {VICUNA}"),
    "names": (
        "Vicuna-v1.1",
        Overrides(name1_instruct="U:", name2_instruct="B:", system_message="D"),
        "D U: q B: a</s>U: r B:",
    ),
    "context": ("Vicuna-v1.1", Overrides(context_instruct="Hi! ", turn_template=""), f"Hi! {VICUNA}"),
    "no template but a turn": (None, Overrides(TURN, "U:", "B:"), "U: q\nB: a</s>\nU: r\nB:"),
    "empty is not given": ("Gemma", Overrides(system_message=""), SHIPPED["Gemma"].replace("S\n\n", "")),
}


@pytest.mark.parametrize(("name", "overrides", "expected"), OVERRIDDEN.values(), ids=OVERRIDDEN)
def test_overrides(name: str | None, overrides: Overrides, expected: str) -> None:
    template = InstructionTemplates().get(name, overrides)
    assert template.system == ""
    assert written(template.source, TALK) == expected


@pytest.mark.parametrize("name", [None, "Gemma"])
def test_a_system_text_goes_with_any_template(name: str | None) -> None:
    known = InstructionTemplates()
    assert known.get(name, Overrides(system_message="D")) == InstructionTemplate(known.get(name).source, "D")


@pytest.mark.parametrize(
    ("name", "overrides", "param"),
    [
        (None, Overrides(name1_instruct="U:", system_message="D"), "name1_instruct"),
        ("Gemma", Overrides(context_instruct="c"), "context_instruct"),
        ("Gemma", Overrides(turn_template=TURN), "turn_template"),
        ("Alpaca", Overrides(turn_template="no turn"), "turn_template"),
        ("Alpaca", Overrides(name2_instruct="\ud800"), "name2_instruct"),
    ],
)
def test_overrides_that_can_not_be_are_refused(name: str | None, overrides: Overrides, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        InstructionTemplates().get(name, overrides)
    assert caught.value.param == param
