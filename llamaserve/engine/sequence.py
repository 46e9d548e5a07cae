"""One text being generated: its tokens, how far they are evaluated, and where it stands. Knows nothing of llama.cpp."""

from __future__ import annotations

import math
from collections.abc import Sequence as TokenSequence
from enum import Enum, auto
from typing import Protocol

from llamaserve.engine.detokenizer import Detokenizer
from llamaserve.engine.events import TokenLogprob, TokenLogprobs
from llamaserve.engine.logprobs import AnswerLogprobs
from llamaserve.engine.params import Generation
from llamaserve.engine.speculation import Drafter
from llamaserve.errors import LlamaserveError

_UNLIMITED = 2**31
# Which LoRA adapters are at work, by what is in their files, and how strongly: sorted, without those of scale 0. What
# was evaluated with some of them serves only those who want the same.
AdapterKey = tuple[tuple[str, float], ...]

_COMPARED = 256  # tokens at once: comparing list slices is far faster than comparing tokens


def common_prefix(one: TokenSequence[int], other: TokenSequence[int]) -> int:
    """Return how many tokens the two have in common at their beginning."""
    limit = min(len(one), len(other))
    start = 0
    while start < limit and one[start : start + _COMPARED] == other[start : start + _COMPARED]:
        start += _COMPARED
    start = min(start, limit)
    while start < limit and one[start] == other[start]:
        start += 1
    return start


class State(Enum):
    """Where a sequence stands."""

    WAITING = auto()  # for a slot
    RUNNING = auto()  # its tokens are being evaluated: many at a time (prefill), then one a step (decode)
    FINISHED = auto()


class Sampler(Protocol):
    """What picks a sequence's next token and must be freed in the end."""

    def prepare(self) -> None:
        """Do what can be done for the next token before its logits are there, on another thread."""

    def possible(self, tokens: TokenSequence[int]) -> int:
        """Return how many of some guessed tokens may come next, one after the other."""

    def close(self) -> None: ...


class Sequence:
    """A prompt and the answer to it so far.

    ``tokens`` is both; the first ``evaluated`` of them are in the key-value cache at ``slot``. A sequence of which
    exactly one generated token is not yet evaluated is decoding, otherwise it is prefilling.
    """

    __slots__ = (
        "adapters",
        "arrival",
        "blocked",
        "cached",
        "complete",
        "deadline",
        "drafter",
        "evaluated",
        "form",
        "generation",
        "index",
        "leader",
        "limit",
        "logprobs",
        "next_tokens",
        "prompt_length",
        "prompt_logprobs",
        "reported",
        "request",
        "sampler",
        "share",
        "shown",
        "slot",
        "state",
        "text",
        "tokens",
        "unsent",
    )

    def __init__(
        self,
        request: int,
        index: int,
        prompt: TokenSequence[int],
        generation: Generation,
        deadline: float = math.inf,
        context: int = _UNLIMITED,
    ) -> None:
        self.request = request
        self.index = index
        self.generation = generation
        self.share = generation.share
        self.adapters: AdapterKey = ()
        self.tokens = list(prompt)
        self.prompt_length = len(prompt)
        self.limit = min(context, generation.context or context)  # of tokens, prompt and answer
        if generation.max_tokens is not None:
            self.limit = min(self.limit, len(prompt) + generation.max_tokens)
        self.state = State.WAITING
        self.arrival = 0  # the scheduler numbers its sequences
        self.slot: int | None = None
        self.evaluated = 0
        self.cached: int | None = None  # prompt tokens that were reused, once it has started
        self.deadline = deadline  # on the engine's clock, seconds
        self.leader: tuple[Sequence, int] | None = None  # one whose first so many tokens this one waits to copy
        self.sampler: Sampler | None = None
        self.form: object | None = None  # that the answer must have
        self.complete = False  # it has the form it must have, and nothing more may come
        self.blocked: LlamaserveError | None = None  # why no token may come next
        self.drafter: Drafter | None = None  # made when it is first asked for
        self.text = Detokenizer(generation.stop)
        self.shown: frozenset[int] = frozenset()  # control tokens that are part of the text
        self.unsent: list[str] = []  # text of a request that is not streamed
        self.reported = 0  # generated tokens of which there was an event
        self.logprobs: AnswerLogprobs | None = None
        self.prompt_logprobs: list[TokenLogprobs] | None = (
            None  # of the prompt's first tokens, as far as they are known
        )
        self.next_tokens: tuple[TokenLogprob, ...] = ()

    @property
    def resumed(self) -> bool:
        """Whether it waits for a slot once more, having lost one."""
        return self.state is State.WAITING and self.cached is not None

    @property
    def scoring(self) -> bool:
        """Whether the log-probabilities of some of the prompt's tokens are still wanted."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.prompt_length

    @property
    def reusable(self) -> int:
        """Number of tokens that need not be evaluated for the sake of their logits."""
        return len(self.prompt_logprobs) - 1 if self.prompt_logprobs and self.scoring else len(self.tokens)

    @property
    def pending(self) -> int:
        """Number of tokens that still have to be evaluated before the next one can be sampled."""
        return len(self.tokens) - self.evaluated

    @property
    def decoding(self) -> bool:
        """Whether the next step evaluates just the token that was sampled last."""
        return self.pending == 1 and self.generated > 0

    @property
    def generated(self) -> int:
        """Number of tokens generated so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def choice(self) -> int:
        """Which answer to its prompt this is, from 0."""
        return self.index % self.generation.choices
