from __future__ import annotations

import pytest
from fake_memory import FakeMemory
from hypothesis import given, strategies as st

from llamaserve.engine.params import Generation, Sampling
from llamaserve.engine.prefix_cache import PrefixCache
from llamaserve.engine.sequence import AdapterKey, Sequence, common_prefix
from llamaserve.engine.spill import Spill

_GENERATION = Generation(sampling=Sampling(seed=0))


def _sequence(tokens: list[int]) -> Sequence:
    return Sequence(1, 0, tokens, _GENERATION)


def _evaluate(cache: PrefixCache, memory: FakeMemory, sequence: Sequence, length: int | None = None) -> None:
    length = sequence.pending if length is None else length
    assert sequence.slot is not None
    memory.evaluate(sequence.slot, sequence.evaluated, sequence.tokens[sequence.evaluated :][:length])
    cache.advance(sequence, length)


def _leave_prefix(cache: PrefixCache, memory: FakeMemory, tokens: list[int]) -> int:
    """Run a sequence through the cache and return the slot it had."""
    sequence = _sequence(tokens)
    cache.acquire(sequence)
    slot = sequence.slot
    assert slot is not None
    _evaluate(cache, memory, sequence)
    cache.release(sequence)
    return slot


def _save_all(cache: PrefixCache) -> None:
    """What an idle engine does."""
    while cache.save_ahead():
        pass


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
    _leave_prefix(cache, memory, [1, 2, 3])
    sequence = _sequence([1, 2, 3, 4])
    cache.acquire(sequence)
    assert sequence.slot is not None
    assert memory.tokens == {sequence.slot: [1, 2, 3]}, "what the sequence holds is kept by nobody else"


def test_the_last_token_is_always_evaluated() -> None:
    memory = FakeMemory()
    cache = PrefixCache(memory, 1, 100)
    _leave_prefix(cache, memory, [1, 2, 3])
    sequence = _sequence([1, 2, 3])
    cache.acquire(sequence)
    assert sequence.evaluated == 2
    assert memory.resident(sequence.slot or 0) == [1, 2]


@pytest.mark.parametrize("spare", [0, 2])
@pytest.mark.parametrize("cuttable", [True, False])
@given(
    resident=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), max_size=6),
    wanted=st.lists(st.integers(0, 2), min_size=1, max_size=8),
)
def test_the_longest_beginning_of_any_prefix_is_reused(
    cuttable: bool, spare: int, resident: list[list[int]], wanted: list[int]
) -> None:
    memory = FakeMemory(cuttable=cuttable)
    cache = PrefixCache(memory, 3, 100, spare=spare, divisible=cuttable)
    for tokens in resident:
        _leave_prefix(cache, memory, tokens)
    before = list(memory.tokens.values())
    sequence = _sequence(wanted)
    cache.acquire(sequence)
    assert sequence.slot is not None
    assert memory.resident(sequence.slot) == wanted[: sequence.evaluated]
    shared = [(common_prefix(tokens, wanted[:-1]), len(tokens)) for tokens in before]
    assert sequence.evaluated == max((n for n, length in shared if cuttable or n == length), default=0)
    assert cache.used_cells == memory.used


def test_a_memory_that_cannot_cut_goes_on_at_the_end_of_a_prefix() -> None:
    memory = FakeMemory(cuttable=False)
    cache = PrefixCache(memory, 1, 100, spare=0, divisible=False)
    _leave_prefix(cache, memory, [1, 2, 3])
    sequence = _sequence([1, 2, 3, 4])
    cache.acquire(sequence)
    assert sequence.evaluated == 3


def test_room_is_made_by_the_prefixes_unused_longest() -> None:
    memory = FakeMemory()
    cache = PrefixCache(memory, 3, 240)
    for first in (1, 2, 3):
        _leave_prefix(cache, memory, [first] * 80)
    assert cache.make_room(0)
    assert memory.used == 240
    assert cache.make_room(10)
    assert sorted(memory.tokens.values()) == [[1] * 64, [2] * 80, [3] * 80], "cut from the end, 32 at a time"
    assert cache.make_room(90)
    assert sorted(memory.tokens.values()) == [[2] * 64, [3] * 80]
    assert cache.make_room(240)
    assert memory.used == cache.used_cells == 0
    assert not cache.make_room(241)


def test_a_running_sequence_is_never_evicted() -> None:
    memory = FakeMemory()
    cache = PrefixCache(memory, 2, 6)
    _leave_prefix(cache, memory, [1, 1])
    sequence = _sequence([2, 2, 2])
    cache.acquire(sequence)
    _evaluate(cache, memory, sequence)
    assert not cache.make_room(6)
    assert memory.resident(sequence.slot or 0) == [2, 2, 2]
    assert cache.used_cells == 3


def test_what_is_forgotten_is_not_reused() -> None:
    memory = FakeMemory()
    cache = PrefixCache(memory, 1, 10)
    sequence = _sequence([1, 2, 3])
    cache.acquire(sequence)
    _evaluate(cache, memory, sequence)
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
    _evaluate(cache, memory, sequence, 2)
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


def test_a_running_sequence_shares_what_it_has_evaluated() -> None:
    memory = FakeMemory()
    cache = PrefixCache(memory, 3, 100)
    first, second, third = (_sequence([1, 2, 3, 4, number]) for number in (5, 6, 7))
    cache.acquire(first)
    _evaluate(cache, memory, first, 3)
    cache.acquire(second)
    assert (second.evaluated, memory.used, cache.used_cells) == (3, 3, 3)
    _evaluate(cache, memory, first)
    _evaluate(cache, memory, second)
    cache.acquire(third)
    assert (third.evaluated, memory.used, cache.used_cells) == (4, 7, 7)
    assert cache.held_cells() == 7
    cache.release(first)
    assert cache.held_cells() == 6
    assert cache.used_cells == memory.used == 7
    assert not cache.make_room(95)
    assert cache.used_cells == memory.used == 6, "the cells that others hold stay"
    assert memory.resident(second.slot or 0) == second.tokens


def test_shared_cells_are_free_when_the_last_holder_is_gone() -> None:
    memory = FakeMemory()
    cache = PrefixCache(memory, 4, 200)
    for number in range(4):
        _leave_prefix(cache, memory, [1] * 64 + [10 + number])
    assert cache.used_cells == memory.used == 68
    assert cache.make_room(168)
    assert cache.used_cells == memory.used == 32
    assert cache.drop_idle()
    assert cache.used_cells == memory.used == 0
    assert not cache.drop_idle()


def test_without_reuse_nothing_stays() -> None:
    memory = FakeMemory()
    cache = PrefixCache(memory, 2, 100, reuses=False)
    first, second = _sequence([1, 2, 3]), _sequence([1, 2, 3])
    cache.acquire(first)
    _evaluate(cache, memory, first)
    cache.acquire(second)
    assert second.evaluated == 0
    cache.release(first)
    assert memory.used == cache.used_cells == 0


def test_more_finished_sequences_are_kept_than_can_run() -> None:
    memory = FakeMemory()
    cache = PrefixCache(memory, 1, 100, spare=3)
    for number in range(5):
        _leave_prefix(cache, memory, [number, 8, 9])
    assert sorted(memory.tokens.values()) == [[2, 8, 9], [3, 8, 9], [4, 8, 9]]


def test_tokens_guessed_wrong_are_taken_back() -> None:
    memory = FakeMemory()
    cache = PrefixCache(memory, 2, 100)
    _leave_prefix(cache, memory, [1, 2, 3, 4, 5])
    sequence = _sequence([1, 2, 3, 9])
    cache.acquire(sequence)
    memory.evaluate(sequence.slot or 0, 3, [9, 50, 51])
    cache.advance(sequence, 3)
    cache.rewind(sequence, 5)
    assert (sequence.evaluated, cache.used_cells, memory.used) == (5, 7, 7)
    sequence.tokens.append(50)
    cache.rewind(sequence, 2)
    assert (sequence.evaluated, cache.used_cells, memory.used) == (2, 5, 5), "the other prefix keeps what was shared"


def test_what_leaves_the_cache_comes_back_from_main_memory() -> None:
    memory = FakeMemory()
    cache = PrefixCache(memory, 1, 250, spill=Spill(450))
    one, other = [1] * 100 + [2] * 100, [3] * 200
    _leave_prefix(cache, memory, one)
    assert cache.make_room(200), "the end of the first one leaves"
    assert memory.used == cache.used_cells == 32
    _leave_prefix(cache, memory, other)
    assert memory.used == 200, "and the rest makes way"
    _save_all(cache)
    sequence = _sequence([*one[:150], 9])
    assert cache.reusable(cache.wanted(sequence)) == 150
    cache.acquire(sequence)
    assert sequence.evaluated == 150
    assert memory.resident(sequence.slot or 0) == one[:150]
    assert (memory.saved, memory.restored) == (400, 150)
    assert cache.used_cells == memory.used == 150
    cache.release(sequence)
    again = _sequence([*other, 9])
    cache.acquire(again)
    assert (again.evaluated, memory.saved, memory.restored) == (200, 400, 350)
    assert cache.used_cells == memory.used == 200


def test_idle_prefixes_make_way_for_running_sequences() -> None:
    memory = FakeMemory()
    cache = PrefixCache(memory, 2, 1000, spill=Spill(1000))
    system, one, other = [1] * 300, [2] * 40, [3] * 50
    _leave_prefix(cache, memory, system + one)
    _save_all(cache)
    sequence = _sequence(system + other)
    cache.acquire(sequence)
    assert (cache.used_cells, memory.used, memory.saved) == (300, 300, 340)
    _evaluate(cache, memory, sequence)
    cache.release(sequence)
    assert cache.used_cells == 350, "it stays as long as it is in nobody's way"
    _save_all(cache)
    new = _sequence([4] * 10)
    cache.acquire(new)
    assert cache.used_cells == memory.used == 0
    assert memory.saved == 340 + 94, "the first 256 tokens are there already"
    back = _sequence([*system, *one, 5])
    cache.acquire(back)
    assert (back.evaluated, memory.resident(back.slot or 0)) == (340, system + one)
    assert memory.restored == 340


def test_what_runs_beside_it_is_shared_and_only_the_rest_brought_back() -> None:
    memory = FakeMemory()
    cache = PrefixCache(memory, 2, 2000, spill=Spill(2000))
    system, rest = [1] * 600, [2] * 200
    _leave_prefix(cache, memory, system + rest)
    _save_all(cache)
    first = _sequence([*system, 7])
    cache.acquire(first)
    assert cache.used_cells == 600
    second = _sequence([*system, *rest, 8])
    cache.acquire(second)
    assert second.evaluated == 800
    assert memory.resident(second.slot or 0) == system + rest
    assert memory.restored == 200
    assert cache.used_cells == memory.used == 800
    _evaluate(cache, memory, second)
    cache.release(first)
    cache.release(second)
    assert cache.drop_idle()
    assert cache.used_cells == memory.used == 0


def test_where_there_is_no_room_to_bring_a_block_back_what_is_shared_stays() -> None:
    memory = FakeMemory()
    cache = PrefixCache(memory, 3, 700, spill=Spill(2000))
    system, rest = [1] * 500, [2] * 100
    _leave_prefix(cache, memory, system + rest)
    _save_all(cache)
    first = _sequence([*system, 7])
    cache.acquire(first)
    _evaluate(cache, memory, first)
    other = _sequence([4] * 120)
    cache.acquire(other)
    _evaluate(cache, memory, other)
    second = _sequence([*system, *rest, 8])
    cache.acquire(second)
    assert second.evaluated == 500, "a block needs more than the 79 cells that are free"
    assert cache.used_cells == memory.used == 621


def test_a_start_waits_for_a_few_blocks_only_and_only_where_it_pays() -> None:
    memory = FakeMemory()
    cache = PrefixCache(memory, 2, 5000, spill=Spill(5000))
    _leave_prefix(cache, memory, [2] * 1000)
    little = _sequence([3] * 10)
    cache.acquire(little)
    assert (memory.saved, memory.used) == (0, 1000)
    cache.release(little)
    assert cache.drop_idle()
    _leave_prefix(cache, memory, [1] * 2000)
    new = [_sequence([number] * 10) for number in (4, 5)]
    cache.acquire(new[0])
    assert (memory.saved, memory.used) == (4 * 256, 2000)
    cache.acquire(new[1])
    assert (memory.saved, memory.used) == (2000, 0)


def test_what_was_saved_ahead_need_not_be_saved_when_it_makes_way() -> None:
    memory = FakeMemory()
    cache = PrefixCache(memory, 2, 1000, spill=Spill(1000))
    for tokens in ([1] * 300, [2] * 20):
        _leave_prefix(cache, memory, tokens)
        _save_all(cache)
    assert (memory.saved, memory.used) == (320, 20)
    new = _sequence([4] * 10)
    cache.acquire(new)
    assert (memory.saved, memory.used) == (320, 0)


def test_what_main_memory_has_no_room_for_stays() -> None:
    memory = FakeMemory()
    cache = PrefixCache(memory, 1, 500, spill=Spill(100))
    _leave_prefix(cache, memory, [1] * 110)
    assert cache.save_ahead() is False
    new = _sequence([4] * 10)
    cache.acquire(new)
    assert cache.used_cells == 110


def test_without_main_memory_nothing_is_saved() -> None:
    memory = FakeMemory()
    cache = PrefixCache(memory, 1, 500)
    _leave_prefix(cache, memory, [1] * 110)
    assert not cache.save_ahead()
    cache.acquire(_sequence([4] * 10))
    assert (cache.used_cells, memory.saved) == (110, 0)


def test_a_state_without_parts_is_spilled_as_a_whole_when_it_has_to_leave() -> None:
    memory = FakeMemory(cuttable=False)
    cache = PrefixCache(memory, 2, 2000, spare=0, divisible=False, spill=Spill(2000, in_blocks=False))
    text = [1] * 300
    for tokens in (text, [*text, 2, 3]):
        _leave_prefix(cache, memory, tokens)
        assert not cache.save_ahead()
        assert cache.make_room(2000)
    assert (memory.used, memory.saved) == (0, 602)
    for wanted, found in (([*text, 2, 3, 4], 302), ([*text, 5], 300), ([1] * 200, 0)):
        sequence = _sequence(wanted)
        cache.acquire(sequence)
        assert sequence.evaluated == found
        cache.release(sequence)
        assert cache.make_room(2000)


def test_a_window_that_has_moved_on_serves_as_a_whole_only() -> None:
    """What departs earlier would be brought back for nothing, and cost what a running sequence shares."""
    memory = FakeMemory()
    cache = PrefixCache(memory, 3, 2000, spill=Spill(2000, in_blocks=False))
    system = [1] * 300
    _leave_prefix(cache, memory, [*system, 2, 3])
    assert cache.make_room(2000)
    running = _sequence([*system, 4])
    cache.acquire(running)
    assert (running.evaluated, memory.restored) == (0, 0)
    _evaluate(cache, memory, running)
    second = _sequence([*system, 5])
    cache.acquire(second)
    assert (second.evaluated, memory.restored) == (300, 0)


# Sets of adapters


def _with(adapters: AdapterKey, tokens: list[int]) -> Sequence:
    sequence = _sequence(tokens)
    sequence.adapters = adapters
    return sequence


def test_a_prefix_serves_only_those_who_want_the_same_adapters() -> None:
    memory = FakeMemory()
    cache = PrefixCache(memory, 1, 100)
    for adapters in ((("a", 1.0),), (("a", 0.5),), (("a", 1.0), ("b", 1.0)), ()):
        sequence = _with(adapters, [1, 2, 3, 4])
        assert cache.reusable(cache.wanted(sequence), adapters) == 0
        cache.acquire(sequence)
        assert sequence.evaluated == 0
        _evaluate(cache, memory, sequence)
        assert cache.held_in_common([1, 2, 3], adapters) == 3
        assert cache.held_in_common([1, 2, 3], (("c", 1.0),)) == 0
        cache.release(sequence)
    again = _with((("a", 0.5),), [1, 2, 3, 4, 5])
    cache.acquire(again)
    assert again.evaluated == 4


def test_prefixes_in_main_memory_are_kept_apart_too() -> None:
    memory = FakeMemory()
    cache = PrefixCache(memory, 1, 1000, spill=Spill(10_000))
    for adapters in ((("a", 1.0),), ()):
        sequence = _with(adapters, [1] * 100)
        cache.acquire(sequence)
        _evaluate(cache, memory, sequence)
        cache.release(sequence)
        _save_all(cache)
    cache.drop_idle()
    for adapters, evaluated in (((("b", 1.0),), 0), ((("a", 1.0),), 99), ((), 99)):
        sequence = _with(adapters, [1] * 100)
        cache.acquire(sequence)
        assert sequence.evaluated == evaluated
        cache.release(sequence)


def test_what_was_evaluated_with_an_adapter_that_is_gone_is_dropped() -> None:
    memory = FakeMemory()
    cache = PrefixCache(memory, 2, 1000, spill=Spill(10_000))
    sets: tuple[AdapterKey, ...] = ((("a", 1.0),), (("a", 0.5), ("b", 1.0)), (("b", 1.0),), ())
    for adapters in sets:
        sequence = _with(adapters, [1] * 100)
        cache.acquire(sequence)
        _evaluate(cache, memory, sequence)
        cache.release(sequence)
    running = _with((("b", 1.0),), [1] * 100)
    cache.acquire(running)
    cache.forget("b")
    assert running.evaluated == 99, "what runs goes on"
    assert memory.resident(running.slot or 0) == [1] * 99
    assert [cache.reusable([1] * 99, adapters) for adapters in sets] == [99, 0, 99, 99]
    _evaluate(cache, memory, running)
    cache.release(running)
    cache.forget("b")
    assert [cache.reusable([1] * 99, adapters) for adapters in sets] == [99, 0, 0, 99]
    assert cache.used_cells == memory.used
