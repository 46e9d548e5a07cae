"""LoRA adapters change answers as weights into which they are merged do, and only those of who wants them.

*Exact*: on the starter model with its weights as 32-bit floats, against a file with merged weights. The rest is on a
tiny model (``loud_model``), where a wrong token or a wrong adapter moves a logit by whole units, or on doubles.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import psutil
import pytest
from fake_model import FakeLora, FakeLoras, FakeModel
from gguf_writer import File
from lora_files import Lora, in_floats, merge, merged_in_place, random_lora, shapes_of
from loud_model import loud_model
from running_engine import Answer, RunningEngine

from llamaserve.engine.adapters import MAX_ADAPTERS
from llamaserve.engine.engine import LoadedEngine
from llamaserve.engine.events import Failed
from llamaserve.engine.llama import Batch, Context, Model
from llamaserve.engine.params import Adapter, Generation, LoadParams, Logprobs, Sampling
from llamaserve.errors import InvalidRequest, ModelLoadFailed
from llamaserve.registry.gguf import read_header

_Logits = npt.NDArray[np.float32]
_Wish = tuple[tuple[str, float], ...] | None

_GREEDY = Sampling(seed=1, temperature=0.0)
_SAMPLINGS = (_GREEDY, Sampling(seed=2, temperature=0.9), Sampling(seed=3, temperature=1.2, top_k=40))
_PROMPT = "The-quick-brown-fox-jumps-over-the-lazy-dog"
_TOLERANCE = 1e-3


def _generation(adapters: _Wish = None, *, max_tokens: int = 20, sampling: Sampling = _GREEDY) -> Generation:
    return Generation(sampling=sampling, max_tokens=max_tokens, adapters=adapters)


def _scored(adapters: _Wish = None) -> Generation:
    return msgspec.structs.replace(_generation(adapters, max_tokens=4), logprobs=Logprobs(top=5, prompt=True))


def _run(params: LoadParams, generations: Sequence[Generation]) -> list[Answer]:
    """Answer the same prompt in several ways, all at once."""
    model = Model(params, lambda fraction: True)
    running = RunningEngine(model, params)
    try:
        for number, generation in enumerate(generations):
            running.submit(number, _PROMPT, generation)
        running.run()
        running.check_nothing_is_left()
        return [running.answers[number, 0] for number in range(len(generations))]
    finally:
        running.close()
        model.close()


def _numbers(answer: Answer) -> _Logits:
    """Return all log-probabilities of an answer and its prompt."""
    scored = [*answer.prompt_logprobs[1:], *answer.logprobs]
    return np.array([[each.chosen.logprob, *(other.logprob for other in each.top)] for each in scored])


def _cached(running: RunningEngine, request: int) -> int:
    finished = running.answers[request, 0].finished
    assert finished is not None
    return finished.cached_tokens


# The starter model


@dataclass(frozen=True)
class _Starter:
    """The starter model in floats, an adapter for all its layers and one for a few of their matrices."""

    params: LoadParams
    whole: Lora
    part: Lora
    adapters: tuple[Adapter, ...]

    def merged(self, *adapters: tuple[Lora, float]) -> AbstractContextManager[None]:
        """Have adapters merged into the model's file for a while."""
        return merged_in_place(Path(self.params.path), *adapters)


@pytest.fixture(scope="module")
def starter(
    starter_model: Path, load_params: LoadParams, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[_Starter]:
    folder = tmp_path_factory.mktemp("starter")
    path = folder / "starter.gguf"
    path.write_bytes(in_floats(starter_model).bytes())
    tensors = read_header(path).tensors
    whole = random_lora(shapes_of(tensors), rank=8, size=0.3, alpha=16.0)
    part = random_lora(shapes_of(tensors, "attn_q.weight", "attn_v.weight"), rank=3, size=0.5, seed=1)
    adapters = (
        Adapter("whole", str(whole.write(folder / "whole.gguf"))),
        Adapter("part", str(part.write(folder / "part.gguf")), 0.5),
    )
    exact = {"key_type": "f32", "value_type": "f32", "flash_attention": "off"}
    params = msgspec.structs.replace(load_params, path=str(path), context=256, kv_cells=1024, **exact)
    yield _Starter(params, whole, part, adapters)
    path.unlink()  # half a gigabyte


def _logits(params: LoadParams, *adapters: tuple[str, float]) -> _Logits:
    """Return the logits after each token of a text, shape (tokens, vocabulary)."""
    model = Model(params, lambda fraction: True)
    context = Context(model, params)
    try:
        context.use_adapters([(model.load_adapter(path), scale) for path, scale in adapters])
        tokens = model.vocab.tokenize(_PROMPT, add_bos=False, parse_special=False)
        batch = Batch(len(tokens))
        last = batch.add(tokens, 0, 0, logits=len(tokens))
        context.evaluate(batch)
        return np.array([context.logits(row).copy() for row in range(last + 1)])
    finally:
        context.close()
        model.close()


def test_logits_are_those_of_weights_with_the_adapters_merged(backend: None, starter: _Starter) -> None:
    without = _logits(starter.params)
    whole, part = (
        (adapter.path, lora) for adapter, lora in zip(starter.adapters, (starter.whole, starter.part), strict=True)
    )
    for wanted in ([(*whole, 1.0)], [(*part, -2.0)], [(*whole, 0.5), (*part, 1.5)]):
        changed = _logits(starter.params, *((path, scale) for path, _, scale in wanted))
        with starter.merged(*((lora, scale) for _, lora, scale in wanted)):
            expected = _logits(starter.params)
        assert np.abs(changed - without).max() > 1, "the adapter does something"
        np.testing.assert_allclose(changed, expected, rtol=0, atol=_TOLERANCE)


@pytest.mark.parametrize("kv_unified", [False, True])
def test_each_request_has_the_adapters_that_it_asks_for(backend: None, starter: _Starter, kv_unified: bool) -> None:
    """All at once, and each as a model with merged weights answers it."""
    wishes: list[tuple[_Wish, tuple[tuple[Lora, float], ...]]] = [
        ((), ()),
        ((("whole", 1.0),), ((starter.whole, 1.0),)),
        ((("part", 2.0), ("whole", 0.5)), ((starter.whole, 0.5), (starter.part, 2.0))),
        (None, ((starter.whole, 1.0), (starter.part, 0.5))),
    ]
    params = msgspec.structs.replace(starter.params, kv_unified=kv_unified)
    with_adapters = msgspec.structs.replace(params, adapters=starter.adapters)
    answers = _run(with_adapters, [_scored(wish) for wish, _ in wishes])
    for answer, (_, loras) in zip(answers, wishes, strict=True):
        with starter.merged(*loras):
            [expected] = _run(params, [_scored()])
        assert answer.tokens == expected.tokens
        np.testing.assert_allclose(_numbers(answer), _numbers(expected), rtol=0, atol=_TOLERANCE)
    for one, other in combinations(answers, 2):
        assert np.abs(_numbers(one) - _numbers(other)).max() > 0.1, "they differ"


def test_on_the_starter_model_as_it_is_a_mixed_batch_equals_single_runs(
    model: Model, load_params: LoadParams, starter_model: Path, tmp_path: Path
) -> None:
    """In a split cache, where neighbours don't change a logit."""
    lora = random_lora({f"blk.{layer}.attn_q.weight": (576, 576) for layer in range(30)}, size=0.5)
    adapters = (Adapter("a", str(lora.write(tmp_path / "a.gguf")), 0.0),)
    params = msgspec.structs.replace(load_params, adapters=adapters)
    running = RunningEngine(model, params)
    try:
        wishes: list[_Wish] = [(("a", 1.0),), (), (("a", -1.0),), None] * 2
        prompts = ["Once upon a time", "2, 4, 6,"]
        samplings = [_SAMPLINGS[number % 3] for number in range(len(wishes))]
        generations = [
            _generation(wish, max_tokens=8, sampling=sampling) for wish, sampling in zip(wishes, samplings, strict=True)
        ]
        alone = [running.alone(prompts[n % 2], generation)[0] for n, generation in enumerate(generations)]
        running.forget()
        for number, generation in enumerate(generations):
            running.submit(number, prompts[number % 2], generation)
        running.run()
        for number, expected in enumerate(alone):
            assert running.answers[number, 0].tokens == expected.tokens
        assert alone[0].tokens != running.alone(prompts[0], generations[2])[0].tokens
    finally:
        running.close()


# The tiny model


@dataclass(frozen=True)
class _Loud:
    """The tiny model's settings with two adapters, of which the second has the scale 0.5, and their files."""

    params: LoadParams
    loras: dict[str, Lora]
    files: dict[str, Path]

    def adapters(self, **scales: float) -> list[Adapter]:
        """Return some of the adapters with their scales."""
        return [Adapter(name, str(self.files[name]), scale) for name, scale in scales.items()]


@pytest.fixture(scope="module")
def tiny(loud_params: LoadParams, tmp_path_factory: pytest.TempPathFactory) -> _Loud:
    folder = tmp_path_factory.mktemp("loras")
    shapes = shapes_of(loud_model().tensors)
    loras = {name: random_lora(shapes, size=3.0, seed=seed) for seed, name in enumerate("abc")}
    files = {name: lora.write(folder / f"{name}.gguf") for name, lora in loras.items()}
    adapters = (Adapter("a", str(files["a"])), Adapter("b", str(files["b"]), 0.5))
    return _Loud(msgspec.structs.replace(loud_params, adapters=adapters), loras, files)


@pytest.fixture
def running(loud: Model, tiny: _Loud) -> Iterator[RunningEngine]:
    """An engine with an empty cache; all that it has done is checked when the test is over."""
    engine = RunningEngine(loud, tiny.params)
    yield engine
    engine.check_nothing_is_left()
    engine.close()


@pytest.fixture(scope="module")
def undisturbed(loud: Model, tiny: _Loud) -> Iterator[RunningEngine]:
    """An engine without prefixes and drafts, for one request at a time."""
    engine = RunningEngine(loud, msgspec.structs.replace(tiny.params, prefix_cache=False, speculation=False))
    yield engine
    engine.close()


def _tokens(undisturbed: RunningEngine, prompt: str, generation: Generation) -> list[int]:
    return undisturbed.alone(prompt, generation)[0].tokens


def test_scales_work_as_merging_with_them_does(undisturbed: RunningEngine, tiny: _Loud, tmp_path: Path) -> None:
    cases: list[tuple[_Wish, tuple[tuple[str, float], ...]]] = [
        ((), ()),
        ((("a", 0.0),), ()),
        ((("a", 0.5),), (("a", 0.5),)),
        ((("b", 1.0), ("a", -1.0)), (("a", -1.0), ("b", 1.0))),
        (None, (("a", 1.0), ("b", 0.5))),
    ]
    for wish, merged in cases:
        path = tmp_path / "merged.gguf"
        path.write_bytes(merge(loud_model(), *((tiny.loras[name], scale) for name, scale in merged)).bytes())
        params = msgspec.structs.replace(tiny.params, path=str(path), adapters=(), prefix_cache=False)
        [expected] = _run(params, [_scored()])
        undisturbed.forget()
        undisturbed.submit(0, _PROMPT, _scored(wish))
        undisturbed.run()
        answer = undisturbed.answers[0, 0]
        assert answer.tokens == expected.tokens
        np.testing.assert_allclose(_numbers(answer), _numbers(expected), rtol=0, atol=_TOLERANCE)


@pytest.mark.parametrize("kv_unified", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_requests_of_different_sets_at_once_equal_their_single_runs(
    loud: Model, undisturbed: RunningEngine, tiny: _Loud, kv_unified: bool, seed: int
) -> None:
    """With everything: shared beginnings, prefixes in main memory, drafts, too few cells, several choices."""
    cells = {"kv_cells": 256} if kv_unified else {"kv_cells": 400, "speculation": False}
    running = RunningEngine(loud, msgspec.structs.replace(tiny.params, kv_unified=kv_unified, spill=1 << 20, **cells))
    source = random.Random(seed)
    wishes: list[_Wish] = [None, (), (("a", 1.0),), (("b", 1.0),), (("a", 0.5), ("b", 0.5)), (("a", 0.0),)]
    asked: dict[int, tuple[str, Generation]] = {}
    try:
        for number in range(24):
            prompt = source.choice([_PROMPT, _PROMPT[:20], "0123456789" * 3]) + source.choice(["", "a", "bb"])
            sampling = source.choice(_SAMPLINGS)
            generation = _generation(source.choice(wishes), max_tokens=source.randint(1, 25), sampling=sampling)
            asked[number] = prompt, generation
            running.submit(number, prompt, generation)
            running.step(source.randint(0, 12))
            if kv_unified:
                running.check_books()
        running.run()
        for number, (prompt, generation) in asked.items():
            assert running.answers[number, 0].tokens == _tokens(undisturbed, prompt, generation), (prompt, generation)
        running.check_nothing_is_left()
    finally:
        running.close()


@pytest.mark.parametrize("spill", [0, 1 << 20])
def test_prefixes_serve_only_requests_with_the_same_adapters(loud: Model, tiny: _Loud, spill: int) -> None:
    running = RunningEngine(loud, msgspec.structs.replace(tiny.params, spill=spill))
    cached: list[int] = []
    wishes: list[_Wish] = [None, (("a", 1.0),), (), (("a", 0.5),), (("b", 0.5), ("a", 1.0)), (("b", 0.0),)]
    try:
        for number, wish in enumerate(wishes * 2):
            running.submit(number, _PROMPT, _generation(wish, max_tokens=1))
            running.run()
            while running.engine.save_ahead():
                pass
            cached.append(_cached(running, number))
    finally:
        running.close()
    whole = max(cached)
    assert whole >= len(_PROMPT)
    # The last two are the first and the third, written in another way.
    assert cached == [0, 0, 0, 0, whole, whole] + [whole] * 6


def test_a_name_that_is_not_there_is_refused_with_those_that_are(running: RunningEngine) -> None:
    for wish in ((("c", 1.0),), (("a", 1.0), ("A", 0.5)), (("", 0.0),)):
        for refuse in (running.engine.check, lambda generation: running.submit(0, _PROMPT, generation)):
            with pytest.raises(InvalidRequest, match="the model has 'a', 'b'") as caught:
                refuse(_generation(wish))
            assert caught.value.param == "lora"
    assert running.engine.idle
    running.engine.set_adapters([])
    with pytest.raises(InvalidRequest, match="the model has none"):
        running.engine.check(_generation((("a", 1.0),)))
    running.engine.check(_generation(()))
    with pytest.raises(InvalidRequest) as caught:
        running.engine.check(_generation((("x" * 100_000, 1.0),)))
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 100.1, -1e300])
def test_an_impossible_scale_is_refused(running: RunningEngine, tiny: _Loud, scale: float) -> None:
    with pytest.raises(InvalidRequest, match="numbers from -100 to 100") as caught:
        running.engine.check(_generation((("a", scale),)))
    assert caught.value.param == "lora"
    with pytest.raises(ModelLoadFailed, match="numbers from -100 to 100"):
        running.engine.set_adapters(tiny.adapters(a=scale))


def test_an_adapter_that_is_named_twice_is_refused(running: RunningEngine, tiny: _Loud) -> None:
    with pytest.raises(InvalidRequest, match="'a' is named twice"):
        running.engine.check(_generation((("a", 1.0), ("a", 1.0))))
    with pytest.raises(ModelLoadFailed, match="two LoRA adapters are called 'a'"):
        running.engine.set_adapters([*tiny.adapters(a=1.0), *tiny.adapters(a=0.5)])
    with pytest.raises(ModelLoadFailed, match="33 LoRA adapters"):
        running.engine.set_adapters([Adapter(str(n), str(tiny.files["a"])) for n in range(MAX_ADAPTERS + 1)])
    running.engine.check(_generation((("a", 1.0), ("b", 1.0))))


def test_one_file_under_two_names_has_no_more_than_the_largest_scale(running: RunningEngine, tiny: _Loud) -> None:
    one, other = (Adapter(name, str(tiny.files["a"])) for name in ("one", "other"))
    running.engine.set_adapters([one, other])
    running.engine.check(_generation((("one", 60.0), ("other", 40.0))))
    for submit in (running.engine.check, lambda generation: running.submit(0, _PROMPT, generation)):
        with pytest.raises(InvalidRequest, match=r"the same file have the scale 101\.0 together") as caught:
            submit(_generation((("one", 61.0), ("other", 40.0))))
        assert caught.value.param == "lora"
    with pytest.raises(ModelLoadFailed, match=r"the same file have the scale -120\.0 together"):
        running.engine.set_adapters([msgspec.structs.replace(each, scale=-60.0) for each in (one, other)])


def test_an_adapter_that_is_too_strong_costs_others_nothing(
    running: RunningEngine, undisturbed: RunningEngine, tmp_path: Path
) -> None:
    shapes = shapes_of(loud_model().tensors)
    paths = {size: random_lora(shapes, size=size).write(tmp_path / f"{size}.gguf") for size in (1.0, 1e37)}
    expected = [_tokens(undisturbed, prompt, _generation(())) for prompt in (_PROMPT, _PROMPT[::-1])]
    running.engine.set_adapters([Adapter(f"{size:g}", str(path)) for size, path in paths.items()])
    running.submit(0, _PROMPT, _generation(()))
    running.submit(1, _PROMPT[::-1], _generation(()))
    running.submit(2, _PROMPT, _generation((("1", 1.0),)))
    running.step(3)
    running.submit(3, _PROMPT, _generation((("1e+37", 100.0),)))
    failures: list[Failed] = []
    while not running.engine.idle:
        events = running.engine.step()
        failures += [event for event in events if isinstance(event, Failed)]
        running.take([event for event in events if not isinstance(event, Failed)])
    assert [running.answers[number, 0].tokens for number in range(2)] == expected
    assert running.answers[2, 0].finished is not None
    [failed] = failures
    assert failed.request == 3
    assert failed.error.message.startswith("with the LoRA adapters of this request")


@pytest.mark.parametrize("size", [1e30, float("inf"), float("nan")])
def test_an_adapter_that_makes_all_logits_the_same_fails_its_requests(
    running: RunningEngine, undisturbed: RunningEngine, tiny: _Loud, tmp_path: Path, size: float
) -> None:
    """The last norm makes zeros of what is infinite, and zeros are finite."""
    name = sorted(name for name in tiny.loras["a"].pairs if name.endswith("ffn_down.weight"))[-1]
    down, up = tiny.loras["a"].pairs[name]
    up = up.copy()
    up[3, 1] = size
    bad = Lora({name: (down, up)}).write(tmp_path / "bad.gguf")
    running.engine.set_adapters([Adapter("bad", str(bad))])
    running.submit(0, _PROMPT, _generation())
    failures: list[Failed] = []
    while not running.engine.idle:
        failures += [event for event in running.engine.step() if isinstance(event, Failed)]
    assert [failed.request for failed in failures] == [0]
    running.submit(1, _PROMPT, _generation(()))
    running.run()
    assert running.answers[1, 0].tokens == _tokens(undisturbed, _PROMPT, _generation(()))


def test_one_file_under_two_names_works_with_both_scales(
    running: RunningEngine, undisturbed: RunningEngine, tiny: _Loud
) -> None:
    running.engine.set_adapters([Adapter(name, str(tiny.files["a"]), 0.5) for name in ("one", "other")])
    expected = _tokens(undisturbed, _PROMPT, _generation((("a", 1.0),)))
    for number, wish in enumerate([None, (("other", 0.75), ("one", 0.25)), (("one", 1.0),)]):
        running.submit(number, _PROMPT, _generation(wish))
        running.run()
        assert running.answers[number, 0].tokens == expected
        assert (_cached(running, number) > len(_PROMPT)) == (number > 0)


# Other adapters while the engine lives


def test_who_runs_keeps_the_adapters_that_it_has_started_with(
    running: RunningEngine, undisturbed: RunningEngine, tiny: _Loud
) -> None:
    expected = [_tokens(undisturbed, _PROMPT, _generation(wish)) for wish in (None, (), (("a", 1.0),))]
    running.submit(0, _PROMPT, _generation())
    running.submit(1, _PROMPT, _generation(()))
    running.step(5)
    running.engine.set_adapters(tiny.adapters(c=1.0))
    running.submit(2, _PROMPT, _generation())
    with pytest.raises(InvalidRequest, match="there is no LoRA adapter 'a'"):
        running.submit(3, _PROMPT, _generation((("a", 1.0),)))
    running.step(5)
    running.engine.set_adapters(tiny.adapters(a=1.0))
    running.submit(4, _PROMPT, _generation())
    running.run()
    assert running.answers[0, 0].tokens == expected[0]
    assert running.answers[1, 0].tokens == expected[1]
    assert running.answers[4, 0].tokens == expected[2]
    running.engine.set_adapters(tiny.adapters(c=1.0))
    running.submit(5, _PROMPT, _generation())
    running.run()
    assert running.answers[2, 0].tokens == running.answers[5, 0].tokens
    assert _cached(running, 5) == 0, "what was evaluated with an adapter that has been freed is gone"


def test_another_file_of_the_same_name_is_another_adapter(
    running: RunningEngine, undisturbed: RunningEngine, tiny: _Loud, tmp_path: Path
) -> None:
    path = tmp_path / "x.gguf"
    tokens = []
    for number, name in enumerate(("a", "b", "a")):
        path.write_bytes(tiny.files[name].read_bytes())
        running.engine.set_adapters([Adapter("x", str(path))])
        running.submit(number, _PROMPT, _generation())
        running.run()
        tokens.append(running.answers[number, 0].tokens)
        assert tokens[-1] == _tokens(undisturbed, _PROMPT, _generation(((name, 1.0),)))
        assert _cached(running, number) == 0
    assert tokens[0] == tokens[2] != tokens[1]


def test_new_scales_are_those_of_requests_that_name_none(
    running: RunningEngine, undisturbed: RunningEngine, tiny: _Loud
) -> None:
    for number, scales in enumerate(({"a": 0.5, "b": 0.0}, {"a": -1.0}, {"b": 1.0, "a": 1.0}, {})):
        running.engine.set_adapters(tiny.adapters(**scales))
        running.submit(number, _PROMPT, _generation())
        running.run()
        expected = _tokens(undisturbed, _PROMPT, _generation(tuple(scales.items())))
        assert running.answers[number, 0].tokens == expected


def _damage(whole: bytes) -> dict[str, bytes]:
    other = random_lora({"blk.0.attn_q.weight": (32, 48)})
    return {
        "nothing": b"",
        "truncated head": whole[:200],
        "truncated weights": whole[:-500],
        "another model's shapes": File(other.metadata(), other.tensors()).bytes(),
        "no adapter": loud_model().bytes(),
        "another architecture": whole.replace(b"llama", b"qwen2", 1),
        "missing pair": whole.replace(b"lora_b", b"lora_x", 1),
        "another type": whole.replace(b"adapter.type", b"adapter.typo", 1),
        "no GGUF": b"PK" + whole[2:],
    }


@pytest.mark.parametrize("damage", _damage(b""))
def test_a_damaged_file_changes_nothing(
    running: RunningEngine, undisturbed: RunningEngine, tiny: _Loud, tmp_path: Path, damage: str
) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(_damage(tiny.files["a"].read_bytes())[damage])
    running.submit(0, _PROMPT, _generation())
    running.step(5)
    with pytest.raises(ModelLoadFailed, match=r"bad\.gguf"):
        running.engine.set_adapters([*tiny.adapters(c=1.0), Adapter("bad", str(bad))])
    running.submit(1, _PROMPT, _generation((("b", 1.0),)))
    running.run()
    assert running.answers[0, 0].tokens == _tokens(undisturbed, _PROMPT, _generation())
    assert running.answers[1, 0].tokens == _tokens(undisturbed, _PROMPT, _generation((("b", 1.0),)))


def test_a_file_that_is_not_there_changes_nothing(running: RunningEngine, tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.gguf", tmp_path, Path("a\0b")):
        with pytest.raises(ModelLoadFailed, match="can't be read"):
            running.engine.set_adapters([Adapter("x", str(path))])
    running.engine.check(_generation((("a", 1.0), ("b", 1.0))))


def test_a_model_with_a_damaged_adapter_is_not_loaded(backend: None, tiny: _Loud, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF")
    params = msgspec.structs.replace(tiny.params, adapters=(Adapter("bad", str(path)),))
    with pytest.raises(ModelLoadFailed, match=r"bad\.gguf"):
        LoadedEngine(params, lambda fraction: True)


def test_adapters_that_come_and_go_leave_no_memory_behind(running: RunningEngine, tmp_path: Path) -> None:
    shapes = shapes_of(loud_model().tensors)
    paths = [random_lora(shapes, rank=1000, seed=seed).write(tmp_path / f"{seed}.gguf") for seed in range(2)]
    size = paths[0].stat().st_size
    process = psutil.Process()

    def change(times: int) -> int:
        for number in range(times):
            running.answers.clear()
            running.engine.set_adapters([Adapter("x", str(paths[number % 2]))])
            running.submit(number, "a", _generation(max_tokens=1))
            running.run()
        running.engine.set_adapters([])
        return process.memory_info().rss

    before = change(6)
    assert change(40) - before < 5 * size


# On doubles


def _files(folder: Path, *texts: str) -> list[Adapter]:
    for text in texts:
        (folder / text).write_text(text)
    return [Adapter(text, str(folder / text)) for text in texts]


def _open(loras: FakeLoras) -> list[str]:
    return sorted(weights.text for weights in loras.open)


def test_an_adapter_is_freed_after_the_last_who_uses_it(tmp_path: Path) -> None:
    fake = FakeModel({(1, 0): b"one", (2, 0): b"three of them", (3, 0): b"x"}, slots=1)
    fake.engine.set_adapters(_files(tmp_path, "a", "b"))
    fake.submit(1, "prompt", adapters=(("a", 1.0),))
    fake.submit(2, "prompt", adapters=(("a", 1.0), ("b", 0.5)))  # it waits
    fake.step(2)
    fake.engine.set_adapters(_files(tmp_path, "c"))
    fake.submit(3, "prompt")
    assert _open(fake.loras) == ["a", "b", "c"]
    while not fake.of(2):
        fake.step()
    assert _open(fake.loras) == ["c"]
    fake.run()
    assert [fake.text(request) for request in (1, 2, 3)] == ["one", "three of them", "x"]


def test_an_adapter_that_is_wanted_again_in_time_is_not_read_again(tmp_path: Path) -> None:
    fake = FakeModel({(1, 0): b"an answer"})
    fake.engine.set_adapters(_files(tmp_path, "a"))
    fake.submit(1, "prompt")
    fake.step(2)
    [weights] = fake.loras.open
    fake.engine.set_adapters([])
    fake.engine.set_adapters(_files(tmp_path, "a"))
    fake.run()
    assert fake.loras.open == [weights]
    fake.engine.set_adapters([])
    assert fake.loras.open == []


def test_files_that_were_read_before_are_read_again_only_if_they_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeModel()
    wanted = _files(tmp_path, "a", "b")
    digests = fake.engine.read_adapters(wanted)
    (tmp_path / "b").write_text("another")
    read: list[str] = []

    def file_digest(file: Any, digest: Any) -> Any:
        read.append(Path(file.name).name)
        return before(file, digest)

    before = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", file_digest)
    fake.engine.set_adapters(wanted, digests)
    assert read == ["b"]
    assert fake.engine._adapters.resolve((("a", 1.0),)) == ((digests[wanted[0].path].value, 1.0),)
    assert fake.engine._adapters.resolve((("b", 1.0),)) != ((digests[wanted[1].path].value, 1.0),)
    with pytest.raises(ModelLoadFailed, match="can't be read"):
        fake.engine.read_adapters([Adapter("x", str(tmp_path / "nothing"))])


def test_a_file_that_is_replaced_while_it_is_loaded_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeModel()
    fake.engine.set_adapters(_files(tmp_path, "a"))
    wanted = _files(tmp_path, "b")
    load = fake.loras.load_adapter

    def replaced_before(path: str) -> FakeLora:
        (tmp_path / "b").write_text("another")
        return load(path)

    monkeypatch.setattr(fake.loras, "load_adapter", replaced_before)
    with pytest.raises(ModelLoadFailed, match="was replaced while it was loaded"):
        fake.engine.set_adapters(wanted)
    assert _open(fake.loras) == ["a"]
    fake.engine.set_adapters(wanted)
    assert _open(fake.loras) == ["another"]


def test_adapters_are_freed_when_their_last_request_is_cancelled(tmp_path: Path) -> None:
    fake = FakeModel(slots=1)
    fake.engine.set_adapters(_files(tmp_path, "a"))
    fake.submit(1, "prompt", "another", choices=2)
    fake.step(3)
    fake.engine.set_adapters([])
    assert _open(fake.loras) == ["a"]
    fake.engine.cancel(1)
    assert _open(fake.loras) == []


def test_of_several_files_all_are_given_back_when_one_is_damaged(tmp_path: Path) -> None:
    fake = FakeModel()
    fake.engine.set_adapters(_files(tmp_path, "a"))
    with pytest.raises(ModelLoadFailed):
        fake.engine.set_adapters(_files(tmp_path, "b", "a", "c", "damaged"))
    assert _open(fake.loras) == ["a"]
    fake.engine.check(_generation((("a", 1.0),)))
