"""Memory that is free again: the server's threads keep it together, and it goes back to the operating system."""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Semaphore

import psutil
import pytest
from running_server import RunningServer

from llamaserve import heap
from llamaserve.app import create_app
from llamaserve.registry.cache import cache_folder
from llamaserve.registry.spec import load_registry
from llamaserve.serving import make_pool
from llamaserve.settings import Settings

glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this C library is not glibc")

_MIB = 1024 * 1024
_ARENA = 64 * _MIB  # which glibc reserves for one, and uses as much of as it needs
_REGION = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S+)")
_AT_ONCE = 6


def arenas_of_threads(maps: str) -> int:
    """Return how many arenas a process has beside the first, by what ``/proc`` says of its memory."""
    found, arena = 0, -1
    for line in maps.splitlines():
        region = _REGION.match(line)
        assert region is not None
        begin, end, rights = int(region[1], 16), int(region[2], 16), region[3]
        if rights == "rw-p" and begin % _ARENA == 0:
            arena = begin
        found += rights == "---p" and arena >= 0 and end == arena + _ARENA
    return found


_THREADS = """
import ctypes, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from llamaserve import heap
from llamaserve.app import create_app
from llamaserve.registry.cache import cache_folder
from llamaserve.registry.spec import load_registry
from llamaserve.serving import make_pool
from llamaserve.settings import Settings

if sys.argv[1] == "one":
    heap.use_one_arena()
together, libc = Barrier(6), ctypes.CDLL(None)


def use(_number):
    libc.malloc(ctypes.c_size_t(1000))
    together.wait()


with ThreadPoolExecutor(6) as threads:
    list(threads.map(use, range(6)))
print(Path("/proc/self/maps").read_text(), end="")
"""


@glibc
@pytest.mark.parametrize(("how", "several"), [("each", True), ("one", False)])
def test_threads_share_one_arena(how: str, several: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name and "GLIBC" not in name}
    done = subprocess.run(
        [sys.executable, "-c", _THREADS, how], capture_output=True, text=True, check=True, env=environment
    )
    assert (arenas_of_threads(done.stdout) > 1) is several


@glibc
@pytest.mark.parametrize("command", ["serve", "run"])  # of which the second may show how much is fetched, in a thread
def test_threads_of_a_server_share_one_arena(starter_model: Path, command: str) -> None:
    assert starter_model.is_file()
    with RunningServer(command, environment={"LLAMASERVE_CACHE": str(cache_folder())}) as running:
        process = psutil.Process(running.get("/v1/internal/status")["pid"])
        before = process.num_threads()
        with ThreadPoolExecutor(_AT_ONCE) as clients:
            list(clients.map(lambda _: running.get("/v1/internal/status"), range(20 * _AT_ONCE)))
        assert process.num_threads() > before, "threads have answered"
        assert arenas_of_threads(Path(f"/proc/{process.pid}/maps").read_text()) == 0


@glibc
def test_freed_memory_goes_back() -> None:
    libc, size = ctypes.CDLL(None), 64 * 1024  # too small for memory of its own
    libc.malloc.restype = ctypes.c_void_p
    process = psutil.Process()
    blocks = [libc.malloc(ctypes.c_size_t(size)) for _ in range(2000)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    last = libc.malloc(ctypes.c_size_t(size))  # without which the end of the heap would go back by itself
    for block in blocks:
        libc.free(ctypes.c_void_p(block))
    before = process.memory_info().rss
    heap.give_back()
    assert process.memory_info().rss < before - 2000 * size // 2
    libc.free(ctypes.c_void_p(last))


def test_memory_is_given_back_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    times = Semaphore(0)
    monkeypatch.setattr(heap, "_PERIOD", 0.001)
    monkeypatch.setattr(heap, "give_back", times.release)

    async def run() -> None:
        keeping = asyncio.create_task(heap.keep_small())
        for _ in range(3):
            assert await asyncio.to_thread(times.acquire, timeout=10)
        keeping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await keeping

    asyncio.run(run())


def test_this_c_library_will_do() -> None:
    heap.give_back()


def test_an_application_gives_memory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = Semaphore(0)
    monkeypatch.setattr(heap, "_PERIOD", 0.001)
    monkeypatch.setattr(heap, "give_back", times.release)
    (tmp_path / "models.yaml").write_text("models: {}\n")
    settings = Settings(usage_retention=0)
    app = create_app(settings, make_pool(settings, load_registry(tmp_path / "models.yaml"), []))

    async def run() -> None:
        async with app.router.lifespan_context(app):
            assert await asyncio.to_thread(times.acquire, timeout=10)

    asyncio.run(run())


def test_any_c_library_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: object())
    heap.use_one_arena()
    heap.give_back()
