"""A client that takes next to nothing of the cores under test: sockets, one selector, and a time for each read.

What was read is parsed only after the last stream has ended. Speaks just enough HTTP/1.1 to stream from an OpenAI
server on this machine or its network.
"""

from __future__ import annotations

import json
import selectors
import socket
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any
from urllib.parse import urlsplit

from benchmark.answers import Answer, Request

_READ = 65536  # bytes at once
_BOUNDARY = "llamaserve-bench-6c1f0d9b"  # of a form's parts; no file has it
FORM = f"multipart/form-data; boundary={_BOUNDARY}"
_TICK = 0.05  # seconds between looks at a condition that no read changes


class Unreachable(Exception):
    """The server does not accept connections, or does not speak HTTP."""


@dataclass(eq=False)
class Stream:
    """One request under way: what has been read, and when."""

    socket: socket.socket
    started: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    done: bool = False

    @property
    def flowing(self) -> bool:
        """Whether the first event has come. Comments that keep a connection alive are none."""
        return any(b"data: " in data for _, data in self.pieces)

    def answer(self) -> Answer:
        """Return what has come so far."""
        return parse(self.started, self.pieces)


class Client:
    """Streams from one server."""

    def __init__(self, url: str, model: str | None) -> None:
        """``url`` is the base URL with its path, usually ``/v1``."""
        parts = urlsplit(url.rstrip("/"))
        if parts.scheme != "http" or parts.hostname is None:
            raise Unreachable(f"{url} is no http:// address")
        self._address = (parts.hostname, parts.port or 80)
        self._path, self._netloc, self._model = parts.path, parts.netloc, model
        self._selector = selectors.DefaultSelector()

    def start(self, request: Request) -> Stream:
        """Send a request; ``pump`` reads its answer."""
        return self.begin("/chat/completions" if request.messages else "/completions", request.body(self._model))

    def begin(self, path: str, body: Mapping[str, Any]) -> Stream:
        """Send a JSON body to a path below the base URL; ``pump`` reads the answer."""
        payload = json.dumps(body).encode()
        return self._send(self._head("POST", self._path + path, len(payload)) + payload)

    def upload(self, path: str, fields: Mapping[str, str], file: bytes) -> Stream:
        """Send a form with a file to a path below the base URL; ``pump`` reads the answer."""
        payload = form(fields, file)
        return self._send(self._head("POST", self._path + path, len(payload), FORM) + payload)

    def _send(self, message: bytes) -> Stream:
        started = time.perf_counter()
        stream = Stream(self._connect(message), started)
        stream.socket.setblocking(False)
        self._selector.register(stream.socket, selectors.EVENT_READ, stream)
        return stream

    def pump(self, until: Callable[[], bool], limit: float) -> None:
        """Read from all streams until the condition holds, they have all ended, or ``limit`` seconds are over."""
        deadline = time.perf_counter() + limit
        open_streams, select = self._selector.get_map(), self._selector.select
        while open_streams and not until() and time.perf_counter() < deadline:
            for key, _ in select(_TICK):
                self.read(key.data)

    def stop(self, stream: Stream) -> None:
        """Hang up; a server notices and stops generating."""
        if not stream.done:
            stream.done = True
            self._selector.unregister(stream.socket)
            stream.socket.close()

    def ask(self, requests: Sequence[Request], limit: float) -> list[Answer]:
        """Send all requests at once and return their answers; what is not there in time is cut off."""
        streams: list[Stream] = []
        try:
            streams.extend(self.start(request) for request in requests)
            self.pump(lambda: all(stream.done for stream in streams), limit)
        finally:
            for stream in streams:
                self.stop(stream)
        return [stream.answer() for stream in streams]

    def get(self, path: str) -> Any:
        """Return the JSON at a path below the host, for what is not timed."""
        return self._exchange("GET", path, b"")

    def text(self, path: str) -> str:
        """Return the text at a path below the host, for what is not timed."""
        return self._body("GET", path, b"").decode()

    def post(self, path: str, body: Any) -> Any:
        """Return the JSON that a path answers to a JSON body, for what is not timed."""
        return self._exchange("POST", path, json.dumps(body).encode())

    def _exchange(self, method: str, path: str, payload: bytes) -> Any:
        try:
            return json.loads(self._body(method, path, payload))
        except ValueError as error:
            raise Unreachable(f"{path} does not answer with JSON") from error

    def _body(self, method: str, path: str, payload: bytes) -> bytes:
        data = bytearray()
        with self._connect(self._head(method, path, len(payload)) + payload) as connection:
            try:
                while chunk := connection.recv(_READ):
                    data += chunk
            except OSError as error:
                raise Unreachable(f"{self._netloc}: {error}") from error
        status, body, _ = unpack(bytes(data))
        if status != 200:
            raise Unreachable(f"{path} answers with status {status}")
        return body

    def _head(self, method: str, path: str, length: int, kind: str = "application/json") -> bytes:
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self._netloc}", "Connection: close"]
        lines += [f"Content-Type: {kind}", f"Content-Length: {length}", "", ""]
        return "\r\n".join(lines).encode()

    def _connect(self, message: bytes) -> socket.socket:
        try:
            connection = socket.create_connection(self._address, timeout=60)
        except OSError as error:
            raise Unreachable(f"{self._netloc}: {error}") from error
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(message)
        return connection

    def read(self, stream: Stream, most: int = _READ) -> None:
        """Read what has come of a stream that is not done, as far as so many bytes."""
        try:
            data = stream.socket.recv(most)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            stream.pieces.append((time.perf_counter(), data))
        else:
            self.stop(stream)


def form(fields: Mapping[str, str], file: bytes) -> bytes:
    """Return the body of a form (of the kind ``FORM``) with some fields, and the field ``file``."""
    parts = [
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields.items()
    ]
    parts.append(f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="audio.wav"\r\n\r\n')
    return "".join(parts).encode() + file + f"\r\n--{_BOUNDARY}--\r\n".encode()


def unpack(raw: bytes) -> tuple[int, bytes, list[tuple[int, int]]]:
    """Split an HTTP response into its status, its body, and a list that leads from places in the body to places in
    ``raw``: each entry says that the body up to its first number was complete at the second.
    """
    head, separator, rest = raw.partition(b"\r\n\r\n")
    if not separator or not head.startswith(b"HTTP/1."):
        return 0, b"", []
    status = int(head.split(b" ", 2)[1])
    place = len(head) + len(separator)
    if b"transfer-encoding: chunked" not in head.lower():
        return status, rest, [(0, place), (len(rest), len(raw))]
    body, places = bytearray(), [(0, place)]
    while (line_end := raw.find(b"\r\n", place)) >= 0:
        length = int(raw[place:line_end].partition(b";")[0], 16)
        start = line_end + 2
        piece = raw[start : start + length]
        if not piece:
            break
        body += piece
        place = start + length
        places.append((len(body), place))
        place += 2
    return status, bytes(body), places


def parse(started: float, pieces: Sequence[tuple[float, bytes]]) -> Answer:
    """Turn what was read into an answer; every event has the time of the read that completed it."""
    answer = Answer(started)
    raw = b"".join(data for _, data in pieces)
    ends = list(accumulate(len(data) for _, data in pieces))
    status, body, places = unpack(raw)
    if status != 200:
        answer.error = f"status {status}: {message_in(body)}" if status else "no HTTP answer"
        return answer
    body_ends = [place for place, _ in places]

    def time_of(place: int) -> float:
        entry = bisect_left(body_ends, place)
        in_body, in_raw = places[entry]
        return pieces[min(bisect_left(ends, in_raw - (in_body - place)), len(pieces) - 1)][0]

    for end, event in _events(body):
        _take(answer, event, time_of(end))
    answer.tokens = answer.tokens or len(answer.times)
    return answer


def message_in(body: bytes) -> str:
    """Return what an answer that is an error says."""
    try:
        return _message(json.loads(body))
    except ValueError:
        return body[:300].decode(errors="replace")


def _message(data: Any) -> str:
    """Return what an error says, in OpenAI's shape or in any other."""
    error = data.get("error", data) if isinstance(data, dict) else data
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _events(body: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield each event's data with the place in the body where the event is complete."""
    place = 0
    for line in body.splitlines(keepends=True):
        place += len(line)
        if line.startswith(b"data:") and line.endswith(b"\n"):
            yield place, line[5:].strip()


def _take(answer: Answer, event: bytes, moment: float) -> None:
    if event == b"[DONE]":
        return
    data = json.loads(event)
    if "error" in data:
        answer.error = _message(data)
        return
    for choice in data.get("choices") or ():
        text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        index = choice.get("index", 0)
        if text:
            answer.times.append(moment)
            answer.sizes.append(len(text))
            answer.firsts.setdefault(index, moment)
            answer.texts[index] = answer.texts.get(index, "") + text
        answer.finish = choice.get("finish_reason") or answer.finish
    if usage := data.get("usage"):
        answer.tokens, answer.counted = usage["completion_tokens"], True
        answer.prompt_tokens = usage["prompt_tokens"]
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
