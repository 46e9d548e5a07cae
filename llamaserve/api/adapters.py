"""The request field ``lora``: which of a model's adapters work on one answer, and how strongly.

Written as llama-server has it, where an ``id`` is a place in the model's list of adapters; here it may be a name, too.
Knows nothing of files, or of what adapters do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from llamaserve.api.fields import check_text, whole
from llamaserve.errors import InvalidRequest
from llamaserve.registry.served import ServedModel

MAX_ADAPTERS: Final = 32  # of one request
MAX_SCALE: Final = 100
_MAX_NAME = 512
_SHOWN = 10


def _id(value: object) -> int | str:
    value = whole(value)
    if type(value) is int and 0 <= value < MAX_ADAPTERS:
        return value
    if isinstance(value, str) and 0 < len(value) <= _MAX_NAME:
        check_text(value)
        return value
    raise ValueError(f"must be an adapter's name, or its place in the model's list, from 0 to {MAX_ADAPTERS - 1}")


_ID_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 0, "maximum": MAX_ADAPTERS - 1},
        {"type": "string", "minLength": 1, "maxLength": _MAX_NAME},
    ]
}


class AdapterWish(BaseModel):
    """One adapter, and how strongly it shall work."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    id: Annotated[int | str, BeforeValidator(_id), WithJsonSchema(_ID_SCHEMA)]
    scale: float = Field(strict=True, ge=-MAX_SCALE, le=MAX_SCALE)


def _check_once(wishes: list[AdapterWish]) -> list[AdapterWish]:
    seen: set[int | str] = set()
    for wish in wishes:
        if wish.id in seen:
            raise ValueError(f"the adapter {wish.id!r} is there twice")
        seen.add(wish.id)
    return wishes


AdapterWishes = Annotated[list[AdapterWish], Field(max_length=MAX_ADAPTERS), AfterValidator(_check_once)]


def adapters_for(model: ServedModel, wanted: Sequence[AdapterWish] | None) -> tuple[tuple[str, float], ...] | None:
    """Return ``Generation.adapters`` for a request to a model."""
    return None if wanted is None else resolve_adapters(wanted, [adapter.name for adapter in model.adapters])


def resolve_adapters(
    wanted: Sequence[AdapterWish] | None, names: Sequence[str], field: str = "lora"
) -> tuple[tuple[str, float], ...] | None:
    """Return ``Generation.adapters`` for a model with adapters of these names: in the order of its list, without those
    of scale 0, which do nothing. None stands for all of them with their own scales, as in the request.

    Raises ``InvalidRequest``, with the place in this ``field``, when there is no such adapter, or one is named twice.
    """
    if wanted is None:
        return None
    scales: dict[int, float] = {}
    for number, wish in enumerate(wanted):
        place = f"{field}[{number}].id"
        index = _index(wish.id, names, place)
        if index in scales:
            raise InvalidRequest(f"{place}: the adapter {names[index]!r} is there twice", param=place)
        scales[index] = wish.scale
    return tuple((names[index], scales[index]) for index in sorted(scales) if scales[index])


def _index(wish: int | str, names: Sequence[str], place: str) -> int:
    if isinstance(wish, int) and wish < len(names):
        return wish
    if wish in names:
        return names.index(str(wish))
    if not names:
        there = "the model has none"
    else:
        there = f"there is {', '.join(names[:_SHOWN])}{' and others' if len(names) > _SHOWN else ''}"
    raise InvalidRequest(f"{place}: the model has no adapter {wish!r}; {there}", param=place)
