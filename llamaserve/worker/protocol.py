"""The messages between the API process and a model's child process, and their encoding.

Every frame to the child is one command; every frame from it is a list of events. All are plain values in MessagePack.
"""

from __future__ import annotations

import msgspec

from llamaserve.engine.events import Delta, Failed, Finished, Occupancy, Progress
from llamaserve.engine.params import Generation, LoadParams
from llamaserve.errors import ErrorValue, InvalidRequest

Prompt = str | list[int]


class Load(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Load the model; always the first command. Answered by ``Loading``s, then ``Ready`` or ``LoadFailed``."""

    params: LoadParams


class Generate(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Answer prompts. Answered by ``Accepted`` or ``Failed`` at once, then by the engine's events."""

    request: int
    prompts: list[Prompt]
    generation: Generation


class Cancel(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Forget a request; no event of it is wanted any more."""

    request: int


class Stop(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """End a request, or all, with a normal finish."""

    request: int | None


class Tokenize(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Turn text into token ids. Answered by ``Tokens`` or ``Failed``."""

    request: int
    text: str
    add_bos: bool
    parse_special: bool


class Detokenize(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Turn token ids into text. Answered by ``Text`` or ``Failed``."""

    request: int
    tokens: list[int]
    special: bool


Command = Load | Generate | Cancel | Stop | Tokenize | Detokenize


class Loading(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """How much of the weights is read, from 0 to 1."""

    fraction: float


class Ready(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The model is loaded. ``gpu``: whether layers of it are on a GPU."""

    gpu: bool


class LoadFailed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The model can't be loaded; the child ends."""

    error: ErrorValue


class Accepted(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """All prompts of a request fit; their numbers of tokens, and how many more they had before they were cut."""

    request: int
    prompt_tokens: list[int]
    truncated: int = 0


class Tokens(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The answer to ``Tokenize``."""

    request: int
    tokens: list[int]


class Text(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The answer to ``Detokenize``."""

    request: int
    text: str


RequestEvent = Accepted | Tokens | Text | Progress | Delta | Finished | Failed
Event = Loading | Ready | LoadFailed | Occupancy | RequestEvent

_encoder = msgspec.msgpack.Encoder()
_command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_events_decoder: msgspec.msgpack.Decoder[list[Event]] = msgspec.msgpack.Decoder(list[Event])


def encode_command(command: Command) -> bytes:
    """Return a command's frame. Raises ``InvalidRequest`` for half a surrogate pair or an integer over 64 bits."""
    try:
        return _encoder.encode(command)
    except (UnicodeEncodeError, OverflowError) as error:
        raise InvalidRequest(f"the request can't be passed on to the model: {error}") from error


def decode_command(frame: bytes) -> Command:
    """Return the command in a frame."""
    return _command_decoder.decode(frame)


def encode_events(events: list[Event]) -> bytes:
    """Return the frame of a step's events."""
    return _encoder.encode(events)


def decode_events(frame: bytes) -> list[Event]:
    """Return the events in a frame."""
    return _events_decoder.decode(frame)
