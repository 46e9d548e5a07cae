"""Plots in the terminal: as wide as they may be, and true."""

from __future__ import annotations

from hypothesis import given, strategies as st

from llamaserve.cli_plot import draw_bars

ENDS = ("2026-01-01", "2026-01-31")


def test_a_plot_looks_like_this() -> None:
    lines, shared = draw_bars([0, 800, 1, 1600, 400], ENDS, 80)
    assert lines == [
        "1,600 |          ██",
        "      |          ██",
        "      |          ██",
        "      |          ██",
        "      |    ██    ██",
        "      |    ██    ██",
        "      |    ██    ██ ██",
        "      |    ██ ▁▁ ██ ██",
        "    0 +----------------",
        "        2026-01-01 2026-01-31",
    ]
    assert shared == 1


def test_a_single_value_has_one_name() -> None:
    lines, _ = draw_bars([7], ENDS, 80)
    assert lines[-3:] == ["  | ██", "0 +----", "    2026-01-01"]


def test_many_values_share_bars_and_blocks_can_be_done_without() -> None:
    lines, shared = draw_bars([1] * 400 + [0], ENDS, 40, blocks=False)
    assert shared == 12
    assert lines[0] == f"12 | {'#' * 33}"
    assert lines[7] == f"   | {'#' * 34}"
    assert "\n".join(lines).isascii()


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=500), st.integers(1, 200), st.booleans())
def test_a_bar_is_seen_where_there_is_something_and_is_as_high_as_it_should_be(
    values: list[int], width: int, blocks: bool
) -> None:
    lines, shared = draw_bars(values, ("a", "b"), width, blocks=blocks)
    sums = [sum(values[at : at + shared]) for at in range(0, len(values), shared)]
    bars = [line.partition("| ")[2] for line in lines[:8]]
    room = max(width - len(f"{sum(values):,}") - 3, 1)
    assert max(map(len, bars)) <= room
    across = min(3, room // len(sums))
    for number, value in enumerate(sums):
        column = [bar[number * across : number * across + 1].strip() for bar in bars]
        height = sum(map(bool, column))
        assert (height > 0) == (value > 0)
        assert column == [""] * (8 - height) + column[8 - height :]
        assert height - 1 <= 8 * value / max(*sums, 1) <= height
