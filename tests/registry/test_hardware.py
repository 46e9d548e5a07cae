"""Counting performance cores and memory from the files with which Linux describes them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
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


@linux_only
@pytest.mark.parametrize(
    ("text", "features"),
    [
        ("processor : 0\nflags\t\t: fpu avx avx2 f16c\n", {"fpu", "avx", "avx2", "f16c"}),
        ("processor : 0\nFeatures : fp asimd asimddp\n", {"fp", "asimd", "dotprod"}),
        ("processor : 0\n", set()),
    ],
)
def test_what_a_cpu_can_do_is_read(
    text: str, features: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(hardware, "_CPU_INFO", tmp_path / "cpuinfo")
    assert hardware.cpu_features.__wrapped__() == features


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(hardware, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(hardware, "_OWN_GROUPS", tmp_path / "own")
    (tmp_path / "groups").mkdir()
    (tmp_path / "own").write_text("0::/a/b\n")
    return tmp_path / "groups"


def limit(folder: Path, limit: object, used: int, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")


def test_without_a_container_the_machines_memory_counts(groups: Path) -> None:
    assert hardware.total_memory() == psutil.virtual_memory().total
    assert hardware.available_memory() == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_a_containers_limit_of_memory_counts_less_what_is_in_use(groups: Path) -> None:
    limit(groups / "a" / "b", 1_000_000, 400_000)
    assert hardware.total_memory() == 1_000_000
    assert hardware.available_memory() == 600_000
    limit(groups / "a" / "b", 1_000_000, 400_000, cached=300_000)  # files in the cache give way
    assert hardware.available_memory() == 900_000
    limit(groups / "a" / "b", 1_000_000, 1_400_000)
    assert hardware.available_memory() == 0


def test_the_limits_around_a_container_count_too(groups: Path) -> None:
    limit(groups / "a" / "b", "max", 400_000)
    limit(groups / "a", 2_000_000, 1_500_000)
    assert hardware.total_memory() == 2_000_000
    assert hardware.available_memory() == 500_000
    limit(groups, 900_000, 800_000)  # seen from inside a container, its own files are at the root
    assert (hardware.total_memory(), hardware.available_memory()) == (900_000, 100_000)


def test_limits_of_the_former_kind_count(groups: Path) -> None:
    (groups.parent / "own").write_text("5:cpu,cpuacct:/x\n4:memory:/docker/1\n0::/\n")
    folder = groups / "memory" / "docker" / "1"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("3000000\n")
    (folder / "memory.usage_in_bytes").write_text("1000000\n")
    (folder / "memory.stat").write_text("total_inactive_file 500000\n")
    assert (hardware.total_memory(), hardware.available_memory()) == (3_000_000, 2_500_000)


def test_damaged_descriptions_of_limits_are_passed_over(groups: Path) -> None:
    limit(groups / "a" / "b", "much", 400_000)
    (groups.parent / "own").write_text("nonsense\n0::/a/b\n::\n")
    assert hardware.total_memory() == psutil.virtual_memory().total
