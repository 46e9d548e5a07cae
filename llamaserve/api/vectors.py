"""What requests for vectors, scores and judgements of texts have in common: some fields, and holding a model until
they are made.

Knows nothing of what the texts are for, or of what an answer looks like but for its usage.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import AliasChoices, BeforeValidator, Field, PlainValidator, ValidationError, WithJsonSchema
from pydantic_core import InitErrorDetails, PydanticCustomError

from llamaserve.api.accounting import account
from llamaserve.api.fields import RequestFields, Text, check_text
from llamaserve.api.options import KeepAlive, header_words, ignored_header
from llamaserve.engine.events import Embedded
from llamaserve.engine.params import Embedding
from llamaserve.errors import InvalidRequest, TimeLimitExceeded, UnsupportedParameter
from llamaserve.registry.admission import Place
from llamaserve.registry.served import ServedModel
from llamaserve.worker.process import WorkerProcess
from llamaserve.worker.protocol import Prompt

Cut = Literal["none", "end", "start"]
Plain = Mapping[str, tuple[tuple[Any, ...], str]]  # values that ask for nothing special, and why others are refused


_TURN: Final = 65536  # numbers that are worked on before others get a turn
_WITHOUT_EFFECT: Final = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier"})  # in the answer
_CUTS: Final = ("none", "end", "start")
_CUT_SCHEMA: Final = {"anyOf": [{"type": "boolean"}, {"enum": [*_CUTS], "type": "string"}], "default": False}
_PLACE: Final = re.compile(r"(?:input|documents)\[(\d+)\]")


def _truncate(value: Any) -> bool | Cut:
    if isinstance(value, bool):
        return value
    for cut in _CUTS:
        if isinstance(value, str) and value.lower() == cut:
            return cut
    raise ValueError("must be true, false, none, end or start")


def lower(value: Any) -> Any:
    """Take a word in any case."""
    return value.lower() if isinstance(value, str) else value


class TextFields(RequestFields):
    """Fields of every request in which a model looks at texts and writes none."""

    not_offered: ClassVar[Plain] = {}

    model: Text | None = Field(None, max_length=512, description="A served model's name or alias.")
    keep_alive: KeepAlive | None = Field(
        None,
        description="How long the model stays loaded after this: seconds, or such as 5m; 0: not at all, -1: for ever.",
    )
    strict: bool = Field(default=False, description="Refuse what would have no effect.")

    def ignored_header(self, idle: Iterable[str] = ()) -> dict[str, str]:
        """Return the header that names what has no effect, ``idle`` fields too. Raises for what is not offered, and
        with ``strict`` for what has no effect.
        """
        extra = self.model_extra or {}
        for name, (plain, why) in self.not_offered.items():
            if name in extra and not any(type(extra[name]) is type(each) and extra[name] == each for each in plain):
                raise UnsupportedParameter(f"{name}: {why}", param=name)
        others = (name for name in extra if name not in _WITHOUT_EFFECT and name not in self.not_offered)
        words = header_words([*others, *map(self.called, (*self._idle(), *idle))])
        if self.strict and words:
            raise UnsupportedParameter(f"strict: {', '.join(words)} would have no effect", param=words[0])
        return ignored_header(words)

    def _idle(self) -> Iterator[str]:
        """Yield the known fields that do nothing."""
        yield from ()


class EmbeddingFields(TextFields):
    """Fields of every request for vectors or scores."""

    truncate: Annotated[bool | Cut, PlainValidator(_truncate), WithJsonSchema(_CUT_SCHEMA)] = Field(
        default=False,
        validation_alias=AliasChoices("truncate", "truncation"),
        description="What a text that is too long for the model loses; false or none: it is refused.",
    )
    truncation_direction: Annotated[Literal["left", "right"], BeforeValidator(lower)] | None = Field(
        None, description="Which end of a text is cut when truncate is true: right, or left."
    )

    @property
    def cut(self) -> Cut:
        """What a text that is too long loses."""
        if isinstance(self.truncate, bool):
            return "none" if not self.truncate else "start" if self.truncation_direction == "left" else "end"
        return self.truncate

    def _idle(self) -> Iterator[str]:
        """Yield the fields that do nothing beside the others."""
        if self.truncation_direction is not None and self.truncate is not True:
            yield "truncation_direction"


def misplaced(message: str, *place: int) -> ValidationError:
    """Return what a validator of a list raises for one of its items, so that the error names that one."""
    problem = PydanticCustomError("value_error", "{message}", {"message": message})
    return ValidationError.from_exception_data("list", [InitErrorDetails(type=problem, loc=place, input=None)])


def check_item(text: str, place: int) -> None:
    """Refuse a text of a list that is empty or no Unicode, by its place in the list."""
    if not text:
        raise misplaced("must not be empty", place)
    try:
        check_text(text)
    except ValueError as error:
        raise misplaced(str(error), place) from None


@contextlib.contextmanager
def places(name: Callable[[int], str]) -> Iterator[None]:
    """Have errors of the texts that a model got call them what the request calls them, by their number."""
    try:
        yield
    except InvalidRequest as error:
        if found := _PLACE.fullmatch(error.param or ""):
            error.param = name(int(found[1]))
            error.message = error.message.replace(found[0], error.param)
        raise


async def embed(
    model: ServedModel, inputs: Sequence[Prompt], embedding: Embedding, keep_alive: float | None = None
) -> Embedded:
    """Return the vectors of texts, or of token ids, before which nothing is put. The model is loaded first if need be;
    ``keep_alive`` is how many seconds it stays after this, if the request says so.
    """
    await model.require("embedding")
    async with in_use(model, lambda: place_for(model, inputs), keep_alive) as (worker, _):
        embedded = await worker.embed(inputs, embedding, share=account().owner)
        account().used(prompt=sum(embedded.tokens))
        return embedded


async def rank(
    model: ServedModel, query: str, documents: Sequence[str], *, truncate: bool, keep_alive: float | None = None
) -> Embedded:
    """Return what a model that scores pairs makes of each document together with the query, the score first."""
    async with in_use(model, lambda: place_for(model, [query, *documents]), keep_alive) as (worker, _):
        ranked = await worker.rank(query, documents, truncate=truncate, share=account().owner)
        account().used(prompt=sum(ranked.tokens))
        return ranked


def place_for(model: ServedModel, inputs: Sequence[Prompt]) -> Place:
    """Return a place at a model for texts, or token ids. Raises ``QueueFull``."""
    return model.embedding_admission.enter(sum(map(sys.getsizeof, inputs)), account().owner)


@contextlib.asynccontextmanager
async def in_use(
    model: ServedModel, enter: Callable[[], Place], keep_alive: float | None = None
) -> AsyncIterator[tuple[WorkerProcess, ServedModel]]:
    """Have the process of a model, at which the request gets a place by ``enter``, within a ``with`` block; and the
    model that it runs, since another may have taken the name while this one was waited for, or its file have changed.
    Once it is loaded, the request may take as long as that model's time limit says.
    """
    await account().turn(model.name)
    place, use = enter(), model.use()
    try:
        worker = await use.worker()
        used = use.model or model
        try:
            async with asyncio.timeout(used.spec.time_limit) as limit:
                yield worker, used
        except TimeoutError:
            if not limit.expired():
                raise
            raise TimeLimitExceeded(
                f"it took longer than the {used.spec.time_limit:g} seconds that this model's `time_limit` leaves"
            ) from None
        use.keep(keep_alive)
    finally:
        use.leave()
        place.leave()


async def rows_of(embedded: Embedded) -> AsyncIterator[bytes]:
    """Yield the vectors one by one. Others get a turn now and then, since there may be millions of numbers."""
    size = embedded.width * 4
    for number in range(len(embedded.tokens)):
        if number * embedded.width % _TURN < embedded.width:
            await asyncio.sleep(0)
        yield embedded.vectors[number * size : (number + 1) * size]


def usage(embedded: Embedded) -> dict[str, Any]:
    """Return OpenAI's usage object. What was cut is not among the tokens that count."""
    tokens, truncated = sum(embedded.tokens), sum(embedded.truncated)
    total = {"prompt_tokens": tokens, "total_tokens": tokens}
    return total | ({"prompt_tokens_details": {"truncated_tokens": truncated}} if truncated else {})
