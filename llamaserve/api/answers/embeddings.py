"""How vectors look."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import UNSET, Meta, UnsetType

from llamaserve.api.answers.answer import Answer, Content, Documented
from llamaserve.api.answers.errors import BODY, WAITS
from llamaserve.api.answers.generation import HEADERS, Count, Index

EMBEDDER: Final = "all-minilm-l6-v2"

Cut = Annotated[int, Meta(ge=1, description="How many tokens were cut off.")]


class TruncatedTokens(Answer):
    """What was cut of all texts together."""

    truncated_tokens: Cut


class TextUsage(Answer):
    """Tokens that the model saw."""

    prompt_tokens: Count
    total_tokens: Count
    prompt_tokens_details: TruncatedTokens | UnsetType = UNSET


class EmbeddingItem(Answer):
    """The vector of a text."""

    object: Literal["embedding"]
    index: Index
    embedding: Annotated[
        list[float] | str, Meta(description="Numbers, or with `base64` their bytes as little-endian 32-bit floats.")
    ]
    truncated_tokens: Cut | UnsetType = UNSET


class Embeddings(Answer):
    """The vectors of texts, in their order."""

    object: Literal["list"]
    data: list[EmbeddingItem]
    model: str
    usage: TextUsage


_TEXTS: Final = {"input": ["The cat sits on the mat.", "A kitten rests on a rug."], "dimensions": 128}
_ANSWER: Final = {
    "object": "list",
    "data": [{"object": "embedding", "index": 0, "embedding": [0.0625, -0.125, 0.9902]}],
    "model": EMBEDDER,
    "usage": {"prompt_tokens": 9, "total_tokens": 9},
}

ROUTES: Final = {
    "POST /v1/embeddings": Documented(
        answers=(Content(Embeddings, {"numbers": _ANSWER}),),
        errors=(*BODY, *WAITS),
        requests={
            "texts": _TEXTS,
            "base64": {"input": "The cat sits on the mat.", "encoding_format": "base64"},
            "token ids": {"input": [101, 1996, 4937, 102]},
        },
        headers=HEADERS,
    ),
}
