"""The results for people and for programs: a table in the terminal, a JSON file, a plot. Measures nothing."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmark.results import Results, Row
from llamaserve import __version__

_PACKAGES = ("llama-cpp-python", "numpy", "uvicorn", "uvloop", "httptools", "starlette", "msgspec", "sse-starlette")


def number(value: float) -> str:
    """Return a figure with three significant digits, without an exponent."""
    if not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.095 else 4
    return f"{value:.{digits}f}"


def print_table(rows: Sequence[Row], console: Console) -> None:
    """Print one line a row: the figure, its spread over the rounds, its target; and the notes below."""
    table = Table(box=None, pad_edge=False)
    table.add_column("what")
    for heading in ("figure", "rounds", "target", "met"):
        table.add_column(heading, justify="right", no_wrap=True)
    notes: dict[str, int] = {}
    last = None
    for row in rows:
        if last not in (None, row.workload):
            table.add_section()
        last = row.workload
        mark = f" ({notes.setdefault(row.note, len(notes) + 1)})" if row.note else ""
        table.add_row(escape(row.what) + mark, *cells(row))
    console.print(table, highlight=False)
    for note, place in notes.items():
        console.print(f"({place}) {note}", highlight=False, markup=False)


def cells(row: Row) -> tuple[str, str, str, str]:
    """Return a row's figure, spread, target and verdict as they are shown."""
    if row.value is None:
        return "-", "", str(row.target or ""), "not measured" if row.target else ""
    spread = (
        "" if row.low is None or row.high is None or row.low == row.high else f"{number(row.low)} to {number(row.high)}"
    )
    verdict = {True: "yes", False: "NO", None: ""}[row.met]
    return f"{number(row.value)} {row.unit}".strip(), spread, str(row.target or ""), verdict


def as_markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a table for docs/performance.md."""
    lines = ["| what | figure | rounds | target | met |", "|---|---|---|---|---|"]
    lines += [f"| {row.what} | {' | '.join(cells(row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def machine() -> dict[str, Any]:
    """Return what a figure depends on: the machine and the versions."""
    versions = {name: _version(name) for name in _PACKAGES}
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "llamaserve": __version__,
        "commit": _commit(),
        **{name: version for name, version in versions.items() if version},
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def write_json(path: Path, results: Results, rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
    """Write every single figure, with the rows and how they came about."""
    samples: dict[str, dict[str, dict[str, list[float | None]]]] = {}
    for (workload, contender, figure), values in results.samples.items():
        finite = [value if math.isfinite(value) else None for value in values]
        samples.setdefault(workload, {}).setdefault(contender, {})[figure] = finite
    content = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        **facts,
        "rows": [_row(row) for row in rows],
        "samples": samples,
        "details": results.details,
        "missing": results.missing,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _row(row: Row) -> dict[str, Any]:
    return {
        "workload": row.workload,
        "what": row.what,
        "value": row.value,
        "unit": row.unit,
        "lowest": row.low,
        "highest": row.high,
        "target": str(row.target) if row.target else None,
        "met": row.met,
        "note": row.note,
    }


def write_plot(path: Path, results: Results, rows: Sequence[Row], title: str) -> None:
    """Draw each figure that has a target, in relation to it; the change-over; and the stream beside a long prompt.

    Raises ``ImportError`` without matplotlib.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    judged = [row for row in rows if row.target is not None and row.value is not None and row.target.bound > 0]
    figure, (bars, change, long) = plt.subplots(
        3, 1, figsize=(11, 4 + 0.3 * len(judged) + 5), height_ratios=[max(1, len(judged)), 8, 8], layout="constrained"
    )
    _draw_bars(bars, judged)
    _draw_change(change, results.details.get("change", []))
    _draw_long(long, results.details.get("long", []))
    figure.suptitle(title)
    figure.savefig(path)
    plt.close(figure)


def _draw_bars(axes: Any, rows: Sequence[Row]) -> None:
    axes.set_title("figure / target: right of 1 is met for ≥, left of 1 for ≤", fontsize=10)
    for place, row in enumerate(reversed(rows)):
        assert row.target is not None
        assert row.value is not None
        axes.barh(place, row.value / row.target.bound, color="tab:green" if row.met else "tab:red", height=0.6)
    labels = [f"{row.what}: {number(row.value or 0)} {row.unit}  ({row.target})" for row in reversed(rows)]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")


def _draw_change(axes: Any, rounds: Sequence[Mapping[str, Any]]) -> None:
    axes.set_title("one stream while a busy process comes and goes", fontsize=10)
    axes.set(xlabel="seconds", ylabel="tokens/s")
    for each in rounds:
        axes.plot(*zip(*each["rates"], strict=True), linewidth=1)
        axes.axvspan(*each["busy_from_to"], color="tab:orange", alpha=0.08)


def _draw_long(axes: Any, rounds: Sequence[Mapping[str, Any]]) -> None:
    axes.set_title("gaps of one stream; a long prompt arrives at 0", fontsize=10)
    axes.set(xlabel="seconds", ylabel="gap, ms")
    for each in rounds:
        times = each["times"]
        axes.plot(times[1:], [1e3 * (b - a) for a, b in pairwise(times)], linewidth=0.6)
        axes.axvspan(0, each["end"], color="tab:blue", alpha=0.05)
