"""Messages of a request, checked and made plain."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, strategies as st

from llamaserve.chat.messages import MAX_ALL_CALLS, MAX_CALLS, MAX_MESSAGES, MAX_PARTS, normalise
from llamaserve.errors import InvalidRequest, UnsupportedParameter

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def user(content: Any, **extra: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **extra}


def call(call_id: Any, name: str = "f", arguments: Any = "{}", **extra: Any) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}, **extra}


def calling(*calls: Any, **extra: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **extra}


def result(call_id: str | None, content: Any = "4", **extra: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content, **extra}


def refused(messages: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        normalise(messages)
    assert caught.value.param is not None
    assert caught.value.param in caught.value.message
    caught.value.message.encode()
    return caught.value


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
    extra = {"name": "Ann", "reasoning_content": "hm", "tool_call_id": "c1", "colour": "red"}
    assert normalise([user("hi", **extra)]) == [user("hi", name="Ann")]
    answer = {"role": "assistant", "content": "hi", "name": "Ann", "reasoning_content": "hm"}
    assert normalise([answer | {"tool_call_id": "c1", "colour": "red"}]) == [answer]


def test_reasoning_has_two_names() -> None:
    answer = {"role": "assistant", "content": "4"}
    expected = [answer | {"reasoning_content": "hm"}]
    assert normalise([answer | {"reasoning": "hm"}]) == expected
    assert normalise([answer | {"reasoning": "hm", "reasoning_content": None}]) == expected
    assert normalise([answer | {"reasoning": "hm", "reasoning_content": ""}]) == expected
    assert normalise([answer | {"reasoning": "hm", "reasoning_content": "hm"}]) == expected
    assert normalise([answer | {"reasoning": None}]) == [answer]
    assert normalise([{"role": "assistant", "reasoning": "hm"}]) == [
        {"role": "assistant", "content": "", "reasoning_content": "hm"}
    ]
    assert refused([answer | {"reasoning": "hm", "reasoning_content": "ah"}]).param == "messages[0].reasoning"


def test_a_round_of_tool_calls() -> None:
    messages = [
        user("Is it warmer in Oslo or in Rome?"),
        calling(call("c1", "weather", '{"city": "Oslo"}'), call("c2", "weather", {"city": "Rome"}, index=1)),
        result("c2", [{"type": "text", "text": "20"}, {"type": "text", "text": "degrees"}]),
        result("c1", "", name="something else"),
        {"role": "assistant", "content": "In Rome.", "tool_calls": []},
    ]
    assert normalise(messages) == [
        user("Is it warmer in Oslo or in Rome?"),
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [call("c1", "weather", {"city": "Oslo"}), call("c2", "weather", {"city": "Rome"})],
        },
        {"role": "tool", "content": "20 degrees", "tool_call_id": "c2", "name": "weather"},
        {"role": "tool", "content": "", "tool_call_id": "c1", "name": "weather"},
        {"role": "assistant", "content": "In Rome."},
    ]


def test_a_call_may_have_text_and_reasoning_beside_it() -> None:
    message = calling(call("c1"), content="Let me see.", reasoning="hm", name="Bob")
    assert normalise([message]) == [
        {
            "role": "assistant",
            "content": "Let me see.",
            "name": "Bob",
            "reasoning_content": "hm",
            "tool_calls": [call("c1", arguments={})],
        }
    ]
    assert normalise([{"role": "assistant", "tool_calls": [call("c1")]}])[0]["content"] == ""


def test_calls_may_stay_without_an_answer() -> None:
    messages = normalise([calling(call("c1"), call("c2")), result("c2"), user("stop"), calling(call("c1"))])
    assert [message["role"] for message in messages] == ["assistant", "tool", "user", "assistant"]


def test_ids_may_come_again_in_later_messages() -> None:
    round_ = [calling(call("call_0")), result("call_0")]
    assert len(normalise([*round_, *round_])) == 4


@given(st.dictionaries(TEXT, JSON, max_size=4))
def test_arguments_may_be_text_or_an_object(arguments: dict[str, Any]) -> None:
    for given_as in (arguments, json.dumps(arguments), json.dumps(arguments, ensure_ascii=False, indent=1)):
        (message,) = normalise([calling(call("c1", arguments=given_as))])
        assert message["tool_calls"][0]["function"]["arguments"] == arguments


@pytest.mark.parametrize("empty", ["", " \n", "{}", " {} "])
def test_empty_arguments_are_an_empty_object(empty: str) -> None:
    assert normalise([calling(call("c1", arguments=empty))])[0]["tool_calls"][0]["function"]["arguments"] == {}


def test_ids_are_made_up_and_answers_find_their_calls() -> None:
    bare = {"function": {"name": "g", "arguments": ""}}
    messages = [
        calling(call(None, "f"), call("call00001", "h"), bare, call("", "f")),
        result(None, "first"),
        result("", "second"),
        {"role": "tool", "content": "fourth", "name": "f"},
        result(None, "third"),
        calling(bare),
    ]
    plain = normalise(messages)
    assert [each["id"] for each in plain[0]["tool_calls"]] == ["call00000", "call00001", "call00002", "call00003"]
    assert [(m["content"], m["tool_call_id"], m["name"]) for m in plain[1:5]] == [
        ("first", "call00000", "f"),
        ("second", "call00001", "h"),
        ("fourth", "call00003", "f"),
        ("third", "call00002", "g"),
    ]
    assert plain[5]["tool_calls"][0]["id"] == "call00004"
    assert normalise(messages) == plain
    assert normalise(messages[:3]) == plain[:3]


def test_functions_of_before_there_were_tools() -> None:
    messages = [
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}},
        {"role": "function", "name": "f", "content": "4", "tool_call_id": "not read"},
        {"role": "assistant", "function_call": {"name": "g", "arguments": "{}"}, "tool_calls": None},
        {"role": "function", "name": "g", "content": None},
    ]
    assert normalise(messages) == [
        {"role": "assistant", "content": "", "tool_calls": [call("call00000", "f", {"a": 1})]},
        {"role": "tool", "content": "4", "tool_call_id": "call00000", "name": "f"},
        {"role": "assistant", "content": "", "tool_calls": [call("call00001", "g", {})]},
        {"role": "tool", "content": "", "tool_call_id": "call00001", "name": "g"},
    ]


@pytest.mark.parametrize(
    ("messages", "param", "said"),
    [
        ([result("c1")], "messages[0].tool_call_id", "there is no call"),
        ([result(None)], "messages[0].tool_call_id", "there is no call"),
        ([{"role": "function", "name": "f", "content": ""}], "messages[0].name", "there is no call"),
        ([calling(call("c1")), user("hm"), result("c1")], "messages[2].tool_call_id", "there is no call"),
        ([calling(call("c1")), {"role": "system", "content": ""}, result("c1")], "messages[2].tool_call_id", "no call"),
        ([calling(call("c1")), {"role": "assistant", "content": ""}, result("c1")], "messages[2].tool_call_id", "no"),
        (
            [calling(call("c1")), calling(call("c2")), result("c1")],
            "messages[2].tool_call_id",
            "no call in messages[1]",
        ),
        ([calling(call("c1")), result("c2")], "messages[1].tool_call_id", "no call in messages[0] has the id 'c2'"),
        ([calling(call("c1")), result(7)], "messages[1].tool_call_id", "a string"),
        ([calling(call("c1")), result([])], "messages[1].tool_call_id", "a string"),
        ([calling(call("c1")), result("\ud800")], "messages[1].tool_call_id", "half a surrogate pair"),
        ([calling(call("c1")), result("c1"), result("c1")], "messages[2].tool_call_id", "messages[1] answers the call"),
        ([calling(call("c1")), result("c1"), result(None)], "messages[2].tool_call_id", "all calls in messages[0]"),
        ([calling(call("c1")), result(None, name="g")], "messages[1].name", "no call of 'g' in messages[0]"),
        ([calling(call("c1")), result(None, name=7)], "messages[1].name", "a string"),
        ([calling(call("c1")), {"role": "function", "content": ""}], "messages[1].name", "missing"),
        ([calling(call("c1")), {"role": "tool", "tool_call_id": "c1"}], "messages[1].content", "missing"),
        ([calling(call("c1")), result("c1", {})], "messages[1].content", "a string or a list of parts"),
    ],
)
def test_answers_without_their_calls_are_refused(messages: list[Any], param: str, said: str) -> None:
    error = refused(messages)
    assert (type(error), error.param) == (InvalidRequest, param)
    assert said in error.message


@pytest.mark.parametrize(
    ("calls", "param", "said"),
    [
        ({"id": "c1"}, "", "must be a list"),
        ("c1", "", "must be a list"),
        ([None], "[0]", "missing"),
        ([call("c1"), "c2"], "[1]", "must be an object"),
        ([call(7)], "[0].id", "a string"),
        ([call("\ud800")], "[0].id", "half a surrogate pair"),
        ([call("c1"), call("c2"), call("c1")], "[2].id", "messages[0].tool_calls[0] has the id 'c1' already"),
        ([{"id": "c1", "type": "function"}], "[0].function", "missing"),
        ([{"id": "c1", "type": 3}], "[0].type", "a string"),
        ([{"id": "c1", "function": "f"}], "[0].function", "must be an object"),
        ([{"id": "c1", "function": {"arguments": "{}"}}], "[0].function.name", "missing"),
        ([call("c1", "")], "[0].function.name", "1 to 256"),
        ([call("c1", "f" * 257)], "[0].function.name", "257 characters"),
        ([call("c1", "a b")], "[0].function.name", "' ' can't be in a name"),
        ([call("c1", arguments=None)], "[0].function.arguments", "missing"),
        ([call("c1", arguments=[])], "[0].function.arguments", "must be a JSON object"),
        ([call("c1", arguments=7)], "[0].function.arguments", "must be a JSON object"),
        ([call("c1", arguments="[]")], "[0].function.arguments", "must be a JSON object"),
        ([call("c1", arguments="null")], "[0].function.arguments", "must be a JSON object"),
        ([call("c1", arguments='{"a": ')], "[0].function.arguments", "no JSON"),
        ([call("c1", arguments='{"a": "\ud800"}')], "[0].function.arguments", "half a surrogate pair"),
        ([call("c1", arguments='{"a": "\\ud800"}')], "[0].function.arguments", "half a surrogate pair"),
        ([call("c1", arguments={"a": {"\ud800": 1}})], "[0].function.arguments", "half a surrogate pair"),
        ([call("c1", arguments='{"a": ' * 10**5)], "[0].function.arguments", "nests more than 64 deep"),
        ([call("c1", arguments='{"a": ' * 65 + "1" + "}" * 65)], "[0].function.arguments", "nests more than 64 deep"),
        ([call("c1", arguments='{"a": ' + "9" * 5000 + "}")], "[0].function.arguments", "64 bits"),
        ([call("c1", arguments='{"a": 18446744073709551616}')], "[0].function.arguments", "64 bits"),
        ([call("c1", arguments={"a": [-(2**63) - 1]})], "[0].function.arguments", "64 bits"),
        ([call("c1", arguments='{"a": NaN}')], "[0].function.arguments", "not finite, which JSON does not have"),
        ([call("c1", arguments='{"a": 1e999}')], "[0].function.arguments", "not finite, which JSON does not have"),
        ([call(str(i)) for i in range(MAX_CALLS + 1)], "", "1001 calls; at most 1000"),
    ],
)
def test_wrong_calls_are_refused_with_their_place(calls: Any, param: str, said: str) -> None:
    error = refused([{"role": "assistant", "content": None, "tool_calls": calls}])
    assert (type(error), error.param) == (InvalidRequest, f"messages[0].tool_calls{param}")
    assert said in error.message


def test_the_largest_integers_and_the_deepest_arguments_pass() -> None:
    arguments = '{"a": ' * 63 + "[18446744073709551615, -9223372036854775808]" + "}" * 63
    assert normalise([calling(call("c1", arguments=arguments))])


@pytest.mark.parametrize(
    "name",
    ["f", "server__tool.name/x-y", "mcp:files:read", "a@b", "#1", "größe", "天気", "हिन्दी", "x" * 256],
)
def test_names_of_functions(name: str) -> None:
    assert normalise([calling(call("c1", name))])[0]["tool_calls"][0]["function"]["name"] == name


@pytest.mark.parametrize(
    "sign", [*" \t\n\r\0\x1f\x7f\"'`\\<>{}[]()|=,;", "\u2028", "\u00a0", "\u200b", "\ufeff", "\u202e"]
)
def test_signs_that_no_name_may_have(sign: str) -> None:
    assert refused([calling(call("c1", f"a{sign}b"))]).param == "messages[0].tool_calls[0].function.name"


def test_only_assistant_messages_can_call() -> None:
    for role in ("user", "system", "tool", "function", "developer"):
        error = refused([{"role": role, "content": "", "tool_calls": [call("c1")]}])
        assert (error.param, type(error)) == ("messages[0].tool_calls", InvalidRequest)
        error = refused([{"role": role, "content": "", "function_call": {"name": "f", "arguments": ""}}])
        assert error.param == "messages[0].function_call"
    assert refused([calling(call("c1"), function_call={"name": "f", "arguments": ""})]).param == (
        "messages[0].function_call"
    )
    assert refused([{"role": "assistant", "function_call": "f"}]).param == "messages[0].function_call"
    assert refused([{"role": "assistant", "function_call": {"name": "f", "arguments": "["}}]).param == (
        "messages[0].function_call.arguments"
    )


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ("hi", "messages"),
        ({"role": "user"}, "messages"),
        ([None], "messages[0]"),
        ([user("a"), "b"], "messages[1]"),
        ([[]], "messages[0]"),
        ([user("a")] * (MAX_MESSAGES + 1), "messages"),
        ([user([""] * 999)] * (MAX_PARTS // 999 + 1), "messages"),
        ([calling(*[call(None)] * MAX_CALLS)] * (MAX_ALL_CALLS // MAX_CALLS + 1), "messages"),
    ],
)
def test_what_is_no_list_of_messages_is_refused(messages: Any, param: str) -> None:
    assert refused(messages).param == param


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
        ({"role": "assistant", "tool_calls": [], "function_call": None, "reasoning": ""}, ".content", "missing"),
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
        ({"role": "assistant", "content": "", "reasoning": ["hm"]}, ".reasoning", "a string"),
        ({"role": "assistant", "content": "", "reasoning": "\ud800"}, ".reasoning", "half a surrogate pair"),
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
        (calling(call("c1"), {"id": "c2", "type": "custom", "custom": {}}), ".tool_calls[1].type", "'custom'"),
        ({"role": "assistant", "content": None, "audio": {"id": "a1"}}, ".audio", "text only"),
        (user([{"type": "image_url", "image_url": {"url": "data:"}}]), ".content[0]", "models here take text only"),
        (user([{"type": "input_image", "image_url": "data:"}]), ".content[0]", "'input_image'"),
        ({"role": "tool", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}, ".content[0]", "'tool'"),
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


def outcome(messages: Any) -> list[dict[str, Any]] | InvalidRequest:
    try:
        return normalise(messages)
    except InvalidRequest as error:
        return error


# Values that are nearly right, so that many are accepted and the others fail late.
_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)


def mostly(right: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 15).flatmap(lambda number: _ANY if number == 15 else right)


_NO_ARGUMENTS = st.sampled_from(["[]", "{", '{"a": NaN}', '"\\ud800"'])
_ARGUMENTS = mostly(st.sampled_from(["", "{}", '{"a": [1, null]}']) | st.dictionaries(TEXT, JSON, max_size=2))
_FUNCTIONS = mostly(
    st.fixed_dictionaries({"name": mostly(st.sampled_from(["f", "g"])), "arguments": _ARGUMENTS | _NO_ARGUMENTS})
    | st.fixed_dictionaries({"name": st.sampled_from(["f", "g"]), "arguments": _ARGUMENTS})
)
_IDS = st.sampled_from(["c1", "c2", "call00000", "", None])
_CALLS = st.fixed_dictionaries(
    {"id": mostly(_IDS), "function": _FUNCTIONS}, optional={"type": mostly(st.just("function"))}
)
_PARTS = st.fixed_dictionaries({"type": mostly(st.just("text")), "text": mostly(TEXT)})
_CONTENTS = mostly(TEXT | st.lists(mostly(_PARTS), max_size=2))
_NAMED = {"name": mostly(st.sampled_from(["f", "g", None]))}
_OTHERS = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user"]), "content": _CONTENTS}, optional=_NAMED
)
_RESULTS = st.fixed_dictionaries(
    {"role": st.sampled_from(["tool", "tool", "function"]), "content": _CONTENTS},
    optional={"tool_call_id": mostly(_IDS), **_NAMED},
)
_ANSWERS = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": mostly(st.none() | TEXT)},
    optional={"reasoning": mostly(TEXT), "refusal": mostly(TEXT), "audio": mostly(st.none()), **_NAMED},
)
_CALLING = st.fixed_dictionaries(
    {"role": st.just("assistant"), "tool_calls": mostly(st.lists(mostly(_CALLS), min_size=1, max_size=3))},
    optional={"content": mostly(st.none() | TEXT), "reasoning_content": mostly(TEXT)},
) | st.fixed_dictionaries({"role": st.just("assistant"), "function_call": _FUNCTIONS})
_ROUNDS = st.builds(lambda asked, results: [asked, *results], _CALLING, st.lists(_RESULTS, max_size=2))
_HISTORIES = st.lists(mostly(_ROUNDS | mostly(_OTHERS | _ANSWERS).map(lambda message: [message])), max_size=3).map(
    lambda groups: [message for group in groups if isinstance(group, list) for message in group]
)


@given(mostly(_HISTORIES))
@example([calling(call("c1"), call(None)), result("c1"), result(None)])
def test_anything_is_refused_with_its_place_or_becomes_what_stays_the_same(messages: Any) -> None:
    plain = outcome(messages)
    if isinstance(plain, InvalidRequest):
        assert type(plain) in (InvalidRequest, UnsupportedParameter)
        assert plain.param is not None
        assert plain.param.startswith("messages")
        plain.message.encode()
        return
    assert normalise(plain) == plain
    json.dumps(plain, ensure_ascii=False, allow_nan=False).encode()
    for message in plain:
        allowed = {"role", "content", "name"}
        allowed |= {"assistant": {"reasoning_content", "tool_calls"}, "tool": {"tool_call_id"}}.get(
            message["role"], set()
        )
        assert message.keys() <= allowed


@st.composite
def tool_rounds(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Right messages in which some ids are left out, with answers in any order, or none."""
    messages: list[dict[str, Any]] = []
    for number in range(draw(st.integers(1, 4))):
        count = draw(st.integers(1, 4))
        named = draw(st.booleans())
        calls = [
            call(
                f"c{j}" if named else None, f"f{number}_{j}", json.dumps(draw(st.dictionaries(TEXT, JSON, max_size=2)))
            )
            for j in range(count)
        ]
        order = draw(st.permutations(range(count)))[: draw(st.integers(0, count))]
        if not named:  # then they answer in the order of the calls
            order = list(range(len(order)))
        messages.append(calling(*calls))
        messages += [result(f"c{j}" if named else None, f"f{number}_{j}") for j in order]
    return messages


@given(tool_rounds())
def test_every_answer_finds_its_call(messages: list[dict[str, Any]]) -> None:
    plain = normalise(messages)
    assert len(plain) == len(messages)
    open_calls: dict[str, str] = {}
    for message in plain:
        if message["role"] == "assistant":
            open_calls = {each["id"]: each["function"]["name"] for each in message["tool_calls"]}
        else:
            assert open_calls.pop(message["tool_call_id"]) == message["name"] == message["content"]
    assert normalise(plain) == plain


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_a_content_may_be_null(role: str) -> None:
    assert normalise([{"role": role, "content": None}, user("hi")])[0]["content"] == ""


def test_a_result_may_be_null() -> None:
    assert normalise([calling(call("c1")), result("c1", None)])[1]["content"] == ""
