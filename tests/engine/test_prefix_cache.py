from __future__ import annotations

import pytest
from fake_memory import FakeMemory
from hypothesis import given, strategies as st

from llamaserve.engine.params import Generation, Sampling
from llamaserve.engine.prefix_cache import FAIR_SHARE, PrefixCache, common_prefix
from llamaserve.engine.sequence import Sequence

_GENERATION = Generation(sampling=Sampling(seed=0))


def _sequence(tokens: list[int]) -> Sequence:
    return Sequence(1, 0, tokens, _GENERATION)


def _evaluate(memory: FakeMemory, sequence: Sequence, length: int | None = None) -> None:
    length = sequence.pending if length is None else length
    assert sequence.slot is not None
    memory.evaluate(sequence.slot, sequence.evaluated, sequence.tokens[sequence.evaluated :][:length])
    sequence.evaluated += length


def _leave_prefix(cache: PrefixCache, memory: FakeMemory, tokens: list[int]) -> int:
    """Run a sequence through the cache and return the slot in which its tokens stay."""
    sequence = _sequence(tokens)
    cache.acquire(sequence)
    slot = sequence.slot
    assert slot is not None
    _evaluate(memory, sequence)
    cache.release(sequence)
    return slot


@given(
    st.lists(st.integers(0, 3), max_size=20),
    st.lists(st.integers(0, 3), max_size=20),
    st.sampled_from([0, 1, 255, 256, 257, 511, 512, 700]),
)
def test_common_prefix_is_where_two_lists_part(one: list[int], other: list[int], shared: int) -> None:
    one, other = [7] * shared + one, [7] * shared + other
    expected = 0
    while expected < min(len(one), len(other)) and one[expected] == other[expected]:
        expected += 1
    assert common_prefix(one, other) == common_prefix(other, one) == expected


def test_a_longer_text_of_the_same_beginning_reuses_it() -> None:
    memory = FakeMemory()
    cache = PrefixCache(memory, 2, 100)
    slot = _leave_prefix(cache, memory, [1, 2, 3])
    sequence = _sequence([1, 2, 3, 4])
    cache.acquire(sequence)
    assert (sequence.slot, sequence.evaluated) == (slot, 3)


def test_the_last_token_is_always_evaluated() -> None:
    memory = FakeMemory()
    cache = PrefixCache(memory, 1, 100)
    _leave_prefix(cache, memory, [1, 2, 3])
    sequence = _sequence([1, 2, 3])
    cache.acquire(sequence)
    assert sequence.evaluated == 2
    assert memory.tokens[0] == [1, 2]


@pytest.mark.parametrize("cuttable", [True, False])
@given(
    resident=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), max_size=6),
    wanted=st.lists(st.integers(0, 2), min_size=1, max_size=8),
)
def test_what_is_taken_as_evaluated_is_in_memory(cuttable: bool, resident: list[list[int]], wanted: list[int]) -> None:
    memory = FakeMemory(cuttable=cuttable)
    cache = PrefixCache(memory, 3, 100)
    for tokens in resident:
        _leave_prefix(cache, memory, tokens)
    before = {slot: list(tokens) for slot, tokens in memory.tokens.items()}
    sequence = _sequence(wanted)
    cache.acquire(sequence)
    assert sequence.slot is not None
    assert memory.resident(sequence.slot) == wanted[: sequence.evaluated]
    assert sequence.evaluated < len(wanted)
    shared = {slot: common_prefix(tokens, wanted[:-1]) for slot, tokens in before.items()}
    best = max((n for slot, n in shared.items() if n >= FAIR_SHARE * len(before[slot])), default=0)
    if cuttable:
        assert sequence.evaluated == best or not best  # without a fair share, what the taken slot happens to have
    else:
        assert sequence.evaluated in (0, len(before.get(sequence.slot, [])))
    assert cache.used_cells == memory.used


def test_a_memory_that_cannot_cut_goes_on_at_the_end_of_a_prefix() -> None:
    memory = FakeMemory(cuttable=False)
    cache = PrefixCache(memory, 1, 100)
    _leave_prefix(cache, memory, [1, 2, 3])
    sequence = _sequence([1, 2, 3, 4])
    cache.acquire(sequence)
    assert sequence.evaluated == 3


def test_room_is_made_by_the_prefixes_unused_longest() -> None:
    memory = FakeMemory()
    cache = PrefixCache(memory, 3, 9)
    for first in (1, 2, 3):
        _leave_prefix(cache, memory, [first] * 3)
    assert cache.make_room(0)
    assert memory.used == 9
    assert cache.make_room(1)
    assert sorted(map(tuple, memory.tokens.values())) == [(), (2, 2, 2), (3, 3, 3)]
    assert cache.make_room(9)
    assert memory.used == cache.used_cells == 0
    assert not cache.make_room(10)


def test_a_running_sequence_is_never_evicted() -> None:
    memory = FakeMemory()
    cache = PrefixCache(memory, 2, 6)
    _leave_prefix(cache, memory, [1, 1])
    sequence = _sequence([2, 2, 2])
    cache.acquire(sequence)
    _evaluate(memory, sequence)
    assert not cache.make_room(6)
    assert memory.resident(sequence.slot or 0) == [2, 2, 2]
    assert cache.used_cells == 3


def test_what_is_forgotten_is_not_reused() -> None:
    memory = FakeMemory()
    cache = PrefixCache(memory, 1, 10)
    sequence = _sequence([1, 2, 3])
    cache.acquire(sequence)
    _evaluate(memory, sequence)
    cache.forget_all()
    cache.release(sequence)
    assert memory.used == cache.used_cells == 0
    again = _sequence([1, 2, 3])
    cache.acquire(again)
    assert again.evaluated == 0


def test_a_half_evaluated_prompt_leaves_only_what_was_evaluated() -> None:
    memory = FakeMemory()
    cache = PrefixCache(memory, 1, 10)
    sequence = _sequence([1, 2, 3, 4])
    cache.acquire(sequence)
    _evaluate(memory, sequence, 2)
    cache.release(sequence)
    again = _sequence([1, 2, 3, 4])
    cache.acquire(again)
    assert again.evaluated == 2


def test_a_short_common_beginning_does_not_cost_another_conversation_its_prefix() -> None:
    """Every prompt of a chat model begins with the same few tokens; two conversations by turns must both be reused."""
    memory = FakeMemory()
    cache = PrefixCache(memory, 4, 1000)
    header = [0, 1, 2]
    one, other = header + [10] * 50, header + [20] * 50
    _leave_prefix(cache, memory, one)
    _leave_prefix(cache, memory, other)
    for conversation in (one, other):
        sequence = _sequence([*conversation, 5])
        cache.acquire(sequence)
        assert sequence.evaluated == len(conversation)
