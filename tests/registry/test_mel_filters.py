"""The filters of the mel scale: those that Whisper was trained with, to the bit."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest

from llamaserve.registry.mel_filters import FREQUENCIES, mel_filters


@pytest.mark.parametrize(
    ("bands", "sha256"),
    [
        (80, "4f2701b1d287d74a0dc9871026e9519d98cb76426615f2539b0d151a0ae4ec2e"),
        (128, "2a5f9822897750e047c85dea37cc268d3be0ecfd23c28a5f10da129d99d05afe"),
    ],
)
def test_the_filters_are_always_the_same(bands: int, sha256: str) -> None:
    found = mel_filters(bands)
    assert (found.shape, found.dtype) == ((bands, FREQUENCIES), np.float32)
    assert hashlib.sha256(found.tobytes()).hexdigest() == sha256


def mel(hertz: float) -> float:
    """Return Slaney's mel of a frequency."""
    return hertz * 3 / 200 if hertz < 1000 else 15 + math.log(hertz / 1000) / (math.log(6.4) / 27)


@pytest.mark.parametrize("bands", [80, 128])
def test_the_filters_are_triangles_of_area_one_evenly_spaced_in_mel(bands: int) -> None:
    found, step = mel_filters(bands), mel(8000) / (bands + 1)
    for band, row in enumerate(found):
        heard = [mel(40 * number) / step for number in np.flatnonzero(row)]
        assert all(band < place < band + 2 for place in heard)
    assert np.allclose(found[bands // 2 :].sum(axis=1) * 40, 1, rtol=0.1)  # where they are wider than a frequency
    assert (found >= 0).all()
