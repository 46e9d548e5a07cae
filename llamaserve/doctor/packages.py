"""Whether Python and the packages are those that llamaserve needs."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterator, Sequence

from packaging.requirements import InvalidRequirement, Requirement

from llamaserve.doctor.case import Case
from llamaserve.doctor.findings import Finding, note, ok, problem
from llamaserve.doctor.machine import Machine

_FAST = "fast"  # the extra with the faster event loop and HTTP parser


def packages(case: Case) -> Iterator[Finding]:
    """Examine Python, its environment, and the packages in it."""
    yield _python(case.machine, bits=64 if sys.maxsize > 2**32 else 32)
    yield from _environment(case)
    wrong = list(unfit(case.installation.requirements()))
    if wrong:
        yield problem("packages", "; ".join(wrong), case.installation.install_all())
    else:
        yield ok("packages", "all that are needed are here, in fitting versions")
    yield from _fast(case)


def _python(machine: Machine, *, bits: int) -> Finding:
    version = f"{platform.python_implementation()} {platform.python_version()}"
    if bits == 64:
        return ok("Python", f"{version}, 64 bits")
    message = f"{version} has 32 bits: models over 2 GB can't be loaded, and small ones are slow"
    if machine.processor in ("aarch64", "x86_64"):
        return problem(
            "Python", f"{message}; the kernel has 64, the rest of the system has not", _fresh_system(machine)
        )
    return problem("Python", f"{message}; install a system of 64 bits", _fresh_system(machine))


def _fresh_system(machine: Machine) -> str:
    """Return the command with which a system of 64 bits is written to a card, or found out about."""
    if "Raspberry Pi" in (machine.read("proc/device-tree/model") or ""):
        return machine.as_root("apt-get install -y rpi-imager && rpi-imager")
    return "getconf LONG_BIT; uname -m"


def _environment(case: Case) -> Iterator[Finding]:
    installation = case.installation
    if installation.isolated or (installation.prefix / "conda-meta").is_dir():
        yield ok("environment", f"{installation.prefix}")
    elif case.machine.in_container:
        yield ok("environment", "the container's own Python")
    else:
        yield note(
            "environment",
            "llamaserve is installed beside the system's packages, which an upgrade of the system may change",
            installation.install_anew(),
        )


def unfit(requirements: Sequence[str]) -> Iterator[str]:
    """Yield what is missing or has another version than is needed."""
    for line in requirements:
        try:
            needed = Requirement(line)
        except InvalidRequirement:
            yield f"{line} can't be read"
            continue
        if needed.marker is not None and not needed.marker.evaluate():
            continue
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            yield f"{needed.name} is not installed"
            continue
        if not needed.specifier.contains(version, prereleases=True):
            yield f"{needed.name} is {version}, and {needed.specifier} is needed"


def _fast(case: Case) -> Iterator[Finding]:
    wanted = case.installation.requirements(_FAST)
    if lacking := list(unfit(wanted)):
        message = (
            f"without a faster event loop and HTTP parser, tokens cost more of the processor: {'; '.join(lacking)}"
        )
        made = case.installation.made_by_make
        fix = case.installation.install_all() if made else case.installation.install(*wanted)
        yield note("fast", message, fix)
    else:
        yield ok("fast", "the faster event loop and HTTP parser are here")
