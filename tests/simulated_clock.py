"""Time that passes by what is evaluated, so that what depends on it is the same in every run."""

from __future__ import annotations


class SimulatedClock:
    """A clock in seconds. A step takes ``step``, and ``row`` for each of its rows, or ``small`` times as much if there
    are fewer than 64.
    """

    def __init__(self, step: float = 1e-3, row: float = 0.0, small: float = 1.0) -> None:
        self.now = 0.0
        self.step = step
        self.row = row
        self.small = small

    def __call__(self) -> float:
        """Return the time."""
        return self.now

    def pass_step(self, rows: int) -> None:
        """Let a step of so many rows take its time."""
        self.now += self.step + self.row * rows * (self.small if rows < 64 else 1)
