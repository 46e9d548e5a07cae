from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from llamaserve.engine.llama import Batch, Context, Model, SamplerChain, Vocab
from llamaserve.engine.params import LoadParams, Sampling
from llamaserve.engine.sampling import Greedy, build_sampler
from llamaserve.errors import InvalidRequest

_PROMPT = "Yesterday I saw a"  # after which many tokens are probable
_CONTEXT = 1024


class Row:
    """One evaluated row of logits, from which any number of tokens can be drawn."""

    def __init__(self, context: Context, vocab: Vocab) -> None:
        self.context = context
        self.vocab = vocab
        self.tokens = vocab.tokenize(_PROMPT, add_bos=True, parse_special=True)
        batch = Batch(len(self.tokens))
        self.number = batch.add(self.tokens, 0, 0, logits=True)
        context.evaluate(batch)
        self.logits = context.logits(self.number).astype(np.float64)
        self.best = [int(token) for token in np.argsort(-self.logits)]

    def draw(
        self,
        times: int = 1,
        *,
        choice: int = 0,
        history: list[int] | None = None,
        context: int = _CONTEXT,
        **options: Any,
    ) -> list[int]:
        """Sample so many times with one chain, which accepts each token."""
        sampling = Sampling(**{"seed": 1, "top_p": 1.0, **options})
        history = self.tokens if history is None else history
        chain = build_sampler(sampling, self.vocab, history=history, context=context, choice=choice)
        try:
            return [chain.sample(self.context, self.number) for _ in range(times)]
        finally:
            chain.close()

    def probabilities(self, temperature: float = 1.0) -> npt.NDArray[np.float64]:
        """Return the softmax of the logits."""
        weights = np.exp((self.logits - self.logits.max()) / temperature)
        return np.asarray(weights / weights.sum())


@pytest.fixture(scope="module")
def row(model: Model, load_params: LoadParams) -> Iterator[Row]:
    context = Context(model, msgspec.structs.replace(load_params, kv_cells=256))
    yield Row(context, model.vocab)
    context.close()


# The one most probable token


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 1e-3}]
)
def test_many_ways_to_take_the_best(row: Row, options: dict[str, float]) -> None:
    assert set(row.draw(20, **options)) == {row.best[0]}


def test_temperature_0_ignores_the_seed_and_the_other_options(row: Row) -> None:
    for seed in range(5):
        assert row.draw(seed=seed, temperature=0.0, top_k=50, min_p=0.1) == [row.best[0]]


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-30, 1e-10])
def test_the_smallest_temperatures_still_take_the_best(row: Row, temperature: float) -> None:
    """A number that is as good as 0 must not turn the logits into infinities, and the answer into noise."""
    assert set(row.draw(5, temperature=temperature)) == {row.best[0]}


# What is cut off


@pytest.mark.parametrize("k", [2, 5, 40])
def test_top_k(row: Row, k: int) -> None:
    drawn = set(row.draw(400, top_k=k, temperature=3.0))
    assert drawn <= set(row.best[:k])
    assert len(drawn) > 1


def test_top_p(row: Row) -> None:
    sums = np.cumsum(row.probabilities()[row.best])
    smallest = int(np.searchsorted(sums, 0.6)) + 1
    drawn = set(row.draw(400, top_p=0.6))
    assert drawn <= set(row.best[:smallest])
    assert len(drawn) > 1


def test_min_p(row: Row) -> None:
    probabilities = row.probabilities()
    allowed = {int(token) for token in np.flatnonzero(probabilities >= 0.1 * probabilities.max())}
    drawn = set(row.draw(400, min_p=0.1))
    assert drawn <= allowed
    assert len(drawn) > 1


def test_temperature_comes_before_the_cuts(row: Row) -> None:
    """The order of the seed API: so min_p sees the probabilities that the temperature made."""
    cold = row.probabilities(0.5)
    allowed = {int(token) for token in np.flatnonzero(cold >= 0.1 * cold.max())}
    assert len(allowed) < np.count_nonzero(row.probabilities() >= 0.1 * row.probabilities().max())
    assert set(row.draw(400, temperature=0.5, min_p=0.1)) <= allowed


# Logit bias


def test_a_bias_bans_and_forces(row: Row) -> None:
    first, second, *_, last = row.best
    for temperature in (0.0, 1.0):
        assert row.best[0] not in row.draw(50, temperature=temperature, logit_bias={first: -100.0})
        assert set(row.draw(50, temperature=temperature, logit_bias={last: 100.0})) == {last}
    assert row.draw(temperature=0.0, logit_bias={first: -100.0}) == [second]


def test_the_bias_is_added_to_the_logit(row: Row) -> None:
    first, second = row.best[:2]
    gap = float(row.logits[first] - row.logits[second])
    assert row.draw(temperature=0.0, logit_bias={second: gap - 0.01}) == [first]
    assert row.draw(temperature=0.0, logit_bias={second: gap + 0.01}) == [second]


@pytest.mark.parametrize("token", [-1, 49152, 2**31, 2**40])
def test_a_bias_of_no_token_is_refused(vocab: Vocab, token: int) -> None:
    with pytest.raises(InvalidRequest):
        vocab.check({token: 1.0}, "logit_bias")


# Penalties


def _penalised(row: Row, history: list[int], **options: float) -> int:
    """What the best token is by the definition of the penalties."""
    logits = row.logits.copy()
    repeat = options.get("repetition_penalty", 1.0)
    for token, times in Counter(history).items():
        logits[token] = logits[token] / repeat if logits[token] > 0 else logits[token] * repeat
        logits[token] -= times * options.get("frequency_penalty", 0.0) + options.get("presence_penalty", 0.0)
    return int(np.argmax(logits))


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 5.0},
        {"frequency_penalty": 1.0},
        {"presence_penalty": 2.0},
        {"presence_penalty": 100.0},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.5},
    ],
)
def test_penalties_follow_their_definition(row: Row, options: dict[str, float]) -> None:
    first, second, third = row.best[:3]
    for history in ([5], [first], [first, first, first], [first, second], [first, second, second, third, third, third]):
        assert row.draw(temperature=0.0, history=history, **options) == [_penalised(row, history, **options)]


def test_generated_tokens_are_penalised_too(row: Row) -> None:
    drawn = row.draw(6, temperature=0.0, presence_penalty=100.0)
    assert len(set(drawn)) == 6
    assert not set(drawn) & set(row.tokens)


def test_penalties_look_back_as_far_as_they_are_told(row: Row) -> None:
    first, second = row.best[:2]
    history = [first, 5, 6, 7]
    assert row.draw(temperature=0.0, history=history, presence_penalty=50.0, repetition_penalty_range=3) == [first]
    assert row.draw(temperature=0.0, history=history, presence_penalty=50.0, repetition_penalty_range=4) == [second]
    assert row.draw(temperature=0.0, history=history, presence_penalty=50.0, repetition_penalty_range=0) == [second]


def test_range_0_means_the_whole_text_however_long(row: Row) -> None:
    first, second = row.best[:2]
    history = [first, *[5] * (_CONTEXT - 2)]
    assert row.draw(temperature=0.0, history=history, presence_penalty=50.0, repetition_penalty_range=0) == [second]


def test_a_huge_range_costs_no_more_than_the_context(monkeypatch: pytest.MonkeyPatch, row: Row) -> None:
    """llama.cpp allocates and walks that many cells: 2**31 - 1 of them are 8 GB and half a minute."""
    seen: list[int] = []
    monkeypatch.setattr(SamplerChain, "add_penalties", lambda self, vocab, last, *others: seen.append(last))
    row.draw(temperature=0.0, presence_penalty=1.0, repetition_penalty_range=2**31 - 1, context=_CONTEXT)
    assert seen[0] <= _CONTEXT


def test_neutral_penalties_change_nothing(row: Row) -> None:
    plain = row.draw(50)
    assert row.draw(50, repetition_penalty=1.0, frequency_penalty=0.0, presence_penalty=0.0) == plain
    assert row.draw(50, repetition_penalty=1.0, presence_penalty=1e-30) == plain


# Chance


def test_a_seed_repeats_itself(row: Row) -> None:
    for seed in (0, 1, -1, -(2**63), 2**31, 2**32 - 1, 2**32, 2**63 - 1):
        assert row.draw(30, seed=seed) == row.draw(30, seed=seed)


def test_different_seeds_differ(row: Row) -> None:
    seeds = [0, 1, 2, 3, 7, 2**31, 2**32 + 5, 2**40, 2**62, -9]
    drawn = {tuple(row.draw(30, seed=seed)) for seed in seeds}
    assert len(drawn) == len(seeds)


def test_choice_i_draws_as_seed_plus_i(row: Row) -> None:
    for choice in range(4):
        assert row.draw(30, seed=11, choice=choice) == row.draw(30, seed=11 + choice)


def _assert_fits(drawn: list[int], expected: npt.NDArray[np.float64]) -> None:
    """Check frequencies: each common token within 4.5 standard deviations, and all together by chi-squared."""
    total = len(drawn)
    counts = Counter(drawn)
    common = [int(token) for token in np.argsort(-expected) if expected[token] * total >= 10]
    assert len(common) >= 5
    observed = [counts[token] for token in common]
    wanted = [expected[token] * total for token in common]
    for count, mean in zip(observed, wanted, strict=True):
        assert abs(count - mean) <= 4.5 * np.sqrt(mean * (1 - mean / total))
    observed.append(total - sum(observed))
    wanted.append(total - sum(wanted))
    chi_squared = sum((count - mean) ** 2 / mean for count, mean in zip(observed, wanted, strict=True) if mean >= 1)
    freedom = len(common)
    assert chi_squared <= freedom + 4.5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_draws_of_one_chain_have_the_frequencies_of_the_softmax(row: Row, temperature: float) -> None:
    _assert_fits(row.draw(2000, seed=42, temperature=temperature), row.probabilities(temperature))


def test_first_draws_of_neighbouring_seeds_have_them_too(row: Row) -> None:
    """The choices of a request, and the requests of a client that counts its seed up, see just these."""
    _assert_fits([row.draw(seed=seed)[0] for seed in range(1500)], row.probabilities())


def test_cut_draws_have_the_renormalised_frequencies(row: Row) -> None:
    expected = row.probabilities()
    expected[row.best[10:]] = 0
    _assert_fits(row.draw(2000, seed=43, top_k=10), expected / expected.sum())


def test_the_most_probable_token_is_the_one_that_llama_cpp_picks(row: Row) -> None:
    chain = SamplerChain()
    chain.add_greedy()
    try:
        assert row.draw(2, temperature=0.0) == [chain.sample(row.context, row.number)] * 2 == [row.best[0]] * 2
    finally:
        chain.close()
    plain = build_sampler(Sampling(seed=1, temperature=0.0), row.vocab, history=[], context=8, choice=0)
    assert isinstance(plain, Greedy)
