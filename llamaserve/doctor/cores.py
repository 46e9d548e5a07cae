"""How many cores a model gets, and what else keeps them from computing."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from llamaserve.doctor.case import Case
from llamaserve.doctor.findings import Finding, command, note, ok, warning
from llamaserve.doctor.machine import Machine
from llamaserve.registry.hardware import performance_cores

_LOOK = 0.3  # seconds of looking at what others use
_BUSY = 0.35  # of the cores that a model would use; see engine/threads.py
_STOLEN = 0.05  # of the time
_SCALING = "sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
_SELF_STEERED = ("intel_pstate", "amd-pstate", "amd-pstate-epp")  # whose powersave follows the load
_PINNING = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PROC_BIND", "OMP_PLACES")
_THROTTLED = {
    1 << 0: "the voltage is too low: it needs a stronger power supply or a shorter cable",
    1 << 1: "its frequency is held down now",
    1 << 2: "it is throttled now",
    1 << 3: "it is too hot now: it needs a fan or a heat sink",
    1 << 16: "the voltage has been too low since it started: it needs a stronger power supply",
    1 << 18: "it has been throttled since it started",
    1 << 19: "it has been too hot since it started: it needs a fan or a heat sink",
}


def cores(case: Case) -> Iterator[Finding]:
    """Examine the processor's cores, and who else uses them."""
    machine, threads = case.machine, performance_cores()
    total = os.cpu_count() or 1
    yield ok("threads", f"a model computes with {threads} of {total} hardware threads: one for each fast core")
    yield from _affinity(total)
    yield from _quota(machine, total)
    yield from _load(machine, threads)
    yield from _openmp(machine, threads)
    yield from _governor(machine)
    yield from _throttling(machine)


def _affinity(total: int) -> Iterator[Finding]:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    if allowed < total:
        message = f"this process may run on {allowed} of {total} hardware threads only"
        yield note("affinity", message, f"taskset -cp 0-{total - 1} $$")


# ---- limits of containers ----------------------------------------------------------------------------------------


def _quota(machine: Machine, total: int) -> Iterator[Finding]:
    limit = cpu_quota(machine)
    if limit is not None and limit < total:
        message = f"a control group limits it to the time of {limit:g} of {total} processors"
        yield note("quota", message, _raise_quota(machine, total))


def cpu_quota(machine: Machine) -> float | None:
    """Return how many processors' time the control groups around this process allow; None for all of it."""
    limits: list[float] = []
    for folder in _groups(machine):
        words = (machine.read(f"sys/fs/cgroup{folder}/cpu.max") or "").split()
        with contextlib.suppress(ValueError, ZeroDivisionError):
            if len(words) == 2 and words[0] != "max":
                limits.append(int(words[0]) / int(words[1]))
    first = [machine.read(f"sys/fs/cgroup/cpu/cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
    if all(re.fullmatch(r"[1-9]\d*", each) for each in first):
        limits.append(int(first[0]) / int(first[1]))
    return min(limits, default=None)


def _groups(machine: Machine) -> list[str]:
    """Return the control group of this process and those around it, as paths; the outermost is empty."""
    own = next((line[3:] for line in (machine.read("proc/self/cgroup") or "").splitlines() if line[:3] == "0::"), "")
    parts = [part for part in own.split("/") if part not in ("", "..")]
    return ["".join(f"/{part}" for part in parts[:count]) for count in range(len(parts) + 1)]


def _raise_quota(machine: Machine, total: int) -> str:
    if machine.in_container and (name := machine.read("etc/hostname")):
        return command("docker", "update", f"--cpus={total}", name)
    unit = next((group.rpartition("/")[2] for group in reversed(_groups(machine)) if group.endswith(".service")), None)
    if unit is not None:
        return machine.as_root(command("systemctl", "set-property", unit, "CPUQuota="))
    return "cat /proc/self/cgroup /sys/fs/cgroup/cpu.max"


# ---- others ------------------------------------------------------------------------------------------------------


def _load(machine: Machine, threads: int) -> Iterator[Finding]:
    """Look for a moment at what other programs use, and at what the hypervisor withholds."""
    before, busiest = _times(machine), _Processes()
    time.sleep(_LOOK)
    after = _times(machine)
    if before is not None and after is not None:
        yield from _stolen(before, after)
    other = busiest.most()
    total = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    running = psutil.getloadavg()[0]
    if other is not None and other.used > _BUSY and other.used + threads > total:
        message = f"{other.name} (process {other.pid}) uses {other.used:.1f} cores: models get fewer threads meanwhile"
        renice = command("renice", "-n", 19, "-p", other.pid)
        yield warning("busy", message, renice if other.own else machine.as_root(renice))
    elif running > total + 1:
        message = f"{running:.1f} programs want to run at once on {total} hardware threads"
        listing = "ps -Ao pcpu,pid,comm -r | head" if machine.is_mac else "ps -eo pcpu,pid,comm --sort=-pcpu | head"
        yield note("busy", message, listing)
    else:
        yield ok("busy", f"load of the last minute {running:.1f}; no program is in the way")


@dataclass(frozen=True)
class _Other:
    """A process that uses so many cores, and whether it is this user's own."""

    name: str
    pid: int
    used: float
    own: bool


class _Processes:
    """What processes other than this one use, from now on."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._before: dict[psutil.Process, float] = {}
        for process in psutil.process_iter():
            if (used := _used(process)) is not None and process.pid != os.getpid():
                self._before[process] = used

    def most(self) -> _Other | None:
        """Return the process that uses most; those of low priority don't count, and neither do our models."""
        seconds = max(time.monotonic() - self._since, 0.01)
        found: _Other | None = None
        for process, before in self._before.items():
            used = ((_used(process) or 0.0) - before) / seconds
            if used <= (found.used if found is not None else 0.0):
                continue
            with contextlib.suppress(psutil.Error):
                if process.nice() <= 0 and not any(word.startswith("llamaserve.") for word in process.cmdline()):
                    own = process.uids().real == os.getuid()
                    found = _Other(process.name(), process.pid, used, own)
        return found


def _used(process: psutil.Process) -> float | None:
    """Return the seconds that a process has computed."""
    try:
        times = process.cpu_times()
    except psutil.Error:
        return None
    return float(times.user + times.system)


def _times(machine: Machine) -> list[int] | None:
    """Return the kernel's counts of what processors have done, all together."""
    first = (machine.read("proc/stat") or "").partition("\n")[0].split()
    return [int(each) for each in first[1:]] if first[:1] == ["cpu"] and len(first) > 8 else None


def _stolen(before: list[int], after: list[int]) -> Iterator[Finding]:
    spent = [late - early for early, late in zip(before, after, strict=True)]
    now = spent[7] / max(1, sum(spent[:8]))
    always = after[7] / max(1, sum(after[:8]))
    share = max(now, always)
    if share > _STOLEN:
        when = "now" if now >= always else "since it started"
        message = f"the host of this virtual machine withholds {share:.0%} of its time {when}: ask for a less busy one"
        yield warning("stolen time", message, "vmstat 2 5")


# ---- settings ----------------------------------------------------------------------------------------------------


def _openmp(machine: Machine, threads: int) -> Iterator[Finding]:
    environment = machine.environment
    if pinning := [name for name in _PINNING if environment.get(name, "false").lower() not in ("false", "")]:
        message = f"{', '.join(pinning)}: the threads of all models are bound to the same cores"
        yield warning("OpenMP", message, command("unset", *pinning))
    limit = environment.get("OMP_THREAD_LIMIT", "")
    if limit.isdigit() and int(limit) < threads:
        yield warning("OpenMP", f"OMP_THREAD_LIMIT allows {limit} threads only", "unset OMP_THREAD_LIMIT")
    if environment.get("OMP_WAIT_POLICY", "").lower() == "active":
        message = "OMP_WAIT_POLICY=active: threads that wait keep their cores busy, and all other programs waiting"
        yield note("OpenMP", message, "unset OMP_WAIT_POLICY")
    if "GOMP_SPINCOUNT" in environment:
        message = "GOMP_SPINCOUNT in the environment replaces the value that llamaserve has measured to be best"
        yield note("OpenMP", message, "unset GOMP_SPINCOUNT")
    if environment.get("OMP_NUM_THREADS"):
        message = "OMP_NUM_THREADS does not change the threads of models; `threads` in models.yaml does"
        yield note("OpenMP", message, "unset OMP_NUM_THREADS")


def _governor(machine: Machine) -> Iterator[Finding]:
    if machine.is_mac:
        if re.search(r"lowpowermode\s+1", machine.ask("pmset", "-g") or ""):
            fix = machine.as_root("pmset -a lowpowermode 0")
            yield warning("frequency", "low power mode is on, which makes models slower", fix)
        return
    slow = [path for path in machine.matching(_SCALING) if machine.read(str(path)) == "powersave"]
    slow = [path for path in slow if machine.read(str(path.parent / "scaling_driver")) not in _SELF_STEERED]
    preference = "sys/devices/system/cpu/cpu0/cpufreq/energy_performance_preference"
    if slow:
        message = f"the governor powersave keeps {len(slow)} processors at their lowest frequency"
        yield warning("frequency", message, machine.write_as_root("performance", f"/{_SCALING}"))
    elif machine.read(preference) == "power":
        fix = machine.write_as_root("balance_performance", "/" + preference.replace("cpu0", "cpu*"))
        yield note("frequency", "the processors prefer saving power to speed", fix)


def _throttling(machine: Machine) -> Iterator[Finding]:
    """Ask a Raspberry Pi whether it had to slow down."""
    told = re.fullmatch(r"throttled=0x([0-9a-fA-F]+)", machine.ask("vcgencmd", "get_throttled") or "")
    if told is None:
        return
    bits = int(told[1], 16)
    found = [words for bit, words in _THROTTLED.items() if bits & bit]
    if found:
        yield warning("Raspberry Pi", "; ".join(found), "vcgencmd get_throttled; vcgencmd measure_temp")
    else:
        yield ok("Raspberry Pi", "neither throttled nor short of power")
