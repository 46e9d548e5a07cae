"""Every sampling option against its definition: exact probabilities on known logits, through the chain of a request."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import llama_cpp.llama_cpp as lib
import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import sampling_definitions as definitions
from hypothesis import given, settings, strategies as st
from sampling_definitions import Logits, softmax

from llamaserve.engine.candidates import NothingLeft, draw
from llamaserve.engine.llama import NativeSampler, Vocab
from llamaserve.engine.params import STAGES, Sampling
from llamaserve.engine.sampling import Greedy, Sampler, SamplerFactory
from llamaserve.errors import EngineError, InvalidRequest

_ENDS = (0, 2)


class SmallVocab:
    """As much of a vocabulary as samplers need."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.ends = frozenset(_ENDS)

    check = Vocab.check


def _factory(size: int, context: int = 256) -> SamplerFactory:
    return SamplerFactory(SmallVocab(size), context)  # type: ignore[arg-type]


def _random(size: int, spread: float, seed: int) -> npt.NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


def _peaked(size: int) -> npt.NDArray[np.float32]:
    logits = _random(size, 1.0, 5)
    logits[7 : 7 + 12] += np.linspace(4, 12, 12, dtype=np.float32)
    return logits


# Some with more candidates than are sorted as they are, some peaked, some nearly flat, one with equals.
_VECTORS = {
    "few": _random(40, 3.0, 1),
    "peaked": _peaked(3000),
    "flat": _random(2000, 0.3, 3),
    "wide": _random(5000, 4.0, 4),
    "certain": _peaked(1500) * np.float32(4),
}
_PROMPT = [5, 9, 7, 8, 9, 7, 8, 30, 12, 9, 7, 8]


def _probabilities(
    logits: npt.NDArray[np.float32], prompt: Sequence[int] = _PROMPT, **options: Any
) -> npt.NDArray[np.float64]:
    """Return the probability of each token, from the chain of a request with these options."""
    sampler = _factory(len(logits)).build(Sampling(seed=1, **options), prompt)
    before = logits.copy()
    candidates = sampler.candidates(logits)
    sampler.close()
    assert (logits == before).all(), "the model's own logits must not change: others read them"
    probabilities = np.zeros(len(logits))
    probabilities[candidates.tokens] = candidates.probabilities()
    return probabilities


def _assert_same(actual: npt.NDArray[np.float64], expected: Sequence[float]) -> None:
    wanted = np.array(expected)
    assert not ((actual > 0) & (wanted == 0)).any(), "more are left than should be"
    assert not ((actual == 0) & (wanted > 1e-30)).any(), "fewer are left than should be"
    np.testing.assert_allclose(actual, wanted, rtol=2e-3, atol=1e-7)


# One line for each option: values, and what the logits are after it by its definition. Options that only work together
# stand together.
_Definition = Callable[[Logits], Logits]
_TABLE: list[tuple[dict[str, Any], _Definition]] = [
    ({"temperature": 0.5}, lambda x: definitions.temperature(x, 0.5)),
    ({"temperature": 2.5}, lambda x: definitions.temperature(x, 2.5)),
    ({"temperature": 0.0}, lambda x: definitions.top_k(x, 1)),
    ({"temperature": 1e-9}, lambda x: definitions.top_k(x, 1)),
    ({"temperature": 1e-300}, lambda x: definitions.top_k(x, 1)),
    ({"temperature": 0.0, "top_k": 50, "xtc_probability": 1.0}, lambda x: definitions.top_k(x, 1)),
    ({"dynatemp_range": 0.4}, lambda x: definitions.dynamic_temperature(x, 0.6, 1.4, 1.0)),
    (
        {"temperature": 0.5, "dynatemp_range": 0.5, "dynatemp_exponent": 2.0},
        lambda x: definitions.dynamic_temperature(x, 1e-5, 1.0, 2.0),
    ),
    ({"smoothing_factor": 0.2}, lambda x: definitions.smoothing(x, 0.2, 1.0)),
    ({"smoothing_factor": 0.1, "smoothing_curve": 1.5}, lambda x: definitions.smoothing(x, 0.1, 1.5)),
    ({"top_k": 1}, lambda x: definitions.top_k(x, 1)),
    ({"top_k": 17}, lambda x: definitions.top_k(x, 17)),
    ({"top_p": 0.0}, lambda x: definitions.top_k(x, 1)),
    ({"top_p": 0.3}, lambda x: definitions.top_p(x, 0.3)),
    ({"top_p": 0.9}, lambda x: definitions.top_p(x, 0.9)),
    ({"top_p": 0.999}, lambda x: definitions.top_p(x, 0.999)),
    ({"min_p": 0.05}, lambda x: definitions.min_p(x, 0.05)),
    ({"min_p": 1.0}, lambda x: definitions.top_k(x, 1)),
    ({"typical_p": 0.2}, lambda x: definitions.typical_p(x, 0.2)),
    ({"typical_p": 0.9}, lambda x: definitions.typical_p(x, 0.9)),
    ({"top_n_sigma": 1.0}, lambda x: definitions.top_n_sigma(x, 1.0)),
    ({"top_n_sigma": 2.5}, lambda x: definitions.top_n_sigma(x, 2.5)),
    ({"epsilon_cutoff": 9.0}, lambda x: definitions.epsilon_cutoff(x, 9.0)),
    ({"epsilon_cutoff": 9999.0}, lambda x: definitions.top_k(x, 1)),
    ({"eta_cutoff": 20.0}, lambda x: definitions.eta_cutoff(x, 20.0)),
    ({"eta_cutoff": 3000.0}, lambda x: definitions.eta_cutoff(x, 3000.0)),
    ({"tfs": 0.5}, lambda x: definitions.tail_free(x, 0.5)),
    ({"tfs": 0.95}, lambda x: definitions.tail_free(x, 0.95)),
    ({"top_a": 0.2}, lambda x: definitions.top_a(x, 0.2)),
    ({"top_a": 1.0}, lambda x: definitions.top_a(x, 1.0)),
    ({"xtc_probability": 1.0}, lambda x: definitions.xtc(x, 0.1)),
    ({"xtc_probability": 1.0, "xtc_threshold": 0.01}, lambda x: definitions.xtc(x, 0.01)),
    ({"xtc_probability": 1.0, "xtc_threshold": 0.0}, lambda x: definitions.xtc(x, 0.0)),
    ({"xtc_probability": 1.0, "xtc_threshold": 0.51}, lambda x: x),
    ({"mirostat_mode": 1}, lambda x: definitions.mirostat(x, 10.0, len(x))),
    ({"mirostat_mode": 1, "mirostat_tau": 2.0}, lambda x: definitions.mirostat(x, 4.0, len(x))),
    ({"mirostat_mode": 2}, lambda x: definitions.mirostat_2(x, 10.0)),
    ({"mirostat_mode": 2, "mirostat_tau": 1.0}, lambda x: definitions.mirostat_2(x, 2.0)),
    ({"mirostat_mode": 2, "mirostat_tau": 0.0}, lambda x: definitions.mirostat_2(x, 0.0)),
    (
        {"mirostat_mode": 2, "mirostat_tau": 2.0, "temperature": 2.0, "top_k": 2, "min_p": 1.0, "xtc_probability": 1.0},
        lambda x: definitions.mirostat_2(definitions.temperature(x, 2.0), 4.0),
    ),
    ({"adaptive_target": 0.5}, lambda x: definitions.adaptive(x, 0.5)),
    ({"adaptive_target": 0.05, "adaptive_decay": 0.5}, lambda x: definitions.adaptive(x, 0.05)),
    (
        {"adaptive_target": 0.4, "min_p": 0.05},
        lambda x: definitions.adaptive(definitions.min_p(x, 0.05), 0.4),
    ),
    ({"repetition_penalty": 1.5}, lambda x: definitions.penalties(x, _PROMPT, 1024, 1.5, 0, 0)),
    ({"repetition_penalty": 0.7}, lambda x: definitions.penalties(x, _PROMPT, 1024, 0.7, 0, 0)),
    ({"frequency_penalty": 0.7}, lambda x: definitions.penalties(x, _PROMPT, 1024, 1, 0.7, 0)),
    ({"presence_penalty": 1.1}, lambda x: definitions.penalties(x, _PROMPT, 1024, 1, 0, 1.1)),
    ({"presence_penalty": -2.0}, lambda x: definitions.penalties(x, _PROMPT, 1024, 1, 0, -2.0)),
    (
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.5, "repetition_penalty_range": 5},
        lambda x: definitions.penalties(x, _PROMPT, 5, 1.3, 0.5, 0.5),
    ),
    (
        {"frequency_penalty": 2.0, "repetition_penalty_range": 0},
        lambda x: definitions.penalties(x, _PROMPT, 1024, 1, 2.0, 0),
    ),
    ({"encoder_repetition_penalty": 1.4}, lambda x: definitions.encoder_penalty(x, _PROMPT, 1.4)),
    ({"encoder_repetition_penalty": 0.5}, lambda x: definitions.encoder_penalty(x, _PROMPT, 0.5)),
    ({"no_repeat_ngram_size": 1}, lambda x: definitions.no_repeated_ngram(x, _PROMPT, 1)),
    ({"no_repeat_ngram_size": 3}, lambda x: definitions.no_repeated_ngram(x, _PROMPT, 3)),
    ({"no_repeat_ngram_size": 30}, lambda x: x),
    ({"logit_bias": {7: 3.0, 9: -100.0, 39: 0.5}}, lambda x: _changed(x, {7: 3.0, 9: -100.0, 39: 0.5})),
    ({"banned_tokens": (7, 8, 39)}, lambda x: _changed(x, dict.fromkeys((7, 8, 39), -math.inf))),
    ({"ban_eos": True}, lambda x: _changed(x, dict.fromkeys(_ENDS, -math.inf))),
    ({"min_tokens": 1}, lambda x: _changed(x, dict.fromkeys(_ENDS, -math.inf))),
]
# Options that are switched by others, which the lines above cover with those.
_DEPENDENT = {
    "dynatemp_exponent",
    "smoothing_curve",
    "mirostat_tau",
    "mirostat_eta",
    "adaptive_decay",
    "stages",
    "seed",
}
_DRY = {
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
    "dry_range",
    "dry_sequence_breakers",
}  # have their own tests


def _changed(logits: Logits, changes: dict[int, float]) -> Logits:
    return [logit + changes.get(token, 0.0) for token, logit in enumerate(logits)]


@pytest.mark.parametrize("vector", _VECTORS)
@pytest.mark.parametrize(("options", "definition"), _TABLE, ids=lambda value: str(value) if type(value) is dict else "")
def test_an_option_does_what_its_definition_says(options: dict[str, Any], definition: _Definition, vector: str) -> None:
    logits = _VECTORS[vector]
    _assert_same(_probabilities(logits, **options), softmax(definition([float(logit) for logit in logits])))


def test_the_table_has_every_option() -> None:
    tested = {name for options, _ in _TABLE for name in options} | _DEPENDENT | _DRY
    assert tested == set(Sampling.__struct_fields__)


_NEUTRAL: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "dynatemp_range": 0.0, "dynatemp_exponent": 3.0},
    {"smoothing_factor": 0.0, "smoothing_curve": 2.0},
    {"top_k": 0},
    {"top_k": 10**9},
    {"top_p": 1.0},
    {"min_p": 0.0},
    {"typical_p": 1.0},
    {"top_n_sigma": 0.0},
    {"top_n_sigma": 1e9},
    {"epsilon_cutoff": 0.0},
    {"eta_cutoff": 0.0},
    {"tfs": 1.0},
    {"top_a": 0.0},
    {"xtc_probability": 0.0, "xtc_threshold": 0.0},
    {"mirostat_mode": 0, "mirostat_tau": 0.1, "mirostat_eta": 1.0},
    {"adaptive_target": 0.0, "adaptive_decay": 0.1},
    {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty_range": 3},
    {"encoder_repetition_penalty": 1.0},
    {"no_repeat_ngram_size": 0},
    {"dry_multiplier": 0.0, "dry_base": 9.0, "dry_allowed_length": 0, "dry_sequence_breakers": ("a",)},
    {"logit_bias": {}},
    {"logit_bias": {5: 0.0}},
    {"banned_tokens": ()},
    {"ban_eos": False, "min_tokens": 0},
]


@pytest.mark.parametrize("vector", _VECTORS)
@pytest.mark.parametrize("options", _NEUTRAL, ids=str)
def test_a_neutral_value_changes_nothing(options: dict[str, Any], vector: str) -> None:
    logits = _VECTORS[vector]
    plain = Sampler([])
    expected = plain.candidates(logits).probabilities()
    assert (_probabilities(logits, **options) == expected).all()
    _assert_same(np.asarray(expected, np.float64), softmax([float(logit) for logit in logits]))


def test_the_defaults_are_neutral() -> None:
    sampler = _factory(40).build(Sampling(seed=1), _PROMPT)
    assert isinstance(sampler, Sampler)
    assert not list(sampler._stages)


# Equals


@pytest.mark.parametrize(
    "options", [{"top_k": 3}, {"top_p": 0.2}, {"top_p": 0.45}, {"min_p": 0.5}, {"top_p": 0.0}], ids=str
)
@pytest.mark.parametrize("size", [10, 3000])
def test_among_equals_as_many_are_kept_as_the_definition_says(options: dict[str, Any], size: int) -> None:
    logits = np.full(size, -20, np.float32)
    logits[3:11:2] = 1.0  # four
    definition = {"top_k": definitions.top_k, "top_p": definitions.top_p, "min_p": definitions.min_p}
    ((name, value),) = options.items()
    expected = softmax(definition[name]([float(logit) for logit in logits], value))
    np.testing.assert_allclose(np.sort(_probabilities(logits, **options)), sorted(expected), rtol=1e-5, atol=1e-9)


# Order


def test_stages_run_in_the_order_that_is_asked_for() -> None:
    logits = _VECTORS["peaked"]
    plain = [float(logit) for logit in logits]
    options = {"temperature": 3.0, "top_p": 0.9, "min_p": 0.1}
    functions = {
        "temperature": lambda x: definitions.temperature(x, 3.0),
        "top_p": lambda x: definitions.top_p(x, 0.9),
        "min_p": lambda x: definitions.min_p(x, 0.1),
    }
    results = []
    for order in itertools.permutations(functions):
        expected = plain
        for name in order:
            expected = functions[name](expected)
        actual = _probabilities(logits, stages=order, **options)
        _assert_same(actual, softmax(expected))
        results.append(tuple(actual))
    assert len(set(results)) > 2


def test_what_has_no_effect_is_left_out() -> None:
    for options, stages in (
        ({}, ()),
        ({"top_k": 5, "min_p": 0.1}, ("top_k", "min_p")),
        ({"temperature": 0.0, "top_k": 5, "presence_penalty": 1.0}, ("penalties",)),
        ({"mirostat_mode": 1, "top_k": 5, "temperature": 0.5}, ("temperature",)),
        ({"stages": ("min_p", "top_k"), "top_k": 5, "temperature": 2.0}, ("top_k",)),
    ):
        effective = Sampling(seed=1, **options).effective()
        assert effective.stages == stages
        assert effective == effective.effective()


def test_a_stage_that_is_not_listed_is_off() -> None:
    logits = _VECTORS["peaked"]
    expected = softmax(definitions.temperature([float(logit) for logit in logits], 2.0))
    _assert_same(
        _probabilities(logits, stages=("temperature",), temperature=2.0, top_k=3, presence_penalty=9.0), expected
    )


def test_penalties_after_a_cut_change_those_that_are_left() -> None:
    logits = _VECTORS["peaked"]
    cut = definitions.top_k([float(logit) for logit in logits], 8)
    best = int(logits.argmax())
    prompt = [best, best, 3, 2999]
    actual = _probabilities(logits, prompt, stages=("top_k", "penalties"), top_k=8, frequency_penalty=2.0)
    _assert_same(actual, softmax(definitions.penalties(cut, prompt, 1024, 1, 2.0, 0)))


def test_all_stages_together() -> None:
    logits = _VECTORS["wide"]
    x = definitions.encoder_penalty([float(logit) for logit in logits], _PROMPT, 1.1)
    x = definitions.penalties(x, _PROMPT, 1024, 1.2, 0.1, 0.2)
    x = definitions.smoothing(definitions.temperature(definitions.top_n_sigma(x, 2.0), 1.7), 0.05, 1.2)
    x = definitions.typical_p(definitions.top_p(definitions.top_k(x, 500), 0.95), 0.97)
    x = definitions.eta_cutoff(definitions.epsilon_cutoff(x, 1.0), 3.0)
    x = definitions.min_p(definitions.top_a(definitions.tail_free(x, 0.98), 0.01), 0.01)
    actual = _probabilities(
        logits,
        encoder_repetition_penalty=1.1,
        repetition_penalty=1.2,
        frequency_penalty=0.1,
        presence_penalty=0.2,
        top_n_sigma=2.0,
        temperature=1.7,
        smoothing_factor=0.05,
        smoothing_curve=1.2,
        top_k=500,
        top_p=0.95,
        typical_p=0.97,
        epsilon_cutoff=1.0,
        eta_cutoff=3.0,
        tfs=0.98,
        top_a=0.01,
        min_p=0.01,
    )
    _assert_same(actual, softmax(x))


# What follows the text


def _steps(logits: npt.NDArray[np.float32], count: int, prompt: Sequence[int], **options: Any) -> list[int]:
    sampler = _factory(len(logits)).build(Sampling(seed=3, **options), prompt)
    drawn = [sampler.sample(logits) for _ in range(count)]
    sampler.close()
    return drawn


def test_generated_tokens_are_penalised_too() -> None:
    drawn = _steps(_VECTORS["peaked"], 9, _PROMPT, temperature=0.0, presence_penalty=100.0)
    assert len(set(drawn)) == 9
    assert not set(drawn) & set(_PROMPT)


def test_a_penalty_forgets_what_leaves_its_range() -> None:
    logits = _random(40, 1.0, 9)
    first, second, third = (int(token) for token in np.argsort(-logits)[:3])
    options = {"temperature": 0.0, "presence_penalty": 50.0, "repetition_penalty_range": 2}
    assert _steps(logits, 6, [], **options) == [first, second, third] * 2


def test_each_step_follows_the_definition_with_the_text_so_far() -> None:
    logits = _random(40, 1.0, 10)
    plain = [float(logit) for logit in logits]
    text = list(_PROMPT)
    for token in _steps(logits, 40, text, temperature=0.0, frequency_penalty=0.6, repetition_penalty_range=20):
        changed = definitions.penalties(plain, text, 20, 1, 0.6, 0)
        assert token == changed.index(max(changed))
        text.append(token)


@pytest.mark.parametrize("size", [1, 2, 5, 40])
def test_long_sequences_are_known_as_well(size: int) -> None:
    chance = random.Random(size)
    text = [chance.randrange(3) for _ in range(60)]
    text += text[:50]
    logits = np.zeros(3, np.float32)
    for end in range(1, len(text)):
        expected = definitions.no_repeated_ngram([0.0] * 3, text[:end], size)
        sampler = _factory(3).build(Sampling(seed=1, no_repeat_ngram_size=size), text[:end])
        try:
            left = set(sampler.candidates(logits).tokens[sampler.candidates(logits).logits > -np.inf].tolist())
        except NothingLeft:
            left = set()
        assert left == {token for token, logit in enumerate(expected) if logit == 0}


def test_a_long_sequence_takes_no_more_than_a_short_one() -> None:
    text = list(range(20_000))
    begin = time.perf_counter()
    _factory(30_000, context=50_000).build(Sampling(seed=1, no_repeat_ngram_size=10_000), text)
    assert time.perf_counter() - begin < 2


def test_xtc_looks_only_at_what_may_come() -> None:
    logits = _VECTORS["few"]
    probabilities = _probabilities(logits, banned_tokens=(9,), xtc_probability=1.0, xtc_threshold=0.0)
    assert (probabilities > 0).sum() == 1
    assert probabilities[9] == 0


_SHARE = st.sampled_from([0.0, 1e-30, 0.5, 1.0])
_ODD = st.sampled_from([0.0, 1e-300, 1e-30, 0.01, 0.5, 1.0, 100.0])


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "temperature": _ODD,
            "dynatemp_range": _ODD,
            "dynatemp_exponent": _ODD,
            "smoothing_factor": _ODD,
            "smoothing_curve": _ODD,
            "top_k": st.sampled_from([0, 1, 3, 2**31 - 1]),
            **dict.fromkeys(
                ("top_p", "min_p", "typical_p", "tfs", "xtc_threshold"), st.sampled_from([0.0, 1e-30, 0.5, 1.0])
            ),
            **dict.fromkeys(("top_n_sigma", "top_a", "mirostat_tau"), _ODD),
            **dict.fromkeys(("epsilon_cutoff", "eta_cutoff"), st.sampled_from([0.0, 1e-30, 1.0, 10_000.0])),
            "xtc_probability": st.sampled_from([0.0, 0.5, 1.0]),
            "mirostat_mode": st.integers(0, 2),
            "mirostat_eta": st.sampled_from([0.0, 0.1, 10.0]),
            "adaptive_target": st.sampled_from([0.0, 1e-30, 0.5, 1.0]),
            "adaptive_decay": st.sampled_from([0.0, 0.5, 1.0]),
            "repetition_penalty": st.sampled_from([0.01, 1.0, 100.0]),
            "encoder_repetition_penalty": st.sampled_from([0.01, 1.0, 100.0]),
            **dict.fromkeys(("frequency_penalty", "presence_penalty"), st.sampled_from([-100.0, 0.0, 100.0])),
            "no_repeat_ngram_size": st.sampled_from([0, 1, 2, 2**31 - 1]),
            "banned_tokens": st.sampled_from([(), (1,), (0, 2, 5)]),
            "logit_bias": st.sampled_from([{}, {3: 100.0}, {3: -100.0}]),
            "stages": st.permutations(STAGES).map(tuple),
        },
    ),
    st.sampled_from(["few", "flat", "certain"]),
)
@settings(max_examples=300)
def test_no_combination_of_options_is_too_odd(options: dict[str, Any], vector: str) -> None:
    logits = _VECTORS[vector]
    sampler = _factory(len(logits)).build(Sampling(seed=1, **options), _PROMPT)
    with np.errstate(over="ignore"), contextlib.suppress(NothingLeft):
        for _ in range(4):
            token = sampler.sample(logits)
            assert 0 <= token < len(logits)
            assert token not in options.get("banned_tokens", ())


def test_no_sequence_is_repeated() -> None:
    logits = _random(12, 1.0, 11)
    text = [3, 4, 5, *_steps(logits, 60, [3, 4, 5], no_repeat_ngram_size=2)]
    pairs = list(itertools.pairwise(text))
    assert len(set(pairs)) == len(pairs)


def test_the_end_comes_no_sooner_than_asked() -> None:
    logits = np.zeros(3, np.float32)
    logits[list(_ENDS)] = 20.0
    drawn = _steps(logits, 6, [2, 2, 2], min_tokens=4)
    assert drawn[:4] == [1] * 4
    assert set(drawn[4:]) <= set(_ENDS)


def test_when_everything_is_banned_there_is_nothing_to_draw() -> None:
    factory = _factory(3)
    for options in ({"temperature": 0.0}, {"temperature": 1.0}, {"top_k": 1}, {"typical_p": 0.5}, {"top_n_sigma": 1.0}):
        sampler = factory.build(Sampling(seed=1, banned_tokens=(0, 1, 2), **options), [])
        with pytest.raises(NothingLeft):
            sampler.sample(np.zeros(3, np.float32))


@pytest.mark.parametrize("mode", [1, 2])
def test_mirostat_brings_the_surprise_to_its_target(mode: int) -> None:
    logits = _random(2000, 1.5, 12)
    sampler = _factory(2000).build(Sampling(seed=1, mirostat_mode=mode, mirostat_tau=3.0), [])
    surprises = []
    for _ in range(600):
        probabilities = sampler.candidates(logits)
        token = sampler.sample(logits)
        place = int(np.flatnonzero(probabilities.tokens == token)[0])
        surprises.append(-math.log2(probabilities.probabilities()[place]))
    assert abs(np.mean(surprises[200:]) - 3.0) < 0.2


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999])
def test_adaptive_p_moves_its_target_by_what_was_drawn(decay: float) -> None:
    logits = _random(30, 1.5, 13)
    plain = [float(logit) for logit in logits]
    probabilities = softmax(plain)
    sampler = _factory(30).build(Sampling(seed=1, adaptive_target=0.3, adaptive_decay=decay), [])
    kept = min(decay, 0.99)  # llama.cpp's limit
    drawn, weight = 0.3 / (1 - kept), 1 / (1 - kept)
    for _ in range(30):
        target = min(max(2 * 0.3 - drawn / weight, 0.0), 1.0)
        actual = np.asarray(sampler.candidates(logits).probabilities(), np.float64)
        _assert_same(actual, softmax(definitions.adaptive(plain, target)))
        drawn, weight = probabilities[sampler.sample(logits)] + kept * drawn, 1 + kept * weight


def test_xtc_strikes_as_often_as_it_should() -> None:
    logits = np.array([0.0, 0.1, 0.2, -30.0], np.float32)
    sampler = _factory(4).build(Sampling(seed=1, xtc_probability=0.3), [])
    struck = sum(len(sampler.candidates(logits)) == 2 for _ in range(2000))
    assert abs(struck / 2000 - 0.3) < 0.045


# Against llama.cpp's own samplers


def _native(logits: npt.NDArray[np.float32], *samplers: Any) -> npt.NDArray[np.float64]:
    """Return the probabilities that llama.cpp's samplers leave."""
    data = np.zeros(len(logits), np.dtype(lib.llama_token_data))
    data["id"] = np.arange(len(logits))
    data["logit"] = logits
    array = lib.llama_token_data_array(
        lib.ctypes.cast(data.ctypes.data, lib.ctypes.POINTER(lib.llama_token_data)), len(data), -1, False
    )
    for sampler in samplers:
        lib.llama_sampler_apply(sampler, lib.ctypes.byref(array))
        lib.llama_sampler_free(sampler)
    start = (lib.ctypes.addressof(array.data.contents) - data.ctypes.data) // data.itemsize  # XTC moves it
    kept = data[start : start + array.size]
    result = np.full(len(logits), -np.inf)
    result[kept["id"]] = kept["logit"]
    weights = np.exp(result - result.max())
    return np.asarray(weights / weights.sum())


_NATIVE: list[tuple[dict[str, Any], Callable[[int], Any]]] = [
    ({"temperature": 0.6}, lambda size: lib.llama_sampler_init_temp(0.6)),
    ({"dynatemp_range": 0.5, "dynatemp_exponent": 1.3}, lambda size: lib.llama_sampler_init_temp_ext(1.0, 0.5, 1.3)),
    ({"top_k": 25}, lambda size: lib.llama_sampler_init_top_k(25)),
    ({"top_p": 0.8}, lambda size: lib.llama_sampler_init_top_p(0.8, 1)),
    ({"min_p": 0.02}, lambda size: lib.llama_sampler_init_min_p(0.02, 1)),
    ({"typical_p": 0.7}, lambda size: lib.llama_sampler_init_typical(0.7, 1)),
    ({"top_n_sigma": 1.5}, lambda size: lib.llama_sampler_init_top_n_sigma(1.5)),
    ({"xtc_probability": 1.0, "xtc_threshold": 0.02}, lambda size: lib.llama_sampler_init_xtc(1.0, 0.02, 1, 1)),
    ({"mirostat_mode": 1}, lambda size: lib.llama_sampler_init_mirostat(size, 1, 5.0, 0.1, 100)),
    ({"mirostat_mode": 2, "mirostat_tau": 3.0}, lambda size: lib.llama_sampler_init_mirostat_v2(1, 3.0, 0.1)),
    ({"adaptive_target": 0.3}, lambda size: lib.llama_sampler_init_adaptive_p(0.3, 0.9, 1)),
]


@pytest.mark.parametrize("vector", _VECTORS)
@pytest.mark.parametrize(("options", "sampler"), _NATIVE, ids=lambda value: str(value) if type(value) is dict else "")
def test_what_llama_cpp_has_too_agrees_with_it(
    options: dict[str, Any], sampler: Callable[[int], Any], vector: str
) -> None:
    logits = _VECTORS[vector]
    expected = _native(logits, sampler(len(logits)))
    np.testing.assert_allclose(_probabilities(logits, **options), expected, rtol=3e-3, atol=1e-6)


# DRY, whose breakers are looked for in a real vocabulary


def _dry_logits(vocab: Vocab) -> npt.NDArray[np.float32]:
    return _random(vocab.size, 1.0, 20)


_REPEATING = "one two three four five six seven. one two three"


@pytest.mark.parametrize(
    ("options", "text", "breakers", "changes"),
    [
        ({}, "one two three four. one two three", (), True),
        ({"dry_multiplier": 2.5, "dry_base": 1.1}, f"{_REPEATING} four. one two three", (), True),
        ({"dry_allowed_length": 4}, _REPEATING, (), False),
        ({"dry_allowed_length": 1}, "a b a c a", (), True),
        ({"dry_range": 5}, _REPEATING, (), False),
        ({"dry_range": 0}, _REPEATING, (), True),
        ({}, "one two\n three four. one two\n three", ("\n",), False),
        ({}, "one two three four\n. one two three", ("\n", ":"), True),
        ({}, "one two three\n. one two three", ("\n", ":"), False),
    ],
    ids=str,
)
def test_dry_follows_its_definition(
    vocab: Vocab, options: dict[str, Any], text: str, breakers: tuple[str, ...], changes: bool
) -> None:
    logits = _dry_logits(vocab)
    history = vocab.tokenize(text, add_bos=False, parse_special=False)
    names = {"dry_multiplier": 0.8, "dry_base": 1.75, "dry_allowed_length": 2, "dry_range": 1024} | options
    broken = {token for token in set(history) if any(each.encode() in vocab.piece(token) for each in breakers)}
    expected = definitions.dry(
        [float(logit) for logit in logits],
        history,
        names["dry_range"] or 1024,
        names["dry_multiplier"],
        names["dry_base"],
        names["dry_allowed_length"],
        broken,
    )
    assert (expected != [float(logit) for logit in logits]) == changes
    sampling = Sampling(seed=1, **names, dry_sequence_breakers=breakers)
    candidates = SamplerFactory(vocab, 256).build(sampling, history).candidates(logits)
    _assert_same(np.asarray(candidates.probabilities(), np.float64), softmax(expected))


def test_dry_goes_on_with_what_is_generated(vocab: Vocab) -> None:
    logits = _dry_logits(vocab)
    factory = SamplerFactory(vocab, 256)
    bias = {int(token): 20.0 - 0.5 * number for number, token in enumerate(np.argsort(-logits)[:3])}
    plain = factory.build(Sampling(seed=1, temperature=0.0, logit_bias=bias), [])
    assert len({plain.sample(logits) for _ in range(12)}) == 1
    against = Sampling(seed=1, temperature=0.0, logit_bias=bias, dry_multiplier=3.0, dry_allowed_length=1)
    sampler = factory.build(against, [])
    drawn = [sampler.sample(logits) for _ in range(12)]
    assert len(set(drawn)) > 1
    assert all(len(set(drawn[at : at + 4])) > 1 for at in range(9))


def test_samplers_of_one_kind_do_not_share_their_text(vocab: Vocab) -> None:
    logits = _dry_logits(vocab)
    factory = SamplerFactory(vocab, 256)
    sampling = Sampling(seed=1, temperature=0.0, dry_multiplier=3.0, dry_allowed_length=1)
    first, second = factory.build(sampling, [5, 6, 5]), factory.build(sampling, [])
    for _ in range(5):
        first.sample(logits)
    assert second.sample(logits) == int(logits.argmax())


def test_a_huge_range_costs_no_more_than_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp allocates and walks that many cells: 2**31 - 1 of them are 8 GB and half a minute."""
    seen: list[int] = []
    original = NativeSampler.penalties

    def penalties(vocab: Vocab, last: int, *others: float) -> NativeSampler:
        seen.append(last)
        return original(vocab, last, *others)

    monkeypatch.setattr(NativeSampler, "penalties", penalties)
    for wanted in (2**31 - 1, 0):
        _factory(40, context=64).build(Sampling(seed=1, presence_penalty=1.0, repetition_penalty_range=wanted), [])
    assert seen == [64, 64]


# Token ids from a request


@pytest.mark.parametrize("token", [-1, 40, 2**31, 2**40])
def test_what_names_a_token_that_is_none_is_refused(token: int) -> None:
    for sampling in (Sampling(seed=1, logit_bias={token: 1.0}), Sampling(seed=1, banned_tokens=(token,))):
        with pytest.raises(InvalidRequest, match="token id"):
            _factory(40).check(sampling)


# Chance


def test_a_seed_repeats_itself() -> None:
    logits = _VECTORS["flat"]
    for seed in (0, 1, -1, -(2**63), 2**31, 2**32 - 1, 2**32, 2**63 - 1):
        drawn = []
        for _ in range(2):
            sampler = _factory(len(logits)).build(Sampling(seed=seed), [])
            drawn.append([sampler.sample(logits) for _ in range(20)])
        assert drawn[0] == drawn[1]


def test_different_seeds_differ() -> None:
    logits = _VECTORS["flat"]
    seeds = [0, 1, -1, 2, 3, 7, 2**31, 2**32 + 5, 2**40, 2**62, -9, 9]
    drawn = set()
    for seed in seeds:
        sampler = _factory(len(logits)).build(Sampling(seed=seed), [])
        drawn.add(tuple(sampler.sample(logits) for _ in range(20)))
    assert len(drawn) == len(seeds)


def test_choice_i_draws_as_seed_plus_i() -> None:
    logits = _VECTORS["flat"]
    factory = _factory(len(logits))
    for choice in range(4):
        one = factory.build(Sampling(seed=11), [], choice=choice)
        other = factory.build(Sampling(seed=11 + choice), [])
        assert [one.sample(logits) for _ in range(20)] == [other.sample(logits) for _ in range(20)]


def _assert_fits(drawn: list[int], expected: Sequence[float]) -> None:
    """Check frequencies: each common token within 4.5 standard deviations, and all together by chi-squared."""
    total = len(drawn)
    counts = Counter(drawn)
    assert all(expected[token] > 0 for token in counts)
    common = [token for token in np.argsort(-np.array(expected)).tolist() if expected[token] * total >= 10]
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


@pytest.mark.parametrize("vector", ["few", "peaked", "wide"])
def test_draws_have_the_frequencies_of_the_softmax(vector: str) -> None:
    logits = _VECTORS[vector]
    sampler = _factory(len(logits)).build(Sampling(seed=42), [])
    _assert_fits([sampler.sample(logits) for _ in range(3000)], softmax([float(logit) for logit in logits]))


def test_first_draws_of_neighbouring_seeds_have_them_too() -> None:
    """The choices of a request, and the requests of a client that counts its seed up, see just these."""
    logits = _VECTORS["few"]
    factory = _factory(len(logits))
    drawn = [factory.build(Sampling(seed=seed), []).sample(logits) for seed in range(1500)]
    _assert_fits(drawn, softmax([float(logit) for logit in logits]))


def test_cut_draws_have_the_renormalised_frequencies() -> None:
    logits = _VECTORS["peaked"]
    sampler = _factory(len(logits)).build(Sampling(seed=43, top_k=10), [])
    expected = softmax(definitions.top_k([float(logit) for logit in logits], 10))
    _assert_fits([sampler.sample(logits) for _ in range(2000)], expected)


@pytest.mark.parametrize("size", [1, 3, 255, 256, 257, 1000, 49152])
def test_every_place_is_drawn_by_its_weight(size: int) -> None:
    weights = np.random.default_rng(size).random(size).astype(np.float32)
    weights[size // 2 :: 7] = 0.0
    weights[0] = 1.0
    sums = np.cumsum(weights, dtype=np.float64) / weights.sum(dtype=np.float64)
    for chance in (0.0, 1e-300, 0.3, 0.5, 0.9999, 1 - 2**-53):
        place = draw(weights, chance)
        assert weights[place] > 0
        assert sums[place] >= chance - 1e-5
        assert place == 0 or sums[place - 1] <= chance + 1e-5


# The one most probable token


def test_plain_greedy_sampling_costs_one_search() -> None:
    for options in ({}, {"top_k": 3, "top_p": 0.1, "typical_p": 0.2}, {"logit_bias": {}}):
        sampler = _factory(40).build(Sampling(seed=1, temperature=0.0, **options), _PROMPT)
        assert isinstance(sampler, Greedy)
        assert sampler.sample(_VECTORS["few"]) == int(_VECTORS["few"].argmax())
        (token,) = sampler.candidates(_VECTORS["few"]).tokens
        assert token == int(_VECTORS["few"].argmax())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(value: float, temperature: float) -> None:
    logits = _VECTORS["few"].copy()
    logits[3] = value
    with pytest.raises(EngineError, match="not numbers"):
        _factory(40).build(Sampling(seed=1, temperature=temperature), []).sample(logits)


def test_the_usual_order_has_every_stage_once() -> None:
    assert len(set(STAGES)) == len(STAGES)
    assert Sampling(seed=1).stages == STAGES
    assert msgspec.structs.replace(Sampling(seed=1), stages=()).stages == ()
