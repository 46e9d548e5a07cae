"""Bodies that don't come: who stops sending is not waited for, and who waits for an answer is left alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from api_helpers import COMPLETIONS, TINY
from fastapi import FastAPI, Request
from model_helpers import write_registry
from running_server import RunningServer, wait_until

from llamaserve.api import middleware
from llamaserve.api.handlers import add_error_handlers
from llamaserve.api.middleware import RequestGate
from llamaserve.errors import Unauthenticated


def ask(*pieces: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
    """Send a request whose body comes in these pieces and then no more; return status, headers and answer."""
    app = FastAPI()
    add_error_handlers(app)

    @app.post("/")
    async def echo(body: dict[str, str], request: Request) -> dict[str, str]:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(request.receive(), 0.3)  # it would hear that the client leaves
        return body

    gate = RequestGate(app, max_body=100, max_upload=100)
    left, answer = list(pieces), []

    async def receive() -> dict[str, Any]:
        if not left:
            await asyncio.Event().wait()
        return {"type": "http.request", **left.pop(0)}

    async def send(message: Any) -> None:
        answer.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": [], "root_path": ""}
    asyncio.run(asyncio.wait_for(gate(scope, receive, send), 10))
    start, body = answer
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], headers, json.loads(body["body"])


def test_a_body_of_which_no_more_comes_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "PATIENCE", 0.05)
    status, headers, answer = ask({"body": b'{"a":', "more_body": True})
    assert (status, answer["error"]["code"]) == (408, "request_timeout")
    assert headers["connection"] == "close"


def test_a_whole_body_is_not_followed_by_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "PATIENCE", 0.05)
    status, _, answer = ask({"body": b'{"a":', "more_body": True}, {"body": b'"b"}'})
    assert (status, answer) == (200, {"a": "b"})


def test_a_bug_is_answered_where_ids_and_accounts_see_it(caplog: pytest.LogCaptureFixture) -> None:
    answer: list[Any] = []

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("a bug")

    async def send(message: Any) -> None:
        answer.append(message)

    scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": []}
    asyncio.run(RequestGate(broken, max_body=100, max_upload=100)(scope, _nothing, send))
    assert answer[0]["status"] == 500
    assert json.loads(answer[1]["body"])["error"]["code"] == "internal_error"
    assert "a bug" in caplog.text


async def _nothing() -> dict[str, Any]:
    return {"type": "http.disconnect"}


def test_a_path_with_a_line_break_is_none(caplog: pytest.LogCaptureFixture) -> None:
    answer: list[Any] = []

    async def send(message: Any) -> None:
        answer.append(message)

    async def never(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError

    scope = {"type": "http", "method": "POST", "path": "/v1/completions\n", "headers": []}
    asyncio.run(RequestGate(never, max_body=100, max_upload=100)(scope, _nothing, send))
    assert answer[0]["status"] == 400


def test_a_stranger_who_sends_byte_by_byte_is_not_read_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "_STRANGERS_TIME", 0.2)
    answer: list[Any] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message: Any) -> None:
        answer.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    asyncio.run(asyncio.wait_for(middleware.refuse(scope, receive, send, Unauthenticated("no key")), 5))
    assert answer[0]["status"] == 401


def test_bodies_that_are_in_memory_may_not_take_all_of_it(starter_model: Path, tmp_path: Path) -> None:
    path = write_registry(tmp_path / "models.yaml", {"smollm2": starter_model})
    settings = {"LLAMASERVE_MAX_BODY": "4096"}
    with RunningServer("serve", "smollm2", "--models-file", str(path), environment=settings) as server:
        senders = contextlib.ExitStack()
        for _ in range(16):
            senders.enter_context(half_a_body(server, 4000))
        wait_until(lambda: server.post(COMPLETIONS, {**TINY, "user": "x" * 2000}).status_code == 429)
        response = server.post(COMPLETIONS, {**TINY, "user": "x" * 2000})
        assert response.json()["error"]["code"] == "queue_full"
        assert int(response.headers["retry-after"]) > 0
        assert server.post(COMPLETIONS, TINY).status_code == 200, "there is room for this one"
        assert server.get("/v1/models")["data"], "who sends no body needs no room"
        senders.close()
        wait_until(lambda: server.post(COMPLETIONS, {**TINY, "user": "x" * 2000}).status_code == 200)
        for _ in range(40):
            assert server.post(COMPLETIONS, {"prompt": 1, "user": "x" * 2000}).status_code == 400
        assert server.post(COMPLETIONS, {**TINY, "user": "x" * 2000}).status_code == 200, "all room has come back"


def half_a_body(server: RunningServer, size: int) -> socket.socket:
    """Send so many bytes of a body that has some more."""
    port = int(server.url.rpartition(":")[2])
    sender = socket.create_connection(("127.0.0.1", port))
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size + 96}\r\n\r\n"
    sender.sendall(head.encode() + b" " * size)
    return sender


def test_a_body_that_does_not_tell_its_length_is_counted() -> None:
    status, _, answer = ask({"body": b'{"a": "' + b"x" * 60, "more_body": True}, {"body": b"y" * 60, "more_body": True})
    assert (status, answer["error"]["code"]) == (413, "body_too_large")
