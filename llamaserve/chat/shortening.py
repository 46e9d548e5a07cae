"""What may be left out of a chat that is too long for its model, when the client has asked for that.

Left out are whole turns, the oldest first. A turn is a user message with everything up to the next user message, so a
call of a tool and its result stay or go together; what stands before the first user message is a turn too. What always
stays: every system message, and everything from the last user message on. If that alone is too much, the oldest
messages of the assistant after the last user message go next, each with the tool results that answer it; the newest
stays, with its results.

Works on messages as ``messages.py`` returns them. Knows nothing of templates or tokens: it is told how long a chat is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

Message = dict[str, Any]
Truncation = Literal["disabled", "auto"]  # the names of OpenAI's Responses API; "disabled" leaves a chat as it is


def turns(messages: Sequence[Message]) -> int:
    """Return how many times something can be left out."""
    return len(_droppable(messages))


def without(messages: Sequence[Message], count: int) -> list[Message]:
    """Return the messages without the first ``count`` things that can be left out, at most ``turns(messages)``."""
    dropped = {i for turn in _droppable(messages)[:count] for i in turn}
    return [message for i, message in enumerate(messages) if i not in dropped]


async def fitting(
    messages: Sequence[Message], room: int, count_tokens: Callable[[list[Message]], Awaitable[int]]
) -> tuple[list[Message], int]:
    """Return the messages, shortened no more than needed to have at most ``room`` tokens, and how many were left out.

    When even the shortest chat has more, it is returned: that it does not fit is for the caller to say. Counting means
    rendering the chat, so it is done seldom: once for a chat that fits, else about log2 of the turns.
    """
    if await count_tokens(list(messages)) <= room:
        return list(messages), 0
    too_few, enough = 0, turns(messages)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if await count_tokens(without(messages, middle)) <= room:
            enough = middle
        else:
            too_few = middle
    shortened = without(messages, enough)
    return shortened, len(messages) - len(shortened)


def _droppable(messages: Sequence[Message]) -> list[list[int]]:
    """Return what can be left out, in that order, each as the places of its messages. None is empty."""
    last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    turns_before = _groups(messages, range(max(last_user, 0)), "user")
    steps_after = _groups(messages, range(last_user + 1, len(messages)), "assistant")
    return turns_before + steps_after[:-1]


def _groups(messages: Sequence[Message], places: range, first: str) -> list[list[int]]:
    """Divide messages, without those of the system, into groups that begin with a role; the first may lack it."""
    groups: list[list[int]] = []
    for i in places:
        role = messages[i]["role"]
        if role == "system":
            continue
        if role == first or not groups:
            groups.append([])
        groups[-1].append(i)
    return groups
