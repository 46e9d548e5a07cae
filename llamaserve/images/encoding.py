"""Writing pixels as a file of a picture, with the settings that it was made with where programs look for them.

Pillow is imported when it is needed, since it belongs to an extra. Knows nothing of models.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Final

import numpy as np

from llamaserve.errors import EngineError
from llamaserve.images.diffusion import Pixels
from llamaserve.images.values import Format, Size

if TYPE_CHECKING:
    from PIL import Image
    from PIL.Image import Exif
    from PIL.PngImagePlugin import PngInfo

_KEY: Final = "parameters"  # under which PNG files carry settings, as the first programs for this did it
_UNICODE: Final = b"UNICODE\0"  # how an EXIF comment begins that is UTF-16
_COMPRESSION: Final = 6  # of PNG, of 9; more takes several times as long, and saves a percent or two
_FINE: Final = 90  # the quality from which on JPEG keeps colours in full resolution
_LOSSLESS: Final = 100  # the quality at which WebP loses nothing
_EFFORT: Final = 75  # of WebP without loss, of 100


def encode(pixels: Pixels, kind: Format, *, quality: int, settings: str) -> bytes:
    """Return a file of a picture. ``quality`` (0 to 100) is for JPEG and WebP.

    The ``settings`` stand in a text chunk of PNG files, and in the EXIF comment of others. Raises ``EngineError``.
    """
    from PIL import Image

    file = io.BytesIO()
    try:
        _save(Image.fromarray(pixels), file, kind, quality, settings)
    except (OSError, ValueError) as error:
        raise EngineError(f"the picture can't be written as {kind}: {error}") from error
    return file.getvalue()


def _save(image: Image.Image, file: io.BytesIO, kind: Format, quality: int, settings: str) -> None:
    match kind:
        case "png":
            image.save(file, "PNG", compress_level=_COMPRESSION, pnginfo=_chunk(settings))
        case "jpeg":
            image.save(file, "JPEG", quality=quality, subsampling=0 if quality >= _FINE else 2, exif=_exif(settings))
        case "webp":
            lossless = quality >= _LOSSLESS
            image.save(file, "WEBP", lossless=lossless, quality=_EFFORT if lossless else quality, exif=_exif(settings))


def enlarged(pixels: Pixels, size: Size) -> Pixels:
    """Return a picture in another size."""
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _chunk(settings: str) -> PngInfo:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if settings:
        info.add_text(_KEY, settings)
    return info


def _exif(settings: str) -> Exif:
    from PIL import ExifTags, Image

    exif = Image.Exif()
    if settings:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _UNICODE + settings.encode("utf-16-be")
    return exif
