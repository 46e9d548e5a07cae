"""From settings to how a model is loaded: which of the automatic ones are decided how."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from encoder_files import encoder_file
from gguf_writer import tiny_llama
from synthetic_models import F16, Q4_0, Q4_1, Q4_K, Q8_0, Shape, write_model

from llamaserve.engine.params import UNTILED, Adapter, Footprint, LoadParams
from llamaserve.errors import InsufficientMemory, ModelFileMissing, ModelNotCapable
from llamaserve.registry import memory
from llamaserve.registry.gguf import GGUFHeader, read_header
from llamaserve.registry.load_plan import (
    MEBIBYTE,
    PROCESS,
    LoadPlan,
    configured_adapters,
    context_of,
    load_params,
    plan_load,
)
from llamaserve.registry.measurements import record
from llamaserve.registry.spec import AdapterSpec, ModelSpec

ROOMY = Footprint(1 << 40, 1 << 40)


@pytest.fixture(scope="module")
def header(starter_model: Path) -> GGUFHeader:
    return read_header(starter_model)


@pytest.fixture(autouse=True)
def _no_memory_of_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAMASERVE_CACHE", str(tmp_path / "cache"))


def planned(
    header: GGUFHeader, budget: Footprint = ROOMY, devices: int = 0, *, unified: bool = False, **options: Any
) -> LoadPlan:
    spec = ModelSpec(source="file:/x.gguf", **options)
    return plan_load("x", header, load_params(spec, header), budget, devices, unified=unified)


def test_the_context_is_never_more_than_what_the_model_was_trained_for(header: GGUFHeader) -> None:
    assert context_of(ModelSpec(source="file:/x.gguf", context=100_000), header) == 8192
    assert context_of(ModelSpec(source="file:/x.gguf", context=512), header) == 512


def test_without_a_gpu_no_layer_goes_to_one(header: GGUFHeader) -> None:
    for setting in ("auto", "all", "none", 12):
        plan = planned(header, gpu_layers=setting)
        assert plan.params.gpu_layers == 0
        assert plan.need.device == 0


def test_as_many_layers_as_fit_go_to_the_gpu(header: GGUFHeader) -> None:
    layers = header.block_count
    assert layers == 30
    everything = planned(header, devices=1)
    assert everything.params.gpu_layers == layers + 1
    assert everything.need.device > everything.need.host
    none = planned(header, Footprint(1 << 40, 1000), devices=1)
    assert none.params.gpu_layers == 0
    some = planned(header, Footprint(1 << 40, (everything.need.device + 340_000_000) // 2), devices=1)
    assert isinstance(some.params.gpu_layers, int)
    assert 0 < some.params.gpu_layers < layers
    assert planned(header, devices=1, gpu_layers=5).params.gpu_layers == 5
    assert planned(header, devices=1, gpu_layers="all").params.gpu_layers == layers + 1


def test_the_layers_that_fit_are_counted_to_the_byte(header: GGUFHeader, tmp_path: Path) -> None:
    shape = Shape(width=1024, layers=8, heads=16, kv_heads=16, forward=2816, tokens=16000, type=Q4_K)
    model = read_header(write_model(tmp_path / "model.gguf", shape, hollow=True))
    for layers in (1, 4, 9):
        need = planned(model, devices=1, gpu_layers=layers).need
        assert planned(model, Footprint(1 << 40, need.device), devices=1).params.gpu_layers == layers
        assert planned(model, Footprint(1 << 40, need.device - 1), devices=1).params.gpu_layers == layers - 1
    with pytest.raises(InsufficientMemory):
        planned(model, Footprint(0, 1 << 40), devices=1)


def test_what_earlier_loads_have_taught_is_part_of_the_search(header: GGUFHeader) -> None:
    """A model that takes more main memory than was thought has as many layers on the GPU as that needs."""
    every = planned(header, devices=1)
    none = planned(header, devices=1, gpu_layers="none")
    more = 20 * MEBIBYTE
    measured = none.estimate.total - none.estimate.later + Footprint(more)
    record(header, none.params, none.estimate.total, measured)
    room = Footprint(none.need.host + more - MEBIBYTE, every.need.device // 2 + 200 * MEBIBYTE)
    plan = planned(header, room, devices=1)
    assert plan.need.fits(room)
    assert plan.params.gpu_layers not in (0, 31)
    assert plan.need.host == (plan.estimate.total + PROCESS).host + more


def test_gpus_that_use_the_main_memory_are_planned_within_it(header: GGUFHeader) -> None:
    apart = planned(header, devices=1)
    together = planned(header, devices=1, unified=True)
    assert together.need == Footprint(apart.need.host + apart.need.device, apart.need.device)
    assert together.fixed == PROCESS
    assert planned(header, together.need, devices=1, unified=True).need == together.need
    for room in (together.need - Footprint(1), together.need - Footprint(0, 1)):
        fewer = planned(header, room, devices=1, unified=True)
        assert fewer.params.gpu_layers != 31
        assert fewer.need.fits(room)
    small = together.need - Footprint(100 * MEBIBYTE)
    with pytest.raises(InsufficientMemory, match="would fit with a context of"):
        planned(header, small, devices=1, unified=True, gpu_layers="all")


def test_a_model_that_is_not_split_has_one_gpu(header: GGUFHeader) -> None:
    one, three = planned(header, devices=1), planned(header, devices=3)
    assert three.need.device > one.need.device
    assert planned(header, devices=3, split_mode="none").need == one.need
    room = Footprint(1 << 40, 3 * one.need.device)
    assert planned(header, room, devices=3, split_mode="none").params.gpu_layers == 31
    assert planned(header, room - Footprint(0, 3), devices=3, split_mode="none").params.gpu_layers == 30


def test_a_refusal_counts_the_gpus_of_the_plan(header: GGUFHeader) -> None:
    need = planned(header, devices=3, gpu_layers="all", context=1024).need
    with pytest.raises(InsufficientMemory, match="a context of 1024 tokens"):
        planned(header, need, devices=3, gpu_layers="all")


@pytest.mark.parametrize(("kind", "reads"), [(Q4_0, True), (Q4_K, True), (Q4_1, False), (F16, False)])
def test_weights_that_would_be_there_twice_are_read(
    kind: int, reads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "cpu_features", lambda: frozenset({"avx2"}))
    shape = Shape(width=1024, layers=4, forward=2816, type=kind, embedding_type=Q8_0)
    model = read_header(write_model(tmp_path / "model.gguf", shape, hollow=True))
    plan = planned(model)
    assert plan.params.mmap is not reads
    asked = planned(model, mmap=True)
    assert asked.params.mmap is True
    assert planned(model, mmap=False).params.mmap is False
    assert (asked.need.host > plan.need.host) == reads
    assert plan.need.host <= planned(model, mmap=False).need.host
    monkeypatch.setattr(memory, "cpu_features", frozenset)
    assert planned(model).params.mmap is True


def test_with_all_matrices_on_a_gpu_nothing_is_there_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "cpu_features", lambda: frozenset({"avx2"}))
    shape = Shape(width=1024, layers=4, forward=2816, type=Q4_0, embedding_type=Q8_0)
    model = read_header(write_model(tmp_path / "model.gguf", shape, hollow=True))
    assert planned(model, devices=1).params.mmap is True
    assert planned(model, devices=1, gpu_layers=1).params.mmap is False


def test_adapters_of_the_settings_are_found_or_told(tmp_path: Path) -> None:
    (tmp_path / "style.gguf").write_bytes(b"?")
    spec = ModelSpec(source="file:/x.gguf", lora=(AdapterSpec(source="file:style.gguf", scale=0.5),))
    assert configured_adapters("x", spec, tmp_path) == [Adapter("style", str(tmp_path / "style.gguf"), 0.5)]
    with pytest.raises(ModelFileMissing, match=r"style.gguf of my x is not") as missing:
        configured_adapters("my x", spec, tmp_path / "elsewhere")
    assert missing.value.hint == "llamaserve pull 'my x'"


def test_the_need_is_the_estimate_and_the_child_itself(header: GGUFHeader) -> None:
    plan = planned(header)
    assert plan.need == plan.estimate.total + PROCESS


def test_prefixes_may_have_as_much_as_the_cache_if_it_is_there(header: GGUFHeader) -> None:
    assert planned(header).spill == planned(header).estimate.cache.host
    assert planned(header, prefix_cache=False).spill == 0
    assert planned(header, flash_attention="off", parallel=1, context=256).spill == 0
    fixed = planned(header, spill=100)
    assert fixed.spill == 0
    assert fixed.need.host == planned(header).need.host + (100 << 20)


def test_what_can_never_fit_is_refused_and_what_would_fit_is_named(header: GGUFHeader) -> None:
    need = planned(header).need
    assert planned(header, need).need == need
    with pytest.raises(InsufficientMemory, match=r"x needs .*MB.* context of \d+ tokens") as refusal:
        planned(header, Footprint(need.host - (64 << 20)))
    context = int(refusal.value.message.partition("a context of ")[2].split()[0])
    assert planned(header, Footprint(need.host - (64 << 20)), context=context)


# ---- for vectors -------------------------------------------------------------------------------------------------


def encoder(folder: Path, architecture: str = "nomic-bert", context: int = 2048, **changes: Any) -> GGUFHeader:
    return read_header(encoder_file(folder / "encoder.gguf", architecture, arch__context_length=context, **changes))


def decoder(folder: Path, **changes: Any) -> GGUFHeader:
    path = folder / "decoder.gguf"
    path.write_bytes(tiny_llama(llama__context_length=2048, **changes))
    return read_header(path)


def embeds(params: LoadParams) -> dict[str, int]:
    """Load a model in a process of its own, and embed the longest text and many short ones."""
    script = Path(__file__).with_name("measured_load.py")
    command = [sys.executable, str(script), "load", msgspec.json.encode([params]).decode()]
    found: dict[str, int] = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    return found


def test_nothing_is_kept_from_one_text_to_the_next(header: GGUFHeader, tmp_path: Path) -> None:
    for model in (header, encoder(tmp_path)):
        for devices in (0, 1):
            plan = planned(model, devices=devices, task="embedding", spill=100, prefix_cache=True)
            params = plan.params
            assert (params.pooling, params.kv_unified, params.prefix_cache) == ("mean", True, False)
            assert (params.speculation, params.spill, params.micro_batch) == (False, 0, None)
            assert plan.spill == 0
            assert plan.need.host == (plan.estimate.total + PROCESS).host


def test_a_text_that_is_seen_as_a_whole_fits_into_a_step(tmp_path: Path) -> None:
    model = encoder(tmp_path)
    for options, context in (
        ({}, 512),
        ({"batch": 1024}, 1024),
        ({"batch": 8192}, 2048),
        ({"batch": 1024, "micro_batch": 256}, 256),
        ({"batch": 1024, "context": 300}, 300),
    ):
        assert context_of(ModelSpec(source="file:/x.gguf", **options), model) == context
        params = planned(model, **options).params
        assert (params.context, params.batch) == (context, context)
        assert params.kv_cells >= context


def test_a_decoder_sees_a_text_in_parts(tmp_path: Path) -> None:
    model = decoder(tmp_path)
    params = planned(model, task="embedding", context=1500, parallel=4).params
    assert (params.context, params.kv_cells, params.parallel, params.batch) == (1500, 1500, 4, UNTILED + 1)
    assert planned(model, devices=1, task="embedding", context=1500, gpu_layers="all").params.batch == 512
    ahead = planned(decoder(tmp_path, llama__attention__causal=False), task="embedding", context=1500).params
    assert (ahead.context, ahead.batch) == (512, 512)  # one that looks ahead does not
    assert ahead.parallel == 64


def test_steps_are_small_on_a_cpu_and_as_large_as_is_said_on_a_gpu(tmp_path: Path) -> None:
    model = encoder(tmp_path)
    options = {"batch": 1024, "context": 40 + 64}
    assert planned(model, **options).params.batch == 104
    assert planned(model, devices=1, **options).params.batch == 1024
    assert planned(model, devices=1, gpu_layers=0, **options).params.batch == 104
    assert planned(model, context=64).params.batch == UNTILED + 1
    here, there = planned(model, **options), planned(model, devices=1, gpu_layers=0, **options)
    assert here.need.host == there.need.host


def test_without_flash_attention_texts_share_the_cells_too(tmp_path: Path) -> None:
    params = planned(decoder(tmp_path), task="embedding", flash_attention="off", context=256, parallel=4).params
    assert (params.kv_unified, params.kv_cells, params.flash_attention) == (True, 256, "off")


def test_a_cache_is_never_smaller_than_a_step(tmp_path: Path) -> None:
    """llama.cpp makes steps no larger than it, and ends the process where that can't be divided by the sequences."""
    model = decoder(tmp_path)
    for parallel in (1, 3, 6, 7, 60, 64):
        for devices in (0, 1):
            params = planned(model, devices=devices, task="embedding", context=64, parallel=parallel).params
            assert params.kv_cells >= -(-params.batch // parallel) * parallel
            assert params.context == 64


@pytest.mark.parametrize("options", [{"context": 64, "parallel": 6}, {"context": 100, "parallel": 7, "batch": 33}])
def test_steps_that_sequences_do_not_divide_evenly_end_no_process(options: dict[str, int], tmp_path: Path) -> None:
    for model in (decoder(tmp_path), encoder(tmp_path), encoder(tmp_path, arch__attention__causal=None)):
        assert embeds(planned(model, task="embedding", threads=1, **options).params)["used"] > 0


def test_models_for_vectors_take_no_adapters(tmp_path: Path) -> None:
    spec = ModelSpec(source="file:/x.gguf", task="embedding")
    with pytest.raises(ModelNotCapable, match="LoRA adapters are for models that generate text"):
        load_params(spec, decoder(tmp_path), [Adapter("style", "/style.gguf", 1.0)])


def test_what_a_model_cannot_do_is_refused_before_anything_is_loaded(header: GGUFHeader, tmp_path: Path) -> None:
    for model, options, said in (
        (encoder(tmp_path), {"task": "generation"}, "it is an encoder"),
        (encoder(tmp_path), {"task": "rerank"}, "no classification head"),
        (header, {"pooling": "mean"}, "for models that make embeddings"),
    ):
        with pytest.raises(ModelNotCapable, match=said):
            planned(model, **options)


def test_a_refusal_of_a_model_for_vectors_names_a_context_that_fits(tmp_path: Path) -> None:
    model = encoder(tmp_path)
    options = {"batch": 2048, "context": 2048}
    need = planned(model, **options).need
    with pytest.raises(InsufficientMemory, match=r"context of \d+ tokens instead of 2048") as refusal:
        planned(model, need - Footprint(2 * MEBIBYTE), **options)
    context = int(refusal.value.message.partition("a context of ")[2].split()[0])
    assert planned(model, need - Footprint(2 * MEBIBYTE), **options | {"context": context}).params.context == context
