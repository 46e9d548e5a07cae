"""The modes: the prompts and the stop strings that text-generation-webui makes, but for what is said of each test."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, strategies as st

from llamaserve.chat import renderer
from llamaserve.chat.answer import AnswerReader
from llamaserve.chat.characters import Character
from llamaserve.chat.instruction_templates import FiveKeys, InstructionTemplate, InstructionTemplates
from llamaserve.chat.modes import Mode, ModelTemplate, Style, Styled, ends_of, styled
from llamaserve.chat.reading import Content
from llamaserve.chat.template import RenderJob
from llamaserve.errors import InvalidRequest, ModelNotCapable

BOLT = Character(
    "Bolt",
    context=(
        "Bolt is a terse repair robot who calls <USER> 'boss'.\n\n"
        "{{user}}: Can you fix a lamp?\n{{char}}: <BOT> can fix anything."
    ),
)
DEMO = FiveKeys(
    user="USER:",
    bot="BOT:",
    turn_template="<|user|> <|user-message|>\\n<|bot|> <|bot-message|></s>\\n",
    context="<|system-message|>\n\n",
    system_message="Be useful.",
)
STYLE = Style(
    character=BOLT,
    name1="Ada",
    instruction=InstructionTemplate(DEMO.jinja()),
    chat_instruct_command="Speak next as <|character|>.\n\n<|prompt|>",
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

CTX = "Bolt is a terse repair robot who calls Ada 'boss'.\n\nAda: Can you fix a lamp?\nBolt: Bolt can fix anything.\n"


def said(*texts: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in texts]


M1 = said(("user", "Hi there"), ("assistant", "Beep. Hello."), ("user", "Fix my radio?"))
M = [*said(("system", "Answer in French.")), *M1]
SURE = [*M1, *said(("assistant", "Sure, first"))]
MIXED = said(
    *(("user", " a "), ("user", "b"), ("system", "S2"), ("assistant", "c"), ("assistant", "d"), ("user", "e")),
)
RADIO = "Ada: Hi there\nBolt: Beep. Hello.\nAda: Fix my radio?\n"
QUESTION = "USER: Hi there\nBOT: Beep. Hello.</s>\nUSER: Fix my radio?\n"


async def render(job: RenderJob) -> str:
    return renderer.render(job)


def write(style: Style, messages: Sequence[dict[str, Any]], template: str | None = None, **variables: Any) -> Styled:
    return asyncio.run(styled(render, style, messages, ModelTemplate(template, "<s>", "</s>"), variables))


def in_mode(mode: str, **changes: Any) -> Style:
    return replace(STYLE, mode=Mode(mode), **changes)


# By the numbers of the specification's test vectors: what text-generation-webui of 2026 makes. In chat-instruct (4, 8)
# the model's name follows, as it did in 2023. In the chat mode (3) a leading system message follows the context, and is
# not left out. 5 is a bug of old.
VECTORS = {
    "1": (in_mode("instruct"), M, f"Answer in French.\n\n{QUESTION}BOT:"),
    "2": (in_mode("instruct"), M1, f"Be useful.\n\n{QUESTION}BOT:"),
    "3": (in_mode("chat"), M1, f"{CTX}\n{RADIO}Bolt:"),
    "3, with a system message": (in_mode("chat"), M, f"{CTX}\nAnswer in French.\n\n{RADIO}Bolt:"),
    "4": (
        in_mode("chat-instruct"),
        M,
        f"Answer in French.\n\nUSER: Speak next as Bolt.\n\n{CTX}\n{RADIO}\nBOT: Bolt:",
    ),
    "6": (in_mode("instruct", continue_=True), SURE, f"Be useful.\n\n{QUESTION}BOT: Sure, first"),
    "7": (in_mode("chat", continue_=True), SURE, f"{CTX}\n{RADIO}Bolt: Sure, first"),
    "8": (
        in_mode("chat-instruct", continue_=True),
        SURE,
        f"Be useful.\n\nUSER: Speak next as Bolt.\n\n{CTX}\n{RADIO}\nBOT: Bolt: Sure, first",
    ),
    "9": (in_mode("instruct"), SURE, f"Be useful.\n\n{QUESTION}BOT: Sure, first</s>\nBOT:"),
    "10": (in_mode("instruct"), MIXED, "USER: a\nUSER: b\nS2\n\nBOT: c</s>\nBOT: d</s>\nUSER: e\nBOT:"),
    "11": (in_mode("chat"), MIXED, f"{CTX}\nAda: a\nAda: b\nS2\n\nBolt: c\nBolt: d\nAda: e\nBolt:"),
    "12": (in_mode("instruct"), said(("system", "S1\nS2"), ("user", "q")), "S1\nS2\n\nUSER: q\nBOT:"),
    "13": (
        in_mode("chat", user_bio="{{user}} is an engineer."),
        M1,
        f"{CTX}\nAda is an engineer.\n\n{RADIO}Bolt:",
    ),
    "14": (in_mode("chat", character=Character("Bolt")), M1, f"{RADIO}Bolt:"),
}


@pytest.mark.parametrize(("style", "messages", "expected"), VECTORS.values(), ids=VECTORS)
def test_prompts_are_those_of_the_specification(style: Style, messages: list[dict[str, Any]], expected: str) -> None:
    assert write(style, messages).prompt == expected


STOPS = {
    "instruct": (in_mode("instruct"), ("\nBOT:", "</s>")),
    "chat": (in_mode("chat"), ("\nBolt:", "\nAda:")),
    "chat-instruct": (in_mode("chat-instruct"), ("\nBOT:", "</s>", "\nAda:", "\nBolt:")),
    "chatml": (in_mode("instruct", instruction=InstructionTemplate(CHATML)), ("<|im_end|>",)),
}


@pytest.mark.parametrize(("style", "expected"), STOPS.values(), ids=STOPS)
@pytest.mark.parametrize("messages", [M, M1], ids=["system", "no system"])
def test_stop_strings_come_from_the_template(
    style: Style, expected: tuple[str, ...], messages: list[dict[str, Any]]
) -> None:
    assert write(style, messages).stop == expected


ENDS = {
    "Alpaca": ("\n\n### Response:", "\n\n### Instruction:"),
    "Gemma": ("<end_of_turn>",),
    "Llama-v2": ("[/INST]", "</s>"),
    "Metharme": ("<|model|>", "<|user|>"),
    "Vicuna-v1.1": (" ASSISTANT:", "</s>"),
}


@pytest.mark.parametrize(("name", "expected"), ENDS.items(), ids=ENDS)
def test_stop_strings_of_shipped_templates(name: str, expected: tuple[str, ...]) -> None:
    assert write(in_mode("instruct", instruction=InstructionTemplates().get(name)), M1).stop == expected


def test_an_end_of_a_message_does_not_end_an_answer_of_gpt_oss() -> None:
    source = (
        "{% for m in messages %}{{ '<|start|>' + m.role }}{% if m.role == 'assistant' %}{{ '<|channel|>final' }}"
        "{% endif %}{{ '<|message|>' + m.content }}"
        "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    )
    assert write(in_mode("instruct", instruction=InstructionTemplate(source)), M1).stop == ("<|return|>",)
    assert ends_of("firstquokka<|end|>secondquokka<|end|>thirdquokka", "<|channel|><|result|>") == ("<|result|>",)


def test_of_two_stop_strings_the_one_that_extends_the_other_is_left_out() -> None:
    shown = "firstquokka\nA: secondquokka\nA: thirdquokka x fourthquokka (end) B:"
    assert ends_of(shown, "") == ("\nA:", "(end)")
    assert ends_of("firstquokka</s>secondquokka</s> U:", "") == ("</s>",)
    assert ends_of("firstquokka\nBOT:secondquokka\nBOTTOM: thirdquokkafourthquokka\nBOT: x", "") == (
        "\nBOT:",
        "\nBOTTOM:",
    )
    assert ends_of("none of them", "") == ()


def test_the_model_s_own_template_reads_what_the_client_wrote() -> None:
    own = in_mode("instruct", instruction=InstructionTemplate())
    written = write(own, said(("user", " a ")), CHATML)
    assert written == Styled("<|im_start|>user\n a <|im_end|>\n<|im_start|>assistant\n")
    unfinished = said(("user", "a"), ("assistant", " b "))
    assert write(replace(own, continue_=True), unfinished, CHATML).prompt.endswith("<|im_start|>assistant\n b ")


def test_the_white_space_of_a_continued_text_stays() -> None:
    messages = said(("user", " a "), ("assistant", "b \n"))
    assert write(in_mode("instruct", continue_=True), messages).prompt == "Be useful.\n\nUSER: a\nBOT: b \n"
    assert write(in_mode("chat", continue_=True), messages).prompt == f"{CTX}\nAda: a\nBolt: b \n"


def test_chat_instruct_uses_the_model_s_own_template_when_none_is_named() -> None:
    own = in_mode("chat-instruct", instruction=InstructionTemplate(), chat_instruct_command="")
    written = write(own, M1, CHATML)
    assert written.prompt.startswith("<|im_start|>user\nBelow is a conversation. Write what Bolt says next")
    assert written.prompt.endswith("Ada: Fix my radio?\n<|im_end|>\n<|im_start|>assistant\nBolt:")
    assert written.stop == ("\nAda:", "\nBolt:")


def test_the_name_stands_after_what_a_template_writes_before_an_answer() -> None:
    thinking = "{% for m in messages %}{{ m.content }}{{ '<think></think>' if m.role == 'user' }}{% endfor %}"
    own = in_mode("chat-instruct", instruction=InstructionTemplate())
    assert write(own, M1, thinking).prompt.endswith("Fix my radio?\n<think></think>Bolt:")


def test_a_model_without_a_template_can_only_chat() -> None:
    for mode in ("instruct", "chat-instruct"):
        with pytest.raises(ModelNotCapable, match=f"mode '{mode}' needs"):
            write(in_mode(mode, instruction=InstructionTemplate()), M1)
    assert write(in_mode("chat", instruction=InstructionTemplate()), M1).prompt.endswith("Bolt:")


def test_names_and_texts_of_the_request_stand_before_the_character_s() -> None:
    style = in_mode("chat", name2="Nut", context="{{char}} & {{user}}")
    assert write(style, M1[:1]).prompt == "Nut & Ada\n\nAda: Hi there\nNut:"
    with_user = replace(BOLT, user="Eve", context="")
    assert write(replace(style, character=with_user), M1[:1]).prompt == "Nut & Eve\n\nEve: Hi there\nNut:"
    assert write(in_mode("chat", name1="", character=Character("AI")), M1[:1]).prompt == "You: Hi there\nAI:"


def test_a_greeting_is_not_inserted() -> None:
    assert write(in_mode("chat", greeting="Hello!"), M1) == write(in_mode("chat"), M1)


def test_a_system_text_needs_no_context_and_is_not_filled() -> None:
    messages = [*said(("system", "Use {{char}}.")), *M1[:1]]
    style = in_mode("chat", character=Character("Bolt"), user_bio="Bio")
    assert write(style, messages).prompt == "Use {{char}}.\n\nBio\n\nAda: Hi there\nBolt:"
    assert write(style, M1[:1]).prompt == "Bio\n\nAda: Hi there\nBolt:"


def test_a_default_system_text_goes_where_there_is_none() -> None:
    own = in_mode("instruct", instruction=InstructionTemplate(system=" S "))
    assert write(own, M1[:1], CHATML).prompt.startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi")
    assert "S<" not in write(own, M, CHATML).prompt
    assert write(replace(own, mode=Mode.CHAT_INSTRUCT), M1, CHATML).prompt.startswith("<|im_start|>system\nS<")
    assert write(own, M1, CHATML).stop == ()


def test_own_chat_templates_are_filled() -> None:
    source = "{{char}}!{% for m in messages %}{{ m.content }}{{ tools[0] }}{% endfor %}{{ name1 }}{{ mood }}"
    written = write(in_mode("chat", chat_template=source, character=Character("Bolt")), M1[:1], mood="x", tools=["t"])
    assert written.prompt == "Bolt!Hi theretAdax"


def test_placeholders_in_the_dialogue_of_a_command_are_filled() -> None:
    messages = said(("user", "I am {{user}}. <|prompt|>"))
    written = write(in_mode("chat-instruct", character=Character("Bolt")), messages)
    assert "as Bolt.\n\nAda: I am Ada. <|prompt|>\n" in written.prompt


def test_tools_in_a_dialogue_are_lines_in_brackets() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": "é"}}}
    messages = [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "1", "name": "f"},
        {"role": "tool", "content": "5", "tool_call_id": "1"},
        {"role": "assistant", "content": "", "tool_calls": []},
    ]
    written = write(in_mode("chat", character=Character("Bolt")), messages)
    assert written.prompt == 'Ada: Go\n[Call of f: {"a": "é"}]\n[Result of f: 4]\n[Result of a tool: 5]\nBolt: \nBolt:'


REFUSED = {
    "a long name": ({"name1": "x" * 257}, M1, "name1"),
    "half a surrogate pair": ({"context": "\ud800"}, M1, "context"),
    "placeholders without end": ({"context": "<USER>" * 200_000, "name1": "x" * 256}, M1, "context"),
    "prompts without end": (
        {"chat_instruct_command": "<|prompt|>" * 40_000, "mode": Mode.CHAT_INSTRUCT},
        M1,
        "chat_instruct_command",
    ),
    "nothing to continue": ({"continue_": True}, M1, "messages"),
    "no messages to continue": ({"continue_": True, "mode": Mode.INSTRUCT}, [], "messages"),
}


@pytest.mark.parametrize(("changes", "messages", "param"), REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_is_refused(changes: dict[str, Any], messages: list[dict[str, Any]], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        write(replace(in_mode("chat"), **changes), messages)
    assert caught.value.param == param


def test_what_the_answer_may_begin_with() -> None:
    assert write(in_mode("chat"), M1).speakers == ("Bolt:", "Ada:")
    assert write(in_mode("chat-instruct"), M1).speakers == ("Bolt:", "Ada:")
    assert write(in_mode("instruct"), M1).speakers == ()
    assert write(in_mode("chat", continue_=True), SURE).speakers == ()


REPLIES = {
    " Hello": "Hello",
    "\n Bolt:  Hello ": "Hello ",
    "Bolt:": "",
    "Bol": "Bol",
    "Bolted: no": "Bolted: no",
    "Bob: Bolt: x": "Bolt: x",
    "Ada: Bolt: x": "Bolt: x",
    "bolt: x": "bolt: x",
    "  ": "",
    "": "",
}


@pytest.mark.parametrize(("answer", "expected"), REPLIES.items())
@given(cuts=st.lists(st.integers(0, 16)))
def test_a_reply_loses_its_speaker_however_it_arrives(answer: str, expected: str, cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(answer)]
    reader = AnswerReader(speakers=("Bolt:", "Bob:", "Bolt: x:", "Ada:"))
    parts = [part for a, b in pairwise(places) for part in reader.push(answer[a:b])] + reader.finish()
    assert "".join(part.text for part in parts if isinstance(part, Content)) == expected


def test_a_reply_is_held_no_longer_than_it_could_be_a_name() -> None:
    reader = AnswerReader(speakers=("Bolt:",))
    shown = ["".join(part.text for part in reader.push(piece)) for piece in (" ", "B", "o", "n", " x", "")]
    assert shown == ["", "", "", "Bon", " x", ""]
