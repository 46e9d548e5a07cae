"""Pixels become files of pictures, and the settings stand where programs look for them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llamaserve.images.diffusion import Pixels
from llamaserve.images.encoding import encode, enlarged
from llamaserve.images.values import Format, Size


def noise(width: int = 40, height: int = 24) -> Pixels:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)


def opened(data: bytes) -> Any:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_nothing_is_lost_where_nothing_need_be(kind: Format) -> None:
    image = opened(encode(noise(), kind, quality=100, settings=""))
    assert image.format == kind.upper()
    assert (np.asarray(image.convert("RGB")) == noise()).all()


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_quality_decides_on_the_size(kind: Format) -> None:
    sizes = [len(encode(noise(), kind, quality=quality, settings="")) for quality in (0, 30, 60, 89, 90, 100)]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("text", ["a cat\nSteps: 1", "un été à Zürich", "雪\U0001f600", "x" * 20_000, ""])
def test_settings_are_read_by_any_program(text: str) -> None:
    assert opened(encode(noise(), "png", quality=100, settings=text)).info.get("parameters", "") == text
    for kind in ("jpeg", "webp"):
        comment = opened(encode(noise(), kind, quality=90, settings=text)).getexif().get_ifd(0x8769).get(0x9286, b"")
        assert comment.removeprefix(b"UNICODE\0").decode("utf-16-be") == text


def test_a_coarse_picture_is_enlarged() -> None:
    large = enlarged(noise(4, 3), Size(64, 48))
    assert large.shape == (48, 64, 3)
    assert large.dtype == np.uint8
    assert (enlarged(noise(), Size(40, 24)) == noise()).all()
