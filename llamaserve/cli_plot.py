"""A plot in the terminal: bars of characters, which need no colours. Knows nothing of what they show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

_HEIGHT: Final = 8  # lines
_WIDEST: Final = 3  # columns of a bar, with the gap beside it
_BLOCKS: Final = " ▁▂▃▄▅▆▇█"
_ASCII: Final = " .:#"  # where a terminal has no blocks


def draw_bars(
    values: Sequence[int], ends: tuple[str, str], width: int, *, blocks: bool = True
) -> tuple[list[str], int]:
    """Return the lines of a plot, and how many neighbouring values share a bar, as their sum: more than one where there
    are more than columns in ``width``. ``ends`` are the names of the first and of the last value.
    """
    room = max(width - len(f"{sum(values):,}") - len(" | "), 1)
    shared = math.ceil(len(values) / room)
    heights = [sum(values[at : at + shared]) for at in range(0, len(values), shared)]
    across = min(_WIDEST, room // len(heights))
    most = max(*heights, 1)
    margin = len(f"{most:,}")
    lines = []
    for line in reversed(range(_HEIGHT)):
        scale = f"{most:,}" if line == _HEIGHT - 1 else ""
        pieces = (_piece(each / most, line, across, _BLOCKS if blocks else _ASCII) for each in heights)
        lines.append(f"{scale:>{margin}} | {''.join(pieces)}".rstrip())
    length, (first, last) = len(heights) * across, ends
    lines.append(f"{0:>{margin}} +{'-' * (length + 1)}")
    names = first if len(values) == 1 else f"{first}{last:>{max(length - len(first), len(last) + 1)}}"
    lines.append(" " * (margin + len(" | ")) + names)
    return lines, shared


def _piece(share: float, line: int, across: int, marks: str) -> str:
    """Return what is seen of a bar in a line, counted from below; a bar that is not nothing is always seen."""
    full = len(marks) - 1
    filled = math.ceil(share * _HEIGHT * full) - line * full
    return marks[min(max(filled, 0), full)] * max(across - 1, 1) + " " * min(across - 1, 1)
