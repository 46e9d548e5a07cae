"""What this machine offers to a model: cores worth running on. Knows the operating system's files, not llama.cpp."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")


def performance_cores() -> int:
    """Return the number of physical performance cores that this process may use, at least 1.

    llama.cpp's threads meet at a barrier many times a token, so a hyper-thread or an efficiency core among them slows
    all of them down.
    """
    if sys.platform == "darwin":
        return _sysctl("hw.perflevel0.physicalcpu") or _sysctl("hw.physicalcpu") or os.cpu_count() or 1
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = max(1, len(_fastest(_one_thread_per_core(allowed))))
    quota = _cgroup_quota()
    return cores if quota is None else max(1, min(cores, round(quota)))


def _sysctl(name: str) -> int | None:
    try:
        answer = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=True)
        return int(answer.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _one_thread_per_core(cpus: set[int]) -> set[int]:
    """Return one of the hardware threads of each core, as Linux describes them; all where it does not."""
    cores: dict[str, int] = {}
    for cpu in sorted(cpus):
        siblings = _read(_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list") or str(cpu)
        cores.setdefault(siblings, cpu)
    return set(cores.values())


def _fastest(cpus: set[int]) -> set[int]:
    """Drop efficiency cores: those of less than 80 % of the best core's capacity or top frequency."""
    speeds: dict[int, int] = {}
    for cpu in cpus:
        text = _read(_CPUS / f"cpu{cpu}" / "cpu_capacity") or _read(_CPUS / f"cpu{cpu}" / "cpufreq/cpuinfo_max_freq")
        if text is None or not text.isdigit():
            return cpus
        speeds[cpu] = int(text)
    best = max(speeds.values(), default=0)
    return {cpu for cpu, speed in speeds.items() if speed >= 0.8 * best}


def _cgroup_quota() -> float | None:
    """Return the CPUs' worth of time that a container is limited to, or None."""
    text = _read(Path("/sys/fs/cgroup/cpu.max"))
    if text is None or text.startswith("max"):
        return None
    quota, period = text.split()
    return int(quota) / int(period)


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
