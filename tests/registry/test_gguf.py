"""The GGUF reader: the real starter file, every kind of damage, and what llama.cpp must not be given."""

from __future__ import annotations

import contextlib
import os
import random
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf_writer import (
    BOOL,
    F16,
    F32,
    FLOAT32,
    INT32,
    Q4_0,
    Q8_0,
    STRING,
    UINT8,
    UINT16,
    UINT64,
    Array,
    File,
    Raw,
    Tensor,
    Value,
    tiny_llama,
    tiny_llama_metadata,
    tiny_llama_tensors,
)
from hypothesis import HealthCheck, given, settings, strategies as st

from llamaserve.errors import GGUFError, LlamaserveError, ModelFileMissing
from llamaserve.registry.gguf import GGUFArray, GGUFHeader, ValueType, read_container, read_header
from llamaserve.registry.loadable import check_loadable

Write = Callable[[bytes], Path]
NAN, INF = float("nan"), float("inf")
MINIMAL = {"general.architecture": "llama"}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(data: bytes) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(data)
        return path

    return write


def refused(path: Path) -> str:
    with pytest.raises(GGUFError) as caught:
        read_header(path)
    assert str(path) in caught.value.message
    return caught.value.message


# ---- the real file


@pytest.fixture(scope="module")
def starter(starter_model: Path) -> GGUFHeader:
    return read_header(starter_model)


def test_starter_model_values(starter: GGUFHeader) -> None:
    assert starter.version == 3
    assert starter.architecture == "llama"
    assert starter.name == "Smollm2 135M 8k Lc100K Mix1 Ep2"
    assert (starter.context_length, starter.block_count, starter.embedding_length) == (8192, 30, 576)
    assert starter.parameter_count == 134_515_008
    assert starter.data_offset + sum(tensor.size for tensor in starter.tensors) == starter.file_size
    assert starter.quantisation == "Q4_1"
    assert (starter.split_count, starter.pooling_type, starter.is_embedding_model) == (1, None, False)
    assert len(starter.tensors) == 272
    assert starter.tensors[0].name == "token_embd.weight"
    assert starter.tensors[0].shape == (576, 49152)


def test_starter_model_vocabulary(starter: GGUFHeader) -> None:
    assert starter.vocabulary_size == 49152
    assert (starter.bos_token, starter.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert starter.token_text(0) == "<|endoftext|>"
    assert starter.token_text(49152) is None
    assert starter.read_array("tokenizer.ggml.tokens", 3) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert starter.chat_template is not None
    assert "<|im_start|>" in starter.chat_template


def test_starter_model_is_loadable(starter: GGUFHeader) -> None:
    check_loadable(starter)


def test_reading_keeps_no_vocabulary_in_memory(starter_model: Path) -> None:
    tracemalloc.start()
    try:
        read_header(starter_model)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5 << 20


def test_truncated_download_says_how_much_is_missing(starter_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "half.gguf"
    with starter_model.open("rb") as source:
        path.write_bytes(source.read(4 << 20))
    with pytest.raises(GGUFError, match="truncated: 4194304 of 98362432 bytes") as caught:
        read_header(path)
    assert caught.value.hint is not None
    assert "llamaserve pull" in caught.value.hint


# ---- well-formed files


def test_tiny_llama_is_loadable(write: Write) -> None:
    header = read_header(write(tiny_llama()))
    check_loadable(header)
    assert (header.bos_token, header.eos_token, header.quantisation) == ("<s>", "</s>", "F32")
    assert header.metadata["llama.rope.freq_base"] == 10000.0


@pytest.mark.parametrize("version", [2, 3])
def test_every_value_type(write: Write, version: int) -> None:
    scalars = {kind: Value(kind, 1) for kind in (*range(6), 10, 11)}
    metadata: dict[str, Any] = MINIMAL | {f"v{kind}": value for kind, value in scalars.items()}
    metadata |= {"f32": 0.5, "f64": Value(12, 0.1), "yes": True, "text": "höhe", "broken": b"a\xff"}
    metadata |= {"bools": Array(BOOL, [True, False]), "bytes": Array(UINT8, [1, 2]), "none": Array(STRING, [])}
    header = read_header(write(File(metadata, version=version).bytes()))
    assert all(header.metadata[f"v{kind}"] == 1 for kind in scalars)
    assert (header.metadata["f32"], header.metadata["f64"], header.metadata["yes"]) == (0.5, 0.1, True)
    assert (header.metadata["text"], header.metadata["broken"]) == ("höhe", "a\ufffd")
    assert header.read_array("bools") == [True, False]
    assert header.read_array("bytes", 1) == [1]
    assert header.read_array("none") == []
    array = header.metadata["bytes"]
    assert isinstance(array, GGUFArray)
    assert (array.type, array.count, array.size) == (ValueType.UINT8, 2, 2)
    with pytest.raises(KeyError):
        header.read_array("text")


def test_absent_values_are_none(write: Write) -> None:
    header = read_header(write(File(MINIMAL).bytes()))
    assert header.name is None
    assert header.context_length is None
    assert header.chat_template is None
    assert header.quantisation == "unknown"
    assert (header.bos_token, header.eos_token, header.vocabulary_size) == ("", "", 0)


@pytest.mark.parametrize(
    ("number", "label"), [(0, "F32"), (2, "Q4_0"), (15, "Q4_K_M"), (15 | 1024, "Q4_K_M"), (18, "Q6_K"), (5, "unknown")]
)
def test_quantisation_label(write: Write, number: int, label: str) -> None:
    assert read_header(write(File(MINIMAL | {"general.file_type": number}).bytes())).quantisation == label


@pytest.mark.parametrize(
    ("architecture", "pooling", "expected"),
    [("bert", None, True), ("t5encoder", None, True), ("qwen3", 3, True), ("qwen3", 0, False), ("qwen3", None, False)],
)
def test_embedding_models(write: Write, architecture: str, pooling: int | None, expected: bool) -> None:
    metadata: dict[str, Any] = {"general.architecture": architecture}
    if pooling is not None:
        metadata[f"{architecture}.pooling_type"] = pooling
    header = read_header(write(File(metadata).bytes()))
    assert header.is_embedding_model is expected
    assert header.pooling_type == pooling


def test_tensor_sizes(write: Write) -> None:
    tensors = [Tensor("a", (64, 3), Q4_0), Tensor("b", (5,), F16), Tensor("c", (), F32), Tensor("d", (32, 2, 2), Q8_0)]
    header = read_header(write(File(MINIMAL, tensors).bytes()))
    assert [tensor.size for tensor in header.tensors] == [108, 10, 4, 136]
    assert [tensor.offset for tensor in header.tensors] == [0, 128, 160, 192]
    assert header.parameter_count == 192 + 5 + 1 + 128


def test_alignment_of_the_file_is_used(write: Write) -> None:
    tensors = [Tensor("a", (1,)), Tensor("b", (1,))]
    header = read_header(write(File(MINIMAL | {"general.alignment": 256}, tensors, alignment=256).bytes()))
    assert header.data_offset % 256 == 0
    assert header.tensors[1].offset == 256


def test_large_vocabulary_is_read_quickly(write: Write) -> None:
    tokens = [f"token{number}" for number in range(250_000)]
    metadata = MINIMAL | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": [f"{t} x" for t in tokens]}
    path = write(File(metadata).bytes())
    assert read_header(path).token_text(249_999) == "token249999"


def test_ggml_agrees_on_block_sizes() -> None:
    import ctypes

    import llama_cpp

    from llamaserve.registry import gguf

    libraries = sorted((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))
    if not libraries:
        pytest.skip("this build of llama-cpp-python has no separate ggml library")
    ggml = ctypes.CDLL(str(libraries[0]))
    ggml.ggml_type_size.restype, ggml.ggml_blck_size.restype = ctypes.c_size_t, ctypes.c_int64
    for number, (label, block, size) in gguf._TENSOR_TYPES.items():
        assert (ggml.ggml_blck_size(number), ggml.ggml_type_size(number)) == (block, size), label


# ---- not a file to read


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFileMissing) as caught:
        read_header(tmp_path / "absent.gguf")
    assert caught.value.hint is not None


def test_special_files_are_refused_without_blocking(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.gguf"
    os.mkfifo(fifo)
    messages: list[str] = []
    thread = threading.Thread(target=lambda: messages.append(refused(fifo)), daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    assert "a named pipe" in messages[0]
    assert "a directory" in refused(tmp_path)
    assert "a device" in refused(Path("/dev/null"))
    (tmp_path / "link.gguf").symlink_to(fifo)
    assert "a named pipe" in refused(tmp_path / "link.gguf")


def test_unreadable_file(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tiny_llama())

    def deny(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", deny)
    assert "permission denied" in refused(path)


def test_impossible_path() -> None:
    with pytest.raises(GGUFError, match="cannot be read"):
        read_header(Path("model\0.gguf"))


FIM_NAMES = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|repo_name|>", "<|file_sep|>"]


def with_fim(tokens: list[str], types: list[int], **keys: int) -> bytes:
    """Return a file with these tokens behind two others, and these special ones by id."""
    ids = {f"tokenizer.ggml.{key}_token_id": token for key, token in keys.items()}
    vocabulary = {"tokenizer.ggml.tokens": ["a", "b", *tokens], "tokenizer.ggml.token_type": [1, 1, *types]}
    return File(MINIMAL | vocabulary | ids).bytes()


def fim_ids(header: GGUFHeader) -> list[int | None] | None:
    found = header.fim_tokens
    return found and [found.prefix, found.suffix, found.middle, found.repository, found.separator]


@pytest.mark.parametrize(
    ("names", "separator"),
    [
        (("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), "<|file_sep|>"),
        (("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), ""),
        (("<fim-prefix>", "<fim-suffix>", "<fim-middle>"), ""),
        (("<PRE>", "<SUF>", "<MID>"), ""),
        (("▁<PRE>", "▁<SUF>", "▁<MID>"), ""),
        (("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"), ""),
        (("<|prefix|>", "<|suffix|>", "<|middle|>"), ""),
        (("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"), ""),  # noqa: RUF001
    ],
)
def test_tokens_around_a_gap_are_found_by_their_names(
    write: Write, names: tuple[str, str, str], separator: str
) -> None:
    header = read_header(write(with_fim([*names, separator or "c"], [3, 4, 1, 3])))
    assert fim_ids(header) == [2, 3, 4, None, 5 if separator else None]
    assert header.fim_tokens is header.fim_tokens
    assert header.fim_tokens is not None
    assert header.fim_tokens.names == {*names, separator} - {""}


def test_tokens_around_a_gap_may_be_given_by_id(write: Write) -> None:
    ids = {"fim_pre": 4, "fim_suf": 3, "fim_mid": 2, "fim_rep": 6, "fim_sep": 5}
    others = ["1", "2", "3", "4", "5"]
    assert fim_ids(read_header(write(with_fim(FIM_NAMES, [3] * 5, **ids)))) == [4, 3, 2, 6, 5]
    assert fim_ids(read_header(write(with_fim(others, [3] * 5, prefix=4, suffix=3, middle=2)))) == [4, 3, 2, None, None]
    out_of_range = {"fim_pre": 10**6, "fim_suf": 7}
    assert fim_ids(read_header(write(with_fim(FIM_NAMES, [3] * 5, **out_of_range)))) == [2, 3, 4, 5, 6]
    code_llama = ["▁<PRE>", "▁<SUF>", "▁<MID>"]
    header = read_header(write(with_fim(code_llama, [1] * 3, prefix=2, suffix=3, middle=4)))
    assert fim_ids(header) == [2, 3, 4, None, None]
    assert header.fim_tokens is not None
    assert header.fim_tokens.names == set(code_llama)


def test_without_three_tokens_around_a_gap_there_are_none(write: Write, starter: GGUFHeader) -> None:
    assert starter.fim_tokens is None
    assert read_header(write(with_fim(FIM_NAMES[:2], [3, 3]))).fim_tokens is None
    assert read_header(write(with_fim(FIM_NAMES, [3] * 5, fim_pre=3))).fim_tokens is None
    assert read_header(write(File(MINIMAL).bytes())).fim_tokens is None
    assert read_header(write(File(MINIMAL | {"tokenizer.ggml.token_type": 3}).bytes())).fim_tokens is None


def test_tokens_around_a_gap_are_found_quickly(write: Write) -> None:
    tokens = [f"token{number}" for number in range(250_000)]
    header = read_header(write(with_fim(tokens + FIM_NAMES, [1] * 250_000 + [3] * 5)))
    start = time.perf_counter()
    assert fim_ids(header) == [250_002, 250_003, 250_004, 250_005, 250_006]
    assert time.perf_counter() - start < 2


def test_file_that_changes_after_it_was_read(write: Write) -> None:
    path = write(tiny_llama())
    header = read_header(path)
    path.write_bytes(tiny_llama()[:100])
    with pytest.raises(GGUFError, match="changed"):
        header.token_text(1)


# ---- damage


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"GG", "not a GGUF file"),
        (b"GGUF", "truncated"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"PK\x03\x04" + bytes(40), "zip archive"),
        (b"<!DOCTYPE html>", "web page"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (File(MINIMAL, version=1).bytes(), "version 1"),
        (File(MINIMAL, version=4).bytes(), "version 4"),
        (File(MINIMAL, metadata_count=2**63).bytes(), "claims 9223372036854775808 metadata entries"),
        (File(MINIMAL, metadata_count=60_000).bytes(), "truncated"),
        (File(MINIMAL, tensor_count=2**40).bytes(), "claims 1099511627776 tensors"),
        (File(MINIMAL, tensor_count=50_000).bytes(), "truncated"),
        (File({}).bytes(), "general.architecture is missing"),
        (File({"general.architecture": 3}).bytes(), "general.architecture is missing"),
        (File([("a", 1), ("a", 2)]).bytes(), "stands in it twice"),
        (File([("", 1)]).bytes(), "key is empty"),
        (File([("k" * 65_536, 1)]).bytes(), "65535 are allowed"),
        (File({"a": Raw(struct.pack("<I", 77))}).bytes() + bytes(64), "unknown type 77"),
        (File({"a": Raw(struct.pack("<IIQ", 9, 9, 0))}).bytes(), "array of arrays"),
        (File({"a": Raw(struct.pack("<IIQ", 9, 77, 0))}).bytes(), "unknown type 77"),
        (File({"a": Array(INT32, [1], count=2**61)}).bytes(), "beyond its end"),
        (File({"a": Array(STRING, ["x"], count=2**60)}).bytes(), "beyond its end"),
        (File({"a": Array(STRING, ["x"], count=99)}).bytes(), "truncated"),
        (File({"a": Raw(struct.pack("<IIQQ", 9, 8, 1, 2**64 - 1))}).bytes(), "beyond its end"),
        (File({"a": Raw(struct.pack("<IQ", 8, 2**64 - 1))}).bytes(), "beyond its end"),
        (File({"a": Raw(struct.pack("<IQ", 8, 5000))}).bytes(), "inside its metadata; at least"),
        (File(MINIMAL | {"general.alignment": 0}).bytes(), "power of two"),
        (File(MINIMAL | {"general.alignment": 48}).bytes(), "power of two"),
        (File(MINIMAL | {"general.alignment": 2**31}).bytes(), "power of two"),
        (File(MINIMAL | {"general.alignment": "32"}).bytes(), "no integer"),
    ],
)
def test_damaged_container(write: Write, data: bytes, message: str) -> None:
    assert message in refused(write(data))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([Tensor("a", (1,)), Tensor("a", (1,))], "stands in it twice"),
        ([Tensor("a" * 64, (1,))], "63 are allowed"),
        ([Tensor("a", (1, 1, 1, 1, 1))], "5 dimensions"),
        ([Tensor("a", (1,), dims=2**32 - 1)], "4294967295 dimensions"),
        ([Tensor("a", (0, 4))], "impossible shape"),
        ([Tensor("a", (2**40, 2**40), data=b"")], "impossible shape"),
        ([Tensor("a", (2**63,), data=b"")], "impossible shape"),
        ([Tensor("a", (33,), Q4_0, data=bytes(64))], "block of 32"),
        ([Tensor("a", (32,), 31, data=bytes(64))], "removed"),
        ([Tensor("a", (32,), 43, data=bytes(64))], "newer llama.cpp"),
        ([Tensor("a", (1,), offset=1)], "multiple of 32"),
        ([Tensor("a", (1,), offset=2**63)], "truncated"),
        ([Tensor("a", (1024,), data=b"")], "truncated"),
    ],
)
def test_damaged_tensor_list(write: Write, tensors: list[Tensor], message: str) -> None:
    assert message in refused(write(File(MINIMAL, tensors).bytes()))


def test_truncated_anywhere_is_refused(write: Write) -> None:
    data = tiny_llama()
    head = len(File(tiny_llama_metadata(), tiny_llama_tensors()).head())
    for length in [*range(0, head, 97), head, len(data) - 1]:
        refused(write(data[:length]))
    assert f"truncated: {len(data) - 5} of {len(data)} bytes" in refused(write(data[:-5]))


def test_absurd_counts_take_no_memory(write: Write) -> None:
    liars = [
        File(MINIMAL, metadata_count=2**62),
        File(MINIMAL, tensor_count=2**62),
        File({"a": Array(INT32, [1], count=2**62)}),
        File({"a": Array(STRING, ["x"], count=2**59)}),
        File({"a": Raw(struct.pack("<IQ", 8, 2**40))}),
    ]
    for liar in liars:
        path = write(liar.bytes())
        tracemalloc.start()
        try:
            refused(path)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 2 << 20


def test_huge_sparse_file_is_refused_quickly(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    head = File(MINIMAL | {"a": Array(STRING, [], count=2**33)}).bytes()
    path.write_bytes(head)
    os.truncate(path, 2**40)
    start = time.perf_counter()
    assert "go beyond 128 MiB" in refused(path)
    assert time.perf_counter() - start < 20


# ---- files of which nobody knows what they are for


def test_a_container_needs_no_architecture(write: Write) -> None:
    path = write(File({}, [Tensor("a", (32, 2), Q4_0)]).bytes())
    header = read_container(path)
    assert (header.architecture, header.split_count, header.file_size) == ("", 1, path.stat().st_size)
    assert [(tensor.name, tensor.shape, tensor.size) for tensor in header.tensors] == [("a", (32, 2), 36)]
    assert "general.architecture" in refused(path)


def test_a_container_may_be_any_part_and_is_read_alone(write: Write) -> None:
    split = {"split.no": Value(UINT16, 1), "split.count": Value(UINT16, 3)}
    path = write(File(MINIMAL | split, [Tensor("a", (4,))]).bytes())
    assert read_container(path).paths == (path,)
    refused(path)


@pytest.mark.parametrize("length", [1, 63, 64, 127])
def test_names_in_a_container_may_be_longer_than_in_a_model_of_texts(write: Write, length: int) -> None:
    path = write(File(MINIMAL, [Tensor("x" * length, (4,))]).bytes())
    assert [len(tensor.name) for tensor in read_container(path).tensors] == [length]
    if length <= 63:
        assert read_header(path).tensors == read_container(path).tensors
    else:
        assert f"a tensor's name of {length} bytes, of which 63 are allowed" in refused(path)


def test_a_container_is_checked_like_any_other_file(write: Write, tmp_path: Path) -> None:
    for damaged in (b"", b"GGUF", SMALL[:-1], File({}, [Tensor("x" * 128, (4,))]).bytes(), b"junk" * 10):
        path = write(damaged)
        with pytest.raises(GGUFError, match=r"model\.gguf"):
            read_container(path)
    with pytest.raises(ModelFileMissing):
        read_container(tmp_path / "absent.gguf")
    with pytest.raises(GGUFError, match="a directory"):
        read_container(tmp_path)


SMALL = File(
    MINIMAL
    | {
        "general.alignment": 32,
        "llama.block_count": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.attention.head_count_kv": [2, 2],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b", "<s>"],
        "tokenizer.ggml.bos_token_id": 2,
        "flags": Array(BOOL, [True]),
    },
    [Tensor("token_embd.weight", (32, 3), Q4_0), Tensor("output_norm.weight", (32,))],
).bytes()


@settings(max_examples=400, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    length=st.integers(0, len(SMALL)) | st.just(len(SMALL)),
    flips=st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), max_size=6),
)
def test_any_damage_is_an_error_of_ours(write: Write, length: int, flips: list[tuple[int, int]]) -> None:
    data = bytearray(SMALL)
    for position, value in flips:
        data[position] = value
    path = write(bytes(data[:length]))
    tracemalloc.start()
    try:
        with contextlib.suppress(LlamaserveError):
            read_container(path)
            header = read_header(path)
            assert len(header.bos_token) + len(header.quantisation) < 1000
            header.tokens()
            assert header.fim_tokens is None
            check_loadable(header)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 4 << 20


# ---- what llama.cpp must not see. Each of these aborted or hung it, unless marked


EXPERTS = {"llama__expert_count": 8, "llama__expert_used_count": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama__block_count": 0}, "block_count is 0"),
        ({"llama__block_count": 513}, "block_count is 513"),
        ({"llama__block_count": 10**9}, "block_count is 1000000000"),
        ({"llama__block_count": None}, "block_count is missing"),
        ({"llama__block_count": "two"}, "not an integer"),
        ({"llama__block_count": True}, "not an integer"),
        ({"llama__nextn_predict_layers": 3}, "nextn_predict_layers"),
        ({"llama__num_loops": 300}, "looped"),
        ({"llama__context_length": 0}, "context_length is 0"),
        ({"llama__attention__layer_norm_rms_epsilon": NAN}, "epsilon is nan"),
        ({"llama__attention__layer_norm_rms_epsilon": -1.0}, "epsilon is -1.0"),
        ({"llama__attention__layer_norm_rms_epsilon": -INF}, "epsilon is -inf"),
        ({"llama__attention__layer_norm_rms_epsilon": INF}, "epsilon is inf"),
        ({"llama__rope__freq_base": NAN}, "freq_base is nan"),
        ({"llama__rope__scaling__factor": NAN}, "factor is nan"),
        ({"llama__rope__scaling__type": "bogus"}, "'bogus'"),
        ({"llama__rope__scaling__type": ""}, "''"),
        ({"llama__attention__head_count_kv": [2, 0]}, "layer 1 has attention weights"),
        ({"llama__attention__head_count_kv": Array(INT32, [2] * 513)}, "513 elements"),
        ({"llama__attention__head_count": Array(FLOAT32, [2.0])}, "array of float32"),
        ({"llama__expert_count": 2}, "0 experts of 2"),
        ({"llama__expert_count": 2000, "llama__expert_used_count": 1}, "expert_count is 2000"),
        ({"llama__expert_used_count": 1}, "1 experts of 0"),
        ({"llama__expert_group_count": 1}, "in 1 groups"),
        (EXPERTS | {"llama__expert_group_count": 8}, "in 8 groups"),
        (EXPERTS | {"llama__expert_group_count": 3}, "in 3 groups"),
        (EXPERTS | {"llama__expert_group_count": 4, "llama__expert_group_used_count": 4}, "of which 4 are used"),
        ({"llama__pooling_type": 5}, "pooling_type is 5"),
        ({"llama__embedding_length_out": 2**16}, "65536 outputs"),
        ({"llama__embedding_length_out": 261}, "261 outputs"),
        ({"llama__classifier__output_labels": ["no"] * 1000}, "1000 outputs"),
        ({"tokenizer__ggml__tokens": ["<s>"] * 261}, "'<s>' is in its vocabulary twice"),
        ({"tokenizer__ggml__tokens": ["a\0b", "a\0c"]}, "'a' is in its vocabulary twice"),
        ({"tokenizer__ggml__tokens": ["", "[EMPTY_0]"]}, "'[EMPTY_0]' is in its vocabulary twice"),
        ({"tokenizer__ggml__tokens": ["", "b"]}, "lacks tokens for"),
        ({"tokenizer__ggml__tokens": Array(STRING, [])}, "vocabulary"),
        ({"tokenizer__ggml__tokens": None}, "vocabulary"),
        ({"tokenizer__ggml__tokens": [1, 2]}, "vocabulary"),
        ({"tokenizer__ggml__model": "none", "llama__vocab_size": 2**27}, "vocab_size is 134217728"),
        ({"tokenizer__ggml__model": "none"}, "no vocabulary"),
        ({"tokenizer__ggml__model": "test"}, "no vocabulary"),
        ({"tokenizer__ggml__model": "bert"}, "byte tokens"),
        ({"tokenizer__ggml__model": "gemma4", "tokenizer__ggml__bos_token_id": None}, "adds a bos token"),
        (
            {
                "tokenizer__ggml__model": "gpt2",
                "tokenizer__ggml__pre": "glm4",
                "tokenizer__ggml__bos_token_id": 2**31,
                "tokenizer__ggml__add_bos_token": True,
            },
            "adds a bos token",
        ),
        ({"general__type": "adapter"}, "a LoRA adapter"),
    ],
)
def test_check_loadable_refuses(write: Write, changes: dict[str, Any], message: str) -> None:
    header = read_header(write(tiny_llama(**changes)))
    with pytest.raises(GGUFError) as caught:
        check_loadable(header)
    assert message in caught.value.message
    assert str(header.path) in caught.value.message


@pytest.mark.parametrize(
    ("architecture", "message"),
    [("clip", "mmproj"), ("eagle3", "draft"), ("qwen3moe", "expert_count above 0"), ("llama4", "too small")],
)
def test_check_loadable_refuses_architectures(write: Write, architecture: str, message: str) -> None:
    metadata = {key.replace("llama.", f"{architecture}."): value for key, value in tiny_llama_metadata().items()}
    metadata["general.architecture"] = architecture
    header = read_header(write(File(metadata, tiny_llama_tensors()).bytes()))
    with pytest.raises(GGUFError, match=message):
        check_loadable(header)


def test_check_loadable_refuses_divisors_of_zero(write: Write) -> None:
    metadata = {key.replace("llama.", "mamba2."): value for key, value in tiny_llama_metadata().items()}
    metadata |= {"general.architecture": "mamba2", "mamba2.ssm.group_count": 0}
    with pytest.raises(GGUFError, match="group_count is 0"):
        check_loadable(read_header(write(File(metadata, tiny_llama_tensors()).bytes())))


@pytest.mark.parametrize(("index", "kind"), [(0, 9), (0, 24), (0, 26), (0, 28), (1, F16), (1, Q8_0), (3, 27)])
def test_check_loadable_refuses_tensor_types(write: Write, index: int, kind: int) -> None:
    tensors = tiny_llama_tensors()
    tensors[index] = replace(tensors[index], type=kind, data=bytes(8 * 32 * 261))
    metadata = tiny_llama_metadata()
    with pytest.raises(GGUFError, match="cannot compute with the tensor"):
        check_loadable(read_header(write(File(metadata, tensors).bytes())))


def test_check_loadable_refuses_a_file_without_weights(write: Write) -> None:
    with pytest.raises(GGUFError, match="no weights"):
        check_loadable(read_header(write(File(tiny_llama_metadata()).bytes())))


@pytest.mark.parametrize(
    "changes",
    [
        {"llama__pooling_type": 2**32 - 1},
        {"llama__attention__head_count": [4, 4]},
        {"llama__rope__scaling__type": "yarn"},
        {"tokenizer__ggml__bos_token_id": 10**6},  # llama.cpp falls back to its default
        {"general__alignment": Value(4, 32)},
        {"general__file_type": Value(UINT64, 7)},
    ],
)
def test_check_loadable_lets_others_pass(write: Write, changes: dict[str, Any]) -> None:
    check_loadable(read_header(write(tiny_llama(**changes))))


# ---- and llama.cpp itself agrees: what passes the check neither aborts nor hangs it

LOAD = """
import os, resource, sys
import llama_cpp
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
silent = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(silent, None)
llama_cpp.llama_backend_init()

def load(path):
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    if not model:
        return
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = 32
    parameters.n_threads = parameters.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model, parameters)
    tokens = (llama_cpp.llama_token * 32)()
    count = llama_cpp.llama_tokenize(llama_cpp.llama_model_get_vocab(model), b"a b\\n", 4, tokens, 32, True, True)
    if context and count > 0:
        llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, count))

for path in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        load(path)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_what_passes_does_not_abort_llama_cpp(tmp_path: Path) -> None:
    import subprocess
    import sys

    source = random.Random(1)
    names = [key.replace(".", "__") for key in tiny_llama_metadata() if key.startswith("llama.")]
    names += ["llama__expert_count", "llama__vocab_size", "llama__attention__key_length", "llama__expert_used_count"]
    values = [0, 1, 2, 3, 7, 33, 512, 513, 2**31, 2**32 - 1, NAN, -1.0, INF, "x", True, [2, 0], [1, 1]]
    passing = [tmp_path / "plain.gguf"]
    passing[0].write_bytes(tiny_llama())
    for number in range(60):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(tiny_llama(**{source.choice(names): source.choice(values)}))
        try:
            check_loadable(read_header(path))
        except GGUFError:
            continue
        passing.append(path)
    command = [sys.executable, "-c", LOAD, *map(str, passing)]
    environment = os.environ | {"GGML_NO_BACKTRACE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment, check=True)
    assert result.stdout.split() == ["0"] * len(passing)
