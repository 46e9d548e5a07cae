"""Counting performance cores from the files with which Linux describes them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from llamaserve.registry import hardware

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's description of its cores")


@pytest.fixture
def cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(hardware, "_CPUS", tmp_path)
    monkeypatch.setattr(hardware, "_cgroup_quota", lambda: None)
    return tmp_path


def describe(cpus: Path, number: int, siblings: str, frequency: int | None = None) -> None:
    folder = cpus / f"cpu{number}"
    (folder / "topology").mkdir(parents=True)
    (folder / "topology" / "thread_siblings_list").write_text(siblings + "\n")
    if frequency is not None:
        (folder / "cpufreq").mkdir()
        (folder / "cpufreq" / "cpuinfo_max_freq").write_text(f"{frequency}\n")


@linux_only
def test_hyper_threads_count_once(cpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        describe(cpus, number, siblings)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert hardware.performance_cores() == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2})
    assert hardware.performance_cores() == 1


@linux_only
def test_efficiency_cores_do_not_count(cpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(8):
        describe(cpus, number, str(number), 2_400_000 if number < 4 else 1_500_000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert hardware.performance_cores() == 4


@linux_only
def test_a_machine_that_says_nothing_has_as_many_cores_as_it_lets_us_use(
    cpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7})
    assert hardware.performance_cores() == 3


@linux_only
@pytest.mark.parametrize(("quota", "cores"), [(0.5, 1), (2.0, 2), (16.0, 4), (None, 4)])
def test_a_containers_limit_counts(
    quota: float | None, cores: int, cpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(hardware, "_cgroup_quota", lambda: quota)
    assert hardware.performance_cores() == cores


def test_this_machine_has_a_core() -> None:
    assert 1 <= hardware.performance_cores() <= (os.cpu_count() or 1)
