from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from llamaserve.engine.params import Generation, LoadParams, Sampling
from llamaserve.errors import (
    EngineCrashed,
    LlamaserveError,
    ModelFileMissing,
    ModelLoadFailed,
    ModelQuarantined,
)
from llamaserve.worker.supervisor import CRASH_WINDOW, Status, Supervisor

_TIMEOUT = 60.0


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Preparation:
    """Counts loads, may hold them up, and may refuse."""

    def __init__(self, params: LoadParams) -> None:
        self.params = params
        self.calls = 0
        self.go_on = threading.Event()
        self.go_on.set()
        self.error: Exception | None = None

    async def __call__(self) -> LoadParams:
        self.calls += 1
        await asyncio.to_thread(self.go_on.wait, _TIMEOUT)
        if self.error is not None:
            raise self.error
        return self.params


class Rig:
    """A supervisor with its preparation and clock."""

    def __init__(self, params: LoadParams) -> None:
        self.prepare = Preparation(params)
        self.clock = Clock()
        self.pauses: list[float] = []
        self.supervisor = Supervisor("starter", self.prepare, clock=self.clock, sleep=self._sleep)

    async def _sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.clock.now += seconds
        await asyncio.sleep(0)

    async def crash(self) -> None:
        """Load, kill the child and wait until that is noticed."""
        worker = await self.supervisor.worker()
        os.kill(worker.pid, signal.SIGKILL)
        await worker.ended.wait()
        await asyncio.sleep(0)  # the supervisor waits for the same event
        assert self.supervisor.status is not Status.LOADED


@pytest.fixture(scope="module")
def params(load_params: LoadParams) -> LoadParams:
    return msgspec.structs.replace(load_params, kv_cells=256, kv_unified=True, context=256)


def _run(params: LoadParams, test: Callable[[Rig], Awaitable[None]]) -> None:
    async def run() -> None:
        rig = Rig(params)
        async with asyncio.timeout(_TIMEOUT):
            try:
                await test(rig)
            finally:
                rig.prepare.go_on.set()
                await rig.supervisor.aclose()

    asyncio.run(run())


def test_twenty_callers_share_one_load(params: LoadParams) -> None:
    async def test(rig: Rig) -> None:
        assert rig.supervisor.status is Status.UNLOADED
        rig.prepare.go_on.clear()
        callers = [asyncio.create_task(rig.supervisor.worker()) for _ in range(20)]
        await asyncio.sleep(0)
        assert rig.supervisor.status is Status.LOADING
        assert rig.supervisor.live_worker is None
        rig.prepare.go_on.set()
        workers = await asyncio.gather(*callers)
        assert len({id(worker) for worker in workers}) == 1
        assert rig.prepare.calls == 1
        assert rig.supervisor.status is Status.LOADED
        assert rig.supervisor.live_worker is workers[0]
        assert rig.supervisor.progress == 1.0
        assert await rig.supervisor.worker() is workers[0]

    _run(params, test)


def test_a_caller_that_gives_up_does_not_stop_the_load(params: LoadParams) -> None:
    async def test(rig: Rig) -> None:
        rig.prepare.go_on.clear()
        hasty, patient = (asyncio.create_task(rig.supervisor.worker()) for _ in range(2))
        await asyncio.sleep(0)
        hasty.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hasty
        rig.prepare.go_on.set()
        worker = await patient
        assert rig.prepare.calls == 1
        assert await worker.tokenize("a", add_bos=False, parse_special=False)

    _run(params, test)


def test_a_load_that_everybody_gave_up_goes_on_for_the_next(params: LoadParams) -> None:
    async def test(rig: Rig) -> None:
        rig.prepare.go_on.clear()
        hasty = asyncio.create_task(rig.supervisor.worker())
        await asyncio.sleep(0)
        hasty.cancel()
        await asyncio.gather(hasty, return_exceptions=True)
        rig.prepare.go_on.set()
        await rig.supervisor.worker()
        assert rig.prepare.calls == 1

    _run(params, test)


@pytest.mark.parametrize("stage", ["prepare", "load"])
def test_a_failed_load_is_remembered_for_a_while(params: LoadParams, tmp_path: Path, stage: str) -> None:
    async def test(rig: Rig) -> None:
        if stage == "prepare":
            rig.prepare.error = ModelFileMissing("no weights", hint="llamaserve pull starter")
        else:
            rig.prepare.params = msgspec.structs.replace(params, path=str(tmp_path / "missing.gguf"))
        outcomes = await asyncio.gather(*(rig.supervisor.worker() for _ in range(5)), return_exceptions=True)
        expected = ModelFileMissing if stage == "prepare" else ModelLoadFailed
        assert {type(outcome) for outcome in outcomes} == {expected}
        assert rig.supervisor.status is Status.UNLOADED
        rig.clock.now += 9
        with pytest.raises(expected) as caught:
            await rig.supervisor.worker()
        assert caught.value.message == str(outcomes[0])
        assert caught.value.hint == outcomes[0].hint  # type: ignore[union-attr]
        assert rig.prepare.calls == 1
        rig.prepare.error, rig.prepare.params = None, params
        rig.clock.now += 2
        await rig.supervisor.worker()
        assert rig.prepare.calls == 2
        assert rig.supervisor.status is Status.LOADED

    _run(params, test)


def test_after_a_first_crash_the_next_request_loads_again(params: LoadParams) -> None:
    async def test(rig: Rig) -> None:
        first = await rig.supervisor.worker()
        await rig.crash()
        assert rig.supervisor.status is Status.UNLOADED
        assert rig.supervisor.live_worker is None
        second = await rig.supervisor.worker()
        assert second is not first
        assert rig.prepare.calls == 2

    _run(params, test)


def test_the_one_who_met_the_crash_may_come_back_at_once(params: LoadParams) -> None:
    """Its next call is made in the very moment in which the crash is reported."""

    async def test(rig: Rig) -> None:
        worker = await rig.supervisor.worker()
        stream = worker.generate(["Once"], Generation(sampling=Sampling(seed=1), stream=True))
        await stream.accepted()
        events = stream.events()
        await anext(events)
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(EngineCrashed):
            [event async for event in events]
        stream.close()
        again = await rig.supervisor.worker()
        assert again is not worker
        assert await again.tokenize("a", add_bos=False, parse_special=False)
        await rig.crash()
        await rig.supervisor.worker()
        assert rig.pauses == [0, 0, 5]  # both crashes were counted

    _run(params, test)


def test_pauses_and_quarantine(params: LoadParams) -> None:
    async def test(rig: Rig) -> None:
        await rig.crash()
        rig.clock.now += 1
        await rig.crash()
        rig.clock.now += 1.5
        await rig.crash()
        assert rig.pauses == [0, 0, 3.5]
        assert rig.supervisor.status is Status.QUARANTINED
        for later in (0, 100, CRASH_WINDOW - 107):
            rig.clock.now += later
            with pytest.raises(ModelQuarantined):
                await rig.supervisor.worker()
        assert rig.prepare.calls == 3
        rig.clock.now += 2  # the first crash is ten minutes old
        assert rig.supervisor.status is Status.UNLOADED
        await rig.supervisor.worker()

    _run(params, test)


def test_crashes_far_apart_are_forgiven(params: LoadParams) -> None:
    async def test(rig: Rig) -> None:
        for _ in range(4):
            await rig.crash()
            rig.clock.now += CRASH_WINDOW
        await rig.supervisor.worker()

    _run(params, test)


def test_a_crash_while_loading_counts(params: LoadParams, tmp_path: Path) -> None:
    path = tmp_path / "stuck.gguf"
    os.mkfifo(path)

    async def test(rig: Rig) -> None:
        rig.prepare.params = msgspec.structs.replace(params, path=str(path))
        for pause in (0, 10, 10):
            rig.clock.now += pause
            caller = asyncio.create_task(rig.supervisor.worker())
            os.kill(await _child(), signal.SIGKILL)
            with pytest.raises(EngineCrashed):
                await caller
        assert rig.supervisor.status is Status.QUARANTINED

    _run(params, test)


async def _child() -> int:
    while True:
        process = await asyncio.create_subprocess_exec(
            "pgrep", "-P", str(os.getpid()), "-f", "worker.host", stdout=asyncio.subprocess.PIPE
        )
        output, _ = await process.communicate()
        if output:
            return int(output)


def test_an_unexpected_error_is_not_remembered(params: LoadParams) -> None:
    async def test(rig: Rig) -> None:
        rig.prepare.error = OSError("disk")
        with pytest.raises(OSError, match="disk"):
            await rig.supervisor.worker()
        rig.prepare.error = None
        await rig.supervisor.worker()

    _run(params, test)


def test_closing_is_no_crash_and_allows_another_life(params: LoadParams) -> None:
    async def test(rig: Rig) -> None:
        for _ in range(2):
            await rig.supervisor.worker()
            await rig.supervisor.aclose()
            assert rig.supervisor.status is Status.UNLOADED
            await rig.supervisor.aclose()
        await rig.supervisor.worker()
        assert rig.prepare.calls == 3

    _run(params, test)


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_closing_while_loading_allows_another_life(params: LoadParams, turns: int) -> None:
    async def test(rig: Rig) -> None:
        rig.prepare.go_on.clear()
        caller = asyncio.create_task(rig.supervisor.worker())
        await asyncio.sleep(0)  # the load exists now, and has perhaps not begun
        for _ in range(turns):
            await asyncio.sleep(0)
        await rig.supervisor.aclose()
        rig.prepare.go_on.set()
        (outcome,) = await asyncio.gather(caller, return_exceptions=True)
        assert isinstance(outcome, BaseException)
        assert rig.supervisor.status is Status.UNLOADED
        worker = await rig.supervisor.worker()
        assert await worker.tokenize("a", add_bos=False, parse_special=False)

    _run(params, test)


def test_a_caller_is_told_when_the_server_closes_and_not_cancelled(params: LoadParams) -> None:
    """A CancelledError that nobody asked for would look to the caller's framework as if its client had left."""

    async def test(rig: Rig) -> None:
        rig.prepare.go_on.clear()
        caller = asyncio.create_task(rig.supervisor.worker())
        for _ in range(3):
            await asyncio.sleep(0)
        await rig.supervisor.aclose()
        rig.prepare.go_on.set()
        with pytest.raises(LlamaserveError):
            await caller

    _run(params, test)


def test_occupancy_of_an_unloaded_model_is_none(params: LoadParams) -> None:
    async def test(rig: Rig) -> None:
        assert (rig.supervisor.occupancy.running, rig.supervisor.occupancy.waiting) == (0, 0)
        rig.supervisor.stop_all()

    _run(params, test)
