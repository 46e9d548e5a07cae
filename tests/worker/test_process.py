from __future__ import annotations

import asyncio
import gc
import os
import select
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from gguf_writer import tiny_llama

from llamaserve.engine.engine import LoadedEngine
from llamaserve.engine.events import Delta, Finished
from llamaserve.engine.llama import start_backend
from llamaserve.engine.params import Generation, LoadParams, Sampling
from llamaserve.engine.work import MAX_TEXT
from llamaserve.errors import (
    ContextLengthExceeded,
    EngineCrashed,
    EngineError,
    InvalidRequest,
    LlamaserveError,
    ModelLoadFailed,
    Unavailable,
)
from llamaserve.worker.process import GenerationStream, WorkerProcess

_TIMEOUT = 60.0  # of a whole test: a hang is a failure
_PROMPTS = ["Once upon a time", "The three primary colours are", "2, 4, 6,"]
_GREEDY = Generation(sampling=Sampling(seed=1, temperature=0.0), max_tokens=12)
_ENDLESS = Generation(sampling=Sampling(seed=1, logit_bias={0: -100.0, 2: -100.0}), stream=True)


@pytest.fixture(scope="module")
def params(load_params: LoadParams) -> LoadParams:
    return msgspec.structs.replace(load_params, kv_cells=1024, kv_unified=True, parallel=4)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """No test leaves a child or an open file behind."""
    gc.collect()
    files = _open_files()
    yield
    gc.collect()
    assert _children() == set()
    assert _open_files() == files


def _open_files() -> int:
    return sum(1 for _ in Path("/dev/fd").iterdir())


def _children() -> set[int]:
    found = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "worker.host"], capture_output=True, text=True)
    return set(map(int, found.stdout.split()))


def _run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(_TIMEOUT):
            await test()

    asyncio.run(limited())


def _with_worker(params: LoadParams, test: Callable[[WorkerProcess], Awaitable[None]]) -> None:
    async def run() -> None:
        worker = await WorkerProcess.start("starter", params, lambda fraction: None)
        try:
            await test(worker)
        finally:
            await worker.aclose()

    _run(run)


async def _answer(stream: GenerationStream) -> tuple[str, Finished]:
    """Take a whole answer of one sequence: its text and its last event."""
    try:
        await stream.accepted()
        text = ""
        async for event in stream.events():
            text += event.text
        assert isinstance(event, Finished)
        return text, event
    finally:
        stream.close()


async def _begin(stream: GenerationStream) -> Any:
    """Wait for the first piece of an answer and return the rest."""
    await stream.accepted()
    events = stream.events()
    assert isinstance(await anext(events), Delta)
    return events


async def _drain(events: Any) -> None:
    async for _ in events:
        pass


# Equivalence


def test_the_child_says_the_same_as_this_process(params: LoadParams) -> None:
    """The same requests in the same order, so that the same cells are used; the last one reuses the first's prefix."""
    start_backend()
    expected = []
    engine = LoadedEngine(params, lambda fraction: True)
    try:
        tokens = engine.encode(_PROMPTS[0])
        prompts = [*_PROMPTS, tokens]
        for prompt in prompts:
            engine.submit(1, [engine.encode(prompt)], _GREEDY)
            while not engine.idle:
                expected += [event for event in engine.step() if isinstance(event, Finished)]
        shown = engine.vocab.detokenize(tokens, special=True)
    finally:
        engine.close()

    async def test(worker: WorkerProcess, *, stream: bool) -> None:
        generation = msgspec.structs.replace(_GREEDY, stream=stream)
        for prompt, finished in zip(prompts, expected, strict=True):
            text, last = await _answer(worker.generate([prompt], generation))
            assert text == finished.text
            assert msgspec.structs.replace(last, request=1, text=text) == finished
        assert await worker.tokenize(_PROMPTS[0], add_bos=True, parse_special=True) == tokens
        assert await worker.detokenize(tokens, special=True) == shown

    for stream in (False, True):
        _with_worker(params, partial(test, stream=stream))


def test_prompts_and_choices_of_one_request(params: LoadParams) -> None:
    async def test(worker: WorkerProcess) -> None:
        stream = worker.generate([*_PROMPTS, [1, 2]], msgspec.structs.replace(_GREEDY, choices=2, max_tokens=2))
        try:
            lengths = (await stream.accepted()).prompt_tokens
            events = [event async for event in stream.events()]
        finally:
            stream.close()
        assert len(lengths) == 4
        assert lengths[3] == 2
        assert sorted(event.index for event in events) == list(range(8))
        assert all(event.prompt_tokens == lengths[event.index // 2] for event in events if isinstance(event, Finished))

    _with_worker(params, test)


# Bad requests cost nobody else anything


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ("", InvalidRequest),
        ([], InvalidRequest),
        ([49152], InvalidRequest),
        ([-1], InvalidRequest),
        ([2**63], InvalidRequest),
        ("word " * 5000, ContextLengthExceeded),
        ([1] * 1024, ContextLengthExceeded),
    ],
    ids=range(7),
)
def test_a_bad_prompt_is_refused_and_the_child_goes_on(
    params: LoadParams, prompt: str | list[int], error: type[LlamaserveError]
) -> None:
    async def test(worker: WorkerProcess) -> None:
        stream = worker.generate([_PROMPTS[0], prompt], _GREEDY)
        with pytest.raises(error):
            await stream.accepted()
        stream.close()
        assert (await _answer(worker.generate([_PROMPTS[0]], _GREEDY)))[1].completion_tokens == 12

    _with_worker(params, test)


@pytest.mark.parametrize("prompt", ["\ud800", [2**64], [2**70]], ids=["surrogate", "2**64", "2**70"])
def test_a_prompt_that_no_message_can_carry_is_a_bad_request(params: LoadParams, prompt: str | list[int]) -> None:
    async def test(worker: WorkerProcess) -> None:
        with pytest.raises(InvalidRequest):
            await _answer(worker.generate([prompt], _GREEDY))

    _with_worker(params, test)


@pytest.mark.parametrize("splitter", ["gpt-4o", "tekken", "default"])
def test_a_long_run_of_one_character_is_tokenised(params: LoadParams, tmp_path: Path, splitter: str) -> None:
    """For these vocabularies llama.cpp splits text by a recursive regular expression, which needs much stack."""
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)] + ["Ġ", "Ċ"]
    tokens = ["<s>", "</s>", *letters, *(f"<{i}>" for i in range(261 - 2 - len(letters)))]
    path = tmp_path / "bpe.gguf"
    path.write_bytes(
        tiny_llama(
            tokenizer__ggml__model="gpt2",
            tokenizer__ggml__pre=splitter,
            tokenizer__ggml__tokens=tokens,
            tokenizer__ggml__token_type=[3, 3, *[1] * 259],
            tokenizer__ggml__merges=["a b"],
            tokenizer__ggml__scores=None,
            tokenizer__ggml__bos_token_id=0,
            tokenizer__ggml__eos_token_id=1,
        )
    )

    async def test(worker: WorkerProcess) -> None:
        for character in (" ", "a", "1", "!", "\n"):
            length = len(await worker.tokenize(character * MAX_TEXT, add_bos=False, parse_special=True))
            assert length == MAX_TEXT

    tiny = msgspec.structs.replace(params, path=str(path), context=64, kv_cells=256)
    _with_worker(tiny, test)


def test_a_bias_of_no_token_is_refused(params: LoadParams) -> None:
    async def test(worker: WorkerProcess) -> None:
        bias = Sampling(seed=1, logit_bias={49152: 1.0})
        with pytest.raises(InvalidRequest) as caught:
            await _answer(worker.generate(["a"], Generation(sampling=bias, max_tokens=1)))
        assert caught.value.param == "logit_bias"
        with pytest.raises(InvalidRequest):
            await worker.detokenize([49152], special=False)

    _with_worker(params, test)


# Stop and cancel


def test_a_stopped_answer_ends_with_what_it_has(params: LoadParams) -> None:
    async def test(worker: WorkerProcess) -> None:
        stream = worker.generate([_PROMPTS[0]], _ENDLESS)
        events = await _begin(stream)
        stream.stop()
        last = [event async for event in events][-1]
        assert isinstance(last, Finished)
        assert last.reason == "stop"
        stream.stop()  # too late, and harmless
        stream.close()
        assert (await _answer(worker.generate([_PROMPTS[0]], _GREEDY)))[1].completion_tokens == 12

    _with_worker(params, test)


def test_all_answers_can_be_stopped(params: LoadParams) -> None:
    async def test(worker: WorkerProcess) -> None:
        streams = [worker.generate([prompt], _ENDLESS) for prompt in _PROMPTS * 2]  # two of them wait for a slot
        begun = await asyncio.gather(*map(_begin, streams[:4]))
        worker.stop_all()
        for events in begun:
            assert [event async for event in events][-1].reason == "stop"
        for stream in streams[4:]:
            await stream.accepted()
            assert [event async for event in stream.events()][-1].reason == "stop"
        for stream in streams:
            stream.close()

    _with_worker(params, test)


def test_a_cancelled_answer_makes_room_and_others_go_on(params: LoadParams) -> None:
    async def test(worker: WorkerProcess) -> None:
        endless = [worker.generate([_PROMPTS[0]], _ENDLESS) for _ in range(4)]
        await asyncio.gather(*map(_begin, endless))
        waiting = asyncio.create_task(_answer(worker.generate([_PROMPTS[1]], _GREEDY)))
        await asyncio.sleep(0)
        for stream in endless:
            stream.close()
            stream.stop()  # of a request that nobody knows any more
            stream.close()
        _, last = await waiting
        assert (last.reason, last.completion_tokens) == ("length", 12)
        await worker.tokenize("a", add_bos=False, parse_special=False)
        assert (worker.occupancy.running, worker.occupancy.waiting) == (0, 0)

    _with_worker(params, test)


def test_tokenising_does_not_wait_for_running_answers(params: LoadParams) -> None:
    async def test(worker: WorkerProcess) -> None:
        stream = worker.generate([_PROMPTS[0]], _ENDLESS)
        events = await _begin(stream)
        assert await worker.tokenize("Hello", add_bos=False, parse_special=False)
        assert worker.occupancy.running == 1
        assert isinstance(await anext(events), Delta)
        stream.close()

    _with_worker(params, test)


# The end of a child


def test_a_killed_child_fails_every_open_request(params: LoadParams) -> None:
    async def test(worker: WorkerProcess) -> None:
        streams = [worker.generate([prompt], _ENDLESS) for prompt in _PROMPTS * 3]  # some of them wait for a slot
        begun = await asyncio.gather(*map(_begin, streams[:4]))
        os.kill(worker.pid, signal.SIGKILL)
        late = worker.generate(["late"], _ENDLESS)

        waits = [_drain(events) for events in begun] + [_answer(stream) for stream in (*streams[4:], late)]
        waits.append(worker.tokenize("a", add_bos=False, parse_special=False))
        outcomes = await asyncio.gather(*waits, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [EngineCrashed] * len(waits)
        assert all("SIGKILL" in str(outcome) for outcome in outcomes)
        assert worker.ended.is_set()
        assert worker.occupancy.running == 0
        with pytest.raises(EngineCrashed):
            worker.generate(["too late"], _GREEDY)
        with pytest.raises(EngineCrashed):
            await worker.tokenize("too late", add_bos=False, parse_special=False)
        worker.stop_all()
        for stream in (*streams, late):
            stream.stop()
            stream.close()

    _with_worker(params, test)


def test_what_came_before_a_crash_is_still_given(params: LoadParams) -> None:
    async def test(worker: WorkerProcess) -> None:
        stream = worker.generate([_PROMPTS[0]], _ENDLESS)
        await stream.accepted()
        before = await stream.arrived()
        assert before
        await asyncio.sleep(0.3)
        os.kill(worker.pid, signal.SIGKILL)
        await worker.ended.wait()
        rest = await stream.arrived()
        assert len(rest) > 1
        assert all(isinstance(event, Delta) for event in before + rest)
        for _ in range(2):
            with pytest.raises(EngineCrashed, match="SIGKILL"):
                await stream.arrived()
        stream.close()

    _with_worker(params, test)


def test_who_comes_late_gets_all_events_in_pieces(load_params: LoadParams) -> None:
    long = msgspec.structs.replace(_ENDLESS, max_tokens=300)

    async def test(worker: WorkerProcess) -> None:
        stream = worker.generate([_PROMPTS[0]], long)
        await stream.accepted()
        text, _ = await _answer(worker.generate([_PROMPTS[0]], long))  # began later, so it ends later
        pieces = []
        while events := await stream.arrived():
            pieces.append(events)
        assert 1 < len(pieces) < 10
        assert isinstance(pieces[-1][-1], Finished)
        assert "".join(event.text for events in pieces for event in events) == text
        stream.close()

    _with_worker(load_params, test)


def test_closing_fails_open_requests_but_is_no_crash(params: LoadParams) -> None:
    async def test(worker: WorkerProcess) -> None:
        stream = worker.generate([_PROMPTS[0]], _ENDLESS)
        events = await _begin(stream)
        await worker.aclose()
        with pytest.raises(Unavailable, match="was stopped before the request was finished") as raised:
            await _drain(events)
        stream.close()
        assert not isinstance(raised.value, EngineCrashed)

    _with_worker(params, test)


@pytest.fixture
def stuck(params: LoadParams, tmp_path: Path) -> LoadParams:
    """A file on which loading waits for ever: a pipe that nobody writes to."""
    path = tmp_path / "stuck.gguf"
    os.mkfifo(path)
    return msgspec.structs.replace(params, path=str(path))


async def _child() -> int:
    """Wait for the child to exist."""
    while not (children := await asyncio.to_thread(_children)):
        pass
    (pid,) = children
    return pid


def test_a_child_killed_while_loading_is_a_crash(stuck: LoadParams) -> None:
    async def test() -> None:
        start = asyncio.create_task(WorkerProcess.start("stuck", stuck, lambda fraction: None))
        os.kill(await _child(), signal.SIGKILL)
        with pytest.raises(EngineCrashed, match="SIGKILL"):
            await start

    _run(test)


def test_a_load_that_is_given_up_leaves_nothing(stuck: LoadParams) -> None:
    async def test() -> None:
        start = asyncio.create_task(WorkerProcess.start("stuck", stuck, lambda fraction: None))
        await _child()
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start

    _run(test)


@pytest.mark.parametrize("turns", [1, 2, 3, 5, 8])
def test_a_start_that_is_given_up_early_leaves_nothing(params: LoadParams, turns: int) -> None:
    async def test() -> None:
        start = asyncio.create_task(WorkerProcess.start("starter", params, lambda fraction: None))
        for _ in range(turns):
            await asyncio.sleep(0)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start

    _run(test)


def test_a_file_that_cannot_be_loaded(params: LoadParams, tmp_path: Path) -> None:
    async def test() -> None:
        for content in (None, b"", b"GGUF" + bytes(100)):
            path = tmp_path / "bad.gguf"
            if content is not None:
                path.write_bytes(content)
            with pytest.raises(ModelLoadFailed, match=r"bad\.gguf"):
                await WorkerProcess.start("bad", msgspec.structs.replace(params, path=str(path)), lambda fraction: None)

    _run(test)


def test_a_very_long_message_of_llama_cpp_does_no_harm(params: LoadParams, tmp_path: Path) -> None:
    """A bad file's strings come out in llama.cpp's errors, of any length."""
    path = tmp_path / "long.gguf"
    path.write_bytes(tiny_llama(general__architecture="x" * 3_000_000))

    async def test() -> None:
        with pytest.raises(ModelLoadFailed):
            await WorkerProcess.start("long", msgspec.structs.replace(params, path=str(path)), lambda fraction: None)

    _run(test)


def test_progress_is_reported_up_to_the_end(params: LoadParams) -> None:
    seen: list[float] = []

    async def test() -> None:
        worker = await WorkerProcess.start("starter", params, seen.append)
        await worker.aclose()
        await worker.aclose()  # once more is harmless

    _run(test)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert len(seen) <= 102


# The end of the parent

_PARENT = """
import asyncio, sys
import msgspec
from llamaserve.engine.params import Generation, LoadParams, Sampling
from llamaserve.worker.process import WorkerProcess

async def main(generate):
    params = msgspec.json.decode(sys.argv[1], type=LoadParams)
    worker = await WorkerProcess.start("starter", params, lambda fraction: None)
    if generate:
        stream = worker.generate(["Once"], Generation(sampling=Sampling(seed=1), stream=True))
        await stream.accepted()
        await anext(stream.events())
    print(worker.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main(sys.argv[2] == "generate"))
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="only Linux lets us wait for another's child")
@pytest.mark.parametrize("activity", ["idle", "generate"])
def test_a_child_does_not_outlive_its_parent(params: LoadParams, activity: str) -> None:
    arguments = [sys.executable, "-c", _PARENT, msgspec.json.encode(params).decode(), activity]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = os.pidfd_open(int(parent.stdout.readline()))
        try:
            parent.kill()
            parent.wait()
            ended, _, _ = select.select([child], [], [], 20)
            assert ended, "the child is still there"
        finally:
            os.close(child)


def test_a_cancel_in_a_long_prompt_is_no_error_in_the_log(params: LoadParams, caplog: pytest.LogCaptureFixture) -> None:
    async def test(worker: WorkerProcess) -> None:
        for _ in range(3):
            stream = worker.generate([[5] * 1000], _ENDLESS)
            await stream.accepted()
            while worker.occupancy.running == 0:  # noqa: ASYNC110 - it is a plain value
                await asyncio.sleep(0)
            stream.close()
            while worker.occupancy.running:  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert (await _answer(worker.generate([_PROMPTS[0]], _GREEDY)))[1].completion_tokens == 12

    _with_worker(params, test)
    assert not [record for record in caplog.records if "starter:" in record.getMessage()]


def test_prefixes_go_on_in_the_next_child(params: LoadParams, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    params = msgspec.structs.replace(params, saved_prefixes=str(path), prefixes_identity="this", spill=1 << 30)
    prompt = [5, 6, 7, 8] * 50
    texts: list[str] = []
    saved: list[int] = []

    async def test(worker: WorkerProcess) -> None:
        text, finished = await _answer(worker.generate([prompt], _GREEDY))
        assert finished.cached_tokens == (199 if texts else 0)
        texts.append(text)
        await worker.limit_spill(0)
        event = await worker.save_prefixes(path, 1 << 30)
        assert event.size == path.stat().st_size
        saved.append(event.tokens)
        with pytest.raises(EngineError, match="can't be saved"):
            await worker.save_prefixes(path / "folder", 1 << 30)

    for _ in range(2):
        _with_worker(params, test)
    assert min(saved) >= 211
