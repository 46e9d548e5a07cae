"""``POST /v1/moderations``: how much texts are in each of OpenAI's categories of harm, in the shape of OpenAI's answer.

What judges them is a model that this server has: the answer says which one, and for which categories.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field, PlainValidator, WithJsonSchema

from llamaserve.api.accounting import account, metered
from llamaserve.api.fields import Text, check_text
from llamaserve.api.generating import new_id, unless_client_leaves
from llamaserve.api.moderating import Judgement, judged
from llamaserve.api.options import asked_of
from llamaserve.api.services import UsesServices
from llamaserve.api.vectors import TextFields, misplaced
from llamaserve.chat.messages import TEXT_PARTS
from llamaserve.errors import UnsupportedParameter
from llamaserve.moderation.categories import CATEGORIES
from llamaserve.registry.pool import ModelPool
from llamaserve.registry.served import ServedModel

router = APIRouter(tags=["moderation"], dependencies=[Depends(metered)])

# OpenAI's models, which stand for this server's unless models.yaml has one of that name.
_OPENAI: Final = frozenset(
    {
        *("omni-moderation-latest", "omni-moderation-2024-09-26"),
        *("text-moderation-latest", "text-moderation-stable", "text-moderation-007"),
    }
)
_MAX_INPUTS: Final = 256
_MAX_CHARACTERS: Final = 1_000_000  # of all inputs together
_INPUT_SCHEMA: Final = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": _MAX_INPUTS},
        {
            "type": "array",
            "minItems": 1,
            "maxItems": _MAX_INPUTS,
            "items": {
                "type": "object",
                "properties": {"type": {"enum": [*TEXT_PARTS], "type": "string"}, "text": {"type": "string"}},
                "required": ["type", "text"],
            },
        },
    ]
}


def _inputs(value: Any) -> list[str]:
    """Take a string, a list of strings, or a list of parts, which are one text together."""
    if isinstance(value, str):
        check_text(value)
        texts = [value]
    elif not isinstance(value, list):
        raise ValueError("must be a string, a list of strings, or a list of parts with a text")
    elif not 1 <= len(value) <= _MAX_INPUTS:
        raise ValueError(f"there are {len(value)} inputs; from 1 to {_MAX_INPUTS} are taken")
    elif isinstance(value[0], dict):
        texts = ["\n".join(_part(each, number) for number, each in enumerate(value))]
    else:
        texts = [_string(each, number, "must be a string") for number, each in enumerate(value)]
    if (characters := sum(map(len, texts))) > _MAX_CHARACTERS:
        raise ValueError(f"there are {characters} characters; at most {_MAX_CHARACTERS} are taken")
    return texts


def _part(value: Any, number: int) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str):
        raise misplaced("must be a part with a type, such as text, as the first one is", number)
    if kind not in TEXT_PARTS:
        place = f"input[{number}]"
        raise UnsupportedParameter(f"{place}: only text is judged here; the type must be text", param=place)
    return _string(value.get("text"), number, "must have a text that is a string")


def _string(value: Any, number: int, expected: str) -> str:
    if not isinstance(value, str):
        raise misplaced(expected, number)
    try:
        check_text(value)
    except ValueError as error:
        raise misplaced(str(error), number) from None
    return value


class ModerationRequest(TextFields):
    """Texts to be judged."""

    input: Annotated[list[str], PlainValidator(_inputs), WithJsonSchema(_INPUT_SCHEMA)] = Field(
        description="One text, several, or one in parts. Those may be empty."
    )
    model: Text | None = Field(
        None, max_length=512, description="A served model's name or alias; one of OpenAI's names is the server's."
    )

    def place(self, number: int) -> str:
        """Return what the request calls a text."""
        given = self._given["input"]
        return f"input[{number}]" if isinstance(given, list) and isinstance(given[0], str) else "input"

    def _idle(self) -> Iterator[str]:
        """Yield the fields of parts that do nothing."""
        given = self._given["input"]
        for part in given if isinstance(given, list) else ():
            if isinstance(part, dict):
                yield from (f"input.{name}" for name in part if name not in ("type", "text"))


@router.post("/v1/moderations", summary="Judge texts: is there anything harmful in them?")
async def create_moderation(body: ModerationRequest, request: Request, services: UsesServices) -> Response:
    """Answer with one result for each input, in their order."""
    headers = body.ignored_header()
    model = _model(services.pool, body.model)

    async def answer() -> Response:
        with asked_of(body.model):
            judgement = await judged(services, model, body.input, body.place, body.keep_alive)
        return JSONResponse(_answer(model, judgement), headers=headers)

    return await unless_client_leaves(request, answer())


def _model(pool: ModelPool, name: str | None) -> ServedModel:
    """Return the named model, or the server's for this."""
    registry = pool.registry
    if name in _OPENAI and name not in registry.models and name not in registry.aliases:
        name = None
    return pool.get_for("moderation", name)


def _answer(model: ServedModel, judgement: Judgement) -> dict[str, Any]:
    """Return the answer in OpenAI's shape, and what it has no place for."""
    return {
        "id": new_id("modr"),
        "model": model.name,
        "method": judgement.method,
        "category_models": dict(judgement.judges),
        "results": _results(judgement),
        "usage": {"prompt_tokens": account().prompt_tokens, "total_tokens": account().prompt_tokens},
    }


def _results(judgement: Judgement) -> Sequence[dict[str, Any]]:
    applied = {name: ["text"] if judgement.judges[name] else [] for name in CATEGORIES}
    results = []
    for scores in judgement.scores:
        flags = scores.flags(judgement.thresholds)
        results.append(
            {
                "flagged": any(flags.values()),
                "categories": flags,
                "category_scores": {name: scores.values[name] for name in CATEGORIES},
                "category_applied_input_types": applied,
            }
        )
    return results
