"""What the engine reports after a step. Plain data: importing this loads no library.

A request has one sequence for each prompt and choice; ``index`` numbers them: prompt * choices + choice.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from llamaserve.errors import ErrorValue
from llamaserve.images.values import GeneratedImage, ImageStep, PartialImage
from llamaserve.speech.values import Heard, Transcribed

FinishReason = Literal["stop", "length"]


class Device(msgspec.Struct, frozen=True, array_like=True):
    """A GPU that llama.cpp can use; its memory in bytes. Without one of its own (``integrated``) it uses the main
    memory, of which it tells a part as its own. ``id`` is its place on the bus, empty where it is not known.
    """

    name: str
    description: str
    free: int
    total: int
    kind: Literal["gpu", "integrated"] = "gpu"
    id: str = ""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """A token, the bytes that it stands for, and its log-probability (natural logarithm)."""

    token: int
    data: bytes
    logprob: float


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """A token of a text, the most probable ones in its place, and where its text begins in the prompt's or in the
    answer's, in characters. The first token of a prompt follows nothing: its own log-probability is 0, and there are no
    others.
    """

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()
    offset: int = 0


class Delta(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """New text of one sequence of a streamed request. ``tokens`` is how many have been generated since the last one.

    If they are wanted, ``logprobs`` has those of the tokens whose text begins in this one, and ``prompt_logprobs``,
    in the first, those of the prompt.
    """

    request: int
    index: int
    text: str
    tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class Finished(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """One sequence ended. ``text`` is what no ``Delta`` carried yet: all of it when the request is not streamed. So are
    the log-probabilities.

    ``completion_tokens`` counts the tokens that were generated, without an end-of-generation token; ``cached_tokens``
    are the tokens of the prompt whose evaluation was reused. ``next_tokens`` are what could come next, if that was
    asked for. ``stopped``: a stop string or a command ended it, and not the model.
    """

    request: int
    index: int
    text: str
    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    next_tokens: tuple[TokenLogprob, ...] = ()
    stopped: bool = False

    @property
    def cut(self) -> bool:
        """Whether the model has not come to an end."""
        return self.stopped or self.reason == "length"


class Embedded(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """All inputs of a request, in their order: rows of ``width`` little-endian 32-bit floats in ``vectors``, of how
    many tokens each was made, and how many more it had before it was cut.
    """

    request: int
    width: int
    vectors: bytes
    tokens: list[int]
    truncated: list[int]


class Failed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The request, with all its sequences, ended in an error."""

    request: int
    error: ErrorValue


class Progress(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Where a streamed request stands that has no token yet: its place in the queue from 1 on, or 0 once its prompt of
    ``prompt_tokens`` is being evaluated, of which ``evaluated`` are. Of a transcription these are seconds of audio.
    """

    request: int
    place: int
    evaluated: int
    prompt_tokens: int


class Occupancy(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """How busy the engine is: sequences being evaluated, sequences waiting, and cells of the key-value cache in use.
    And since the model was loaded: guessed tokens that were evaluated, those of them that were right, and how often a
    sequence had to wait again.
    """

    running: int = 0
    waiting: int = 0
    cells: int = 0
    drafted: int = 0
    accepted: int = 0
    preempted: int = 0


EngineEvent = (
    Delta
    | Finished
    | Embedded
    | Heard
    | Transcribed
    | ImageStep
    | PartialImage
    | GeneratedImage
    | Failed
    | Progress
    | Occupancy
)
