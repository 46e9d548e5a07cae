from __future__ import annotations

import msgspec
import psutil
import pytest
from hypothesis import given, strategies as st

from llamaserve.engine import engine as engines, spill as spilling
from llamaserve.engine.engine import LoadedEngine
from llamaserve.engine.params import LoadParams
from llamaserve.engine.sequence import AdapterKey, common_prefix
from llamaserve.engine.spill import Spill

_SETS: tuple[AdapterKey, ...] = ((), (("a", 1.0),), (("a", 0.5), ("b", 1.0)), (("b", 1.0),))
_TEXTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), max_size=10)


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spilling, "BLOCK", 4)


def _keep(spill: Spill, tokens: list[int]) -> bool:
    """Save a prefix, a byte a token; return whether all of it is there."""
    while place := spill.missing(tokens):
        start, end = place
        if not spill.add(tokens, bytearray(tokens[start:end])):
            return False
    return True


def _check(spill: Spill, wanted: list[int]) -> int:
    """Return how much of what is wanted is there, after a look at the blocks with it."""
    shared, blocks = spill.longest(wanted)
    tokens = [token for block in blocks for token in block.tokens]
    assert tokens[:shared] == wanted[:shared]
    assert [list(block.state) for block in blocks] == [block.tokens for block in blocks]
    assert len(tokens) - shared < (len(blocks[-1].tokens) if blocks else 1), "no block that is of no use"
    return shared


@given(kept=_TEXTS, wanted=st.lists(st.integers(0, 1), max_size=14))
def test_the_longest_beginning_of_any_prefix_is_found(kept: list[list[int]], wanted: list[int]) -> None:
    spill = Spill(10_000)
    assert all(_keep(spill, tokens) for tokens in kept)
    assert _check(spill, wanted) == max((common_prefix(tokens, wanted) for tokens in kept), default=0)
    beginnings = {tuple(tokens[:end]) for tokens in kept for end in range(1, len(tokens) + 1)}
    assert spill.size <= len(beginnings) + 3 * len(kept), "what is shared is there once, but for parts of a block"


@given(kept=_TEXTS, wanted=st.lists(st.integers(0, 1), max_size=14))
def test_whole_prefixes_are_found_as_they_were_saved(kept: list[list[int]], wanted: list[int]) -> None:
    spill = Spill(10_000, in_blocks=False)
    for tokens in kept:
        place = spill.missing(tokens)
        assert place in (None, (0, len(tokens)))
        assert _keep(spill, tokens)
    fitting = [len(tokens) for tokens in kept if wanted[: len(tokens)] == tokens]
    assert _check(spill, wanted) == max(fitting, default=0)
    assert spill.size == sum(map(len, set(map(tuple, kept))))


@given(kept=_TEXTS, wanted=st.lists(st.integers(0, 1), max_size=14), budget=st.integers(0, 30))
def test_it_never_takes_more_than_its_budget(kept: list[list[int]], wanted: list[int], budget: int) -> None:
    spill = Spill(budget)
    for tokens in kept:
        complete = _keep(spill, tokens)
        assert spill.size <= budget
        assert complete == (_check(spill, tokens) == len(tokens))
        assert complete or len(tokens) > budget
    assert _check(spill, wanted) <= max((common_prefix(tokens, wanted) for tokens in kept), default=0)
    spill.clear()
    assert (spill.size, _check(spill, wanted)) == (0, 0)


def test_what_is_too_large_costs_nobody_else_a_place() -> None:
    spill = Spill(10)
    assert _keep(spill, [1] * 4)
    assert _keep(spill, [2] * 4)
    assert not spill.add([3] * 4, bytearray(11))
    assert [_check(spill, [token] * 4) for token in (1, 2, 3)] == [4, 4, 0]


def test_what_was_unused_longest_goes_first_from_its_end() -> None:
    spill = Spill(16)
    one, other = [1] * 8, [2] * 8
    assert _keep(spill, one)
    assert _keep(spill, other)
    assert _check(spill, one) == 8  # used just now
    assert _keep(spill, [3] * 4)
    assert [_check(spill, tokens) for tokens in (one, other, [3] * 4)] == [8, 4, 4]


def test_of_a_conversation_that_goes_on_only_the_new_blocks_are_saved() -> None:
    spill = Spill(100)
    text = list(range(10))
    assert _keep(spill, text)
    assert spill.missing([*text, 10, 11, 12]) == (8, 12), "the last block was a short one"
    assert _keep(spill, [*text, 10, 11, 12])
    assert spill.size == 13
    assert spill.missing(text) is None


def test_by_default_it_takes_as_much_as_the_cache_and_nothing_with_a_gpu(
    backend: None, load_params: LoadParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = msgspec.structs.replace(load_params, kv_unified=True, flash_attention="auto", spill=None)

    def budget() -> int:
        engine = LoadedEngine(params, lambda fraction: True)
        try:
            return engine._cache._spill.budget
        finally:
            engine.close()

    free = psutil.virtual_memory().available
    cell = 30 * 2 * 3 * 64 * 2  # layers, keys and values, heads, their size, bytes
    assert params.kv_cells * cell <= budget() <= min(1.05 * params.kv_cells * cell, free / 4)
    monkeypatch.setattr(engines, "uses_gpu", lambda params: True)
    assert budget() == 0


@given(
    kept=st.lists(st.tuples(st.sampled_from(_SETS), st.lists(st.integers(0, 1), min_size=1, max_size=14)), max_size=10),
    wanted=st.lists(st.integers(0, 1), max_size=14),
    gone=st.sampled_from(["a", "b", "c"]),
)
def test_what_was_evaluated_with_other_adapters_is_not_found(
    kept: list[tuple[AdapterKey, list[int]]], wanted: list[int], gone: str
) -> None:
    spill = Spill(10_000)
    for adapters, tokens in kept:
        while place := spill.missing(tokens, adapters):
            assert spill.add(tokens, bytearray(tokens[slice(*place)]), adapters)
    for forgotten in (frozenset[str](), frozenset([gone])):
        for adapters in _SETS:
            alike = [tokens for each, tokens in kept if each == adapters and not forgotten.intersection(dict(adapters))]
            expected = max((common_prefix(tokens, wanted) for tokens in alike), default=0)
            assert spill.longest(wanted, adapters)[0] == expected
        spill.forget(gone)
    assert spill.size >= 0
    spill.clear()
    for adapters, tokens in kept:
        assert spill.missing(tokens, adapters)


def test_of_all_sets_of_adapters_what_was_unused_longest_goes_first() -> None:
    spill = Spill(8)
    for adapters in _SETS[:3]:
        assert spill.add([1] * 4, bytearray(4), adapters)
    assert [spill.longest([1] * 4, adapters)[0] for adapters in _SETS[:3]] == [0, 4, 4]
    assert len(spill._roots) == 2, "of a set without prefixes nothing is left"
    spill.forget("a")
    assert spill.size == 4 * sum("a" not in dict(adapters) for adapters in _SETS[1:3])
