"""Reads ggml files of Whisper models, which are whisper.cpp's, and refuses every one that it must not see.

whisper.cpp believes what it reads. Of the files that are refused here, it loads some and writes nonsense (one that is
cut short, one whose weights have another type than they claim), and most others end its process: while loading, on the
first request, or by memory that is overwritten. So the whole file is walked here as whisper.cpp walks it. Weights are
stepped over; whether they are numbers at all is not looked at, since that takes seconds and whisper.cpp survives it.
Sources: ``whisper_model_load`` and what uses its numbers in the whisper.cpp of pywhispercpp 1.5.1, tried with broken
files, and its converters and ``quantize`` for which files there are.

This module knows nothing of model names, sources or memory, and does not import whisper.cpp.
"""

from __future__ import annotations

import io
import os
import shlex
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from llamaserve.errors import GGUFError, ModelError, ModelFileMissing
from llamaserve.registry.gguf import TensorInfo

AUDIO_CONTEXT: Final = 1500  # vectors that the encoder makes of a window, which is 30 s; whisper.cpp knows no other
FREQUENCIES: Final = 201  # of the Fourier transform, half of its 400 samples and one more
MAX_LAYERS: Final = 32  # those of the largest models; with 64 in its decoder, whisper.cpp ends the process
MAX_HEADS: Final = 32  # the largest models have 20
TEXT_TOKENS: Final = 50_256  # the others are special, or empty
MAX_TOKEN: Final = 256  # bytes; the longest has 128
MAX_TENSOR_NAME: Final = 63  # bytes; GGML_MAX_NAME - 1

_MAGIC: Final = b"lmgg"
_HEAD: Final = 64  # the size of all attention heads of Whisper
_FETCH_AGAIN: Final = "fetch it again with `llamaserve pull <model>`"

# As whisper.cpp calls them, in the order of the file; and what is possible.
_HYPERPARAMETERS: Final = (
    *("n_vocab", "n_audio_ctx", "n_audio_state", "n_audio_head", "n_audio_layer"),
    *("n_text_ctx", "n_text_state", "n_text_head", "n_text_layer", "n_mels"),
)
_POSSIBLE: Final[Mapping[str, Sequence[int]]] = {
    "n_vocab": (51864, 51865, 51866),  # tokens: English only, 99 languages, and those with Cantonese
    "n_audio_ctx": (AUDIO_CONTEXT,),
    "n_audio_head": range(1, MAX_HEADS + 1),
    "n_audio_layer": range(1, MAX_LAYERS + 1),
    "n_text_ctx": range(16, 4097),  # all have 448; with less than 8, whisper.cpp writes beyond its buffers
    "n_text_layer": range(1, MAX_LAYERS + 1),
    "n_mels": (80, 128),
}
_SIGNS: Final = ("n_vocab", "n_audio_ctx", "n_mels")  # by which Whisper files are told from others with their magic
_START: Final = struct.Struct(f"<4s{len(_HYPERPARAMETERS)}i")

# File types and their ggml types. F32 is none of them: whisper.cpp's convolutions end the process over it.
_F32, _F16 = 0, 1
_FILE_TYPES: Final = {
    1: _F16,
    2: 2,  # Q4_0
    3: 3,  # Q4_1
    7: 8,  # Q8_0
    8: 6,  # Q5_0
    9: 7,  # Q5_1
    10: 10,  # Q2_K
    11: 11,  # Q3_K
    12: 12,  # Q4_K
    13: 13,  # Q5_K
    14: 14,  # Q6_K
}
_QUANTISED: Final = 2  # GGML_QNT_VERSION, in the file as thousands of the type; whisper.cpp reads older ones wrongly
_SUPERBLOCK: Final = 256  # weights of a block of the types called K

# Width, layers of encoder and decoder, and mel bands.
_SIZES: Final = {
    (384, 4, 4, 80): "tiny",
    (512, 6, 6, 80): "base",
    (768, 12, 12, 80): "small",
    (1024, 24, 24, 80): "medium",
    (1280, 32, 32, 80): "large",  # of which there are two that only their weights tell apart
    (1280, 32, 32, 128): "large-v3",
    (1280, 32, 4, 128): "large-v3-turbo",
    (768, 12, 4, 80): "distil-small",
    (1024, 24, 2, 80): "distil-medium",
    (1280, 32, 2, 80): "distil-large-v2",
    (1280, 32, 2, 128): "distil-large-v3",
}

# ---- what a file is ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WhisperHeader:
    """What a Whisper file says about itself. ``width`` is that of the residual streams, which have ``heads`` attention
    heads a layer; ``text_context`` counts the tokens of prompt and answer of one window, and ``mel_bands`` the
    frequencies that the encoder hears. The tensors' offsets begin at the start of the file.
    """

    path: Path
    file_size: int
    vocabulary_size: int
    width: int
    heads: int
    audio_layers: int
    text_layers: int
    text_context: int
    mel_bands: int
    quantisation: str
    tensors: tuple[TensorInfo, ...]

    @property
    def multilingual(self) -> bool:
        """Whether it knows more than English."""
        return self.languages > 1

    @property
    def translates(self) -> bool:
        """Whether it can translate into English. Those with fewer layers in the decoder than in the encoder are made of
        others and were taught nothing but to transcribe; asked to translate, they write the original.
        """
        return self.multilingual and self.text_layers == self.audio_layers

    @property
    def languages(self) -> int:
        """The number of languages, whisper.cpp's first so many."""
        return {51864: 1, 51865: 99, 51866: 100}[self.vocabulary_size]

    @property
    def size_name(self) -> str:
        """What models of this size are called, such as ``tiny.en`` or ``large-v3-turbo``; others by their layers."""
        name = _SIZES.get((self.width, self.audio_layers, self.text_layers, self.mel_bands))
        if name is None:
            return f"{self.audio_layers}+{self.text_layers} layers"
        return name if self.multilingual else f"{name}.en"

    @property
    def parameter_count(self) -> int:
        """The number of weights in all tensors."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def weight_bytes(self) -> int:
        """The bytes of all tensors' weights, in the file and in memory."""
        return sum(tensor.size for tensor in self.tensors)


# ---- reading -----------------------------------------------------------------------------------------------------


def is_whisper_file(path: Path) -> bool:
    """Whether a file's first bytes are those of a Whisper file, whole or not. One that can't be read is none."""
    try:
        with _open(path) as file:
            return _claims_whisper(file.read(_START.size))
    except (ModelError, OSError):
        return False


def read_whisper(path: Path) -> WhisperHeader:
    """Read and check a whole file but for the values of its weights.

    Raises:
        ModelFileMissing: There is no such file.
        GGUFError: It cannot be read, is no Whisper file, is cut short or damaged, or is one that whisper.cpp can't run.
    """
    try:
        with _open(path) as file:
            return _read(_Cursor(path, file))
    except OSError as error:
        raise GGUFError(f"{path} cannot be read: {error.strerror or error}") from error


def _open(path: Path) -> io.BufferedReader:
    """Open a regular file. Neither a FIFO nor a device is waited for."""
    try:
        _check_regular(path, path.stat())  # before opening: to open some devices is to operate them
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelFileMissing(f"{path} does not exist", hint="fetch it with `llamaserve pull <model>`") from error
    except PermissionError as error:
        raise GGUFError(
            f"{path} cannot be read: permission denied", hint=f"chmod u+r {shlex.quote(str(path))}"
        ) from error
    except ValueError as error:
        raise GGUFError(f"{path} cannot be read: {error}") from error
    try:
        _check_regular(path, os.fstat(file.fileno()))  # it may have been replaced in between
    except GGUFError:
        file.close()
        raise
    return file


def _check_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe or device"
        raise GGUFError(f"{path} is {kind}, not a Whisper file")


class _Cursor:
    """Walks forward through a file. Every step is checked against the end of it."""

    def __init__(self, path: Path, file: io.BufferedReader) -> None:
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self.part = "its first bytes"
        self._file = file

    @property
    def position(self) -> int:
        """Return how far the walk is, in bytes from the start of the file."""
        return self._file.tell()

    @property
    def remaining(self) -> int:
        """Return the bytes from here to the end of the file."""
        return self.size - self.position

    def take(self, count: int) -> bytes:
        """Read so many bytes."""
        data = self._file.read(count)
        if len(data) < count:
            raise self.truncated(count - len(data))
        return data

    def numbers(self, count: int) -> tuple[int, ...]:
        """Read so many numbers of 32 bits."""
        return struct.unpack(f"<{count}i", self.take(4 * count))

    def skip(self, count: int) -> None:
        """Step over bytes without reading them."""
        if count > self.remaining:
            raise self.truncated(count - self.remaining)
        self._file.seek(count, os.SEEK_CUR)

    def truncated(self, missing: int) -> GGUFError:
        return GGUFError(
            f"{self.path} is truncated: it ends after {self.size} bytes, inside {self.part}; at least {missing} bytes "
            "are missing",
            hint=_FETCH_AGAIN,
        )

    def damaged(self, what: str) -> GGUFError:
        return GGUFError(f"{self.path} is damaged: {what}", hint=_FETCH_AGAIN)


def _read(cursor: _Cursor) -> WhisperHeader:
    numbers = _read_hyperparameters(cursor)
    kind = _read_file_type(cursor, numbers["n_audio_state"])
    _check_filters(cursor, numbers["n_mels"])
    _check_vocabulary(cursor, numbers["n_vocab"])
    return WhisperHeader(
        path=cursor.path,
        file_size=cursor.size,
        vocabulary_size=numbers["n_vocab"],
        width=numbers["n_audio_state"],
        heads=numbers["n_audio_head"],
        audio_layers=numbers["n_audio_layer"],
        text_layers=numbers["n_text_layer"],
        text_context=numbers["n_text_ctx"],
        mel_bands=numbers["n_mels"],
        quantisation=_type_name(kind),
        tensors=_read_tensors(cursor, {wanted.name: wanted for wanted in _layout(numbers, kind)}),
    )


# ---- what stands before the tensors ------------------------------------------------------------------------------


def _claims_whisper(start: bytes) -> bool:
    """Whether bytes begin a Whisper file. Others have the same magic number, so numbers that all Whisper models have
    must follow; one of them may be damaged.
    """
    magic, *values = _START.unpack(start.ljust(_START.size, b"\0"))
    numbers = dict(zip(_HYPERPARAMETERS, values, strict=True))
    return magic == _MAGIC and sum(numbers[name] in _POSSIBLE[name] for name in _SIGNS) >= 2


def _read_hyperparameters(cursor: _Cursor) -> dict[str, int]:
    if cursor.size == 0:
        raise GGUFError(f"{cursor.path} is empty", hint=_FETCH_AGAIN)
    start = cursor.take(min(_START.size, cursor.size))
    if not _claims_whisper(start):
        raise GGUFError(f"{cursor.path} is not a Whisper file for whisper.cpp: {_other_format(start)}")
    if len(start) < _START.size:
        raise cursor.truncated(_START.size - len(start))
    numbers = dict(zip(_HYPERPARAMETERS, _START.unpack(start)[1:], strict=True))
    for name, possible in _POSSIBLE.items():
        if numbers[name] not in possible:
            raise cursor.damaged(f"{name} is {numbers[name]}, and {_spoken(possible)} is possible")
    width, heads = numbers["n_audio_state"], numbers["n_audio_head"]
    if width != _HEAD * heads:
        raise cursor.damaged(f"n_audio_state is {width} and n_audio_head {heads}; each head of Whisper has {_HEAD}")
    if (numbers["n_text_state"], numbers["n_text_head"]) != (width, heads):
        raise cursor.damaged("n_text_state and n_text_head are not those of its encoder")
    return numbers


def _spoken(possible: Sequence[int]) -> str:
    if isinstance(possible, range):
        return f"{possible.start} to {possible[-1]}"
    return " or ".join(map(str, possible))


def _other_format(start: bytes) -> str:
    formats = {
        b"GGUF": "it is a GGUF file, which is llama.cpp's format",
        b"lmgg": "it is a ggml file of another kind of model",
        b"PK\x03\x04": "this looks like a PyTorch or zip archive",
        b"vers": "this looks like a Git LFS pointer, not the weights themselves",
    }
    if start[8:10] == b'{"':
        return "this looks like a safetensors file"
    if start.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        return "this looks like a web page"
    return formats.get(start[:4], f"it begins with {start[:4]!r}")


def _read_file_type(cursor: _Cursor, width: int) -> int:
    """Return ggml's type of the matrices."""
    (number,) = cursor.numbers(1)
    version, file_type = divmod(number, 1000)
    if file_type == _F32:
        raise GGUFError(
            f"{cursor.path} holds weights of 32 bits (F32), over which whisper.cpp ends its process",
            hint="fetch or convert this model as F16 or Q8_0",
        )
    if file_type not in _FILE_TYPES:
        raise cursor.damaged(f"ftype is {number}, which no Whisper file has")
    kind = _FILE_TYPES[file_type]
    if version != (0 if kind == _F16 else _QUANTISED):
        raise cursor.damaged(
            f"ftype is {number}: {_type_name(kind)} in version {version}, which whisper.cpp reads wrongly"
        )
    if _type_name(kind).endswith("_K") and width % _SUPERBLOCK:
        raise cursor.damaged(f"rows of {width} weights cannot be {_type_name(kind)}, which has blocks of {_SUPERBLOCK}")
    return kind


def _check_filters(cursor: _Cursor, bands: int) -> None:
    cursor.part = "its mel filters"
    shape = cursor.numbers(2)
    if shape != (bands, FREQUENCIES):
        raise cursor.damaged(f"its mel filters are {shape[0]} by {shape[1]}, not {bands} by {FREQUENCIES}")
    filters = struct.unpack(f"<{bands * FREQUENCIES}f", cursor.take(4 * bands * FREQUENCIES))
    if not all(0 <= value <= 1 for value in filters):  # false for NaN, too
        raise cursor.damaged("its mel filters are not all numbers from 0 to 1")


def _check_vocabulary(cursor: _Cursor, size: int) -> None:
    """Check that all tokens of text are there; whisper.cpp makes up the others, and wants the space."""
    cursor.part = "its vocabulary"
    (count,) = cursor.numbers(1)
    if not TEXT_TOKENS <= count <= size:
        raise cursor.damaged(f"its vocabulary has {count} tokens; {TEXT_TOKENS} to {size} are possible")
    spaces = 0
    for number in range(count):
        length = int.from_bytes(cursor.take(4), "little")
        if length > MAX_TOKEN:
            raise cursor.damaged(f"token {number} has {length} bytes; {MAX_TOKEN} are the most allowed")
        spaces += cursor.take(length) == b" "
    if not spaces:
        raise cursor.damaged("its vocabulary has no token for the space")


# ---- tensors -----------------------------------------------------------------------------------------------------


def _type_name(kind: int) -> str:
    return TensorInfo("", (), kind, 0).type_name


class _Wanted(NamedTuple):
    """A tensor as whisper.cpp wants it: its shape, with the fastest dimension first, and its ggml type."""

    name: str
    shape: tuple[int, ...]
    type: int = _F32


def _layout(numbers: Mapping[str, int], matrix: int) -> Iterator[_Wanted]:
    """Yield all tensors of a model."""
    width = numbers["n_audio_state"]
    yield _Wanted("encoder.positional_embedding", (width, numbers["n_audio_ctx"]))
    for layer, channels in ((1, numbers["n_mels"]), (2, width)):
        yield _Wanted(f"encoder.conv{layer}.weight", (3, channels, width), _F16)
        yield _Wanted(f"encoder.conv{layer}.bias", (1, width))
    for layer in range(numbers["n_audio_layer"]):
        yield from _block(f"encoder.blocks.{layer}", ("attn",), width, matrix)
    yield from _norm("encoder.ln_post", width)
    yield _Wanted("decoder.positional_embedding", (width, numbers["n_text_ctx"]))
    yield _Wanted("decoder.token_embedding.weight", (width, numbers["n_vocab"]), matrix)
    for layer in range(numbers["n_text_layer"]):
        yield from _block(f"decoder.blocks.{layer}", ("attn", "cross_attn"), width, matrix)
    yield from _norm("decoder.ln", width)


def _block(name: str, attentions: Sequence[str], width: int, matrix: int) -> Iterator[_Wanted]:
    for attention in attentions:
        yield from _norm(f"{name}.{attention}_ln", width)
        for part in ("query", "key", "value", "out"):
            yield _Wanted(f"{name}.{attention}.{part}.weight", (width, width), matrix)
            if part != "key":
                yield _Wanted(f"{name}.{attention}.{part}.bias", (width,))
    yield from _norm(f"{name}.mlp_ln", width)
    for part, inputs, outputs in (("0", width, 4 * width), ("2", 4 * width, width)):
        yield _Wanted(f"{name}.mlp.{part}.weight", (inputs, outputs), matrix)
        yield _Wanted(f"{name}.mlp.{part}.bias", (outputs,))


def _norm(name: str, width: int) -> Iterator[_Wanted]:
    for part in ("weight", "bias"):
        yield _Wanted(f"{name}.{part}", (width,))


def _read_tensors(cursor: _Cursor, layout: Mapping[str, _Wanted]) -> tuple[TensorInfo, ...]:
    if not cursor.remaining:
        raise GGUFError(f"{cursor.path} holds no weights: it is cut short, or one of whisper.cpp's files for tests")
    tensors: dict[str, TensorInfo] = {}
    while len(tensors) < len(layout) and cursor.remaining:
        tensor = _read_tensor(cursor, layout)
        if tensor.name in tensors:
            raise cursor.damaged(f"the tensor {tensor.name!r} stands in it twice")
        tensors[tensor.name] = tensor
    missing = [name for name in layout if name not in tensors]
    if missing:
        raise GGUFError(
            f"{cursor.path} is truncated: {len(missing)} of its {len(layout)} tensors are missing, such as "
            f"{missing[0]!r}",
            hint=_FETCH_AGAIN,
        )
    if cursor.remaining:
        raise cursor.damaged(f"{cursor.remaining} bytes follow its last tensor")
    return tuple(tensors.values())


def _read_tensor(cursor: _Cursor, layout: Mapping[str, _Wanted]) -> TensorInfo:
    start = cursor.position
    cursor.part = f"the description of the tensor at byte {start}"
    dims, length, kind = cursor.numbers(3)
    if not (1 <= dims <= 4 and 1 <= length <= MAX_TENSOR_NAME):
        raise cursor.damaged(
            f"what should be a tensor at byte {start} has {dims} dimensions and a name of {length} bytes"
        )
    shape = cursor.numbers(dims)
    name = cursor.take(length).decode(errors="replace")
    wanted = layout.get(name)
    if wanted is None:
        raise cursor.damaged(f"no tensor of a Whisper model with its layers is called {name!r}")
    if shape + (1,) * (4 - dims) != wanted.shape + (1,) * (4 - len(wanted.shape)):
        raise cursor.damaged(f"the tensor {name!r} has the shape {list(shape)}, not {list(wanted.shape)}")
    if kind != wanted.type:
        label = _type_name(wanted.type)
        raise cursor.damaged(f"the tensor {name!r} has the ggml type {kind}; here it has to be {wanted.type}, {label}")
    tensor = TensorInfo(name, shape, kind, cursor.position)
    cursor.part = f"the tensor {name!r}"
    cursor.skip(tensor.size)
    return tensor
