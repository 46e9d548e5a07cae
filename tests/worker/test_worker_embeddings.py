"""Vectors and scores from a child: the same as in this process, each mistake at its place, and nothing is left of what
nobody waits for any more.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from gguf_writer import tiny_llama
from rank_model import RankModel

from llamaserve.engine.embedder import LoadedEmbedder
from llamaserve.engine.events import Embedded, Occupancy
from llamaserve.engine.llama import start_backend
from llamaserve.engine.params import Embedding, Generation, LoadParams, Pooling, Sampling
from llamaserve.engine.work import MAX_TEXT
from llamaserve.errors import (
    ContextLengthExceeded,
    EngineCrashed,
    InvalidRequest,
    LlamaserveError,
    ModelNotCapable,
    Unavailable,
)
from llamaserve.worker.process import WorkerProcess

_TIMEOUT = 60.0  # of a whole test: a hang is a failure
_SOON = 20.0  # seconds: a text or two can be encoded in it, and not thirty
_PLAIN = Embedding()
_TEXTS: list[str | list[int]] = ["The cat sits on the mat.", "Hello", [101, 4937, 102], "long " * 100, ""]
_LONG: list[int] = [101, *[4937] * 510, 102]  # some hundred milliseconds
_GREEDY = Generation(sampling=Sampling(seed=1, temperature=0.0), max_tokens=4)


def _for_vectors(params: LoadParams, path: Path, pooling: Pooling, context: int) -> LoadParams:
    return msgspec.structs.replace(
        params,
        path=str(path),
        pooling=pooling,
        context=context,
        kv_cells=context,
        kv_unified=True,
        parallel=64,
        batch=context,
        flash_attention="auto",
        prefix_cache=False,
        speculation=False,
    )


@pytest.fixture(scope="module")
def params(load_params: LoadParams, embedding_model: Path) -> LoadParams:
    return _for_vectors(load_params, embedding_model, "mean", 512)


@pytest.fixture(scope="module")
def rank_params(load_params: LoadParams, tmp_path_factory: pytest.TempPathFactory) -> LoadParams:
    path = RankModel().write(tmp_path_factory.mktemp("rank") / "rank.gguf")
    return _for_vectors(load_params, path, "rank", 96)


def _with_worker(params: LoadParams, test: Callable[[WorkerProcess], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(_TIMEOUT):
            worker = await WorkerProcess.start("starter", params, lambda fraction: None)
            try:
                await test(worker)
            finally:
                await worker.aclose()

    asyncio.run(run())


def _vectors(event: Embedded) -> np.ndarray[Any, Any]:
    return np.frombuffer(event.vectors, "<f4").reshape(-1, event.width)


async def _refused(call: Coroutine[Any, Any, object], error: type[LlamaserveError], param: str | None) -> None:
    with pytest.raises(error) as caught:
        await call
    assert type(caught.value) is error
    assert caught.value.param == param


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - occupancy is a plain value
        await asyncio.sleep(0)


# The same as in this process


def test_the_child_makes_the_same_vectors_as_this_process(params: LoadParams) -> None:
    start_backend()
    embedder = LoadedEmbedder(params, lambda fraction: True)
    try:
        embedder.submit(1, [embedder.encode(text, "input", _PLAIN) for text in _TEXTS], _PLAIN)
        events = []
        while not embedder.idle:
            events += embedder.step()
    finally:
        embedder.close()
    (expected,) = events
    assert isinstance(expected, Embedded)

    async def test(worker: WorkerProcess) -> None:
        event = await worker.embed(_TEXTS, _PLAIN)
        assert (event.width, event.tokens, event.truncated) == (384, expected.tokens, [0] * len(_TEXTS))
        assert abs(_vectors(event) - _vectors(expected)).max() < 1e-6
        fewer = await worker.embed([[101] * 600], Embedding(dimensions=3, truncate="end"))
        assert (fewer.width, fewer.tokens, fewer.truncated) == (3, [512], [88])

    _with_worker(params, test)


def test_the_child_scores_documents(rank_params: LoadParams) -> None:
    async def test(worker: WorkerProcess) -> None:
        documents = ["the sea is blue", "paris is the capital of france", "sea " * 200]
        event = await worker.rank("what is blue?", documents, truncate=True)
        expected = [RankModel().score("what is blue?", document)[0] for document in documents[:2]]
        assert event.width == 1
        assert _vectors(event)[:2, 0] == pytest.approx(expected, abs=2e-3)
        assert event.truncated[:2] == [0, 0]
        assert event.truncated[2] > 100
        await _refused(worker.rank("a", documents), ContextLengthExceeded, "documents[2]")
        await _refused(worker.rank("sea " * 100, ["a"]), ContextLengthExceeded, "query")
        await _refused(worker.rank("a", []), InvalidRequest, "documents")
        await _refused(worker.embed(["a"], _PLAIN), ModelNotCapable, None)
        assert (await worker.rank("what is blue?", documents[:1])).width == 1

    _with_worker(rank_params, test)


def test_many_requests_at_once_get_their_own_vectors(params: LoadParams) -> None:
    async def test(worker: WorkerProcess) -> None:
        texts = [f"text {number} " * (1 + number % 7) for number in range(64)]
        whole = _vectors(await worker.embed(texts, _PLAIN))
        events = await asyncio.gather(*(worker.embed([text], _PLAIN) for text in texts))
        for event, vector in zip(events, whole, strict=True):
            assert abs(_vectors(event)[0] - vector).max() < 1e-6
        await _until(lambda: worker.occupancy == Occupancy())

    _with_worker(params, test)


@pytest.mark.parametrize("share", ["", "other"])
def test_a_request_does_not_wait_for_many_of_another_share(params: LoadParams, share: str) -> None:
    """Of one share, they are answered in order."""

    async def test(worker: WorkerProcess) -> None:
        ended: list[int] = []

        async def embed(number: int, share: str = "") -> None:
            await worker.embed([_LONG], _PLAIN, share=share)
            ended.append(number)

        await asyncio.gather(*(embed(number) for number in range(8)), embed(8, share))
        assert sorted(ended) == list(range(9))
        assert ended.index(8) == 8 if not share else ended.index(8) < 4

    _with_worker(params, test)


def test_scores_do_not_depend_on_the_share(rank_params: LoadParams) -> None:
    async def test(worker: WorkerProcess) -> None:
        one, *others = await asyncio.gather(
            *(worker.rank("what is blue?", ["the sea", "paris"], share=share) for share in ("", "a", "b", "b"))
        )
        for other in others:
            assert _vectors(other) == pytest.approx(_vectors(one), abs=1e-6)

    _with_worker(rank_params, test)


# What is refused


def test_what_is_wrong_with_a_request_is_said_with_its_place(params: LoadParams) -> None:
    async def test(worker: WorkerProcess) -> None:
        for text, error in (
            ("word " * 511, ContextLengthExceeded),
            ("word " * 200_000, ContextLengthExceeded),
            ([101] * 513, ContextLengthExceeded),
            ([30522], InvalidRequest),
            ([-1], InvalidRequest),
            ([], InvalidRequest),
        ):
            await _refused(worker.embed(["good", text], _PLAIN), error, "input[1]")
        await _refused(worker.embed(["a"], Embedding(dimensions=385)), InvalidRequest, "dimensions")
        await _refused(worker.embed(["a"], Embedding(dimensions=0)), InvalidRequest, "dimensions")
        await _refused(worker.embed([], _PLAIN), InvalidRequest, "input")
        for text in ("\ud800", [2**64]):  # no message can carry it
            await _refused(worker.embed([text], _PLAIN), InvalidRequest, None)
        assert len(_vectors(await worker.embed(["good"], _PLAIN))) == 1

    _with_worker(params, test)


def test_an_embedding_model_does_nothing_else(params: LoadParams) -> None:
    async def test(worker: WorkerProcess) -> None:
        stream = worker.generate(["Once"], _GREEDY)
        await _refused(stream.accepted(), ModelNotCapable, None)
        stream.close()
        await _refused(worker.rank("a", ["b"]), ModelNotCapable, None)
        await _refused(worker.set_adapters([]), ModelNotCapable, None)
        await _refused(worker.save_prefixes(Path("nowhere"), 1), ModelNotCapable, None)
        await worker.limit_spill(0)  # there is nothing to limit
        tokens = await worker.tokenize("Hello there!", add_bos=True, parse_special=True)
        assert tokens == [101, 7592, 2045, 999, 102]
        assert (await worker.detokenize(tokens[1:-1], special=False)).split() == ["hello", "there", "!"]
        await _refused(worker.detokenize([30522], special=False), InvalidRequest, "tokens")

    _with_worker(params, test)


def test_a_generator_makes_no_vectors(load_params: LoadParams, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_llama())
    params = msgspec.structs.replace(load_params, path=str(path), context=128, kv_cells=512, threads=1)

    async def test(worker: WorkerProcess) -> None:
        await _refused(worker.embed(["a"], _PLAIN), ModelNotCapable, None)
        await _refused(worker.rank("a", ["b"]), ModelNotCapable, None)
        stream = worker.generate(["a"], _GREEDY)
        assert (await stream.accepted()).prompt_tokens
        stream.close()

    _with_worker(params, test)


# Cancel


def test_work_that_nobody_waits_for_is_dropped(params: LoadParams, caplog: pytest.LogCaptureFixture) -> None:
    """A request with minutes of work is; another one goes on."""

    async def test(worker: WorkerProcess) -> None:
        expected = _vectors(await worker.embed([_LONG], _PLAIN))
        for cut in (True, False):
            given_up = asyncio.create_task(worker.embed([_LONG] * 500, Embedding(truncate="end" if cut else "none")))
            await _until(lambda: worker.occupancy.running == 1)
            waiting = asyncio.create_task(worker.embed([_LONG], _PLAIN))
            await _until(lambda: worker.occupancy.running + worker.occupancy.waiting == 2)
            given_up.cancel()
            with pytest.raises(asyncio.CancelledError):
                await given_up
            assert abs(_vectors(await waiting) - expected).max() < 1e-6
            await _until(lambda: worker.occupancy == Occupancy())

    _with_worker(params, test)
    assert not [record for record in caplog.records if "starter:" in record.getMessage()]


def test_texts_of_a_request_that_is_given_up_are_not_encoded_any_more(params: LoadParams) -> None:
    """Encoding all of them would take a minute, in which no other text could be."""

    async def test(worker: WorkerProcess) -> None:
        cuts = [Embedding(truncate="end"), Embedding(truncate="start")]
        given_up = [asyncio.create_task(worker.embed(["a" * MAX_TEXT] * 30, cut)) for cut in cuts]
        await asyncio.sleep(0)
        for task in given_up:
            task.cancel()
        async with asyncio.timeout(_SOON):
            assert await worker.tokenize("a", add_bos=False, parse_special=False) == [1037]
        assert worker.occupancy == Occupancy()

    _with_worker(params, test)


def test_documents_of_a_request_that_is_given_up_are_dropped(rank_params: LoadParams) -> None:
    async def test(worker: WorkerProcess) -> None:
        given_up = asyncio.create_task(worker.rank("cat", ["sea " * 90] * 5_000))
        await asyncio.sleep(0)
        given_up.cancel()
        assert await worker.tokenize("cat", add_bos=False, parse_special=False)
        assert worker.occupancy == Occupancy()
        given_up = asyncio.create_task(worker.rank("cat", ["sea " * 90] * 500))
        await _until(lambda: worker.occupancy.running == 1)
        given_up.cancel()
        await _until(lambda: worker.occupancy == Occupancy())

    _with_worker(rank_params, test)


def test_a_stop_of_all_answers_lets_vectors_be(params: LoadParams) -> None:
    async def test(worker: WorkerProcess) -> None:
        task = asyncio.create_task(worker.embed([_LONG] * 2, _PLAIN))
        await _until(lambda: worker.occupancy.running == 1)
        worker.stop_all()
        assert len(_vectors(await task)) == 2

    _with_worker(params, test)


# The end of a child


def test_a_killed_child_fails_every_request(params: LoadParams) -> None:
    async def test(worker: WorkerProcess) -> None:
        tasks = [asyncio.create_task(worker.embed([_LONG] * 50, _PLAIN)) for _ in range(3)]
        await _until(lambda: worker.occupancy.running > 0)
        os.kill(worker.pid, signal.SIGKILL)
        late = asyncio.create_task(worker.embed(["late"], _PLAIN))
        outcomes = await asyncio.gather(*tasks, late, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [EngineCrashed] * 4
        assert all("SIGKILL" in str(outcome) for outcome in outcomes)
        assert worker.occupancy == Occupancy()
        with pytest.raises(EngineCrashed):
            await worker.embed(["too late"], _PLAIN)

    _with_worker(params, test)


def test_closing_fails_open_requests(params: LoadParams) -> None:
    async def test(worker: WorkerProcess) -> None:
        task = asyncio.create_task(worker.embed([_LONG] * 50, _PLAIN))
        await _until(lambda: worker.occupancy.running > 0)
        await worker.aclose()
        with pytest.raises(Unavailable):
            await task

    _with_worker(params, test)
