"""``llamaserve usage``: what requests have used, from the ledger that a server keeps.

It reads and shows; how requests are counted is in ``usage``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llamaserve.cli_output import out, read_settings, say, say_json
from llamaserve.cli_plot import draw_bars
from llamaserve.errors import InvalidRequest
from llamaserve.registry.remedies import command
from llamaserve.settings import Settings
from llamaserve.usage.period import parse_moment, parse_period
from llamaserve.usage.totals import (
    ALL,
    DAY,
    NUMBERS,
    Group,
    Total,
    added,
    answered,
    by_outcome,
    day_of,
    first_and_last,
    totals,
)

_DAYS: Final = 30  # that are shown if nothing else is asked for
_WIDEST: Final = 1000  # columns of a table: rather lines that wrap than numbers that are cut off
_HEADINGS: Final = {
    "requests": "requests",
    "prompt_tokens": "prompt",
    "cached_tokens": "cached",
    "completion_tokens": "completion",
    "total_tokens": "tokens",
    "audio_seconds": "audio (s)",
    "images": "images",
}
_EXAMPLE: Final = "llamaserve usage --from 2026-01-01 --to 2026-01-31"


class By(StrEnum):
    """What requests can be grouped by."""

    DAY = "day"
    MODEL = "model"
    KEY = "key"
    ENDPOINT = "endpoint"


class _Query(msgspec.Struct, frozen=True):
    """What is asked for: a period in Unix seconds, and the name of a key (None: all)."""

    path: Path
    start: float | None
    end: float | None
    key: str | None

    def totals(self, groups: Sequence[Group]) -> tuple[list[Total], list[Total]]:
        """Return what answered requests have used in groups, and all by how they ended."""
        key = ALL if self.key is None else self.key
        found = totals(self.path, start=self.start, end=self.end, group_by=[*groups, "outcome"], key=key)
        return answered(found), by_outcome(found)


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(usage)


def usage(
    start: Annotated[
        str | None,
        typer.Option("--from", help="First day (UTC), a date-time or Unix seconds.  [default: the last 30 days]"),
    ] = None,
    end: Annotated[str | None, typer.Option("--to", help="Last day, or a date-time before which.")] = None,
    by: Annotated[list[By] | None, typer.Option("--by", help="A row for each; may be repeated.")] = None,
    key: Annotated[str | None, typer.Option("--key", help="Only requests with the API key of this name.")] = None,
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Draw the tokens of each day.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON, for scripts.")] = False,
) -> None:
    """Show what requests have used: tokens, seconds of audio, pictures."""
    settings = read_settings()
    query = _Query(settings.ledger_path, *_period(start, end), key)
    groups: list[Group] = list(dict.fromkeys(each.value for each in by or [By.DAY]))
    rows, outcomes = query.totals(groups)
    if as_json:
        say_json(_as_json(query, groups, rows, outcomes))
        return
    if not outcomes:
        _print_nothing(query, settings)
        return
    _print(query, groups, rows, outcomes)
    if plot:
        _print_plot(query)


def _period(start: str | None, end: str | None) -> tuple[float | None, float | None]:
    """Return the period that is asked for; without a beginning it is some days long."""
    try:
        begins, ends = parse_period(start, end)
    except ValueError as error:
        raise InvalidRequest(str(error), hint=_EXAMPLE) from error
    if begins is None:
        begins = (ends if ends is not None else (time.time() // DAY + 1) * DAY) - _DAYS * DAY
    return begins, ends


def _as_json(query: _Query, groups: list[Group], rows: list[Total], outcomes: list[Total]) -> dict[str, object]:
    return {
        "start": query.start,
        "end": query.end,
        "key": query.key,
        "by": groups,
        "totals": rows,
        "sum": added(rows),
        "outcomes": outcomes,
    }


def _print_nothing(query: _Query, settings: Settings) -> None:
    known = first_and_last(query.path)
    if known is None and settings.usage_retention == 0:
        say("usage is not recorded: LLAMASERVE_USAGE_RETENTION is 0. To begin: unset it, and llamaserve run")
    elif known is None:
        say(f"nothing is recorded yet in {query.path}; a server does so with every request. To begin: llamaserve run")
    else:
        first, last = map(day_of, known)
        say(f"there were no requests {_told(query)}; those recorded are from {first} to {last}")
        say(f"to see them: {command('llamaserve', 'usage', '--from', first, *(('--by', 'key') if query.key else ()))}")


def _told(query: _Query) -> str:
    """Return in words what was asked for."""
    since = "" if query.start is None else f"from {_moment(query.start)} "
    until = "to now" if query.end is None else f"to {_moment(query.end, end=True)}"
    return f"{since}{until} (UTC)" + ("" if query.key is None else f" with the key {_shown(query.key)}")


def _moment(seconds: float, *, end: bool = False) -> str:
    if seconds % DAY == 0:
        return day_of(seconds - (DAY if end else 0))
    return datetime.fromtimestamp(seconds, UTC).isoformat(sep=" ", timespec="seconds").removesuffix("+00:00")


def _print(query: _Query, groups: list[Group], rows: list[Total], outcomes: list[Total]) -> None:
    others = [each for each in outcomes if each.outcome != "answered"]
    columns = _columns([*rows, *others])
    say(f"answered requests {_told(query)}\n" if rows else f"no request was answered {_told(query)}")
    if rows:
        _print_table(groups, columns, rows, added(rows))
    if others:
        say("\nnot counted above\n")
        _print_table(["outcome"], columns, others)


def _columns(rows: Sequence[Total]) -> list[str]:
    """Return the numbers to show: seconds and pictures only where there are some."""
    rare = ("audio_seconds", "images")
    return [name for name in NUMBERS if name not in rare or any(getattr(row, name) for row in rows)]


def _print_table(
    groups: Sequence[Group], columns: Sequence[str], rows: list[Total], total: Total | None = None
) -> None:
    table = Table(box=None, pad_edge=False)
    for group in groups:
        table.add_column(group, no_wrap=True)
    for column in columns:
        table.add_column(_HEADINGS[column], no_wrap=True, justify="right")
    for row in rows:
        names = (getattr(row, group) for group in groups)
        table.add_row(*("-" if name is None else escape(_shown(name)) for name in names), *_cells(row, columns))
    if total is not None:
        table.add_row("sum", *[""] * (len(groups) - 1), *_cells(total, columns), style="bold")
    Console(width=_WIDEST).print(table, highlight=False)


def _cells(total: Total, columns: Sequence[str]) -> list[str]:
    numbers = (getattr(total, column) for column in columns)
    return [f"{number:,.1f}" if isinstance(number, float) else f"{number:,}" for number in numbers]


def _print_plot(query: _Query) -> None:
    """Draw the tokens of each day, from the first to the last that has any."""
    tokens = {_day_number(each): each.total_tokens for each in query.totals(["day"])[0] if each.total_tokens}
    if not tokens:
        return
    days = range(min(tokens), max(tokens) + 1)
    ends = (day_of(days[0] * DAY), day_of(days[-1] * DAY))
    blocks = out.encoding.startswith("utf")
    lines, shared = draw_bars([tokens.get(day, 0) for day in days], ends, out.width, blocks=blocks)
    say(f"\ntokens of each {'day' if shared == 1 else f'{shared} days'}\n")
    for line in lines:
        say(line)


def _day_number(total: Total) -> int:
    assert isinstance(total.day, str)
    return int(parse_moment(total.day)) // DAY


def _shown(name: str) -> str:
    """Return a name without what would steer the terminal: some names are as clients sent them."""
    visible = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in name)
    return visible.encode(out.encoding, "backslashreplace").decode(out.encoding)
