"""Thoughts on the wire. The starter model has none of its own: what it writes is forced, or its template begins one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from api_helpers import CHAT, MODEL, all_events, assert_error, write_models_file
from chat_helpers import PROMPT, WASH, both, calls_of, in_pieces, put_together, said, template, tool, whole
from running_server import RunningServer

HI = said(("user", "Say hi."))
_TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
)
BEGINS = _TURNS + "<think>\n{% endif %}"  # always, whatever a request wants
SWITCHED = _TURNS + "{{ '<think>\n\n</think>\n\n' if not enable_thinking }}{% endif %}"
THOUGHT = {"messages": HI, "chat_template": BEGINS, "max_tokens": 60, "seed": 1}
TAGS = {
    "<think>": "</think>",
    "<seed:think>": "</seed:think>",
    "<|channel>thought": "<channel|>",
    "<|think|>": "<|end|><|content|>",
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|><|START_RESPONSE|>",
    "◁think▷": "◁/think▷",
}
NUMBER = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}


def parts(choice: dict[str, Any]) -> tuple[str | None, str]:
    """Return what an answer thinks, and what it says."""
    message = choice["message"]
    return message.get("reasoning_content"), message["content"]


# Where thoughts go


@pytest.mark.parametrize(("start", "end"), TAGS.items())
def test_thoughts_are_taken_out_of_the_text(server: RunningServer, start: str, end: str) -> None:
    body = {"messages": HI, "guided_choice": [f"{start}\nHm, <b> hm.\n{end}\n\nHello <there>."], "max_tokens": 60}
    (choice,) = both(server, body)
    assert parts(choice) == ("Hm, <b> hm.", "Hello <there>.")
    assert choice["finish_reason"] == "stop"


def test_thoughts_in_the_way_of_gpt_oss(server: RunningServer) -> None:
    """Its form lets some of the answers begin with thoughts. It also allows any number of spaces, which the model may
    write until its tokens are used up.
    """
    body = {"messages": HI, "chat_template": template("gpt-oss"), "reasoning_budget": 4, "max_tokens": 60, "seed": 1}
    forced = {"response_format": {"type": "json_schema", "schema": NUMBER}, "n": 4}
    choices = both(server, body | forced)
    whole_ones = [choice for choice in choices if choice["finish_reason"] == "stop"]
    assert len(whole_ones) >= 2
    for choice in whole_ones:
        assert json.loads(parts(choice)[1])["a"] in (1, 2)
    for choice in choices:
        assert not re.search(r"<\|\w+\|>", parts(choice)[0] or "")
    assert any(parts(choice)[0] for choice in choices)
    (choice,) = both(server, {**body, "tools": [WASH], "tool_choice": "required"})
    assert len(calls_of(choice, WASH)) == 1


def test_an_end_without_a_beginning_counts_once_all_is_there(server: RunningServer) -> None:
    """The model goes on as its earlier answers are."""
    answer = "The user says hi.\n</think>\n\nHi!"
    body = {"messages": [*said(("user", "Say hi."), ("assistant", answer)) * 3, *HI], "max_tokens": 20}
    assert parts(whole(server, {**body, "temperature": 0})[0]) == ("The user says hi.", "Hi!")


def test_thoughts_that_the_prompt_has_begun(server: RunningServer) -> None:
    (choice,) = both(server, {**THOUGHT, "guided_choice": ["Hello.", "Bye."], "reasoning_budget": 8})
    thoughts, text = parts(choice)
    assert thoughts
    assert "think>" not in thoughts
    assert text in ("Hello.", "Bye.")


def test_thoughts_that_are_cut_are_thoughts(server: RunningServer) -> None:
    (choice,) = both(server, {**THOUGHT, "max_tokens": 5, "logit_bias": {"0": -100, "2": -100}})
    assert choice["finish_reason"] == "length"
    assert parts(choice)[0]
    assert parts(choice)[1] == ""


def test_the_fields_of_thoughts(server: RunningServer) -> None:
    body = {**THOUGHT, "reasoning_budget": 5, "guided_choice": ["Hello."]}
    thoughts = parts(whole(server, body)[0])[0]

    def message(**options: Any) -> dict[str, Any]:
        fields: dict[str, Any] = both(server, body | options)[0]["message"]
        return {name: value for name, value in fields.items() if name not in ("role", "refusal")}

    plain = {"content": "Hello.", "reasoning_content": thoughts}
    assert message() == message(reasoning_format="auto") == message(reasoning_format="deepseek") == plain
    assert message(reasoning_format="both") == plain | {"reasoning": thoughts}
    assert message(include_reasoning=False) == {"content": "Hello."}
    raw = message(reasoning_format="none")
    assert set(raw) == {"content"}
    start, _, rest = raw["content"].partition(str(thoughts))
    assert start.strip() == "<think>"
    assert [each.strip() for each in rest.split("</think>")] == ["", "Hello."]
    assert_error(server.post(CHAT, {**body, "reasoning_format": "xml"}), 400, None, "reasoning_format")


@pytest.fixture(scope="module", params=["reasoning", "both"])
def switched_server(
    request: pytest.FixtureRequest, starter_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RunningServer, str]]:
    path = write_models_file(tmp_path_factory.mktemp("reasoning"), starter_model, "context: 512, parallel: 1")
    environment = {"LLAMASERVE_REASONING_FIELD": request.param}
    with RunningServer("serve", "smollm2-135m", "--models-file", str(path), environment=environment) as running:
        yield running, request.param


def test_the_server_s_own_field(switched_server: tuple[RunningServer, str]) -> None:
    server, name = switched_server
    body = {"messages": HI, "guided_choice": ["<think>Hm.</think>Hello."], "max_tokens": 40}
    message = both(server, body)[0]["message"]
    assert message["reasoning"] == "Hm."
    assert message["content"] == "Hello."
    assert ("reasoning_content" in message) == (name == "both")
    for wanted in ("both", "deepseek"):
        message = both(server, {**body, "reasoning_format": wanted})[0]["message"]
        assert message["reasoning_content"] == "Hm."
    assert "reasoning" not in both(server, {**body, "include_reasoning": False})[0]["message"]


def test_the_sdk_gets_thoughts(client: openai.OpenAI) -> None:
    extra = {"guided_choice": ["<think>Hm.</think>Hello."]}
    answer = client.chat.completions.create(model=MODEL, messages=HI, extra_body=extra, max_tokens=40)
    assert answer.choices[0].message.reasoning_content == "Hm."  # type: ignore[attr-defined]
    chunks = client.chat.completions.create(model=MODEL, messages=HI, extra_body=extra, max_tokens=40, stream=True)
    texts = [getattr(chunk.choices[0].delta, "reasoning_content", "") for chunk in chunks]
    assert "".join(texts) == "Hm."


# How long


@pytest.mark.parametrize(
    "name",
    ["reasoning_budget", "max_thinking_tokens", "reasoning_budget_tokens", "thinking_budget_tokens", "thinking_budget"],
)
def test_a_budget_ends_the_thoughts(server: RunningServer, name: str) -> None:
    body = {**THOUGHT, name: 4, "guided_choice": ["Hello."], "logprobs": True}
    (choice,) = both(server, body)
    thoughts, text = parts(choice)
    assert text == "Hello."
    tokens = [bytes(entry["bytes"]).decode() for entry in choice["logprobs"]["content"]]
    assert "".join(tokens[:4]).strip() == thoughts
    assert "".join(tokens[4:]).split() == ["</think>", "Hello."]


def test_a_budget_can_say_something_at_the_end(server: RunningServer) -> None:
    body = {**THOUGHT, "reasoning_budget": 3, "reasoning_budget_message": " I know!\n", "guided_choice": ["Hello."]}
    thoughts, text = parts(both(server, body)[0])
    assert str(thoughts).endswith(" I know!")
    assert text == "Hello."


def test_a_budget_holds_for_thoughts_that_the_model_begins(server: RunningServer) -> None:
    """The model goes on as its earlier answers are."""
    answer = "<think>\nThe user says hi. I am polite and say the same.\n</think>\n\nHi!"
    messages = [*said(("user", "Say hi."), ("assistant", answer)) * 3, *HI]
    body = {"messages": messages, "chat_template": SWITCHED, "max_tokens": 40, "temperature": 0}
    free, limited = both(server, body)[0], both(server, {**body, "reasoning_budget": 4})[0]
    assert parts(free)[0]
    assert str(parts(free)[0]).startswith(str(parts(limited)[0]))
    assert len(str(parts(limited)[0])) < len(str(parts(free)[0]))
    assert parts(limited)[1]


@pytest.mark.parametrize("budget", [-2, 2**31, 1.5, "x", []])
def test_a_budget_is_a_number(server: RunningServer, budget: object) -> None:
    assert_error(server.post(CHAT, {**THOUGHT, "max_thinking_tokens": budget}), 400, None, "max_thinking_tokens")


def test_a_budget_for_thoughts_that_there_are_none_of_is_named(server: RunningServer) -> None:
    body = {"messages": HI, "max_tokens": 1, "max_thinking_tokens": 5}
    assert server.post(CHAT, body).headers["x-llamaserve-ignored"] == "max_thinking_tokens"
    assert_error(server.post(CHAT, {**body, "strict": True}), 400, "unsupported_parameter", "max_thinking_tokens")
    assert "x-llamaserve-ignored" not in server.post(CHAT, {**body, "chat_template": BEGINS}).headers


OFF = [
    {"enable_thinking": False},
    {"think": False},
    {"reasoning_effort": "none"},
    {"reasoning_effort": "off"},
    {"reasoning_budget": 0},
    {"max_thinking_tokens": 0},
]


@pytest.mark.parametrize("off", OFF, ids=str)
def test_thinking_can_be_switched_off(server: RunningServer, off: dict[str, Any]) -> None:
    for source in (BEGINS, SWITCHED):
        body = {**THOUGHT, "chat_template": source, "max_tokens": 8, **off}
        prompt = server.post(PROMPT, body).json()["prompt"]
        assert prompt.split("<|im_start|>assistant\n")[1].split() == ["<think>", "</think>"]
        (choice,) = both(server, body)
        assert "reasoning_content" not in choice["message"]
        assert choice["message"]["content"]


def test_the_template_is_told(server: RunningServer) -> None:
    source = "{{ enable_thinking }} {{ reasoning_effort }} {{ thinking }} {{ preserve_thinking }} {{ depth }}"
    source += "{% for m in messages %}{{ m.content }}{% endfor %}"

    def prompt(**options: Any) -> str:
        return str(server.post(PROMPT, {"messages": HI, "chat_template": source, **options}).json()["prompt"])

    assert prompt().split() == ["True", "True", "Say", "hi."]
    high = prompt(reasoning_effort="high", preserve_thinking=True, chat_template_kwargs={"depth": 3})
    assert high.split() == ["True", "high", "True", "True", "3Say", "hi."]
    assert prompt(reasoning_effort="none").split() == ["False", "False", "Say", "hi."]
    assert prompt(chat_template_kwargs={"enable_thinking": False}).split()[0] == "False"


@pytest.mark.parametrize("name", ["messages", "tools", "bos_token", "eos_token", "add_generation_prompt"])
def test_variables_of_a_template_that_are_taken(server: RunningServer, name: str) -> None:
    body = {"messages": HI, "chat_template_kwargs": {name: 1}, "max_tokens": 1}
    assert name in assert_error(server.post(CHAT, body), 400, None, "chat_template_kwargs")


# Together with forms and tools


@pytest.mark.parametrize("stream", [False, True])
def test_a_form_is_that_of_the_text_after_the_thoughts(server: RunningServer, stream: bool) -> None:
    body = {**THOUGHT, "reasoning_budget": 6, "max_tokens": 120, "n": 3, "temperature": 1}
    body["response_format"] = {"type": "json_schema", "json_schema": {"name": "n", "schema": NUMBER}}
    for choice in in_pieces(server, body) if stream else whole(server, body):
        thoughts, text = parts(choice)
        assert thoughts
        assert json.loads(text)["a"] in (1, 2)
        assert choice["finish_reason"] == "stop"


def test_a_form_without_thoughts(server: RunningServer) -> None:
    body = {**THOUGHT, "enable_thinking": False, "response_format": {"type": "json_schema", "schema": NUMBER}}
    thoughts, text = parts(both(server, body)[0])
    assert thoughts is None
    assert json.loads(text)["a"] in (1, 2)


def test_a_call_after_thoughts(server: RunningServer) -> None:
    body = {**THOUGHT, "reasoning_budget": 5, "tools": [WASH], "tool_choice": "required", "max_tokens": 100}
    (choice,) = both(server, body)
    assert choice["message"]["reasoning_content"]
    assert len(calls_of(choice, WASH)) == 1


def test_thoughts_of_families_with_tools(server: RunningServer) -> None:
    for name in ("qwen3", "deepseek-r1", "smollm3"):
        body = {"messages": HI, "chat_template": template(name), "tools": [tool("f")], "max_tokens": 2, "seed": 1}
        both(server, body)
        both(server, {**body, "enable_thinking": False})


def test_logprobs_of_thoughts_come_once(server: RunningServer) -> None:
    body = {**THOUGHT, "reasoning_budget": 5, "guided_choice": ["Hello."], "logprobs": True}
    entries = whole(server, body)[0]["logprobs"]["content"]
    for options in ({}, {"include_reasoning": False}, {"reasoning_format": "both"}):
        assert in_pieces(server, body | options)[0]["logprobs"]["content"] == entries


def test_usage_counts_thoughts(server: RunningServer) -> None:
    body = {**THOUGHT, "reasoning_budget": 5, "guided_choice": ["Hello."], "logprobs": True}
    *chunks, last, done = all_events(server, CHAT, {**body, "stream_options": {"include_usage": True}})
    (choice,) = put_together([*chunks, done])
    assert last["usage"]["completion_tokens"] == len(choice["logprobs"]["content"])


# Earlier thoughts


def test_earlier_thoughts_may_come_back(server: RunningServer) -> None:
    """Clients send the message as they got it."""
    answer = {"role": "assistant", "content": "Hello.", "reasoning_content": "Hm.", "reasoning": "Hm."}
    body = {"messages": [*HI, answer, *HI], "max_tokens": 2}
    assert "Hm." not in server.post(PROMPT, body).json()["prompt"]
    assert whole(server, body)
    odd = {**answer, "reasoning": "Other."}
    assert_error(server.post(CHAT, {"messages": [*HI, odd, *HI]}), 400, None, "messages[1].reasoning")


def test_thoughts_can_be_continued(server: RunningServer) -> None:
    messages = [*HI, *said(("assistant", "<think>\nHm"))]
    body = {"messages": messages, "max_tokens": 40, "seed": 1, "reasoning_budget": 4, "temperature": 0}
    (old_and_new,) = both(server, {**body, "continue_": True})
    (new,) = both(server, {**body, "continue_final_message": True})
    assert old_and_new["message"]["reasoning_content"].startswith("Hm")
    assert old_and_new["message"]["content"] == new["message"]["content"]
    assert not new["message"]["reasoning_content"].startswith("Hm")
