"""What the tests of the API share: requests that run long, checks of the error shape, and reading a stream by hand."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from running_server import RunningServer

MODEL = "smollm2-135m"
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
END_TOKENS = {"0": -100, "2": -100}  # <|endoftext|> and <|im_end|>: without them an answer goes on to its limit
ENDLESS: dict[str, Any] = {"prompt": "Once upon a time", "temperature": 0, "logit_bias": END_TOKENS}
TINY: dict[str, Any] = {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 2}
LIMIT = 60  # seconds for one answer


def assert_error(response: httpx.Response, status: int, code: str | None, param: str | None = None) -> str:
    """Check OpenAI's error shape and that nothing of the inside leaks; return the message."""
    assert response.status_code == status, response.text[:500]
    assert response.headers["content-type"] == "application/json"
    assert "Traceback" not in response.text
    assert 'File "' not in response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert (error["code"], error["param"]) == (code, param), error["message"][:500]
    assert error["message"]
    return str(error["message"])


def is_error(response: httpx.Response) -> bool:
    """Whether this is a 4xx in OpenAI's shape; fails for any other error."""
    if response.status_code == 200:
        return False
    assert 400 <= response.status_code < 500, response.text[:500]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert "Traceback" not in response.text
    return True


def assert_alive(server: RunningServer) -> None:
    """Check that a good request is answered."""
    response = server.post(COMPLETIONS, TINY)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["text"].startswith(" Paris")


def length_of(server: RunningServer, text: str) -> int:
    """Return the number of tokens of a text, as the server's own tokeniser counts them."""
    response = server.post("/v1/internal/encode", {"text": text})
    response.raise_for_status()
    return int(response.json()["length"])


def tokens_of(server: RunningServer, text: str) -> list[int]:
    """Return the token ids of a text."""
    response = server.post("/v1/internal/encode", {"text": text})
    response.raise_for_status()
    return [int(token) for token in response.json()["tokens"]]


def events(lines: Iterator[str]) -> Iterator[Any]:
    """Yield the data of each event: the parsed JSON, or the string ``[DONE]``. Nothing but comments may be between."""
    for line in lines:
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)
        else:
            assert line == "" or line.startswith(":"), line


@contextmanager
def streamed(server: RunningServer, path: str, body: dict[str, Any]) -> Iterator[Iterator[Any]]:
    """Send a streamed request and give its events one by one."""
    request = {**body, "stream": True}
    with httpx.stream("POST", server.url + path, json=request, timeout=LIMIT, verify=False) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        yield events(response.iter_lines())


def all_events(server: RunningServer, path: str, body: dict[str, Any]) -> list[Any]:
    """Send a streamed request and return all its events."""
    with streamed(server, path, body) as stream:
        return list(stream)


@contextmanager
def unanswered(server: RunningServer, path: str, body: dict[str, Any]) -> Iterator[socket.socket]:
    """Send a request and hang up at the end of the block, without reading the answer."""
    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head.encode() + data)
        yield connection


def write_models_file(folder: Path, weights: Path, defaults: str, fields: str = "") -> Path:
    """Write a models.yaml with one model and return its path."""
    path = folder / "models.yaml"
    path.write_text(
        f"defaults: {{{defaults}, flash_attention: off}}\n"
        f"models:\n  smollm2-135m: {{source: 'file:{weights}'{fields}}}\n"
        "aliases: {starter: smollm2-135m}\n"
    )
    return path
