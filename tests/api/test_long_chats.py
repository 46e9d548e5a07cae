"""Conversations that are longer than the model's context: refused, or, if the client wants it, shortened."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_helpers import CHAT, END_TOKENS, all_events, assert_error, length_of, write_models_file
from chat_helpers import PROMPT, called, put_together, result, said, whole
from running_server import RunningServer

CONTEXT = 256
TRUNCATED = "x-llamaserve-truncated"


def talk(turns: int) -> list[dict[str, Any]]:
    """Return a conversation of so many turns, of some 40 tokens each, and a last question."""
    pairs = [
        (("user", f"Question {i} " + "word " * 10), ("assistant", f"Answer {i} " + "word " * 10)) for i in range(turns)
    ]
    return said(("system", "Be brief."), *(each for pair in pairs for each in pair), ("user", "The last question?"))


LONG = {"messages": talk(12), "max_tokens": 16, "temperature": 0}


@pytest.fixture(scope="module")
def short_server(starter_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    path = write_models_file(tmp_path_factory.mktemp("short"), starter_model, f"context: {CONTEXT}, parallel: 2")
    with RunningServer("serve", "smollm2-135m", "--models-file", str(path)) as running:
        yield running


def test_by_default_a_long_chat_is_refused_with_both_numbers(short_server: RunningServer) -> None:
    length = length_of(short_server, short_server.post(PROMPT, LONG).json()["prompt"])
    assert length > CONTEXT
    for options in (
        {},
        {"truncation": "disabled"},
        {"stream": True},
        {"truncation": "disabled", "truncation_length": 200},
    ):
        response = short_server.post(CHAT, LONG | options)
        message = assert_error(response, 400, "context_length_exceeded", "messages")
        assert str(length) in message
        assert str(options.get("truncation_length", CONTEXT)) in message
    assert whole(short_server, {**LONG, "messages": talk(1)})


@pytest.mark.parametrize(
    "options", [{"truncation": "auto"}, {"truncation_length": 200}, {"truncation_length": 2**31 - 1}]
)
def test_the_oldest_turns_are_left_out(short_server: RunningServer, options: dict[str, Any]) -> None:
    body = LONG | options
    found = short_server.post(PROMPT, body)
    prompt, dropped = found.json()["prompt"], found.json()["truncated_messages"]
    assert dropped > 0
    assert dropped % 2 == 0
    assert found.headers[TRUNCATED] == f"{dropped} messages"
    kept = [int(number) for number in re.findall(r"Question (\d+)", prompt)]
    assert kept == list(range(dropped // 2, 12))
    assert "Be brief." in prompt
    assert "The last question?" in prompt
    limit = min(CONTEXT, options.get("truncation_length", CONTEXT))
    assert limit - 16 - 60 < length_of(short_server, prompt) <= limit - 16

    response = short_server.post(CHAT, body)
    answer = response.json()
    assert answer["truncated_messages"] == dropped
    assert response.headers[TRUNCATED] == f"{dropped} messages"
    assert answer["usage"]["prompt_tokens"] == length_of(short_server, prompt)


def test_a_stream_says_it_in_every_chunk(short_server: RunningServer) -> None:
    body = {**LONG, "truncation": "auto", "stream_options": {"include_usage": True}}
    dropped = short_server.post(CHAT, body | {"stream": False}).json()["truncated_messages"]
    events = all_events(short_server, CHAT, body)
    assert {event["truncated_messages"] for event in events[:-1]} == {dropped}
    assert short_server.post(CHAT, {**body, "stream": True}).headers[TRUNCATED] == f"{dropped} messages"
    assert put_together(events)


def test_a_chat_that_fits_is_left_alone(short_server: RunningServer) -> None:
    body = {**LONG, "messages": talk(2), "truncation": "auto"}
    response = short_server.post(CHAT, body)
    assert "truncated_messages" not in response.json()
    assert TRUNCATED not in response.headers
    plain = short_server.post(CHAT, {**LONG, "messages": talk(2)}).json()
    assert response.json()["choices"] == plain["choices"]


def test_room_is_kept_for_an_answer_of_any_length(short_server: RunningServer) -> None:
    body = {**LONG, "truncation": "auto", "max_tokens": None, "logit_bias": END_TOKENS}
    usage = short_server.post(CHAT, body).json()["usage"]
    assert usage["prompt_tokens"] <= CONTEXT * 3 // 4
    assert usage["total_tokens"] == CONTEXT
    long_answer = short_server.post(CHAT, {**body, "max_tokens": 150}).json()["usage"]
    assert long_answer["completion_tokens"] == 150


def test_what_must_stay_can_be_too_long(short_server: RunningServer) -> None:
    for messages in (
        [*talk(3), *said(("user", "word " * 300))],
        [*said(("system", "word " * 300)), *talk(3)],
        said(("user", "word " * 100_000)),
    ):
        response = short_server.post(CHAT, {**LONG, "messages": messages, "truncation": "auto"})
        assert_error(response, 400, "context_length_exceeded", "messages")
    assert whole(short_server, {**LONG, "truncation": "auto"})


def test_calls_and_their_results_stay_or_go_together(short_server: RunningServer) -> None:
    turns: list[dict[str, Any]] = []
    for number in range(8):
        turns += said(("user", f"Paint wall {number}."))
        turns += [called("paint", {"colour": "red"}, number), result(f"result {number}", number)]
        turns += said(("assistant", f"Wall {number} is red."))
    body = {"messages": [*turns, *said(("user", "And now?"))], "truncation": "auto", "max_tokens": 8}
    found = short_server.post(PROMPT, body).json()
    assert found["truncated_messages"] % 4 == 0
    assert found["prompt"].count("<tool_call>\n") == found["prompt"].count("result ")
    assert found["prompt"].count("<tool_call>\n") == 8 - found["truncated_messages"] // 4
    assert whole(short_server, body)


def test_an_agent_s_steps_after_the_last_question_go_one_by_one(short_server: RunningServer) -> None:
    steps: list[dict[str, Any]] = []
    for number in range(10):
        steps += [called("paint", {"colour": "red"}, number), result(f"result {number} word", number)]
    body = {"messages": [*said(("user", "Paint all.")), *steps], "truncation": "auto", "max_tokens": 8}
    found = short_server.post(PROMPT, body).json()
    assert found["truncated_messages"] % 2 == 0
    assert "Paint all." in found["prompt"]
    assert "result 9" in found["prompt"]
    assert "result 0" not in found["prompt"]
    assert whole(short_server, body)


def test_modes_are_shortened_too(short_server: RunningServer) -> None:
    for mode in ("chat", "chat-instruct"):
        body = {**LONG, "mode": mode, "truncation": "auto", "character": "Assistant"}
        answer = short_server.post(CHAT, body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["truncated_messages"] > 0


@pytest.mark.parametrize("value", ["yes", 5, [], True])
def test_truncation_has_two_values(short_server: RunningServer, value: object) -> None:
    assert_error(short_server.post(CHAT, {**LONG, "truncation": value}), 400, None, "truncation")
