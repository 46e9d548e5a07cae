"""Memory, swap and limits."""

from __future__ import annotations

import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
from doctor_machine import about, bad, case_of, checked, described, one

from llamaserve.doctor import memory as examined
from llamaserve.doctor.case import Case
from llamaserve.doctor.disk import Space
from llamaserve.doctor.findings import Finding, Level
from llamaserve.doctor.machine import Machine
from llamaserve.doctor.memory import memory
from llamaserve.settings import Settings

GB = 10**9
UNLIMITED = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


@pytest.fixture(autouse=True)
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    set_memory(monkeypatch)
    set_limits(monkeypatch)


def set_memory(
    monkeypatch: pytest.MonkeyPatch, free: float = 8, total: float = 16, used: float = 0, swap: float = 4
) -> None:
    monkeypatch.setattr(examined, "available_memory", lambda: int(free * GB))
    monkeypatch.setattr(examined, "total_memory", lambda: int(total * GB))
    told = SimpleNamespace(total=int(swap * GB), used=int(used * GB))
    monkeypatch.setattr(examined.psutil, "swap_memory", lambda: told)


def set_limits(monkeypatch: pytest.MonkeyPatch, **limits: tuple[int, int]) -> None:
    told = {getattr(resource, f"RLIMIT_{name}"): pair for name, pair in limits.items()}
    monkeypatch.setattr(examined.resource, "getrlimit", lambda kind: told.get(kind, UNLIMITED))


def findings(machine: Machine, settings: Settings | None = None) -> list[Finding]:
    return checked(memory(case_of(machine, settings)))


def test_a_roomy_machine_is_well(tmp_path: Path) -> None:
    found = findings(described(tmp_path))
    assert not bad(found)
    assert one(found, "memory").message == "8.0 GB of 16.0 GB are free"


def test_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_memory(monkeypatch, free=0.4, total=2)
    assert one(findings(described(tmp_path)), "memory").level is Level.WARNING


def test_swap_that_is_missing_or_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_memory(monkeypatch, swap=0)
    monkeypatch.setattr(examined, "space", lambda folder: Space(100 * GB, None))
    fix = one(findings(described(tmp_path, superuser=True)), "swap").fix
    assert fix == "fallocate -l 8G /swapfile && chmod 600 /swapfile && mkswap /swapfile && swapon /swapfile"
    assert not about(findings(described(tmp_path / "container", {".dockerenv": ""})), "swap")
    set_memory(monkeypatch, used=3)
    assert one(findings(described(tmp_path)), "swap").fix == "sudo swapoff -a && sudo swapon -a"
    set_memory(monkeypatch, used=3, free=3)
    assert one(findings(described(tmp_path)), "swap").level is Level.WARNING


def test_no_file_to_swap_to_where_there_is_one_or_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_memory(monkeypatch, swap=0)
    monkeypatch.setattr(examined, "space", lambda folder: Space(16 * GB, None))
    finding = one(findings(described(tmp_path)), "swap")
    assert finding.fix is not None
    assert finding.fix.startswith("du -xh ")
    assert "16.0 GB free" in finding.message
    assert one(findings(described(tmp_path, {"swapfile": ""})), "swap").fix == "sudo swapon /swapfile"


@pytest.mark.parametrize(("some", "full", "level"), [(12, 1, Level.WARNING), (30, 20, Level.PROBLEM), (5, 1, None)])
def test_programs_that_wait_for_memory(some: int, full: int, level: Level | None, tmp_path: Path) -> None:
    text = f"some avg10=0.00 avg60={some}.50 avg300=0.00 total=1\nfull avg10=0.00 avg60={full}.00 avg300=0.00 total=1"
    found = about(findings(described(tmp_path, {"proc/pressure/memory": text})), "pressure")
    assert [finding.level for finding in found] == ([level] if level else [])


def test_a_kernel_that_promises_too_little(tmp_path: Path) -> None:
    fix = one(findings(described(tmp_path, {"proc/sys/vm/overcommit_memory": "2"})), "overcommit").fix
    assert fix == "sudo sysctl vm.overcommit_memory=0"


def test_limits_of_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_limits(monkeypatch, AS=(GB, resource.RLIM_INFINITY), NOFILE=(256, 1 << 20))
    found = findings(described(tmp_path))
    assert one(found, "addresses").fix == "ulimit -v unlimited"
    assert one(found, "open files").fix == "ulimit -n 4096"
    set_limits(monkeypatch, NOFILE=(256, 256))
    fix = one(findings(described(tmp_path, USER="ann")), "open files").fix
    assert fix == "echo 'ann - nofile 4096' | sudo tee -a /etc/security/limits.d/llamaserve.conf"


def test_locking_counts_where_models_ask_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_limits(monkeypatch, MEMLOCK=(65536, 65536))
    models = tmp_path / "models.yaml"
    models.write_text("models: {a: {source: 'file:a.gguf'}}")
    assert not bad(findings(described(tmp_path), Settings(models_file=models)))
    models.write_text("models: {a: {source: 'file:a.gguf', mlock: true}}")
    assert one(findings(described(tmp_path), Settings(models_file=models)), "mlock").level is Level.WARNING
    models.write_text("models: [")
    assert not bad(findings(described(tmp_path), Settings(models_file=models)))


def test_this_machine_is_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert about(memory(Case(Settings())), "memory")
