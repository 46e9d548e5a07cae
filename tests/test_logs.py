"""Lines of the log: for people, for programs, and for neither to be misled."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from llamaserve import logs


def record(message: str, *values: object, **facts: object) -> logging.LogRecord:
    made = logging.LogRecord("llamaserve.test", logging.INFO, "", 1, message, values, None)
    for name, value in logs.facts(**facts).items():
        setattr(made, name, value)
    logs._with_request(made)
    return made


def test_a_line_for_people_has_the_facts_behind_the_words() -> None:
    line = logs.HumanLines(logs._HUMAN).format(record("%s is loaded", "qwen", seconds=1.23456, key=None, path="/a b"))
    assert line.endswith("INFO llamaserve.test: qwen is loaded seconds=1.235 path='/a b'")


@pytest.mark.parametrize("text", ["a\nb", "a\r\n2026-11-27 INFO forged", "\x1b[31mred", "a\u2028b"])
def test_facts_can_not_begin_a_line_or_change_the_terminal(text: str) -> None:
    line = logs.HumanLines(logs._HUMAN).format(record("words", path=text))
    assert line.isprintable()


@pytest.mark.parametrize("text", ["a\nb", "a\r\n2026-11-27 INFO forged", "\x1b[31mred", "a\u2028b", "tab\there"])
def test_words_can_not_begin_a_line_or_change_the_terminal(text: str) -> None:
    line = logs.HumanLines(logs._HUMAN).format(record("GET %s failed", text))
    assert line.isprintable()
    assert line.endswith(" failed")


def test_what_went_wrong_is_on_lines_of_its_own() -> None:
    try:
        raise ValueError("bad")
    except ValueError:
        told = logging.LogRecord("llamaserve.test", logging.ERROR, "f", 1, "a\nbug", None, sys.exc_info())
    head, *rest = logs.HumanLines(logs._HUMAN).format(told).splitlines()
    assert head.endswith(r"a\nbug")
    assert rest[0].startswith("Traceback")
    assert rest[-1] == "ValueError: bad"


def test_a_line_for_programs_is_an_object() -> None:
    token = logs.request_id.set("req_1")
    try:
        line = json.loads(logs.JsonLines().format(record("%s is\nloaded", "qwen", seconds=1.5, odd={1})))
    finally:
        logs.request_id.reset(token)
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "logger": "llamaserve.test",
        "message": "qwen is\nloaded",
        "request_id": "req_1",
        "seconds": 1.5,
        "odd": "{1}",
    }


def test_what_went_wrong_is_in_the_object() -> None:
    made = record("it failed")
    try:
        raise ValueError("of this \ud800 value")
    except ValueError as error:
        made.exc_info = (ValueError, error, error.__traceback__)
    line = json.loads(logs.JsonLines().format(made))
    assert "ValueError: of this" in line["exception"]
    assert "test_logs.py" in line["exception"]
