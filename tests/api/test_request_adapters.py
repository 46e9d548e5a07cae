"""The request fields about the model itself: which adapters work on an answer, and how long the model stays."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, strategies as st
from pydantic import ValidationError

from llamaserve.api.adapters import MAX_ADAPTERS, resolve_adapters
from llamaserve.api.chat_options import ChatRequest
from llamaserve.api.completions import CompletionRequest
from llamaserve.api.fim import FimRequest
from llamaserve.api.infill import InfillRequest
from llamaserve.api.options import GenerationOptions
from llamaserve.api.presets import Presets
from llamaserve.errors import InvalidRequest

NAMES = ("calm", "loud", "brief")


def options(**body: Any) -> GenerationOptions:
    return GenerationOptions.model_validate(body)


def adapters(lora: Any) -> tuple[tuple[str, float], ...] | None:
    return resolve_adapters(options(lora=lora).lora, NAMES)


def refused(**body: Any) -> tuple[tuple[int | str, ...], str]:
    """Return the place and the words of what is wrong."""
    with pytest.raises(ValidationError) as caught:
        options(**body)
    problem = caught.value.errors()[0]
    return problem["loc"], problem["msg"]


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        (None, None),
        ([], ()),
        ([{"id": 0, "scale": 0.5}], (("calm", 0.5),)),
        ([{"id": "brief", "scale": 1}, {"id": 1, "scale": -2}], (("loud", -2.0), ("brief", 1.0))),
        ([{"id": "loud", "scale": 0}], ()),
    ],
)
def test_adapters_are_meant_by_place_or_by_name(lora: Any, expected: Any) -> None:
    assert adapters(lora) == expected


@pytest.mark.parametrize(
    ("lora", "place", "words"),
    [
        ([{"id": 3, "scale": 1}], "lora[0].id", "no adapter 3; there is calm, loud, brief"),
        ([{"id": 0, "scale": 1}, {"id": "sad", "scale": 1}], "lora[1].id", "no adapter 'sad'"),
        ([{"id": 0, "scale": 1}, {"id": "calm", "scale": 1}], "lora[1].id", "'calm' is there twice"),
    ],
)
def test_an_adapter_that_the_model_lacks_is_refused(lora: Any, place: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        adapters(lora)
    assert caught.value.param == place
    assert words in caught.value.message


def test_a_model_without_adapters_says_so() -> None:
    with pytest.raises(InvalidRequest, match="the model has none"):
        resolve_adapters(options(lora=[{"id": 0, "scale": 1}]).lora, ())


@pytest.mark.parametrize(
    ("lora", "place"),
    [
        ("calm", ("lora",)),
        ([1], ("lora", 0)),
        ([{"scale": 1}], ("lora", 0, "id")),
        ([{"id": 0}], ("lora", 0, "scale")),
        ([{"id": True, "scale": 1}], ("lora", 0, "id")),
        ([{"id": -1, "scale": 1}], ("lora", 0, "id")),
        ([{"id": "", "scale": 1}], ("lora", 0, "id")),
        ([{"id": "\ud800", "scale": 1}], ("lora", 0, "id")),
        ([{"id": 0, "scale": float("nan")}], ("lora", 0, "scale")),
        ([{"id": 0, "scale": 101}], ("lora", 0, "scale")),
        ([{"id": 0, "scale": 1, "weight": 2}], ("lora", 0, "weight")),
        ([{"id": 0, "scale": 1}, {"id": 0, "scale": 2}], ("lora",)),
        ([{"id": str(number), "scale": 1} for number in range(MAX_ADAPTERS + 1)], ("lora",)),
    ],
    ids=str,
)
def test_a_malformed_adapter_is_told_with_its_place(lora: Any, place: tuple[int | str, ...]) -> None:
    assert refused(lora=lora)[0] == place


@given(
    st.lists(
        st.tuples(st.integers(0, len(NAMES) - 1), st.floats(-100, 100)),
        max_size=len(NAMES),
        unique_by=lambda each: each[0],
    ),
    st.lists(st.booleans(), min_size=len(NAMES), max_size=len(NAMES)),
)
def test_the_same_set_is_the_same_however_it_is_written(wanted: list[tuple[int, float]], by_name: list[bool]) -> None:
    written = [{"id": NAMES[index] if by_name[index] else index, "scale": scale} for index, scale in reversed(wanted)]
    assert adapters(written) == adapters([{"id": index, "scale": scale} for index, scale in wanted])


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, None), (0, 0), (-1, -1), ("5m", 300), ("1h30m", 5400), ("-1", -1), (2.5, 2.5), (-(10**400), -1)],
)
def test_a_duration_is_seconds_or_a_text(value: Any, seconds: float | None) -> None:
    assert options(keep_alive=value).keep_alive == seconds


@pytest.mark.parametrize(
    "value", ["soon", "", "5 minutes", True, [1], {}, float("nan"), float("inf"), 10**400, "\ud800"]
)
def test_what_is_no_duration_is_refused(value: Any) -> None:
    place, words = refused(keep_alive=value)
    assert place == ("keep_alive",)
    assert "15m" in words or "finite" in words


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {"prompt": "a"}),
        (ChatRequest, {"messages": []}),
        (FimRequest, {"prompt": "a"}),
        (InfillRequest, {"input_prefix": "a", "input_suffix": "b"}),
    ],
)
def test_every_endpoint_that_generates_has_them(kind: type[GenerationOptions], body: dict[str, Any]) -> None:
    request = kind.model_validate(body | {"keep_alive": "5m", "lora": [{"id": 0, "scale": 1}]})
    assert request.keep_alive == 300
    assert resolve_adapters(request.lora, NAMES) == (("calm", 1.0),)
    assert request.ignored(Presets()) == []
