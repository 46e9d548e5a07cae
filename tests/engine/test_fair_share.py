"""The books of what each share has had: what holds whatever happens, without a model and without a scheduler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

from hypothesis import given, strategies as st

from llamaserve.engine import fair_share
from llamaserve.engine.fair_share import Shares
from llamaserve.engine.params import Generation, Sampling
from llamaserve.engine.sequence import Sequence

Queues = dict[str, list[Sequence]]

_NAMES = st.sampled_from(["", "a", "b", "c", "d"])


def queues_of(arrivals: str, resumed: frozenset[int] = frozenset()) -> Queues:
    """Return a queue for each letter, of sequences that came in the order of the letters."""
    queues: Queues = {}
    for arrival, share in enumerate(arrivals):
        sequence = Sequence(arrival, 0, [1], Generation(sampling=Sampling(seed=0), share=share))
        sequence.arrival = arrival
        sequence.cached = 0 if arrival in resumed else None
        queues.setdefault(share, []).append(sequence)
    return queues


def order(shares: Shares, queues: Queues, running: Mapping[str, int] | None = None) -> str:
    return "".join(sequence.share for sequence in shares.interleave(queues, running or {}))


def test_the_share_with_the_fewest_running_comes_first() -> None:
    assert order(Shares(), queues_of("aaabb"), {"a": 2}) == "bbaaa"
    assert order(Shares(), queues_of("aaabb"), {"b": 1}) == "aabab"
    assert order(Shares(), queues_of("aaabb"), {"a": 1, "b": 1, "c": 7}) == "ababa"


def test_of_several_with_as_many_it_is_the_one_that_has_had_least() -> None:
    shares = Shares()
    shares.charge("a", 2)
    shares.charge("b", 1)
    assert order(shares, queues_of("abcabc")) == "cbacba"
    assert order(shares, queues_of("abcabc"), {"c": 1}) == "bacbac"


def test_of_several_that_have_had_as_much_it_is_the_one_that_came_first() -> None:
    assert order(Shares(), queues_of("bacab")) == "bacab"


def test_those_that_have_lost_their_slots_come_first() -> None:
    shares = Shares()
    shares.charge("a", 1000)
    queues = queues_of("baaab", frozenset({1, 3}))
    ordered = [sequence.arrival for sequence in shares.interleave(queues, {"a": 3})]
    assert ordered == [1, 3, 0, 4, 2]


def test_a_share_is_passed_so_many_times_for_each_that_waits() -> None:
    shares, queues = Shares(), queues_of("abc")
    passes = 0
    while order(shares, queues, {"a": 5}) != "abc":
        assert order(shares, queues, {"a": 5}) == "bca"
        shares.start("bc"[passes % 2], queues)
        passes += 1
    assert passes == 3 * fair_share._MOST_PASSES
    shares.start("a", queues)
    assert order(shares, queues, {"a": 6}) == "bca", "it has had its turn"


def test_passes_are_forgotten_with_those_that_wait_no_more() -> None:
    shares, queues = Shares(), queues_of("ab")
    for _ in range(100):
        shares.start("b", queues)
    shares.start("b", {"b": queues["b"]})
    assert order(shares, queues, {"a": 1}) == "ba"


@given(
    st.text("abcd", max_size=20),
    st.dictionaries(st.sampled_from("abcd"), st.integers(0, 9)),
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 5000)), max_size=10),
)
def test_each_is_there_once_and_those_of_a_share_in_their_order(
    arrivals: str, running: dict[str, int], charges: list[tuple[str, int]]
) -> None:
    shares, queues = Shares(), queues_of(arrivals)
    for share, tokens in charges:
        shares.charge(share, tokens)
    ordered = shares.interleave(queues, running)
    assert sorted(sequence.arrival for sequence in ordered) == list(range(len(arrivals)))
    for share, queue in queues.items():
        assert [sequence for sequence in ordered if sequence.share == share] == queue
    counts = Counter(running)
    for sequence, following in pairwise(ordered):
        counts[sequence.share] += 1
        assert counts[sequence.share] - 1 <= counts[following.share], "the next slot was another's"


# What is remembered


@given(st.lists(st.tuples(_NAMES, st.integers(1, 600)), max_size=60))
def test_accounts_are_sums_except_that_no_credit_is_too_large(charges: list[tuple[str, int]]) -> None:
    shares = Shares()
    sums: dict[str, int] = {}
    for share, tokens in charges:
        least = max(sums.values(), default=0) - fair_share._CREDIT
        sums[share] = max(sums.get(share, 0), least) + tokens
        shares.charge(share, tokens)
        most = max(sums.values())
        for each in (*sums, "new"):
            assert shares.had(each) == max(sums.get(each, 0), most - fair_share._CREDIT)


@given(st.lists(_NAMES, min_size=1, max_size=5, unique=True), st.lists(st.integers(1, 500), max_size=300))
def test_who_has_had_least_being_next_all_have_as_much(names: list[str], sizes: list[int]) -> None:
    """However much one of them had before."""
    shares = Shares()
    shares.charge(names[0], 1_000_000)
    behind = shares.had(names[0]) - shares.had("new")
    assert behind == fair_share._CREDIT
    had: Counter[str] = Counter(dict.fromkeys(names, 0))
    for size in sizes:
        share = min(names, key=shares.had)
        shares.charge(share, size)
        had[share] += size
    assert max(had.values()) - min(had.values()) <= 500 + (behind if len(names) > 1 else 0)


def test_ever_new_shares_take_no_more_memory_and_those_that_have_had_most_are_known() -> None:
    shares = Shares()
    for number in range(20):
        shares.charge(f"busy{number}", 1500)
    for number in range(10_000):
        shares.charge(f"share{number}", 1)
        assert len(shares._had) <= fair_share._REMEMBERED
    assert {shares.had(f"busy{number}") for number in range(20)} == {1500}
    assert shares.had("share1") == 0
