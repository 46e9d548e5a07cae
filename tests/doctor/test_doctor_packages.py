"""Python, its environment and its packages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from doctor_machine import Needing, bad, case_of, checked, described, installed, one

from llamaserve.doctor.case import Case
from llamaserve.doctor.findings import Finding, Level
from llamaserve.doctor.packages import _python, packages
from llamaserve.settings import Settings


def findings(tmp_path: Path, *needs: str, wishes: tuple[str, ...] = (), isolated: bool = True) -> list[Finding]:
    prefix, base = Path("/opt/venv"), Path("/usr" if isolated else "/opt/venv")
    installation = Needing(prefix / "bin/python", prefix, base, None, ("llamaserve",), True, needs, wishes)
    return checked(packages(replace(case_of(described(tmp_path)), installation=installation)))


def test_this_installation_is_well() -> None:
    assert one(packages(Case(Settings())), "packages").level is Level.OK


def test_packages_that_fit_are_well(tmp_path: Path) -> None:
    needs = ("msgspec>=0.1", "pytest", "nothing-of-this-name; python_version < '3'")
    assert not bad(findings(tmp_path, *needs, wishes=("rich",)))


def test_packages_that_are_missing_or_other_versions(tmp_path: Path) -> None:
    finding = one(findings(tmp_path, "nothing-of-this-name>=1", "msgspec<0.1", "rich", "!!"), "packages")
    assert finding.level is Level.PROBLEM
    assert "nothing-of-this-name is not installed; msgspec is " in finding.message
    assert "<0.1 is needed; !! can't be read" in finding.message
    fix = "/opt/venv/bin/python -m pip install 'nothing-of-this-name>=1' 'msgspec<0.1' rich '!!'"
    assert finding.fix == fix


def test_the_faster_event_loop_is_missed(tmp_path: Path) -> None:
    finding = one(findings(tmp_path, wishes=("nothing-of-this-name>=0.6",)), "fast")
    assert finding.level is Level.NOTE
    assert finding.fix == "/opt/venv/bin/python -m pip install 'nothing-of-this-name>=0.6'"


def test_the_systems_own_python_is_noted_outside_of_containers(tmp_path: Path) -> None:
    finding = one(findings(tmp_path, isolated=False), "environment")
    assert finding.level is Level.NOTE
    assert finding.fix is not None
    assert finding.fix.startswith("python3 -m venv ~/.venvs/llamaserve && ~/.venvs/llamaserve/bin/pip install ")
    (tmp_path / ".dockerenv").touch()
    assert one(findings(tmp_path, isolated=False), "environment").level is Level.OK


def test_a_checkout_makes_its_own_environment(tmp_path: Path) -> None:
    installation = replace(installed(tmp_path / "usr"), checkout=tmp_path / "my checkout")
    assert installation.install_anew() == f"make -C '{tmp_path}/my checkout' install"


def test_a_python_of_32_bits(tmp_path: Path) -> None:
    pi = described(tmp_path, {"proc/device-tree/model": "Raspberry Pi 4 Model B\0"}, processor="aarch64")
    finding = _python(pi, bits=32)
    checked([finding])
    assert finding.level is Level.PROBLEM
    assert "the kernel has 64" in finding.message
    assert finding.fix == "sudo apt-get install -y rpi-imager && rpi-imager"
    other = _python(described(tmp_path / "other", processor="armv7l"), bits=32)
    assert other.fix == "getconf LONG_BIT; uname -m"
