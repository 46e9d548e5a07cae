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
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Final

import msgspec
from fastapi import UploadFile

from llamaserve.api.image_fields import EditRequest, Order, VariationRequest, order
from llamaserve.api.uploads import kept
from llamaserve.errors import InvalidRequest, ModelNotCapable
from llamaserve.images.pictures import PictureReader
from llamaserve.images.values import ImageGeneration, PictureFile, Size
from llamaserve.registry.diffusion_file import DiffusionHeader
from llamaserve.registry.image_file import ImageFile, ImageSettings
from llamaserve.registry.spec import LEAST_SIDE

_LOOKED_AT: Final = 1024 * 1024  # pixels of a picture that a model looks at; it sees no more
_SMALL: Final = 512 * 512  # pixels that a picture may keep, whatever the model was made for
_REPAINTED, _CHANGED = 1.0, 0.75  # strength with a mask and without one, if nobody names another one
_OTHER_SHAPE: Final = 0.02  # by how much shapes may differ before it is told


async def order_with_uploads(
    reader: PictureReader, folder: Path, body: VariationRequest, file: ImageFile, contents: DiffusionHeader
) -> Order:
    """Return what a request asks of a model, with the pixels of its uploads in a folder. If it does not say which size
    it wants, that is the picture's, unless that is much larger than what the model was made for.

    Raises ``InvalidRequest`` for files that are no pictures, a mask of another size than the picture, and as ``order``
    does.
    """
    usual = ImageSettings.of(file.spec, contents)
    masks = body.mask if isinstance(body, EditRequest) else []
    looks = usual.edits == "reference" and isinstance(body, EditRequest)
    if not contents.encodes:
        raise ModelNotCapable("this model can't see pictures: its files have no encoder for them", param="image")
    if len(body.image) > 1 and not (looks and not contents.family.is_unet):
        raise ModelNotCapable(f"this model takes one picture, not {len(body.image)}", param="image")
    sources = [await _copied(each, folder / f"picture-{number}") for number, each in enumerate(body.image)]
    with _blamed_on("image"):
        sizes = [await reader.look(source) for source in sources]
    made = order(body, file, contents, size=_shrunk(sizes[0], max(usual.size.pixels, _SMALL)))
    first, warnings, idle = made.first, made.warnings, made.idle
    if masks or not looks:
        with _blamed_on("image"):
            init = await reader.render(sources[0], folder / "init", first.size)
        strength = (_REPAINTED if masks else _CHANGED) if body.strength is None else body.strength
        first = msgspec.structs.replace(first, init=init, strength=strength)
        if _is_of_other_shape(sizes[0], first.size):
            warnings = (*warnings, f"the picture of {sizes[0]} is cut to the shape of {first.size}")
    elif body.strength is not None:
        idle = (*idle, "strength")
    if looks:
        with _blamed_on("image"):
            references = [await _reference(reader, source, size) for source, size in zip(sources, sizes, strict=True)]
        first = msgspec.structs.replace(first, references=tuple(references))
    for upload in masks:
        first = await _masked(reader, await _copied(upload, folder / "mask-upload"), first, sizes[0])
    return replace(made, first=first, warnings=warnings, idle=idle)


async def _reference(reader: PictureReader, source: Path, size: Size) -> PictureFile:
    return await reader.render(source, source.with_suffix(".pixels"), _shrunk(size, _LOOKED_AT))


async def _masked(reader: PictureReader, source: Path, job: ImageGeneration, size: Size) -> ImageGeneration:
    """Return a job with a mask for a picture of this size."""
    with _blamed_on("mask"):
        own = await reader.look(source)
        if own != size:
            raise InvalidRequest(f"the mask must have the size of the picture, {size}, and has {own}")
        return msgspec.structs.replace(
            job, mask=await reader.render(source, source.with_suffix(".pixels"), job.size, mask=True)
        )


def _shrunk(size: Size, pixels: int) -> Size:
    """Return a size of the same shape with so many pixels at most, but no side shorter than it may be."""
    factor = min(1.0, math.sqrt(pixels / size.pixels))
    factor = max(factor, LEAST_SIDE / min(size))
    return Size(round(size.width * factor), round(size.height * factor))


def _is_of_other_shape(one: Size, other: Size) -> bool:
    return abs(math.log((one.width * other.height) / (one.height * other.width))) > _OTHER_SHAPE


async def _copied(upload: UploadFile, path: Path) -> Path:
    """Copy an upload to a file with a name, for another process."""
    with kept(), upload.file as source, _created(path) as copy:
        await asyncio.to_thread(shutil.copyfileobj, source, copy)
    return path


def _created(path: Path) -> BinaryIO:
    return path.open("wb")


@contextlib.contextmanager
def _blamed_on(field: str) -> Iterator[None]:
    """Have refusals name the field of the file that they are about."""
    try:
        yield
    except InvalidRequest as error:
        error.param = field
        raise
