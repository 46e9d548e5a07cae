"""Makes vectors and scores of texts, for many requests at once with one loaded model.

``submit``, ``cancel`` and ``step`` belong to one thread, which calls ``step`` while it is not idle. ``check``,
``encode``, ``encode_pairs`` and the vocabulary may be used from any thread. Knows nothing of processes or HTTP.

What a CPU computes for a text should not depend on its neighbours in a step. With llama.cpp's flash attention it does
not as long as the step has less than 64 tokens: from there on attention goes over tiles of tokens, and where a text
lies in them changes its vector (measured: by 3e-3 in a component with 8-bit weights, by 3e-8 in smaller steps). So
short texts share steps of at most 63 tokens, which takes no longer (256 short texts of MiniLM: 618 ms, and 605 in steps
of 256 tokens), and a longer text has a step for itself, unless it can be divided. Without flash attention it always
matters where a text lies, so each has a step for itself. GPUs need larger steps to be fast: there a step has as many
tokens as the settings say.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from llamaserve.engine.events import Embedded, EngineEvent, Failed, Occupancy
from llamaserve.engine.llama import Batch, Context, Interrupted, Model, close_all, uses_gpu
from llamaserve.engine.packing import Packer, Part
from llamaserve.engine.pairs import PairFrame, frame_pair
from llamaserve.engine.params import UNTILED, Embedding, LoadParams
from llamaserve.engine.threads import ThreadController
from llamaserve.engine.work import MAX_TEXT, TextWork
from llamaserve.errors import (
    ContextLengthExceeded,
    EngineError,
    InvalidRequest,
    LlamaserveError,
    ModelNotCapable,
    from_value,
    to_value,
)

Vector = npt.NDArray[np.float32]

_NOT_NUMBERS = "the model computed vectors that are not numbers"


class _NotNumbers(Exception):
    """The vectors of a step are not numbers, at least one of them."""


class Encoded(msgspec.Struct, frozen=True):
    """The tokens of a text, and how many more it had before it was cut."""

    tokens: list[int]
    truncated: int = 0


class _Text:
    """A text, and what has become of it."""

    def __init__(self, encoded: Encoded) -> None:
        self.encoded = encoded
        self.sequence: int | None = None  # from its first step to its last
        self.planned = 0  # tokens
        self.vector: Vector | None = None  # of the tokens up to now

    @property
    def length(self) -> int:
        return len(self.encoded.tokens)


class _Request:
    """The texts of a request, and what their vectors shall be like; None for scores."""

    def __init__(self, texts: Sequence[Encoded], embedding: Embedding | None) -> None:
        self.texts = [_Text(text) for text in texts]
        self.embedding = embedding
        self.open = len(texts)


class Embedder(TextWork):
    """One model's requests, from submission to their event."""

    def __init__(self, model: Model, native: Context, params: LoadParams) -> None:
        super().__init__(model.vocab)
        assert params.pooling is not None
        self._native = native
        self._pooling = params.pooling
        self._width = model.width
        self._template = model.rank_template
        if self._pooling == "rank":
            frame_pair(self.vocab, self._template, "")  # refuses a template that can't be used
        self._gives_chances = model.gives_chances
        self._context = params.context
        self._batch = Batch(params.batch)
        self._divides = native.remembers and not model.looks_ahead
        self._interruptible = not (self._divides and (model.has_state or model.sliding_window))  # which are not cut
        largest = min(params.batch, params.kv_cells)
        self._longest = largest if uses_gpu(params) else min(largest, UNTILED)
        alone = params.flash_attention == "off" and not uses_gpu(params)
        self._packer = Packer(
            tokens=self._longest,
            sequences=1 if alone else params.parallel,
            cells=params.kv_cells if self._divides else None,
        )
        self._again: deque[list[Part]] = deque()  # steps that must be made once more, each of one text
        self._requests: dict[int, _Request] = {}
        self._begun: set[int] = set()  # those of which something was evaluated
        self._free = list(range(params.parallel))  # sequences
        self._evaluating: frozenset[int] = frozenset()  # the requests of the step under way
        self._reported = Occupancy()

    def tokenize(self, text: str, *, add_bos: bool, parse_special: bool) -> list[int]:
        """See ``Work``. With ``add_bos`` all tokens that the model wants around a text are there, as they are when it
        is embedded.
        """
        tokens = super().tokenize(text, add_bos=False, parse_special=parse_special)
        before, after = self.vocab.frame
        return [*before, *tokens, *after] if add_bos else tokens

    def check(self, embedding: Embedding) -> None:
        """Refuse what can't be made of texts with this model. Thread-safe."""
        if self._pooling == "rank":
            raise ModelNotCapable("this model scores documents for a query; it makes no embeddings")
        if embedding.dimensions is not None and not 1 <= embedding.dimensions <= self._width:
            message = f"dimensions is {embedding.dimensions}; the model's vectors have {self._width}"
            raise InvalidRequest(message, param="dimensions")

    def encode(self, text: str | Sequence[int], place: str, embedding: Embedding) -> Encoded:
        """Return the tokens of a text with those that the model wants around it, or token ids as they are. Raises why
        they can't be embedded; ``place`` is the request field with them. Thread-safe.
        """
        before: list[int] = []
        after: list[int] = []
        if isinstance(text, str):
            before, after = self.vocab.frame
            tokens = self._tokens(text, place, cut=embedding.truncate != "none")
        else:
            tokens = list(text)
            self.vocab.check(tokens, place)
        if not before + tokens + after:
            raise InvalidRequest(f"{place} has no tokens; there is nothing to embed", param=place)
        return self._framed(before, tokens, after, place, embedding.truncate)

    def encode_pairs(self, query: str, documents: Sequence[str], *, truncate: bool) -> Iterator[Encoded]:
        """Return the tokens of a query with each document, encoded as they are taken. Raises why they can't be scored.
        Thread-safe.
        """
        if self._pooling != "rank":
            raise ModelNotCapable("this model makes embeddings; it does not score documents for a query")
        with _named("query"):
            size = self.size_if_over(query, self._context)
            if size is not None:
                raise self._too_long(size, "query")
            frame = frame_pair(self.vocab, self._template, query)
        if len(frame.before) + len(frame.after) >= self._context:
            raise self._too_long(f"{len(frame.before) + len(frame.after)} tokens and leaves no room", "query")
        return (
            self._encode_pair(frame, document, f"documents[{number}]", truncate=truncate)
            for number, document in enumerate(documents)
        )

    def _encode_pair(self, frame: PairFrame, document: str, place: str, *, truncate: bool) -> Encoded:
        tokens = self._tokens(frame.lead + document + frame.trail, place, cut=truncate)
        return self._framed(frame.before, tokens, frame.after, place, "end" if truncate else "none")

    def _tokens(self, text: str, place: str, *, cut: bool) -> list[int]:
        """Return a text's tokens; of one that is certainly too long not all are looked at, except to cut it. Names of
        control tokens are text: it comes from anybody.
        """
        with _named(place):
            size = self.size_if_over(text, self._context) if len(text) > MAX_TEXT or not cut else None
            if size is not None:
                raise self._too_long(size, place)
            return self.vocab.tokenize(text, add_bos=False, parse_special=False)

    def _framed(self, before: list[int], tokens: list[int], after: list[int], place: str, truncate: str) -> Encoded:
        size = len(before) + len(tokens) + len(after)
        excess = max(0, size - self._context)
        if excess and (truncate == "none" or excess > len(tokens)):
            raise self._too_long(f"{size} tokens", place)
        kept = tokens[excess:] if truncate == "start" else tokens[: len(tokens) - excess]
        return Encoded([*before, *kept, *after], excess)

    def _too_long(self, size: str, place: str) -> ContextLengthExceeded:
        return ContextLengthExceeded(
            f"{place} has {size}; this model takes {self._context} at most. Shorten it, or ask for it to be cut "
            "(`truncate`). If the model was trained for longer texts, raise its `context` and `batch` in models.yaml",
            param=place,
        )

    def submit(self, request: int, texts: Sequence[Encoded], embedding: Embedding | None, share: str = "") -> None:
        """Queue encoded texts; without an ``embedding`` they are pairs to be scored. Requests that count for another
        ``share`` of the model's time take turns with them.
        """
        if not texts:
            raise InvalidRequest("there are no texts", param="documents" if embedding is None else "input")
        self._requests[request] = _Request(texts, embedding)
        self._packer.add(request, [len(text.tokens) for text in texts], share)

    def cancel(self, request: int) -> None:
        """Drop a request that nobody waits for; nothing more is reported of it."""
        self._packer.remove(request)
        self._again = deque(parts for parts in self._again if parts[0].request != request)
        self._begun.discard(request)
        dropped = self._requests.pop(request, None)
        for text in dropped.texts if dropped else ():
            self._release(text)

    def interrupt(self, request: int | None) -> None:
        """Give up a long step under way that is for this request alone, so that a ``cancel`` that follows need not wait
        for it; not one for any request, since a part of their answers is worth nothing. From any thread.
        """
        if self._evaluating == {request}:
            self._native.interrupt()

    @property
    def idle(self) -> bool:
        """Whether ``step`` has nothing to do."""
        return self._packer.idle and not self._again

    def occupancy(self) -> Occupancy | None:
        """Return how many requests are begun and how many wait when that has changed since the last call."""
        now = Occupancy(len(self._begun), len(self._requests) - len(self._begun))
        if now == self._reported:
            return None
        self._reported = now
        return now

    def step(self) -> list[EngineEvent]:
        """Evaluate some of the texts, and report the requests that are complete."""
        parts = self._again.popleft() if self._again else self._packer.plan()
        requests = list(dict.fromkeys(part.request for part in parts))
        self._begun.update(requests)
        self._evaluating = frozenset(requests)
        try:
            self._evaluate(parts)
        except Interrupted:  # for a request that was complete by then, or is cancelled next
            self._again.appendleft(parts)
            return []
        except _NotNumbers:
            return self._find_culprit(parts)
        except LlamaserveError as error:
            return self._fail(requests, error)
        finally:
            self._evaluating = frozenset()
        return [event for request in requests if (event := self._finish(request)) is not None]

    def _evaluate(self, parts: list[Part]) -> None:
        batch = self._batch
        batch.clear()
        for part in parts:
            text = self._text(part)
            if text.sequence is None:
                text.sequence = self._free.pop()
            text.planned = max(text.planned, part.end)
            tokens = text.encoded.tokens[part.start : part.end]
            batch.add(tokens, part.start, text.sequence, logits=len(tokens))
        interruptible = self._interruptible and len(self._evaluating) == 1 and batch.size > UNTILED
        try:
            self._native.evaluate(batch, interruptible=interruptible)
        except Interrupted:
            for part in parts:
                self._rewind(part)
            raise
        vectors = [self._pooled(part) for part in parts]
        if not all(np.isfinite(vector).all() for vector in vectors):
            raise _NotNumbers
        for part, vector in zip(parts, vectors, strict=True):
            text = self._text(part)
            self._take(text, part, vector)
            if part.end == text.length:
                self._requests[part.request].open -= 1
                self._release(text)

    def _pooled(self, part: Part) -> Vector:
        sequence = self._text(part).sequence
        assert sequence is not None
        return self._native.pooled(sequence)

    def _rewind(self, part: Part) -> None:
        """Forget what a step that was given up has left of a text."""
        text = self._text(part)
        assert text.sequence is not None
        self._native.truncate(text.sequence, part.start)

    def _find_culprit(self, parts: list[Part]) -> list[EngineEvent]:
        """Fail the request whose vector is not one of numbers, once it is known which one it is. It spoils those of
        others in the step, and what is later evaluated over the same cells. So nothing that the cells hold is kept, and
        each text that is begun is evaluated anew, in steps for itself.
        """
        events = self._fail([parts[0].request], EngineError(_NOT_NUMBERS)) if len(parts) == 1 else []
        self._native.clear()
        self._again.clear()
        for number, request in self._requests.items():
            for place, text in enumerate(request.texts):
                if text.sequence is not None:
                    text.vector = None
                    self._again += self._steps_of(number, place, text.planned)
        return events

    def _steps_of(self, request: int, text: int, planned: int) -> list[list[Part]]:
        """Return the first tokens of a text, divided as the packer has done it, each part in a step for itself."""
        step = self._longest if self._divides else planned
        return [[Part(request, text, start, min(planned, start + step))] for start in range(0, planned, step)]

    def _text(self, part: Part) -> _Text:
        return self._requests[part.request].texts[part.text]

    def _take(self, text: _Text, part: Part, vector: Vector) -> None:
        """Put the vector of a part together with those of the parts before, in which llama.cpp did not look ahead."""
        if text.vector is None or self._pooling in ("last", "rank"):
            text.vector = vector
        elif self._pooling == "mean":
            text.vector += (vector - text.vector) * np.float32((part.end - part.start) / part.end)

    def _release(self, text: _Text) -> None:
        """Forget what was evaluated of a text, which needs none of it any more."""
        if text.sequence is not None:
            self._native.truncate(text.sequence, 0)
            self._free.append(text.sequence)
            text.sequence = None

    def _finish(self, number: int) -> EngineEvent | None:
        """Return the event of a request if it is complete."""
        request = self._requests[number]
        if request.open:
            return None
        del self._requests[number]
        self._begun.discard(number)
        vectors = np.stack([text.vector for text in request.texts if text.vector is not None])
        if request.embedding is None:
            vectors = _logits(vectors[:, :1]) if self._gives_chances else vectors[:, :1]
        else:
            vectors = _unit(vectors[:, : request.embedding.dimensions])
        if not np.isfinite(vectors).all():
            return Failed(number, to_value(EngineError(_NOT_NUMBERS)))
        tokens = [text.length for text in request.texts]
        truncated = [text.encoded.truncated for text in request.texts]
        return Embedded(number, vectors.shape[1], vectors.astype("<f4").tobytes(), tokens, truncated)

    def _fail(self, requests: Sequence[int], error: LlamaserveError) -> list[EngineEvent]:
        for request in requests:
            self.cancel(request)
        return [Failed(request, to_value(error)) for request in requests]


@contextlib.contextmanager
def _named(place: str) -> Iterator[None]:
    """Say of what is wrong with a text in which field of the request it is."""
    try:
        yield
    except InvalidRequest as error:
        error.param = place
        raise


def _logits(chances: Vector) -> Vector:
    """Return the logits of probabilities."""
    exact = np.clip(chances.astype(np.float64), 1e-12, 1 - 1e-12)
    return np.log(exact / (1 - exact)).astype(np.float32)


def _unit(vectors: Vector) -> Vector:
    """Return the vectors with a length of 1; one without a direction becomes no numbers."""
    exact = vectors.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    return exact.astype(np.float32)


class LoadedEmbedder(Embedder):
    """An embedder that owns its llama.cpp model and context."""

    def __init__(self, params: LoadParams, on_progress: Callable[[float], bool]) -> None:
        """Load the weights; ``on_progress`` gets fractions from 0 to 1 and says whether to go on. Raises
        ``ModelLoadFailed``.
        """
        self._model = Model(params, on_progress)
        self._context_owned: Context | None = None
        try:
            self._context_owned = Context(self._model, params)
            super().__init__(self._model, self._context_owned, params)
            self._warm_up()
        except LlamaserveError:
            self.close()
            raise
        self._threads = ThreadController(params.threads) if params.adaptive_threads else None

    def submit(self, request: int, texts: Sequence[Encoded], embedding: Embedding | None, share: str = "") -> None:
        """See ``Embedder``."""
        idle = self.idle
        super().submit(request, texts, embedding, share)
        if idle and self._threads is not None:
            self._threads.resume()

    def step(self) -> list[EngineEvent]:
        """See ``Embedder``."""
        events = super().step()
        if self._threads is None:
            return events
        if self.idle:
            self._threads.pause()
        elif (threads := self._threads.update()) is not None:
            self._native.set_threads(threads)
        return events

    def close(self) -> None:
        """Free the context and the weights."""
        close_all(self._context_owned, self._model)

    def _warm_up(self) -> None:
        """Evaluate two tokens, so that the first request does not pay for reading the weights and building the graph.
        Raises ``EngineError`` when the model computes no numbers.
        """
        token = max(0, self.vocab.bos)
        super().submit(0, [Encoded([token, token])], None)
        for event in super().step():
            if isinstance(event, Failed):
                raise from_value(event.error)
