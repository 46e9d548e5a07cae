"""Chats that are too long lose whole turns, the oldest first, and no more than needed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, strategies as st

from llamaserve.chat.messages import normalise
from llamaserve.chat.shortening import fitting, turns, without

Messages = list[dict[str, Any]]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def step(*ids: str, answers: int | None = None) -> Messages:
    """An assistant message that calls a tool for each of the ids, and the results of the first ``answers``."""
    calls = [{"id": each, "type": "function", "function": {"name": "f", "arguments": {}}} for each in ids]
    results = [{"role": "tool", "content": f"result of {each}", "tool_call_id": each, "name": "f"} for each in ids]
    return [{"role": "assistant", "content": "", "tool_calls": calls}, *results[:answers]]


@st.composite
def conversations(draw: st.DrawFn) -> Messages:
    """Conversations as ``normalise`` returns them, each message with a text of its own."""
    numbers = iter(range(10_000))

    def text() -> str:
        return f"{next(numbers)} " + "x" * draw(st.integers(0, 30))

    messages: Messages = []
    for kind in draw(st.lists(st.sampled_from(["system", "user", "user", "assistant", "step"]), min_size=1)):
        if kind == "step":
            ids = [f"c{next(numbers)}" for _ in range(draw(st.integers(1, 3)))]
            messages += step(*ids, answers=draw(st.integers(0, len(ids))))
        else:
            messages.append({"role": kind, "content": text()})
    return normalise(messages)


def length(messages: Messages) -> int:
    return sum(10 + len(message["content"]) for message in messages)


def shortened(messages: Messages, room: int) -> tuple[Messages, int, int]:
    """What is left, how many messages went, and how often it was counted."""
    counted = 0

    async def count(some: Messages) -> int:
        nonlocal counted
        counted += 1
        return length(some)

    left, dropped = asyncio.run(fitting(messages, room, count))
    return left, dropped, counted


def last_user(messages: Messages) -> int:
    return max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)


CHAT = [
    system("s"),
    says("welcome"),
    user("a"),
    says("b"),
    user("c"),
    *step("c1", "c2"),
    system("later"),
    says("d"),
    user("e"),
    user("f"),
    *step("c3"),
    *step("c4", "c5"),
]


def test_turns_go_in_whole_and_then_steps_of_the_last_turn() -> None:
    assert turns(CHAT) == 5
    assert [len(without(CHAT, count)) for count in range(6)] == [17, 16, 14, 9, 8, 6]
    assert without(CHAT, 0) == CHAT
    assert without(CHAT, 1) == [system("s"), *CHAT[2:]]
    assert without(CHAT, 3) == [system("s"), system("later"), *CHAT[10:]]
    assert without(CHAT, 4) == [system("s"), system("later"), user("f"), *step("c3"), *step("c4", "c5")]
    assert without(CHAT, 5) == [system("s"), system("later"), user("f"), *step("c4", "c5")]
    assert without(CHAT, 99) == without(CHAT, 5)


def test_nothing_can_be_left_out_of_one_question() -> None:
    for messages in ([user("a")], [system("s")], [system("s"), user("a")], [user("a"), says("b")], step("c1")):
        assert turns(messages) == 0
        assert shortened(messages, 1) == (messages, 0, 1)


def test_user_messages_in_a_row_are_turns_of_their_own() -> None:
    messages = [user("a"), user("b"), user("c")]
    assert [without(messages, count) for count in range(3)] == [messages, messages[1:], messages[2:]]


def test_without_a_user_message_the_newest_step_stays() -> None:
    messages = [system("s"), says("a"), *step("c1"), *step("c2")]
    assert turns(messages) == 2
    assert without(messages, 2) == [system("s"), *step("c2")]


def test_the_last_answer_stays_since_it_may_be_continued() -> None:
    messages = [user("a"), says("b"), user("c"), says("d")]
    assert without(messages, turns(messages)) == [user("c"), says("d")]


def test_a_chat_that_fits_is_counted_once() -> None:
    assert shortened(CHAT, length(CHAT)) == (CHAT, 0, 1)


@pytest.mark.parametrize("room", [0, -5])
def test_no_room_gives_the_shortest_chat(room: int) -> None:
    assert shortened(CHAT, room)[:2] == (without(CHAT, 5), 11)


def test_a_long_chat_is_counted_seldom() -> None:
    messages = [message for i in range(500) for message in (user(f"question {i}"), says(f"answer {i}"))]
    left, dropped, counted = shortened(messages, 2000)
    assert len(left) + dropped == 1000
    assert counted <= 11
    assert length(left) <= 2000 < length(without(messages, dropped // 2 - 1))


def test_an_error_of_the_counting_comes_through() -> None:
    async def count(_: Messages) -> int:
        raise RuntimeError("no template")

    with pytest.raises(RuntimeError, match="no template"):
        asyncio.run(fitting(CHAT, 100, count))


@given(conversations(), st.integers(0, 400))
def test_what_is_left_is_the_longest_that_fits(messages: Messages, room: int) -> None:
    before = [dict(message) for message in messages]
    left, dropped, _ = shortened(messages, room)
    fit = [count for count in range(turns(messages) + 1) if length(without(messages, count)) <= room]
    assert left == without(messages, min(fit, default=turns(messages)))
    assert dropped == len(messages) - len(left)
    assert messages == before


@given(conversations())
def test_what_is_left_is_a_conversation(messages: Messages) -> None:
    protected = messages[last_user(messages)] if last_user(messages) >= 0 else None
    sizes = []
    for count in range(turns(messages) + 1):
        left = without(messages, count)
        remaining = iter(messages)
        assert all(message in remaining for message in left)  # in the same order
        assert [m for m in left if m["role"] == "system"] == [m for m in messages if m["role"] == "system"]
        assert protected is None or protected in left
        assert left[-1] == messages[-1]
        again = normalise(left)  # no tool message lost its call
        assert [m for m in again if m["role"] != "system"] == [m for m in left if m["role"] != "system"]
        for call in (call for message in left for call in message.get("tool_calls", ())):
            answered = [m for m in messages if m.get("tool_call_id") == call["id"]]
            assert [m for m in left if m.get("tool_call_id") == call["id"]] == answered
        sizes.append(len(left))
    assert sizes == sorted(set(sizes), reverse=True)  # each step leaves something out


@given(conversations())
def test_the_last_turn_stays_whole_while_older_ones_are_left(messages: Messages) -> None:
    end = last_user(messages)
    for count in range(turns(messages) + 1):
        left = without(messages, count)
        older = [m for m in left[: last_user(left)] if m["role"] != "system"] if end >= 0 else []
        assert not older or left[-len(messages[end:]) :] == messages[end:]
