"""All checks, one after the other. None can hang or break the others: each runs in a thread that is given up when it
takes too long, and what goes wrong in one is a finding, too.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from queue import Empty, SimpleQueue

from llamaserve.doctor.backend import backend
from llamaserve.doctor.case import Case, Check
from llamaserve.doctor.clock import clock
from llamaserve.doctor.cores import cores
from llamaserve.doctor.disk import disk
from llamaserve.doctor.findings import Finding, problem
from llamaserve.doctor.llama import BUILD_LIMIT
from llamaserve.doctor.memory import memory
from llamaserve.doctor.models import models
from llamaserve.doctor.network import network
from llamaserve.doctor.packages import packages

logger = logging.getLogger(__name__)

# The seconds are those without a new finding. A file system or a name server that does not answer takes for ever.
CHECKS = (
    Check("packages", packages, 10),
    Check("backend", backend, BUILD_LIMIT + 10),
    Check("cores", cores, 15),
    Check("memory", memory, 10),
    Check("disk", disk, 10),
    Check("network", network, 10),
    Check("clock", clock, 10),
    Check("models", models, BUILD_LIMIT + 60),
)


def examine(case: Case, checks: Sequence[Check] = CHECKS) -> Iterator[tuple[str, Finding]]:
    """Yield each check's findings, with its heading, as soon as there is one."""
    for check in checks:
        for finding in _findings(check, case):
            yield check.heading, finding


def _findings(check: Check, case: Case) -> Iterator[Finding]:
    found: SimpleQueue[Finding | None] = SimpleQueue()
    threading.Thread(target=_run, args=(check, case, found), name=f"doctor: {check.heading}", daemon=True).start()
    while True:
        try:
            finding = found.get(timeout=check.limit)
        except Empty:
            message = f"this check has no answer after {check.limit:g} s, and was given up"
            yield problem(check.heading, message, case.command("doctor", "--json"))
            return
        if finding is None:
            return
        yield finding


def _run(check: Check, case: Case, found: SimpleQueue[Finding | None]) -> None:
    try:
        for finding in check.examine(case):
            found.put(finding)
    except Exception as error:  # a bug of ours must not keep the other checks from their say
        logger.debug("the check %s failed", check.heading, exc_info=True)
        what = f"this check itself failed: {type(error).__name__}: {str(error)[:300]}"
        found.put(problem(check.heading, what, case.command("doctor", "--json")))
    finally:
        found.put(None)
