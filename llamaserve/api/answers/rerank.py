"""How sorted documents look: in Jina's and Cohere's shape, and in TEI's."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Final, Literal

from msgspec import UNSET, Meta, UnsetType

from llamaserve.api.answers.answer import Answer, Content, Documented
from llamaserve.api.answers.embeddings import EMBEDDER, Cut, TextUsage
from llamaserve.api.answers.errors import BODY, WAITS
from llamaserve.api.answers.generation import HEADERS, Index


class RankedText(Answer):
    """A document's text."""

    text: str


class RankedDocument(Answer):
    """How well a document answers the query."""

    index: Index
    relevance_score: Annotated[float, Meta(description="From 0 to 1, unless `raw_scores` is true.")]
    document: RankedText | UnsetType = UNSET
    truncated_tokens: Cut | UnsetType = UNSET


class Ranking(Answer):
    """Documents, the best first."""

    id: str
    object: Literal["list"]
    model: str
    method: Literal["cross_encoder", "embedding_cosine"]
    results: list[RankedDocument]
    data: Annotated[list[RankedDocument], Meta(description="The same list.")]
    usage: TextUsage


class TeiRank(Answer):
    """How well a document answers the query, as Text Embeddings Inference has it."""

    index: Index
    score: float
    text: str | UnsetType = UNSET


_QUERY: Final = "What do cats eat?"
_TEXTS: Final = ["Paris is in France.", "Cats mostly eat meat and fish.", "The sea is blue."]
_RESULTS: Final = [
    {"index": 1, "relevance_score": 0.98, "document": {"text": _TEXTS[1]}},
    {"index": 2, "relevance_score": 0.01, "document": {"text": _TEXTS[2]}},
]
_ANSWER: Final = {
    "id": "rerank-5d3f0a",
    "object": "list",
    "model": EMBEDDER,
    "method": "embedding_cosine",
    "results": _RESULTS,
    "data": _RESULTS,
    "usage": {"prompt_tokens": 27, "total_tokens": 27},
}
_TEI_ANSWER: Final = [{"index": 1, "score": 0.98, "text": _TEXTS[1]}, {"index": 0, "score": 0.01, "text": _TEXTS[0]}]

_RERANK: Final = Documented(
    answers=(Content((Ranking, list[TeiRank]), {"results": _ANSWER, "as TEI has it": _TEI_ANSWER}),),
    errors=(*BODY, *WAITS),
    requests={
        "documents": {"query": _QUERY, "documents": _TEXTS, "top_n": 2, "return_documents": True},
        "as TEI has it": {"query": _QUERY, "texts": _TEXTS[:2], "return_text": True},
    },
    headers=(*HEADERS, "x-llamaserve-rerank-method", "x-compute-tokens", "x-llamaserve-truncated"),
)

ROUTES: Final = {
    f"POST {path}": replace(_RERANK) for path in ("/v1/rerank", "/rerank", "/v1/reranking", "/reranking", "/v2/rerank")
}
