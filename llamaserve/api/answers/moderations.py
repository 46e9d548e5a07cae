"""How judgements of texts look."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from llamaserve.api.answers.answer import Answer, Content, Documented
from llamaserve.api.answers.embeddings import EMBEDDER, TextUsage
from llamaserve.api.answers.errors import BODY, WAITS
from llamaserve.api.answers.generation import HEADERS
from llamaserve.moderation.categories import CATEGORIES


def _of_categories(name: str, kind: Any, words: str) -> Any:
    """Return a type that has a field for each category."""
    fields = [(category.replace("/", "_").replace("-", "_"), kind) for category in CATEGORIES]
    renamed = {field: category for (field, _), category in zip(fields, CATEGORIES, strict=True)}
    namespace = {"__doc__": words}
    return msgspec.defstruct(name, fields, namespace=namespace, rename=renamed, forbid_unknown_fields=True)


_Score = Annotated[float, Meta(ge=0, le=1)]

Flags: Final = _of_categories("ModerationFlags", bool, "Whether a text is in each of the categories.")
CategoryScores: Final = _of_categories("ModerationScores", _Score, "How much it is.")
InputTypes: Final = _of_categories("ModerationInputTypes", list[Literal["text"]], "What was judged; empty: nothing.")
Judges: Final = _of_categories("ModerationJudges", str | None, "Which model judged each category; null: none.")


class ModerationResult(Answer):
    """The judgement of a text."""

    flagged: Annotated[bool, Meta(description="Whether it is in any category.")]
    categories: Flags  # type: ignore[valid-type]
    category_scores: CategoryScores  # type: ignore[valid-type]
    category_applied_input_types: InputTypes  # type: ignore[valid-type]


class Moderation(Answer):
    """The judgements of texts, in their order."""

    id: str
    model: str
    method: Annotated[Literal["embedding_heads", "guard"], Meta(description="The classifier, or a guard model.")]
    category_models: Judges  # type: ignore[valid-type]
    results: list[ModerationResult]
    usage: TextUsage


def _each(value: object) -> dict[str, object]:
    return dict.fromkeys(CATEGORIES, value)


_ANSWER: Final = {
    "id": "modr-5d3f0a",
    "model": EMBEDDER,
    "method": "embedding_heads",
    "category_models": _each(EMBEDDER),
    "results": [
        {
            "flagged": True,
            "categories": _each(False) | {"harassment": True},
            "category_scores": _each(0.0) | {"harassment": 0.995},
            "category_applied_input_types": _each(["text"]),
        }
    ],
    "usage": {"prompt_tokens": 12, "total_tokens": 12},
}

ROUTES: Final = {
    "POST /v1/moderations": Documented(
        answers=(Content(Moderation, {"one text": _ANSWER}),),
        errors=(*BODY, *WAITS),
        requests={
            "texts": {"input": ["The library opens at nine.", "You are a disgusting person."]},
            "parts": {"input": [{"type": "text", "text": "The library opens at nine."}]},
        },
        headers=HEADERS,
    ),
}
