"""Hundreds of clients at once that read slowly: does the server stay quick for all others, and what becomes of those
for whom there is no room?
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator, Sequence

from benchmark import texts
from benchmark.answers import Request
from benchmark.client import Stream, unpack
from benchmark.contenders import HttpServer
from benchmark.histogram import histogram, percentile, since
from benchmark.lab import Lab
from benchmark.results import Results, Row, Target, at_most

CLIENTS, SLOTS = 500, 8
_NAME = "crowd"
_ROOM, _LITTLE = "room for all", "room for few"  # in the queue
_TOKENS = 32
_SIP, _PAUSE = 300, 0.1  # bytes that a client reads, and seconds until it reads again
_BUFFER = 4096  # bytes that the system reads ahead for it
_LIMIT = 300.0  # seconds for all
_LAG, _LATE = "llamaserve_event_loop_lag_seconds", 0.1  # seconds that are too late


def run(lab: Lab) -> None:
    """Have them come to a server that takes them all, and to one that refuses most."""
    for name, changes in ((_ROOM, {"queue": CLIENTS}), (_LITTLE, {})):
        with lab.server(name, parallel=SLOTS, **changes) as server:
            for number in range(lab.plan.rounds):
                _come(lab, server, number)


def _come(lab: Lab, server: HttpServer, number: int) -> None:
    before, start = histogram(server.client.text("/metrics"), _LAG), time.perf_counter()
    with _streams(lab, server, number) as streams:
        _sip(server, streams)
    lag = since(histogram(server.client.text("/metrics"), _LAG), before)
    answered, refused = (sum(map(how, streams)) for how in (_is_answered, _is_refused))
    figures = {"lag": percentile(lag, 0.99), "answered": answered, "refused": refused}
    figures |= {"lost": CLIENTS - answered - refused, "seconds": time.perf_counter() - start}
    for figure, value in figures.items():
        lab.results.add(_NAME, server.name, figure, value)
    lab.results.add_detail(_NAME, {server.name: {str(bound): count for bound, count in lag.items()}})


@contextlib.contextmanager
def _streams(lab: Lab, server: HttpServer, number: int) -> Iterator[list[Stream]]:
    streams: list[Stream] = []
    try:
        for client in range(CLIENTS):
            request = Request(_TOKENS, texts.story(f"crowd/{number}/{client}"), banned=lab.ends())
            streams.append(server.client.start(request))
            streams[-1].socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        yield streams
    finally:
        for stream in streams:
            server.client.stop(stream)


def _sip(server: HttpServer, streams: Sequence[Stream]) -> None:
    """Read a little from each stream, again and again, until all have ended."""
    deadline = time.perf_counter() + _LIMIT
    while (left := [stream for stream in streams if not stream.done]) and time.perf_counter() < deadline:
        for stream in left:
            server.client.read(stream, _SIP)
        time.sleep(_PAUSE)


def _is_answered(stream: Stream) -> bool:
    status, body, _ = unpack(_raw(stream))
    return status == 200 and body.rstrip().endswith(b"data: [DONE]")


def _is_refused(stream: Stream) -> bool:
    raw = _raw(stream)
    return unpack(raw)[0] == 429 and b"\nretry-after:" in raw.lower()


def _raw(stream: Stream) -> bytes:
    return b"".join(data for _, data in stream.pieces)


def rows(results: Results) -> list[Row]:
    """How late the event loop was, and what became of the clients."""

    def row(name: str, figure: str, what: str, unit: str = "", target: Target | None = None) -> Row:
        return results.row((_NAME, name, figure), f"{CLIENTS} slow clients, {name}: {what}", unit, target=target)

    found = []
    for name in (_ROOM, _LITTLE):
        found += [
            row(name, "lag", "the event loop was late by, 99 of 100", "s", target=at_most(_LATE)),
            row(name, "answered", "answered"),
            row(name, "refused", "refused with 429 and Retry-After"),
            row(name, "lost", "neither", target=at_most(0)),
            row(name, "seconds", "until all were", "s"),
        ]
    return found
