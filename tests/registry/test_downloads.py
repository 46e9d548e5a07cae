"""Downloads of a running server: progress, single flight, giving up, and what requests may not name."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf_writer import tiny_llama
from local_hub import Hub

from llamaserve import errors
from llamaserve.registry import cache, downloads as downloads_module, hub
from llamaserve.registry.deleting import Deleted
from llamaserve.registry.downloads import Download, Downloads, State, find
from llamaserve.registry.fetching import locate
from llamaserve.registry.lock_file import LockFile
from llamaserve.registry.sources import HubSource
from llamaserve.registry.spec import Registry, load_registry

LARGE = tiny_llama() + bytes(1_000_000)


@pytest.fixture
def registry(tmp_path: Path, model_hub: Hub) -> Registry:
    model_hub.files["large-Q4_1.gguf"] = LARGE
    (tmp_path / "mine.gguf").write_bytes(tiny_llama())
    path = tmp_path / "models.yaml"
    path.write_text(
        "models:\n  large: {source: 'hf:o/r:Q4_1'}\n  mine: {source: 'file:mine.gguf'}\naliases: {l: large}\n"
    )
    return load_registry(path)


@pytest.fixture
def lock(registry: Registry) -> LockFile:
    return LockFile.beside(registry.path)


class Heard:
    """Takes the changes of downloads as they are at that time."""

    def __init__(self) -> None:
        self.states: list[tuple[State, float | None]] = []

    def __call__(self, download: Download) -> None:
        self.states.append((download.state, download.percent))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 (it comes true in a thread)
            await asyncio.sleep(0.01)


def test_a_download_tells_how_far_it_is(registry: Registry, lock: LockFile) -> None:
    async def check() -> None:
        heard = Heard()
        downloads = Downloads(heard)
        download = downloads.start(registry, "l", lock)
        assert (download.model, download.source, download.state) == ("large", "hf:o/r:Q4_1", State.RUNNING)
        assert await downloads.wait(download.id) is download
        assert (download.state, download.done, download.total) == (State.DONE, len(LARGE), len(LARGE))
        assert download.path is not None
        assert await asyncio.to_thread(Path(download.path).read_bytes) == LARGE
        assert download.ended is not None
        assert heard.states[0] == (State.RUNNING, None)
        assert heard.states[-1] == (State.DONE, 100.0)
        percents = [percent for _, percent in heard.states[1:] if percent is not None]
        assert percents == sorted(percents)
        assert lock.get("hf:o/r:Q4_1") is not None
        assert downloads.listed() == [download]
        assert downloads.get(download.id) is download

    asyncio.run(check())


def test_a_source_is_fetched_once_whoever_asks(registry: Registry, lock: LockFile, model_hub: Hub) -> None:
    async def check() -> None:
        downloads = Downloads()
        model_hub.gate = threading.Event()
        first = downloads.start(registry, "large", lock)
        assert downloads.start(registry, "hf:o/r:Q4_1", lock) is first
        other = downloads.start(registry, "hf:o/r:Q8_0", lock)
        assert other is not first
        model_hub.gate.set()
        await downloads.wait(first.id)
        await downloads.wait(other.id)
        assert downloads.start(registry, "large", lock) is not first
        await downloads.aclose()

    asyncio.run(check())
    assert len([asked for asked in model_hub.requests("GET") if "Q4_1" in asked[1]]) == 1


def test_an_update_is_not_taken_for_a_download_without_one(registry: Registry, lock: LockFile, model_hub: Hub) -> None:
    async def check() -> None:
        downloads = Downloads()
        model_hub.gate = threading.Event()
        plain = downloads.start(registry, "large", lock)
        with pytest.raises(errors.InvalidRequest, match="wait for that, or cancel it") as caught:
            downloads.start(registry, "large", lock, update=True)
        assert caught.value.param == "update"
        model_hub.gate.set()
        await downloads.wait(plain.id)
        model_hub.gate = threading.Event()
        model_hub.publish(large_Q4_1_gguf=LARGE + bytes(1000))
        update = downloads.start(registry, "large", lock, update=True)
        assert downloads.start(registry, "large", lock) is update
        assert downloads.start(registry, "large", lock, update=True) is update
        model_hub.gate.set()
        await downloads.wait(update.id)
        assert update.state is State.DONE

    asyncio.run(check())


def test_a_download_is_given_up_and_goes_on_later_where_it_ended(
    registry: Registry, lock: LockFile, model_hub: Hub
) -> None:
    async def check() -> None:
        heard = Heard()
        downloads = Downloads(heard)
        model_hub.gate = threading.Event()
        download = downloads.start(registry, "large", lock)
        await until(lambda: download.done > 0)
        downloads.cancel(download.id)
        model_hub.gate.set()
        await downloads.wait(download.id)
        assert (download.state, download.path, download.error) == (State.CANCELLED, None, None)
        assert heard.states[-1][0] is State.CANCELLED
        assert locate(HubSource("o/r", quant="Q4_1")) is None
        model_hub.gate = None
        again = downloads.start(registry, "large", lock)
        await downloads.wait(again.id)
        assert again.state is State.DONE
        assert downloads.cancel(again.id).state is State.DONE

    asyncio.run(check())
    ranges = [asked[2] for asked in model_hub.requests("GET") if "/resolve/" in asked[1]]
    assert ranges[0] is None
    assert str(ranges[-1]).startswith("bytes=")


def test_a_download_that_fails_says_why(registry: Registry, lock: LockFile, model_hub: Hub) -> None:
    async def check() -> None:
        downloads = Downloads()
        model_hub.status = 500
        download = downloads.start(registry, "hf:o/r/none.gguf", lock)
        await downloads.wait(download.id)
        assert download.state is State.FAILED
        assert download.error is not None
        assert "HTTP 500" in download.error.message

    asyncio.run(check())


def test_the_end_of_the_server_ends_its_downloads(registry: Registry, lock: LockFile, model_hub: Hub) -> None:
    async def check() -> None:
        downloads = Downloads()
        model_hub.gate = threading.Event()
        download = downloads.start(registry, "large", lock)
        await until(lambda: download.done > 0)
        asyncio.get_running_loop().call_later(0.1, model_hub.gate.set)
        await downloads.aclose()
        assert download.state is State.CANCELLED

    asyncio.run(check())


def large_blob() -> Path:
    return hub.cache_root() / "models--o--r/blobs" / hashlib.sha256(LARGE).hexdigest()


@pytest.mark.parametrize("server_ends", [False, True])
def test_a_download_that_waits_for_another_process_tells_of_its_progress_and_is_given_up(
    registry: Registry, lock: LockFile, server_ends: bool
) -> None:
    async def check() -> None:
        downloads = Downloads()
        blob = large_blob()
        blob.parent.mkdir(parents=True)
        blob.with_name(blob.name + ".llamaserve-part").write_bytes(LARGE[:500_000])
        with cache.lock(f"hub {blob}"):
            download = downloads.start(registry, "large", lock)
            await until(lambda: (download.done, download.total) == (500_000, len(LARGE)))
            begun = time.monotonic()
            if server_ends:
                await downloads.aclose()
            else:
                downloads.cancel(download.id)
                await downloads.wait(download.id)
            assert time.monotonic() - begun < 1
            assert download.state is State.CANCELLED
        again = downloads.start(registry, "large", lock)
        await downloads.wait(again.id)
        assert again.state is State.DONE

    asyncio.run(check())


def test_a_download_is_given_up_while_its_sum_is_checked(
    registry: Registry, lock: LockFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_CHUNK", 16)

    async def check() -> None:
        def cancel_when_it_is_here(download: Download) -> None:
            if download.done == len(LARGE):
                downloads.cancel(download.id)

        downloads = Downloads(cancel_when_it_is_here)
        download = downloads.start(registry, "large", lock)
        await downloads.wait(download.id)
        assert download.state is State.CANCELLED

    asyncio.run(check())
    assert not large_blob().exists()


def test_the_end_of_the_server_does_not_wait_for_a_hub_that_is_silent(
    registry: Registry, lock: LockFile, model_hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads_module, "CLOSE_LIMIT", 0.2)
    model_hub.files["large-Q4_1.gguf"] = LARGE[:10_000]  # so little that nothing is reported before it is whole
    model_hub.gate = threading.Event()

    async def check() -> None:
        downloads = Downloads()
        download = downloads.start(registry, "large", lock)
        await until(lambda: any("/resolve/" in asked[1] for asked in model_hub.requests("GET")))
        await downloads.aclose()
        assert (download.state, download.done) == (State.CANCELLED, 0)
        assert download.ended is not None

    begun = time.monotonic()
    asyncio.run(check())
    assert time.monotonic() - begun < 5
    (left,) = [thread for thread in threading.enumerate() if thread.name.startswith("download-")]
    assert left.daemon
    model_hub.gate.set()
    left.join(20)
    assert not left.is_alive()


@pytest.mark.parametrize(
    "reference",
    [
        *("/etc/passwd", "file:mine.gguf", "mine.gguf", "./mine.gguf", "~/mine.gguf", "pypi:a==1/a.gguf", "", "none"),
        *("hf:", "hf:../..:Q4", "hf:o/r/../../a.gguf", "hf:" + "a" * 600, "HF:o/r", "\ud800", "hf:\ud800/r"),
    ],
)
def test_requests_may_name_nothing_that_leads_to_files_of_this_machine(
    registry: Registry, lock: LockFile, reference: str
) -> None:
    async def check() -> None:
        with pytest.raises(errors.InvalidRequest) as caught:
            Downloads().start(registry, reference, lock)
        assert caught.value.param == "model_name"

    asyncio.run(check())


def test_only_so_many_downloads_run(
    registry: Registry, lock: LockFile, model_hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads_module, "MAX_RUNNING", 1)

    async def check() -> None:
        downloads = Downloads()
        model_hub.gate = threading.Event()
        first = downloads.start(registry, "large", lock)
        with pytest.raises(errors.QueueFull):
            downloads.start(registry, "hf:o/r:Q8_0", lock)
        model_hub.gate.set()
        await downloads.wait(first.id)

    asyncio.run(check())


def test_old_downloads_are_forgotten(registry: Registry, lock: LockFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads_module, "KEPT", 2)

    async def check() -> None:
        downloads = Downloads()
        for _ in range(4):
            download = downloads.start(registry, "mine", lock)
            await downloads.wait(download.id)
            assert download.state is State.DONE
        assert [each.id for each in downloads.listed()] == ["download-4", "download-3"]
        with pytest.raises(errors.InvalidRequest, match="no download 'download-1'"):
            downloads.get("download-1")

    asyncio.run(check())


def test_models_are_deleted_by_name(registry: Registry, lock: LockFile, tmp_path: Path, model_hub: Hub) -> None:
    folder = tmp_path / "models"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub/a.gguf").write_bytes(tiny_llama())

    async def check() -> None:
        downloads = Downloads()

        async def delete(name: str) -> Deleted:
            return await downloads.delete(registry, await find(registry, name, folder), folder)

        await downloads.wait(downloads.start(registry, "large", lock).id)
        assert (await delete("large")).freed == len(LARGE)
        for name, kind in (
            ("large", errors.ModelFileMissing),
            ("mine", errors.InvalidRequest),
            ("sub", errors.InvalidRequest),
            ("../mine.gguf", errors.InvalidRequest),
            (str(tmp_path / "mine.gguf"), errors.InvalidRequest),
        ):
            with pytest.raises(kind):
                await delete(name)
        await delete("sub/a")
        assert not (folder / "sub/a.gguf").exists()
        model_hub.gate = threading.Event()
        running = downloads.start(registry, "large", lock)
        with pytest.raises(errors.InvalidRequest, match="is being fetched"):
            await delete("l")
        model_hub.gate.set()
        await downloads.wait(running.id)

    asyncio.run(check())
    assert (tmp_path / "mine.gguf").exists()
