"""Pictures under links: kept for an hour, in bounded space, and nowhere once the process is gone."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from llamaserve.api.image_links import KEPT, ImageLinks
from llamaserve.errors import Unavailable


@contextlib.contextmanager
def kept(space: int = 1000, clock: Callable[[], float] = time.monotonic) -> Iterator[ImageLinks]:
    links = ImageLinks(space, clock)
    try:
        yield links
    finally:
        links.close()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_full_disk_keeps_no_server_from_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with kept() as links:
        assert links.get("anything.png") is None
        with pytest.raises(Unavailable, match="No space left"):
            links.put(b"a picture", "image/png")
        monkeypatch.undo()
        found = links.get(links.put(b"a picture", "image/png"))
        assert found is not None
        assert found.data == b"a picture"


def test_a_picture_is_kept_for_an_hour() -> None:
    clock = Clock()
    with kept(1000, clock) as links:
        name = links.put(b"a picture", "image/webp")
        assert name.endswith(".webp")
        clock.now = KEPT - 1
        assert links.get(name) == (b"a picture", "image/webp", 1)
        clock.now = KEPT
        assert links.get(name) is None


def test_names_cannot_be_guessed() -> None:
    with kept() as links:
        names = {links.put(b"a", "image/png") for _ in range(100)}
        assert len(names) == 100
        assert {len(name) for name in names} == {36}
        for guess in ("", "a.png", "../" + names.pop()):
            assert links.get(guess) is None


@given(st.lists(st.integers(1, 60), max_size=60))
def test_the_newest_pictures_are_there_within_the_space(sizes: list[int]) -> None:
    with kept(100) as links:
        put = [
            (links.put(bytes([number]) * size, "image/png"), bytes([number]) * size)
            for number, size in enumerate(sizes)
        ]
        there = [(name, data) for name, data in put if links.get(name) is not None]
        for name, data in there:
            found = links.get(name)
            assert found is not None
            assert found[:2] == (data, "image/png")
        assert put[-1:] == there[-1:]
        assert sum(len(data) for _, data in there) <= 100
        assert there == put[len(put) - len(there) :]


def test_what_is_larger_than_all_the_space_is_refused() -> None:
    with kept(10) as links:
        links.put(b"x" * 10, "image/png")
        with pytest.raises(Unavailable, match="11 bytes"):
            links.put(b"x" * 11, "image/png")


def test_space_is_given_back_once_nothing_is_kept() -> None:
    clock = Clock()
    with kept(1000, clock) as links:
        links.put(b"x" * 900, "image/png")
        clock.now = KEPT
        name = links.put(b"y" * 900, "image/png")
        assert links.get(name) is not None
        clock.now = 2 * KEPT
        assert links.get(name) is None
        assert links._file.seek(0, 2) == 0


def test_nothing_lies_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    async def run() -> None:
        async with ImageLinks() as links:
            links.put(b"x" * 10_000, "image/png")
            assert list(tmp_path.iterdir()) == []  # noqa: ASYNC240
        assert links._file.closed

    asyncio.run(run())
