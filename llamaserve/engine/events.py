"""What the engine reports after a step. Plain data: importing this loads no library.

A request has one sequence for each prompt and choice; ``index`` numbers them: prompt * choices + choice.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from llamaserve.errors import ErrorValue

FinishReason = Literal["stop", "length"]


class Delta(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """New text of one sequence of a streamed request."""

    request: int
    index: int
    text: str


class Finished(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """One sequence ended. ``text`` is what no ``Delta`` carried yet: all of it when the request is not streamed.

    ``completion_tokens`` counts the tokens that were generated, without an end-of-generation token; ``cached_tokens``
    are the tokens of the prompt whose evaluation was reused.
    """

    request: int
    index: int
    text: str
    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Failed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The request, with all its sequences, ended in an error."""

    request: int
    error: ErrorValue


class Progress(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Where a streamed request stands that has no token yet: its place in the queue from 1 on, or 0 once its prompt of
    ``prompt_tokens`` is being evaluated, of which ``evaluated`` are.
    """

    request: int
    place: int
    evaluated: int
    prompt_tokens: int


class Occupancy(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """How busy the engine is: sequences being evaluated, sequences waiting, and cells of the key-value cache in use."""

    running: int = 0
    waiting: int = 0
    cells: int = 0


EngineEvent = Delta | Finished | Failed | Progress | Occupancy
