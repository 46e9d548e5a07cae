"""From settings to how a model is loaded: which of the automatic ones are decided how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llamaserve.engine.params import Footprint
from llamaserve.errors import InsufficientMemory
from llamaserve.registry.gguf import GGUFHeader, read_header
from llamaserve.registry.load_plan import PROCESS, LoadPlan, context_of, load_params, plan_load
from llamaserve.registry.spec import ModelSpec

ROOMY = Footprint(1 << 40, 1 << 40)


@pytest.fixture(scope="module")
def header(starter_model: Path) -> GGUFHeader:
    return read_header(starter_model)


@pytest.fixture(autouse=True)
def _no_memory_of_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAMASERVE_CACHE", str(tmp_path / "cache"))


def planned(header: GGUFHeader, budget: Footprint = ROOMY, devices: int = 0, **options: Any) -> LoadPlan:
    spec = ModelSpec(source="file:/x.gguf", **options)
    return plan_load("x", header, load_params(spec, header), budget, devices)


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
