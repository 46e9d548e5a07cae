"""From settings to how a model is loaded: which of the automatic ones are decided how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from synthetic_models import F16, Q4_0, Q4_1, Q4_K, Q8_0, Shape, write_model

from llamaserve.engine.params import Adapter, Footprint
from llamaserve.errors import InsufficientMemory, ModelFileMissing
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
