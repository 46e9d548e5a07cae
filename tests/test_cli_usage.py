"""``llamaserve usage`` as a user types it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from usage_records import made

from llamaserve.usage.database import Database
from llamaserve.usage.record import UsageRecord

NEW_YEAR = 1_767_225_600.0  # 2026-01-01 in UTC
DAY = 86400
JANUARY = ("--from", "2026-01-01", "--to", "2026-01-31")


@dataclass
class Desk:
    """A state folder, and commands about it."""

    folder: Path
    path: Path

    def __call__(self, *arguments: str, status: int = 0, **environment: str) -> str:
        """Type ``llamaserve usage`` and return what it wrote; its exit status must be this one."""
        done = subprocess.run(
            [sys.executable, "-m", "llamaserve", "usage", *arguments],
            capture_output=True,
            timeout=60,
            cwd=self.folder,
            env={**os.environ, "LLAMASERVE_STATE_DIR": str(self.path.parent), "COLUMNS": "80", **environment},
        )
        output = (done.stdout + done.stderr).decode()
        assert done.returncode == status, output
        assert "Traceback" not in output
        return output

    def json(self, *arguments: str) -> Any:
        return json.loads(self(*arguments, "--json"))

    def write(self, *records: UsageRecord) -> None:
        with Database(self.path) as database:
            database.insert(records)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path, tmp_path / "state" / "usage.sqlite3")


@pytest.fixture
def january(desk: Desk) -> Desk:
    """A ledger with a few requests of January 2026."""
    desk.write(
        made(at=NEW_YEAR, key="ann", prompt_tokens=12_000, cached_tokens=2000, completion_tokens=345),
        made(at=NEW_YEAR + DAY - 1, key="bob", model="smollm2-135m", prompt_tokens=1000, cached_tokens=0),
        made(at=NEW_YEAR + 3 * DAY, key="ann", prompt_tokens=600, cached_tokens=0, completion_tokens=55),
        made(at=NEW_YEAR + 3 * DAY, key="ann", prompt_tokens=77, cached_tokens=0, outcome="cancelled"),
        made(at=NEW_YEAR + 4 * DAY, prompt_tokens=0, cached_tokens=0, completion_tokens=0, outcome="refused"),
        made(at=NEW_YEAR + 31 * DAY, prompt_tokens=999_999),
    )
    return desk


def rows(output: str) -> dict[str, list[str]]:
    """Return the words of each line by the first of them."""
    return {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.strip()}


def test_there_is_a_row_for_each_day_a_sum_and_what_is_not_in_it(january: Desk) -> None:
    whole = january(*JANUARY)
    assert max(map(len, whole.splitlines())) <= 80
    assert "\x1b" not in whole
    answer = whole.partition("tokens of each day")[0]
    found = rows(answer)
    assert answer.startswith("answered requests from 2026-01-01 to 2026-01-31 (UTC)\n\n")
    assert found["day"] == ["requests", "prompt", "cached", "completion", "tokens"]
    assert found["2026-01-01"] == ["2", "13,000", "2,000", "352", "13,352"]
    assert found["2026-01-04"] == ["1", "600", "0", "55", "655"]
    assert found["sum"] == ["3", "13,600", "2,000", "407", "14,007"]
    below = answer.partition("not counted above")[2]
    assert rows(below)["cancelled"] == ["1", "77", "0", "7", "84"]
    assert rows(below)["refused"] == ["1", "0", "0", "0", "0"]
    assert "2026-01-05" not in answer


def test_a_plot_shows_the_tokens_of_each_day_unless_it_is_not_wanted(january: Desk) -> None:
    plot = january(*JANUARY).partition("tokens of each day\n\n")[2].splitlines()
    assert plot[0] == "13,352 | ██"
    assert plot[7] == "       | ██       ▄▄"
    assert plot[-1] == "         2026-01-01 2026-01-04"
    assert "tokens of each day" not in january(*JANUARY, "--no-plot")
    plain = january(*JANUARY, PYTHONIOENCODING="ascii")
    assert plain.isascii()
    assert "13,352 | ##" in plain


def test_rows_are_for_what_is_asked_for(january: Desk) -> None:
    models = rows(january(*JANUARY, "--by", "model", "--no-plot"))
    assert models["qwen3-4b"] == ["2", "12,600", "2,000", "400", "13,000"]
    assert models["smollm2-135m"][0] == "1"
    lines = january("--from", "2026-01-01", "--by", "key", "--by", "day", "--no-plot").splitlines()
    assert lines[0] == "answered requests from 2026-01-01 to now (UTC)"
    assert [line.split()[:3] for line in lines[3:8]] == [
        ["-", "2026-02-01", "1"],
        ["ann", "2026-01-01", "1"],
        ["ann", "2026-01-04", "1"],
        ["bob", "2026-01-01", "1"],
        ["sum", "4", "1,013,599"],
    ]


def test_one_key_alone(january: Desk) -> None:
    answer = january(*JANUARY, "--key", "ann")
    assert answer.startswith("answered requests from 2026-01-01 to 2026-01-31 (UTC) with the key ann\n")
    assert rows(answer)["sum"][0] == "2"
    assert "refused" not in answer
    assert "13,352" not in answer


def test_seconds_of_audio_and_pictures_are_shown_where_there_are_some(january: Desk) -> None:
    january.write(made(at=NEW_YEAR, endpoint="/v1/audio/transcriptions", prompt_tokens=0, audio_seconds=1234.56))
    january.write(made(at=NEW_YEAR, endpoint="/v1/images/generations", images=3, outcome="failed"))
    answer = january(*JANUARY, "--by", "endpoint")
    assert "tokens  audio (s)  images\n" in answer
    assert rows(answer)["/v1/audio/transcriptions"][-2:] == ["1,234.6", "0"]
    assert rows(answer)["failed"][-1] == "3"


def test_json_is_for_scripts(january: Desk) -> None:
    answer = january.json(*JANUARY, "--by", "key")
    assert {name: answer[name] for name in ("start", "end", "key", "by")} == {
        "start": NEW_YEAR,
        "end": NEW_YEAR + 31 * DAY,
        "key": None,
        "by": ["key"],
    }
    assert [(each["key"], each["total_tokens"]) for each in answer["totals"]] == [("ann", 13_000), ("bob", 1007)]
    assert answer["sum"]["total_tokens"] == 14_007
    assert [each["outcome"] for each in answer["outcomes"]] == ["answered", "cancelled", "refused"]


def test_the_last_thirty_days_are_shown_by_default(desk: Desk) -> None:
    now = datetime.now(UTC)
    desk.write(*(made(at=(now - timedelta(days=days)).timestamp()) for days in (0, 29, 30, 31)))
    answer = desk.json()
    assert answer["sum"]["requests"] == 2
    assert answer["end"] is None
    assert [each["day"] for each in answer["totals"]] == [
        (now - timedelta(days=days)).date().isoformat() for days in (29, 0)
    ]
    last = desk.json("--to", (now - timedelta(days=30)).date().isoformat())
    assert last["sum"]["requests"] == 2
    assert last["end"] - last["start"] == 30 * DAY


def test_where_nothing_is_recorded_it_says_how_to_begin(desk: Desk) -> None:
    begin = f"nothing is recorded yet in {desk.path}; a server does so with every request. To begin: llamaserve run\n"
    assert desk() == begin
    assert not desk.path.parent.exists()
    desk.write()
    assert desk() == begin
    assert "LLAMASERVE_USAGE_RETENTION is 0" in desk(LLAMASERVE_USAGE_RETENTION="0")
    assert desk.json() == desk.json() | {"totals": [], "outcomes": []}


def test_where_nothing_was_in_a_period_it_says_when_there_was(january: Desk) -> None:
    answer = january("--to", "2020-06-30")
    assert answer.startswith(
        "there were no requests from 2020-06-01 to 2020-06-30 (UTC); those recorded are from 2026-"
    )
    command = answer.partition("to see them: llamaserve usage ")[2].split()
    assert rows(january(*command))["sum"][0] == "4"
    assert "--from 2026-01-01 --by key" in january(*JANUARY, "--key", "Ann")


def test_where_nothing_was_answered_the_rest_is_still_shown(desk: Desk) -> None:
    desk.write(made(outcome="failed", prompt_tokens=8))
    answer = desk(*JANUARY)
    assert answer.startswith("no request was answered from 2026-01-01 to 2026-01-31 (UTC)\n")
    assert rows(answer)["failed"][:2] == ["1", "8"]
    assert "tokens of each day" not in answer


def test_names_that_clients_sent_do_not_steer_the_terminal(desk: Desk) -> None:
    desk.write(made(key="\x1b[31m", model="[bold]\u202e\n\x07näme"))
    answer = desk(*JANUARY, "--by", "model", "--by", "key", "--no-plot")
    assert "[bold]\\u202e\\n\\x07näme  \\x1b[31m " in answer
    assert "n\\xe4me" in desk(*JANUARY, "--by", "model", "--no-plot", PYTHONIOENCODING="ascii")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--from", "yesterday"), "error: 'yesterday' should be a date such as 2026-01-31"),
        (("--to", "nan"), "error: 'nan' should be a date"),
        (("--from", "2026-02-30"), "error: '2026-02-30' is no moment: day"),
        (("--from", "2026-02-01", "--to", "2026-01-01"), "error: the period ends (2026-01-01) before it begins"),
    ],
)
def test_a_date_that_is_none_ends_with_the_next_command(desk: Desk, arguments: tuple[str, ...], told: str) -> None:
    answer = desk(*arguments, status=1)
    assert answer.startswith(told)
    assert answer.endswith("try:   llamaserve usage --from 2026-01-01 --to 2026-01-31\n")


def test_a_ledger_that_can_not_be_read_is_an_error_with_a_command_that_helps(desk: Desk) -> None:
    desk.path.parent.mkdir()
    desk.path.write_bytes(b"no database at all" * 300)
    answer = desk(status=1)
    assert f"error: {desk.path} can't be read: it is damaged" in answer
    subprocess.run(["bash", "-c", answer.partition("try:   ")[2]], check=True)
    assert "nothing is recorded yet" in desk()
    assert (desk.path.parent / "damaged" / "usage.sqlite3").read_bytes() == b"no database at all" * 300


def test_days_need_not_be_whole(january: Desk) -> None:
    answer = january("--from", "2026-01-01T23:59:59Z", "--to", str(int(NEW_YEAR + 3 * DAY)), "--no-plot")
    assert answer.startswith("answered requests from 2026-01-01 23:59:59 to 2026-01-03 (UTC)")
    assert rows(answer)["sum"][0] == "1"


def test_help_names_all_options() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llamaserve", "usage", "--help"], capture_output=True, text=True, check=True
    )
    assert {"--from", "--to", "--by", "--key", "--plot", "--no-plot", "--json"} <= set(
        re.findall(r"--[a-z-]+", done.stdout)
    )
