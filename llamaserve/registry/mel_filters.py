"""The filters from which Whisper sees sound: how much each frequency counts for each of the bands of the mel scale.

They are the triangles of Slaney's Auditory Toolbox, each of area one, for frames of 400 samples at 16 kHz, as Whisper
was trained with them. Always the same bits: powers are computed in decimals, since those of one C library are not
quite those of another.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any, Final

import numpy as np

RATE: Final = 16_000  # samples a second
FRAME: Final = 400  # samples
FREQUENCIES: Final = FRAME // 2 + 1

_HERTZ: Final = Decimal(200) / 3  # of a mel, up to the knee
_KNEE: Final = 15  # mel, 1 kHz
_MORE, _RATIO = 27, Decimal("6.4")  # above it, so many mel more are so many times the frequency


def mel_filters(bands: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Return the filters of that many bands as [bands, FREQUENCIES]."""
    corners = _corners(bands)
    frequencies = np.arange(FREQUENCIES) * (RATE / FRAME)
    low, centre, high = (corners[first : first + bands, None] for first in range(3))
    lowest = np.minimum((low - frequencies) / (low - centre), (high - frequencies) / (high - centre))
    triangles = np.where(lowest >= 0, lowest, 0).astype(np.float32)  # rounded before they get their area, as Whisper's
    filters: np.ndarray[tuple[int, int], np.dtype[np.float32]] = (triangles * (2 / (high - low))).astype(np.float32)
    return filters


def _corners(bands: int) -> np.ndarray[tuple[int], np.dtype[Any]]:
    """Return the frequencies of the triangles' corners, evenly spaced in mel: each triangle has three of them, and
    begins a corner after the one before it.
    """
    top = _KNEE + _MORE * (Decimal(RATE) / 2000).ln() / _RATIO.ln()
    return np.array([float(_hertz(top * number / (bands + 1))) for number in range(bands + 2)])


def _hertz(mel: Decimal) -> Decimal:
    return mel * _HERTZ if mel < _KNEE else 1000 * _RATIO ** ((mel - _KNEE) / _MORE)
