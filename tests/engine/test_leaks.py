"""After very many requests nothing is held that nobody needs: no cell, sequence id, sampler or Python object."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator

import msgspec
import pytest
from running_engine import RunningEngine

from llamaserve.engine.llama import Model, NativeSampler
from llamaserve.engine.params import Generation, LoadParams, Sampling
from llamaserve.engine.sequence import Sequence

_REQUESTS = 10_000
_AT_ONCE = 12  # three times as many as run together
_BEGINNINGS = ("", "a", "Once upon a time there", "Once upon a time there", "0123456789012345678901234567890")


@pytest.fixture(params=[0, 100_000])
def running(request: pytest.FixtureRequest, loud: Model, loud_params: LoadParams) -> Iterator[RunningEngine]:
    """An engine without and with main memory for prefixes, of which there are many more than it has room for."""
    engine = RunningEngine(loud, msgspec.structs.replace(loud_params, spill=request.param))
    yield engine
    engine.close()


def _count(kind: type) -> int:
    gc.collect()
    return sum(isinstance(each, kind) for each in gc.get_objects())


def _open_samplers() -> int:
    gc.collect()
    return sum(isinstance(each, NativeSampler) and each.handle is not None for each in gc.get_objects())


class Crowd:
    """Clients that come and go at random."""

    def __init__(self, running: RunningEngine) -> None:
        self.running = running
        self.chance = random.Random(1)
        self.prompts = {text: running.engine.encode(text or "x") for text in _BEGINNINGS}
        self.open: set[int] = set()
        self.ended = {"cancelled": 0, "stopped": 0, "finished": 0}

    def ask(self, number: int) -> None:
        """Submit a short request."""
        chance = self.chance
        prompt = self.prompts[chance.choice(_BEGINNINGS)] + chance.choices(range(10, 200), k=chance.randint(0, 6))
        generation = Generation(
            sampling=Sampling(seed=number, temperature=chance.choice([0.0, 1.0]), repetition_penalty=1.1),
            choices=2 if chance.random() < 0.1 else 1,
            max_tokens=chance.choice([1, 1, 2, 3, 6]),
            stop=("e",) if chance.random() < 0.2 else (),
            stream=chance.random() < 0.5,
        )
        self.running.engine.submit(number, [prompt], generation)
        self.open.add(number)

    def leave(self) -> None:
        """End a request before its end."""
        number = self.chance.choice(sorted(self.open))
        if self.chance.random() < 0.5:
            self.running.engine.cancel(number)
            self.open.remove(number)
            self.ended["cancelled"] += 1
        else:
            self.running.take(self.running.engine.stop(number))
            self.ended["stopped"] += 1
            self.forget_finished()

    def forget_finished(self) -> None:
        """Take note of requests that have all their answers."""
        alive = {sequence.request for sequence in self.running.engine._scheduler.sequences}
        done = self.open - alive
        self.open -= done
        self.ended["finished"] += len(done)
        self.running.answers.clear()
        self.running.runner.prompt_tokens.clear()
        self.running.runner.drafts.clear()


def test_ten_thousand_short_requests_leave_nothing_behind(running: RunningEngine) -> None:
    sequences, samplers = _count(Sequence), _open_samplers()
    crowd = Crowd(running)
    for number in range(_REQUESTS):
        crowd.ask(number)
        while len(crowd.open) >= _AT_ONCE:
            if crowd.chance.random() < 0.1:
                crowd.leave()
            running.step()
            crowd.forget_finished()
        if number % 1000 == 0:
            running.check_books()
    running.run()
    crowd.forget_finished()
    assert not crowd.open
    assert min(crowd.ended.values()) > 250, crowd.ended
    assert running.runner.full == 0
    busy = running.engine.occupancy() or running.engine._reported  # what was told last, if it is still so
    assert (busy.running, busy.waiting) == (0, 0)
    running.check_nothing_is_left()
    assert (running.engine._cache._spill.size > 0) == (running.params.spill > 0)
    assert _open_samplers() == samplers
    assert _count(Sequence) == sequences
