"""The reading process: ``python -m llamaserve.images.pictures_main FD`` decodes pictures, one at a time.

Each ``PictureJob`` gets a ``PictureAnswer``; ``sandbox.py`` brings and takes them. Only the formats that people have
pictures in are decoded. It does not know the time limit of a job: the parent measures it and kills this process.
"""

from __future__ import annotations

import struct
import sys
import warnings
import zlib
from pathlib import Path
from typing import Final

import msgspec
from PIL import Image, ImageOps, UnidentifiedImageError

from llamaserve.errors import InvalidRequest, LlamaserveError, Unavailable, to_value
from llamaserve.images.pictures import (
    MEMORY_LIMIT,
    MOST_PIXELS,
    SLIMMEST,
    Look,
    PictureAnswer,
    PictureJob,
    Render,
)
from llamaserve.images.values import Size
from llamaserve.sandbox import serve

FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

# What Pillow raises for files that are not as they should be, some of it by chance.
_DAMAGED: Final = (
    *(OSError, ValueError, SyntaxError, IndexError, KeyError, TypeError, EOFError, struct.error, zlib.error),
    Image.DecompressionBombError,
)

_decoder: msgspec.msgpack.Decoder[PictureJob] = msgspec.msgpack.Decoder(PictureJob)


def answer(payload: bytes) -> tuple[bytes, bool]:
    """Return the answer to a job, and whether this process has used up its memory: never, it gives it back."""
    try:
        return msgspec.msgpack.encode(PictureAnswer(_done(_decoder.decode(payload)))), False
    except LlamaserveError as error:
        return msgspec.msgpack.encode(PictureAnswer(error=to_value(error))), False


def _done(job: PictureJob) -> Size:
    with _opened(job.source) as image:
        try:
            if isinstance(job, Look):
                return _turned(image)
            _render(image, job)
        except _DAMAGED as error:
            raise InvalidRequest(f"the picture is damaged: {str(error)[:200] or type(error).__name__}") from error
    return job.size


def _opened(source: str) -> Image.Image:
    """Return a picture that has not been decoded yet. Raises ``InvalidRequest``."""
    try:
        image = Image.open(source, formats=FORMATS)
    except UnidentifiedImageError as error:
        kinds = ", ".join(FORMATS[:-1])
        raise InvalidRequest(f"the file is no picture that can be read: {kinds} and {FORMATS[-1]} can") from error
    except _DAMAGED as error:
        raise InvalidRequest(f"the picture can't be read: {str(error)[:200] or type(error).__name__}") from error
    try:
        _check(Size(*image.size))
    except BaseException:
        image.close()
        raise
    return image


def _check(size: Size) -> None:
    if size.pixels > MOST_PIXELS:
        raise InvalidRequest(f"the picture has {size} pixels; {MOST_PIXELS:,} are the most")
    if not 1 / SLIMMEST <= size.width / size.height <= SLIMMEST:
        raise InvalidRequest(f"the picture is too slim: {size}; {SLIMMEST} to 1 is the most")


def _turned(image: Image.Image) -> Size:
    """Return a picture's size as it is meant to be seen; cameras write how it has to be turned."""
    sideways = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    return Size(*reversed(image.size)) if sideways else Size(*image.size)


_ORIENTATION: Final = 0x0112  # an EXIF tag


def _render(image: Image.Image, job: Render) -> None:
    """Write a picture's pixels, or those of a mask."""
    if not job.mask:
        image.draft("RGB", (max(job.size), max(job.size)))  # a JPEG can be decoded in half the size, if that is enough
    image = _of_bytes(ImageOps.exif_transpose(image))
    image = _as_mask(image) if job.mask else _as_rgb(image)
    method = Image.Resampling.BILINEAR if job.mask else Image.Resampling.LANCZOS
    pixels = ImageOps.fit(image, job.size, method).tobytes()
    if job.mask and not any(pixels):
        raise InvalidRequest("nothing in the mask is transparent, or white, so there is nothing to edit")
    try:
        Path(job.target).write_bytes(pixels)
    except OSError as error:
        raise Unavailable(f"the upload can't be kept in the temporary folder: {error.strerror}") from error


def _of_bytes(image: Image.Image) -> Image.Image:
    """Return a picture with a byte for each colour; those of 16 bits would be white from 256 on."""
    if image.mode == "F":
        raise InvalidRequest("the picture has numbers with fractions for colours, which can't be read")
    if not image.mode.startswith("I"):
        return image
    return image.convert("I").point(lambda value: value * (1 / 256)).convert("L")


def _as_rgb(image: Image.Image) -> Image.Image:
    """Return a picture without transparency: what is behind it is white."""
    if not _is_transparent(image):
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _as_mask(image: Image.Image) -> Image.Image:
    if _is_transparent(image):
        return ImageOps.invert(image.convert("RGBA").getchannel("A"))
    return image.convert("L")


def _is_transparent(image: Image.Image) -> bool:
    """Whether a picture can have transparent parts."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def main(fd: int) -> int:
    """Run the process and return its exit status."""
    warnings.simplefilter("ignore")  # of what is odd in a file, which nobody would read
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS
    return serve(fd, answer, memory_limit=MEMORY_LIMIT)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
