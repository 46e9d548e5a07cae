"""Cores, their limits, other programs, and settings that slow threads down."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from doctor_machine import about, bad, case_of, checked, described, one

from llamaserve.doctor import cores as examined
from llamaserve.doctor.case import Case
from llamaserve.doctor.cores import cores, cpu_quota
from llamaserve.doctor.findings import Finding, Level
from llamaserve.doctor.machine import Machine
from llamaserve.settings import Settings

GOVERNOR = "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
DRIVER = "sys/devices/system/cpu/cpu0/cpufreq/scaling_driver"


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight cores, of which a model gets four, and nobody else on them."""
    monkeypatch.setattr(examined, "performance_cores", lambda: 4)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(examined.psutil, "process_iter", list)
    monkeypatch.setattr(examined.psutil, "getloadavg", lambda: (0.1, 0.1, 0.1))
    monkeypatch.setattr(examined, "_LOOK", 0.01)


def findings(machine: Machine) -> list[Finding]:
    return checked(cores(case_of(machine)))


def test_a_quiet_machine_is_well(tmp_path: Path) -> None:
    found = findings(described(tmp_path))
    assert not bad(found)
    assert "4 of 8 hardware threads" in one(found, "threads").message


def test_a_process_that_may_not_use_all_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    assert one(findings(described(tmp_path)), "affinity").fix == "taskset -cp 0-7 $$"


def test_limits_of_control_groups_are_found_on_the_way_to_the_root(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/system.slice/llamaserve.service", "sys/fs/cgroup/cpu.max": "max 100000"}
    machine = described(tmp_path / "a", {**files, "sys/fs/cgroup/system.slice/cpu.max": "150000 100000"})
    assert cpu_quota(machine) == 1.5
    finding = one(findings(machine), "quota")
    assert finding.fix == "sudo systemctl set-property llamaserve.service CPUQuota="
    inside = described(
        tmp_path / "b", {"sys/fs/cgroup/cpu.max": "200000 100000", ".dockerenv": "", "etc/hostname": "f00"}
    )
    assert one(findings(inside), "quota").fix == "docker update --cpus=8 f00"
    old = {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}
    assert cpu_quota(described(tmp_path / "c", old)) == 3


@pytest.mark.parametrize("text", ["", "max 100000", "abc def", "100 0", "-1", "1 2 3"])
def test_limits_that_say_nothing_are_none(text: str, tmp_path: Path) -> None:
    assert cpu_quota(described(tmp_path, {"sys/fs/cgroup/cpu.max": text, "proc/self/cgroup": "0::/../../x"})) is None


def test_the_program_that_is_in_the_way_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Process:
        pid = 4711
        seconds = 0.0

        def cpu_times(self) -> SimpleNamespace:
            self.seconds += 100
            return SimpleNamespace(user=self.seconds, system=0.0)

        def nice(self) -> int:
            return 0

        def cmdline(self) -> list[str]:
            return ["ffmpeg"]

        def name(self) -> str:
            return "ffmpeg"

        def uids(self) -> SimpleNamespace:
            return SimpleNamespace(real=os.getuid() + self.foreign)

        foreign = 0

    busy = Process()
    monkeypatch.setattr(examined.psutil, "process_iter", lambda: [busy])
    finding = one(findings(described(tmp_path)), "busy")
    assert finding.message.startswith("ffmpeg (process 4711) uses ")
    assert finding.fix == "renice -n 19 -p 4711"
    busy.foreign = 1
    assert one(findings(described(tmp_path)), "busy").fix == "sudo renice -n 19 -p 4711"


def test_a_long_queue_of_programs_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examined.psutil, "getloadavg", lambda: (20.0, 0.1, 0.1))
    assert one(findings(described(tmp_path)), "busy").level is Level.NOTE


def test_time_that_the_hypervisor_keeps_is_told_of(tmp_path: Path) -> None:
    finding = one(
        findings(described(tmp_path, {"proc/stat": "cpu 100 0 100 700 0 0 0 100 0 0\ncpu0 1"})), "stolen time"
    )
    assert "10% of its time since it started" in finding.message
    assert not bad(findings(described(tmp_path, {"proc/stat": "cpu 100 0 100 700 0 0 0 1 0 0\ncpu0 1"})))
    assert not bad(findings(described(tmp_path, {"proc/stat": "nothing"})))


def test_settings_of_openmp_that_slow_models_down(tmp_path: Path) -> None:
    slow = described(
        tmp_path, OMP_PROC_BIND="close", GOMP_CPU_AFFINITY="0-3", OMP_THREAD_LIMIT="2", OMP_NUM_THREADS="1"
    )
    found = about(findings(slow), "OpenMP")
    assert [finding.fix for finding in found] == [
        "unset GOMP_CPU_AFFINITY OMP_PROC_BIND",
        "unset OMP_THREAD_LIMIT",
        "unset OMP_NUM_THREADS",
    ]
    assert not bad(findings(described(tmp_path, OMP_PROC_BIND="false", OMP_THREAD_LIMIT="many")))
    assert about(findings(described(tmp_path, OMP_WAIT_POLICY="ACTIVE", GOMP_SPINCOUNT="infinity")), "OpenMP")


def test_a_governor_that_saves_power(tmp_path: Path) -> None:
    finding = one(findings(described(tmp_path / "a", {GOVERNOR: "powersave", DRIVER: "cpufreq-dt"})), "frequency")
    assert finding.level is Level.WARNING
    assert finding.fix == "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
    steered = {GOVERNOR: "powersave", DRIVER: "intel_pstate"}
    assert not bad(findings(described(tmp_path / "b", steered)))
    preference = "sys/devices/system/cpu/cpu0/cpufreq/energy_performance_preference"
    assert one(findings(described(tmp_path / "c", {**steered, preference: "power"})), "frequency").level is Level.NOTE


def test_a_mac_in_low_power_mode(tmp_path: Path) -> None:
    machine = described(tmp_path, programs={"pmset -g": " lowpowermode         1\n"}, system="Darwin")
    assert one(findings(machine), "frequency").fix == "sudo pmset -a lowpowermode 0"


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ("throttled=0x50005", "the voltage is too low: "),
        ("throttled=0x80000", "too hot since"),
        ("throttled=0x0", None),
    ],
)
def test_a_raspberry_pi_that_is_slowed_down(told: str, words: str | None, tmp_path: Path) -> None:
    finding = one(findings(described(tmp_path, programs={"vcgencmd get_throttled": told})), "Raspberry Pi")
    assert finding.level is (Level.OK if words is None else Level.WARNING)
    assert (words or "neither") in finding.message


def test_this_machine_is_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert about(cores(Case(Settings())), "threads")
