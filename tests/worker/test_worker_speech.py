"""Speech in a child: the same as in this process, in order, and nothing goes on that nobody waits for."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from audio_files import RATE, SPEECH_SECONDS, speech
from gguf_writer import tiny_llama

from llamaserve.engine.events import Occupancy
from llamaserve.engine.params import Embedding, Generation, LoadParams, Sampling
from llamaserve.engine.transcriber import LoadedTranscriber
from llamaserve.errors import EngineCrashed, EngineError, LlamaserveError, ModelLoadFailed, ModelNotCapable, Unavailable
from llamaserve.speech.values import Heard, Transcribed, TranscriberParams, Transcription
from llamaserve.worker.process import TranscriptionStream, WorkerProcess
from llamaserve.worker.supervisor import Supervisor

_TIMEOUT = 100.0  # of a whole test: a hang is a failure
_FREED = 2.0  # seconds of a core after which nothing is done any more for who has left
_PLAIN = Transcription(language="en")
_GREEDY = Generation(sampling=Sampling(seed=1, temperature=0.0), max_tokens=4)


@pytest.fixture(scope="module")
def params(speech_model: Path) -> TranscriberParams:
    return TranscriberParams(path=str(speech_model), threads=2, adaptive_threads=False, gpu=False)


@pytest.fixture(scope="module")
def tiny_params(load_params: LoadParams, tmp_path_factory: pytest.TempPathFactory) -> LoadParams:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    path.write_bytes(tiny_llama())
    return msgspec.structs.replace(load_params, path=str(path), context=128, kv_cells=512, threads=1)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The speech, which takes one window."""
    return _stored(tmp_path_factory.mktemp("audio") / "clip", 1)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half an hour of speech."""
    return _stored(tmp_path_factory.mktemp("audio") / "long", 160)


def _stored(path: Path, times: int) -> Path:
    path.write_bytes(speech().tobytes() * times)
    return path


def _with_worker(params: TranscriberParams | LoadParams, test: Callable[[WorkerProcess], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(_TIMEOUT):
            worker = await WorkerProcess.start("whisper", params, lambda fraction: None)
            try:
                await test(worker)
            finally:
                await worker.aclose()

    asyncio.run(run())


def _hear(
    worker: WorkerProcess, samples: Path, transcription: Transcription = _PLAIN, share: str = ""
) -> TranscriptionStream:
    """Have a file transcribed, of which there is another name since this one is deleted."""
    path = samples.with_name(f"{samples.name}-{uuid.uuid4()}")
    path.hardlink_to(samples)
    return worker.transcribe(path, transcription, share=share)


async def _events(stream: TranscriptionStream) -> list[Heard | Transcribed]:
    try:
        return [event async for event in stream.events()]
    finally:
        stream.close()


async def _refused(call: Awaitable[object], error: type[LlamaserveError]) -> None:
    with pytest.raises(error) as caught:
        await call
    assert type(caught.value) is error


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - occupancy is a plain value
        await asyncio.sleep(0)


# What is heard


def test_the_child_hears_the_same_as_this_process(params: TranscriberParams, clip: Path) -> None:
    transcriber = LoadedTranscriber(params, lambda fraction: True)
    transcriber.submit(1, clip, _PLAIN)
    expected = transcriber.step()
    assert transcriber.idle
    transcriber.close()

    async def test(worker: WorkerProcess) -> None:
        assert not worker.gpu
        assert worker.memory.host > 50e6
        stream = _hear(worker, clip)
        assert stream.progress is None
        assert await _events(stream) == expected
        assert [event async for event in stream.events()] == []
        await _until(lambda: worker.occupancy == Occupancy())

    _with_worker(params, test)


def test_a_file_has_no_name_any_more_once_it_is_open(params: TranscriberParams, long: Path) -> None:
    async def test(worker: WorkerProcess) -> None:
        names = [long.with_name(name) for name in ("first", "second")]
        for path in names:
            path.hardlink_to(long)
        streams = [worker.transcribe(path, _PLAIN) for path in names]
        await _until(lambda: not any(path.exists() for path in names))
        assert await anext(streams[1].events())
        for stream in streams:
            stream.close()

    _with_worker(params, test)


@pytest.mark.parametrize("file", ["clip", "nowhere"])
def test_its_end_is_told_though_nobody_reads(params: TranscriberParams, clip: Path, file: str) -> None:
    async def test(worker: WorkerProcess) -> None:
        stream = _hear(worker, clip) if file == "clip" else worker.transcribe(clip.with_name(file), _PLAIN)
        over = asyncio.Event()
        stream.when_over(over.set)
        await over.wait()
        assert stream.failed == (file == "nowhere")
        if not stream.failed:
            assert "country" in _text(await _events(stream))

    _with_worker(params, test)


def test_requests_at_once_are_answered_in_order(params: TranscriberParams, clip: Path) -> None:
    async def test(worker: WorkerProcess) -> None:
        streams = [_hear(worker, clip) for _ in range(4)]
        ended: list[int] = []

        async def answer(number: int) -> list[Heard | Transcribed]:
            events = await _events(streams[number])
            ended.append(number)
            return events

        answers = await asyncio.gather(*map(answer, range(4)))
        assert ended == list(range(4))
        assert len({_text(events) for events in answers}) == 1
        assert "country" in _text(answers[0])

    _with_worker(params, test)


def test_a_request_does_not_wait_for_many_of_another_share(params: TranscriberParams, clip: Path) -> None:
    async def test(worker: WorkerProcess) -> None:
        streams = [_hear(worker, clip, share=share) for share in "aaaab"]
        ended = ""

        async def answer(number: int) -> None:
            nonlocal ended
            assert "country" in _text(await _events(streams[number]))
            ended += "aaaab"[number]

        await asyncio.gather(*map(answer, range(5)))
        assert ended in ("abaaa", "aabaa"), "the other's comes while the first or the second is heard"

    _with_worker(params, test)


def _text(events: list[Heard | Transcribed]) -> str:
    return "".join(segment.text for event in events if isinstance(event, Heard) for segment in event.segments)


def test_segments_and_progress_come_while_it_goes_on(params: TranscriberParams, long: Path) -> None:
    async def test(worker: WorkerProcess) -> None:
        stream, other = _hear(worker, long), _hear(worker, long)
        await _until(lambda: other.progress is not None)
        assert other.progress is not None
        assert other.progress.place == 2
        event = await anext(stream.events())
        assert isinstance(event, Heard)
        assert event.segments
        assert 20 < event.seconds <= 30
        await _until(lambda: stream.progress is not None and not stream.progress.place)
        assert stream.progress is not None
        assert stream.progress.evaluated == int(event.seconds)
        assert stream.progress.prompt_tokens == 160 * SPEECH_SECONDS
        stream.close()
        other.close()

    _with_worker(params, test)


# Giving up


def test_work_that_nobody_waits_for_ends_at_once(params: TranscriberParams, long: Path, clip: Path) -> None:
    """Also when several leave at the same time; who stays is answered."""

    async def test(worker: WorkerProcess) -> None:
        child = psutil.Process(worker.pid)
        streams = [_hear(worker, long) for _ in range(3)]
        await _until(lambda: worker.occupancy == Occupancy(1, 2))
        await asyncio.sleep(0.1)  # the first window is under way
        before = sum(child.cpu_times()[:2])
        for stream in streams:
            stream.close()
        await _until(lambda: worker.occupancy == Occupancy())
        assert sum(child.cpu_times()[:2]) - before < _FREED
        assert "country" in _text(await _events(_hear(worker, clip, _PLAIN)))

    _with_worker(params, test)


def test_a_stop_of_all_answers_lets_speech_be(params: TranscriberParams, clip: Path) -> None:
    async def test(worker: WorkerProcess) -> None:
        task = asyncio.create_task(_events(_hear(worker, clip, _PLAIN)))
        await _until(lambda: worker.occupancy.running == 1)
        worker.stop_all()
        assert "country" in _text(await task)

    _with_worker(params, test)


# What is refused


def test_a_speech_model_does_nothing_else(params: TranscriberParams, clip: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_bytes(b"")

    async def test(worker: WorkerProcess) -> None:
        stream = worker.generate(["Once"], _GREEDY)
        await _refused(stream.accepted(), ModelNotCapable)
        stream.close()
        await _refused(worker.embed(["a"], Embedding()), ModelNotCapable)
        await _refused(worker.rank("a", ["b"]), ModelNotCapable)
        await _refused(worker.tokenize("a", add_bos=True, parse_special=True), ModelNotCapable)
        await _refused(worker.detokenize([1], special=True), ModelNotCapable)
        await _refused(worker.set_adapters([]), ModelNotCapable)
        await _refused(worker.save_prefixes(tmp_path / "prefixes", 1), ModelNotCapable)
        await worker.limit_spill(0)  # there is nothing to limit
        await _refused(_events(worker.transcribe(tmp_path / "nowhere", _PLAIN)), EngineError)
        await _refused(_events(_hear(worker, clip, Transcription(language="xx"))), EngineError)
        events = await _events(_hear(worker, empty, _PLAIN))
        assert events == [Heard(events[0].request, [], 0), Transcribed(events[0].request, "en", 0)]

    _with_worker(params, test)


@pytest.mark.parametrize("pooling", [None, "mean"])
def test_a_model_of_texts_hears_nothing(tiny_params: LoadParams, clip: Path, pooling: Any) -> None:
    async def test(worker: WorkerProcess) -> None:
        await _refused(_events(_hear(worker, clip, _PLAIN)), ModelNotCapable)
        assert await worker.tokenize("a", add_bos=True, parse_special=True)

    _with_worker(msgspec.structs.replace(tiny_params, pooling=pooling, prefix_cache=False, speculation=False), test)


def test_a_file_that_is_damaged_is_not_loaded(params: TranscriberParams, speech_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.bin"
    path.write_bytes(speech_model.read_bytes()[: 10 << 20])
    with pytest.raises(ModelLoadFailed, match=r"cut\.bin"):
        _with_worker(msgspec.structs.replace(params, path=str(path)), lambda worker: asyncio.sleep(0))


# The end of a child


def test_a_killed_child_fails_its_requests_and_another_follows(params: TranscriberParams, clip: Path) -> None:
    async def prepare() -> TranscriberParams:
        return params

    async def run() -> None:
        supervisor = Supervisor("whisper", prepare)
        try:
            worker = await supervisor.worker()
            tasks = [asyncio.create_task(_events(_hear(worker, clip, _PLAIN))) for _ in range(3)]
            await _until(lambda: worker.occupancy.running == 1)
            os.kill(worker.pid, signal.SIGKILL)
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [EngineCrashed] * 3
            await worker.ended.wait()
            assert worker.occupancy == Occupancy()
            with pytest.raises(EngineCrashed):
                _hear(worker, clip)
            another = await supervisor.worker()
            assert "country" in _text(await _events(_hear(another, clip, _PLAIN)))
        finally:
            await supervisor.aclose()

    asyncio.run(asyncio.wait_for(run(), _TIMEOUT))


def test_closing_fails_open_requests(params: TranscriberParams, long: Path) -> None:
    async def test(worker: WorkerProcess) -> None:
        task = asyncio.create_task(_events(_hear(worker, long, _PLAIN)))
        await _until(lambda: worker.occupancy.running == 1)
        await worker.aclose()
        with pytest.raises(Unavailable):
            await task

    _with_worker(params, test)


# Memory


def test_a_long_audio_is_not_in_memory(params: TranscriberParams, long: Path) -> None:
    """But for the window that is listened to."""
    size = long.stat().st_size
    assert size == 160 * SPEECH_SECONDS * RATE * 2

    async def test(worker: WorkerProcess) -> None:
        child = psutil.Process(worker.pid)
        stream = _hear(worker, long)
        events = stream.events()
        for _ in range(4):  # until the text before a window is as long as it may be
            await anext(events)
        before = child.memory_info().rss
        await anext(events)
        await anext(events)
        assert child.memory_info().rss - before < size / 4
        stream.close()

    _with_worker(params, test)
