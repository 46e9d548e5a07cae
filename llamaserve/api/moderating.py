"""How texts are judged: by the trained classifier on their embeddings, or by a guard model's own verdict.

A guard has nothing to say about some categories; there the classifier is asked as well, if its embedding model is on
this machine and has room beside the guard. Knows nothing of what requests and answers look like.
"""

from __future__ import annotations

import asyncio
import logging
import re
import struct
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Final, Literal, TypeVar

import msgspec

from llamaserve.api.accounting import account
from llamaserve.api.services import Services
from llamaserve.api.vectors import in_use, place_for, places
from llamaserve.chat.conversation import Conversations
from llamaserve.chat.modes import ModelTemplate, Style
from llamaserve.chat.preparation import ChatWish
from llamaserve.engine.events import Embedded, Finished
from llamaserve.engine.params import Embedding, Generation, NextToken, Sampling
from llamaserve.errors import (
    ChatTemplateError,
    ContextLengthExceeded,
    InvalidRequest,
    LlamaserveError,
    ModelNotCapable,
    QueueFull,
    Unavailable,
)
from llamaserve.moderation.categories import CATEGORIES, PARENT, Scores
from llamaserve.moderation.chunks import chunks
from llamaserve.moderation.guards import Family, Verdict, recognised
from llamaserve.moderation.heads import Heads, load_heads, merged
from llamaserve.moderation.judging import judge
from llamaserve.moderation.spelling import plain
from llamaserve.moderation.words import TOP, NextTokens, next_tokens
from llamaserve.registry.gguf import GGUFHeader
from llamaserve.registry.pool import ModelPool
from llamaserve.registry.served import ServedModel
from llamaserve.registry.tasks import pooling_of, task_of
from llamaserve.worker.process import WorkerProcess

logger = logging.getLogger(__name__)

Method = Literal["embedding_heads", "guard"]
T = TypeVar("T")

_NOTHING: Final = Scores.of({})
_SHORTEST: Final = 64  # characters; what is shorter is not cut in two
_CHARACTERS: Final = 16  # of a token; what has more than so many times the context is cut before it is looked at
_AT_ONCE: Final = 256  # chunks
_LOOK: Final = Generation(sampling=Sampling(seed=0), max_tokens=0, next_token=NextToken(TOP))
_BREAKS: Final = (  # where a text may be cut in two, the best places first
    re.compile(r"\n\s*\n"),
    re.compile(r"[.!?\n]\s+|[\u3002\uff01\uff1f]"),
    re.compile(r"\s+"),
)


@dataclass(frozen=True)
class Judgement:
    """The scores of each text, from where on they count, and who gave them: for each category the name of a model, or
    None where none has anything to say; the scores are 0 there.
    """

    method: Method
    scores: Sequence[Scores]
    thresholds: Mapping[str, float]
    judges: Mapping[str, str | None]


async def judged(
    services: Services,
    model: ServedModel,
    texts: Sequence[str],
    place: Callable[[int], str],
    keep_alive: float | None = None,
) -> Judgement:
    """Return what a model makes of texts, which ``place`` calls what the request does. Nothing but white space is in no
    category. ``keep_alive`` is how many seconds the model stays after this, if the request says so.

    Raises ``ModelNotCapable`` for a model that is neither a guard nor what the classifier was trained for.
    """
    await model.require("moderation", "embedding")
    written = [number for number, text in enumerate(texts) if text.strip()]
    kept = [texts[number] for number in written]

    def name(number: int) -> str:
        return place(written[number])

    if await model.task() == "embedding":
        found = await _by_heads(model, kept, name, keep_alive)
    else:
        found = await _by_guard(services, model, kept, name, keep_alive)
    scores = [_NOTHING] * len(texts)
    for number, each in zip(written, found.scores, strict=True):
        scores[number] = each
    return replace(found, scores=scores)


async def _by_guard(
    services: Services,
    model: ServedModel,
    texts: Sequence[str],
    place: Callable[[int], str],
    keep_alive: float | None,
) -> Judgement:
    family, verdicts = await _verdicts(services, model, texts, place, keep_alive)
    # While the guard is not held: two models that have no room beside each other would wait for each other for ever.
    others = await _by_classifier(services.pool, texts, place)
    covered = family.method.covered
    if others is None:
        scores = [verdict.completed() for verdict in verdicts]
        return Judgement("guard", scores, {}, _judges(model, covered, {}))
    scores = [verdict.completed(other) for verdict, other in zip(verdicts, others.scores, strict=True)]
    thresholds = {name: value for name, value in others.thresholds.items() if name not in covered}
    return Judgement("guard", scores, thresholds, _judges(model, covered, others.judges))


def _judges(guard: ServedModel, covered: frozenset[str], others: Mapping[str, str | None]) -> Mapping[str, str | None]:
    """Return who judges each category: the guard what it covers, and the others the rest. What they leave has the score
    of what is part of it, if the guard covers that.
    """
    raised = {PARENT[name] for name in covered if name in PARENT}
    judges = {name: guard.name if name in covered else others.get(name) for name in CATEGORIES}
    return {name: by or (guard.name if name in raised else None) for name, by in judges.items()}


# ---- the classifier ----------------------------------------------------------------------------------------------


async def _by_heads(
    model: ServedModel, texts: Sequence[str], place: Callable[[int], str], keep_alive: float | None = None
) -> Judgement:
    """Return what the classifier says of the texts' chunks, of which a long text has thousands."""
    heads = await asyncio.to_thread(load_heads)
    _check(heads, model, await model.file.read())
    scores: list[Scores] = []
    if texts:
        async with in_use(model, lambda: place_for(model, texts), keep_alive) as (worker, used):
            _check(heads, used, await used.file.read())  # again, for that is what was loaded
            scores = await _of_chunks(heads, worker, texts, place)
    return Judgement("embedding_heads", scores, heads.thresholds, dict.fromkeys(CATEGORIES, model.name))


async def _of_chunks(
    heads: Heads, worker: WorkerProcess, texts: Sequence[str], place: Callable[[int], str]
) -> list[Scores]:
    """Return the scores of each text. A chunk is judged once, however often it occurs, and counts as one in a text."""
    chunked = [list(dict.fromkeys(await asyncio.to_thread(_chunks, text))) for text in texts]
    owners: dict[str, int] = {}  # the first text that has it
    for number, each in enumerate(chunked):
        for chunk in each:
            owners.setdefault(chunk, number)
    inputs, numbers = [*owners], [*owners.values()]
    if not inputs:  # nothing in them can be seen
        return [_NOTHING] * len(texts)
    with places(lambda number: place(numbers[number])):
        embedded = await worker.embed(inputs, Embedding(), share=account().owner)
        account().used(prompt=sum(embedded.tokens))
    found = dict(zip(inputs, await _scores(heads, embedded, inputs), strict=True))
    return [merged([found[chunk] for chunk in each]) for each in chunked]


def _chunks(text: str) -> list[str]:
    return chunks(plain(text))


async def _scores(heads: Heads, embedded: Embedded, chunks: Sequence[str]) -> list[Scores]:
    """Return the scores of each chunk. Each takes a millisecond, so it is done in a thread, which looks up now and then
    whether anybody still waits for them.
    """
    rows = zip(struct.iter_unpack(f"<{embedded.width}f", embedded.vectors), chunks, strict=True)
    scores: list[Scores] = []
    while len(scores) < len(chunks):
        scores += await asyncio.to_thread(lambda: [heads.scores(*each) for each in islice(rows, _AT_ONCE)])
    return scores


def _classifier(pool: ModelPool) -> ServedModel | None:
    """Return a model on this machine whose embeddings the classifier knows, if there is one: always the same, one that
    models.yaml has for moderation or embeddings rather than another. May read files.
    """
    usual = set(pool.registry.default_models.values())
    for model in sorted(pool.models, key=lambda each: (each.name not in usual, each.name)):
        header = model.file.known_header
        if header is not None and task_of(model.spec, header) == "embedding" and _suits(load_heads(), model, header):
            return model
    return None


async def _by_classifier(pool: ModelPool, texts: Sequence[str], place: Callable[[int], str]) -> Judgement | None:
    """Return what the classifier says for the categories that a guard leaves; None if it can't: nobody is refused a
    guard's verdict for that, and as far as can be seen before no model leaves memory for it. Raises ``QueueFull``,
    since what is said of a text should not hang on how much there is to do.
    """
    model = await asyncio.to_thread(_classifier, pool)
    if model is None:
        return None
    try:
        if await model.is_at_hand():
            return await _by_heads(model, texts, place)
        logger.info("%s judges nothing that a guard leaves: it has no room beside the models in memory", model.name)
    except QueueFull:
        raise
    except LlamaserveError as error:  # of its own, as the guard has taken the texts
        logger.warning("%s judges nothing that a guard leaves: %s", model.name, error.message)
    return None


def _check(heads: Heads, model: ServedModel, header: GGUFHeader) -> None:
    if not _suits(heads, model, header):
        raise ModelNotCapable(
            f"{model.name} makes embeddings, but the classifier knows those of {heads.model} with mean pooling only; "
            "name that, or a guard model"
        )


def _suits(heads: Heads, model: ServedModel, header: GGUFHeader) -> bool:
    """Whether a model's embeddings are those that the heads were trained on; its settings may pool them otherwise."""
    return heads.fit(header) and pooling_of(model.spec, header) == "mean"


# ---- guards -------------------------------------------------------------------------------------------------------


async def _verdicts(
    services: Services,
    model: ServedModel,
    texts: Sequence[str],
    place: Callable[[int], str],
    keep_alive: float | None,
) -> tuple[Family, list[Verdict]]:
    """Return what kind of guard a model is, and its verdict on each text. The request has one place at the model, which
    it holds until all is judged: its own questions never come upon a full queue, or wait for who waits for the model to
    leave. Raises ``ModelNotCapable`` if it is no guard.
    """
    family = await _family(model)
    if not texts:
        return family, []
    sequences = min(model.spec.parallel, len(texts) * family.prompts)
    owner = account().owner
    async with in_use(model, lambda: model.admission.enter(sequences, owner), keep_alive) as (worker, used):
        await used.require("moderation")
        guard = _Guard(
            services.conversations, worker, used, await _family(used), sequences
        )  # again, for that is what was loaded
        return guard.family, await guard.judge(texts, place)


async def _family(model: ServedModel) -> Family:
    header = await model.file.read()
    return recognised(header.chat_template or "", [model.name, header.name or ""])


class _Guard:
    """A guard model that is held, and what one request asks it: no more than so many sequences at once."""

    def __init__(
        self, conversations: Conversations, worker: WorkerProcess, model: ServedModel, family: Family, sequences: int
    ) -> None:
        self.family = family
        self._conversations = conversations
        self._worker = worker
        self._model = model
        header = model.header
        self._template = ModelTemplate(header.chat_template or None, header.bos_token, header.eos_token)
        self._sequences = sequences
        self._turns = asyncio.Semaphore(sequences)

    async def judge(self, texts: Sequence[str], place: Callable[[int], str]) -> list[Verdict]:
        """Return a verdict on each text. The first is judged alone, so that the others find the instructions, which
        stand before each of them, evaluated.
        """
        found = {0: await self._verdict(texts[0], place(0))}
        numbers = iter(range(1, len(texts)))

        async def work() -> None:
            for number in numbers:
                found[number] = await self._verdict(texts[number], place(number))

        await _all([work() for _ in range(self._sequences)])
        return [found[number] for number in range(len(texts))]

    async def _verdict(self, text: str, place: str) -> Verdict:
        """Return the verdict on a text; on one that the context has no room for, what is worst in its parts."""
        try:
            if len(text) <= self._model.context * _CHARACTERS:
                return await judge(text, self.family, self._render, partial(self._ask, place))
        except ContextLengthExceeded:
            if len(text) < _SHORTEST:
                raise
        except ChatTemplateError as error:
            error.param = place
            raise
        verdicts = [await self._verdict(part, place) for part in halves(text) if part.strip()]
        scores = Scores.merged(*(each.scores for each in verdicts))
        return Verdict(max(each.unsafe for each in verdicts), scores, self.family.method.covered)

    async def _render(self, text: str, variables: dict[str, object], asks: bool) -> str:
        messages = [{"role": "user", "content": text}]
        wish = ChatWish(messages, self._template, Style(generation_prompt=asks), variables=variables)
        return (await self._conversations.prepare(wish)).prompt

    async def _ask(self, place: str, prompts: Sequence[str]) -> list[NextTokens]:
        """Return what could come next after each of the prompts; ``place`` is the field that they are from."""
        return await _all([self._next(place, prompt) for prompt in prompts])

    async def _next(self, place: str, prompt: str) -> NextTokens:
        async with self._turns:
            stream = self._worker.generate([prompt], msgspec.structs.replace(_LOOK, share=account().owner))
            try:
                accepted = await stream.accepted()
                account().used(prompt=sum(accepted.prompt_tokens))
                if self._model.closing:  # and all that was generated has been told so before this came
                    stream.stop()
                found = [each.next_tokens async for each in stream.events() if isinstance(each, Finished)]
            except InvalidRequest as error:
                if error.param == "prompt":
                    error.param = place
                raise
            finally:
                stream.close()
        if not all(found):
            raise Unavailable("it was stopped before all was judged", retry_after=1)
        return next_tokens(found[0])


async def _all(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Return the results of work that is done at the same time. If one fails, nothing goes on."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def halves(text: str) -> tuple[str, str]:
    """Return the two halves of a text, which is cut between paragraphs, sentences or words if there is such a place
    near its middle.
    """
    middle, reach = len(text) // 2, len(text) // 8
    for breaks in _BREAKS:
        ends = [found.end() for found in breaks.finditer(text, middle - reach, middle + reach)]
        if ends:
            cut = min(ends, key=lambda end: abs(end - middle))
            return text[:cut], text[cut:]
    return text[:middle], text[middle:]
