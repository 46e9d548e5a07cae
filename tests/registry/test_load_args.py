"""The arguments of a load: what the words of each client mean, what is refused, and that nothing else can happen."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings, strategies as st

from llamaserve.engine.params import LoadParams
from llamaserve.errors import InvalidRequest, UnsupportedParameter
from llamaserve.registry.load_args import _KEYS, LoadArgs, apply, effective, translate
from llamaserve.registry.spec import ModelSpec, RunOptions

SPEC = ModelSpec(source="file:/models/some.gguf", threads=3, kv_cells=8192, keep_alive=60.0)
PARAMS = LoadParams(
    path="/models/some.gguf",
    context=2048,
    parallel=4,
    kv_cells=4096,
    kv_unified=True,
    batch=512,
    threads=2,
    adaptive_threads=True,
    gpu_layers=0,
    flash_attention="auto",
    key_type="f16",
    value_type="f16",
    prefix_cache=True,
    spill=None,
    speculation=True,
)


def outcome(args: dict[str, Any]) -> LoadArgs | InvalidRequest:
    """Return what becomes of arguments; with what they mean, the model's options were made."""
    try:
        found = translate(args)
        options = apply(SPEC, found.overrides, found.keys)
    except InvalidRequest as error:
        return error
    assert {name: getattr(options, name) for name in found.overrides} == found.overrides
    return found


def refusal(args: dict[str, Any]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        translate(args)
    return caught.value


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({}, {}),
        ({"n_ctx": 4096}, {"context": 4096}),
        ({"ctx_size": 4096.0}, {"context": 4096}),
        ({"max_seq_len": 4096, "context": 4096}, {"context": 4096}),
        ({"n_ctx": 0, "ctx_size": 0}, {}),
        ({"n_ctx": None}, {}),
        ({"gpu_layers": -1}, {"gpu_layers": "auto"}),
        ({"n_gpu_layers": -1}, {"gpu_layers": "all"}),
        ({"n_gpu_layers": 20}, {"gpu_layers": 20}),
        ({"n_gpu_layers": 0, "cpu": True}, {"gpu_layers": "none"}),
        ({"n_gpu_layers": 7, "cpu": False}, {"gpu_layers": 7}),
        ({"gpu_layers": "all"}, {"gpu_layers": "all"}),
        ({"threads": 0}, {"threads": "auto"}),
        ({"threads": "auto"}, {"threads": "auto"}),
        ({"n_threads": 4, "threads_batch": 6}, {"threads": 4, "batch_threads": 6}),
        ({"threads_batch": 0}, {"batch_threads": None}),
        ({"n_batch": 256}, {"batch": 256}),
        ({"batch_size": 1024, "ubatch_size": 512}, {"batch": 1024, "micro_batch": 512}),
        ({"no_mmap": True, "mlock": True}, {"mmap": False, "mlock": True}),
        ({"use_mmap": False, "no_mmap": True}, {"mmap": False}),
        ({"numa": True}, {"numa": "distribute"}),
        ({"numa": False}, {"numa": "off"}),
        ({"numa": "isolate"}, {"numa": "isolate"}),
        ({"tensor_split": "60,40"}, {"tensor_split": (60.0, 40.0)}),
        ({"tensor_split": [0.6, 0.4]}, {"tensor_split": (0.6, 0.4)}),
        ({"tensor_split": ""}, {"tensor_split": ()}),
        ({"split_mode": "row"}, {"split_mode": "row"}),
        ({"split_mode": 1}, {"split_mode": "layer"}),
        ({"row_split": True}, {"split_mode": "row"}),
        ({"rope_freq_base": 500_000}, {"rope_freq_base": 500_000.0}),
        ({"rope_freq_base": 500_000, "alpha_value": 2.5}, {"rope_freq_base": 500_000.0}),
        ({"alpha_value": 1, "compress_pos_emb": 1, "rope_freq_base": 0}, {}),
        ({"alpha_value": 2, "rope_freq_base": 0}, {"rope_freq_base": 10_000 * 2 ** (64 / 63)}),
        ({"compress_pos_emb": 4, "rope_freq_scale": 0.25}, {"rope_freq_scale": 0.25}),
        ({"cache_type": "fp16"}, {"key_type": "f16", "value_type": "f16"}),
        ({"cache_type": "q8_0", "key_type": "q8_0"}, {"key_type": "q8_0", "value_type": "q8_0"}),
        ({"type_k": 8, "type_v": 2}, {"key_type": "q8_0", "value_type": "q4_0"}),
        ({"no_kv_offload": True}, {"gpu_cache": False}),
        ({"streaming_llm": True}, {"full_window": True}),
        ({"flash_attn": True}, {"flash_attention": "on"}),
        ({"flash_attention": "auto"}, {"flash_attention": "auto"}),
        ({"cache_capacity": "2GiB"}, {"spill": 2048}),
        ({"cache_capacity": "500 MiB"}, {"spill": 500}),
        ({"cache_capacity": "2GB"}, {"spill": 1908}),
        ({"cache_capacity": 1024 * 1024 + 1}, {"spill": 2}),
        ({"spill": "auto"}, {"spill": "auto"}),
        ({"threads": 0, "n_threads": 4}, {"threads": 4}),
        ({"n_threads": 4, "threads": 0}, {"threads": 4}),
        ({"threads": 0, "n_threads": 0}, {"threads": "auto"}),
        ({"ubatch_size": 256, "n_ubatch": 0}, {"micro_batch": 256}),
        ({"gpu_layers": -1, "n_gpu_layers": -1}, {"gpu_layers": "all"}),
        ({"gpu_layers": -1, "n_gpu_layers": 7}, {"gpu_layers": 7}),
        ({"gpu_layers": -1, "cpu": True}, {"gpu_layers": "none"}),
        ({"parallel": 2}, {"parallel": 2}),
        ({"kv_cells": 0, "queue": 3}, {"kv_cells": None, "queue": 3}),
        ({"keep_alive": "5m", "time_limit": 30}, {"keep_alive": 300.0, "time_limit": 30.0}),
        ({"prefix_cache": False, "speculation": False}, {"prefix_cache": False, "speculation": False}),
    ],
    ids=str,
)
def test_a_key_means_what_its_vocabulary_says(args: dict[str, Any], expected: dict[str, Any]) -> None:
    assert translate(args).overrides == expected


def test_every_option_has_a_key_of_its_own_name() -> None:
    assert {name for name in RunOptions.model_fields if name not in _KEYS[name][0]} == set()
    fields = {name for names, _ in _KEYS.values() for name in names}
    assert fields == set(RunOptions.model_fields)


def test_what_changes_nothing_is_named() -> None:
    args = {"loader": "llama.cpp", "n_ctx": 0, "llama_cpp_seed": 0, "logits_all": True, "ik": False, "mlock": False}
    assert translate(args).ignored == ("loader", "n_ctx", "llama_cpp_seed", "logits_all", "ik")
    assert translate({"alpha_value": 2, "rope_freq_base": 20_000}).ignored == ("alpha_value",)
    assert translate({"threads": 0, "n_threads": 4}).ignored == ("threads",)


@given(
    st.dictionaries(st.sampled_from(sorted(_KEYS)), st.sampled_from([0, 64, 1.0, False, "", "none", None]), max_size=6)
)
def test_every_key_is_in_force_or_named(args: dict[str, Any]) -> None:
    found = outcome(args)
    if isinstance(found, InvalidRequest):
        return
    for key, value in args.items():
        in_force = any(name in found.overrides for name in _KEYS[key][0])
        assert value is None or in_force or key in found.ignored


@pytest.mark.parametrize(
    ("args", "place", "words"),
    [
        ({"n_ctx": 63}, "args.n_ctx", "greater than or equal to 64, not 63"),
        ({"n_ctx": "4096"}, "args.n_ctx", "should be a number, not '4096'"),
        ({"n_ctx": 4096.5}, "args.n_ctx", "should be a whole number, not 4096.5"),
        ({"n_ctx": True}, "args.n_ctx", "should be a number, not True"),
        ({"n_ctx": math.inf}, "args.n_ctx", "should be a number, not inf"),
        ({"n_ctx": 10**5000}, "args.n_ctx", "should be a number, not this number"),
        ({"n_ctx": [0] * 1000}, "args.n_ctx", "not a list of 1000"),
        ({"mlock": 1}, "args.mlock", "should be true or false, not 1"),
        ({"gpu_layers": "some"}, "args.gpu_layers", "should be a number, not 'some'"),
        ({"gpu_layers": -2}, "args.gpu_layers", "not -2"),
        ({"cache_type": "q3_0"}, "args.cache_type", "'q8_0'"),
        ({"type_k": 99}, "args.type_k", "no type of a cache has the number 99"),
        ({"numa": 9}, "args.numa", "should be off, distribute"),
        ({"tensor_split": "60;40"}, "args.tensor_split", "such as 60,40, not '60;40'"),
        ({"tensor_split": [1] * 17}, "args.tensor_split", "17 devices"),
        ({"tensor_split": [-1]}, "args.tensor_split", "greater than or equal to 0"),
        ({"alpha_value": 0.5}, "args.alpha_value", "should be from 1"),
        ({"cache_capacity": "2 parsecs"}, "args.cache_capacity", "such as 2GiB"),
        ({"keep_alive": "soon"}, "args.keep_alive", "such as 15m"),
        ({"keep_alive": 10**400}, "args.keep_alive", "should be a number"),
        ({"n_ctx": 4096, "ctx_size": 8192}, "args.ctx_size", "n_ctx (4096) and ctx_size (8192) contradict each other"),
        ({"cpu": True, "n_gpu_layers": 7}, "args.n_gpu_layers", "cpu (True) and n_gpu_layers (7)"),
        ({"cache_type": "q8_0", "value_type": "f16"}, "args.value_type", "cache_type ('q8_0') and value_type ('f16')"),
        ({"no_mmap": True, "mmap": True}, "args.mmap", "contradict"),
        ({"threads": "auto", "n_threads": 4}, "args.n_threads", "threads ('auto') and n_threads (4)"),
        ({"gpu_layers": 20, "n_gpu_layers": -1}, "args.n_gpu_layers", "contradict"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, str | list) else None,
)
def test_a_mistake_is_told_with_its_place(args: dict[str, Any], place: str, words: str) -> None:
    error = refusal(args)
    assert error.param == place
    assert words in error.message


@pytest.mark.parametrize(
    "args",
    [
        {"loader": "ExLlamav3"},
        {"mmproj": "mmproj.gguf"},
        {"model_draft": "tiny.gguf"},
        {"spec_type": "ngram-simple"},
        {"cpu_moe": True},
        {"ik": True},
        {"no_mul_mat_q": True},
        {"extra_flags": "--jinja"},
        {"split_mode": "tensor"},
        {"split_mode": 3},
    ],
    ids=str,
)
def test_what_is_not_offered_is_refused(args: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        translate(args)
    (key,) = args
    assert caught.value.param == f"args.{key}"
    assert caught.value.message.startswith(f"args.{key}: ")


def test_the_neutral_values_of_what_is_not_offered_ask_for_nothing() -> None:
    args: dict[str, Any] = {
        "loader": "llama.cpp",
        "mmproj": "",
        "model_draft": "None",
        "spec_type": "none",
        "cpu_moe": False,
        "ik": False,
        "no_mul_mat_q": False,
        "extra_flags": "",
        "draft_max": 4,
        "gpu_layers_draft": 256,
    }
    found = translate(args)
    assert (found.overrides, found.ignored) == ({}, tuple(args))


def test_all_unknown_keys_are_listed_with_what_may_be_meant() -> None:
    error = refusal({"n_ctxx": 1, "n_ctx": 63, "zzz\ud800": 1, "load_in_4bit": False})
    assert error.param == "args"
    assert "'n_ctxx' (did you mean n_ctx" in error.message
    assert "'zzz\\ud800'" in error.message
    assert "'load_in_4bit'" in error.message
    many = refusal({f"key{number}": 1 for number in range(100)})
    assert "and 68 more" in many.message
    assert len(refusal({"k" * 1_000_000: 1}).message) < 200


# Anything that JSON can say, and what clients say most.
_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(10**400), max_value=10**400)
    | st.floats()
    | st.text(st.characters(), max_size=20)
    | st.sampled_from(["", "auto", "none", "2GiB", "60,40", "-1", "1e9", "٣", "\ud800", "9" * 30 + "m", "fp16", "nan"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400)
@given(st.dictionaries(st.sampled_from(sorted(_KEYS)) | st.text(max_size=8), _JSON, max_size=4))
def test_whatever_is_given_becomes_options_or_an_error_that_can_be_sent(args: dict[str, Any]) -> None:
    found = outcome(args)
    if isinstance(found, LoadArgs):
        return
    assert found.param is not None
    assert found.param.startswith("args")
    assert len(found.message) < 4000
    msgspec.json.encode(found.body())


@pytest.mark.parametrize("key", sorted(_KEYS))
@settings(max_examples=20)
@given(value=_JSON)
def test_each_key_takes_or_refuses_any_value(key: str, value: Any) -> None:
    found = outcome({key: value})
    assert isinstance(found, LoadArgs) or found.param in (f"args.{key}", "args")


# Together with models.yaml


def test_overrides_replace_what_models_yaml_says_and_nothing_else() -> None:
    found = apply(SPEC, {"context": 4096, "kv_cells": None})
    assert found == SPEC.model_copy(update={"context": 4096, "kv_cells": None})
    assert apply(SPEC, {}) == SPEC


def test_options_that_do_not_go_together_are_told_by_the_clients_word() -> None:
    found = translate({"cache_type": "q8_0", "flash_attn": False, "kv_cells": 0})
    with pytest.raises(InvalidRequest, match="q8_0 needs flash attention") as caught:
        apply(SPEC, found.overrides, found.keys)
    assert caught.value.param == "args.cache_type"


def test_an_option_of_models_yaml_that_stands_in_the_way_is_named() -> None:
    with pytest.raises(InvalidRequest, match="kv_cells does not go with these: 8192 cells cannot hold") as caught:
        apply(SPEC, {"context": 16_384})
    assert caught.value.param == "args"
    assert "give kv_cells, too" in caught.value.message


# What is in force


def test_what_is_in_force_is_told_in_our_words_and_in_those_of_clients() -> None:
    found = effective(PARAMS)
    assert (found["context"], found["ctx_size"], found["loader"]) == (2048, 2048, "llama.cpp")
    assert (found["cache_type"], found["no_mmap"], found["ubatch_size"], found["threads_batch"]) == (
        "fp16",
        False,
        512,
        2,
    )
    assert "path" not in found
    unequal = effective(msgspec.structs.replace(PARAMS, key_type="q8_0"))
    assert "cache_type" not in unequal


@given(
    context=st.integers(64, 1 << 20),
    parallel=st.integers(1, 64),
    unified=st.booleans(),
    spill=st.none() | st.integers(0, 1 << 40),
    gpu_layers=st.integers(0, 200) | st.sampled_from(["auto", "all"]),
    key_type=st.sampled_from(["f16", "q8_0", "iq4_nl"]),
    tensor_split=st.lists(st.floats(0, 100), max_size=4).map(tuple),
    truths=st.tuples(*[st.booleans()] * 4),
)
def test_what_is_in_force_can_be_asked_for(
    context: int, parallel: int, unified: bool, truths: tuple[bool, ...], **others: Any
) -> None:
    params = msgspec.structs.replace(
        PARAMS,
        context=context,
        parallel=parallel,
        kv_unified=unified,
        kv_cells=context if unified else context * parallel,
        flash_attention="on" if unified else "off",
        **dict(zip(("mmap", "mlock", "gpu_cache", "full_window"), truths, strict=True)),
        **others,
    )
    found = effective(params)
    msgspec.json.encode(found)
    options = apply(ModelSpec(source="file:some.gguf"), translate(found).overrides)
    for name in ("context", "parallel", "batch", "threads", "key_type", "mmap", "mlock", "gpu_cache", "full_window"):
        assert getattr(options, name) == getattr(params, name)
