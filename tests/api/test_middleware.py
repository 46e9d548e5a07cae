"""Bodies that don't come: who stops sending is not waited for, and who waits for an answer is left alone."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from unittest import mock

import pytest
from fastapi import FastAPI, Request

from llamaserve.api import bodies, middleware
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

    gate = RequestGate(app, max_body=100, max_upload=100, refused=mock.MagicMock())
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
    monkeypatch.setattr(bodies, "PATIENCE", 0.05)
    status, headers, answer = ask({"body": b'{"a":', "more_body": True})
    assert (status, answer["error"]["code"]) == (408, "request_timeout")
    assert headers["connection"] == "close"


def test_a_whole_body_is_not_followed_by_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "PATIENCE", 0.05)
    status, _, answer = ask({"body": b'{"a":', "more_body": True}, {"body": b'"b"}'})
    assert (status, answer) == (200, {"a": "b"})


def test_a_bug_is_answered_where_ids_and_accounts_see_it(caplog: pytest.LogCaptureFixture) -> None:
    answer: list[Any] = []

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("a bug")

    async def send(message: Any) -> None:
        answer.append(message)

    scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": []}
    asyncio.run(RequestGate(broken, max_body=100, max_upload=100, refused=mock.MagicMock())(scope, _nothing, send))
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
    asyncio.run(RequestGate(never, max_body=100, max_upload=100, refused=mock.MagicMock())(scope, _nothing, send))
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


def test_a_body_that_does_not_tell_its_length_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "_REST_PATIENCE", 0.05)
    status, _, answer = ask({"body": b'{"a": "' + b"x" * 60, "more_body": True}, {"body": b"y" * 60, "more_body": True})
    assert (status, answer["error"]["code"]) == (413, "body_too_large")
