"""Main memory, swap, and the limits that the system sets to a process."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

from llamaserve.doctor.case import Case
from llamaserve.doctor.disk import space
from llamaserve.doctor.findings import Finding, command, gigabytes, note, ok, one_after_the_other, problem, warning
from llamaserve.doctor.machine import Machine
from llamaserve.registry.hardware import available_memory, total_memory

_LITTLE = 0.1  # of the memory
_LEAST = 500_000_000  # bytes that the smallest models and the server take
_PRESSED, _STALLED = 10.0, 5.0  # percent of the time that some, or all, programs wait for memory
_FILES = 1024  # open files: each client, and each model's process, takes some
_SWAP_FILE = "/swapfile"
_PROFILE = "/etc/security/limits.d/llamaserve.conf"


def memory(case: Case) -> Iterator[Finding]:
    """Examine memory and the limits to it."""
    machine = case.machine
    available, total = available_memory(), total_memory()
    told = f"{gigabytes(available)} of {gigabytes(total)} are free"
    if available < max(_LEAST, _LITTLE * total):
        listing = "ps -Ao rss,pid,comm -m | head" if machine.is_mac else "ps -eo rss,pid,comm --sort=-rss | head"
        yield warning("memory", f"{told}, which is little: close the programs that take most", listing)
    else:
        yield ok("memory", told)
    yield from _swap(machine, total)
    yield from _pressure(machine)
    yield from _overcommit(machine)
    yield from _limits(machine, mlock=_wants_mlock(case))


def _swap(machine: Machine, total: int) -> Iterator[Finding]:
    if machine.is_mac or machine.in_container:
        return  # macOS makes its own; a container has no say in it
    swap = psutil.swap_memory()
    if swap.total == 0:
        yield _no_swap(machine, 4 if total < 16e9 else 8)
    elif swap.used > 0.5 * swap.total and swap.used < available_memory() - _LEAST:
        message = f"{gigabytes(swap.used)} of {gigabytes(swap.total)} are in use, and would fit into memory"
        fix = one_after_the_other(machine.as_root("swapoff -a"), machine.as_root("swapon -a"))
        yield note("swap", message, fix)
    elif swap.used > 0.5 * swap.total:
        message = f"{gigabytes(swap.used)} of {gigabytes(swap.total)} are in use: a model that is swapped out is slow"
        yield warning("swap", message, "ps -eo rss,pid,comm --sort=-rss | head")
    else:
        yield ok("swap", f"{gigabytes(swap.used)} of {gigabytes(swap.total)} are in use")


def _no_swap(machine: Machine, size: int) -> Finding:
    """Propose a file of so many GiB to swap to, or the one that is there; none where it would fill the disk."""
    message = "there is none: when memory runs out, the system ends a program at once"
    if machine.exists(_SWAP_FILE.lstrip("/")):
        use = machine.as_root(f"swapon {_SWAP_FILE}")
        return note("swap", f"{message}; {_SWAP_FILE} is there, and not in use", use)
    free = space(machine.root).free
    if free < 2 * (size << 30):
        told = f"{message}; with {gigabytes(free)} free on the disk, there is no room for a file to swap to"
        return note("swap", told, f"{command('du', '-xh', machine.root)} | sort -rh | head -n 20")
    make = (f"fallocate -l {size}G {_SWAP_FILE}", f"chmod 600 {_SWAP_FILE}", f"mkswap {_SWAP_FILE}")
    return note("swap", message, one_after_the_other(*map(machine.as_root, (*make, f"swapon {_SWAP_FILE}"))))


def _pressure(machine: Machine) -> Iterator[Finding]:
    """Read how long programs wait for memory; not every kernel counts that."""
    some, full = (_share(machine.read("proc/pressure/memory") or "", kind) for kind in ("some", "full"))
    if full > _STALLED or some > _PRESSED:
        message = f"programs wait for memory {max(some, full):.0f} % of the time: close some, or serve a smaller model"
        finding = problem if full > _STALLED else warning
        yield finding("pressure", message, "ps -eo rss,pid,comm --sort=-rss | head")


def _share(text: str, kind: str) -> float:
    found = re.search(rf"^{kind} .*avg60=([\d.]+)", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def _overcommit(machine: Machine) -> Iterator[Finding]:
    if machine.read("proc/sys/vm/overcommit_memory") == "2":
        message = "the kernel promises no more memory than it has, so large models may not load though they would fit"
        yield warning("overcommit", message, machine.as_root("sysctl vm.overcommit_memory=0"))


# ---- limits of this process --------------------------------------------------------------------------------------


def _wants_mlock(case: Case) -> bool:
    """Tell whether a model is to be locked in memory, as far as models.yaml says that."""
    from llamaserve.errors import RegistryError
    from llamaserve.registry.spec import find_models_file, load_registry

    try:
        registry = load_registry(find_models_file(case.settings.models_file))
    except RegistryError:  # which is a finding of its own
        return False
    return registry.defaults.mlock or any(spec.mlock for spec in registry.models.values())


def _limits(machine: Machine, *, mlock: bool) -> Iterator[Finding]:
    space, most = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        message = f"a process may have {gigabytes(space)} of addresses: larger models can't be loaded"
        yield problem("addresses", message, _raised(machine, "-v", "as", "unlimited", most))
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < _FILES:
        message = f"a process may open {files} files: that is few for many clients"
        yield warning("open files", message, _raised(machine, "-n", "nofile", str(4 * _FILES), most, 4 * _FILES))
    locked, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if mlock and locked != resource.RLIM_INFINITY:
        message = f"models.yaml asks for mlock, and a process may lock {gigabytes(locked)}"
        yield warning("mlock", message, _raised(machine, "-l", "memlock", "unlimited", most))


def _raised(machine: Machine, option: str, item: str, value: str, most: int, wanted: int | None = None) -> str:
    """Return the command that raises a limit: for this shell if that is allowed, else for good, from the next login."""
    if most == resource.RLIM_INFINITY or (wanted is not None and most >= wanted):
        return f"ulimit {option} {value}"
    if machine.is_mac:
        return f"ulimit -H{option[1:]} {value}"
    user = machine.environment.get("USER", "*")
    return machine.write_as_root(f"{user} - {item} {value}", str(Path(_PROFILE)), add=True)
