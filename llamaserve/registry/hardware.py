"""What this machine offers to a model: cores worth running on, what they can do, and memory. Knows the operating
system's files, not llama.cpp.
"""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

_CPUS = Path("/sys/devices/system/cpu")
_CPU_INFO = Path("/proc/cpuinfo")
_OWN_GROUPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")
_ARM_FEATURES = {"asimddp": "dotprod"}  # Linux's names for what others call otherwise


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


@functools.cache
def cpu_features() -> frozenset[str]:
    """Return what the CPU's instructions include, such as ``avx2`` or ``dotprod``; empty where nobody says."""
    if sys.platform == "darwin":
        return frozenset({"dotprod"} if platform.machine() == "arm64" else {"avx2"})
    for line in (_read(_CPU_INFO) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(_ARM_FEATURES.get(flag, flag) for flag in value.split())
    return frozenset()


def total_memory() -> int:
    """Return the bytes of main memory that this process and those beside it may use: the machine's, or a container's
    limit.
    """
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _memory_limits())])


def available_memory() -> int:
    """Return the bytes of main memory that can be taken without swapping. What a container's processes use counts
    against its limit, and against those around it; files in the cache do not, since they give way.
    """
    left = (max(0, limit - used) for limit, used in _memory_limits())
    return min([psutil.virtual_memory().available, *left])


def _memory_limits() -> Iterator[tuple[int, int]]:
    """Yield limit and use of each container around this process that has a limit."""
    for line in (_read(_OWN_GROUPS) or "").splitlines():
        _, controllers, name = (*line.split(":", 2), "", "")[:3]
        if not controllers:
            yield from _limits(_GROUPS, name, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _limits(_GROUPS / "memory", name, *files)


def _limits(root: Path, name: str, limit_file: str, use_file: str, cache_key: str) -> Iterator[tuple[int, int]]:
    """Yield limit and use from a container to the outermost. Inside of one the outer ones may be out of sight, and its
    own files at the root.
    """
    inner = root / name.strip("/")
    for folder in dict.fromkeys((inner, *(parent for parent in inner.parents if root in (parent, *parent.parents)))):
        limit, used = _read(folder / limit_file), _read(folder / use_file)
        if limit is not None and used is not None and limit.isdecimal() and used.isdecimal():
            yield int(limit), max(0, int(used) - _file_cache(folder, cache_key))


def _file_cache(folder: Path, key: str) -> int:
    for line in (_read(folder / "memory.stat") or "").splitlines():
        name, _, value = line.partition(" ")
        if name == key and value.isdecimal():
            return int(value)
    return 0


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
