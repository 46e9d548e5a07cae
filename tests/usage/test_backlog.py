"""Records on their way: in order, each once, and with an end to what they take."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given, strategies as st
from usage_records import made

from llamaserve.usage.backlog import Backlog


def names(backlog: Backlog[str], most: int = 1000) -> list[str]:
    return [record.request_id for record in backlog.take(most)]


def filled(*requests: str, most: int = 1000) -> Backlog[str]:
    backlog = Backlog[str](most)
    for each in requests:
        assert backlog.add(made(request_id=each), f"{each} waits")
    return backlog


def test_records_are_taken_in_order_and_those_who_wait_are_told_when_they_are_written() -> None:
    backlog = filled("a", "b", "c")
    assert names(backlog, 2) == ["a", "b"]
    assert len(backlog) == 3
    assert backlog.written(0) == ["a waits", "b waits"]
    assert len(backlog) == 1
    assert names(backlog) == ["c"]
    assert backlog.written(1) == ["c waits"]
    assert (len(backlog), backlog.lost) == (0, 1)


def test_what_could_not_be_written_comes_first_the_next_time_and_nobody_waits_for_it() -> None:
    backlog = filled("a", "b", "c")
    backlog.take(2)
    assert backlog.failed("the disk is full") == ["a waits", "b waits", "c waits"]
    assert not backlog.add(made(request_id="d"), "d waits")
    assert names(backlog) == ["a", "b", "c", "d"]
    assert backlog.written(0) == []
    backlog.go_on()
    assert backlog.add(made(request_id="e"), "e waits")


def test_a_problem_during_an_attempt_frees_all_who_wait_and_does_not_end_the_attempt() -> None:
    backlog = filled("a", "b")
    backlog.take(1)
    assert backlog.hold_up("the disk does not answer") == ["a waits", "b waits"]
    assert backlog.written(0) == []
    backlog.go_on()
    assert (backlog.problem, names(backlog)) == (None, ["b"])


def test_the_oldest_are_lost_where_there_are_too_many_but_none_that_is_being_written(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backlog = filled("a", "b", "c", most=3)
    assert names(backlog, 1) == ["a"]
    backlog.add(made(request_id="d"), "")
    backlog.add(made(request_id="e"), "")
    assert (len(backlog), backlog.lost) == (3, 2)
    backlog.failed("full")
    assert names(backlog) == ["a", "d", "e"]
    lines = [record.message for record in caplog.records if record.message.startswith("usage is lost")]
    assert len(lines) == 1


def test_the_log_tells_of_a_problem_once_and_when_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    backlog = filled("a", most=1)
    for what in ("locked", "full"):
        backlog.take(1)
        backlog.failed(what)
    assert backlog.problem == "full"
    backlog.add(made(request_id="b"), "")
    backlog.go_on()
    backlog.go_on()
    told = [(record.levelname, record.message) for record in caplog.records]
    assert told == [
        ("ERROR", "usage is not recorded, but kept in memory, for the time being: locked"),
        ("ERROR", "usage is lost, the oldest first: 1 requests wait in memory: full"),
        ("INFO", "usage is recorded again; requests of which it was lost since the start: 1"),
    ]


def test_what_comes_after_the_end_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    backlog = filled("a")
    backlog.close()
    assert not backlog.add(made(request_id="late"), "")
    assert backlog.abandon() == ["a waits"]
    assert (len(backlog), backlog.lost) == (0, 2)
    assert [record.message for record in caplog.records] == [
        "usage of the request late is lost: the ledger is closed",
        "usage of 1 requests is lost: it could not be written in time",
    ]


@given(st.lists(st.sampled_from(["add", "fail", "write some", "write all", "go on"]), max_size=60), st.integers(1, 8))
def test_every_record_is_written_once_or_lost_and_everybody_is_told_once(actions: list[str], most: int) -> None:
    backlog, written, told, waiting = Backlog[int](most), list[str](), list[int](), 0
    for number, action in enumerate([*actions, "write all"]):
        match action:
            case "add":
                waiting += backlog.add(made(request_id=f"{number}"), number)
            case "go on":
                backlog.go_on()
            case "fail":
                backlog.take(2)
                told += backlog.failed("why")
            case _:
                written += names(backlog, 2 if action == "write some" else 1000)
                told += backlog.written(0)
        assert len(backlog) <= most
    assert written == sorted(written, key=int)
    assert len(set(written)) == len(written) == actions.count("add") - backlog.lost
    assert len(set(told)) == len(told)
    assert len(told) >= waiting - backlog.lost
