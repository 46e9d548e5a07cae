"""A child that waits for a model: who gets it, what replaces it, and that none is left over."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from llamaserve.engine.params import LoadParams
from llamaserve.errors import EngineCrashed, ModelLoadFailed, Unavailable
from llamaserve.worker import child as child_module, spare
from llamaserve.worker.child import Child
from llamaserve.worker.process import WorkerProcess
from llamaserve.worker.spare import Spares

_TIMEOUT = 60.0


@pytest.fixture(scope="module")
def params(load_params: LoadParams) -> LoadParams:
    return msgspec.structs.replace(load_params, kv_cells=256, context=256, kv_unified=True)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spare, "_PAUSE", 0.0)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
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


class Starts:
    """Starts children as usual, and counts them; or starts what ``command`` says in their place."""

    def __init__(self) -> None:
        self.children: list[Child] = []
        self.command: list[str] | None = None

    async def __call__(self, name: str) -> Child:
        with pytest.MonkeyPatch.context() as patched:
            if self.command is not None:
                command = self.command
                patched.setattr(child_module, "_command", lambda descriptor: [*command, "worker.host"])
            child = await Child.start(name)
        self.children.append(child)
        return child


def _run(test: Callable[[Spares, Starts], Awaitable[None]]) -> None:
    async def run() -> None:
        starts = Starts()
        spares = Spares(starts)
        async with asyncio.timeout(_TIMEOUT):
            try:
                await test(spares, starts)
            finally:
                await spares.aclose()
                assert spares.pid is None

    asyncio.run(run())


async def _load(params: LoadParams, spares: Spares) -> WorkerProcess:
    return await WorkerProcess.start("starter", params, lambda fraction: None, spares)


async def _spare(spares: Spares) -> int:
    """Wait for a spare that is up, and return its process id."""
    while spares.pid is None:  # noqa: ASYNC110 - it is a plain value
        await asyncio.sleep(0.01)
    child = spares._child
    assert child is not None
    assert await child.up()
    assert child.pid in await asyncio.to_thread(_children)
    return child.pid


def test_the_spare_becomes_the_next_models_and_is_replaced(params: LoadParams) -> None:
    async def test(spares: Spares, starts: Starts) -> None:
        spares.keep = True
        first = await _spare(spares)
        worker = await _load(params, spares)
        try:
            assert worker.pid == first
            assert await worker.tokenize("Hello", add_bos=False, parse_special=False)
            second = await _spare(spares)
            assert second != first
            assert len(starts.children) == 2
        finally:
            await worker.aclose()
        assert spares.pid == second

    _run(test)


def test_none_is_kept_unless_it_is_asked_for(params: LoadParams) -> None:
    async def test(spares: Spares, starts: Starts) -> None:
        worker = await _load(params, spares)
        await worker.aclose()
        await asyncio.sleep(0.1)
        assert spares.pid is None
        assert len(starts.children) == 1
        spares.keep = True
        pid = await _spare(spares)
        spares.keep = True
        assert spares.pid == pid
        spares.keep = False
        assert spares.pid is None
        while pid in await asyncio.to_thread(_children):
            pass

    _run(test)


def test_a_load_without_spares_goes_as_ever(params: LoadParams) -> None:
    async def test(spares: Spares, starts: Starts) -> None:
        worker = await WorkerProcess.start("starter", params, lambda fraction: None)
        await worker.aclose()
        assert not starts.children

    _run(test)


def test_no_spare_is_started_while_a_model_is_loaded(params: LoadParams) -> None:
    async def test(spares: Spares, starts: Starts) -> None:
        with spares.loading():
            spares.keep = True
            with spares.loading():
                pass
            await asyncio.sleep(0.1)
            assert not starts.children
        await _spare(spares)
        assert len(starts.children) == 1

    _run(test)


def test_a_load_begins_before_the_pause_is_over(params: LoadParams, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spare, "_PAUSE", 1000.0)

    async def test(spares: Spares, starts: Starts) -> None:
        spares.keep = True
        worker = await _load(params, spares)
        await worker.aclose()
        assert [child.pid for child in starts.children] == [worker.pid]

    _run(test)


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 50])
def test_a_start_that_is_given_up_leaves_nothing(params: LoadParams, turns: int) -> None:
    async def test(spares: Spares, starts: Starts) -> None:
        for known in (False, True):
            if known:
                await spares.hardware()
            start = asyncio.create_task(_load(params, spares))
            for _ in range(turns):
                await asyncio.sleep(0)
            start.cancel()
            with pytest.raises(asyncio.CancelledError):
                await start

    _run(test)


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 50])
def test_closing_at_any_moment_leaves_nothing(turns: int) -> None:
    async def test(spares: Spares, starts: Starts) -> None:
        spares.keep = True
        asking = asyncio.create_task(spares.hardware())
        for _ in range(turns):
            await asyncio.sleep(0)
        await spares.aclose()
        await asyncio.gather(asking, return_exceptions=True)
        assert spares.pid is None

    _run(test)


def test_the_spare_is_not_lost_by_a_load_that_fails(params: LoadParams, tmp_path: Path) -> None:
    async def test(spares: Spares, starts: Starts) -> None:
        spares.keep = True
        first = await _spare(spares)
        with pytest.raises(ModelLoadFailed, match="missing"):
            await _load(msgspec.structs.replace(params, path=str(tmp_path / "missing")), spares)
        assert await _spare(spares) != first

    _run(test)


def test_two_loads_at_once_have_a_child_each(params: LoadParams) -> None:
    async def test(spares: Spares, starts: Starts) -> None:
        spares.keep = True
        await _spare(spares)
        workers = await asyncio.gather(_load(params, spares), _load(params, spares))
        try:
            assert len({worker.pid for worker in workers}) == 2
        finally:
            await asyncio.gather(*(worker.aclose() for worker in workers))

    _run(test)


def test_a_spare_that_dies_is_replaced(params: LoadParams, caplog: pytest.LogCaptureFixture) -> None:
    async def test(spares: Spares, starts: Starts) -> None:
        spares.keep = True
        first = await _spare(spares)
        os.kill(first, signal.SIGKILL)
        while spares.pid == first:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert await _spare(spares) != first
        worker = await _load(params, spares)
        await worker.aclose()
        assert len(starts.children) >= 2

    _run(test)
    assert "the spare process was ended by SIGKILL" in caplog.text


@pytest.mark.parametrize("error", [OSError("no more processes"), EngineCrashed("the fork server is gone")])
def test_a_spare_that_cannot_be_started_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(spare, "_PAUSE_AFTER_DEATH", 0.05)

    async def test(spares: Spares, starts: Starts) -> None:
        failures = [error, error]

        async def start(name: str) -> Child:
            if failures:
                raise failures.pop()
            return await starts(name)

        spares._start = start
        spares.keep = True
        await _spare(spares)

    _run(test)
    assert caplog.text.count("no spare process can be started") == 2


def test_a_spare_that_has_just_died_is_not_used(params: LoadParams) -> None:
    async def test(spares: Spares, starts: Starts) -> None:
        spares.keep = True
        first = await _spare(spares)
        os.kill(first, signal.SIGKILL)
        while not starts.children[0].ended:  # noqa: ASYNC110
            await asyncio.sleep(0)
        worker = await _load(params, spares)
        await worker.aclose()
        assert worker.pid != first

    _run(test)


@pytest.mark.parametrize("way", ["ends", "hangs", "talks"])
def test_a_spare_that_never_comes_up_does_not_stop_a_load(
    params: LoadParams, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    limits = {"hangs": 0.5}
    scripts = {
        "ends": "raise SystemExit('no llama.cpp')",
        "hangs": "import time; time.sleep(1000)",
        "talks": "import os; os.write(int(os.listdir('/dev/fd')[3]), bytes(9))",
    }

    async def test(spares: Spares, starts: Starts) -> None:
        monkeypatch.setattr(child_module, "_START_LIMIT", limits.get(way, 10.0))
        starts.command = [sys.executable, "-c", scripts[way]]
        spares.keep = True
        while not starts.children:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await asyncio.sleep(0)  # its time has begun
        starts.command = None
        monkeypatch.setattr(child_module, "_START_LIMIT", 10.0)
        worker = await _load(params, spares)
        await worker.aclose()
        assert worker.pid != starts.children[0].pid

    _run(test)


def test_spares_that_always_die_are_not_started_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(1000 if len(pauses) > 4 else 0)

    monkeypatch.setattr(spare, "_PAUSE_AFTER_DEATH", 10.0)
    monkeypatch.setattr(spare, "_LONGEST_PAUSE", 60.0)
    monkeypatch.setattr(spare.asyncio, "sleep", noted)

    async def test(spares: Spares, starts: Starts) -> None:
        starts.command = [sys.executable, "-c", "raise SystemExit(7)"]
        spares.keep = True
        while len(pauses) < 5:
            await sleep(0.01)
        assert pauses == [spare._PAUSE, 10, 20, 40, 60]

    _run(test)


def test_the_hardware_is_asked_once_and_the_child_is_then_a_spare(params: LoadParams) -> None:
    async def test(spares: Spares, starts: Starts) -> None:
        assert spares.devices is None
        answers = await asyncio.gather(*(spares.hardware() for _ in range(3)))
        assert answers == [answers[0]] * 3
        assert spares.devices == answers[0]
        assert len(starts.children) == 1
        worker = await _load(params, spares)
        await worker.aclose()
        assert worker.pid == starts.children[0].pid
        assert await spares.hardware() == answers[0]
        assert len(starts.children) == 1

    _run(test)


def test_a_load_may_take_the_child_that_is_still_being_asked(params: LoadParams) -> None:
    async def test(spares: Spares, starts: Starts) -> None:
        asking = asyncio.create_task(spares.hardware())
        while not starts.children:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        worker = await _load(params, spares)
        await worker.aclose()
        assert await asking == []
        assert len(starts.children) == 1

    _run(test)


def test_hardware_that_nothing_can_be_learnt_of_is_an_error() -> None:
    async def test(spares: Spares, starts: Starts) -> None:
        starts.command = [sys.executable, "-c", "raise SystemExit('no library')"]
        with pytest.raises(EngineCrashed, match="no library"):
            await spares.hardware()
        starts.command = None
        assert await spares.hardware() == []
        await spares.aclose()
        spares.devices = None
        with pytest.raises(Unavailable):
            await spares.hardware()

    _run(test)


def test_what_the_load_took_is_measured(params: LoadParams) -> None:
    async def test(spares: Spares, starts: Starts) -> None:
        sizes = []
        for cells in (256, 8192):
            worker = await _load(msgspec.structs.replace(params, kv_cells=cells, context=256), spares)
            sizes.append(worker.memory.host)
            assert worker.memory.device == 0
            await worker.aclose()
        assert 80e6 < sizes[0] < 400e6
        assert sizes[1] - sizes[0] == pytest.approx((8192 - 256) * 23040, rel=0.25)  # 30 layers, 3 heads of 64, 16 bits

    _run(test)


def test_after_the_end_none_is_wanted_whatever_is_asked_for() -> None:
    async def test(spares: Spares, starts: Starts) -> None:
        await spares.aclose()
        spares.keep = True
        assert not spares.keep
        await asyncio.sleep(0.05)
        assert starts.children == []

    _run(test)
