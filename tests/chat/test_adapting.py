"""Conversations with tools are fitted to templates that have no place for them."""

from __future__ import annotations

import json
from typing import Any

from msgspec.structs import replace

from llamaserve.chat.adapting import adapted
from llamaserve.chat.formats.hermes import HERMES
from llamaserve.chat.formats.llama3 import LLAMA3
from llamaserve.chat.messages import normalise
from llamaserve.chat.tools import Toolbox, toolbox
from llamaserve.chat.traits import Traits

FULL = Traits(tools=True, calls=True, several=True, results=True)
ONE_CALL = replace(FULL, several=False)
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Ask {x} the sky.", "parameters": {}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Łódź"}'}}
TIME = {"id": "call_2", "type": "function", "function": {"name": "time", "arguments": "{}"}}
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": "I look.", "tool_calls": [CALL, TIME], "reasoning_content": "Hm."},
    {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
    {"role": "tool", "tool_call_id": "call_2", "content": "noon"},
]


def tools() -> Toolbox | None:
    return toolbox(tools=[WEATHER], tool_choice=None, parallel_tool_calls=None, functions=None, function_call=None)


def fitted(traits: Traits, messages: list[dict[str, Any]] = HISTORY) -> list[dict[str, Any]]:
    return adapted(normalise(messages), traits, tools(), HERMES)[0]


def test_a_template_that_knows_tools_gets_everything_as_it_is() -> None:
    messages, offered = adapted(normalise(HISTORY), FULL, tools(), HERMES)
    assert messages == normalise(HISTORY)
    assert [tool["function"]["name"] for tool in offered or []] == ["weather"]


def test_a_template_that_does_not_know_tools_gets_only_texts() -> None:
    messages, offered = adapted(normalise(HISTORY), Traits(), tools(), HERMES)
    assert offered is None
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    system, _, answer, results = (message["content"] for message in messages)
    assert json.dumps(tools().tools[0].for_template()["function"]) in system  # type: ignore[union-attr]
    assert '{"name": "weather", "arguments": {"city": "Łódź"}}' in answer
    assert answer.startswith("I look.\n<tool_call>")
    assert answer.count("<tool_call>") == 2
    assert results.count("<tool_response>") == 2
    assert results.index("sun") < results.index("noon")
    assert not any("tool_calls" in message for message in messages)


def test_tools_are_described_after_the_system_text() -> None:
    system = {"role": "system", "content": "Be brief."}
    messages = fitted(Traits(), [system, *HISTORY])
    assert messages[0]["content"].startswith("Be brief.\n\n")
    assert [message["role"] for message in messages].count("system") == 1


def test_calls_of_before_are_text_even_if_no_tools_are_offered_now() -> None:
    messages, _ = adapted(normalise(HISTORY), Traits(), None, HERMES)
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert "weather" in messages[1]["content"]


def test_arguments_are_texts_if_the_template_wants_them_so() -> None:
    calls = fitted(replace(FULL, arguments="text"))[1]["tool_calls"]
    assert [call["function"]["arguments"] for call in calls] == ['{"city": "Łódź"}', "{}"]


def test_ids_have_the_length_that_the_template_insists_on() -> None:
    messages = fitted(replace(FULL, id_length=9))
    ids = [call["id"] for call in messages[1]["tool_calls"]]
    assert all(len(each) == 9 and each.isalnum() for each in ids)
    assert [message["tool_call_id"] for message in messages[2:]] == ids
    assert len(set(ids)) == 2
    kept = {**HISTORY[1], "tool_calls": [{**CALL, "id": "abcDEF123"}]}
    assert fitted(replace(FULL, id_length=9), [HISTORY[0], kept])[1]["tool_calls"][0]["id"] == "abcDEF123"


def test_ids_say_which_function_is_called_if_nothing_else_does() -> None:
    messages = fitted(replace(FULL, ids_name=True))
    ids = [call["id"] for call in messages[1]["tool_calls"]]
    assert ids == ["functions.weather:0", "functions.time:1"]
    assert [message["tool_call_id"] for message in messages[2:]] == ids


def test_text_and_calls_are_two_messages_if_the_template_shows_only_one_of_them() -> None:
    for traits, content in ((replace(FULL, null_content=True), None), (replace(FULL, text_apart=True), "")):
        messages = fitted(traits)
        assert [message["role"] for message in messages] == ["user", "assistant", "assistant", "tool", "tool"]
        assert messages[1] == {"role": "assistant", "content": "I look."}
        assert messages[2]["content"] == content
        assert messages[2]["reasoning_content"] == "Hm."
        assert len(messages[2]["tool_calls"]) == 2


def test_calls_without_text_stay_as_they_are() -> None:
    silent = [HISTORY[0], {**HISTORY[1], "content": ""}, *HISTORY[2:]]
    assert fitted(replace(FULL, text_apart=True), silent) == normalise(silent)


def test_calls_that_are_written_into_the_text_stay_in_it() -> None:
    traits = Traits(calls=True, several=True, results=True, null_content=True)
    assert [message["role"] for message in fitted(traits)] == ["system", "user", "assistant", "user"]


def test_several_calls_are_several_answers_if_the_template_shows_only_one_in_each() -> None:
    messages = fitted(ONE_CALL)
    asked, first, sun, second, noon = messages
    assert asked == HISTORY[0]
    assert (first["content"], first["reasoning_content"]) == ("I look.", "Hm.")
    assert second == {"role": "assistant", "content": "", "tool_calls": [normalise(HISTORY)[1]["tool_calls"][1]]}
    assert [call["id"] for call in first["tool_calls"]] == ["call_1"]
    assert (sun["content"], noon["content"]) == ("sun", "noon")


def test_results_follow_their_calls_in_whatever_order_they_came() -> None:
    called, sun, noon = HISTORY[1:]
    again = {"role": "tool", "tool_call_id": "call_2", "content": "night"}
    thanks = {"role": "user", "content": "Thanks."}
    messages = fitted(ONE_CALL, [HISTORY[0], called, noon, sun, thanks, called, again])
    shown = [message["tool_calls"][0]["id"] if "tool_calls" in message else message["content"] for message in messages]
    assert shown == ["Rain?", "call_1", "sun", "call_2", "noon", "Thanks.", "call_1", "call_2", "night"]


def test_an_answer_with_several_calls_can_have_its_text_apart() -> None:
    messages = fitted(replace(ONE_CALL, text_apart=True, null_content=True, id_length=9))
    roles = ["user", "assistant", "assistant", "tool", "assistant", "tool"]
    assert [message["role"] for message in messages] == roles
    assert [message["content"] for message in messages] == ["Rain?", "I look.", None, "sun", None, "noon"]
    for call, result in ((2, 3), (4, 5)):
        assert messages[call]["tool_calls"][0]["id"] == messages[result]["tool_call_id"]


def test_several_calls_in_texts_are_several_answers_if_the_model_writes_only_one() -> None:
    messages, _ = adapted(normalise(HISTORY), Traits(tools=True), tools(), LLAMA3)
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant", "user"]
    assert [message["content"].count('"parameters"') for message in messages] == [0, 1, 0, 1, 0]


def test_thoughts_have_the_name_that_the_template_looks_for() -> None:
    answer = fitted(Traits(tools=True, calls=True, results=True, thoughts="thinking"))[1]
    assert answer["thinking"] == "Hm."
    assert "thinking" not in fitted(FULL)[1]
