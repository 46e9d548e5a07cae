"""Messages of a request, checked and made plain."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, strategies as st

from llamaserve.chat.messages import normalise
from llamaserve.errors import InvalidRequest, UnsupportedParameter

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def user(content: Any, **extra: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **extra}


def test_texts_pass_unchanged() -> None:
    messages = [
        {"role": "system", "content": " Be kind. "},
        user("\n hi \n"),
        {"role": "assistant", "content": "hello"},
        user(""),
    ]
    assert normalise(messages) == messages


@given(st.lists(st.tuples(st.sampled_from(["system", "developer", "user", "assistant"]), TEXT), min_size=1))
def test_every_text_arrives_in_order(turns: list[tuple[str, str]]) -> None:
    plain = normalise([{"role": role, "content": text} for role, text in turns])
    assert "\n".join(message["content"] for message in plain) == "\n".join(text for _, text in turns)
    assert "developer" not in {message["role"] for message in plain}
    assert [message["role"] for message in plain[:2]] != ["system", "system"]


def test_the_input_is_left_alone() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}]},
        {"role": "system", "content": "b"},
    ]
    normalise(messages)
    assert messages[0] == {"role": "developer", "content": [{"type": "text", "text": "a"}]}


def test_leading_system_messages_are_joined_and_later_ones_stay() -> None:
    roles = ["system", "developer", "user", "developer", "system", "user"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, "abcdef", strict=True)]
    assert normalise(messages) == [
        {"role": "system", "content": "a\nb"},
        user("c"),
        {"role": "system", "content": "d"},
        {"role": "system", "content": "e"},
        user("f"),
    ]


def test_system_messages_alone_are_joined() -> None:
    assert normalise([{"role": "system", "content": text} for text in "ab"]) == [{"role": "system", "content": "a\nb"}]


def test_text_parts_of_every_kind_are_joined_with_a_space() -> None:
    parts = [
        {"type": "text", "text": "a"},
        {"type": "input_text", "text": "b"},
        "c",
        {"type": "output_text", "text": " d"},
    ]
    for role in ("user", "system", "assistant"):
        assert normalise([{"role": role, "content": parts}]) == [{"role": role, "content": "a b c  d"}]
    assert normalise([user([])]) == [user("")]


def test_an_assistant_may_have_no_content_or_a_refusal() -> None:
    assert normalise([{"role": "assistant", "content": None}]) == [{"role": "assistant", "content": ""}]
    parts = [{"type": "text", "text": "Well,"}, {"type": "refusal", "refusal": "no."}]
    assert normalise([{"role": "assistant", "content": parts}])[0]["content"] == "Well, no."
    assert normalise([{"role": "assistant", "content": None, "refusal": "No."}])[0]["content"] == "No."


def test_an_answer_of_the_openai_client_can_be_sent_back_whole() -> None:
    answer: dict[str, Any] = {
        "role": "assistant",
        "content": "4",
        "refusal": None,
        "audio": None,
        "annotations": [],
        "function_call": None,
        "tool_calls": None,
    }
    assert normalise([answer]) == [{"role": "assistant", "content": "4"}]


def test_known_strings_pass_and_other_keys_do_not() -> None:
    message = user("hi", name="Ann", reasoning_content="hm", tool_call_id="c1", colour="red")
    assert normalise([message]) == [user("hi", name="Ann", reasoning_content="hm", tool_call_id="c1")]


@pytest.mark.parametrize(
    ("message", "param", "said"),
    [
        ({"content": "hi"}, ".role", "system, developer, user, assistant, tool"),
        ({"role": None, "content": "hi"}, ".role", "missing"),
        ({"role": "wizard", "content": "hi"}, ".role", "'wizard', but must be one of system, developer, user"),
        ({"role": ["user"], "content": "hi"}, ".role", "must be one of"),
        ({"role": "w" * 9999, "content": "hi"}, ".role", "www ..., but"),
        ({"role": "user"}, ".content", "missing"),
        ({"role": "assistant"}, ".content", "missing"),
        (user(None), ".content", "missing"),
        ({"role": "system", "content": None}, ".content", "missing"),
        (user(7), ".content", "a string or a list of parts"),
        (user({"type": "text", "text": "hi"}), ".content", "a string or a list of parts"),
        (user([7]), ".content[0]", "a string or a part"),
        (user(["a", {"text": "hi"}]), ".content[1].type", "missing"),
        (user([{"type": 3}]), ".content[0].type", "no string"),
        (user([{"type": "text"}]), ".content[0].text", "missing"),
        (user([{"type": "text", "text": 5}]), ".content[0].text", "a string"),
        ({"role": "assistant", "content": [{"type": "refusal"}]}, ".content[0].refusal", "missing"),
        (user("hi", name=5), ".name", "a string"),
        ({"role": "assistant", "content": "", "reasoning_content": {}}, ".reasoning_content", "a string"),
        (user("ab\ud800"), ".content", "half a surrogate pair at position 2"),
        (user(["\udfff"]), ".content[0]", "half a surrogate pair"),
        (user([{"type": "text", "text": "\ud83d"}]), ".content[0].text", "half a surrogate pair"),
        (user("hi", name="\ud800"), ".name", "half a surrogate pair"),
    ],
)
def test_wrong_messages_are_refused_with_their_place(message: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        normalise([user("fine"), message])
    assert type(caught.value) is InvalidRequest
    assert caught.value.param == f"messages[1]{param}"
    assert caught.value.param in caught.value.message
    assert said in caught.value.message
    caught.value.message.encode()


@pytest.mark.parametrize(
    ("message", "param", "said"),
    [
        ({"role": "function", "content": "4", "name": "f"}, ".role", "'function'"),
        ({"role": "tool", "content": "4", "tool_call_id": "c1"}, ".role", "tool calling is not offered yet"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "c1"}]}, ".tool_calls", "tool calling"),
        ({"role": "assistant", "content": None, "function_call": {"name": "f"}}, ".function_call", "tool calling"),
        ({"role": "assistant", "content": None, "audio": {"id": "a1"}}, ".audio", "audio"),
        (user([{"type": "image_url", "image_url": {"url": "data:"}}]), ".content[0]", "'image_url'"),
        (user(["see", {"type": "input_audio", "input_audio": {}}]), ".content[1]", "'input_audio'"),
        (user([{"type": "file", "file": {}}]), ".content[0]", "'file'"),
        (user([{"type": "refusal", "refusal": "no"}]), ".content[0]", "'refusal'"),
        (user([{"type": "\ud800"}]), ".content[0]", "'\\ud800'"),
    ],
)
def test_what_is_not_offered_is_refused_with_its_place(message: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        normalise([message])
    assert caught.value.param == f"messages[0]{param}"
    assert caught.value.param in caught.value.message
    assert said in caught.value.message
    caught.value.message.encode()


def test_no_messages_are_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        normalise([])
    assert caught.value.param == "messages"
