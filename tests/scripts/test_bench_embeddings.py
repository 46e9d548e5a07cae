"""The clients that want texts embedded, the steps of the bare loop beside them, and that both give the same vectors."""

from __future__ import annotations

import base64
import http.server
import json
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from benchmark import contenders, embeddings, profiling, texts
from benchmark.client import Unreachable
from benchmark.embedding_client import EmbeddingClient, Vectors, is_complete, parse
from benchmark.lab import BARE, OURS, NotPossible, loaded_bare_loop
from benchmark.packed_loop import PackedLoop, packed
from benchmark.results import Results
from hypothesis import given, strategies as st

from llamaserve.engine.params import UNTILED, LoadParams

PARAMS = LoadParams(
    path="",
    context=512,
    parallel=8,
    kv_cells=512,
    kv_unified=True,
    batch=512,
    threads=1,
    adaptive_threads=False,
    gpu_layers=0,
    flash_attention="auto",
    key_type="f16",
    value_type="f16",
    prefix_cache=False,
    spill=0,
    speculation=False,
    pooling="mean",
)


def vector(text: str) -> bytes:
    """The vector of the server below."""
    return struct.pack("<2f", len(text), sum(map(ord, text)))


def body(count: int, wanted: list[str]) -> bytes:
    data = [
        {"index": number, "embedding": base64.b64encode(vector(text)).decode()} for number, text in enumerate(wanted)
    ]
    return json.dumps({"data": data[:count][::-1], "usage": {"prompt_tokens": 7 * len(wanted)}}).encode()


@contextmanager
def answering(status: int = 200, most: int = 1000) -> Iterator[tuple[str, list[dict[str, Any]], set[int]]]:
    """A server that answers, all in all, what it was asked, and the connections over which it was."""
    asked: list[dict[str, Any]] = []
    connections: set[int] = set()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({**request, "path": self.path})
            connections.add(self.client_address[1])
            answer = body(most, request["input"]) if status == 200 else b'{"error": {"message": "no room"}}'
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked, connections
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("clients", [1, 3, 64])
def test_every_text_gets_its_own_vector_however_many_clients_ask(clients: int) -> None:
    wanted = texts.short_texts("a few", 20)
    with answering() as (url, asked, connections):
        found = EmbeddingClient(url, "tiny").embed([[text] for text in wanted], clients)
    assert found.vectors == [vector(text) for text in wanted]
    assert found.tokens == 7 * 20
    assert found.seconds > 0
    assert len(connections) == min(clients, 20)
    assert {tuple(request["input"]) for request in asked} == {(text,) for text in wanted}
    assert {(request["path"], request["encoding_format"], request["model"]) for request in asked} == {
        ("/v1/embeddings", "base64", "tiny")
    }


def test_one_request_has_all_texts_and_its_vectors_their_order() -> None:
    wanted = texts.short_texts("one", 5)
    with answering() as (url, asked, _):
        found = EmbeddingClient(url, None).embed([wanted])
    assert found.vectors == [vector(text) for text in wanted]
    assert [request["input"] for request in asked] == [wanted]
    assert "model" not in asked[0]


def test_refusals_and_missing_vectors_are_told() -> None:
    with answering(status=503) as (url, _, _), pytest.raises(Unreachable, match="status 503: no room"):
        EmbeddingClient(url, None).embed([["a"]])
    with answering(most=1) as (url, _, _), pytest.raises(Unreachable, match="2 texts with 1 vectors"):
        EmbeddingClient(url, None).embed([["a", "b"]])
    with pytest.raises(Unreachable):
        EmbeddingClient("https://example.org/v1", None)


PLAIN = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body(2, ["a", "b"]))
PLAIN += body(2, ["a", "b"])
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"
CHUNKED %= len(body(2, ["a", "b"])), body(2, ["a", "b"])


@pytest.mark.parametrize("whole", [PLAIN, CHUNKED])
def test_an_answer_is_complete_with_its_last_byte(whole: bytes) -> None:
    assert not any(is_complete(whole[:end]) for end in range(len(whole)))
    assert is_complete(whole)
    assert parse(whole) == ([vector("a"), vector("b")], 14)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=80), st.booleans())
def test_the_bare_loops_steps_have_every_token_once(lengths: list[int], whole: bool) -> None:
    tokens = [[number] * length for number, length in enumerate(lengths)]
    open_texts: dict[int, int] = {}
    done = [0] * len(lengths)
    for step in packed(tokens, PARAMS, gpu=False, whole=whole):
        sequences = [sequence for _, (_, _, sequence, _) in step]
        assert len(set(sequences)) == len(step) <= PARAMS.parallel
        size = sum(len(part) for _, (part, _, _, _) in step)
        assert size <= UNTILED or (whole and len(step) == 1)
        for number, (part, start, sequence, is_last) in step:
            assert (set(part), start) == ({number}, done[number])
            assert open_texts.setdefault(number, sequence) == sequence
            done[number] += len(part)
            assert is_last == (done[number] == lengths[number])
        assert len({open_texts[number] for number in open_texts}) == len(open_texts)
        for number, (_, _, _, is_last) in step:
            if is_last:
                del open_texts[number]
    assert done == lengths


def test_the_bare_loop_and_a_worker_do_the_same_work(embedding_model: Path) -> None:
    settings = contenders.load_params("tiny", {"source": f"file:{embedding_model}", "threads": 1})
    params = msgspec.convert(settings, LoadParams)
    wanted = [*texts.short_texts("same", 12), texts.manual("same", 150, lambda text: len(text.split()))]
    with loaded_bare_loop(settings) as loop:
        bare = PackedLoop(loop, params, whole=True)
        first = bare.count(wanted[0])
        assert first == len(loop.tokenize(wanted[:1])[0]) > 2
        together, alone = bare.embed(wanted), [bare.embed([text]) for text in wanted]
        steps = packed(loop.tokenize(wanted), params, gpu=loop.gpu, whole=True)
    assert together.tokens == sum(each.tokens for each in alone)
    assert np.allclose(
        embeddings.unit(together.vectors), embeddings.unit([each.vectors[0] for each in alone]), atol=1e-5
    )
    assert len(together.vectors[0]) == 4 * 384
    seen = profiling.embedding_steps(params, [wanted])
    sizes = [sum(len(part) for _, (part, _, _, _) in step) for step in steps]
    assert [step["rows"] for step in seen] == [first, *sizes]


def test_sides_that_count_other_tokens_are_not_compared() -> None:
    results = Results()
    embeddings._compare(results, Vectors([vector("ab")], 5, 1.0), Vectors([vector("ab")], 5, 1.0))
    assert results.get("embeddings", OURS, "difference") == [0.0]
    with pytest.raises(NotPossible, match="5 tokens where the bare loop has 6"):
        embeddings._compare(results, Vectors([vector("ab")], 5, 1.0), Vectors([vector("ab")], 6, 1.0))


def test_the_rows_set_the_server_against_the_loop_and_many_clients_against_one() -> None:
    results = Results()
    for ours, crowd, bare in ((95.0, 60.0, 100.0), (90.0, 50.0, 100.0), (80.0, 40.0, 100.0)):
        results.add("embeddings", OURS, "short", ours)
        results.add("embeddings", OURS, "short_crowd", crowd)
        results.add("embeddings", BARE, "short", bare)
    judged = [row for row in embeddings.rows(results) if row.target is not None]
    assert [(str(row.target), row.value, row.met) for row in judged] == [
        ("≥ 0.9", 0.9, True),
        ("≥ 0.9", None, None),  # with fixed threads, which was not measured
        ("≥ 0.6", pytest.approx(50 / 90), False),
    ]


def test_short_texts_differ_and_repeat() -> None:
    first, second = texts.short_texts("embeddings/0", 256), texts.short_texts("embeddings/1", 256)
    assert len(set(first)) == len(set(second)) == 256
    assert first == texts.short_texts("embeddings/0", 256) != second
    words = sorted(len(text.split()) for text in first)
    assert words[0] < 6
    assert words[-1] > 20
    assert all(1 <= len(text.split()) <= 4 for text in texts.short_texts("few", 256, 4))
