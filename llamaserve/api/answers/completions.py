"""How text completions look, whole and streamed; and what fills a gap, in Mistral's shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from msgspec import UNSET, Meta, UnsetType

from llamaserve.api.answers.answer import EVENTS, Answer, Content, Documented
from llamaserve.api.answers.errors import BODY, LACKS, WAITS, ErrorAnswer
from llamaserve.api.answers.generation import CREATED, HEADERS, MODEL, Created, Ended, Index, Seed, Usage, usage


class CompletionLogprobs(Answer):
    """The log-probabilities of tokens; of a prompt's first token they are null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    text_offset: Annotated[list[int], Meta(description="Where each token's text begins, in characters.")]
    top_logprobs: list[dict[str, float] | None]
    top_logprobs_ids: Annotated[list[dict[str, float] | None], Meta(description="The same by token id.")]


class CompletionChoice(Answer):
    """One of the answers, or a piece of it."""

    index: Annotated[int, Meta(ge=0, description="Of prompt i ÷ n.")]
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Annotated[Ended | None, Meta(description="Null in a stream before the end.")]


class Completion(Answer):
    """What continues prompts."""

    id: str
    object: Literal["text_completion"]
    created: Created
    model: str
    system_fingerprint: None
    seed: Seed
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(Answer):
    """A chunk of a stream. The last one has the usage and no choices, if `stream_options.include_usage` is true."""

    id: str
    object: Literal["text_completion"]
    created: Created
    model: str
    system_fingerprint: None
    seed: Seed
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class FilledText(Answer):
    """What stands in the gap, or a piece of it."""

    role: Literal["assistant"]
    content: str


class FimChoice(Answer):
    """One of the answers."""

    index: Index
    message: FilledText
    finish_reason: Ended


class FimCompletion(Answer):
    """What fills a gap."""

    id: str
    object: Literal["chat.completion"]
    created: Created
    model: str
    seed: Seed
    choices: list[FimChoice]
    usage: Usage


class FimChunkChoice(Answer):
    """A piece of one of the answers."""

    index: Index
    delta: FilledText
    finish_reason: Ended | None


class FimChunk(Answer):
    """A chunk of a stream. The last one has the usage and no choices, if `stream_options.include_usage` is true."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: Created
    model: str
    seed: Seed
    choices: list[FimChunkChoice]
    usage: Usage | UnsetType | None = UNSET


_CAPITALS: Final = {
    "prompt": ["The capital of France is", "The capital of Italy is"],
    "max_tokens": 8,
    "temperature": 0,
}
_SCORED: Final = {"prompt": "The sky is blue.", "max_tokens": 0, "echo": True, "logprobs": 2}
_HEAD: Final[Mapping[str, Any]] = {
    "id": "cmpl-5d3f0a",
    "object": "text_completion",
    "created": CREATED,
    "model": MODEL,
    "system_fingerprint": None,
    "seed": 1711372862,
}
_LOGPROBS: Final = {
    "tokens": ["The", " sky"],
    "token_logprobs": [None, -7.25],
    "text_offset": [0, 3],
    "top_logprobs": [None, {" first": -3.5, " following": -4.25}],
    "top_logprobs_ids": [None, {"808": -3.5, "1695": -4.25}],
}


def _choice(text: str, reason: str | None, logprobs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}


_WHOLE: Final = {**_HEAD, "choices": [_choice(" Paris.", "stop")], "usage": usage(5, 2)}
_WITH_LOGPROBS: Final = {**_HEAD, "choices": [_choice("The sky", "length", _LOGPROBS)], "usage": usage(2, 0)}
_CHUNKS: Final = {
    "text": {**_HEAD, "choices": [_choice(" Paris", None)]},
    "end": {**_HEAD, "choices": [_choice("", "stop")]},
}

_GAP: Final = {
    "prompt": "def area(width, height):\n    result = ",
    "suffix": "\n    return result\n",
    "max_tokens": 32,
}
_FIM_HEAD: Final[Mapping[str, Any]] = {
    "id": "fim-5d3f0a",
    "object": "chat.completion",
    "created": CREATED,
    "model": MODEL,
    "seed": 1711372862,
}
_FILLED: Final = {"role": "assistant", "content": "width * height"}
_FIM_WHOLE: Final = {
    **_FIM_HEAD,
    "choices": [{"index": 0, "message": _FILLED, "finish_reason": "stop"}],
    "usage": usage(21, 3),
}
_FIM_CHUNK: Final = {
    **_FIM_HEAD,
    "object": "chat.completion.chunk",
    "choices": [{"index": 0, "delta": _FILLED, "finish_reason": None}],
}

ROUTES: Final = {
    "POST /v1/completions": Documented(
        answers=(
            Content(Completion, {"text": _WHOLE, "logprobs": _WITH_LOGPROBS}),
            Content((CompletionChunk, ErrorAnswer), _CHUNKS, EVENTS),
        ),
        errors=(*BODY, *WAITS, *LACKS),
        requests={"two prompts": _CAPITALS, "streamed": _CAPITALS | {"stream": True}, "scored": _SCORED},
        headers=HEADERS,
    ),
    "POST /v1/fim/completions": Documented(
        answers=(
            Content(FimCompletion, {"code": _FIM_WHOLE}),
            Content((FimChunk, ErrorAnswer), {"code": _FIM_CHUNK}, EVENTS),
        ),
        errors=(*BODY, *WAITS, *LACKS),
        requests={"code": _GAP, "streamed": _GAP | {"stream": True}},
        headers=HEADERS,
    ),
}
