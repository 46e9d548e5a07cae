"""``POST /v1/embeddings``: texts or token ids to vectors of length 1, as OpenAI's endpoint has them.

An answer is mostly numbers, up to millions of them. In JSON they are exactly the 32-bit floats that the model gave, and
base64 has the same bytes.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Final, Literal

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from pydantic import AliasChoices, BeforeValidator, Field, PlainValidator, WithJsonSchema

from llamaserve.api.accounting import metered
from llamaserve.api.fields import check_text, whole
from llamaserve.api.generating import unless_client_leaves
from llamaserve.api.options import asked_of
from llamaserve.api.services import UsesServices
from llamaserve.api.vectors import (
    EmbeddingFields,
    Plain,
    check_item,
    embed,
    lower,
    misplaced,
    places,
    rows_of,
    usage,
)
from llamaserve.engine.events import Embedded
from llamaserve.engine.params import Embedding
from llamaserve.errors import InvalidRequest
from llamaserve.registry.served import ServedModel
from llamaserve.worker.protocol import Prompt

router = APIRouter(tags=["embeddings"], dependencies=[Depends(metered)])

Kind = Literal["query", "document", "plain"]

_MAX_INPUTS: Final = 2048
_INT32: Final = 2**31 - 1  # the largest token id
_MAX_TOKENS: Final = 1024 * 1024  # ids of all inputs together; more could not fit, and looking at each takes time
_TEXT_SCHEMA: Final = {"type": "string", "minLength": 1}
_TOKENS_SCHEMA: Final = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": _INT32},
    "minItems": 1,
    "maxItems": _MAX_TOKENS,
}
_INPUT_SCHEMA: Final = {
    "anyOf": [
        _TEXT_SCHEMA,
        {"type": "array", "items": _TEXT_SCHEMA, "minItems": 1, "maxItems": _MAX_INPUTS},
        _TOKENS_SCHEMA,
        {"type": "array", "items": _TOKENS_SCHEMA, "minItems": 1, "maxItems": _MAX_INPUTS},
    ]
}
_KINDS: Final[dict[str, Kind]] = {  # by our word, and those of Cohere, Jina, Gemini and sentence-transformers
    **dict.fromkeys(("query", "search_query", "retrieval.query", "retrieval_query"), "query"),
    **dict.fromkeys(("document", "passage", "search_document", "retrieval.passage", "retrieval_document"), "document"),
    **dict.fromkeys(("plain", "classification", "clustering", "separation", "text-matching"), "plain"),
}


def _inputs(value: Any) -> list[Prompt]:
    """Take a string, a list of strings, one list of token ids, or a list of such lists."""
    if isinstance(value, str):
        if not value:
            raise ValueError("must not be empty")
        check_text(value)
        return [value]
    if not isinstance(value, list):
        raise ValueError("must be a string, a list of strings, a list of token ids or a list of lists of token ids")
    if not value:
        raise ValueError("the list is empty; it needs at least one text")
    if isinstance(value[0], int):
        _check_tokens(value)
        return [value]
    if len(value) > _MAX_INPUTS:
        raise ValueError(f"there are {len(value)} inputs; at most {_MAX_INPUTS} are taken")
    _check_number(sum(len(each) for each in value if isinstance(each, list)))
    for number, each in enumerate(value):
        if isinstance(each, str):
            check_item(each, number)
        elif isinstance(each, list):
            _check_tokens(each, number)
        else:
            raise misplaced("must be a string or a list of token ids", number)
    return value


def _check_number(tokens: int) -> None:
    if tokens > _MAX_TOKENS:
        raise ValueError(f"there are more than {_MAX_TOKENS} token ids")


def _check_tokens(tokens: Sequence[Any], *place: int) -> None:
    """Refuse a list in which something is no token id, by the place of that."""
    _check_number(len(tokens))
    if not tokens:
        raise misplaced("must not be empty", *place)
    if set(map(type, tokens)) == {int} and min(tokens) >= 0 and max(tokens) <= _INT32:
        return
    wrong = next(number for number, token in enumerate(tokens) if not _is_token(token))
    raise misplaced(f"must be a token id, from 0 to {_INT32}", *place, wrong)


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _INT32


def _kind(value: Any) -> Kind:
    kind = _KINDS.get(value.lower()) if isinstance(value, str) else None
    if kind is None:
        raise ValueError(f"must be one of {', '.join(_KINDS)}")
    return kind


class EmbeddingRequest(EmbeddingFields):
    """Texts to be turned into vectors."""

    not_offered: ClassVar[Plain] = {
        **dict.fromkeys(("normalize", "normalized"), ((True,), "vectors always have a length of 1")),
        "embd_normalize": ((2,), "vectors always have a length of 1"),
        "output_dtype": (("float",), "vectors are of 32-bit floats"),
        "embedding_types": ((["float"],), "vectors are of 32-bit floats"),
        "late_chunking": ((False,), "each text is embedded by itself"),
        "return_multivector": ((False,), "there is one vector for each text"),
        "add_special_tokens": ((True,), "texts always get the tokens that the model was trained with"),
    }

    input: Annotated[list[str | list[int]], PlainValidator(_inputs), WithJsonSchema(_INPUT_SCHEMA)] = Field(
        description="One text or several, or token ids of the model's own vocabulary, which get nothing added."
    )
    encoding_format: Annotated[Literal["float", "base64"], BeforeValidator(lower)] = Field(
        "float",
        validation_alias=AliasChoices("encoding_format", "embedding_type"),
        description="A list of numbers, or their bytes as little-endian 32-bit floats in base64.",
    )
    dimensions: Annotated[int, Field(strict=True, ge=1, le=_INT32), BeforeValidator(whole)] | None = Field(
        None,
        validation_alias=AliasChoices("dimensions", "output_dimension"),
        description="How many numbers of each vector to keep; it has a length of 1 again.",
    )
    input_type: Annotated[Kind, PlainValidator(_kind), WithJsonSchema({"type": "string", "enum": [*_KINDS]})] | None = (
        Field(
            None,
            validation_alias=AliasChoices("input_type", "task", "prompt_name"),
            description="What the texts are, for models that want a prefix before queries or documents.",
        )
    )

    @property
    def is_list(self) -> bool:
        """Whether the input is a list of texts, not a single one."""
        given = self._given["input"]
        return isinstance(given, list) and not isinstance(given[0], int)

    def place(self, number: int) -> str:
        """Return what the request calls an input."""
        return f"input[{number}]" if self.is_list else "input"

    def prefixed(self, model: ServedModel) -> list[Prompt]:
        """Return the inputs with what the model wants before texts of their kind. Raises when that can't be done, since
        they are token ids.
        """
        prefix: str = getattr(model.spec.prefixes, self.input_type or "plain")
        if self.input_type is not None:
            for number, each in enumerate(self.input):
                if not isinstance(each, str):
                    name = self.called("input_type")
                    raise InvalidRequest(
                        f"{name} is for texts, and {self.place(number)} is token ids, which get nothing added",
                        param=name,
                    )
        return [prefix + each if isinstance(each, str) else each for each in self.input]


@router.post("/v1/embeddings", summary="Turn texts into vectors")
async def create_embeddings(body: EmbeddingRequest, request: Request, services: UsesServices) -> Response:
    """Answer with one vector for each input, in their order."""
    headers = body.ignored_header()
    model = services.pool.get_for("embedding", body.model)
    inputs = body.prefixed(model)
    embedding = Embedding(dimensions=body.dimensions, truncate=body.cut)

    async def answer() -> Response:
        try:
            with asked_of(body.model), places(body.place):
                embedded = await embed(model, inputs, embedding, body.keep_alive)
        except InvalidRequest as error:
            if error.param == "dimensions":
                error.param = body.called("dimensions")
            raise
        whole = {
            "object": "list",
            "data": await _items(embedded, as_base64=body.encoding_format == "base64"),
            "model": model.name,
            "usage": usage(embedded),
        }
        return Response(msgspec.json.encode(whole), media_type="application/json", headers=headers)

    return await unless_client_leaves(request, answer())


async def _items(embedded: Embedded, *, as_base64: bool) -> list[msgspec.Raw]:
    """Return the data of an answer, each item as JSON."""
    numbers = struct.Struct(f"<{embedded.width}f")
    items: list[msgspec.Raw] = []
    async for row in rows_of(embedded):
        index = len(items)
        embedding = base64.b64encode(row).decode() if as_base64 else numbers.unpack(row)
        item = {"object": "embedding", "index": index, "embedding": embedding}
        if embedded.truncated[index]:
            item["truncated_tokens"] = embedded.truncated[index]
        items.append(msgspec.Raw(msgspec.json.encode(item)))
    return items
