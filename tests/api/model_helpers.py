"""What the tests of models that come and go share: servers with several models, and a listener to their events."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from api_helpers import ENDLESS
from child_processes import model_processes
from running_server import RunningServer, wait_until

INFO = "/v1/internal/model/info"
LIST = "/v1/internal/model/list"
LOAD = "/v1/internal/model/load"
UNLOAD = "/v1/internal/model/unload"
EVENTS = "/v1/internal/events"
LONG = {**ENDLESS, "max_tokens": 400, "stream_options": {"include_usage": True}}  # runs for seconds
SMALL = "context: 1024, parallel: 2, flash_attention: off"  # the exact level, so that greedy answers can be compared


def write_registry(path: Path, models: dict[str, Path | str], defaults: str = SMALL, aliases: str = "") -> Path:
    """Write a models.yaml of these models, each a file or the fields of its entry, and return its path."""
    lines = [f"defaults: {{{defaults}}}", "models:"]
    for name, model in models.items():
        fields = f"source: 'file:{model}'" if isinstance(model, Path) else model
        lines.append(f"  {name}: {{{fields}}}")
    lines.append(f"aliases: {{{aliases}}}")
    return replace(path, "\n".join(lines) + "\n")


def replace(path: Path, text: str) -> Path:
    """Write a file as editors do: it is never there by half."""
    new = path.with_suffix(".new")
    new.write_text(text)
    return new.replace(path)


def loaded(server: RunningServer) -> list[str]:
    """Return the names of the models in memory, the current one first."""
    return [model["id"] for model in server.get("/v1/models?loaded=true")["data"]]


def names(server: RunningServer) -> list[str]:
    """Return what ``model/list`` has."""
    listed = server.get(LIST)
    assert set(listed) == {"model_names"}
    return [str(name) for name in listed["model_names"]]


def children(server: RunningServer) -> set[int]:
    """Return the process ids of all children that run a model or wait for one."""
    return model_processes(server.process.pid)


class Listener:
    """Takes a server's events within a ``with`` block. The server's heartbeat should be short."""

    def __init__(self, server: RunningServer) -> None:
        self._url = server.url + EVENTS
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self.events: list[dict[str, Any]] = []
        self.comments: list[str] = []

    def __enter__(self) -> Self:
        self._thread.start()
        wait_until(lambda: bool(self.events))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _read(self) -> None:
        ended = contextlib.suppress(httpx.RemoteProtocolError)  # the server has
        with ended, httpx.stream("GET", self._url, timeout=30) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    self.events.append(json.loads(line.removeprefix("data: ")))
                elif line.startswith(":"):
                    self.comments.append(line)
                if self._over.is_set():
                    return

    def of(self, kind: str, model: str | None = None) -> list[dict[str, Any]]:
        """Return the events of a kind that have come, of one model or of all."""
        return [event for event in self.events if event["kind"] == kind and model in (None, event["model"])]

    def kinds(self, model: str) -> list[str]:
        """Return the kinds of a model's events in their order, those of progress once in a row."""
        found: list[str] = []
        for event in self.events:
            if event["model"] == model and found[-1:] != [event["kind"]]:
                found.append(event["kind"])
        return found

    def wait(self, kind: str, model: str | None = None, count: int = 1, limit: float = 20) -> dict[str, Any]:
        """Wait for so many events of a kind, and return the last of them."""
        wait_until(lambda: len(self.of(kind, model)) >= count, limit)
        return self.of(kind, model)[count - 1]


def finish(stream: Iterator[Any]) -> None:
    """Read what is left of a ``LONG`` stream, and check that nothing has disturbed it."""
    *_, last, usage, done = stream
    assert (last["choices"][0]["finish_reason"], done) == ("length", "[DONE]")
    assert usage["usage"]["completion_tokens"] == LONG["max_tokens"]


def text_of(response: httpx.Response) -> str:
    """Return the text of a completion."""
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def comments_of(lines: Iterable[str]) -> Iterable[str]:
    """Yield the comment lines of a stream, without their marks."""
    return (line.removeprefix(": ") for line in lines if line.startswith(": "))
