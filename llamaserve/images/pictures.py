"""Reading uploaded pictures, in child processes that are killed when it takes too much.

A file from a stranger meets decoders in C, and a few bytes can stand for a gigapixel. So each file is a job for a
reading process (``pictures_main.py``); this module is the asyncio side. It knows nothing of HTTP or models, and does
not load Pillow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from llamaserve.errors import ErrorValue, InvalidRequest, from_value
from llamaserve.images.values import PictureFile, Size
from llamaserve.sandbox import Ended, OutOfMemory, Sandbox, TookTooLong

TIME_LIMIT = 20.0  # seconds of CPU time for one file; a photo takes less than one
IDLE_LIMIT = 900.0  # seconds after which a process without work ends
MEMORY_LIMIT = 768  # MB of address space for one process, Python included
MOST_PIXELS: Final = 50_000_000  # of a file
SLIMMEST: Final = 16  # times as long as wide, at most, or the other way round


class Look(msgspec.Struct, frozen=True, tag=True):
    """Tell which size a picture has, as it is meant to be seen."""

    source: str


class Render(msgspec.Struct, frozen=True, tag=True):
    """Write a picture's pixels to ``target`` in another size, of which it fills all and loses what is over on two
    sides. Of a ``mask`` these are bytes: 255 where it is transparent, or if it can't be, where it is white.
    """

    source: str
    target: str
    size: Size
    mask: bool = False


PictureJob = Look | Render


class PictureAnswer(msgspec.Struct, frozen=True):
    """A reading process's answer: the ``size`` of the file's picture, or ``error``."""

    size: Size | None = None
    error: ErrorValue | None = None


class PictureReader(Sandbox):
    """A pool of at most ``size`` reading processes, started when one is needed and reused. For one event loop."""

    def __init__(self, size: int = 2, *, time_limit: float = TIME_LIMIT) -> None:
        super().__init__(
            "llamaserve.images.pictures_main",
            "the picture reader",
            size=size,
            time_limit=time_limit,
            idle_limit=IDLE_LIMIT,
        )

    async def look(self, source: Path) -> Size:
        """Return the size of the picture in a file, turned as it is meant to be seen.

        Raises ``InvalidRequest`` when there is none, or it is too large or too slim, and ``Unavailable`` as
        ``Sandbox.ask``.
        """
        return await self._ask_for(Look(str(source)))

    async def render(self, source: Path, target: Path, size: Size, *, mask: bool = False) -> PictureFile:
        """Write the pixels of the picture in a file as they are wanted: see ``Render``. Raises as ``look`` does, also
        for a picture of which a part can't be decoded, and ``Unavailable`` when ``target`` can't be written.
        """
        await self._ask_for(Render(str(source), str(target), size, mask))
        return PictureFile(str(target), *size)

    async def _ask_for(self, job: PictureJob) -> Size:
        try:
            answer = msgspec.msgpack.decode(await self.ask(msgspec.msgpack.encode(job)), type=PictureAnswer)
        except TookTooLong as late:
            raise InvalidRequest(f"the picture took {late} to decode") from None
        except OutOfMemory:
            raise InvalidRequest(f"the picture needed more than {MEMORY_LIMIT} MB of memory to decode") from None
        except Ended as ended:
            raise InvalidRequest(f"the picture could not be decoded: it crashed the picture reader ({ended})") from None
        if answer.error is not None:
            raise from_value(answer.error)
        assert answer.size is not None
        return answer.size
