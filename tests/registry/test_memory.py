"""The estimate of a model's memory: against what llama.cpp takes, and part by part."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from gguf_splitter import split_gguf
from lora_files import random_lora, shapes_of
from synthetic_encoders import write_encoder
from synthetic_models import F16, MXFP4, Q4_0, Q4_K, Q8_0, Shape, write_model

from llamaserve.engine.params import Adapter, Footprint, LoadParams
from llamaserve.registry import memory
from llamaserve.registry.gguf import GGUFHeader, read_header
from llamaserve.registry.layers import read_layers
from llamaserve.registry.load_plan import load_params, plan_load
from llamaserve.registry.memory import claimed, estimate, insufficient, largest_context
from llamaserve.registry.spec import ModelSpec
from llamaserve.registry.step_memory import step_buffer

MIB = 1024 * 1024
GIB = 1024 * MIB

DENSE = Shape(width=1024, layers=8, heads=16, kv_heads=16, head=64, forward=2816, tokens=16000, type=F16)
GROUPED = Shape(
    architecture="qwen3",
    width=1024,
    layers=8,
    heads=16,
    kv_heads=8,
    head=128,
    forward=3072,
    tokens=32000,
    type=Q4_0,
    tied=True,
)
EXPERTS = Shape(
    architecture="qwen3moe",
    width=768,
    layers=6,
    heads=12,
    kv_heads=2,
    head=128,
    forward=384,
    experts=16,
    used=4,
    tokens=32000,
    type=Q8_0,
)
SLIDING = Shape(
    architecture="gemma3",
    width=640,
    layers=18,
    heads=4,
    kv_heads=1,
    head=256,
    forward=2048,
    tokens=64000,
    tied=True,
    window=512,
)
RECURRENT = Shape(
    architecture="mamba2", width=768, layers=4, heads=0, kv_heads=0, head=0, forward=0, state=128, tokens=8192
)
HYBRID = Shape(
    architecture="granitehybrid",
    width=768,
    layers=4,
    heads=12,
    kv_heads=(0, 0, 0, 4),
    head=64,
    forward=2048,
    state=128,
    tokens=8192,
    tied=True,
)
CONVOLUTIONS = Shape(
    architecture="lfm2",
    width=1024,
    layers=4,
    heads=16,
    kv_heads=(0, 0, 8, 0),
    head=64,
    forward=2048,
    tokens=8192,
    tied=True,
    extra={"lfm2.shortconv.l_cache": 3},
)
LATENT = Shape(
    architecture="deepseek2",
    width=1024,
    layers=4,
    heads=16,
    head=128,
    forward=512,
    experts=16,
    used=4,
    latent=512,
    tokens=8192,
)
SINKS = Shape(
    architecture="gpt-oss",
    width=1024,
    layers=4,
    heads=16,
    kv_heads=4,
    head=64,
    forward=512,
    experts=16,
    used=4,
    window=128,
    tokens=8192,
    type=MXFP4,
    embedding_type=Q8_0,
)
FAMILIES = {
    "dense": DENSE,
    "grouped": GROUPED,
    "experts": EXPERTS,
    "sliding": SLIDING,
    "recurrent": RECURRENT,
    "hybrid": HYBRID,
    "convolutions": CONVOLUTIONS,
    "latent": LATENT,
    "sinks": SINKS,
}


def encoder(architecture: str, **dimensions: Any) -> Shape:
    """Return the dimensions of an encoder, where nothing is said those of a small BERT."""
    width, heads = dimensions.get("width", 512), dimensions.get("heads", 8)
    usual: dict[str, Any] = {
        "width": width,
        "layers": 4,
        "heads": heads,
        "kv_heads": heads,
        "head": width // heads,
        "forward": 4 * width,
        "tokens": 30522,
        "type": F16,
        "context": 2048,
    }
    return Shape(architecture=architecture, **usual | dimensions)


ENCODERS = {
    "narrow": encoder("bert", width=384, layers=6, heads=12),
    "wide": encoder("bert", width=1024, heads=16, type=Q8_0),
    "multilingual": encoder("bert", layers=3, tokens=120_000, type=Q8_0),
    "rotated": encoder("nomic-bert", forward=3 * 512),
    "mixed": encoder("nomic-bert-moe", experts=8, used=2, type=Q8_0),
    "biased": encoder("jina-bert-v2"),
    "fused": encoder("neo-bert", forward=1536, extra={"neo-bert.attention.head_count_kv": 8}),
    "modern": encoder("modern-bert", forward=768, layers=6, tokens=50_368, window=128),
    "gemma": encoder(
        "gemma-embedding",
        width=768,
        layers=6,
        heads=3,
        kv_heads=1,
        head=256,
        forward=1152,
        tokens=64_000,
        type=Q8_0,
        window=512,
    ),
    "euro": encoder("eurobert", tokens=64_000, type=Q8_0),
    "distances": encoder("t5encoder"),
}


def loading(path: Path, **changes: Any) -> LoadParams:
    """Return settings of a load with a unified cache, as a server has them on a CPU."""
    settings: dict[str, Any] = {
        "path": str(path),
        "context": 2048,
        "parallel": 4,
        "kv_cells": changes.get("context", 2048),
        "kv_unified": True,
        "batch": 256,
        "threads": 2,
        "adaptive_threads": False,
        "gpu_layers": "none",
        "flash_attention": "auto",
        "key_type": "f16",
        "value_type": "f16",
        "prefix_cache": True,
        "spill": 0,
        "speculation": True,
    }
    return LoadParams(**settings | changes)


def hollow(folder: Path, shape: Shape) -> GGUFHeader:
    """Return the header of a model without weights."""
    return read_header(write_model(folder / "model.gguf", shape, hollow=True))


def for_vectors(header: GGUFHeader, **options: Any) -> LoadParams:
    """Return how a server on a CPU loads a model to make vectors."""
    spec = ModelSpec(source="file:/x.gguf", task="embedding", threads=2, **options)
    planned = plan_load("x", header, load_params(spec, header), Footprint(1 << 40), 0).params
    return msgspec.structs.replace(planned, adaptive_threads=False)


def run(what: str, *requests: LoadParams) -> Any:
    """Measure in a process of its own."""
    script = Path(__file__).with_name("measured_load.py")
    command = [sys.executable, str(script), what, msgspec.json.encode(requests).decode()]
    return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=120).stdout)


# ---- against llama.cpp -------------------------------------------------------------------------------------------


def check_against_a_load(header: GGUFHeader, params: LoadParams) -> None:
    measured = run("load", params)
    estimated = estimate(header, params).total.host
    for moment in ("loaded", "used"):
        assert estimated == pytest.approx(measured[moment], rel=0.1), (moment, measured)


@pytest.mark.parametrize(("context", "parallel"), [(256, 1), (2048, 4), (8192, 2), (4096, 8)])
def test_the_starter_model_takes_what_was_estimated(starter_model: Path, context: int, parallel: int) -> None:
    params = loading(starter_model, context=context, parallel=parallel)
    check_against_a_load(read_header(starter_model), params)


@pytest.mark.parametrize("family", ["dense", "grouped", "experts"])
def test_models_of_other_families_take_what_was_estimated(family: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", FAMILIES[family])
    check_against_a_load(read_header(path), loading(path))


def test_the_buffer_for_a_step_is_the_one_that_llama_cpp_reserves(tmp_path: Path) -> None:
    cases: list[tuple[GGUFHeader, LoadParams]] = []
    for name, shape in FAMILIES.items():
        path = write_model(tmp_path / f"{name}.gguf", shape, hollow=True)
        cases += [
            (read_header(path), loading(path, batch=512)),
            (read_header(path), loading(path, context=4096, parallel=1, batch=1024)),
            (read_header(path), loading(path, parallel=2, kv_cells=4096, kv_unified=False, flash_attention="off")),
        ]
    reserved = run("reserve", *(params for _, params in cases))
    for (header, params), size in zip(cases, reserved, strict=True):
        model = read_layers(header)
        step = memory._largest_step(model, params)
        embeddings = step.tokens * model.width * 4  # for those who give these instead of tokens; never touched
        computed = step_buffer(model, model.layers, step) + embeddings
        assert computed == pytest.approx(size, rel=0.15), (header.architecture, params)


@pytest.fixture
def _no_memory_of_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAMASERVE_CACHE", str(tmp_path / "cache"))


def check_against_vectors(header: GGUFHeader, params: LoadParams) -> None:
    """Compare with what is there after the load, and after the longest text: a step of so many tokens."""
    measured, estimated = run("load", params), estimate(header, params)
    assert (estimated.total - estimated.later).host == pytest.approx(measured["loaded"], rel=0.1), measured
    assert estimated.total.host == pytest.approx(measured["used"], rel=0.1), measured


@pytest.mark.usefixtures("_no_memory_of_loads")
@pytest.mark.parametrize("context", [128, 512])
def test_the_starter_embedding_model_takes_what_was_estimated(embedding_model: Path, context: int) -> None:
    header = read_header(embedding_model)
    check_against_vectors(header, for_vectors(header, context=context))


@pytest.mark.usefixtures("_no_memory_of_loads")
@pytest.mark.parametrize("family", ["wide", "multilingual", "mixed", "modern", "gemma", "distances"])
def test_encoders_take_what_was_estimated(family: str, tmp_path: Path) -> None:
    header = read_header(write_encoder(tmp_path / "model.gguf", ENCODERS[family]))
    check_against_vectors(header, for_vectors(header, context=256))


@pytest.mark.usefixtures("_no_memory_of_loads")
def test_an_encoder_without_flash_attention_takes_what_was_estimated(tmp_path: Path) -> None:
    header = read_header(write_encoder(tmp_path / "model.gguf", ENCODERS["narrow"]))
    check_against_vectors(header, for_vectors(header, context=512, flash_attention="off"))


@pytest.mark.usefixtures("_no_memory_of_loads")
@pytest.mark.parametrize("options", [{"context": 256, "parallel": 2}, {"context": 128, "pooling": "last"}])
def test_a_decoder_that_makes_vectors_takes_what_was_estimated(starter_model: Path, options: dict[str, Any]) -> None:
    header = read_header(starter_model)
    check_against_vectors(header, for_vectors(header, **options))


@pytest.mark.usefixtures("_no_memory_of_loads")
@pytest.mark.parametrize("shape", [replace(GROUPED, layers=4, tokens=64_000), replace(SLIDING, layers=6)])
def test_other_decoders_that_make_vectors_take_what_was_estimated(shape: Shape, tmp_path: Path) -> None:
    header = read_header(write_model(tmp_path / "model.gguf", shape))
    check_against_vectors(header, for_vectors(header, context=256, parallel=4))


@pytest.mark.usefixtures("_no_memory_of_loads")
def test_the_buffer_for_a_step_of_texts_is_the_one_that_llama_cpp_reserves(tmp_path: Path) -> None:
    cases: list[tuple[GGUFHeader, LoadParams]] = []
    for name, shape in ENCODERS.items():
        header = read_header(write_encoder(tmp_path / f"{name}.gguf", shape, hollow=True))
        settings = ({}, {"context": 2048, "batch": 2048}, {"flash_attention": "off"})
        cases += [(header, for_vectors(header, **changes)) for changes in settings]
    for name in ("dense", "grouped", "sliding"):
        header = read_header(write_model(tmp_path / f"{name}.gguf", FAMILIES[name], hollow=True))
        cases += [(header, for_vectors(header, context=1024)), (header, for_vectors(header, parallel=30))]
    reserved = run("reserve", *(params for _, params in cases))
    for (header, params), size in zip(cases, reserved, strict=True):
        model, step = read_layers(header), memory.Estimation(header, params, 1)._step
        embeddings = step.tokens * model.width * 4
        computed = step_buffer(model, model.layers, step, logits=header.remembers) + embeddings
        assert computed == pytest.approx(size, rel=0.15), (header.architecture, params)


# ---- weights -----------------------------------------------------------------------------------------------------


def test_layers_on_a_gpu_are_not_in_main_memory(tmp_path: Path) -> None:
    header = hollow(tmp_path, replace(DENSE, type=Q8_0))
    params = loading(header.path)
    everything = estimate(header, params, 0).weights
    assert everything.device == 0
    sizes = {tensor.name: tensor.size for tensor in header.tensors}
    output = sizes["output.weight"] + sizes["output_norm.weight"]
    assert estimate(header, params, 1).weights.device == output  # llama.cpp counts the output as the last layer
    layer = sum(size for name, size in sizes.items() if name.startswith("blk.7."))
    assert estimate(header, params, 2).weights.device == output + layer
    assert estimate(header, params, 9).weights == Footprint(
        sizes["token_embd.weight"], sum(sizes.values()) - sizes["token_embd.weight"]
    )


def test_embeddings_that_are_the_output_too_are_on_both_sides(tmp_path: Path) -> None:
    header = hollow(tmp_path, SLIDING)
    embedding = next(tensor.size for tensor in header.tensors if tensor.name == "token_embd.weight")
    assert estimate(header, loading(header.path), 19).weights.host == embedding
    assert estimate(header, loading(header.path), 19).weights.device == sum(tensor.size for tensor in header.tensors)


def test_weights_that_are_put_in_another_order_stay_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = hollow(tmp_path, replace(DENSE, type=Q4_0, embedding_type=Q8_0))
    plain = sum(tensor.size for tensor in header.tensors)
    matrices = sum(tensor.size for tensor in header.tensors if tensor.type_name == "Q4_0")
    last = sum(tensor.size for tensor in header.tensors[-3:])  # behind the last that is used in place
    for features, mapped in ((set(), plain), ({"avx2"}, plain + matrices - last), ({"dotprod"}, plain + 2 * matrices)):
        monkeypatch.setattr(memory, "cpu_features", lambda features=frozenset(features): features)
        if features == {"dotprod"}:  # there Q8_0 is, too: the embeddings only as the output
            output = next(tensor.size for tensor in header.tensors if tensor.name == "output.weight")
            mapped = plain + matrices + output - last
        assert estimate(header, loading(header.path)).weights.host == mapped
        assert estimate(header, loading(header.path, mmap=False)).weights.host == plain


def test_every_file_of_a_split_model_is_mapped(tmp_path: Path) -> None:
    whole = write_model(tmp_path / "model.gguf", Shape(layers=1, tokens=512))
    header = read_header(whole)
    for count in (2, 5, len(header.tensors)):  # in the end each file has one tensor, which begins at 0
        split = read_header(split_gguf(whole, tmp_path / str(count), "model", count)[0])
        assert len(split.tensors_by_file[0]) == -(-len(header.tensors) // count)
        assert sum(map(len, split.tensors_by_file)) == len(header.tensors)
        assert estimate(split, loading(whole)).weights == estimate(header, loading(whole)).weights


def test_adapters_take_as_much_as_their_files_and_some_for_each_change(tmp_path: Path) -> None:
    header = hollow(tmp_path, DENSE)
    path = random_lora(shapes_of(header.tensors, "attn_q.weight")).write(tmp_path / "style.gguf")
    (tmp_path / "damaged.gguf").write_bytes(b"?")
    adapters = tuple(Adapter(name, str(tmp_path / f"{name}.gguf")) for name in ("style", "gone"))
    size, changes = path.stat().st_size, 8 * memory._PAIR
    with_them = estimate(header, loading(header.path, adapters=adapters), 9).weights
    assert with_them - estimate(header, loading(header.path), 9).weights == Footprint(changes, size)
    here = estimate(header, loading(header.path, adapters=adapters))
    without = estimate(header, loading(header.path))
    more = 8 * memory._PAIR_AT_WORK  # once it is used
    assert here.total == without.total + Footprint(size + changes + more)
    assert here.later == without.later + Footprint(more)
    damaged = (Adapter("damaged", str(tmp_path / "damaged.gguf")),)
    assert estimate(header, loading(header.path, adapters=damaged)).total.host > 0


def test_many_small_adapters_take_what_was_estimated(starter_model: Path, tmp_path: Path) -> None:
    header = read_header(starter_model)
    shapes = shapes_of(header.tensors)
    paths = [random_lora(shapes, rank=1, seed=seed).write(tmp_path / f"{seed}.gguf") for seed in range(32)]
    for count in (8, 32):
        params = loading(starter_model, adapters=tuple(Adapter(path.stem, str(path)) for path in paths[:count]))
        measured, estimated = run("load", params), estimate(header, params)
        assert estimated.total.host == pytest.approx(measured["used"], rel=0.1)
        assert (estimated.total - estimated.later).host == pytest.approx(measured["loaded"], rel=0.1)


@pytest.mark.parametrize("kind", [Q4_0, Q4_K])
def test_a_file_that_is_read_is_in_memory_once(kind: int, tmp_path: Path) -> None:
    header = read_header(write_model(tmp_path / "model.gguf", replace(DENSE, type=kind, embedding_type=Q8_0)))
    check_against_a_load(header, loading(header.path, mmap=False))


# ---- cache -------------------------------------------------------------------------------------------------------


def cache(header: GGUFHeader, **changes: Any) -> int:
    return estimate(header, loading(header.path, **changes)).cache.host


def test_a_cache_holds_keys_and_values_of_every_cell(tmp_path: Path) -> None:
    header = hollow(tmp_path, DENSE)
    assert cache(header) == 8 * 2048 * 2 * 1024 * 2
    assert cache(header, context=1000) == cache(header, context=1024)  # whole blocks of cells
    assert cache(header, key_type="q8_0") == 8 * 2048 * 1024 * (34 / 32 + 2)
    assert cache(header, key_type="f32", value_type="q4_0") == 8 * 2048 * 1024 * (4 + 18 / 32)
    split = {"kv_unified": False, "flash_attention": "off", "kv_cells": 4 * 1000, "context": 1000}
    assert cache(header, **split) == 4 * cache(header, context=1024)


def test_a_cache_is_where_its_layers_are_unless_it_may_not(tmp_path: Path) -> None:
    header = hollow(tmp_path, DENSE)
    whole = cache(header)
    assert estimate(header, loading(header.path), 5).cache == Footprint(whole // 2, whole // 2)
    assert estimate(header, loading(header.path, gpu_cache=False), 9).cache == Footprint(whole, 0)


def test_layers_with_a_window_keep_no_more_than_it(tmp_path: Path) -> None:
    header = hollow(tmp_path, SLIDING)
    row, full, sliding = 2 * 256 * 2, 3, 15  # every sixth layer looks back to the start
    window = 5 * 512 + 256  # of four sequences, the one to save from, and a batch
    assert cache(header, context=8192) == row * (full * 8192 + sliding * window)
    assert cache(header, context=512) == row * 18 * 512
    assert cache(header, context=8192, full_window=True) == row * 18 * 8192


def test_a_compressed_cache_has_no_values(tmp_path: Path) -> None:
    assert cache(hollow(tmp_path, LATENT)) == 4 * 2048 * (512 + 64) * 2


def test_recurrent_layers_keep_a_state_for_each_sequence(tmp_path: Path) -> None:
    state = (3 * (1536 + 2 * 128) + 128 * 1536) * 4
    header = hollow(tmp_path, RECURRENT)
    assert cache(header) == 5 * 4 * state
    assert cache(header, context=8192) == 5 * 4 * state
    assert cache(header, prefix_cache=False) == 4 * 4 * state
    assert cache(hollow(tmp_path, HYBRID)) == 5 * 3 * state + 2048 * 2 * 4 * 64 * 2
    assert cache(hollow(tmp_path, CONVOLUTIONS)) == 5 * 3 * 2 * 1024 * 4 + 2048 * 2 * 8 * 64 * 2


# ---- buffers -----------------------------------------------------------------------------------------------------


def test_without_flash_attention_the_scores_of_all_cells_are_kept(tmp_path: Path) -> None:
    header = hollow(tmp_path, DENSE)
    settings = {"context": 8192, "kv_unified": False, "parallel": 1, "batch": 512}
    slow = estimate(header, loading(header.path, flash_attention="off", **settings)).compute.host
    fast = estimate(header, loading(header.path, **settings)).compute.host
    assert slow - fast > 8192 * 512 * 16 * 4 / 2


def test_small_steps_in_a_large_batch_take_less_memory(tmp_path: Path) -> None:
    header = hollow(tmp_path, DENSE)
    large = estimate(header, loading(header.path, batch=2048)).compute.host
    assert estimate(header, loading(header.path, batch=2048, micro_batch=256)).compute.host < large / 2
    assert estimate(header, loading(header.path, batch=2048)).later.host < large


def test_every_gpu_has_buffers_of_its_own(tmp_path: Path) -> None:
    header = hollow(tmp_path, DENSE)
    one = estimate(header, loading(header.path), 9).compute
    two = estimate(header, loading(header.path), 9, devices=2).compute
    assert two == Footprint(one.host, 2 * one.device)
    assert one.host < estimate(header, loading(header.path)).compute.host


# ---- what fits ---------------------------------------------------------------------------------------------------


def test_the_largest_context_is_the_largest(tmp_path: Path) -> None:
    header = hollow(tmp_path, DENSE)
    params = loading(header.path, context=16384)
    room = estimate(header, loading(header.path, context=4096)).total
    assert largest_context(header, params, room) == 4096
    assert largest_context(header, params, room - Footprint(1)) == 3840
    assert largest_context(header, params, Footprint(100 * GIB)) == 16384
    assert largest_context(header, params, Footprint(MIB)) is None
    split = loading(header.path, context=4096, kv_cells=4 * 4096, kv_unified=False, flash_attention="off")
    assert largest_context(header, split, estimate(header, split).total - Footprint(1)) == 3840


def test_what_is_for_a_gpu_without_a_memory_of_its_own_is_in_main_memory(tmp_path: Path) -> None:
    assert claimed(Footprint(3, 5), unified=True) == Footprint(8, 5)
    assert claimed(Footprint(3, 5), unified=False) == Footprint(3, 5)
    header = hollow(tmp_path, DENSE)
    params = loading(header.path, context=16384)
    total = estimate(header, loading(header.path, context=4096), 9).total
    room = Footprint(total.host + total.device, 2 * GIB)
    assert largest_context(header, params, room, 9, unified=True) == 4096
    assert largest_context(header, params, room, 9) == 16384
    assert largest_context(header, params, room - Footprint(0, 2 * GIB - total.device + 1), 9, unified=True) == 3840


def test_a_refusal_names_the_numbers_and_a_context_that_fits(tmp_path: Path) -> None:
    header = hollow(tmp_path, DENSE)
    params = loading(header.path, context=16384)
    total = estimate(header, params).total + Footprint(64 * MIB)
    room = estimate(header, loading(header.path, context=1024)).total + Footprint(64 * MIB)
    error = insufficient("mine", header, params, total, room)
    assert (error.status, error.code) == (507, "insufficient_memory")
    assert f"mine needs {memory._rounded(total.host)} (weights 271 MB, cache 537 MB, buffers" in error.message
    assert f"models may use {memory._rounded(room.host)}" in error.message
    assert "with a context of 1024 tokens instead of 16384" in error.message
    assert error.hint is not None
    assert "context: 1024" in error.hint


def test_a_refusal_names_a_quantisation_that_fits(tmp_path: Path) -> None:
    header = hollow(tmp_path, DENSE)
    params = loading(header.path)
    total = estimate(header, params).total
    smallest = estimate(header, loading(header.path, context=256)).total
    error = insufficient("mine", header, params, total, smallest - Footprint(150 * MIB))
    assert "its Q5_K_M quantisation would" in error.message or "its Q4_K_M quantisation would" in error.message
    assert error.hint is not None
    assert "K_M file" in error.hint
    error = insufficient("mine", header, params, total, Footprint(20 * MIB))
    assert "No context and no quantisation" in error.message


def test_a_refusal_for_a_gpu_names_both_memories(tmp_path: Path) -> None:
    header = hollow(tmp_path, DENSE)
    params = loading(header.path, context=16384, gpu_layers=9)
    error = insufficient("mine", header, params, estimate(header, params, 9).total, Footprint(GIB, 700 * MIB))
    assert "of GPU memory" in error.message
    assert "would fit with a context of" in error.message


def test_a_refusal_counts_every_gpu(tmp_path: Path) -> None:
    header = hollow(tmp_path, DENSE)
    params = loading(header.path, context=16384, gpu_layers=9)
    room = estimate(header, loading(header.path, context=1024), 9, devices=3).total
    error = insufficient("mine", header, params, estimate(header, params, 9, 3).total, room, 3)
    assert "with a context of 1024 tokens" in error.message


def test_a_header_that_says_little_has_an_estimate(tmp_path: Path) -> None:
    header = hollow(tmp_path, DENSE)
    bare = {key: value for key, value in header.metadata.items() if "attention" not in key and "block" not in key}
    poor = replace(header, metadata=bare)
    assert estimate(poor, loading(header.path), 3).total.host > 0
    assert estimate(replace(poor, tensors=()), loading(header.path)).total.host > 0
