"""Children that are forked: that they do what programs do, how they end, and that none is left over."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
from child_processes import model_processes

from llamaserve.engine.params import Generation, LoadParams, Sampling
from llamaserve.errors import EngineCrashed, ModelLoadFailed, Unavailable
from llamaserve.worker import fork_server, fork_server_main
from llamaserve.worker.child import Child, environment
from llamaserve.worker.fork_server import ForkServer
from llamaserve.worker.process import WorkerProcess
from llamaserve.worker.spare import Spares

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="for Linux")

_TIMEOUT = 60.0


@pytest.fixture(scope="module")
def params(load_params: LoadParams) -> LoadParams:
    return msgspec.structs.replace(load_params, kv_cells=256, context=256, kv_unified=True)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    gc.collect()
    files, children = _entries("self/fd"), psutil.Process().children()
    yield
    gc.collect()
    assert psutil.Process().children() == children
    assert _entries("self/fd") == files


def _run(test: Callable[[ForkServer], Awaitable[None]]) -> None:
    async def run() -> None:
        forks = ForkServer()
        async with asyncio.timeout(_TIMEOUT):
            try:
                await test(forks)
            finally:
                await forks.aclose()

    asyncio.run(run())


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


def _server_of(child: Child) -> int:
    above = psutil.Process(child.pid).parent()
    assert above is not None
    return above.pid


def _files(pid: int) -> int:
    return _entries(f"{pid}/fd")


def _entries(folder: str) -> int:
    return sum(1 for _ in Path("/proc", folder).iterdir())


async def _text(worker: WorkerProcess) -> str:
    stream = worker.generate(
        ["Once upon a time"], Generation(sampling=Sampling(seed=1, temperature=0.0), max_tokens=12)
    )
    try:
        await stream.accepted()
        return "".join([event.text async for event in stream.events()])
    finally:
        stream.close()


def test_a_fork_answers_as_a_program_of_its_own_does(params: LoadParams) -> None:
    async def test(forks: ForkServer) -> None:
        texts = []
        for spares in (Spares(), Spares(forks.start)):
            worker = await WorkerProcess.start("starter", params, lambda fraction: None, spares)
            try:
                texts.append(await _text(worker))
            finally:
                await worker.aclose()
                await spares.aclose()
        assert texts[0] == texts[1] != ""

    _run(test)


def test_all_are_forked_by_one_process_that_stays_as_it_was(params: LoadParams) -> None:
    async def test(forks: ForkServer) -> None:
        assert forks.pid is None
        first = await forks.start("first")
        assert forks.pid == _server_of(first)
        await first.up()
        files = _files(_server_of(first)), _files(first.pid)
        second, third = await asyncio.gather(forks.start("second"), forks.start("third"))
        for child in (second, third):
            assert _server_of(child) == _server_of(first)
            assert await child.up()
            assert child.devices == first.devices
            assert _files(child.pid) == files[1]  # no ends of the others' sockets
        spares = Spares(forks.start)
        worker = await WorkerProcess.start("starter", params, lambda fraction: None, spares)
        assert _entries(f"{forks.pid}/task") == 1
        await worker.aclose()
        for child in (first, second, third):
            await child.aclose()
        await spares.aclose()
        assert forks.pid is not None
        await _until(lambda: _files(forks.pid or 0) == files[0] - 1)
        assert model_processes() == set()

    _run(test)


def test_how_a_fork_ended_is_heard_of() -> None:
    async def test(forks: ForkServer) -> None:
        good, killed, failed = [await forks.start(name) for name in ("good", "killed", "failed")]
        assert all([await child.up() for child in (good, killed, failed)])
        os.kill(killed.pid, signal.SIGKILL)
        failed.write(b"what is this?")
        await asyncio.gather(killed.closed(), failed.closed())
        assert killed.end == "was ended by SIGKILL"
        assert failed.end.startswith("ended with exit code 1 (")
        assert "ValidationError" in failed.end
        assert not good.ended
        good.kill()
        good.kill()
        await good.closed()
        assert good.end == "was ended by SIGKILL"
        good.kill()
        for child in (good, killed, failed):
            await child.aclose()

    _run(test)


def test_signals_that_come_to_all_processes_are_left_to_the_api_process() -> None:
    async def test(forks: ForkServer) -> None:
        child = await forks.start("child")
        assert await child.up()
        assert forks.pid is not None
        for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(child.pid, sent)
            os.kill(forks.pid, sent)
        other = await forks.start("other")
        assert await other.up()
        assert not child.ended
        for each in (child, other):
            await each.aclose()
            assert each.end == "ended"

    _run(test)


@pytest.mark.parametrize("closed", [False, True])
def test_forks_are_started_by_a_process_without_standard_error(closed: bool) -> None:
    script = (
        "import asyncio\n"
        "from llamaserve.worker.fork_server import ForkServer\n"
        "async def main():\n"
        "    forks = ForkServer()\n"
        "    child = await forks.start('child')\n"
        "    print(await child.up())\n"
        "    await child.aclose()\n"
        "    await forks.aclose()\n"
        "asyncio.run(main())\n"
    )
    command = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(script)}" + (" 2>&-" if closed else "")
    done = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, text=True, timeout=_TIMEOUT)
    assert done.stdout == "True\n"


def test_a_fork_of_which_nothing_is_wanted_ends_by_itself() -> None:
    async def test(forks: ForkServer) -> None:
        child = await forks.start("unused")
        assert await child.up()
        await child.aclose()
        assert child.end == "ended"

    _run(test)


def test_a_load_that_fails_in_a_fork_is_said(params: LoadParams, tmp_path: Path) -> None:
    async def test(forks: ForkServer) -> None:
        spares = Spares(forks.start)
        missing = msgspec.structs.replace(params, path=str(tmp_path / "missing"))
        with pytest.raises(ModelLoadFailed, match="missing"):
            await WorkerProcess.start("starter", missing, lambda fraction: None, spares)
        await spares.aclose()

    _run(test)


def test_the_end_of_the_fork_server_ends_its_forks_and_the_next_start_brings_a_new_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test(forks: ForkServer) -> None:
        children = [await forks.start(name) for name in ("up", "early")]
        assert await children[0].up()
        former = forks.pid
        assert former is not None
        os.kill(former, signal.SIGKILL)
        for child in children:
            await child.closed()
            assert child.end == "was ended by SIGKILL"
            await child.aclose()
        assert forks._program is not None
        await forks._program.wait()
        child = await forks.start("new")
        assert await child.up()
        assert forks.pid != former
        await child.aclose()

    _run(test)
    assert "has ended; a new one is started" in caplog.text


def test_a_fork_server_that_ends_at_once_fails_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    async def false(control: int) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec("false")

    monkeypatch.setattr(fork_server, "_execute", false)

    async def test(forks: ForkServer) -> None:
        with pytest.raises(EngineCrashed, match="has ended"):
            await forks.start("vain")

    _run(test)


def test_a_fork_server_that_hangs_fails_the_start_and_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    execute = fork_server._execute
    monkeypatch.setattr(fork_server, "_START_LIMIT", 0.3)

    async def stopped(control: int) -> asyncio.subprocess.Process:
        process = await execute(control)
        process.send_signal(signal.SIGSTOP)
        return process

    monkeypatch.setattr(fork_server, "_execute", stopped)

    async def test(forks: ForkServer) -> None:
        with pytest.raises(EngineCrashed, match="has ended"):
            await forks.start("vain")
        monkeypatch.undo()
        while True:  # until its end is noticed
            try:
                child = await forks.start("next")
                break
            except EngineCrashed:
                await asyncio.sleep(0.01)
        assert await child.up()
        await child.aclose()

    _run(test)


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("turns", [0, 1, 2, 3, 4, 5, 8, 20, 100])
def test_a_start_that_is_given_up_leaves_nothing(up: bool, turns: int) -> None:
    async def test(forks: ForkServer) -> None:
        if up:
            await (await forks.start("before")).aclose()
        start = asyncio.create_task(forks.start("vain"))
        for _ in range(turns):
            await asyncio.sleep(0)
        start.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await start).aclose()
        await _until(lambda: model_processes() == set())

    _run(test)


@pytest.mark.parametrize("turns", [0, 1, 3, 10, 100])
def test_closing_at_any_moment_leaves_nothing(turns: int) -> None:
    async def test(forks: ForkServer) -> None:
        start = asyncio.create_task(forks.start("vain"))
        for _ in range(turns):
            await asyncio.sleep(0)
        await forks.aclose()
        with contextlib.suppress(EngineCrashed, Unavailable):
            await (await start).aclose()
        with pytest.raises(Unavailable):
            await forks.start("late")

    _run(test)


def test_the_fork_server_ends_after_its_forks() -> None:
    async def test(forks: ForkServer) -> None:
        children = [await forks.start(name) for name in ("first", "second")]
        os.kill(children[0].pid, signal.SIGSTOP)  # it could not end by itself
        await forks.aclose()
        assert not any(psutil.pid_exists(child.pid) for child in children)
        for child in children:
            await child.closed()
            await child.aclose()

    _run(test)


def test_a_fork_server_that_hangs_is_ended_by_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_server, "_EXIT_GRACE", 0.2)

    async def test(forks: ForkServer) -> None:
        child = await forks.start("child")
        assert await child.up()
        assert forks.pid is not None
        os.kill(forks.pid, signal.SIGSTOP)
        await forks.aclose()
        await child.closed()
        assert child.end == "was ended by SIGKILL"
        await child.aclose()

    _run(test)


def test_a_fork_that_the_system_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise OSError(errno.EAGAIN, "no more processes")

    monkeypatch.setattr(os, "fork", refuse)
    control, _ = pair = socket.socketpair()
    channel, its_channel = socket.socketpair()
    server = fork_server_main._ForkServer(control)
    assert (
        server._fork(os.open(os.devnull, os.O_RDONLY), os.open(os.devnull, os.O_RDONLY), its_channel.detach()) is None
    )
    assert fork_server.NUMBER.unpack(channel.recv(100)) == (-errno.EAGAIN,)
    assert channel.recv(1) == b""
    server._leave()
    for each in (*pair, channel):
        each.close()


def test_no_secret_is_in_the_environment_of_a_process_that_reads_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMASERVE_API_KEY", "sk-1")
    monkeypatch.setenv("HF_TOKEN", "hf-1")
    monkeypatch.setenv("HF_HOME", "/models")
    found = environment()
    assert found["HF_HOME"] == "/models"
    assert found["GOMP_SPINCOUNT"] == os.environ.get("GOMP_SPINCOUNT", "1000")
    assert not {"LLAMASERVE_API_KEY", "HF_TOKEN"} & found.keys()
