"""Where the measuring happens: the contenders that a workload asks for, started once, and what all workloads share.

Knows how to come by contenders and texts; nothing of what is measured.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from benchmark import contenders
from benchmark.answers import Answer, Request
from benchmark.client import Unreachable
from benchmark.contenders import BareLoop, Contender, HttpServer
from benchmark.processes import StartFailed
from benchmark.results import Results

T = TypeVar("T")

OURS = "llamaserve"
PLAIN = "llamaserve, speculation off"
BARE = "bare loop"
PEER = "llama_cpp.server"
QUEUEING = "llama_cpp.server, one by one"
PLAIN_SETTINGS = {"speculation": False}


@dataclass(frozen=True)
class Plan:
    """What the command line asks for. ``file`` and ``options`` are the model's; None with the ``url`` of a server. The
    ``embedding_model``, the ``speech_model`` and the ``image_model`` (None: one of random weights) are only looked for
    when they are needed.
    """

    rounds: int
    tokens: int
    model: str | None
    file: Path | None
    options: Mapping[str, Any]
    url: str | None
    peers: Mapping[str, str]
    embedding_model: str
    speech_model: str
    image_model: str | None
    cache: Path
    say: Callable[[str], None]


class NotPossible(Exception):
    """A workload needs what this run does not have; the text says what."""


@dataclass
class Lab:
    """The contenders of a run."""

    plan: Plan
    results: Results
    _stack: ExitStack
    _there: dict[str, Any] = field(default_factory=dict)

    def settings(self, **changes: Any) -> dict[str, Any]:
        """Return the model's entry of models.yaml with other settings. Raises ``NotPossible`` for unknown ones."""
        if self.plan.file is None:
            raise NotPossible("needs settings of its own, and the server is given by --url")
        unknown = changes.keys() - contenders.known_settings()
        if unknown:
            raise NotPossible(f"models.yaml has no setting {', '.join(sorted(unknown))}")
        return {**self.plan.options, "source": f"file:{self.plan.file}", **changes}

    @property
    def model(self) -> str:
        """The name that the model is served under."""
        return self.plan.model or "model"

    def server(self, name: str, **changes: Any) -> AbstractContextManager[HttpServer]:
        """Return a new server with other settings, which lives as long as its block."""
        return contenders.llamaserve(name, self.model, self.settings(**changes))

    def ours(self) -> HttpServer:
        """Return the server as it comes, or the one at the given URL."""
        url = self.plan.url
        if url is not None:
            return self._kept(OURS, lambda: contextlib.nullcontext(HttpServer(OURS, url, self.plan.model)))
        return self._kept(OURS, lambda: self.server(OURS))

    def plain(self) -> HttpServer:
        """Return the server without speculation, to be compared with a loop that has none."""
        return self._kept(PLAIN, lambda: self.server(PLAIN, **PLAIN_SETTINGS))

    def bare(self) -> BareLoop:
        """Return the bare loop, with the settings of the server as it comes."""
        return self._kept(BARE, lambda: loaded_bare_loop(self.load_params()))

    def load_params(self, **changes: Any) -> dict[str, Any]:
        """Return what the worker of a server with these settings is told."""
        return contenders.load_params(self.model, self.settings(**changes))

    def peers(self, *, queueing: bool = False) -> list[HttpServer]:
        """Return the other servers: those of the command line, and llama-cpp-python's, with ``queueing`` also in the
        mode in which a new request waits instead of ending the one under way.
        """
        wanted = [functools.partial(self._given, name, url) for name, url in self.plan.peers.items()]
        found = self.present(*wanted)
        if self.plan.file is not None:
            found += self.present(self._peer, *([self._queueing_peer] if queueing else []))
        return found

    def _peer(self) -> HttpServer:
        return self._kept(PEER, lambda: contenders.llama_cpp_server(PEER, self.load_params()))

    def _queueing_peer(self) -> HttpServer:
        options = ("--interrupt_requests", "false")
        return self._kept(QUEUEING, lambda: contenders.llama_cpp_server(QUEUEING, self.load_params(), *options))

    def _given(self, name: str, url: str) -> HttpServer:
        def reach() -> AbstractContextManager[HttpServer]:
            try:
                models = HttpServer(name, url, None).client.get(urlsplit(url).path.rstrip("/") + "/models")["data"]
                return contextlib.nullcontext(HttpServer(name, url, models[0]["id"]))
            except (Unreachable, KeyError, IndexError, TypeError) as error:
                raise StartFailed(f"{url} does not answer as an OpenAI server: {error}") from error

        return self._kept(name, reach)

    def present(self, *wanted: Callable[[], T]) -> list[T]:
        """Return those contenders that can be had; why another can't is remembered."""
        found: list[T] = []
        for get in wanted:
            with contextlib.suppress(StartFailed, NotPossible):
                found.append(get())
        return found

    def _kept(self, name: str, start: Callable[[], AbstractContextManager[T]]) -> T:
        if name in self.results.missing:
            raise StartFailed(self.results.missing[name])
        if name not in self._there:
            try:
                self._there[name] = self._stack.enter_context(start())
            except (StartFailed, NotPossible) as error:
                self.results.missing[name] = str(error)
                self.plan.say(f"{name}: {error}")
                raise
        there: T = self._there[name]
        return there

    def ask(
        self, workload: str, contender: Contender, requests: Sequence[Request], limit: float = contenders.LIMIT
    ) -> list[Answer]:
        """Return a contender's answers. Raises ``NotPossible`` when it refuses or fails."""
        try:
            answers = contender.ask(requests, limit)
        except (Unreachable, StartFailed) as error:
            raise self._failed(workload, contender, str(error)) from error
        for answer in answers:
            if answer.error is not None:
                raise self._failed(workload, contender, answer.error)
            if isinstance(contender, HttpServer):
                self.complete(answer)
        return answers

    def complete(self, answer: Answer) -> None:
        """Count the tokens of an answer whose server has not, piece by piece: it was cut off, or the server never does.

        A piece by its length would not do, since the same number of characters is more tokens in some places.
        """
        if answer.counted or len(answer.texts) != 1:
            return
        ends = [*accumulate(answer.sizes)]
        pieces = (answer.text[end - size : end] for size, end in zip(answer.sizes, ends, strict=True))
        begin = self.count("")
        answer.sizes = [max(1, self.count(piece) - begin) for piece in pieces]
        answer.tokens, answer.counted = sum(answer.sizes), True

    def _failed(self, workload: str, contender: Contender, why: str) -> NotPossible:
        self.results.missing[f"{workload}/{contender.name}"] = why
        self.plan.say(f"{workload}, {contender.name}: {why}")
        if isinstance(contender, HttpServer) and "status 4" not in why:
            self.plan.say(f"    its last words: {contender.last_words}")
        return NotPossible(f"{contender.name}: {why}")

    def end_all(self) -> None:
        """End every contender that was kept."""
        self._there.clear()
        self._stack.close()

    def ends(self) -> tuple[int, ...]:
        """Return the tokens that end an answer, to ban them where its length has to be sure; none if unknown."""
        try:
            return self.bare().ends
        except (NotPossible, StartFailed):
            return ()

    def count(self, text: str) -> int:
        """Return the tokens of a text: counted by the bare loop, else by the server, else four characters each."""
        try:
            return self.bare().count(text)
        except (NotPossible, StartFailed):
            pass
        try:
            return int(self.ours().client.post("/v1/internal/token-count", {"text": text})["length"])
        except (Unreachable, KeyError, TypeError):
            return len(text) // 4

    def rounds(self, contenders: Sequence[T]) -> Iterator[tuple[int, list[T]]]:
        """Yield each round's number with the contenders in its order: everybody is first as often as the others."""
        for number in range(self.plan.rounds):
            turn = number % max(1, len(contenders))
            yield number, [*contenders[turn:], *contenders[:turn]]


@contextlib.contextmanager
def open_lab(plan: Plan, results: Results) -> Iterator[Lab]:
    """Provide a lab, all of whose processes have ended afterwards."""
    with ExitStack() as stack:
        yield Lab(plan, results, stack)


@contextlib.contextmanager
def loaded_bare_loop(settings: Mapping[str, Any]) -> Iterator[BareLoop]:
    """Run the bare loop with a model loaded as in a server's ``LoadParams``."""
    with contenders.bare_loop() as loop:
        loop.load(settings)
        yield loop
