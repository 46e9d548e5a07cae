"""The messages between the API process and a model's child process, and their encoding.

Every frame to the child is one command; every frame from it is a list of events. All are plain values in MessagePack.
"""

from __future__ import annotations

import msgspec

from llamaserve.engine.events import Delta, Device as Device, Embedded, Failed, Finished, Occupancy, Progress
from llamaserve.engine.params import Adapter, Embedding, Footprint, Generation, LoadParams
from llamaserve.errors import ErrorValue, InvalidRequest
from llamaserve.images.values import DiffusionParams, GeneratedImage, ImageGeneration, ImageStep, PartialImage
from llamaserve.speech.values import Heard, Transcribed, TranscriberParams, Transcription

Prompt = str | list[int]
ModelParams = LoadParams | TranscriberParams | DiffusionParams


class Load(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Load the model; always the first command. Answered by ``Loading``s, then ``Ready`` or ``LoadFailed``."""

    params: ModelParams


class Generate(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Answer prompts. Answered by ``Accepted`` or ``Failed`` at once, then by the engine's events."""

    request: int
    prompts: list[Prompt]
    generation: Generation


class Embed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Make vectors of texts or token ids. Answered by ``Embedded`` or ``Failed``. For ``share`` see ``Generation``."""

    request: int
    inputs: list[Prompt]
    embedding: Embedding
    share: str = ""


class Rank(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Score how well each document answers a query. Answered by ``Embedded`` with a logit for each, or ``Failed``. What
    is too long loses the end of the document with ``truncate``; otherwise it is refused. For ``share`` see
    ``Generation``.
    """

    request: int
    query: str
    documents: list[str]
    truncate: bool = False
    share: str = ""


class Transcribe(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Write down speech: a file of samples (see ``speech.values``). Answered by ``Heard``s and ``Transcribed``, or
    ``Failed``. For ``share`` see ``Generation``.
    """

    request: int
    path: str
    transcription: Transcription
    share: str = ""


class GenerateImage(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Make a picture. Answered by ``ImageStep``s and ``PartialImage``s, then ``GeneratedImage``, or ``Failed``."""

    request: int
    job: ImageGeneration


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


class SetAdapters(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Have these LoRA adapters and no others, for the requests that come after. Answered by ``Done`` or ``Failed``."""

    request: int
    adapters: list[Adapter]


class LimitSpill(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Keep at most so many bytes of prefixes in main memory beside the cache, and give back what is over it. Answered
    by ``Done``.
    """

    request: int
    size: int


class SavePrefixes(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Write all prefixes to a file of at most so many bytes, those used last first. Answered by ``Saved`` or
    ``Failed``.
    """

    request: int
    path: str
    size: int


Command = (
    Load
    | Generate
    | Embed
    | Rank
    | Transcribe
    | GenerateImage
    | Cancel
    | Stop
    | Tokenize
    | Detokenize
    | SetAdapters
    | LimitSpill
    | SavePrefixes
)


class Hello(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The child has started and can load a model; always the first event."""

    devices: list[Device]


class Loading(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """How much of the weights is read, from 0 to 1."""

    fraction: float


class Ready(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The model is loaded. ``gpu``: whether layers of it are on a GPU. ``memory`` is what the load has taken: the
    growth of the child's resident memory, and of what is in use on GPUs.
    """

    gpu: bool
    memory: Footprint


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


class Done(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The answer to commands that have no other."""

    request: int


class Saved(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The answer to ``SavePrefixes``: how many tokens of prefixes the file holds, and its size in bytes; without any
    there is no file.
    """

    request: int
    tokens: int
    size: int


RequestEvent = (
    Accepted
    | Embedded
    | Heard
    | Transcribed
    | ImageStep
    | PartialImage
    | GeneratedImage
    | Tokens
    | Text
    | Done
    | Saved
    | Progress
    | Delta
    | Finished
    | Failed
)
Event = Hello | Loading | Ready | LoadFailed | Occupancy | RequestEvent

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
