"""What a request may use, what it has used, and how it ended: it is let in by the limits of its key, and has its row in
the ledger, its metrics and its span, before its client has the whole answer.

Endpoints whose work counts depend on ``metered``, and say with ``used`` what they have used. Knows no endpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from contextvars import ContextVar
from typing import Any, Final

from fastapi import Request
from prometheus_client import Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamaserve.api.caller import EVERYBODY, Caller, caller
from llamaserve.api.metrics import Metrics
from llamaserve.api.tracing import Tracing
from llamaserve.errors import RateLimitExceeded
from llamaserve.keys.allowance import Allowance, Allowances, Bucket
from llamaserve.usage.ledger import Ledger
from llamaserve.usage.record import Outcome, UsageRecord

prompts = logging.getLogger("llamaserve.prompts")

RATE_LIMIT_HEADERS: Final = {
    f"x-ratelimit-{part}-{of}": f"{words} {of}, where the key has a limit of them."
    for part, words in {
        "limit": "How many can be left at most:",
        "remaining": "How many are left:",
        "reset": "The time until all are left again, such as 6m0s:",
    }.items()
    for of in ("requests", "tokens")
}

_CANCELLED: Final = 499
_current: ContextVar[Account] = ContextVar("account")


class Books:
    """Where requests are entered that are over: the metrics, and the ledger if there is one. What they say is logged
    only if somebody wants that.
    """

    def __init__(self, metrics: Metrics, ledger: Ledger | None, tracing: Tracing | None, *, log_prompts: bool) -> None:
        self.metrics = metrics
        self._tracing = tracing
        self.ledger = ledger
        self.log_prompts = log_prompts
        self.open = 0  # requests that are not over
        self.balanced = asyncio.Event()  # whether there are none
        self.balanced.set()

    def opened(self, requests: int) -> None:
        """Take note that so many more are not over."""
        self.open += requests
        self.metrics.open.inc(requests)
        if self.open:
            self.balanced.clear()
        else:
            self.balanced.set()

    async def enter(self, record: UsageRecord, traceparent: str | None, *, recorded: bool) -> None:
        """Return once the row is written, if it shall be. ``traceparent`` is the trace that the client began."""
        self.metrics.request(record)
        if self._tracing is not None:
            self._tracing.request(record, traceparent)
        if self.ledger is not None and recorded:
            await self.ledger.record(record)


class Account:
    """One request's account."""

    def __init__(
        self,
        asking: Caller = EVERYBODY,
        path: str = "",
        request_id: str = "",
        allowance: Allowance | None = None,
        books: Books | None = None,
    ) -> None:
        self.allowance = allowance
        self.model: str | None = None
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.audio_seconds = 0.0
        self.images = 0
        self.streamed = False
        self.traceparent: str | None = None
        self.waits = False  # for its turn, since others of its key are worked on
        self.status = 0
        self._caller = asking
        self._books = books
        self._path = path
        self._request_id = request_id
        self._at, self._began = time.time(), time.monotonic()
        self._first_token: float | None = None
        self._last_token = self._began
        self._gaps: Histogram | None = None
        self._recorded = True
        self._counts = self._entered = self._has_turn = self._settled = False

    @property
    def owner(self) -> str:
        """The name of its key; empty without one."""
        return self._caller.name or ""

    @property
    def logs_prompt(self) -> bool:
        """Whether what it says shall be in the log."""
        return self._books is not None and self._books.log_prompts

    def enter(self) -> None:
        """Let it in. Raises ``RateLimitExceeded``."""
        self._counts = True
        if self._books is not None:
            self._books.opened(1)
        if self.allowance is not None:
            try:
                self.allowance.enter()
            except RateLimitExceeded:
                self._recorded = self.allowance.records_refusal()
                raise
            self._entered = True

    async def turn(self, model: str) -> None:
        """Wait until a model may work on it, which it may until it is over. Further calls do nothing else."""
        self.model = model
        if self.allowance is None or self._has_turn:
            return
        self.waits = True
        try:
            with contextlib.nullcontext() if self._books is None else self._books.metrics.waiting.track_inprogress():
                await self.allowance.turn()
        finally:
            self.waits = False
        self._has_turn = True

    def progressed(self, tokens: int = 0) -> None:
        """Take note that a piece of a streamed answer is there, of so many tokens."""
        now = time.monotonic()
        if self._first_token is None:
            self._first_token = now - self._began
            if self._books is not None:
                self._gaps = self._books.metrics.inter_token.labels(self.model)
        elif tokens and self._gaps is not None:
            self._gaps.observe((now - self._last_token) / tokens)
        self._last_token = now

    def used(
        self, *, prompt: int = 0, cached: int = 0, completion: int = 0, audio: float = 0.0, images: int = 0
    ) -> None:
        """Take note that so much more has been used: tokens of prompts, of which some were cached, and of answers,
        seconds of audio, and images.
        """
        self.prompt_tokens += prompt
        self.cached_tokens += cached
        self.completion_tokens += completion
        self.audio_seconds += audio
        self.images += images

    async def settle(self, outcome: Outcome | None = None) -> None:
        """Write the row, which says what was used until now; further calls do nothing. Answers that a client gets piece
        by piece have this done before the last one; else the ``outcome`` is what the status says.
        """
        if self._settled or not self._counts:
            return
        self._settled = True
        if self.allowance is not None:
            self.allowance.spend(self.prompt_tokens + self.completion_tokens)
        if self._books is not None:
            record = self._record(outcome or _outcome_of(self.status))
            await self._books.enter(record, self.traceparent, recorded=self._recorded)

    def close(self) -> None:
        """Let others of its key have its place."""
        if self._counts and self._books is not None:
            self._books.opened(-1)
        if self.allowance is not None and self._has_turn:
            self.allowance.end_turn()
        if self.allowance is not None and self._entered:
            self.allowance.leave()
        self._has_turn = self._entered = False

    @property
    def facts(self) -> dict[str, Any]:
        """What the log says of it."""
        found: dict[str, Any] = {"key": self._caller.name, "model": self.model}
        found |= {"prompt_tokens": self.prompt_tokens or None, "completion_tokens": self.completion_tokens or None}
        return found | {"streamed": self.streamed or None}

    def _record(self, outcome: Outcome) -> UsageRecord:
        return UsageRecord(
            request_id=self._request_id,
            at=self._at,
            key=self._caller.name,
            endpoint=self._path,
            model=self.model,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            completion_tokens=self.completion_tokens,
            audio_seconds=self.audio_seconds,
            images=self.images,
            first_token=self._first_token,
            seconds=time.monotonic() - self._began,
            streamed=self.streamed,
            status=self.status,
            outcome=outcome,
        )


def _outcome_of(status: int) -> Outcome:
    if status < 400:
        return "answered"
    if status == _CANCELLED:
        return "cancelled"
    return "refused" if status < 500 else "failed"


def account() -> Account:
    """Return the account of the request that is being answered; where none is, one that nobody looks at."""
    return _current.get(None) or Account()


async def metered(request: Request) -> None:
    """Have a request count, and let it in by the limits of its key. Routes whose work counts depend on this."""
    opened = account()
    opened.enter()
    if opened.logs_prompt and not request.headers.get("content-type", "").lower().startswith("multipart/"):
        prompts.info("%s", json.dumps((await request.body()).decode("utf-8", "backslashreplace")))


class Accounting:
    """Opens an account for each request, and closes it."""

    def __init__(self, app: ASGIApp, allowances: Allowances, books: Books) -> None:
        self._app = app
        self._allowances = allowances
        self._books = books

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asking = caller()
        allowance = None if asking.key is None else self._allowances.of(asking.key)
        path, request_id = scope["path"].rstrip("/"), scope["state"]["request_id"]
        opened = Account(asking, path, request_id, allowance, self._books)
        opened.traceparent = Headers(scope=scope).get("traceparent")
        _current.set(opened)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                opened.status = message["status"]
                if not opened.streamed:
                    await opened.settle()
                if allowance is not None:
                    MutableHeaders(raw=message["headers"]).update(_headers(allowance))
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except Exception:  # an answer that has begun can't be taken back
            await opened.settle("failed")
            raise
        finally:
            opened.close()
            scope["state"]["facts"].update(opened.facts)
            await opened.settle("cancelled")


def _headers(allowance: Allowance) -> dict[str, str]:
    """Return OpenAI's headers for what is left of the limits."""
    headers: dict[str, str] = {}
    for name, bucket in (("requests", allowance.requests), ("tokens", allowance.tokens)):
        if bucket is not None:
            headers |= _headers_of(name, bucket)
    return headers


def _headers_of(name: str, bucket: Bucket) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{name}": str(bucket.size),
        f"x-ratelimit-remaining-{name}": str(max(0, math.floor(bucket.level))),
        f"x-ratelimit-reset-{name}": duration(bucket.seconds_until(bucket.size)),
    }


def duration(seconds: float) -> str:
    """Return a time as OpenAI's headers have it: ``0s``, ``20ms``, ``6m0s``, ``1h0m30s``."""
    milliseconds, whole = math.ceil(seconds * 1000), math.ceil(seconds)
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    hours, minutes = whole // 3600, whole // 60 % 60
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if whole >= 60 else "") + f"{whole % 60}s"
