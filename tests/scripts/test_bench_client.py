"""Reading a stream: what is parsed afterwards is what was sent, and every event has the time of its last byte."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
from benchmark.answers import Request
from benchmark.client import Client, Unreachable, parse, unpack
from hypothesis import given, strategies as st

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text_event(text: str, index: int = 0, finish: str | None = None) -> bytes:
    return event(choices=[{"index": index, "text": text, "finish_reason": finish}])


def chunked(*events: bytes) -> bytes:
    return HEAD + b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in events) + b"0\r\n\r\n"


USAGE = event(
    choices=[], usage={"completion_tokens": 3, "prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}
)
STREAM = chunked(
    b": working\n\n",
    text_event("Once"),
    text_event(" upon"),
    text_event(" ✓ time", finish="length"),
    USAGE,
    b"data: [DONE]\n\n",
)


@given(st.lists(st.integers(1, len(STREAM) - 1), max_size=30, unique=True))
def test_a_stream_is_the_same_however_it_was_read(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(STREAM)]
    pieces = [(float(end), STREAM[start:end]) for start, end in pairwise(places)]
    answer = parse(0.0, pieces)
    assert answer.text == "Once upon ✓ time"
    assert (answer.tokens, answer.prompt_tokens, answer.cached_tokens) == (3, 9, 4)
    assert (answer.finish, answer.error) == ("length", None)
    ends = [STREAM.index(part) + len(part) - 1 for part in (text_event("Once"), text_event(" upon"))]
    for moment, end in zip(answer.times, ends, strict=False):  # the first read that held the whole line
        assert moment == min(place for place in places if place >= end)


def test_pieces_without_usage_count_one_token_each() -> None:
    answer = parse(0.0, [(1.0, chunked(text_event("a"), text_event("b")))])
    assert (answer.tokens, answer.finish) == (2, None)  # it just ended: interrupted


def test_chat_chunks_and_choices() -> None:
    role = event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])
    one = event(choices=[{"index": 0, "delta": {"content": "A"}}])
    two = event(choices=[{"index": 1, "delta": {"content": "B"}, "finish_reason": "stop"}])
    answer = parse(
        0.0, [(1.0, chunked(role)[:-5]), (2.0, chunked(one)[len(HEAD) : -5]), (3.0, chunked(two)[len(HEAD) :])]
    )
    assert answer.texts == {0: "A", 1: "B"}
    assert answer.firsts == {0: 2.0, 1: 3.0}
    assert answer.first == 3.0


def test_errors_are_told() -> None:
    refused = b'HTTP/1.1 400 Bad Request\r\ncontent-length: 17\r\n\r\n{"error": "no no"}'
    assert parse(0.0, [(1.0, refused)]).error == "status 400: no no"
    assert parse(0.0, [(1.0, chunked(event(error={"message": "broken"})))]).error == "broken"
    assert parse(0.0, []).error == "no HTTP answer"


def test_a_response_cut_short_keeps_what_is_whole() -> None:
    answer = parse(0.0, [(1.0, STREAM[: STREAM.index(b" upon") + 3])])
    assert answer.text == "Once"


def test_a_plain_body() -> None:
    assert unpack(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")[:2] == (200, b"{}")


@contextmanager
def answering(*answers: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """A server that gives each connection the next answer, and what it was asked."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for answer in answers:
                connection, _ = listener.accept()
                with connection:
                    asked.append(connection.recv(65536))
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1", asked
        thread.join()


def test_requests_are_sent_at_once_and_answered() -> None:
    with answering(STREAM, STREAM) as (url, asked):
        answers = Client(url, "tiny").ask([Request(3, "one"), Request(3, "two")], 10)
    assert [answer.text for answer in answers] == ["Once upon ✓ time"] * 2
    assert all(request.startswith(b"POST /v1/completions HTTP/1.1\r\n") for request in asked)
    assert {json.loads(request.partition(b"\r\n\r\n")[2])["prompt"] for request in asked} == {"one", "two"}


def test_what_takes_too_long_is_cut_off() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = Client(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", None)
        (answer,) = client.ask([Request(3, "one")], 0.1)
    assert (answer.tokens, answer.finish) == (0, None)


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(Unreachable):
        Client(f"http://127.0.0.1:{port}/v1", None).ask([Request(1, "one")], 1)
    with pytest.raises(Unreachable):
        Client("https://example.org/v1", None)
