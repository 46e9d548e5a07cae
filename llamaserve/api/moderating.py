"""How texts are judged: by the trained classifier on their embeddings, or by a guard model's own verdict.

A guard has nothing to say about some categories; there the classifier is asked as well, if its embedding model is on
this machine. Knows nothing of what requests and answers look like.
"""

from __future__ import annotations

import asyncio
import re
import struct
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar

import msgspec

from llamaserve.api.embedding import embed, rows_of
from llamaserve.api.generating import Job, generate_whole, new_id
from llamaserve.api.services import Services
from llamaserve.chat.modes import ModelTemplate, Style
from llamaserve.chat.preparation import ChatWish
from llamaserve.engine.params import Embedding, Generation, NextToken, Sampling
from llamaserve.errors import (
    ChatTemplateError,
    ContextLengthExceeded,
    LlamaserveError,
    ModelNotCapable,
    TimeLimitExceeded,
    Unavailable,
)
from llamaserve.moderation.categories import CATEGORIES, PARENT, Scores
from llamaserve.moderation.guards import Family, Verdict, recognised
from llamaserve.moderation.judging import judge
from llamaserve.moderation.words import TOP, NextTokens, next_tokens
from llamaserve.registry.pool import ModelPool
from llamaserve.registry.served import ServedModel
from llamaserve.registry.tasks import task_of
from llamaserve.worker.protocol import Prompt

Method = Literal["embedding_heads", "guard"]
T = TypeVar("T")

_SHORTEST: Final = 64  # characters; what is shorter is not cut in two
_LOOK: Final = Generation(sampling=Sampling(seed=0), max_tokens=0, next_token=NextToken(TOP))
_BREAKS: Final = (re.compile(r"\n\s*\n"), re.compile(r"[.!?\n]\s+|[。！？]"), re.compile(r"\s+"))  # the best first  # noqa: RUF001


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
    """Return what a model makes of texts, which ``place`` calls what the request does. One without anything but white
    space is not looked at. ``keep_alive`` is how many seconds the model stays after this, if the request says so.
    """
    await model.require("moderation", "embedding")
    if await model.task() == "embedding":
        return await _by_heads(model, texts, keep_alive)
    guard = await _Guard.of(services, model, keep_alive)
    # One after the other: two models that have no room beside each other would wait for ever while both are held.
    classifier = await asyncio.to_thread(_classifier, services.pool)
    others = await _by_heads(classifier, texts) if classifier is not None else None
    verdicts = await guard.judge(texts, place)
    return _completed(model, guard.family, verdicts, others)
