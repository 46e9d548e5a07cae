from __future__ import annotations

import math
import os
import random
import time
from dataclasses import dataclass, field
from functools import partial

import psutil
import pytest
from hypothesis import given, strategies as st

from llamaserve.engine.threads import ThreadController, Usage, read_usage

_TICK = 0.01  # seconds: the steps in which Linux counts
_STEP = 0.01


@dataclass
class Machine:
    """Cores that are shared evenly by what wants to run: our threads while they compute, and other programs."""

    cores: int
    demand: float = 0.0  # cores that other programs would use
    exact: bool = True
    now: float = 0.0
    others: float = 0.0
    own: float = 0.0

    def usage(self) -> Usage:
        total = self.others + self.own
        return Usage(self.cores, total if self.exact else math.floor(total / _TICK) * _TICK, self.own)

    def run(self, seconds: float, threads: int) -> None:
        share = min(1.0, self.cores / (threads + self.demand)) if threads + self.demand else 1.0
        self.now += seconds
        self.others += seconds * share * self.demand
        self.own += seconds * share * threads

    def controller(self, most: int, *, long_steps: bool) -> ThreadController:
        return ThreadController(most, long_steps=long_steps, clock=lambda: self.now, usage=self.usage)


@dataclass
class Run:
    """A controller at work on a machine."""

    machine: Machine
    controller: ThreadController
    changes: list[tuple[float, int]] = field(default_factory=list)

    def steps(self, seconds: float, step: float = _STEP) -> list[int]:
        """Compute for so long, and return the numbers of threads that were changed to."""
        end = self.machine.now + seconds
        before = len(self.changes)
        while self.machine.now < end - 1e-9:
            self.machine.run(step, self.controller.threads)
            if (threads := self.controller.update()) is not None:
                self.changes.append((self.machine.now, threads))
        return [threads for _, threads in self.changes[before:]]


def start(cores: int, most: int, demand: float = 0.0, *, exact: bool = True, long_steps: bool = False) -> Run:
    machine = Machine(cores, demand, exact)
    return Run(machine, machine.controller(most, long_steps=long_steps))


def test_all_threads_on_a_quiet_machine() -> None:
    assert start(2, 2).steps(10) == []


def test_gives_way_to_a_busy_program_and_comes_back() -> None:
    run = start(2, 2)
    run.steps(1)
    run.machine.demand = 1.0
    assert run.steps(0.6) == [1]
    assert run.steps(10) == []
    run.machine.demand = 0.0
    assert run.steps(0.6) == [2]
    assert run.steps(10) == []


@pytest.mark.parametrize("exact", [True, False])
def test_after_a_pause_all_threads_are_back_at_once(exact: bool) -> None:
    run = start(2, 2, 1.0, exact=exact)
    run.steps(2)
    assert run.controller.threads == 1
    for demand, expected in ((0.3, [2]), (1.0, [1])):
        run.controller.pause()
        run.machine.run(3, 0)
        run.machine.demand = demand
        run.controller.resume()
        assert run.steps(0.12) == ([2] if demand < 0.5 else [])
        assert run.steps(1) == ([] if demand < 0.5 else expected)
    run.controller.pause()
    run.machine.run(3, 0)
    run.controller.resume()
    assert run.steps(3) == [], "there still is a busy program"


def test_where_steps_are_long_all_threads_are_back_after_a_pause() -> None:
    run = start(2, 2, 1.0, long_steps=True)
    assert run.steps(3, step=0.7) == [1]
    for pause, threads in ((0.5, 1), (3, 2)):
        run.controller.pause()
        run.machine.run(pause, 0)
        run.controller.resume()
        assert run.controller.threads == threads
    assert run.steps(3, step=0.7) == [1], "there still is a busy program"


def test_a_short_pause_changes_nothing() -> None:
    run = start(2, 2, 1.0)
    run.steps(2)
    run.machine.demand = 0.0
    run.controller.pause()
    run.machine.run(0.5, 0)
    run.controller.resume()
    assert run.steps(0.38) == []
    assert run.steps(0.1) == [2]


@pytest.mark.parametrize(("demand", "threads"), [(0.3, 8), (1, 7), (3, 5), (6, 3), (20, 1)])
def test_leaves_the_cores_that_others_use(demand: float, threads: int) -> None:
    run = start(8, 8, demand)
    run.steps(5)
    assert run.controller.threads == threads
    run.machine.demand = 0.0
    run.steps(1)
    assert run.controller.threads == 8


def test_cores_that_we_do_not_need_are_not_missed() -> None:
    assert start(16, 4, 11.8).steps(5) == []


def test_never_more_threads_than_cores() -> None:
    run = start(2, 8)
    run.steps(1)
    assert run.controller.threads == 2


@pytest.mark.parametrize("seed", range(20))
def test_the_server_and_its_client_do_not_matter(seed: int) -> None:
    rng = random.Random(seed)
    run = start(2, 2, exact=False)
    for _ in range(1000):
        run.machine.demand = rng.uniform(0.1, 0.5)
        assert run.steps(0.01) == []


@pytest.mark.parametrize("quiet", [0.3, 0.4, 1.0])
@pytest.mark.parametrize("offset", [0.0, 0.04, 0.07, 0.11])
def test_short_bursts_do_not_matter(quiet: float, offset: float) -> None:
    run = start(2, 2)
    run.steps(offset)
    for _ in range(20):
        run.machine.demand = 1.0
        assert run.steps(0.1) == []
        run.machine.demand = 0.1
        assert run.steps(quiet) == []


@pytest.mark.parametrize("busy", [0.3, 0.5, 1.0])
def test_short_pauses_of_a_busy_program_do_not_matter(busy: float) -> None:
    run = start(2, 2, 1.0)
    run.steps(1)
    for _ in range(20):
        run.machine.demand = 0.0
        assert run.steps(0.1) == []
        run.machine.demand = 1.0
        assert run.steps(busy) == []


@pytest.mark.parametrize("step", [0.005, 0.1, 0.4, 7.0])
def test_steps_may_be_short_or_long(step: float) -> None:
    run = start(2, 2, 1.0)
    assert run.steps(max(0.7, 3 * step), step) == [1]
    run.machine.demand = 0.0
    assert run.steps(max(0.7, 3 * step), step) == [2]


def test_what_others_do_while_we_are_idle_does_not_count() -> None:
    run = start(2, 2)
    for _ in range(50):
        run.machine.demand = 0.0
        assert run.steps(0.1) == []
        run.controller.pause()
        run.machine.demand = 2.0
        run.machine.run(0.5, 0)
        run.controller.resume()


def test_short_answers_add_up() -> None:
    run = start(2, 2, 1.0)
    for _ in range(10):
        run.steps(0.05)
        run.controller.pause()
        run.machine.run(0.2, 0)
        run.controller.resume()
    assert [threads for _, threads in run.changes] == [1]


@given(
    cores=st.integers(1, 16),
    most=st.integers(1, 16),
    demand=st.floats(0, 32),
    steps=st.lists(st.floats(0.005, 3), min_size=1, max_size=5),
)
def test_settles_within_limits_beside_a_constant_load(cores: int, most: int, demand: float, steps: list[float]) -> None:
    run = start(cores, most, demand)
    for _ in range(2 * most):
        for step in steps:
            run.steps(1, step)
    assert all(1 <= threads <= min(cores, most) for _, threads in run.changes)
    directions = {b < a for (_, a), (_, b) in zip(run.changes, run.changes[1:], strict=False)}
    assert len(directions) <= 1, "it went back and forth"
    settled = run.controller.threads
    for step in steps:
        assert run.steps(5, step) == []
    assert settled == min(cores, most) or settled + 1 + demand > cores + 0.34, "a core is left unused"


@given(
    cores=st.integers(1, 12),
    loads=st.lists(st.floats(0, 12), min_size=1, max_size=30),
    step=st.floats(0.005, 0.5),
)
def test_within_limits_whatever_others_do(cores: int, loads: list[float], step: float) -> None:
    run = start(cores, cores, exact=False)
    for run.machine.demand in loads:
        run.steps(0.3, step)
    assert all(1 <= threads <= cores for _, threads in run.changes)


class Children:
    """Processes of one server that compute at once; each is the others' load."""

    def __init__(self, cores: int, most: list[int]) -> None:
        self._cores = cores
        self.now = 0.0
        self._used = [0.0] * len(most)
        self.controllers = [
            ThreadController(threads, clock=lambda: self.now, usage=partial(self._usage, index))
            for index, threads in enumerate(most)
        ]

    def _usage(self, index: int) -> Usage:
        return Usage(self._cores, sum(self._used), self._used[index])

    def run(self, seconds: float, steps: list[float]) -> int:
        """Return how often a number of threads changed."""
        changes = 0
        computed = [0.0] * len(steps)
        end = self.now + seconds
        while self.now < end:
            wanted = [controller.threads for controller in self.controllers]
            share = min(1.0, self._cores / sum(wanted))
            self.now += 0.005
            for index, controller in enumerate(self.controllers):
                self._used[index] += 0.005 * share * wanted[index]
                computed[index] += 0.005
                if computed[index] >= steps[index]:
                    computed[index] = 0.0
                    changes += controller.update() is not None
        return changes


@pytest.mark.parametrize(("cores", "most"), [(2, [2, 2]), (3, [2, 2]), (4, [4, 4, 4]), (8, [8, 8]), (8, [8, 8, 8])])
@pytest.mark.parametrize("steps", [(0.005, 0.005, 0.005), (0.01, 0.07, 0.03), (0.25, 0.25, 0.25)])
def test_models_that_compute_at_once_settle(cores: int, most: list[int], steps: tuple[float, ...]) -> None:
    random.seed(0)
    children = Children(cores, most)
    children.run(60, list(steps[: len(most)]))
    assert children.run(20, list(steps[: len(most)])) == 0
    assert cores <= sum(controller.threads for controller in children.controllers) <= cores + 1


def test_reads_what_this_process_uses() -> None:
    before = read_usage()
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    after = read_usage()
    assert after.cores == len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count()
    assert 0.1 <= after.own - before.own < 0.5
    assert after.total - before.total >= 0.05  # counted in ticks
