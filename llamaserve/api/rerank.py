"""``POST /v1/rerank``: documents sorted by how well they answer a query, in the shapes of Jina, Cohere and TEI.

A model that scores pairs of texts does that (a cross-encoder). An embedding model does it by the cosine of two vectors,
which is less exact, and the answer says which of the two it was.
"""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import mul
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from pydantic import AliasChoices, BeforeValidator, Field, PlainValidator, WithJsonSchema

from llamaserve.api.accounting import metered
from llamaserve.api.fields import Text, whole
from llamaserve.api.generating import new_id, unless_client_leaves
from llamaserve.api.options import TRUNCATED_HEADER, asked_of
from llamaserve.api.services import UsesServices
from llamaserve.api.vectors import (
    EmbeddingFields,
    Plain,
    check_item,
    embed,
    misplaced,
    places,
    rank,
    rows_of,
    usage,
)
from llamaserve.engine.events import Embedded
from llamaserve.engine.params import Embedding
from llamaserve.errors import InvalidRequest, ModelNotLoaded, UnsupportedParameter
from llamaserve.registry.pool import ModelPool
from llamaserve.registry.served import ServedModel

router = APIRouter(tags=["embeddings"], dependencies=[Depends(metered)])

METHOD_HEADER: Final = "x-llamaserve-rerank-method"
TOKENS_HEADER: Final = "x-compute-tokens"  # TEI's name; its answer has no place for the usage

T = TypeVar("T")

Method = Literal["cross_encoder", "embedding_cosine"]

_MAX_DOCUMENTS: Final = 1024
_TEXT_SCHEMA: Final = {"type": "string", "minLength": 1}
_DOCUMENTS_SCHEMA: Final = {
    "type": "array",
    "items": {
        "anyOf": [
            _TEXT_SCHEMA,
            {"type": "object", "properties": {"text": _TEXT_SCHEMA}, "required": ["text"]},
        ]
    },
    "minItems": 1,
    "maxItems": _MAX_DOCUMENTS,
}


def _documents(value: Any) -> list[str]:
    """Take strings, or objects with a text."""
    if not isinstance(value, list):
        raise ValueError("must be a list of strings, or of objects with a text")
    if not 1 <= len(value) <= _MAX_DOCUMENTS:
        raise ValueError(f"there are {len(value)} documents; from 1 to {_MAX_DOCUMENTS} are taken")
    texts: list[str] = []
    for number, each in enumerate(value):
        text = each.get("text") if isinstance(each, dict) else each
        if not isinstance(text, str):
            raise misplaced("must be a string, or an object with a text", number)
        check_item(text, number)
        texts.append(text)
    return texts


class RerankRequest(EmbeddingFields):
    """A query, and documents to be sorted by how well they answer it."""

    not_offered: ClassVar[Plain] = {
        "rank_fields": ((["text"],), "of a document that is an object, its text is what counts"),
        **dict.fromkeys(
            ("max_tokens_per_doc", "max_chunks_per_doc"),
            ((), "documents can't be cut anywhere; `truncate` cuts those that are too long for the model"),
        ),
    }

    query: Text = Field(min_length=1, description="What is asked for.")
    documents: Annotated[list[str], PlainValidator(_documents), WithJsonSchema(_DOCUMENTS_SCHEMA)] = Field(
        validation_alias=AliasChoices("documents", "texts"),
        description="The texts to sort; under the name of texts, the answer has the shape of TEI's.",
    )
    top_n: Annotated[int, Field(strict=True, ge=1), BeforeValidator(whole)] | None = Field(
        None, description="How many of the best to answer with; null: all."
    )
    return_documents: bool = Field(
        default=False,
        validation_alias=AliasChoices("return_documents", "return_text"),
        description="Have the documents' texts in the answer.",
    )
    raw_scores: bool = Field(default=False, description="Scores as the model gives them, not from 0 to 1.")

    @property
    def like_tei(self) -> bool:
        """Whether the answer is a bare list, as Text Embeddings Inference has it."""
        return self.called("documents") == "texts"

    def document(self, number: int) -> str:
        """Return what the request calls a document."""
        return f"{self.called('documents')}[{number}]"

    def _idle(self) -> Iterator[str]:
        yield from super()._idle()
        for each in self._given[self.called("documents")]:
            if isinstance(each, dict):
                yield from (f"{self.called('documents')}.{name}" for name in each if name != "text")

    def check(self) -> None:
        """Raise for what can't be meant, or can't be done."""
        if "texts" in (self.model_extra or {}):
            raise InvalidRequest("texts and documents are two names of the same thing; give one", param="texts")
        if self.cut == "start":
            name = "truncation_direction" if self.truncate is True else self.called("truncate")
            raise UnsupportedParameter(f"{name}: documents can only be cut at their end", param=name)


@dataclass(frozen=True)
class _Ranking:
    """A score for each document in their order, how much of it was cut, and how the scores came about: ``evaluated`` is
    what the model gave, for each text that it got.
    """

    method: Method
    scores: Sequence[float]  # the model's own
    relevances: Sequence[float]  # from 0 to 1
    truncated: Sequence[int]
    evaluated: Embedded

    def best(self, number: int | None) -> list[int]:
        """Return the documents' numbers, the best first, and those with equal scores in their order."""
        return sorted(range(len(self.scores)), key=lambda index: (-self.scores[index], index))[:number]


@router.post("/v1/rerank", summary="Sort documents by how well they answer a query")
@router.post("/rerank", summary="The same as /v1/rerank", operation_id="create_ranking_rerank")
@router.post("/v1/reranking", summary="The same as /v1/rerank", operation_id="create_ranking_v1_reranking")
@router.post("/reranking", summary="The same as /v1/rerank", operation_id="create_ranking_reranking")
@router.post("/v2/rerank", summary="The same as /v1/rerank", operation_id="create_ranking_v2")
async def create_ranking(body: RerankRequest, request: Request, services: UsesServices) -> Response:
    """Answer with the documents' numbers and scores, the best first."""
    body.check()
    headers = body.ignored_header()
    model = _model(services.pool, body.model)

    async def answer() -> Response:
        with asked_of(body.model):
            await model.require("rerank", "embedding")
            ranking = await (_cross_encoded if await model.task() == "rerank" else _by_cosine)(model, body)
        headers[METHOD_HEADER] = ranking.method
        if not body.like_tei:
            return JSONResponse(_answer(model, body, ranking), headers=headers)
        headers[TOKENS_HEADER] = str(sum(ranking.evaluated.tokens))
        if truncated := sum(ranking.evaluated.truncated):
            headers[TRUNCATED_HEADER] = f"{truncated} tokens"
        return JSONResponse(_tei_answer(body, ranking), headers=headers)

    return await unless_client_leaves(request, answer())


def _model(pool: ModelPool, name: str | None) -> ServedModel:
    """Return the named model, or the server's for this. Where there is none for it, the one for embeddings does it."""
    with contextlib.suppress(ModelNotLoaded):
        return pool.get_for("rerank", name)
    with contextlib.suppress(ModelNotLoaded):
        return pool.get_for("embedding", name)
    raise ModelNotLoaded(
        "the request names no model, and models.yaml has neither `rerank_model` nor `embedding_model` under `defaults`"
    )


class _Distinct:
    """Documents without those that are there already: equal ones get the same score, to the last bit, only if they are
    evaluated once. ``texts`` are what is left.
    """

    def __init__(self, body: RerankRequest) -> None:
        self._body = body
        numbers: dict[str, int] = {}
        self._which = [numbers.setdefault(document, len(numbers)) for document in body.documents]
        self.texts = list(numbers)

    def name(self, number: int) -> str:
        """Return what the request calls a text, the first of those that are equal."""
        return self._body.document(self._which.index(number))

    def for_all(self, values: Sequence[T]) -> list[T]:
        """Return the values of all documents, given those of the texts."""
        return [values[number] for number in self._which]


async def _cross_encoded(model: ServedModel, body: RerankRequest) -> _Ranking:
    distinct = _Distinct(body)
    with places(distinct.name):
        cut = body.cut == "end"
        ranked = await rank(model, body.query, distinct.texts, truncate=cut, keep_alive=body.keep_alive)
    scores = [first for first, *_ in struct.iter_unpack(f"<{ranked.width}f", ranked.vectors)]
    relevances = [_sigmoid(score) for score in scores]
    return _Ranking(
        "cross_encoder",
        distinct.for_all(scores),
        distinct.for_all(relevances),
        distinct.for_all(ranked.truncated),
        ranked,
    )


async def _by_cosine(model: ServedModel, body: RerankRequest) -> _Ranking:
    distinct, prefixes = _Distinct(body), model.spec.prefixes
    inputs = [prefixes.query + body.query, *(prefixes.document + text for text in distinct.texts)]
    with places(lambda number: distinct.name(number - 1) if number else "query"):
        embedded = await embed(model, inputs, Embedding(truncate=body.cut), body.keep_alive)
    numbers = struct.Struct(f"<{embedded.width}f")
    query = numbers.unpack_from(embedded.vectors)
    _, *cosines = [sum(map(mul, query, numbers.unpack(row))) async for row in rows_of(embedded)]
    scores = distinct.for_all(cosines)
    return _Ranking(
        "embedding_cosine",
        scores,
        [min(max(score, 0.0), 1.0) for score in scores],
        distinct.for_all(embedded.truncated[1:]),
        embedded,
    )


def _sigmoid(logit: float) -> float:
    if logit < 0:  # where the other formula might have numbers beyond all bounds
        return math.exp(logit) / (1 + math.exp(logit))
    return 1 / (1 + math.exp(-logit))


def _answer(model: ServedModel, body: RerankRequest, ranking: _Ranking) -> dict[str, Any]:
    """Return the answer in the shape that Jina's and Cohere's clients read."""
    scores = ranking.scores if body.raw_scores else ranking.relevances
    results = []
    for index in ranking.best(body.top_n):
        result: dict[str, Any] = {"index": index, "relevance_score": scores[index]}
        if body.return_documents:
            result["document"] = {"text": body.documents[index]}
        if ranking.truncated[index]:
            result["truncated_tokens"] = ranking.truncated[index]
        results.append(result)
    return {
        "id": new_id("rerank"),
        "object": "list",
        "model": model.name,
        "method": ranking.method,
        "results": results,
        "data": results,  # where some clients look for them
        "usage": usage(ranking.evaluated),
    }


def _tei_answer(body: RerankRequest, ranking: _Ranking) -> list[dict[str, Any]]:
    scores = ranking.scores if body.raw_scores else ranking.relevances
    return [
        {"index": index, "score": scores[index]} | ({"text": body.documents[index]} if body.return_documents else {})
        for index in ranking.best(body.top_n)
    ]
