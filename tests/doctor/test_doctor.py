"""The doctor as a whole: no check hangs or breaks the report, which is for people or for scripts."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import msgspec
from doctor_machine import checked
from rich.console import Console

from llamaserve.doctor.case import Case, Check
from llamaserve.doctor.examination import CHECKS, examine
from llamaserve.doctor.findings import Finding, Level, note, ok, problem, warning
from llamaserve.doctor.report import as_report, print_report
from llamaserve.settings import Settings


def command_line(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-m", "llamaserve", "doctor", *words],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )


def fine(case: Case) -> Iterator[Finding]:
    yield ok("a", "well")


def broken(case: Case) -> Iterator[Finding]:
    yield ok("b", "well so far")
    raise ZeroDivisionError("a bug of ours\nin two lines")


def test_a_check_that_fails_is_a_finding() -> None:
    found = list(examine(Case(Settings()), [Check("one", broken, 10), Check("two", fine, 10)]))
    assert [(heading, finding.level) for heading, finding in found] == [
        ("one", Level.OK),
        ("one", Level.PROBLEM),
        ("two", Level.OK),
    ]
    assert "ZeroDivisionError: a bug of ours" in found[1][1].message


def test_a_check_that_hangs_is_given_up() -> None:
    release = threading.Event()

    def hanging(case: Case) -> Iterator[Finding]:
        yield ok("c", "well so far")
        release.wait()

    found = list(examine(Case(Settings()), [Check("one", hanging, 0.05), Check("two", fine, 10)]))
    release.set()
    assert [finding.level for _, finding in found] == [Level.OK, Level.PROBLEM, Level.OK]
    assert found[1][1].message == "this check has no answer after 0.05 s, and was given up"


def test_every_subject_of_the_command_has_a_check() -> None:
    headings = [check.heading for check in CHECKS]
    assert headings == ["packages", "backend", "cores", "memory", "disk", "network", "clock", "models"]


def test_the_report_is_one_line_for_a_finding_and_one_for_its_command() -> None:
    out = StringIO()
    findings = [
        ("disk", ok("cache", "[room] enough")),
        ("disk", warning("models\x1b[2J", "slow\nfile system", "export A='[b]'")),
        ("port", problem("port", "taken " * 40, "llamaserve run --port 5001")),
        ("port", note("IPv6", "none", "true")),
    ]
    assert print_report(findings, Console(file=out, width=40)) == 1
    assert out.getvalue().splitlines() == [
        "disk",
        "  ok       cache: [room] enough",
        "  warning  models [2J: slow file system",
        "  fix:     export A='[b]'",
        "port",
        f"  problem  port: {'taken ' * 40}",
        "  fix:     llamaserve run --port 5001",
        "  note     IPv6: none",
        "  fix:     true",
        "",
        "1 problem, 1 warning, 1 note",
    ]
    assert print_report([("disk", ok("cache", "room"))], Console(file=StringIO())) == 0


def test_scripts_read_json() -> None:
    report = json.loads(
        msgspec.json.encode(as_report([("port", problem("port", "taken", "true")), ("port", ok("proxies", "none"))]))
    )
    assert (report["problems"], report["warnings"]) == (1, 0)
    first = {"check": "port", "level": "problem", "subject": "port", "message": "taken", "fix": "true"}
    assert report["findings"][0] == first
    assert report["findings"][1]["fix"] is None


def test_the_command_examines_this_machine(starter_model: Path, tmp_path: Path) -> None:
    models = tmp_path / "models.yaml"
    models.write_text(f"models: {{starter: {{source: 'file:{starter_model}'}}}}")
    done = command_line("--json", "--port", "0", "--models-file", str(models))
    report = json.loads(done.stdout)
    found = checked(
        Finding(Level(each["level"]), each["subject"], each["message"], each["fix"]) for each in report["findings"]
    )
    assert {each["check"] for each in report["findings"]} == {check.heading for check in CHECKS}
    assert not [finding for finding in found if "check itself failed" in finding.message]
    assert done.returncode == (1 if report["problems"] else 0)
    assert done.stderr == ""


def test_a_problem_makes_the_exit_status_1(tmp_path: Path) -> None:
    models = tmp_path / "models.yaml"
    models.write_text("models: [")
    done = command_line("--port", "0", "--models-file", str(models))
    assert done.returncode == 1
    assert "problem  models.yaml: models.yaml:1: " in done.stdout
    assert done.stdout.rstrip().splitlines()[-1].startswith(("1 problem", "2 problem", "3 problem"))


def test_the_command_loads_no_llama_cpp() -> None:
    check = (
        "import sys, llamaserve.doctor.examination; "
        "print([m for m in ('llama_cpp', 'numpy', 'jinja2', 'huggingface_hub', 'llguidance') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
