"""Encoders that llama.cpp must not see: each of these aborted or hung it. And what passes the check does neither."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from encoder_files import ARCHITECTURES, encoder_file, small_encoder
from gguf_writer import BOOL, FLOAT32, INT32, STRING, Array

from llamaserve.engine.params import Footprint, LoadParams
from llamaserve.errors import GGUFError, ModelNotCapable
from llamaserve.registry.gguf import read_header
from llamaserve.registry.load_plan import load_params, plan_load
from llamaserve.registry.loadable import check_loadable
from llamaserve.registry.spec import ModelSpec

LENGTHS = ("arch__attention__key_length", "arch__attention__value_length")
NO_SPECIALS = dict.fromkeys(f"tokenizer__ggml__{name}_token_id" for name in ("bos", "eos", "seperator", "unknown"))
NOTHING_ADDED = dict.fromkeys((f"tokenizer__ggml__add_{name}_token" for name in ("bos", "eos", "sep")), False)
PATTERN, WINDOW = "arch__attention__sliding_window_pattern", "arch__attention__sliding_window"
ROTATED = "arch__rope__dimension_count"
LABELS = "arch__classifier__output_labels"


def check(path: Path) -> None:
    check_loadable(read_header(path))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_encoders_of_all_kinds_are_loadable(architecture: str, tmp_path: Path) -> None:
    check(encoder_file(tmp_path / "model.gguf", architecture))


def test_the_starter_embedding_model_is_loadable(embedding_model: Path) -> None:
    check(embedding_model)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("modern-bert", {"arch__attention__head_count": None}, "0 heads share 0"),
        ("modern-bert", {"arch__attention__head_count": 0}, "0 heads share 0"),
        ("neo-bert", {"arch__attention__head_count": 0}, "0 heads share 4"),
        ("modern-bert", {"arch__attention__head_count": 3}, "3 heads of 21 do not fit to the tensor"),
        ("modern-bert", {"arch__attention__head_count_kv": 0}, "4 heads share 0"),
        ("modern-bert", {"arch__attention__head_count_kv": 3}, "4 heads share 3"),
        ("modern-bert", dict.fromkeys(LENGTHS, 8), "4 heads of 8 do not fit"),
        ("modern-bert", dict.fromkeys(LENGTHS, 0), "keys and values of one length; it has key_length 0"),
        ("bert", {LENGTHS[0]: 8}, "keys and values of one length; it has key_length 8, value_length 16"),
        ("jina-bert-v2", {LENGTHS[0]: 32}, "keys and values of one length"),
        ("modern-bert", {LENGTHS[1]: 8}, "keys and values of one length"),
        ("gemma-embedding", {LENGTHS[0] + "_swa": 8}, "keys and values of one length"),
        ("nomic-bert", {"arch__attention__head_count": 64}, "of heads with 1 dimensions 1 are rotated"),
        ("nomic-bert", {ROTATED: 0}, "of heads with 16 dimensions 0 are rotated"),
        ("nomic-bert-moe", {ROTATED: 7}, "dimensions 7 are rotated"),
        ("neo-bert", {ROTATED: 18}, "dimensions 18 are rotated"),
        ("gemma-embedding", {ROTATED + "_swa": 18}, "dimensions 18 are rotated"),
        ("jina-bert-v2", {"arch__feed_forward_length": 95}, "feed_forward_length is 95, and the tensor"),
        ("jina-bert-v2", {"arch__feed_forward_length": None}, "feed_forward_length is 0"),
        ("modern-bert", {PATTERN: 0}, "3 of its 3 layers have a sliding window"),
        ("modern-bert", {PATTERN: 1}, "0 of its 3 layers"),
        ("modern-bert", {PATTERN: Array(BOOL, [True] * 3)}, "3 of its 3 layers"),
        ("gemma-embedding", {PATTERN: 1000}, "6 of its 6 layers"),
        ("gemma-embedding", {PATTERN: 1, WINDOW: 0}, "0 of its 6 layers"),
        ("gemma-embedding", {"arch__dense_2_feat_in": 1}, "dense_2_feat_in must be 64"),
        ("gemma-embedding", {"arch__dense_3_feat_out": 1}, "dense_3_feat_out must be 64"),
        ("bert", {"arch__embedding_length_out": 32}, "asks for 32 outputs"),
        ("bert", {LABELS: Array(STRING, [str(number) for number in range(65)])}, "asks for 65 outputs"),
        ("bert", {"arch__context_length": 1}, "context_length is 1; no text has room"),
        ("nomic-bert-moe", {"arch__expert_used_count": 5}, "5 experts of 4 are used"),
        ("nomic-bert-moe", {"arch__expert_count": None}, "2 experts of 0 are used"),
        ("t5encoder", {"arch__attention__relative_buckets_count": 3}, "relative_buckets_count is 3; 4 are the least"),
        ("bert", {"tokenizer__ggml__token_type": Array(INT32, [6] * 300)}, "byte tokens"),
    ],
)
def test_check_loadable_refuses(architecture: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(GGUFError) as caught:
        check(encoder_file(tmp_path / "model.gguf", architecture, **changes))
    assert message in caught.value.message


@pytest.mark.parametrize(("tokens", "missing"), [(6, "bos"), (101, "bos"), (102, "sep")])
def test_a_wordpiece_vocabulary_needs_its_special_tokens_whatever_is_added(
    tokens: int, missing: str, tmp_path: Path
) -> None:
    shape = small_encoder("bert", tokens=tokens)
    path = encoder_file(tmp_path / "model.gguf", "bert", shape=shape, **NO_SPECIALS, **NOTHING_ADDED)
    with pytest.raises(GGUFError, match=f"adds a {missing} token, which it does not have or name"):
        check(path)


def test_a_wordpiece_vocabulary_needs_a_token_for_unknown_words(tmp_path: Path) -> None:
    for tokens in (50, 110):
        shape = small_encoder("bert", tokens=tokens)
        path = encoder_file(tmp_path / "model.gguf", "bert", shape=shape, tokenizer__ggml__unknown_token_id=None)
        if tokens > 100:  # number 100 is it, where the file says nothing
            check(path)
            continue
        with pytest.raises(GGUFError, match="adds a unk token"):
            check(path)


@pytest.mark.parametrize(
    ("dense", "keys"),
    [
        ({"dense_2.weight": (64, 128), "dense_3.weight": (96, 64)}, (64, 128, 96, 64)),
        ({"dense_2.weight": (64, 32)}, (64, 32, 0, 0)),
        ({"dense_2.weight": (32, 64)}, (64, 64, 0, 0)),
    ],
)
def test_layers_behind_the_pooling_must_fit_to_each_other(
    dense: dict[str, tuple[int, ...]], keys: tuple[int, ...], tmp_path: Path
) -> None:
    names = ("dense_2_feat_in", "dense_2_feat_out", "dense_3_feat_in", "dense_3_feat_out")
    changes = {f"arch__{name}": value for name, value in zip(names, keys, strict=True)}
    with pytest.raises(GGUFError, match="dense layer"):
        check(encoder_file(tmp_path / "model.gguf", "gemma-embedding", [*dense.items()], **changes))


def test_a_t5_without_the_bias_of_its_first_layer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match=r"attn_rel_b.weight' is missing"):
        check(encoder_file(tmp_path / "model.gguf", "t5encoder", tensors={"enc.blk.0.attn_rel_b.weight": None}))


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("bert", {"arch__context_length": 2**31 - 1}),
        ("bert", {ROTATED: 7}),  # it rotates nothing
        ("bert", {"arch__embedding_length_out": 64}),
        ("bert", {"arch__attention__head_count": 64}),
        ("modern-bert", {WINDOW: 0, PATTERN: 1}),
        ("modern-bert", {WINDOW: None}),
        ("nomic-bert", {"arch__attention__causal": None}),
    ],
)
def test_check_loadable_lets_others_pass(architecture: str, changes: dict[str, Any], tmp_path: Path) -> None:
    check(encoder_file(tmp_path / "model.gguf", architecture, **changes))


# ---- and llama.cpp itself agrees

EMBED = """
import contextlib, os, resource, signal, sys
import msgspec
from llamaserve.engine import llama
from llamaserve.engine.embedder import LoadedEmbedder
from llamaserve.engine.params import Embedding, LoadParams
from llamaserve.errors import LlamaserveError

def embed(params):
    embedder = LoadedEmbedder(params, lambda fraction: True)
    if params.pooling == "rank":
        embedder.submit(1, list(embedder.encode_pairs("w1 a", ["w2", "b " * 200], truncate=True)), None)
    else:
        how = Embedding(truncate="end")
        embedder.submit(1, [embedder.encode(text, "input", how) for text in ("w1 a", "b " * 200)], how)
    while not embedder.idle:
        embedder.step()

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
llama.start_backend()
for params in msgspec.json.decode(sys.argv[1], type=list[LoadParams]):
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        with contextlib.suppress(LlamaserveError):
            embed(params)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def planned(path: Path) -> LoadParams | None:
    """Return how an encoder is loaded, if it may be."""
    try:
        header = read_header(path)
        check_loadable(header)
        spec = ModelSpec(source="file:/x.gguf", threads=1)
        return plan_load("x", header, load_params(spec, header), Footprint(1 << 40), 0).params
    except (GGUFError, ModelNotCapable):
        return None


def random_change(source: random.Random) -> dict[str, Any]:
    numbers = [0, 1, 2, 3, 4, 7, 8, 16, 64, 65, 300, 2**31 - 1, 2**31, 2**32 - 1, None, "x", True, -1.0]
    lists = [[2, 0], [4, 4], Array(BOOL, [True, False]), Array(STRING, ["a"]), Array(FLOAT32, [1.0]), []]
    keys = [*("block_count", "context_length", "embedding_length", "feed_forward_length", "pooling_type"), LABELS[6:]]
    keys += [f"attention__{name}" for name in ("head_count", "head_count_kv", "key_length", "value_length", "causal")]
    keys += [f"attention__{name}" for name in ("sliding_window", "sliding_window_pattern", "relative_buckets_count")]
    keys += ["rope__dimension_count", "moe_every_n_layers", "expert_count", "expert_used_count", "embedding_length_out"]
    names = [f"arch__{key}" for key in keys]
    names += [f"tokenizer__ggml__{name}" for name in ("token_type_count", "token_type", "scores", "model")]
    names += [*NO_SPECIALS, *NOTHING_ADDED]
    return {source.choice(names): source.choice([*numbers, *lists])}


def test_what_passes_does_not_abort_llama_cpp(tmp_path: Path) -> None:
    source = random.Random(3)
    heads = [("cls.output.weight", (64, 1))]
    paths = [encoder_file(tmp_path / f"{name}.gguf", name) for name in ARCHITECTURES]
    paths += [
        encoder_file(tmp_path / f"rank-{name}.gguf", name, heads, arch__pooling_type=4)
        for name in ("bert", "modern-bert", "neo-bert", "eurobert")
    ]
    paths += [
        encoder_file(tmp_path / f"{number}.gguf", source.choice(ARCHITECTURES), **random_change(source))
        for number in range(80)
    ]
    passing = [params for path in paths if (params := planned(path)) is not None]
    assert len(passing) > 50
    command = [sys.executable, "-c", EMBED, msgspec.json.encode(passing).decode()]
    environment = os.environ | {"GGML_NO_BACKTRACE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=110, env=environment, check=True)
    codes = dict(zip((params.path for params in passing), result.stdout.split(), strict=True))
    assert {path: code for path, code in codes.items() if code != "0"} == {}
