from __future__ import annotations

import random
from collections import Counter
from itertools import count, pairwise

import pytest
from fake_memory import FakeMemory
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from simulated_clock import SimulatedClock

from llamaserve.engine import scheduler as scheduling
from llamaserve.engine.params import Generation, Sampling
from llamaserve.engine.prefix_cache import PrefixCache
from llamaserve.engine.scheduler import Chunk, Scheduler
from llamaserve.engine.sequence import AdapterKey, Sequence, State
from llamaserve.errors import OutOfCells

_SAMPLING = Sampling(seed=0)
_SETS: tuple[AdapterKey, ...] = ((), (("a", 1.0),), (("a", 0.5), ("b", 1.0)))  # of adapters
_SHARES = ("", "a", "b")


def _next_token(sequence: Sequence) -> int:
    """What the "model" says: it depends on all tokens so far, so that any loss or mix-up shows."""
    return 100 + hash(tuple(sequence.tokens)) % 1000


def _whole_text(prompt: list[int], length: int) -> list[int]:
    sequence = Sequence(0, 0, prompt, Generation(sampling=_SAMPLING))
    for _ in range(length):
        sequence.tokens.append(_next_token(sequence))
    return sequence.tokens


class FixedPace:
    """So many prompt tokens a step, whatever happens."""

    def __init__(self, alone: int, beside: int) -> None:
        self.alone = alone
        self.beside = beside

    def prompt_tokens(self, decoding: int, prompts: int, pending: int) -> int:
        """See ``Pace``."""
        return self.beside if decoding else self.alone


def _as_evaluated(sequence: Sequence, tokens: list[int]) -> list[int]:
    """What a memory holds of tokens: other numbers with other adapters."""
    return [token + 10_000 * len(sequence.adapters) for token in tokens]


def carry_out(chunks: list[Chunk], memory: FakeMemory, cache: PrefixCache) -> list[Sequence]:
    """Do what the runner and the engine do with a plan; return the sequences that have a new token, in order."""
    completed = [chunk for chunk in chunks if chunk.completes]
    for chunk in chunks:
        sequence = chunk.sequence
        assert sequence.slot is not None
        tokens = sequence.tokens[sequence.evaluated :][: chunk.length]
        memory.evaluate(sequence.slot, sequence.evaluated, _as_evaluated(sequence, [*tokens, *chunk.draft]))
        cache.advance(sequence, chunk.rows)
    for chunk in completed:
        sequence = chunk.sequence
        for right, guess in enumerate((*chunk.draft, None)):
            sequence.tokens.append(_next_token(sequence))
            if sequence.tokens[-1] != guess:
                if guess is not None:
                    cache.rewind(sequence, sequence.evaluated - len(chunk.draft) + right)
                break
    return [chunk.sequence for chunk in completed]


class ScheduledModel(RuleBasedStateMachine):
    """A scheduler whose plans are carried out on a fake memory, while requests come and go at random."""

    cuttable = True
    shares_cells = True
    spare = 3
    sets = _SETS[:1]
    shares = _SHARES[:1]

    @initialize(
        slots=st.integers(1, 4),
        cells=st.integers(12, 40),
        batch=st.integers(0, 8),
        context=st.integers(8, 12),
        beside=st.integers(0, 8),
        guesses=st.integers(0, 4),
        kept_back=st.integers(1, 2),
    )
    def start(
        self, slots: int, cells: int, batch: int, context: int, beside: int, guesses: int, kept_back: int
    ) -> None:
        self.slots, self.batch, self.context = slots, slots + batch, context
        cells = cells if self.shares_cells else slots * context
        self.memory = FakeMemory(cuttable=self.cuttable, shares=self.shares_cells)
        self.cells = cells
        self.cache = PrefixCache(
            self.memory,
            slots,
            cells,
            shares_cells=self.shares_cells,
            spare=self.spare,
            divisible=self.cuttable,
            kept_back=kept_back,
        )
        self.random = random.Random(guesses)
        self.guesses = guesses if self.cuttable else 0
        self.clock = SimulatedClock(step=0.3 * scheduling._TURN)
        self.scheduler = Scheduler(
            self.cache, FixedPace(self.batch, beside), batch=self.batch, drafts=self.drafts, clock=self.clock
        )
        self.numbers = count()
        self.expected: dict[int, list[int]] = {}
        self.alive: dict[int, Sequence] = {}

    def drafts(self, decoding: list[Sequence], limit: int) -> list[list[int]]:
        """Guess some tokens of each, the last of which may be wrong, within what the batch holds."""
        drafts = []
        left = min(self.guesses, limit)
        for sequence in decoding:
            maximum = sequence.generation.max_tokens
            assert maximum is not None
            length = self.random.randint(0, max(0, min(left, maximum - sequence.generated - 1)))
            draft = self.expected[sequence.request][len(sequence.tokens) :][:length]
            if draft and self.random.random() < 0.5:
                draft[-1] = 7
            left -= len(draft)
            drafts.append(draft)
        return drafts

    @rule(
        family=st.integers(0, 2),
        shared=st.integers(0, 3),
        prompt=st.lists(st.integers(0, 1), max_size=3),
        answer=st.integers(1, 12),
        adapters=st.integers(0, len(_SETS) - 1),
        share=st.integers(0, len(_SHARES) - 1),
    )
    def submit(self, family: int, shared: int, prompt: list[int], answer: int, adapters: int, share: int) -> None:
        number = next(self.numbers)
        prompt = [family] * (shared + 1) + prompt
        answer = min(answer, self.context - len(prompt))
        name = self.shares[share % len(self.shares)]
        sequence = Sequence(number, 0, prompt, Generation(sampling=_SAMPLING, max_tokens=answer, share=name))
        sequence.adapters = self.sets[adapters % len(self.sets)]
        self.expected[number] = _whole_text(prompt, answer)
        self.alive[number] = sequence
        self.scheduler.submit(sequence)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.alive)))
        self.finish(self.alive[number])

    @precondition(lambda self: self.alive)
    @rule()
    def step(self) -> None:
        chunks = self.scheduler.plan()
        self.check_plan(chunks)
        self.clock.pass_step(0)
        for sequence in carry_out(chunks, self.memory, self.cache):
            if sequence.generated == sequence.generation.max_tokens:
                assert sequence.tokens == self.expected[sequence.request]
                self.finish(sequence)
        assert self.memory.used <= self.cells

    def check_plan(self, chunks: list[Chunk]) -> None:
        assert chunks, "nothing is planned although there is something to do"
        planned = [chunk.sequence for chunk in chunks]
        assert len(set(map(id, planned))) == len(planned)
        assert all(sequence.state is State.RUNNING for sequence in planned)
        assert all(1 <= chunk.length <= chunk.sequence.pending for chunk in chunks)
        assert all(chunk.sequence.decoding for chunk in chunks if chunk.draft)
        tokens = sum(chunk.rows for chunk in chunks)
        assert tokens <= self.batch
        assert self.memory.used + tokens <= self.cells
        sets = {sequence.adapters for sequence in planned}
        assert len(sets) == 1, "a step with different adapters"
        running = [s for s in self.alive.values() if s.state is State.RUNNING and s.adapters in sets]
        assert {s.request for s in running if s.decoding} <= {s.request for s in planned}
        prefilling = [chunk for chunk in chunks if not chunk.sequence.decoding]
        assert sum(not chunk.completes for chunk in prefilling) <= 1, "a prompt begins before another one is whole"
        if len(self.shares) == 1:
            self.check_oldest_is_first(running, chunks)
        if tokens < self.batch and not any(sequence.decoding for sequence in self.scheduler.running):
            assert {s.request for s in planned} == {s.request for s in running}

    def check_oldest_is_first(self, running: list[Sequence], chunks: list[Chunk]) -> None:
        assert any(s.decoding for s in running) or running[0] in [chunk.sequence for chunk in chunks], "it stands still"
        prefilling = [chunk for chunk in chunks if not chunk.sequence.decoding]
        prefilling.sort(key=lambda chunk: chunk.sequence.request)  # a step's rows are in the order of the slots
        assert all(chunk.completes for chunk in prefilling[:-1]), "a prompt begins before an older one is whole"

    def finish(self, sequence: Sequence) -> None:
        del self.alive[sequence.request]
        self.scheduler.finish(sequence)
        assert sequence.state is State.FINISHED
        assert sequence.slot is None

    @invariant()
    def books_are_in_order(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        assert self.cache.used_cells == self.memory.used <= self.cells
        in_order = self.scheduler.sequences
        waiting = [s.request for s in in_order if s.state is State.WAITING]
        assert sorted(s.request for s in in_order) == sorted(self.alive)
        assert waiting == sorted(waiting), "not in order of arrival"
        running = [s for s in in_order if s.state is State.RUNNING]
        assert in_order[: len(running)] == running
        slots = [s.slot for s in running]
        assert None not in slots
        assert len(set(slots)) == len(slots) <= self.slots
        assert self.cache.held_cells() <= self.cache.used_cells
        for sequence in running:
            resident = self.memory.resident(sequence.slot or 0)
            assert resident == _as_evaluated(sequence, sequence.tokens[: sequence.evaluated])
        for sequence in in_order[len(running) :]:
            assert (sequence.slot, sequence.evaluated) == (None, 0)
        assert self.cache.idle_slots == self.slots - len(running)
        assert self.scheduler.idle == (not in_order)
        occupancy = self.scheduler.occupancy
        assert (occupancy.running, occupancy.waiting) == (len(running), len(in_order) - len(running))

    def teardown(self) -> None:
        """Whatever has happened, all that is left finishes, and no slot is lost."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(sum(map(len, self.expected.values())) * 2):
            if not self.alive:
                break
            self.step()
            self.books_are_in_order()
        assert not self.alive, "sequences never finish"
        for _ in range(self.slots):
            self.cache.acquire(Sequence(0, 0, [9], Generation(sampling=_SAMPLING)))
        assert self.cache.held_cells() == 0
        self.cache.drop_idle()
        assert (self.cache.used_cells, self.memory.used) == (0, 0)
        assert self.cache.idle_slots == 0


class ScheduledRecurrentModel(ScheduledModel):
    cuttable = False
    spare = 0


class ScheduledSplitCache(ScheduledModel):
    shares_cells = False
    spare = 0


class ScheduledAdapters(ScheduledModel):
    sets = _SETS


class ScheduledRecurrentAdapters(ScheduledRecurrentModel):
    sets = _SETS


class ScheduledShares(ScheduledModel):
    shares = _SHARES


class ScheduledRecurrentShares(ScheduledRecurrentModel):
    shares = _SHARES


class ScheduledSharesWithAdapters(ScheduledAdapters):
    shares = _SHARES


TestScheduledModel = ScheduledModel.TestCase
TestScheduledRecurrentModel = ScheduledRecurrentModel.TestCase
TestScheduledSplitCache = ScheduledSplitCache.TestCase
TestScheduledAdapters = ScheduledAdapters.TestCase
TestScheduledRecurrentAdapters = ScheduledRecurrentAdapters.TestCase
TestScheduledShares = ScheduledShares.TestCase
TestScheduledRecurrentShares = ScheduledRecurrentShares.TestCase
TestScheduledSharesWithAdapters = ScheduledSharesWithAdapters.TestCase
TestScheduledModel.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestScheduledRecurrentModel.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestScheduledSplitCache.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestScheduledAdapters.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestScheduledRecurrentAdapters.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestScheduledShares.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestScheduledRecurrentShares.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestScheduledSharesWithAdapters.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.fixture(autouse=True)
def _every_token_is_worth_waiting_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "_WORTH_WAITING", 1)


class _Rig:
    """A scheduler on a fake memory whose steps are carried out."""

    def __init__(self, *, slots: int, cells: int, batch: int, cuttable: bool = True, beside: int = 8) -> None:
        self.memory = FakeMemory(cuttable=cuttable)
        self.cache = PrefixCache(self.memory, slots, cells, spare=4 if cuttable else 0, divisible=cuttable)
        self.clock = SimulatedClock(step=scheduling._TURN / 4)
        self.pace = FixedPace(batch, beside)
        self.scheduler = Scheduler(self.cache, self.pace, batch=batch, clock=self.clock)
        self.numbers = count(1)

    def submit(self, length: int, adapters: AdapterKey = (), first: int | None = None, share: str = "") -> Sequence:
        number = next(self.numbers)
        sequence = Sequence(number, 0, [first or number] * length, Generation(sampling=_SAMPLING, share=share))
        sequence.adapters = adapters
        self.scheduler.submit(sequence)
        return sequence

    def step(self) -> dict[int, int]:
        """Evaluate one plan and return how many tokens of each request were in it."""
        chunks = self.scheduler.plan()
        lengths = {chunk.sequence.request: chunk.length for chunk in chunks}
        self.clock.pass_step(0)
        carry_out(chunks, self.memory, self.cache)
        return lengths


def test_a_long_prompt_takes_small_steps_beside_running_streams() -> None:
    rig = _Rig(slots=3, cells=10_000, batch=512, beside=40)
    rig.submit(4)
    assert rig.step() == {1: 4}
    rig.submit(1000)
    assert rig.step() == {1: 1, 2: 40}
    assert rig.step() == {1: 1, 2: 40}


def test_a_long_prompt_alone_takes_the_whole_batch() -> None:
    rig = _Rig(slots=3, cells=10_000, batch=512)
    rig.submit(700)
    rig.submit(700)
    assert rig.step() == {1: 512}
    assert rig.step() == {1: 188, 2: 324}


def test_a_short_prompt_waits_behind_a_long_one_that_came_first() -> None:
    rig = _Rig(slots=2, cells=10_000, batch=8)
    rig.submit(20)
    rig.submit(2)
    assert [rig.step() for _ in range(3)] == [{1: 8}, {1: 8}, {1: 4, 2: 2}]


def test_no_more_sequences_run_than_there_are_slots() -> None:
    rig = _Rig(slots=2, cells=100, batch=32)
    first = rig.submit(2)
    rig.submit(2)
    rig.submit(2)
    assert rig.step() == {1: 2, 2: 2}
    rig.scheduler.finish(first)
    assert rig.step() == {2: 1, 3: 2}


def test_when_cells_run_out_only_the_newest_goes_back_and_keeps_its_tokens() -> None:
    rig = _Rig(slots=2, cells=10, batch=32)
    old, new = rig.submit(3), rig.submit(3)
    rig.step()
    rig.step()
    rig.step()
    assert (old.evaluated, new.evaluated) == (5, 5)
    tokens = list(new.tokens)
    assert rig.step() == {1: 1}
    assert (new.state, new.tokens) == (State.WAITING, tokens)
    for _ in range(4):
        assert rig.step() == {1: 1}
    rig.scheduler.finish(old)
    assert rig.step() == {2: len(tokens) - new.cached} if new.cached else {2: len(tokens)}
    assert new.tokens[: len(tokens)] == tokens


def test_idle_prefixes_are_evicted_before_a_running_sequence_is_disturbed() -> None:
    rig = _Rig(slots=3, cells=12, batch=32)
    done = rig.submit(6)
    rig.step()
    rig.scheduler.finish(done)
    rig.submit(3)
    rig.submit(3)
    assert rig.step() == {2: 3, 3: 3}
    assert rig.memory.used == 12
    assert rig.step() == {2: 1, 3: 1}
    assert sorted(map(len, rig.memory.tokens.values())) == [4, 4]


def test_one_that_does_not_fit_now_waits_without_being_overtaken() -> None:
    rig = _Rig(slots=3, cells=20, batch=32)
    rig.submit(8)
    rig.submit(15)
    rig.submit(1)
    assert rig.step() == {1: 8}
    assert rig.step() == {1: 1}


def test_shed_gives_idle_prefixes_first_then_the_newest_then_nothing() -> None:
    rig = _Rig(slots=3, cells=100, batch=32)
    done = rig.submit(5)
    rig.step()
    rig.scheduler.finish(done)
    old, new = rig.submit(4), rig.submit(4)
    rig.step()
    assert rig.memory.used == 13
    chunks = rig.scheduler.plan()
    assert rig.scheduler.shed(chunks)
    assert rig.memory.used == 8
    assert (old.state, new.state) == (State.RUNNING, State.RUNNING)
    assert rig.scheduler.shed(rig.scheduler.plan())
    rig.step()
    assert (old.state, new.state) == (State.RUNNING, State.WAITING)
    assert not rig.scheduler.shed(rig.scheduler.plan())
    assert old.state is State.RUNNING


def test_a_lone_sequence_that_outgrows_the_cache_is_an_error() -> None:
    rig = _Rig(slots=1, cells=6, batch=32)
    rig.submit(9)
    with pytest.raises(OutOfCells):
        rig.scheduler.plan()


@pytest.mark.parametrize("cuttable", [True, False])
def test_a_cancelled_prompt_leaves_no_wrong_prefix(cuttable: bool) -> None:
    rig = _Rig(slots=1, cells=100, batch=4, cuttable=cuttable)
    first = rig.submit(10)
    rig.step()
    rig.scheduler.finish(first)
    again = Sequence(9, 0, [1] * 10, Generation(sampling=_SAMPLING))
    rig.scheduler.submit(again)
    assert rig.step() == {9: 4}
    assert again.cached == 4
    assert rig.memory.resident(0) == [1] * 8


def _numbered(number: int, tokens: list[int], **options: int) -> Sequence:
    return Sequence(number, 0, tokens, Generation(sampling=_SAMPLING, **options))


def test_one_waits_for_another_that_evaluates_the_same_beginning() -> None:
    rig = _Rig(slots=4, cells=100, batch=8)
    for number in (1, 2, 3):
        rig.scheduler.submit(_numbered(number, [5] * 20 + [number]))
    rig.scheduler.submit(_numbered(4, [6] * 3))
    assert rig.step() == {1: 8}
    assert rig.step() == {1: 8}
    assert rig.step() == {1: 5, 4: 3}, "one with another beginning is not held up"
    assert rig.step() == {1: 1, 2: 1, 3: 1, 4: 1}
    assert rig.memory.used == 20 + 3 + 3 + 2


@pytest.mark.parametrize("done", [1, 2])
def test_when_the_one_waited_for_leaves_the_next_goes_on_where_it_was(done: int) -> None:
    rig = _Rig(slots=4, cells=100, batch=8)
    sequences = [_numbered(number, [5] * 20 + [number]) for number in (1, 2, 3)]
    for sequence in sequences:
        rig.scheduler.submit(sequence)
    for _ in range(done):
        rig.step()
    rig.scheduler.finish(sequences[0])
    assert rig.step() == {2: min(8, 21 - 8 * done)}
    assert rig.memory.evaluated == min(21, 8 * (done + 1))


def test_drafts_are_given_up_before_a_sequence_is_disturbed() -> None:
    rig = _Rig(slots=2, cells=10, batch=32)
    rig.scheduler = Scheduler(
        rig.cache, FixedPace(32, 32), batch=32, drafts=lambda decoding, limit: [[1, 2]] * len(decoding)
    )
    for number in (1, 2):
        rig.scheduler.submit(_numbered(number, [number] * 3))
    rig.step()
    assert sum(chunk.rows for chunk in rig.scheduler.plan()) == 2
    rig.step()
    chunks = rig.scheduler.plan()
    assert [tuple(chunk.draft) for chunk in chunks] == [(), ()]
    assert [chunk.rows for chunk in chunks] == [1, 1]


# Sets of adapters


def test_sets_of_adapters_take_turns_in_which_all_of_a_set_go_on() -> None:
    rig = _Rig(slots=6, cells=10_000, batch=512)
    requests = {rig.submit(4, _SETS[number % 3]).request: number % 3 for number in range(6)}
    steps = [rig.step() for _ in range(60)]
    turns = [{requests[request] for request in step} for step in steps]
    assert all(len(turn) == 1 for turn in turns)
    assert all(len(step) == 2 for step in steps)
    order = [turn.pop() for turn in turns]
    changes = sum(one != other for one, other in pairwise(order))
    assert [order.count(number) for number in range(3)] == pytest.approx([20, 20, 20], abs=4)
    assert changes == pytest.approx(len(steps) / 4, abs=2), "a change costs time, so a turn lasts a few steps"


def test_a_step_that_lasts_longer_than_a_turn_is_one() -> None:
    rig = _Rig(slots=2, cells=10_000, batch=512)
    rig.clock.step = 3 * scheduling._TURN
    one, other = rig.submit(4), rig.submit(4, _SETS[1])
    assert sorted(tuple(rig.step()) for _ in range(10)) == [(one.request,)] * 5 + [(other.request,)] * 5


def test_prompts_of_one_set_take_small_steps_while_streams_of_another_wait() -> None:
    rig = _Rig(slots=2, cells=10_000, batch=512, beside=40)
    stream = rig.submit(4)
    rig.step()
    prompt = rig.submit(1000, _SETS[1])
    steps = [rig.step() for _ in range(20)]
    assert all(step in ({stream.request: 1}, {prompt.request: 40}) for step in steps)
    assert sum(stream.request in step for step in steps) == pytest.approx(10, abs=4)


def test_prompts_that_may_not_go_on_leave_their_turn_to_streams() -> None:
    rig = _Rig(slots=2, cells=10_000, batch=512, beside=0)
    stream = rig.submit(4)
    rig.step()
    rig.submit(1000, _SETS[1])
    assert [rig.step() for _ in range(20)] == [{stream.request: 1}] * 20


def test_the_flood_of_one_set_does_not_keep_another_waiting() -> None:
    rig = _Rig(slots=4, cells=10_000, batch=512)
    flood = [rig.submit(4, _SETS[1]) for _ in range(40)]
    rig.step()
    late = [rig.submit(4) for _ in range(3)]
    assert [s.request for s in rig.scheduler.waiting][:4] == [late[0].request, late[1].request, late[2].request, 5]
    for sequence in flood[:2]:
        rig.scheduler.finish(sequence)
    rig.step()
    assert [s.state for s in late] == [State.RUNNING, State.RUNNING, State.WAITING]
    rig.scheduler.finish(flood[2])
    rig.step()
    assert late[2].state is State.WAITING, "each set has had its share"
    assert flood[4].state is State.RUNNING


def test_no_set_is_passed_for_ever_by_ever_new_ones() -> None:
    """Clients that vary the scale: each is a set of its own, of which none runs yet."""
    rig = _Rig(slots=2, cells=10_000, batch=512)
    rig.submit(4)  # a stream without end, of the same set as those who wait
    rig.step()
    scaled = [rig.submit(4, (("a", 1.0),))]
    rig.step()
    plain = [rig.submit(4) for _ in range(3)]
    started: list[int] = []
    for number in range(2, 40):
        scaled.append(rig.submit(4, (("a", float(number)),)))
        running = next(s for s in rig.scheduler.running if s.request != 1)
        rig.scheduler.finish(running)
        rig.step()
        started += [number for s in plain if s.state is State.RUNNING]
    assert [s.state for s in plain] == [State.FINISHED] * 3
    assert max(started) <= 2 + 3 * (scheduling._MOST_PASSES + 1)
    assert sum(s.state is State.FINISHED for s in scaled) > 25, "the others go on"


def test_nobody_waits_for_a_prompt_that_is_evaluated_with_other_adapters() -> None:
    rig = _Rig(slots=3, cells=10_000, batch=100)
    leader = rig.submit(500, _SETS[1], first=7)
    rig.step()
    other, follower = rig.submit(500, first=7), rig.submit(500, _SETS[1], first=7)
    rig.step()
    assert [s.state for s in (leader, other, follower)] == [State.RUNNING, State.RUNNING, State.WAITING]
    assert other.cached == 0
    while follower.state is State.WAITING:
        rig.step()
    assert follower.cached == 499


# Shares


class _Served:
    """A rig whose sequences end after some tokens of their answers, and what became of each share's."""

    def __init__(self, *, slots: int, batch: int = 64, cells: int = 100_000, beside: int = 8) -> None:
        self.rig = _Rig(slots=slots, cells=cells, batch=batch, beside=beside)
        self.answers: dict[int, int] = {}
        self.alive: list[Sequence] = []
        self.started: list[Sequence] = []  # each once; those of a step in order of arrival
        self.finished: list[Sequence] = []
        self.tokens: Counter[str] = Counter()  # evaluated, by share

    def submit(self, share: str, count: int = 1, *, prompt: int = 4, answer: int = 3) -> None:
        for _ in range(count):
            sequence = self.rig.submit(prompt, share=share)
            self.answers[sequence.request] = answer
            self.alive.append(sequence)

    def step(self) -> dict[int, int]:
        lengths = self.rig.step()
        for sequence in list(self.alive):
            if sequence.state is State.RUNNING and sequence not in self.started:
                self.started.append(sequence)
            self.tokens[sequence.share] += lengths.get(sequence.request, 0)
            if sequence.generated >= self.answers[sequence.request]:
                self.rig.scheduler.finish(sequence)
                self.alive.remove(sequence)
                self.finished.append(sequence)
        return lengths

    def run(self) -> None:
        while self.alive:
            self.step()

    def waiting(self, share: str) -> int:
        return sum(s.state is State.WAITING for s in self.alive if s.share == share)


@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize("answer", [1, 3])
def test_one_of_another_share_starts_as_soon_as_a_slot_is_free(slots: int, answer: int) -> None:
    served = _Served(slots=slots)
    served.submit("a", 100, answer=answer)
    for _ in range(5):
        served.step()
    served.submit("b")
    before = len(served.started)
    while len(served.started) == before:
        served.step()
    assert "b" in [s.share for s in served.started[before:]], "another got the first slot that was free"
    served.run()
    assert [s.request for s in served.started if s.share == "a"] == list(range(1, 101))


def test_few_sequences_are_done_long_before_the_many_of_another_share() -> None:
    served = _Served(slots=4)
    served.submit("a", 40)
    served.submit("b", 4)
    served.run()
    order = "".join(s.share for s in served.finished)
    assert order.startswith("aabb" * 2 + "aaaa"), "each has two of the four slots"
    assert order == "aabb" * 2 + "a" * 36


def test_shares_have_slots_in_equal_numbers_and_what_one_does_not_want_others_have() -> None:
    served = _Served(slots=6)
    served.submit("a", 50, answer=50)
    served.submit("b", 50, answer=50)
    served.submit("c", 1, answer=50)
    served.step()
    running = Counter(s.share for s in served.rig.scheduler.running)
    assert running == {"a": 3, "b": 2, "c": 1}


def test_long_prompts_of_one_share_do_not_hold_up_a_short_one_of_another() -> None:
    rig = _Rig(slots=5, cells=100_000, batch=64)
    long = [rig.submit(1000, share="a") for _ in range(4)]
    rig.step()
    short = rig.submit(10, share="b")
    assert rig.step() == {long[0].request: 54, short.request: 10}


def test_of_two_shares_prompts_are_evaluated_in_turn() -> None:
    rig = _Rig(slots=4, cells=100_000, batch=64)
    shares = {rig.submit(3000, share=share).request: share for share in "aabb"}
    tokens: Counter[str] = Counter()
    for _ in range(40):
        for request, length in rig.step().items():
            tokens[shares[request]] += length
        assert abs(tokens["a"] - tokens["b"]) <= 2 * 64
    assert [s.evaluated > 0 for s in rig.scheduler.running] == [True, False, True, False], "the oldest of each"


def test_a_share_that_had_much_does_not_wait_for_all_that_another_wants() -> None:
    """It comes behind for a while, not until the other has had as much."""
    rig = _Rig(slots=2, cells=1_000_000, batch=64)
    busy = rig.submit(50_000, share="a")
    while not busy.decoding:
        rig.step()
    rig.scheduler.finish(busy)
    first, second = rig.submit(10_000, share="a"), rig.submit(10_000, share="b")
    for _ in range(200):
        rig.step()
    assert first.evaluated + second.evaluated == 200 * 64
    assert 0 < second.evaluated - first.evaluated <= 2048 + 2 * 64


def test_no_prompt_stands_still_for_those_of_ever_new_shares() -> None:
    rig = _Rig(slots=2, cells=1_000_000, batch=16)
    old = rig.submit(400, share="old")
    while old.evaluated < 200:
        rig.step()
    for number in range(100):
        new = rig.submit(100, share=f"new{number}")
        rig.step()
        rig.step()
        rig.scheduler.finish(new)
        if old.decoding:
            return
    pytest.fail("it stands still")


def test_who_runs_short_of_cells_is_the_share_with_the_most_running() -> None:
    rig = _Rig(slots=4, cells=24, batch=32)
    first = [rig.submit(4, share="a") for _ in range(3)]
    rig.step()
    other = rig.submit(4, share="b")
    while all(s.state is not State.WAITING or s is other for s in (*first, other)):
        rig.step()
    assert [s.state for s in first] == [State.RUNNING, State.RUNNING, State.WAITING]
    assert other.state is State.RUNNING, "although it is the newest"


def test_one_that_was_sent_back_goes_on_before_any_that_have_not_begun() -> None:
    rig = _Rig(slots=2, cells=10, batch=32)
    old, new = rig.submit(3, share="a"), rig.submit(3, share="a")
    while new.state is not State.WAITING or not new.generated:
        rig.step()
    late = [rig.submit(2, share=share) for share in "ab"]
    assert [s.request for s in rig.scheduler.waiting] == [new.request, late[1].request, late[0].request]
    rig.scheduler.finish(old)
    rig.step()
    assert new.state is State.RUNNING


def test_nobody_waits_for_a_prompt_of_another_share_that_is_not_the_next() -> None:
    rig = _Rig(slots=4, cells=100_000, batch=50)
    rig.submit(1000, share="a")
    leader = rig.submit(1000, first=7, share="a")
    rig.step()
    same, other = rig.submit(1000, first=7, share="a"), rig.submit(100, first=7, share="b")
    rig.step()
    assert [s.state for s in (same, other)] == [State.WAITING, State.RUNNING]
    assert (leader.evaluated, other.evaluated) == (0, 50)


def test_the_same_beginning_is_evaluated_once_for_all_shares() -> None:
    rig = _Rig(slots=4, cells=100_000, batch=50)
    sequences = [rig.submit(500, first=7, share=share) for share in "abcd"]
    while not all(s.decoding for s in sequences):
        rig.step()
    assert rig.memory.evaluated <= 500 + 3 * 2 + 4 * 20


@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 8)), min_size=2, max_size=2),
    st.integers(2, 4),
)
def test_shares_that_always_wait_for_equal_work_are_served_equally(
    slots: int, head_starts: list[tuple[int, int]], shares: int
) -> None:
    served = _Served(slots=slots, batch=32)
    for (sequences, steps), share in zip(head_starts, "ab", strict=True):
        served.submit(share, sequences)
        for _ in range(steps):
            served.step()
    names = [f"s{number}" for number in range(shares)]
    before = Counter[str]()
    for step in range(120):
        for name in names:
            while served.waiting(name) < 2:
                served.submit(name, prompt=6, answer=4)
        served.step()
        if step == 60:
            before = served.tokens.copy()
    had = [served.tokens[name] - before[name] for name in names]
    assert max(had) - min(had) <= 3 * 10 * slots


@given(st.integers(1, 4), st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(1, 3))
def test_each_that_waits_starts_after_a_bounded_number_of_others(slots: int, arrivals: list[int], answer: int) -> None:
    """Shares come and go, most of them new ones; 0 to 2 stand for lasting ones."""
    served = _Served(slots=slots)
    bounds: dict[int, tuple[int, int]] = {}  # by request: how many had started when it came, and how many may before it
    for number, each in enumerate(arrivals):
        share = f"lasting{each}" if each < 3 else f"new{number}"
        before = served.waiting(share)
        served.submit(share, answer=answer)
        bounds[served.alive[-1].request] = len(served.started), before
        if each % 2:
            served.step()
    most_shares = len({s.share for s in served.alive}) + 12
    served.run()
    for place, sequence in enumerate(served.started):
        started, before = bounds[sequence.request]
        assert place - started <= (before + 1) * (4 + 1) * most_shares + slots


def test_a_share_with_a_stream_is_not_passed_for_ever_by_ever_new_ones() -> None:
    """Each of those has none running when it comes."""
    rig = _Rig(slots=2, cells=100_000, batch=64)
    rig.submit(4, share="old")  # without an end
    rig.step()
    new = [rig.submit(4, share="new")]
    rig.step()
    waiting = [rig.submit(4, share="old") for _ in range(3)]
    starts: list[int] = []
    for number in range(60):
        new.append(rig.submit(4, share=f"new{number}"))
        running = next(s for s in rig.scheduler.running if s.request != 1)
        rig.scheduler.finish(running)
        rig.step()
        starts += [number for s in waiting if s.state is State.RUNNING]
    assert [s.state for s in waiting] == [State.FINISHED] * 3
    assert max(starts) <= 3 * (3 * 4 + 1), "with two new ones there are three shares that wait"
    assert sum(s.state is State.FINISHED for s in new) > 50, "the others go on"


def test_within_a_share_sets_of_adapters_keep_their_order() -> None:
    """What another share runs with the same adapters is not counted."""
    rig = _Rig(slots=2, cells=100_000, batch=64)
    rig.submit(4, _SETS[1], share="a")
    rig.submit(4, _SETS[1], share="a")
    rig.step()
    a = [rig.submit(4, adapters, share="a") for adapters in (_SETS[1], _SETS[1], _SETS[0])]
    b = [rig.submit(4, adapters, share="b") for adapters in (_SETS[1], _SETS[1], _SETS[0])]
    order = [s.request for s in rig.scheduler.waiting]
    assert [each for each in order if each <= a[2].request] == [a[2].request, a[0].request, a[1].request]
    assert [each for each in order if each > a[2].request] == [b[0].request, b[2].request, b[1].request]


def test_a_share_with_many_sets_of_adapters_has_no_more_turns() -> None:
    rig = _Rig(slots=6, cells=100_000, batch=64)
    many = [rig.submit(4, (("a", float(scale)),), share="a").request for scale in range(1, 5)]
    one = [rig.submit(4, _SETS[0], share="b").request for _ in range(2)]
    steps = [tuple(rig.step()) for _ in range(160)]
    assert set(steps) == {*((request,) for request in many), tuple(one)}
    assert steps.count(tuple(one)) == pytest.approx(80, abs=8)
    assert [steps.count((request,)) for request in many] == pytest.approx([20] * 4, abs=8)


def test_a_share_whose_prompts_have_to_wait_leaves_its_turns_to_all_others() -> None:
    rig = _Rig(slots=4, cells=100_000, batch=64)
    streams = [rig.submit(4, adapters, share="a").request for adapters in _SETS]
    while not rig.scheduler.steady:
        rig.step()
    rig.pace.beside = 0
    rig.submit(1000, (("c", 1.0),), share="b")
    steps = [tuple(rig.step()) for _ in range(60)]
    assert [steps.count((request,)) for request in streams] == pytest.approx([20] * 3, abs=8)


class _FormerOrder:
    """Who waits and who runs, in the order that there was before there were shares, looked up anew each time."""

    def __init__(self) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.passed: Counter[AdapterKey] = Counter()

    def order(self) -> list[Sequence]:
        left, running = list(self.waiting), Counter(s.adapters for s in self.running)
        ranks = {}
        seen = set()
        for sequence in left:
            overdue = sequence.adapters not in seen and self.passed[sequence.adapters] >= scheduling._MOST_PASSES
            several = len({s.adapters for s in left}) > 1
            ranks[sequence.request] = (-1 if overdue else running[sequence.adapters]) if several else 0
            running[sequence.adapters] += 1
            seen.add(sequence.adapters)
        return sorted(left, key=lambda s: (ranks[s.request], s.arrival))

    def admit(self, slots: int) -> None:
        for sequence in self.order()[: slots - len(self.running)]:
            self.waiting.remove(sequence)
            oldest = {s.adapters: s for s in reversed(self.waiting)}
            self.passed = Counter(
                {
                    adapters: self.passed[adapters] + (s.arrival < sequence.arrival)
                    for adapters, s in oldest.items()
                    if adapters != sequence.adapters
                }
            )
            self.running.append(sequence)


@given(
    st.integers(1, 4),
    st.sampled_from(_SHARES),
    st.lists(st.integers(0, 2) | st.tuples(st.integers(0, 9)) | st.none(), max_size=60),
)
def test_with_one_share_the_order_is_what_it_was(slots: int, share: str, events: list[int | tuple[int] | None]) -> None:
    """An event is a sequence with some set of adapters, the end of one of those that run, or a step."""
    rig, former = _Rig(slots=slots, cells=100_000, batch=64), _FormerOrder()
    for event in events:
        if isinstance(event, int):
            former.waiting.append(rig.submit(4, _SETS[event], share=share))
        elif event is not None and former.running:
            rig.scheduler.finish(former.running.pop(event[0] % len(former.running)))
        elif event is None and (former.running or former.waiting):
            former.admit(slots)
            rig.step()
            assert rig.scheduler.running == sorted(former.running, key=lambda s: s.arrival)
        assert rig.scheduler.waiting == former.order()
