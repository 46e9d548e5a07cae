"""From uploaded pictures to what a model makes of them: which of them it begins with or looks at, in which size.

A picture is edited in one of two ways. It is repainted: made anew in part, beginning with itself, where the mask says
so or everywhere a little. Or the model looks at it, and perhaps at others, while it makes a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from fastapi import UploadFile

from llamaserve.api.image_fields import EditRequest, VariationRequest
from llamaserve.api.image_order import Order, beginning, looks, sized
from llamaserve.api.scratch import Scratch
from llamaserve.api.uploads import Upload, kept
from llamaserve.errors import InvalidRequest
from llamaserve.images.pictures import PictureReader
from llamaserve.images.values import PictureFile, Size
from llamaserve.registry.diffusion_file import DiffusionHeader
from llamaserve.registry.image_file import ImageSettings
from llamaserve.registry.spec import LARGEST_SIDE, LEAST_SIDE

_LOOKED_AT: Final = 1024 * 1024  # pixels of a picture that a model looks at; it sees no more
_SMALL: Final = 512 * 512  # pixels that a picture may keep, whatever the model was made for
_PIXEL: Final = 3  # bytes, at most


class _Picture(NamedTuple):
    """An upload in a file of its own, which is a picture, and the field that it came in."""

    field: str
    source: Path
    size: Size

    def pixels(self, size: Size) -> PictureFile:
        """Return the file that its pixels are to be in."""
        return PictureFile(f"{self.source}-{size}", *size)


class UploadedPictures:
    """The pictures that a request has brought, in a folder of their own. It must be closed, which deletes them."""

    def __init__(self, reader: PictureReader, upload: Upload) -> None:
        self._reader = reader
        self._upload = upload
        self._scratch: Scratch | None = None

    def close(self) -> None:
        """Delete them. Further calls do nothing."""
        if self._scratch is not None:
            self._scratch.close()
        self._upload.close()

    async def added_to(
        self, made: Order, body: VariationRequest, usual: ImageSettings, contents: DiffusionHeader
    ) -> Order:
        """Return an order with them. If the request does not say which size it wants, that is the picture's, unless
        that is much larger than what the model was made for.

        All are looked at before one is decoded. Raises ``InvalidRequest`` for files that are no pictures, for a mask of
        another size than the picture, and as ``sized`` and ``beginning`` do; ``QueueFull`` and ``Unavailable`` when
        there is no room for their pixels.
        """
        pictures = [await self._looked_at("image", each) for each in body.image]
        masks = [await self._looked_at("mask", each) for each in (body.mask if isinstance(body, EditRequest) else [])]
        own = pictures[0].size
        for each in masks:
            if each.size != own:
                raise InvalidRequest(
                    f"the mask must have the size of the picture, {own}, and has {each.size}", param="mask"
                )
        made = sized(made, body.size or _shrunk(own, max(usual.size.pixels, _SMALL)), body, contents)
        files: list[tuple[_Picture, PictureFile]] = []
        if masks or not looks(body, usual):
            files += [(each, each.pixels(made.first.size)) for each in (pictures[0], *masks)]
            made = beginning(made, body, own, *(file for _, file in files))
        if looks(body, usual):
            seen = [(each, each.pixels(contents.family.seen(_shrunk(each.size, _LOOKED_AT)))) for each in pictures]
            files += seen
            made = made.with_first(references=tuple(file for _, file in seen))
        self._upload.grow(sum(file.width * file.height * _PIXEL for _, file in files))
        for picture, file in files:
            await self._render(picture, file)
        return made

    async def _looked_at(self, field: str, upload: UploadFile) -> _Picture:
        """Copy an upload to a file with a name, for another process, and have that look at it."""
        with kept():
            if self._scratch is None:
                self._scratch = Scratch()
            folder = self._scratch.path
            path = folder / f"{field}-{len(list(folder.iterdir()))}"
            with upload.file as source, path.open("wb") as copy:
                await asyncio.to_thread(shutil.copyfileobj, source, copy)
        with _blamed_on(field):
            return _Picture(field, path, await self._reader.look(path))

    async def _render(self, picture: _Picture, file: PictureFile) -> None:
        with _blamed_on(picture.field):
            size = Size(file.width, file.height)
            await self._reader.render(picture.source, Path(file.path), size, mask=picture.field == "mask")


def _shrunk(size: Size, pixels: int) -> Size:
    """Return a size of the same shape with so many pixels at most, but no side shorter or longer than it may be."""
    factor = min(1.0, math.sqrt(pixels / size.pixels))
    factor = min(max(factor, LEAST_SIDE / min(size)), LARGEST_SIDE / max(size))
    return Size(round(size.width * factor), round(size.height * factor))


@contextlib.contextmanager
def _blamed_on(field: str) -> Iterator[None]:
    """Have refusals name the field of the file that they are about."""
    try:
        yield
    except InvalidRequest as error:
        error.param = field
        raise
