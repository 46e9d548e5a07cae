from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from gguf_writer import File, tiny_llama_metadata, tiny_llama_tensors
from loud_model import write_loud_model

from llamaserve.engine.engine import LoadedEngine
from llamaserve.engine.events import EngineEvent, Failed, Finished
from llamaserve.engine.params import Generation, LoadParams, Sampling


@pytest.fixture
def params(backend: None, load_params: LoadParams, tmp_path: Path) -> LoadParams:
    return msgspec.structs.replace(
        load_params, path=str(tmp_path / "tiny.gguf"), context=64, kv_cells=256, parallel=2, batch=16
    )


def _answer(engine: LoadedEngine, request: int, prompt: list[int], generation: Generation) -> list[EngineEvent]:
    engine.submit(request, [engine.encode(prompt)], generation)
    events = []
    while not engine.idle:
        events += engine.step()
    return events


_DAMAGED_TOKEN = 200


@pytest.fixture(params=[math.nan, math.inf])
def damaged(request: pytest.FixtureRequest, params: LoadParams) -> Iterator[LoadedEngine]:
    """An engine whose model has one bad weight, in the embedding of one token."""
    head, *tensors = tiny_llama_tensors()
    assert head.data is not None
    weights = bytearray(head.data)
    struct.pack_into("f", weights, _DAMAGED_TOKEN * 32 * 4, request.param)
    output = replace(head, name="output.weight")
    file = File(tiny_llama_metadata(), [replace(head, data=bytes(weights)), output, *tensors])
    Path(params.path).write_bytes(file.bytes())
    engine = LoadedEngine(params, lambda fraction: True)
    yield engine
    engine.close()


def _generation(temperature: float) -> Generation:
    bias = {_DAMAGED_TOKEN: -100.0, 2: -100.0}
    return Generation(sampling=Sampling(seed=1, temperature=temperature, logit_bias=bias), max_tokens=3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_fail_the_request(damaged: LoadedEngine, temperature: float) -> None:
    (finished,) = _answer(damaged, 1, [5, 6], _generation(temperature))
    assert isinstance(finished, Finished)
    (failed,) = _answer(damaged, 2, [5, _DAMAGED_TOKEN, 6], _generation(temperature))
    assert isinstance(failed, Failed)
    assert "not numbers" in failed.error.message


def test_logits_that_are_no_numbers_fail_no_later_request(damaged: LoadedEngine) -> None:
    """What is no number must not stay in the cache: masked out, it is multiplied by 0 and is still no number."""
    (before,) = _answer(damaged, 1, [5, 6], _generation(0.0))
    assert isinstance(before, Finished)
    (failed,) = _answer(damaged, 2, [_DAMAGED_TOKEN, 6], _generation(0.0))
    assert isinstance(failed, Failed)
    (after,) = _answer(damaged, 3, [5, 6], _generation(0.0))
    assert isinstance(after, Finished), after
    assert after.text == before.text


def test_two_prompts_of_one_step_get_their_own_rows(params: LoadParams) -> None:
    write_loud_model(Path(params.path))
    engine = LoadedEngine(params, lambda fraction: True)
    generation = Generation(sampling=Sampling(seed=1, temperature=0.0), max_tokens=8)
    try:
        alone = [_answer(engine, 1, prompt, generation)[0] for prompt in ([7, 8, 9], [40, 41])]
        engine.submit(1, [[7, 8, 9], [40, 41]], generation)
        events: list[EngineEvent] = []
        while not engine.idle:
            events += engine.step()
    finally:
        engine.close()
    texts = {event.index: event.text for event in events if isinstance(event, Finished)}
    assert texts == {index: event.text for index, event in enumerate(alone) if isinstance(event, Finished)}
