"""Clients that want texts embedded: each has a connection, and sends its next request when it has its answer.

One process with plain sockets stands for all of them, so that they take next to nothing of the cores under test. What
is sent is made beforehand, and what was read is parsed afterwards. Asks for base64, as OpenAI's own client does.
"""

from __future__ import annotations

import base64
import json
import selectors
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from benchmark.client import Unreachable, message_in, unpack

_READ = 256 * 1024  # bytes at once
_LIMIT = 120.0  # seconds for one read, and for all answers


@dataclass(frozen=True)
class Vectors:
    """What came back: the vectors as little-endian 32-bit floats, in the order of the texts, the tokens and seconds
    that they took, and the client's own processor time.
    """

    vectors: list[bytes]
    tokens: int
    seconds: float
    client: float = 0.0


@dataclass(eq=False)
class _Connection:
    """A client's connection, and what has come of the answer under way to the request of this number."""

    socket: socket.socket
    request: int = -1
    data: bytearray | None = None


class EmbeddingClient:
    """Clients of one server."""

    def __init__(self, url: str, model: str | None) -> None:
        """``url`` is the base URL with its path, usually ``/v1``."""
        parts = urlsplit(url.rstrip("/"))
        if parts.scheme != "http" or parts.hostname is None:
            raise Unreachable(f"{url} is no http:// address")
        self._address = (parts.hostname, parts.port or 80)
        self._path, self._netloc, self._model = f"{parts.path}/embeddings", parts.netloc, model

    def embed(self, requests: Sequence[Sequence[str]], clients: int = 1) -> Vectors:
        """Send requests with some texts each, as many at a time as there are clients. The time is that from the first
        request to the end of the last answer, with connections that are there. Raises ``Unreachable``.
        """
        messages = [self._message(texts) for texts in requests]
        with self._connections(min(clients, len(messages))) as connections:
            started, client = time.perf_counter(), time.process_time()
            try:
                answers = _exchange(connections, messages)
            except OSError as error:
                raise Unreachable(f"{self._netloc}: {error}") from error
            seconds, client = time.perf_counter() - started, time.process_time() - client
        vectors: list[bytes] = []
        tokens = 0
        for texts, answer in zip(requests, answers, strict=True):
            found, count = parse(answer)
            if len(found) != len(texts):
                raise Unreachable(f"{self._netloc} answers {len(texts)} texts with {len(found)} vectors")
            vectors += found
            tokens += count
        return Vectors(vectors, tokens, seconds, client)

    def _message(self, texts: Sequence[str]) -> bytes:
        body: dict[str, Any] = {"input": list(texts), "encoding_format": "base64"}
        if self._model is not None:
            body["model"] = self._model
        payload = json.dumps(body).encode()
        lines = [f"POST {self._path} HTTP/1.1", f"Host: {self._netloc}"]
        lines += ["Content-Type: application/json", f"Content-Length: {len(payload)}", "", ""]
        return "\r\n".join(lines).encode() + payload

    @contextmanager
    def _connections(self, count: int) -> Iterator[list[_Connection]]:
        with ExitStack() as stack:
            connections = []
            for _ in range(count):
                try:
                    opened = stack.enter_context(socket.create_connection(self._address, timeout=_LIMIT))
                except OSError as error:
                    raise Unreachable(f"{self._netloc}: {error}") from error
                opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connections.append(_Connection(opened))
            yield connections


def _exchange(connections: Sequence[_Connection], messages: Sequence[bytes]) -> list[bytes]:
    """Send all messages, each connection one at a time, and return the answers in the order of the messages."""
    answers = [b""] * len(messages)
    waiting = deque(enumerate(messages))
    open_requests = 0
    deadline = time.perf_counter() + _LIMIT
    with selectors.DefaultSelector() as selector:
        for connection in connections:
            selector.register(connection.socket, selectors.EVENT_READ, connection)
            _send_next(connection, waiting)
            open_requests += 1
        while open_requests:
            if time.perf_counter() > deadline:
                raise TimeoutError(f"{open_requests} requests have no answer after {_LIMIT:g} s")
            for key, _ in selector.select(1.0):
                connection = key.data
                if not _read(connection):
                    continue
                assert connection.data is not None
                answers[connection.request] = bytes(connection.data)
                if waiting:
                    _send_next(connection, waiting)
                else:
                    open_requests -= 1
                    selector.unregister(connection.socket)
    return answers


def _send_next(connection: _Connection, waiting: deque[tuple[int, bytes]]) -> None:
    connection.request, message = waiting.popleft()
    connection.data = bytearray()
    connection.socket.sendall(message)


def _read(connection: _Connection) -> bool:
    """Read what is there, and return whether the answer is complete."""
    assert connection.data is not None
    data = connection.socket.recv(_READ)
    if not data:
        raise ConnectionError("it closed a connection before its answer was complete")
    connection.data += data
    return is_complete(connection.data)


def is_complete(answer: bytes | bytearray) -> bool:
    """Tell whether all of an HTTP response is there."""
    head_end = answer.find(b"\r\n\r\n")
    if head_end < 0:
        return False
    for line in bytes(answer[:head_end]).lower().split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name == b"content-length":
            return len(answer) >= head_end + 4 + int(value)
    return answer.endswith(b"\r\n0\r\n\r\n")


def parse(answer: bytes) -> tuple[list[bytes], int]:
    """Return the vectors of an HTTP response, and the tokens that they took. Raises ``Unreachable`` for an error."""
    status, body, _ = unpack(answer)
    if status != 200:
        raise Unreachable(f"status {status}: {message_in(body)}")
    content = json.loads(body)
    items = sorted(content["data"], key=lambda item: int(item["index"]))
    return [base64.b64decode(item["embedding"]) for item in items], int(content["usage"]["prompt_tokens"])
