"""Pictures that are kept for a while under links that nobody can guess.

They lie in one file, which has no name and is gone with the process, however that ends. It is a ring: a new picture
takes the place of the oldest ones once the file is as large as it may be.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import IO, Final, NamedTuple, Self

from llamaserve.errors import Unavailable

KEPT: Final = 3600.0  # seconds
SPACE: Final = 512 * 2**20  # bytes; the largest answer takes a quarter
_SWEEP: Final = 60.0  # seconds


class _Place(NamedTuple):
    start: int
    size: int
    media_type: str
    until: float  # moment

    @property
    def end(self) -> int:
        return self.start + self.size


class Kept(NamedTuple):
    """A picture that is kept, and for how many seconds it still is."""

    data: bytes
    media_type: str
    seconds: float


class ImageLinks:
    """The pictures that are kept, within an ``async with`` block. To be used from any thread."""

    def __init__(self, space: int = SPACE, clock: Callable[[], float] = time.monotonic) -> None:
        """They may take so many bytes of the disk."""
        self._space = space
        self._clock = clock
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None  # from the first picture on
        self._closed = False
        self._places: dict[str, _Place] = {}  # the oldest first
        self._end = 0  # where the next one begins
        self._sweeping: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._sweeping = asyncio.create_task(self._sweep())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
        self.close()

    def close(self) -> None:
        """Forget all pictures for good."""
        with self._lock:
            self._places.clear()
            self._closed = True
            if self._file is not None:
                self._file.close()

    def put(self, data: bytes, media_type: str) -> str:
        """Keep a picture, and return the last part of its link. Raises ``Unavailable`` when it can't be kept."""
        if len(data) > self._space:
            raise Unavailable(f"the picture has {len(data)} bytes, and links are kept for {self._space} at most")
        name = f"{secrets.token_urlsafe(24)}.{media_type.rpartition('/')[2]}"
        with self._lock:
            if self._closed:
                raise Unavailable("the server is being shut down")
            self._forget_old()
            if self._end + len(data) > self._space:
                self._forget(self._end, self._space)
                self._end = 0
            place = _Place(self._end, len(data), media_type, self._clock() + KEPT)
            self._forget(place.start, place.end)
            self._write(data, place.start)
            self._places[name], self._end = place, place.end
        return name

    def get(self, name: str) -> Kept | None:
        """Return a picture; None if it is not kept, or no longer."""
        with self._lock:
            self._forget_old()
            if (place := self._places.get(name)) is None:
                return None
            assert self._file is not None
            data = os.pread(self._file.fileno(), place.size, place.start)
            return Kept(data, place.media_type, place.until - self._clock())

    def _write(self, data: bytes, start: int) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="llamaserve-images-", buffering=0)  # noqa: SIM115
            written = 0
            while written < len(data):
                written += os.pwrite(self._file.fileno(), data[written:], start + written)
        except OSError as error:
            raise Unavailable(f"the picture can't be kept in the temporary folder: {error.strerror}") from error

    def _forget(self, start: int, end: int) -> None:
        """Forget what lies between two places."""
        self._places = {name: at for name, at in self._places.items() if at.end <= start or at.start >= end}

    def _forget_old(self) -> None:
        now = self._clock()
        self._places = {name: place for name, place in self._places.items() if place.until > now}
        if not self._places and self._end and self._file is not None and not self._closed:
            self._end = 0
            with contextlib.suppress(OSError):  # the next pictures write over them
                self._file.truncate(0)

    async def _sweep(self) -> None:
        """Forget old pictures even if nobody asks for any."""
        while True:
            await asyncio.sleep(_SWEEP)
            with self._lock:
                self._forget_old()
