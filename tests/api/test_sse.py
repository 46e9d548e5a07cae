from __future__ import annotations

import json
import socket
import time

from api_helpers import COMPLETIONS, ENDLESS, all_events, unanswered
from hypothesis import given, strategies as st
from running_server import RunningServer, wait_until
from sse_starlette import EventSourceResponse

from llamaserve.api.sse import EventStream, TextEvent, event

_bodies = st.dictionaries(st.text(), st.text() | st.integers(0, 9) | st.none())


@given(body=_bodies, texts=st.lists(st.text()))
def test_a_text_event_is_the_event_of_its_body(body: dict[str, object], texts: list[str]) -> None:
    """Also for texts with quotes, line ends and control characters, which the parts around the text must not meet."""
    written = TextEvent(lambda text: {**body, "choices": [{"text": text, "finish_reason": None}]})
    for text in texts:
        whole = {**body, "choices": [{"text": text, "finish_reason": None}]}
        assert written(text) == event(whole)
        assert json.loads(written(text).removeprefix(b"data: ")) == whole
        assert written(text).count(b"\n") == 2
        assert b"\r" not in written(text)


def test_the_loop_that_is_replaced_is_still_there() -> None:
    """If sse-starlette renames it, streams still work, with more CPU time for each token: then override the new one."""
    assert "_stream_response" in vars(EventSourceResponse)
    assert "_stream_response" in vars(EventStream)


def test_one_piece_of_the_body_holds_whole_events(server: RunningServer) -> None:
    body = {**ENDLESS, "prompt": ["One", "Two"], "max_tokens": 20, "n": 2, "stream": True}
    with unanswered(server, COMPLETIONS, body) as connection:
        answer = _read_until(connection, b"0\r\n\r\n")
    pieces = _pieces(answer.split(b"\r\n\r\n", 1)[1])
    assert all(piece.startswith((b"data: ", b":")) and piece.endswith(b"\n\n") for piece in pieces)
    assert b"".join(pieces).count(b"data: ") >= 4 * 20
    together = [piece for piece in pieces if piece.count(b"data: ") >= 4]
    assert len(together) > 10  # what a step brings for four answers goes out at once
    assert pieces[-1] == b"data: [DONE]\n\n"


def test_a_client_that_does_not_read_holds_up_nobody_and_misses_nothing(server: RunningServer) -> None:
    body = {**ENDLESS, "max_tokens": 1000, "stream": True}
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        _send(connection, server, body)
        wait_until(lambda: server.running == 1)
        other = {**ENDLESS, "prompt": "The sea", "max_tokens": 10}
        before = time.monotonic()
        assert len(all_events(server, COMPLETIONS, other)) >= 10
        assert time.monotonic() - before < 10
        wait_until(lambda: server.running == 0, limit=60)  # all is generated, and waits for its reader
        answer = _read_until(connection, b"0\r\n\r\n")
    events = b"".join(_pieces(answer.split(b"\r\n\r\n", 1)[1])).decode().split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in events if line.startswith("data: {")]
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == server.post(COMPLETIONS, {**body, "stream": False}).json()["choices"][0]["text"]


def _send(connection: socket.socket, server: RunningServer, body: dict[str, object]) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    connection.connect((host, int(port)))
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)


def _read_until(connection: socket.socket, end: bytes) -> bytes:
    connection.settimeout(60)
    answer = b""
    while not answer.endswith(end):
        received = connection.recv(65536)
        assert received, answer[-500:]
        answer += received
    return answer


def _pieces(body: bytes) -> list[bytes]:
    """Return the chunks of a chunked body."""
    pieces = []
    while True:
        size, body = body.split(b"\r\n", 1)
        length = int(size, 16)
        if not length:
            return pieces
        pieces.append(body[:length])
        body = body[length + 2 :]
