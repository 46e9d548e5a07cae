"""The same requests in another way must give the same answers.

*Exact*, token for token: on a tiny model in 32-bit floats, where the order of computing moves a logit by a millionth
and one wrong token in the cache by whole units (``loud_model``). *Margin*, on the starter model: its activations are
quantised on the way, so two runs may part, but only where the first one's two best logits are closer than 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from loud_model import write_loud_model
from running_engine import Answer, RunningEngine, teacher_forced

from llamaserve.engine.engine import LoadedEngine
from llamaserve.engine.events import Delta, Finished
from llamaserve.engine.llama import Model
from llamaserve.engine.params import Generation, LoadParams, Sampling

_CELLS = 250
_MARGIN = 1.0
_PROMPTS = ("Once upon a time", "primary colours:", "def fib(n):", "Once upon a time, far away", "\n", "2, 4, 6,")
_SAMPLINGS = (
    Sampling(seed=1, temperature=0.0),
    Sampling(seed=2, temperature=0.9, top_p=0.95),
    Sampling(seed=3, temperature=1.2, top_k=40, min_p=0.02),
    Sampling(seed=4, temperature=0.8, repetition_penalty=1.2, frequency_penalty=0.3),
)
_GREEDY, *_ = _SAMPLINGS


@dataclass(frozen=True)
class Request:
    """What is asked, and after how many further steps."""

    prompt: str
    sampling: int
    max_tokens: int
    wait: int

    @property
    def generation(self) -> Generation:
        return Generation(sampling=_SAMPLINGS[self.sampling], max_tokens=self.max_tokens)


_requests = st.builds(
    Request,
    prompt=st.sampled_from(_PROMPTS),
    sampling=st.integers(0, len(_SAMPLINGS) - 1),
    max_tokens=st.integers(1, 14),
    wait=st.integers(0, 5),
)


@pytest.fixture(scope="module")
def params(load_params: LoadParams, tmp_path_factory: pytest.TempPathFactory) -> LoadParams:
    path = tmp_path_factory.mktemp("models") / "loud.gguf"
    write_loud_model(path)
    return msgspec.structs.replace(load_params, path=str(path), kv_cells=256, kv_unified=True, context=100, batch=24)


@pytest.fixture(scope="module")
def loud(backend: None, params: LoadParams) -> Iterator[Model]:
    model = Model(params, lambda fraction: True)
    yield model
    model.close()


@pytest.fixture(scope="module")
def alone(loud: Model, params: LoadParams) -> Iterator[RunningEngine]:
    """An engine for runs that nothing disturbs."""
    engine = RunningEngine(loud, params)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def running(loud: Model, params: LoadParams) -> Iterator[RunningEngine]:
    engine = RunningEngine(loud, params)
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def _fresh(running: RunningEngine) -> None:
    running.forget(_CELLS)


def _tokens(engine: RunningEngine) -> dict[int, list[int]]:
    return {request: answer.tokens for (request, _), answer in engine.answers.items()}


@pytest.fixture(scope="module")
def expected(alone: RunningEngine) -> object:
    """The undisturbed answer to a prompt, computed once."""
    return cache(
        lambda prompt, generation_bytes: alone.alone(prompt, msgspec.msgpack.decode(generation_bytes, type=Generation))[
            0
        ]
    )


def _expect(expected: object, prompt: str, generation: Generation) -> Answer:
    answer = expected(prompt, msgspec.msgpack.encode(generation))  # type: ignore[operator]
    assert isinstance(answer, Answer)
    return answer


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(requests=st.lists(_requests, min_size=2, max_size=7), cells=st.sampled_from([_CELLS, 100]))
def test_batched_is_the_same_as_sequential(
    running: RunningEngine, expected: object, requests: list[Request], cells: int
) -> None:
    """Staggered arrivals, any order, more of them than slots, with and without preemption."""
    running.forget(cells)
    for number, request in enumerate(requests):
        running.step(request.wait)
        running.submit(number, request.prompt, request.generation)
    running.run()
    for number, request in enumerate(requests):
        assert running.answers[number, 0].tokens == _expect(expected, request.prompt, request.generation).tokens


def test_sequences_are_really_evaluated_together(running: RunningEngine) -> None:
    for number, prompt in enumerate(_PROMPTS):
        running.submit(number, prompt, Generation(sampling=_GREEDY, max_tokens=4))
    running.run()
    assert running.runner.largest_step == 4


@pytest.mark.parametrize("sampling", _SAMPLINGS)
def test_cached_is_the_same_as_uncached(running: RunningEngine, alone: RunningEngine, sampling: Sampling) -> None:
    generation = Generation(sampling=sampling, max_tokens=16)
    first = running.engine.encode("Name three animals.")
    running.submit(1, first, generation)
    running.run()
    second = first + running.answers[1, 0].tokens + running.engine.encode("And fruits?")
    running.submit(2, second, generation)
    running.run()
    answer = running.answers[2, 0]
    assert answer.finished is not None
    assert answer.finished.cached_tokens == len(first) + 15
    assert answer.tokens == alone.alone(second, generation)[0].tokens


def test_a_repeated_prompt_is_the_same(running: RunningEngine) -> None:
    """All of it but the last token is cached, and the answer before it is cut away."""
    generation = Generation(sampling=_SAMPLINGS[1], max_tokens=10)
    for number in range(3):
        running.submit(number, _PROMPTS[3], generation)
        running.run()
    first, *others = (running.answers[number, 0] for number in range(3))
    length = len(running.engine.encode(_PROMPTS[3]))
    for other in others:
        assert other.tokens == first.tokens
        assert other.finished is not None
        assert other.finished.cached_tokens == length - 1


@pytest.mark.parametrize("stop", [(), ("a",), ("\ufffd\ufffd", "e", "zzz")])
def test_streamed_is_the_same_as_whole(running: RunningEngine, stop: tuple[str, ...]) -> None:
    for number, prompt in enumerate(_PROMPTS):
        for stream in (False, True):
            generation = Generation(sampling=_SAMPLINGS[1], max_tokens=14, stop=stop, stream=stream)
            running.submit(2 * number + stream, prompt, generation)
            running.run()
    for number in range(len(_PROMPTS)):
        whole, streamed = running.answers[2 * number, 0], running.answers[2 * number + 1, 0]
        assert (streamed.text, streamed.tokens) == (whole.text, whole.tokens)
        assert whole.finished is not None
        assert whole.finished.text == whole.text
        assert not any(string in whole.text for string in stop)


def test_the_text_is_that_of_the_tokens(running: RunningEngine, loud: Model) -> None:
    generation = Generation(sampling=Sampling(seed=9, temperature=3.0), max_tokens=60)  # noise with cut characters
    running.submit(1, "😀", generation)
    running.run()
    answer = running.answers[1, 0]
    tokens = [token for token in answer.tokens if not loud.vocab.is_end_of_generation(token)]
    assert answer.text == loud.vocab.detokenize(tokens, special=False)


@pytest.mark.parametrize("sampling", _SAMPLINGS)
def test_preempted_is_the_same_as_undisturbed(running: RunningEngine, expected: object, sampling: Sampling) -> None:
    generation = Generation(sampling=sampling, max_tokens=24)
    running.forget(cells=100)
    for number, prompt in enumerate(_PROMPTS):
        running.submit(number, prompt, generation)
    running.run()
    assert running.runner.preemptions > 0
    for number, prompt in enumerate(_PROMPTS):
        answer = running.answers[number, 0]
        assert answer.tokens == _expect(expected, prompt, generation).tokens
        assert answer.finished is not None
        assert answer.finished.prompt_tokens == len(running.engine.encode(prompt))
        assert answer.finished.completion_tokens <= 24


@pytest.mark.parametrize("after", [0, 1, 3, 8])
def test_cancelling_one_leaves_the_others_unchanged(running: RunningEngine, expected: object, after: int) -> None:
    generation = Generation(sampling=_SAMPLINGS[1], max_tokens=12)
    for number, prompt in enumerate(_PROMPTS):
        running.submit(number, prompt, generation)
    running.step(after)
    running.engine.cancel(2)
    running.run()
    assert running.answers[2, 0].finished is None
    for number, prompt in enumerate(_PROMPTS):
        if number != 2:
            assert running.answers[number, 0].tokens == _expect(expected, prompt, generation).tokens


def test_choices_are_the_same_as_single_runs_with_the_seed_counted_up(
    running: RunningEngine, alone: RunningEngine
) -> None:
    sampling = Sampling(seed=100, temperature=1.0)
    running.submit(1, _PROMPTS[0], Generation(sampling=sampling, choices=6, max_tokens=10))
    running.run()
    answers = [running.answers[1, index].tokens for index in range(6)]
    for index, tokens in enumerate(answers):
        one = msgspec.structs.replace(sampling, seed=100 + index)
        assert tokens == alone.alone(_PROMPTS[0], Generation(sampling=one, max_tokens=10))[0].tokens
    assert len(set(map(tuple, answers))) > 1


def test_the_loaded_engine_says_the_same(backend: None, params: LoadParams, expected: object) -> None:
    generation = Generation(sampling=_SAMPLINGS[1], max_tokens=10, stream=True)
    engine = LoadedEngine(params, lambda fraction: True)
    try:
        for number, prompt in enumerate(_PROMPTS):
            engine.submit(number, [engine.encode(prompt)], generation)
        texts = dict.fromkeys(range(len(_PROMPTS)), "")
        while not engine.idle:
            for event in engine.step():
                assert isinstance(event, Delta | Finished)
                texts[event.request] += event.text
    finally:
        engine.close()
    for number, prompt in enumerate(_PROMPTS):
        whole = _expect(expected, prompt, msgspec.structs.replace(generation, stream=False))
        assert texts[number] == whole.text


# The margin level: the starter model, several hundred cells, chunked prompts, decoding beside prompts


@pytest.fixture(scope="module", params=["auto", "off"])
def margin(request: pytest.FixtureRequest, load_params: LoadParams, model: Model) -> Iterator[RunningEngine]:
    unified = request.param == "auto"  # as the registry decides
    params = msgspec.structs.replace(load_params, flash_attention=request.param, kv_unified=unified, batch=128)
    engine = RunningEngine(model, params)
    yield engine
    engine.close()


_BEGINNING = "The history of the lighthouse is long, and it begins with a king. " * 6
_LONG_PROMPTS = [f"{_BEGINNING}Chapter {number}: {prompt}" for number, prompt in enumerate(_PROMPTS[:3])]
_LONG = Generation(sampling=_GREEDY, max_tokens=16)


def _assert_parts_only_at_a_near_tie(
    engine: RunningEngine, prompt: list[int], one: list[int], other: list[int]
) -> None:
    if one == other:
        return
    parting = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    logits = np.sort(teacher_forced(engine.model, engine.params, prompt + one[:parting]))
    assert logits[-1] - logits[-2] < _MARGIN, f"parted at token {parting}"


@pytest.fixture(scope="module")
def undisturbed(margin: RunningEngine) -> list[tuple[list[int], list[int]]]:
    """The long prompts and the answers to each alone, in tokens."""
    prompts = [margin.engine.encode(prompt) for prompt in _LONG_PROMPTS]
    return [(prompt, margin.alone(prompt, _LONG)[0].tokens) for prompt in prompts]


@pytest.mark.parametrize("cells", [2048, 300])
def test_batched_parts_from_sequential_only_at_near_ties(
    margin: RunningEngine, undisturbed: list[tuple[list[int], list[int]]], cells: int
) -> None:
    margin.forget(cells)
    for number, (prompt, _) in enumerate(undisturbed):
        margin.submit(number, prompt, _LONG)
        margin.step(4)
    margin.run()
    together = [margin.answers[number, 0].tokens for number in range(len(undisturbed))]
    for (prompt, one), other in zip(undisturbed, together, strict=True):
        _assert_parts_only_at_a_near_tie(margin, prompt, one, other)


def test_cached_parts_from_uncached_only_at_near_ties(
    margin: RunningEngine, undisturbed: list[tuple[list[int], list[int]]]
) -> None:
    margin.forget()
    for number, (prompt, one) in enumerate(undisturbed):
        margin.submit(number, prompt, _LONG)
        margin.run()
        answer = margin.answers[number, 0]
        assert answer.finished is not None
        assert (answer.finished.cached_tokens > 80) == (number > 0)
        _assert_parts_only_at_a_near_tie(margin, prompt, one, answer.tokens)


def test_the_starter_model_answers_the_same_alone_and_beside_others(load_params: LoadParams) -> None:
    """The exact level on quantised weights: without flash attention each sequence has cells of its own."""
    assert not load_params.kv_unified
    model = Model(load_params, lambda fraction: True)
    running = RunningEngine(model, load_params)
    try:
        prompts = [f"{i}. A story about {what}: once" for i, what in enumerate(("a fox", "the old grey sea", "bread"))]
        for sampling in (Sampling(seed=3, temperature=0.0), Sampling(seed=3, temperature=1.0)):
            generation = Generation(sampling=sampling, max_tokens=24)
            alone = [running.alone(prompt, generation)[0].tokens for prompt in prompts]
            running.forget()
            for request, prompt in enumerate(prompts):
                running.submit(request, prompt, generation)
                running.step(request)  # arrivals at different times
            running.run()
            assert [running.answers[request, 0].tokens for request in range(len(prompts))] == alone
    finally:
        running.close()
        model.close()
