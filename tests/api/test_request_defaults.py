"""What a model's requests get where they say nothing: which settings count, and when a request has said enough."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from llamaserve.api.chat_options import ChatRequest
from llamaserve.api.completions import CompletionRequest
from llamaserve.api.presets import Presets
from llamaserve.api.request_defaults import _NAMES, read_settings, with_defaults
from llamaserve.errors import InvalidRequest


def chat(defaults: dict[str, Any], **body: Any) -> ChatRequest:
    """Return a chat request with what settings make of it."""
    return with_defaults(ChatRequest.model_validate({"messages": [], **body}), read_settings(defaults).values)


@pytest.mark.parametrize(
    ("given_settings", "expected"),
    [
        ({"temperature": 0.3, "top_k": "40"}, {"temperature": 0.3, "top_k": 40}),
        ({"repeat_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"custom_stopping_strings": '"\\n", "###"'}, {"stop": ["\n", "###"]}),
        ({"custom_stopping_strings": ""}, {"stop": []}),
        ({"stop": "###"}, {"stop": ["###"]}),
        ({"custom_system_message": "Be brief."}, {"system_message": "Be brief."}),
        ({"chat-instruct_command": "Go on."}, {"chat_instruct_command": "Go on."}),
        ({"max_new_tokens": 100}, {"max_tokens": 100}),
        ({"truncation_length": 2048, "name1": "Ann", "character": None}, {"truncation_length": 2048, "name1": "Ann"}),
        ({"mode": "chat-instruct"}, {"mode": "chat-instruct"}),
    ],
    ids=str,
)
def test_settings_are_fields_of_requests(given_settings: dict[str, Any], expected: dict[str, Any]) -> None:
    assert read_settings(given_settings).values == expected


def test_settings_that_are_none_are_named() -> None:
    found = read_settings({"dark_theme": True, "stream": True, "messages": [], "tools": [], "top_k": 3, "greeting": ""})
    assert (found.values, found.ignored) == ({"top_k": 3}, ("dark_theme", "stream", "messages", "tools", "greeting"))


@pytest.mark.parametrize(
    ("given_settings", "place"),
    [
        ({"temperature": -1}, "settings.temperature"),
        ({"repeat_penalty": "much"}, "settings.repeat_penalty"),
        ({"max_new_tokens": 0}, "settings.max_new_tokens"),
        ({"custom_stopping_strings": "a, b"}, "settings.custom_stopping_strings"),
        ({"name1": "\ud800"}, "settings.name1"),
        ({"stop": ["a"], "custom_stopping_strings": '"b"'}, "settings.custom_stopping_strings"),
        ({"dynamic_temperature": True, "dynatemp_low": 2, "dynatemp_high": 1}, "settings"),
    ],
    ids=str,
)
def test_a_mistake_is_told_with_its_place(given_settings: dict[str, Any], place: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_settings(given_settings)
    assert caught.value.param == place


_VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.lists(st.integers(), max_size=2)
)


@settings(max_examples=200)
@given(st.dictionaries(st.sampled_from(sorted(_NAMES)) | st.text(max_size=5), _VALUES, max_size=4))
def test_any_settings_are_taken_or_refused(values: dict[str, Any]) -> None:
    try:
        found = read_settings(values)
    except InvalidRequest:
        return
    with_defaults(ChatRequest.model_validate({"messages": []}), found.values)


def test_a_default_holds_where_the_request_says_nothing() -> None:
    body = chat({"temperature": 0.3, "top_k": 40, "name1": "Ann"}, top_k=0)
    assert (body.temperature, body.top_k, body.name1) == (0.3, 0, "Ann")
    assert body.generation(Presets()).sampling.temperature == 0.3
    assert ChatRequest.model_validate({"messages": []}).temperature == 1


def test_a_request_without_defaults_is_the_same() -> None:
    body = ChatRequest.model_validate({"messages": [], "top_k": 3})
    assert with_defaults(body, {}) is body
    assert with_defaults(body, {"top_k": 5}) is body


@pytest.mark.parametrize(
    ("defaults", "body", "unset"),
    [
        ({"max_tokens": 50}, {"max_completion_tokens": 70}, {"max_tokens": None}),
        ({"auto_max_new_tokens": True}, {"max_tokens": 70}, {"auto_max_new_tokens": False}),
        ({"do_sample": False}, {"temperature": 0.7}, {"do_sample": True}),
        ({"instruction_template_str": "{{ 1 }}"}, {"instruction_template": "ChatML"}, {"instruction_template_str": ""}),
        ({"instruction_template": "ChatML"}, {"chat_template": "{{ 1 }}"}, {"instruction_template": None}),
        ({"name2": "Bob", "context": "Bob is old."}, {"character": "Assistant"}, {"name2": "", "context": ""}),
        ({"enable_thinking": True}, {"chat_template_kwargs": {"thinking": False}}, {"enable_thinking": None}),
        ({"temperature": 0.3}, {"preset": "Creative"}, {"temperature": 1.0}),
    ],
    ids=str,
)
def test_who_says_one_thing_of_a_matter_has_said_all(
    defaults: dict[str, Any], body: dict[str, Any], unset: dict[str, Any]
) -> None:
    found = chat(defaults, **body)
    assert {name: getattr(found, name) for name in unset} == unset


def test_the_requests_options_and_the_settings_win_over_a_preset_among_the_settings() -> None:
    sampling = chat({"preset": "Creative", "top_k": 7}, min_p=0.5).generation(Presets()).sampling
    plain = chat({"preset": "Creative"}).generation(Presets()).sampling
    assert (sampling.top_k, sampling.min_p) == (7, 0.5)
    assert (
        plain.temperature
        == sampling.temperature
        == chat({}, preset="Creative").generation(Presets()).sampling.temperature
    )


def test_nobody_is_told_of_defaults_without_effect() -> None:
    body = chat({"name1": "Ann", "max_tokens_second": 5, "penalty_alpha": 1, "xtc_threshold": 0.2}, strict=True)
    assert body.ignored(Presets()) == []
    body.generation(Presets())
    assert chat({"temperature": 0}, top_k=5).ignored(Presets()) == ["top_k"]


def test_an_endpoint_gets_the_defaults_that_it_has_fields_for() -> None:
    defaults = read_settings({"name1": "Ann", "temperature": 0.3, "context": "A room.", "stop": "x"}).values
    body = with_defaults(CompletionRequest.model_validate({"prompt": "a"}), defaults)
    assert (body.temperature, body.stop) == (0.3, ["x"])
    assert "name1" not in (body.model_extra or {})
