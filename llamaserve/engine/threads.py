"""How many threads llama.cpp shall compute with, so that no other program's work stops them. Knows CPU times, not what
is computed.

llama.cpp's threads meet at a barrier hundreds of times a token, so all of them stand still while one waits for a core.
Measured with SmolLM2-135M on two cores, one stream, tokens a second beside a program that uses so much of a core:

    cores used by it    0     0.12   0.19   0.28   0.36   all
    2 threads           127   102    73     68     57     29
    1 thread            85                                88

Eight streams give 27 and 16 steps a second quiet, 11 and 16 busy; prompts 299 and 166 tokens a second quiet, 162 and
167 busy: one number does for all of them.

whisper.cpp's threads meet less often. A minute of speech takes tiny.en 2.5 seconds with two threads; beside a busy
program 5.5 with two, and 5.4 with one.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable
from typing import NamedTuple

import psutil

_WINDOW = 0.2  # seconds of running time; two of them decide. The system counts CPU time in steps of 10 ms.

# Cores that others may use of those that our threads would need. The second of two threads stops paying at about 0.2,
# but the server's other process and a client take 0.1 to 0.3 while they handle tokens, and shall not end it.
_LOWER = 0.35  # above it there are too many threads
_RAISE = 0.25  # up to it there may be one more

# Two models may give up threads for each other at the same moment, and add them again, for ever. So one that has soon
# to give up what it added waits for a random number of windows before it adds again: at most twice as many each time.
_SOON = 5  # windows
_LONGEST_REST = 32  # windows

# After a pause it may be long since the threads were fewer for a reason, so a first short look decides whether all may
# be back: the answer to a short request would be over before two windows are. Where a step takes longer than the look,
# all are back at once.
_FORGOTTEN = 1.0  # seconds of pause
_FIRST_LOOK = 0.1  # seconds of running time
_RAISE_AT_FIRST = 0.5  # as ``_RAISE``; so short a look is less exact

_COUNTED = ("user", "system", "irq", "softirq")  # kinds of CPU time


class Usage(NamedTuple):
    """The CPUs that this process may run on, and the CPU seconds that were used on them up to now: by all processes,
    and by this one.
    """

    cores: int
    total: float
    own: float


def read_usage() -> Usage:
    """Ask the operating system, in 25 to 50 µs.

    What has a low priority gives way to our threads (beside ``nice -n 19`` two of them keep all of their speed), so it
    counts only if they have a low priority themselves. What the hypervisor withholds does not count: with fewer
    threads it would withhold less, which would look like a free core.
    """
    count = psutil.cpu_count() or 1
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(count)
    cpus = [psutil.cpu_times()]  # all together: the sum is rounded to 10 ms, not each of many numbers
    if len(allowed) < count:
        cpus = [times for cpu, times in enumerate(psutil.cpu_times(percpu=True)) if cpu in allowed]
    counted = (*_COUNTED, "nice") if os.getpriority(os.PRIO_PROCESS, 0) > 0 else _COUNTED
    total = sum(getattr(times, kind, 0.0) for times in cpus for kind in counted)
    return Usage(len(allowed), total, time.process_time())


class ThreadController:
    """Follows what other programs use, and says when the number of threads should change.

    A change needs two windows in a row that ask for it, so that a burst or pause of less than 100 ms changes nothing;
    it comes 0.4 to 0.6 s after its reason. Only time between ``resume`` and ``pause`` counts: what a client does
    between its requests is no reason, and several short answers are measured like a long one.
    """

    def __init__(
        self,
        most: int,
        *,
        long_steps: bool = False,
        clock: Callable[[], float] = time.monotonic,
        usage: Callable[[], Usage] = read_usage,
    ) -> None:
        self.threads = most
        self._most = most
        self._long_steps = long_steps
        self._clock = clock
        self._read = usage
        self._seconds = 0.0  # of the window, up to the last look
        self._others = 0.0  # CPU seconds that others used in them
        self._last_window: float | None = None  # cores that others used in it
        self._since_raise = _SOON  # windows
        self._rest = 0  # windows in which no thread is added
        self._longest_rest = 1
        self._first_look = False  # whether this is the first window after a long pause with fewer threads
        self._looked, self._usage = self._clock(), self._read()

    def resume(self) -> None:
        """There is work again."""
        paused, self._looked, self._usage = self._looked, self._clock(), self._read()
        if self._looked - paused > _FORGOTTEN and self.threads < self._most and not self._first_look:
            self._forget()
            if self._long_steps:
                self.threads = self._most
            else:
                self._first_look = True

    def pause(self) -> None:
        """There is no work; what is used until ``resume`` does not count."""
        self._look()

    def update(self) -> int | None:
        """After a step: return the number of threads if it should be another one from now on. Takes 0.1 µs where no
        window ends.
        """
        if self._seconds + self._clock() - self._looked < (_FIRST_LOOK if self._first_look else _WINDOW):
            return None
        self._look()
        before, used = self._last_window, self._others / self._seconds
        if self._first_look:
            self._forget()
            return self._raise_to(math.floor(self._usage.cores - used + _RAISE_AT_FIRST))
        self._last_window = used
        self._seconds = self._others = 0.0
        self._since_raise += 1
        self._rest = max(0, self._rest - 1)
        return None if before is None else self._decide(min(before, used), max(before, used))

    def _look(self) -> None:
        now, usage = self._clock(), self._read()
        self._seconds += now - self._looked
        self._others += (usage.total - self._usage.total) - (usage.own - self._usage.own)
        self._looked, self._usage = now, usage

    def _decide(self, least: float, most: float) -> int | None:
        """Change the number of threads if need be, beside others that use ``least`` to ``most`` cores."""
        fewer = max(1, math.floor(self._usage.cores - least + _LOWER))
        more = math.floor(self._usage.cores - most + _RAISE)
        if fewer < self.threads:
            self._longest_rest = min(2 * self._longest_rest, _LONGEST_REST) if self._since_raise < _SOON else 1
            self._rest = random.randrange(self._longest_rest)  # noqa: S311
            self.threads = fewer
            self._last_window = None  # it was measured beside another number of threads
            return fewer
        if self._rest or (raised := self._raise_to(more)) is None:
            return None
        self._since_raise = 0
        return raised

    def _raise_to(self, threads: int) -> int | None:
        threads = min(self._most, threads)
        if threads <= self.threads:
            return None
        self._last_window = None
        self.threads = threads
        return threads

    def _forget(self) -> None:
        """Begin a new window, the first that counts."""
        self._seconds = self._others = 0.0
        self._last_window = None
        self._first_look = False
