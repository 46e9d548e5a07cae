"""Rows, targets and the ways in which they are shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmark import report
from benchmark.results import Results, Row, at_least, at_most
from benchmark.speculation import worst_row


@pytest.fixture
def results() -> Results:
    results = Results()
    for ours, bare in ((90.0, 100.0), (99.0, 100.0), (50.0, 80.0)):
        results.add("single", "llamaserve", "rate", ours)
        results.add("single", "bare loop", "rate", bare)
    return results


OURS, BARE = ("single", "llamaserve", "rate"), ("single", "bare loop", "rate")


def test_a_ratio_is_one_of_medians_with_the_spread_of_the_rounds(results: Results) -> None:
    row = results.ratio(OURS, BARE, "both", target=at_least(0.95))
    assert (row.value, row.low, row.high) == (0.9, 0.625, 0.99)
    assert row.met is False


def test_targets() -> None:
    assert at_least(0.95).met_by(0.95)
    assert not at_least(0.95).met_by(0.949)
    assert at_most(3).met_by(3)
    assert not at_most(3).met_by(3.01)
    assert (str(at_least(0.95)), str(at_most(150))) == ("≥ 0.95", "≤ 150")


def test_what_was_not_measured_says_why(results: Results) -> None:
    results.missing["llama_cpp.server"] = "it needs a package"
    row = results.row(("single", "llama_cpp.server", "rate"), "peer", target=at_least(1))
    assert (row.value, row.met, row.note) == (None, None, "it needs a package")
    ratio = results.ratio(OURS, ("single", "llama_cpp.server", "rate"), "both", target=at_least(1))
    assert (ratio.value, ratio.note) == (None, "it needs a package")
    assert report.cells(ratio) == ("-", "", "≥ 1", "not measured")


def test_no_figure_is_not_a_zero(results: Results) -> None:
    results.add("long", "llamaserve", "worst", float("nan"))
    assert results.row(("long", "llamaserve", "worst"), "gap").value is None


def test_the_worst_workload_is_found(results: Results) -> None:
    for workload, on, off in (("single", 90, 80), ("code", 130, 100), ("choices", 95, 100)):
        results.add(workload, "llamaserve", "rate", on)
        results.add(workload, "llamaserve, speculation off", "rate", off)
    row = worst_row(results)
    assert row.value == pytest.approx(0.95)
    assert "choices" in row.what
    assert row.met is False
    assert worst_row(Results()).value is None


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1234.5, "1234"), (134.2, "134"), (34.21, "34.2"), (0.951, "0.95"), (0.0101, "0.0101"), (0, "0")],
)
def test_figures_are_shown_short(value: float, shown: str) -> None:
    assert report.number(value) == shown


def test_the_table_and_the_file(results: Results, tmp_path: Path) -> None:
    rows = [results.ratio(OURS, BARE, "both", target=at_least(0.95)), Row("json", "schema", None, note="not offered")]
    assert report.as_markdown(rows).splitlines()[2] == "| both | 0.90 x | 0.62 to 0.99 | ≥ 0.95 | NO |"
    report.write_json(tmp_path / "out.json", results, rows, {"command": "bench"})
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["samples"]["single"]["llamaserve"]["rate"] == [90, 99, 50]
    assert written["rows"][0]["met"] is False
    assert written["machine"]["cores"] >= 1
    assert written["command"] == "bench"
