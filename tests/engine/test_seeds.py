"""Same seed, same text, on the starter model at the exact level: alone and in a batch of eight."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest
from running_engine import RunningEngine

from llamaserve.engine.llama import Model
from llamaserve.engine.params import Generation, LoadParams, Sampling

_AT_ONCE = 8
_PROMPTS = [
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):",
    "Yesterday I saw a",
    "Dear Sir or Madam,",
    "1, 2, 3,",
    "The meaning of life is",
    "Roses are red,",
]
_SAMPLINGS = [
    Sampling(seed=1),
    Sampling(seed=2, temperature=1.4, top_p=0.9),
    Sampling(seed=3, temperature=0.7, top_k=40, repetition_penalty=1.2, frequency_penalty=0.2),
    Sampling(seed=4, min_p=0.05, xtc_probability=0.5),
    Sampling(seed=5, mirostat_mode=1),
    Sampling(seed=6, mirostat_mode=2),
    Sampling(seed=7, typical_p=0.8, dry_multiplier=0.8, dry_sequence_breakers=("\n",)),
    Sampling(seed=2**40, adaptive_target=0.4, min_p=0.02, dynatemp_range=0.5),
]


@pytest.fixture(scope="module")
def running(model: Model, load_params: LoadParams) -> Iterator[RunningEngine]:
    params = msgspec.structs.replace(load_params, parallel=_AT_ONCE, context=240, kv_cells=_AT_ONCE * 240)
    engine = RunningEngine(model, params)
    yield engine
    engine.close()


def test_alone_and_in_a_batch_of_eight(running: RunningEngine) -> None:
    generations = [Generation(sampling=sampling, max_tokens=24) for sampling in _SAMPLINGS]
    alone = [running.alone(prompt, each)[0] for prompt, each in zip(_PROMPTS, generations, strict=True)]
    for staggered in (0, 2):
        running.forget()
        for number, (prompt, generation) in enumerate(zip(_PROMPTS, generations, strict=True)):
            running.submit(number, prompt, generation)
            running.step(staggered)
        running.run()
        assert running.runner.largest_step == _AT_ONCE
        for number, answer in enumerate(alone):
            assert running.answers[number, 0].tokens == answer.tokens


def test_four_choices_are_reproducible_and_different(running: RunningEngine) -> None:
    generation = Generation(sampling=Sampling(seed=99, temperature=1.2), choices=4, max_tokens=20)
    first = [answer.text for answer in running.alone(_PROMPTS[0], generation)]
    assert [answer.text for answer in running.alone(_PROMPTS[0], generation)] == first
    assert len(set(first)) == 4
