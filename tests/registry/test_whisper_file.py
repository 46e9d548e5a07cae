"""Whisper files: what a sound one says of itself, and that whisper.cpp is never given a damaged one."""

from __future__ import annotations

import importlib.util
import math
import os
import random
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest
from gguf_writer import tiny_llama
from whisper_writer import (
    BF16,
    F16,
    F32,
    Q4_0,
    Q8_0,
    WEIGHT_TYPES,
    Tensor,
    WhisperFile,
    vocabulary,
    weights,
    whisper_file,
)

from llamaserve.errors import GGUFError, ModelFileMissing
from llamaserve.registry.whisper_file import is_whisper_file, read_whisper

Write = Callable[[bytes], Path]

SOUND = whisper_file(ftype=2002)
DATA = SOUND.bytes()
NAN, INF = float("nan"), float("inf")
ATTENTION = "encoder.blocks.0.attn.query.weight"
CHILD = Path(__file__).with_name("running_whisper.py")

needs_whisper = pytest.mark.skipif(
    importlib.util.find_spec("_pywhispercpp") is None, reason="pywhispercpp is not installed"
)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(data: bytes) -> Path:
        path = tmp_path / "model.bin"
        path.write_bytes(data)
        return path

    return write


def refused(path: Path) -> str:
    with pytest.raises(GGUFError) as caught:
        read_whisper(path)
    assert caught.value.message.startswith(f"{path} ")
    return caught.value.message.removeprefix(f"{path} ")


# ---- sound files


@pytest.mark.parametrize(("size", "bands", "languages"), [(51864, 80, 1), (51865, 80, 99), (51866, 128, 100)])
def test_a_sound_file_is_described(write: Write, size: int, bands: int, languages: int) -> None:
    file = whisper_file(n_vocab=size, n_mels=bands, n_text_layer=2, ftype=2008)
    path = write(file.bytes())
    header = read_whisper(path)
    assert (header.path, header.file_size, header.vocabulary_size) == (path, path.stat().st_size, size)
    assert (header.width, header.heads, header.text_context, header.mel_bands) == (64, 1, 64, bands)
    assert (header.audio_layers, header.text_layers, header.size_name) == (1, 2, "1+2 layers")
    assert (header.languages, header.multilingual, header.quantisation) == (languages, languages > 1, "Q5_0")
    assert header.parameter_count == sum(math.prod(tensor.shape) for tensor in file.tensors)
    assert header.weight_bytes == sum(len(weights(each.type, math.prod(each.shape))) for each in file.tensors)
    assert [(each.name, each.shape, each.type) for each in header.tensors] == [
        (each.name, each.shape, each.type) for each in file.tensors
    ]
    last = header.tensors[-1]
    assert last.offset + last.size == header.file_size


@pytest.mark.parametrize(
    ("size", "name"),
    [
        ((384, 4, 4, 80), "tiny"),
        ((512, 6, 6, 80), "base"),
        ((768, 12, 12, 80), "small"),
        ((1024, 24, 24, 80), "medium"),
        ((1280, 32, 32, 80), "large"),
        ((1280, 32, 32, 128), "large-v3"),
        ((1280, 32, 4, 128), "large-v3-turbo"),
        ((768, 12, 4, 80), "distil-small"),
        ((1280, 24, 4, 80), "24+4 layers"),
    ],
)
def test_sizes_have_the_names_that_people_use(write: Write, size: tuple[int, int, int, int], name: str) -> None:
    header = read_whisper(write(DATA))
    width, audio, text, bands = size
    header = replace(header, width=width, audio_layers=audio, text_layers=text, mel_bands=bands)
    assert replace(header, vocabulary_size=51865).size_name == name
    assert header.size_name == (name if "layers" in name else f"{name}.en")


def test_dimensions_of_one_may_be_written_or_left_out(write: Write) -> None:
    tensors = [replace(tensor, shape=(*tensor.shape, 1)) for tensor in SOUND.tensors]
    assert len(read_whisper(write(replace(SOUND, tensors=tensors).bytes())).tensors) == len(tensors)


def test_a_vocabulary_may_have_the_special_tokens_too(write: Write) -> None:
    tokens = [*vocabulary(), *(b"<|%d|>" % number for number in range(50257, 51864))]
    read_whisper(write(replace(SOUND, tokens=tokens).bytes()))
    read_whisper(write(replace(SOUND, tokens=vocabulary()[:-1]).bytes()))


def test_tensors_may_stand_in_any_order(write: Write) -> None:
    tensors = random.Random(1).sample(SOUND.tensors, len(SOUND.tensors))
    header = read_whisper(write(replace(SOUND, tensors=tensors).bytes()))
    assert [tensor.name for tensor in header.tensors] == [tensor.name for tensor in tensors]


def test_reading_keeps_neither_weights_nor_vocabulary_in_memory(write: Write) -> None:
    path = write(DATA)
    tracemalloc.start()
    try:
        read_whisper(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


# ---- other files


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (tiny_llama(), "it is a GGUF file"),
        (b"lmgg" + struct.pack("<7i", 50257, 1024, 768, 12, 12, 1, 0), "a ggml file of another kind of model"),
        (b"lmgg" + struct.pack("<i", 10) + b"silero-16k" + bytes(64), "a ggml file of another kind of model"),
        (b"PK\x03\x04" + bytes(64), "PyTorch or zip"),
        (struct.pack("<Q", 40) + b'{"weight": ', "safetensors"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"<html><body>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (bytes(100), "it begins with b'\\x00\\x00\\x00\\x00'"),
        (b"x", "it begins with b'x'"),
    ],
)
def test_another_file_is_told_by_its_first_bytes(write: Write, data: bytes, said: str) -> None:
    path = write(data)
    assert said in refused(path)
    assert not is_whisper_file(path)


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.bin")
    assert refused(tmp_path / "pipe.bin") == "is a pipe or device, not a Whisper file"
    assert refused(Path("/dev/zero")) == "is a pipe or device, not a Whisper file"
    assert refused(tmp_path) == "is a directory, not a Whisper file"
    assert "cannot be read" in refused(tmp_path / "a\0b")
    assert "cannot be read" in refused(tmp_path / ("a" * 300))
    with pytest.raises(ModelFileMissing):
        read_whisper(tmp_path / "none.bin")
    for name in ("pipe.bin", ".", "a\0b", "none.bin"):
        assert not is_whisper_file(tmp_path / name)


def test_a_damaged_whisper_file_is_still_one(write: Write) -> None:
    for data in (DATA, DATA[:1000], DATA[:20], DATA[:4] + bytes(4) + DATA[8:]):
        assert is_whisper_file(write(data))


# ---- damage


def changed(**numbers: int) -> WhisperFile:
    """The sound file, claiming other hyperparameters than it has."""
    return replace(SOUND, hyperparameters={**SOUND.hyperparameters, **numbers}, filter_shape=(80, 201))


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"n_vocab": 51863}, "n_vocab is 51863, and 51864 or 51865 or 51866 is possible"),
        ({"n_vocab": 51867}, "n_vocab is 51867"),
        ({"n_vocab": -1}, "n_vocab is -1"),
        ({"n_audio_ctx": 1499}, "n_audio_ctx is 1499, and 1500 is possible"),
        ({"n_audio_state": 0, "n_text_state": 0}, "n_audio_state is 0 and n_audio_head 1"),
        ({"n_audio_head": 0}, "n_audio_head is 0, and 1 to 32 is possible"),
        ({"n_audio_head": 2}, "n_audio_state is 64 and n_audio_head 2"),
        ({"n_text_state": 128}, "n_text_state and n_text_head are not those of its encoder"),
        ({"n_text_head": 2}, "n_text_state and n_text_head are not those of its encoder"),
        ({"n_audio_layer": 0}, "n_audio_layer is 0"),
        ({"n_audio_layer": -1}, "n_audio_layer is -1"),
        ({"n_text_layer": 33}, "n_text_layer is 33, and 1 to 32 is possible"),
        ({"n_text_ctx": 7}, "n_text_ctx is 7"),
        ({"n_text_ctx": 1 << 30}, "n_text_ctx is 1073741824"),
        ({"n_mels": 40}, "n_mels is 40, and 80 or 128 is possible"),
        ({"ftype": -1}, "ftype is -1, which no Whisper file has"),
        ({"ftype": 4}, "ftype is 4, which no Whisper file has"),
        ({"ftype": 2024}, "ftype is 2024, which no Whisper file has"),
        ({"ftype": 0}, "32 bits (F32)"),
        ({"ftype": 2}, "Q4_0 in version 0, which whisper.cpp reads wrongly"),
        ({"ftype": 1008}, "Q5_0 in version 1, which whisper.cpp reads wrongly"),
        ({"ftype": 2001}, "F16 in version 2"),
        ({"ftype": 2012}, "rows of 64 weights cannot be Q4_K, which has blocks of 256"),
        ({"ftype": 2007}, "has the ggml type 2; here it has to be 8, Q8_0"),
        ({"n_text_ctx": 65}, "'decoder.positional_embedding' has the shape [64, 64], not [64, 65]"),
        ({"n_vocab": 51865}, "'decoder.token_embedding.weight' has the shape [64, 51864], not [64, 51865]"),
        ({"n_text_layer": 2}, "24 of its 74 tensors are missing, such as 'decoder.blocks.1.attn_ln.weight'"),
    ],
)
def test_hyperparameters_that_cannot_be_are_refused(write: Write, numbers: dict[str, int], said: str) -> None:
    path = write(changed(**numbers).bytes())
    assert said in refused(path)
    assert is_whisper_file(path)


def with_filter(value: float) -> WhisperFile:
    return replace(SOUND, filters=[*SOUND.filters[:-1], value])


def with_tokens(tokens: list[bytes]) -> WhisperFile:
    return replace(SOUND, tokens=tokens)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (replace(SOUND, filter_shape=(128, 201)), "its mel filters are 128 by 201, not 80 by 201"),
        (replace(SOUND, filter_shape=(80, 200)), "80 by 200"),
        (replace(SOUND, filter_shape=(1 << 16, 1 << 16)), "65536 by 65536"),
        (replace(SOUND, filter_shape=(-1, -1)), "-1 by -1"),
        (with_filter(NAN), "not all numbers from 0 to 1"),
        (with_filter(INF), "not all numbers from 0 to 1"),
        (with_filter(-0.1), "not all numbers from 0 to 1"),
        (replace(SOUND, token_count=-5), "its vocabulary has -5 tokens; 50256 to 51864 are possible"),
        (replace(SOUND, token_count=51865), "its vocabulary has 51865 tokens"),
        (replace(SOUND, token_count=50258), "has 0 dimensions and a name of 4194304 bytes"),
        (with_tokens([]), "its vocabulary has 0 tokens"),
        (with_tokens([token.replace(b" ", b"x") for token in vocabulary()]), "no token for the space"),
        (with_tokens([*vocabulary()[:-1], bytes(257)]), "token 50256 has 257 bytes; 256 are the most allowed"),
        (with_tokens(vocabulary()[:-2]), "its vocabulary has 50255 tokens"),
    ],
)
def test_filters_and_vocabulary_are_checked(write: Write, file: WhisperFile, said: str) -> None:
    assert said in refused(write(file.bytes()))


def with_tensors(*tensors: Tensor, instead_of: str = ATTENTION) -> bytes:
    """The sound file with other tensors in the place of one."""
    found = [[*tensors] if tensor.name == instead_of else [tensor] for tensor in SOUND.tensors]
    return replace(SOUND, tensors=[tensor for each in found for tensor in each]).bytes()


def attention(**fields: object) -> Tensor:
    """The tensor that is changed, with the data of a sound one."""
    sound = Tensor(ATTENTION, (64, 64), Q4_0, weights(Q4_0, 64 * 64))
    return replace(sound, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ([], "1 of its 50 tensors are missing, such as 'encoder.blocks.0.attn.query.weight'"),
        ([attention()] * 2, "stands in it twice"),
        ([attention(name="foo")], "no tensor of a Whisper model with its layers is called 'foo'"),
        ([attention(name=ATTENTION + "\0")], "is called"),
        ([attention(name=b"\xff")], "is called '\ufffd'"),
        ([attention(name="x" * 64)], "a name of 64 bytes"),
        ([attention(name="")], "a name of 0 bytes"),
        ([attention(dims=0)], "has 0 dimensions"),
        ([attention(dims=-1)], "has -1 dimensions"),
        ([attention(dims=200)], "has 200 dimensions"),
        ([attention(shape=(64, 64, 1, 1, 1))], "has 5 dimensions"),
        ([attention(shape=(32, 128))], "has the shape [32, 128], not [64, 64]"),
        ([attention(shape=(64,))], "has the shape [64], not [64, 64]"),
        ([attention(shape=(64, 64, 1, (1 << 20) + 1))], "has the shape [64, 64, 1, 1048577]"),
        ([attention(type=20)], "has the ggml type 20; here it has to be 2, Q4_0"),
        ([attention(type=Q8_0)], "has the ggml type 8"),
        ([attention(type=-1)], "has the ggml type -1"),
        ([attention(type=1 << 30)], "has the ggml type 1073741824"),
    ],
)
def test_a_tensor_that_is_not_as_it_should_be_is_refused(write: Write, tensors: list[Tensor], said: str) -> None:
    assert said in refused(write(with_tensors(*tensors)))


@pytest.mark.parametrize(
    ("name", "kind", "wanted"),
    [
        ("encoder.conv1.weight", F32, F16),
        ("encoder.conv2.weight", BF16, F16),
        ("encoder.positional_embedding", F16, F32),
        ("decoder.ln.bias", F16, F32),
        ("decoder.token_embedding.weight", F16, Q4_0),
    ],
)
def test_a_tensor_of_another_type_than_in_its_place_is_refused(write: Write, name: str, kind: int, wanted: int) -> None:
    (tensor,) = (each for each in SOUND.tensors if each.name == name)
    message = refused(write(with_tensors(replace(tensor, type=kind), instead_of=name)))
    assert f"{name!r} has the ggml type {kind}; here it has to be {wanted}" in message


def test_the_file_ends_where_the_last_tensor_does(write: Write) -> None:
    assert "1 bytes follow its last tensor" in refused(write(DATA + b"\0"))
    assert "5000 bytes follow its last tensor" in refused(write(DATA + bytes(5000)))
    cut = refused(write(DATA[:-1]))
    assert cut.startswith(f"is truncated: it ends after {len(DATA) - 1} bytes, inside the tensor 'decoder.ln.bias'")
    assert "holds no weights" in refused(write(SOUND.header()))
    assert "1 of its 50 tensors are missing" in refused(write(DATA[: -len(SOUND.tensors[-1].bytes())]))


def test_a_file_that_is_cut_anywhere_is_refused(write: Write) -> None:
    source = random.Random(3)
    for end in (4, 12, 43, 44, 47, 48, 55, 56, len(SOUND.header()), *source.sample(range(len(DATA)), 20)):
        assert "truncated" in (message := refused(write(DATA[:end]))) or "no" in message


# ---- with whisper.cpp itself


class Child:
    """whisper.cpp in a process of its own, which may end without harm."""

    def __init__(self) -> None:
        quiet = {"OMP_WAIT_POLICY": "passive", "GGML_NO_BACKTRACE": "1"}
        command = [sys.executable, str(CHILD), "try"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **quiet}
        )

    def answer(self, path: Path) -> str:
        """Have it load a file and transcribe a second; return what came of it, nothing if that was its end."""
        to, answers = self._pipes()
        to.write(f"{path}\n")
        to.flush()
        return answers.readline().strip()

    def end(self) -> None:
        for pipe in self._pipes():
            pipe.close()
        self._process.wait()

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process.stdin, self._process.stdout


@pytest.fixture
def child() -> Iterator[Child]:
    child = Child()
    yield child
    child.end()


@needs_whisper
@pytest.mark.parametrize("file_type", sorted(set(WEIGHT_TYPES) - {0, 24}))
def test_every_type_that_is_accepted_runs(write: Write, child: Child, file_type: int) -> None:
    number = file_type if file_type == 1 else 2000 + file_type
    heads = 4 if file_type >= 10 else 1
    path = write(whisper_file(ftype=number, n_audio_state=64 * heads, n_audio_head=heads, n_text_head=heads).bytes())
    assert read_whisper(path).quantisation.startswith("FQ"[file_type > 1])
    assert child.answer(path) == "returned 0"


@needs_whisper
def test_the_most_layers_that_are_accepted_run(write: Write, child: Child) -> None:
    path = write(whisper_file(n_audio_layer=32, n_text_layer=32, ftype=2002).bytes())
    assert read_whisper(path).size_name == "32+32 layers"
    assert child.answer(path) == "returned 0"


@needs_whisper
@pytest.mark.parametrize("numbers", [{"n_text_ctx": 16}, {"n_vocab": 51866, "n_mels": 128}])
def test_the_least_and_the_largest_that_are_accepted_run(write: Write, child: Child, numbers: dict[str, int]) -> None:
    path = write(whisper_file(ftype=2002, **numbers).bytes())
    read_whisper(path)
    assert child.answer(path) == "returned 0"


@needs_whisper
def test_whatever_is_accepted_runs(write: Write, child: Child) -> None:
    source = random.Random(5)
    starts = [tensor.offset for tensor in read_whisper(write(DATA)).tensors]
    accepted = 0
    for _ in range(90):
        path = write(damage(source, starts))
        try:
            read_whisper(path)
        except GGUFError:
            continue
        accepted += 1
        assert child.answer(path) == "returned 0"
    assert 15 < accepted < 75


def damage(source: random.Random, starts: list[int]) -> bytes:
    """Return the sound file with something changed, cut out or put in: mostly where no weights are."""
    data = bytearray(DATA)
    places = (range(60), range(60, 64_000), range(64_000, starts[0]), range(len(data)))
    at = source.choice([*(source.choice(place) for place in places), source.choice(starts) - source.randrange(1, 60)])
    match source.randrange(6):
        case 0 | 1:
            data[at] ^= 1 << source.randrange(8)
        case 2:
            data[at : at + 4] = struct.pack("<I", source.choice((0, 1, 64, 1 << 31, (1 << 32) - 1)))
        case 3:
            data[at : at + 64] = source.choice((bytes(64), b"\xff" * 64))
        case 4:
            del data[at : at + source.choice((1, 4, 1000))]
        case _:
            data[at:at] = source.randbytes(source.choice((1, 4, 1000)))
    return bytes(data)
