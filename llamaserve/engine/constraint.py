"""Keeps the answers of a model to a form: JSON that fits a schema, a grammar, a pattern, a choice.

Compiled constraints are kept for the requests to come. Compiling, and making llguidance's own copy of the vocabulary
the first time, happens in ``compile``, on any thread; ``start`` is quick. Knows nothing of requests or of sampling.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer

from llamaserve.engine.candidates import Candidates
from llamaserve.engine.grammar import compiled, words
from llamaserve.engine.llama import TOKENIZE_ADDRESS, Vocab
from llamaserve.engine.params import Constraint
from llamaserve.errors import InvalidRequest

_WORTH_HIDING = 0.5e-3  # seconds; a thread that wakes up costs the model's own a tenth of that
_KEPT = 32  # compiled constraints
_FEW = 8  # one in so many tokens: if fewer are allowed, those are picked out, else the others are made impossible
_CONTROL = b"\xff"  # marks words that are no text for llguidance
_MINUS_INFINITY = np.array(-np.inf, np.float32).view(np.int32)


class CanNotGoOn(Exception):
    """The answer can't be kept to its form any longer; the message says why."""


class Form:
    """The form of one answer, and how far the answer has come in it. For one thread; masks that take long are computed
    by another one meanwhile.
    """

    def __init__(self, matcher: LLMatcher, size: int, aside: Executor) -> None:
        self._matcher = matcher
        self._size = size
        self._aside = aside
        self._prepared: Future[bytes] | None = None
        self._seconds = 0.0  # that the last mask took

    @property
    def complete(self) -> bool:
        """Whether nothing more may come."""
        return bool(self._matcher.is_stopped())

    def __call__(self, candidates: Candidates) -> None:
        """Drop what may not come next. No token must have been dropped before."""
        bits = self._mask()
        if np.count_nonzero(bits) * _FEW < self._size:
            candidates.keep(np.flatnonzero(bits))
        else:  # arithmetic on bits: a choice for each token takes ten times as long
            dropped = bits.astype(np.int32)
            dropped -= 1
            dropped &= _MINUS_INFINITY
            candidates.logits += dropped.view(np.float32)
            candidates.sorted = False

    def keep_best(self, candidates: Candidates) -> None:
        """Keep the most probable token that may come next. Mostly that is the most probable of all, and one token is
        sooner looked at than all.
        """
        best = candidates.best()
        if self._prepared is not None or not self._matcher.validate_tokens([candidates.token(best)]):
            self(candidates)
            best = candidates.best()
        candidates.keep(np.array([best]))

    def possible(self, tokens: Sequence[int]) -> int:
        """Return how many of some tokens may come next, one after the other."""
        self._wait()
        return int(self._matcher.validate_tokens(list(tokens)))

    def prepare(self) -> None:
        """Begin to compute the next token's mask, if the last one took long, while the model computes."""
        if self._prepared is None and self._seconds > _WORTH_HIDING and not self.complete:
            self._prepared = self._aside.submit(self._compute)

    def accept(self, token: int) -> None:
        """Go on by a token that may come next."""
        self._wait()
        self._prepared = None
        self._matcher.consume_token(token)
        self._check()

    def close(self) -> None:
        """There is nothing to free."""

    def _wait(self) -> None:
        if self._prepared is not None:
            self._prepared.result()

    def _mask(self) -> npt.NDArray[np.uint8]:
        bits = self._compute() if self._prepared is None else self._prepared.result()
        self._check()
        return np.unpackbits(np.frombuffer(bits, np.uint8), count=self._size, bitorder="little")

    def _compute(self) -> bytes:
        start = time.perf_counter()
        bits: bytes = self._matcher.compute_bitmask()
        self._seconds = time.perf_counter() - start
        return bits

    def _check(self) -> None:
        if self._matcher.is_error():
            raise CanNotGoOn(f"the answer can't be kept to its form: {words(self._matcher.get_error())}")


class Grammars:
    """The compiled constraints of one vocabulary."""

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[Constraint, LLMatcher] = OrderedDict()
        self._aside = ThreadPoolExecutor(1, "masks")  # its thread starts with the first mask that takes long

    def compile(self, constraint: Constraint) -> None:
        """Have a constraint ready. Raises ``InvalidRequest`` for one that is wrong or that no answer could meet."""
        self._matcher(constraint)

    def start(self, constraint: Constraint) -> Form:
        """Return the form of a new answer."""
        return Form(self._matcher(constraint).deep_copy(), self._vocab.size, self._aside)

    def _matcher(self, constraint: Constraint) -> LLMatcher:
        key = constraint.anonymous()
        with self._lock:
            if key in self._compiled:
                self._compiled.move_to_end(key)
                return self._compiled[key]
            tokenizer = self._tokenizer = self._tokenizer or self._make_tokenizer()
        matcher = self._compile(constraint, tokenizer)
        with self._lock:
            self._compiled[key] = matcher
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return matcher

    def _compile(self, constraint: Constraint, tokenizer: LLTokenizer) -> LLMatcher:
        """Compile a constraint. What is wrong with a part of it is looked for when something is."""
        try:
            return compiled(constraint, tokenizer, self._vocab.control)
        except ValueError as error:
            for part in constraint.parts:
                self._compile(part, tokenizer)
            raise InvalidRequest(f"{constraint.param}: {words(str(error))}", param=constraint.param) from error

    def _make_tokenizer(self) -> LLTokenizer:
        """Give llguidance the vocabulary: 0.3 s for 49,152 tokens."""
        vocab = self._vocab
        words = [
            (_CONTROL if vocab.is_control(token) else b"") + vocab.piece(token, special=True)
            for token in range(vocab.size)
        ]
        tokenizer: LLTokenizer = LLTokenizer.from_llamacpp(  # type: ignore[attr-defined]
            tokens=words,
            vocab_ptr=vocab.handle,
            tokenize_fptr=TOKENIZE_ADDRESS,
            eos_token=sorted(vocab.ends),
            slices=None,
        )
        return tokenizer
