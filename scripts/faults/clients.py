"""Clients that mean well: whole and streamed answers, by httpx and by the openai SDK, read at once or slowly, and given
up at any moment. Those that read slowly have room for little on their side, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai

from faults.answers import Answer, Failure, StreamReader, read_body
from faults.journal import Entry, Journal
from faults.questions import Question
from faults.server import NO_TLS, Server

HANG = 150.0  # seconds after which a request is called lost; the machine may be busy, and a child may stand still
_KEPT_ALIVE = 2.0  # seconds: less than the server's five, or a request may meet a connection that it just closes
_SLOW = 0.02  # seconds between two lines for a client that reads slowly
_LONG = 0.5  # share of long answers among those that are read slowly
_PATIENCE = 1.5  # seconds that a client waits at most which hangs up
_DOWN_PAUSE = 0.3  # seconds between two attempts to reach a server that is not there
_READS = (("GET", "/v1/models"), ("GET", "/v1/billing/usage?group_by=day,key"), ("GET", "/metrics"), ("GET", "/health"))
_NARROW = (socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # bytes that the kernel takes for a client that does not read
_LIMITS = httpx.Limits(keepalive_expiry=_KEPT_ALIVE)
_MANNERS = ("plain", "plain", "plain", "sdk", "slow", "leaving", "reading")


@dataclass
class Crowd:
    """All clients of a run. ``stop`` has them finish what they do."""

    server: Server
    journal: Journal
    asked: Sequence[Question]
    random: random.Random
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def client(self) -> None:
        """Ask one question after another until told to stop."""
        narrow = httpx.AsyncHTTPTransport(verify=NO_TLS, limits=_LIMITS, socket_options=[_NARROW])
        async with self._http(limits=_LIMITS) as http, self._http(transport=narrow) as slow:
            while not self.stop.is_set():
                manner = self.random.choice(_MANNERS)
                if manner == "reading":
                    await self._read(http)
                    continue
                entry = self._begin(manner)
                await self._watched(entry, self._way(manner)(slow if manner == "slow" else http, entry))
                if entry.answer is not None and entry.answer.broken is not None:
                    await asyncio.sleep(_DOWN_PAUSE)

    def _http(self, **options: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.server.url, timeout=None, verify=NO_TLS, **options)  # noqa: S113

    def any_question(self, *, streams: bool = False) -> Question:
        """Return a question at random; some are asked more often than others."""
        among = [each for each in self.asked if each.can_stream or not streams]
        return self.random.choices(among, [each.often for each in among])[0]

    def _begin(self, manner: str) -> Entry:
        if manner == "slow" and self.random.random() < _LONG:
            question = self.random.choice([each for each in self.asked if each.is_long])
        else:
            question = self.any_question(streams=manner in ("sdk", "slow"))
        if question.can_stream and (manner == "slow" or self.random.random() < 0.6):
            question = question.as_stream
        return self.journal.begin(question, self.random.choice(("ann", "bob")))

    def _way(self, manner: str) -> Callable[[httpx.AsyncClient, Entry], Awaitable[Answer]]:
        return {"sdk": self._by_sdk, "slow": self._slowly, "leaving": self._leaving}.get(manner, self._plainly)

    async def _watched(self, entry: Entry, work: Awaitable[Answer]) -> None:
        try:
            async with asyncio.timeout(HANG):
                answer = await work
        except TimeoutError:
            answer = Answer(late=True)
        self.journal.end(entry, answer)

    async def ask(self, question: Question, key: str = "ann") -> Answer:
        """Ask a question on a connection of its own, and have the answer judged."""
        entry = self.journal.begin(question, key)
        async with self._http() as http:
            await self._watched(entry, self._plainly(http, entry))
        assert entry.answer is not None
        return entry.answer

    async def references(self) -> dict[str, Answer]:
        """Return the answers of a server that has nothing else to do. Raises ``RuntimeError`` if there is none."""
        found = {}
        for question in self.asked:
            found[question.name] = answer = await self.ask(question)
            if not answer.answered:
                raise RuntimeError(f"there is no reference for {question.name}: {answer}")
        return found

    async def post(self, entry: Entry, body: bytes) -> None:
        """Send a body that is no question of ours, and have what comes of it judged."""
        async with self._http() as http:
            await self._watched(entry, self._plainly(http, entry, content=body))

    async def _plainly(self, http: httpx.AsyncClient, entry: Entry, pause: float = 0.0, **body: Any) -> Answer:
        """Ask, with another body than the question's if one is given."""
        answer = Answer()
        try:
            request = http.build_request(
                "POST", entry.question.path, **(body or _body(entry.question)), headers=self._headers(entry)
            )
            response = await http.send(request, stream=True)
            answer.status = response.status_code
            async with contextlib.aclosing(response):
                if response.status_code != 200 or not entry.question.streamed:
                    return read_body(entry.question, response.status_code, await response.aread())
                reader = StreamReader(answer)
                async for line in response.aiter_lines():
                    reader.line(line)
                    if pause:
                        await asyncio.sleep(pause)
        except (httpx.TransportError, httpx.StreamError) as error:
            answer.broken = f"{type(error).__name__}: {error}"
        return answer

    async def _slowly(self, http: httpx.AsyncClient, entry: Entry) -> Answer:
        return await self._plainly(http, entry, pause=_SLOW)

    async def _leaving(self, http: httpx.AsyncClient, entry: Entry) -> Answer:
        """Hang up at some moment, if the answer is not there before."""
        task = asyncio.ensure_future(self._plainly(http, entry))
        done, _ = await asyncio.wait({task}, timeout=self.random.random() ** 2 * _PATIENCE)
        if done:
            return task.result()
        entry.left = True
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return Answer()

    async def _by_sdk(self, http: httpx.AsyncClient, entry: Entry) -> Answer:
        secret = self.server.secrets[entry.key or ""]
        client = openai.AsyncOpenAI(
            base_url=f"{self.server.url}/v1", api_key=secret, max_retries=0, http_client=http, timeout=None
        )
        chat = entry.question.kind == "chat"
        create: Any = client.chat.completions.create if chat else client.completions.create
        answer = Answer()
        try:
            found = await create(**entry.question.body, extra_headers={"x-request-id": entry.id})
            answer.status = 200
            if not entry.question.streamed:
                return read_body(entry.question, 200, found.model_dump_json().encode())
            reader = StreamReader(answer)
            async for chunk in found:
                reader.chunk(chunk.model_dump())
            answer.complete = True  # the SDK doesn't tell whether it has seen the end of the stream
        except openai.APIStatusError as error:
            return read_body(entry.question, error.status_code, error.response.content)
        except openai.APIConnectionError as error:
            answer.broken = f"{type(error).__name__}: {error.__cause__!r}"
        except openai.APIError as error:  # an event of the stream
            answer.failure = Failure(200, error.code, error.message)
            answer.complete = True
        except httpx.TransportError as error:
            answer.broken = f"{type(error).__name__}: {error}"
        return answer

    async def _read(self, http: httpx.AsyncClient) -> None:
        """Ask for something that is no work for a model; it is there whatever the models do."""
        method, path = self.random.choice(_READS)
        began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(HANG):
                response = await http.request(method, path, headers=self._credentials("ann"))
            status, text = response.status_code, response.text
        except TimeoutError:
            status, text = 0, "no answer within the limit"
        except httpx.TransportError as error:
            status, text = 0, f"{type(error).__name__}: {error}"
        now = asyncio.get_running_loop().time()
        excuses = self.journal.calendar.excuses(began, now)
        known = "ledger_unavailable" in text and "ledger_unavailable" in excuses.codes
        self.journal.outcomes["read"] += status == 200
        if status != 200 and not known and not (status in (0, 503) and excuses.away):
            self.journal.violate("reads", f"{path} was answered with {status}", text[:300])
        if status != 200:
            await asyncio.sleep(_DOWN_PAUSE)

    def _credentials(self, key: str | None) -> dict[str, str]:
        return {"authorization": f"Bearer {self.server.secrets[key]}"} if key is not None else {}

    def _headers(self, entry: Entry) -> dict[str, str]:
        return {**self._credentials(entry.key), "x-request-id": entry.id}


def _body(question: Question) -> dict[str, Any]:
    """Return what httpx is to send."""
    if question.upload is None:
        return {"json": dict(question.body)}
    return {"data": dict(question.body), "files": {"file": ("speech.wav", question.upload)}}
