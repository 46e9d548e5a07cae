"""How much memory a diffusion model takes while it makes pictures."""

from __future__ import annotations

from collections.abc import Sequence

from llamaserve.images.values import Size
from llamaserve.registry.diffusion_file import DiffusionHeader


def estimate_diffusion(header: DiffusionHeader, size: Size, references: Sequence[Size] = ()) -> int:
    """Return the bytes."""
    return header.weight_bytes + 200_000_000 + size.pixels * 100


def is_tiled(header: DiffusionHeader, size: Size) -> bool:
    """Whether a picture of this size is decoded in tiles."""
    return size.pixels > 768 * 768
