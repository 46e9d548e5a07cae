"""Reads the header of a GGUF file: metadata, tensor list and what they say about the model; never the weights.

The file may come from anywhere, so nothing in it is believed: every count and length is checked against the bytes that
are there before anything is read or stored, and the time and memory taken depend on the header alone. It answers
whether the container is whole; whether llama.cpp may see it is for ``loadable``. Sources: docs/gguf.md in ggml, and for
models in several files (``split.*``) llama.cpp's loader, which refuses the same.

This module knows nothing of model names, sources, chat templates' meaning or memory estimates.
"""

from __future__ import annotations

import math
import os
import shlex
import stat
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import MappingProxyType

from llamaserve.errors import GGUFError, ModelFileMissing
from llamaserve.registry.split import part_of

MAX_HEADER = 128 << 20  # bytes; the largest real ones, with a whole tokenizer.json inside, stay below 40 MB
MAX_METADATA = 65_536
MAX_TENSORS = 100_000
MAX_KEY = 65_535  # bytes
MAX_TENSOR_NAME = 63  # bytes, GGML_MAX_NAME - 1 in llama.cpp,
LONG_TENSOR_NAME = 127  # and in stable-diffusion.cpp
MAX_ALIGNMENT = 1 << 20
MAX_PARTS = 512  # files of one model; llama.cpp has all of them open at once
DEFAULT_ALIGNMENT = 32

_BLOCK = 1 << 20  # bytes read at a time
_NAMELESS = ("adapter", "imatrix", "mmproj")  # values of general.type that come without an architecture
_FETCH_AGAIN = "fetch it again with `llamaserve pull <model>`"
_NEWER = "upgrade llama-cpp-python, or choose another quantisation of this model"

Scalar = bool | int | float | str


class ValueType(IntEnum):
    """The types of metadata values, with the numbers they have in the file."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_CODES = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "?",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}
_LAYOUTS = {kind: struct.Struct("<" + code) for kind, code in _CODES.items()}
_U32, _U64 = _LAYOUTS[ValueType.UINT32], _LAYOUTS[ValueType.UINT64]

# What parts say of themselves. llama.cpp reads no other types, and of one it ends the process.
_SPLIT_TYPES = {
    "split.no": ValueType.UINT16,
    "split.count": ValueType.UINT16,
    "split.tensors.count": ValueType.INT32,
}

# ggml type number: name, elements in a block, bytes of a block (type traits in ggml.c).
_TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}
_REMOVED_TENSOR_TYPES = frozenset({4, 5, 31, 32, 33, 36, 37, 38})

# general.file_type, enum llama_ftype in llama.h.
_FILE_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4_MOE",
    39: "NVFP4",
    40: "Q1_0",
    41: "Q2_0",
}
_FILE_TYPE_GUESSED = 1024

# Architectures of llama-arch.cpp whose output is an embedding whatever the other keys say.
_EMBEDDING_ARCHITECTURES = frozenset(
    {
        "bert",
        "modern-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "neo-bert",
        "jina-bert-v2",
        "jina-bert-v3",
        "eurobert",
        "gemma-embedding",
        "t5encoder",
        "llama-embed",
    }
)
# Those of which llama.cpp keeps no cache, so that a text can only be evaluated as a whole.
_WITHOUT_CACHE = (_EMBEDDING_ARCHITECTURES - {"llama-embed"}) | {"dream", "llada", "llada-moe", "rnd1"}

# The tokens around a gap that is to be filled: the metadata keys that may have their ids (tokenizer.ggml.*_token_id),
# and what models call them, those that llama-vocab.cpp knows.
_FIM_KEYS = {
    "prefix": ("fim_pre", "prefix"),
    "suffix": ("fim_suf", "suffix"),
    "middle": ("fim_mid", "middle"),
    "repository": ("fim_rep",),
    "separator": ("fim_sep",),
}
_FIM_NAMES = {
    "prefix": (
        *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>"),  # noqa: RUF001
        *("<PRE>", "▁<PRE>", "<|code_prefix|>", "<|prefix|>"),
    ),
    "suffix": (
        *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>"),  # noqa: RUF001
        *("<SUF>", "▁<SUF>", "<|code_suffix|>", "<|suffix|>"),
    ),
    "middle": (
        *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>"),  # noqa: RUF001
        *("<MID>", "▁<MID>", "<|code_middle|>", "<|middle|>"),
    ),
    "repository": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "separator": ("<|file_sep|>",),
}

# ---- what a header is --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GGUFArray:
    """A metadata array that was skipped, not read: ``count`` elements in ``size`` bytes at ``offset`` in the file."""

    type: ValueType
    count: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: ``shape`` with the fastest dimension first, ggml's type number, ``offset`` in the weights of the file
    that it is in.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int

    @property
    def elements(self) -> int:
        """Return the number of weights."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Return the bytes that the weights take in the file, without padding."""
        _, block, size = _TENSOR_TYPES[self.type]
        return self.elements // block * size

    @property
    def type_name(self) -> str:
        """Return the ggml type's name, such as ``Q4_K``."""
        return _TENSOR_TYPES[self.type][0]


@dataclass(frozen=True, slots=True)
class FimTokens:
    """The tokens of a model that fills gaps: before the text in front of the gap, before the text behind it, and before
    its filling; and, if it knows whole repositories, before the name of one and before each of its files. ``names`` are
    the texts of all of them.
    """

    prefix: int
    suffix: int
    middle: int
    repository: int | None
    separator: int | None
    names: frozenset[str]


@dataclass(frozen=True, slots=True)
class GGUFPart:
    """A further file of a model that was split: its path, its size in bytes, and how many tensors are in it."""

    path: Path
    size: int
    tensors: int


@dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file says about itself. Arrays stay in the file and are read when asked for. Of a model in several
    files, ``path`` is the first, ``others`` are the rest, and ``file_size`` and ``tensors`` are those of all together.
    """

    path: Path
    file_size: int
    version: int
    metadata: Mapping[str, Scalar | GGUFArray]
    tensors: tuple[TensorInfo, ...]
    data_offset: int  # where the weights begin in the first file
    others: tuple[GGUFPart, ...] = ()
    types: Mapping[str, ValueType] = field(default_factory=dict)  # of the metadata's values

    @property
    def paths(self) -> tuple[Path, ...]:
        """Return all files of the model."""
        return (self.path, *(part.path for part in self.others))

    @property
    def tensors_by_file(self) -> list[tuple[TensorInfo, ...]]:
        """Return the tensors of each file."""
        counts = [part.tensors for part in self.others]
        rest = iter(self.tensors)
        return [tuple(islice(rest, count)) for count in (len(self.tensors) - sum(counts), *counts)]

    def text(self, key: str) -> str | None:
        """Return a string value; None when the key is absent or no string."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None

    def integer(self, key: str) -> int | None:
        """Return an integer value; None when the key is absent or no integer. ``{arch}`` is the architecture."""
        value = self.metadata.get(key.replace("{arch}", self.architecture))
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    @property
    def architecture(self) -> str:
        """Return llama.cpp's name of the architecture, such as ``qwen3``."""
        return self.text("general.architecture") or ""

    @property
    def name(self) -> str | None:
        """Return the model's name for humans."""
        return self.text("general.name")

    @property
    def context_length(self) -> int | None:
        """Return the context length in tokens that the model was trained with."""
        return self.integer("{arch}.context_length")

    @property
    def block_count(self) -> int | None:
        """Return the number of layers."""
        return self.integer("{arch}.block_count")

    @property
    def embedding_length(self) -> int | None:
        """Return the width of the residual stream."""
        return self.integer("{arch}.embedding_length")

    @property
    def pooling_type(self) -> int | None:
        """Return llama.cpp's pooling type (0 none, 1 mean, 2 cls, 3 last, 4 rank); None when the file names none."""
        value = self.integer("{arch}.pooling_type")
        return None if value in (-1, 2**32 - 1) else value

    @property
    def parameter_count(self) -> int:
        """Return the number of weights in all tensors."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def quantisation(self) -> str:
        """Return the label of the file's quantisation, such as ``Q4_K_M``; ``unknown`` when it names none."""
        file_type = self.integer("general.file_type")
        return "unknown" if file_type is None else _FILE_TYPES.get(file_type & ~_FILE_TYPE_GUESSED, "unknown")

    @property
    def chat_template(self) -> str | None:
        """Return the source of the default chat template."""
        return self.text("tokenizer.chat_template")

    @property
    def split_count(self) -> int:
        """Return the number of files that the model was split into; 1 for a whole model."""
        return self.integer("split.count") or 1

    @property
    def is_embedding_model(self) -> bool:
        """Return whether the model gives embeddings or scores and no text."""
        return self.architecture in _EMBEDDING_ARCHITECTURES or bool(self.pooling_type)

    @property
    def remembers(self) -> bool:
        """Return whether llama.cpp keeps a cache of what was evaluated."""
        return self.architecture not in _WITHOUT_CACHE

    @property
    def sees_whole_texts(self) -> bool:
        """Return whether a token also sees those behind it, so that a text can only be evaluated as a whole."""
        return not self.remembers or self.metadata.get(f"{self.architecture}.attention.causal") is False

    @property
    def gives_scores(self) -> bool:
        """Return whether it has a classification head as llama.cpp uses it: ``cls.output``, or ``cls`` alone if that
        has no more outputs than there are labels.
        """
        shapes = {tensor.name: tensor.shape for tensor in self.tensors}
        labels = self.metadata.get(f"{self.architecture}.classifier.output_labels")
        count = labels.count if isinstance(labels, GGUFArray) else 1
        outputs = shapes.get("cls.output.weight") or shapes.get("cls.weight") or ()
        return (outputs[1] if len(outputs) > 1 else 1 if outputs else 0) == count

    @property
    def vocabulary_size(self) -> int:
        """Return the number of tokens; 0 without a vocabulary."""
        tokens = _string_array(self, "tokenizer.ggml.tokens")
        return tokens.count if tokens else 0

    @cached_property
    def bos_token(self) -> str:
        """Return the text of the token that begins a sequence; empty when there is none."""
        return self._special_token("bos")

    @cached_property
    def eos_token(self) -> str:
        """Return the text of the token that ends a sequence; empty when there is none."""
        return self._special_token("eos")

    def _special_token(self, kind: str) -> str:
        token = self.integer(f"tokenizer.ggml.{kind}_token_id")
        return "" if token is None else self.token_text(token) or ""

    def token_text(self, token: int) -> str | None:
        """Return the text of a token as the vocabulary spells it; None when there is no such token."""
        tokens = _string_array(self, "tokenizer.ggml.tokens")
        if tokens is None or not 0 <= token < tokens.count:
            return None
        data = _read_back(self, tokens)
        start, end = next(islice(_spans(data, tokens.count, self.path), token, None))
        return data[start:end].decode(errors="replace")

    @cached_property
    def fim_tokens(self) -> FimTokens | None:
        """Return the tokens with which the model fills in the middle; None when it has not the three that it takes.
        Reads the vocabulary, which takes a tenth of a second. Raises ``GGUFError`` as ``read_array`` does.
        """
        texts = self.tokens()
        known = {name.encode() for names in _FIM_NAMES.values() for name in names}
        numbers = {text.decode(): number for number, text in enumerate(texts) if text in known}
        found = {part: self._fim_token(part, len(texts), numbers) for part in _FIM_KEYS}
        prefix, suffix, middle = found["prefix"], found["suffix"], found["middle"]
        if prefix is None or suffix is None or middle is None or prefix in (suffix, middle) or suffix == middle:
            return None
        names = frozenset(texts[number].decode(errors="replace") for number in found.values() if number is not None)
        return FimTokens(prefix, suffix, middle, found["repository"], found["separator"], names)

    def _fim_token(self, part: str, count: int, numbers: Mapping[str, int]) -> int | None:
        """Return one of the tokens: the metadata's if there is one of that number, else one with a known name. As in
        llama.cpp it may be of any type; CodeLlama's are normal ones.
        """
        for key in _FIM_KEYS[part]:
            number = self.integer(f"tokenizer.ggml.{key}_token_id")
            if number is not None and 0 <= number < count:
                return number
        return next((numbers[name] for name in _FIM_NAMES[part] if name in numbers), None)

    def tokens(self) -> list[bytes]:
        """Return the vocabulary as it is in the file; empty without one."""
        array = _string_array(self, "tokenizer.ggml.tokens")
        if array is None:
            return []
        data = _read_back(self, array)
        return [data[start:end] for start, end in _spans(data, array.count, self.path)]

    def read_array(self, key: str, limit: int | None = None) -> list[Scalar]:
        """Read an array's first ``limit`` elements from the file; all of them without a limit.

        Raises:
            KeyError: The metadata has no array of this name.
            GGUFError: The file is not the one whose header was read.
        """
        value = self.metadata[key]
        if not isinstance(value, GGUFArray):
            raise KeyError(key)
        count = value.count if limit is None else max(0, min(limit, value.count))
        data = _read_back(self, value)
        if value.type is ValueType.STRING:
            spans = islice(_spans(data, value.count, self.path), count)
            return [data[start:end].decode(errors="replace") for start, end in spans]
        return list(struct.unpack_from(f"<{count}{_CODES[value.type]}", data))


# ---- reading -----------------------------------------------------------------------------------------------------


def read_header(path: Path) -> GGUFHeader:
    """Read and check a file's header, and those of the other parts if it is the first of several; the weights' presence
    is checked, their values are not.

    Raises:
        ModelFileMissing: There is no such file, or a part is missing.
        GGUFError: It cannot be read, is no GGUF file of version 2 or 3 (little-endian), is cut short, contradicts
            itself, or is a later part.
    """
    header = read_container(path, MAX_TENSOR_NAME)
    if header.integer("split.no"):
        raise _later_part(header)
    if not header.architecture and header.text("general.type") not in _NAMELESS:
        raise GGUFError(f"{path} does not name its architecture: general.architecture is missing or no text")
    return header if header.split_count == 1 else _with_parts(header)


def read_container(path: Path, longest_name: int = LONG_TENSOR_NAME) -> GGUFHeader:
    """Read and check the header of a single file of which nobody knows what it is for: it need not name an
    architecture, and its tensors may have names of so many bytes. Raises as ``read_header`` does.
    """
    descriptor, size = _open(path)
    try:
        return _read(path, descriptor, size, longest_name)
    except OSError as error:
        raise GGUFError(f"{path} cannot be read: {error.strerror or error}") from error
    finally:
        os.close(descriptor)


def _open(path: Path) -> tuple[int, int]:
    """Open a regular file; return its descriptor and size. Neither a FIFO nor a device is waited for."""
    try:
        kind = path.stat().st_mode  # before opening: to open some devices is to operate them
        if not stat.S_ISREG(kind):
            raise GGUFError(f"{path} is {_kind_of_file(kind)}, not a GGUF file")
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelFileMissing(f"{path} does not exist", hint="fetch it with `llamaserve pull <model>`") from error
    except PermissionError as error:
        raise GGUFError(
            f"{path} cannot be read: permission denied", hint=f"chmod u+r {shlex.quote(str(path))}"
        ) from error
    except (OSError, ValueError) as error:
        raise GGUFError(f"{path} cannot be read: {error}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):  # it was replaced in between
        os.close(descriptor)
        raise GGUFError(f"{path} is {_kind_of_file(status.st_mode)}, not a GGUF file")
    return descriptor, status.st_size


def _kind_of_file(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


class _Cursor:
    """Walks forward through the header in blocks. Every step is checked against the end of the file first."""

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        self.path = path
        self.size = size
        self.part = "its first bytes"
        self._descriptor = descriptor
        self._block = b""
        self._start = 0  # of the block, in the file
        self._at = 0  # in the block

    @property
    def position(self) -> int:
        """Return how far the walk is, in bytes from the start of the file."""
        return self._start + self._at

    @property
    def remaining(self) -> int:
        """Return the bytes from here to the end of the file."""
        return self.size - self.position

    def number(self, layout: struct.Struct) -> int:
        """Read one number; floats come out as floats, whatever this annotation says."""
        if self._at + layout.size > len(self._block):
            self._fill(layout.size)
        (value,) = layout.unpack_from(self._block, self._at)
        self._at += layout.size
        return value  # type: ignore[no-any-return]

    def take(self, count: int) -> bytes:
        """Read so many bytes."""
        if self._at + count > len(self._block):
            self._fill(count)
        data = self._block[self._at : self._at + count]
        self._at += count
        return data

    def string(self, what: str, limit: int = MAX_HEADER) -> bytes:
        """Read a string: a 64-bit length, then its bytes."""
        length = self.number(_U64)
        if limit < length <= MAX_HEADER:
            raise GGUFError(f"{self.path} is damaged: {what} of {length} bytes, of which {limit} are allowed")
        return self.take(length)

    def skip(self, count: int) -> None:
        """Step over bytes without reading them."""
        self._require(count)
        self._at += count

    def skip_strings(self, count: int) -> None:
        """Step over strings, reading no more than their lengths."""
        if count * _U64.size > self.remaining:
            self._require(count * _U64.size)
        unpack, width = _U64.unpack_from, _U64.size
        block, at = self._block, self._at
        last = len(block) - width
        for _ in range(count):
            if at > last:
                self._at = at
                self._fill(width)
                block, at = self._block, self._at
                last = len(block) - width
            at += width + unpack(block, at)[0]
        self._at = at
        self._require(0)

    def _require(self, count: int) -> None:
        end = self.position + count
        if end > self.size and end - self.size <= MAX_HEADER:
            raise GGUFError(
                f"{self.path} is truncated: it ends after {self.size} bytes, inside {self.part}; "
                f"at least {end - self.size} bytes are missing",
                hint=_FETCH_AGAIN,
            )
        if end > self.size:
            raise GGUFError(
                f"{self.path} is damaged: a length in {self.part} points {end - self.size} bytes beyond its end",
                hint=_FETCH_AGAIN,
            )
        if end > MAX_HEADER:
            raise GGUFError(f"{self.path} is damaged: {self.part} go beyond {MAX_HEADER >> 20} MiB")

    def _fill(self, count: int) -> None:
        """Make the block begin here and hold at least ``count`` bytes."""
        self._require(count)
        start = self.position
        self._block = os.pread(self._descriptor, max(count, _BLOCK), start)
        self._start, self._at = start, 0
        if len(self._block) < count:  # cut while it is being read, or a filesystem that gives less than asked
            self.size = min(self.size, start + len(self._block))
            self._require(count)


def _read(path: Path, descriptor: int, size: int, longest_name: int) -> GGUFHeader:
    cursor = _Cursor(path, descriptor, size)
    version = _read_version(cursor)
    cursor.part = "its counts"
    tensor_count, metadata_count = cursor.number(_U64), cursor.number(_U64)
    cursor.part = "its metadata"
    _check_count(cursor, "metadata entries", metadata_count, MAX_METADATA, smallest=13)
    _check_count(cursor, "tensors", tensor_count, MAX_TENSORS, smallest=24)
    metadata, types = _read_metadata(cursor, metadata_count)
    alignment = _alignment(path, metadata)
    cursor.part = "its tensor list"
    tensors = _read_tensors(cursor, tensor_count, alignment, longest_name)
    data_offset = -(-cursor.position // alignment) * alignment if tensors else cursor.position
    _check_weights(path, size, data_offset, tensors)
    return GGUFHeader(path, size, version, MappingProxyType(metadata), tensors, data_offset, types=types)


def _later_part(header: GGUFHeader) -> GGUFError:
    number, part = header.integer("split.no") or 0, part_of(header.path.name)
    first = f": {header.path.with_name(part.sibling(1))}" if part else ""
    return GGUFError(
        f"{header.path} is part {number + 1} of {header.split_count} of a model", hint=f"name its first part{first}"
    )


def _with_parts(first: GGUFHeader) -> GGUFHeader:
    """Return the header of all parts together; the first has the metadata."""
    count, part = first.split_count, part_of(first.path.name)
    if not 1 <= count <= MAX_PARTS:
        raise GGUFError(f"{first.path} is damaged: it claims {count} parts; 1 to {MAX_PARTS} are possible")
    if part is None or (part.number, part.count) != (1, count):
        raise GGUFError(
            f"{first.path} is the first of {count} parts, and its name does not say so: llama.cpp finds the others by "
            f"their names, which end in -00001-of-{count:05d}.gguf and so on",
            hint="give all parts the names that they had where they came from",
        )
    _check_split_types(first)
    others: list[GGUFPart] = []
    tensors = {tensor.name: tensor for tensor in first.tensors}
    for number in range(2, count + 1):
        header = _read_part(first.path.with_name(part.sibling(number)), first, number)
        for tensor in header.tensors:
            if tensor.name in tensors:
                raise GGUFError(f"{header.path} holds the tensor {tensor.name!r}, which is in another part, too")
            tensors[tensor.name] = tensor
        if len(tensors) > MAX_TENSORS:
            raise GGUFError(f"{first.path} and its other parts hold more than {MAX_TENSORS} tensors")
        others.append(GGUFPart(header.path, header.file_size, len(header.tensors)))
    announced = first.integer("split.tensors.count")
    if announced != len(tensors):
        raise GGUFError(
            f"{first.path} and its other parts hold {len(tensors)} tensors, and it promises {announced or 'no number'} "
            "(split.tensors.count): a part is damaged, or of another model",
            hint=_FETCH_AGAIN,
        )
    return replace(
        first,
        file_size=first.file_size + sum(part.size for part in others),
        tensors=tuple(tensors.values()),
        others=tuple(others),
    )


def _check_split_types(header: GGUFHeader) -> None:
    for key, kind in _SPLIT_TYPES.items():
        found = header.types.get(key, kind)
        if found is not kind:
            raise GGUFError(
                f"{header.path} is damaged: {key} has the type {found.name}; in a part of a model it is {kind.name}",
                hint=_FETCH_AGAIN,
            )


def _read_part(path: Path, first: GGUFHeader, number: int) -> GGUFHeader:
    """Read a later part, and check that it belongs to the first as its name says."""
    count = first.split_count
    try:
        header = read_container(path, MAX_TENSOR_NAME)
    except ModelFileMissing:
        raise ModelFileMissing(f"part {number} of {count} is missing: {path}", hint=_FETCH_AGAIN) from None
    _check_split_types(header)
    said = header.integer("split.no")
    if said is None or header.split_count != count:
        what = f"part {said + 1} of {header.split_count}" if said is not None else "no part of anything"
        raise GGUFError(f"{path} is not part {number} of {count} of {first.path.name}: it says that it is {what}")
    if said != number - 1:
        raise GGUFError(
            f"{path} says that it is part {said + 1}, and by its name it is part {number}: the parts are mixed up",
            hint="give all parts the names that they had where they came from",
        )
    for key in ("split.tensors.count", "general.architecture"):
        if header.metadata.get(key, first.metadata.get(key)) != first.metadata.get(key):
            raise GGUFError(f"{path} is a part of another model than {first.path.name}: {key} is another one")
    return header


def _read_version(cursor: _Cursor) -> int:
    path = cursor.path
    if cursor.size == 0:
        raise GGUFError(f"{path} is empty", hint=_FETCH_AGAIN)
    magic = cursor.take(min(4, cursor.size))
    if magic != b"GGUF":
        raise GGUFError(f"{path} is not a GGUF file: it begins with {magic!r}{_other_format(magic)}")
    version = cursor.number(_U32)
    if version & 0xFFFF == 0 and version:
        raise GGUFError(f"{path} is a big-endian GGUF file; this server reads little-endian ones only")
    if version in (0, 1):
        raise GGUFError(
            f"{path} has GGUF version {version}, which llama.cpp no longer reads",
            hint="convert the model again with a current llama.cpp, or fetch a newer file",
        )
    if version > 3:
        raise GGUFError(f"{path} has GGUF version {version}; this server knows versions 2 and 3", hint=_NEWER)
    return version


def _other_format(magic: bytes) -> str:
    formats = {
        b"vers": ": this looks like a Git LFS pointer, not the weights themselves",
        b"PK\x03\x04": ": this looks like a PyTorch or zip archive",
        b"<!DO": ": this looks like a web page, not a model",
        b"<htm": ": this looks like a web page, not a model",
        b"lmgg": ": this looks like a ggml file, the format before GGUF (whisper.cpp still uses it)",
        b"tjgg": ": this looks like a ggjt file, a format before GGUF that llama.cpp no longer reads",
    }
    return formats.get(magic, "")


def _check_count(cursor: _Cursor, what: str, count: int, limit: int, smallest: int) -> None:
    if count > limit:
        raise GGUFError(f"{cursor.path} is damaged: it claims {count} {what}; {limit} are the most allowed")
    if count * smallest > cursor.remaining:
        raise GGUFError(
            f"{cursor.path} is truncated: it claims {count} {what}, which take at least {count * smallest} bytes; "
            f"only {cursor.remaining} bytes follow",
            hint=_FETCH_AGAIN,
        )


def _read_metadata(cursor: _Cursor, count: int) -> tuple[dict[str, Scalar | GGUFArray], dict[str, ValueType]]:
    metadata: dict[str, Scalar | GGUFArray] = {}
    types: dict[str, ValueType] = {}
    for _ in range(count):
        key = cursor.string("a metadata key", MAX_KEY).decode(errors="replace")
        if not key:
            raise GGUFError(f"{cursor.path} is damaged: a metadata key is empty")
        if key in metadata:
            raise GGUFError(f"{cursor.path} is damaged: the metadata key {key!r} stands in it twice")
        types[key] = kind = _value_type(cursor, key)
        if kind is ValueType.ARRAY:
            metadata[key] = _skip_array(cursor, key)
        elif kind is ValueType.STRING:
            metadata[key] = cursor.string(f"the value of {key!r}").decode(errors="replace")
        else:
            metadata[key] = cursor.number(_LAYOUTS[kind])
    return metadata, types


def _value_type(cursor: _Cursor, key: str) -> ValueType:
    number = cursor.number(_U32)
    try:
        return ValueType(number)
    except ValueError:
        raise GGUFError(f"{cursor.path} is damaged: the metadata key {key!r} has the unknown type {number}") from None


def _skip_array(cursor: _Cursor, key: str) -> GGUFArray:
    kind = _value_type(cursor, key)
    count = cursor.number(_U64)
    start = cursor.position
    if kind is ValueType.ARRAY:  # allowed by the format, used by nobody, refused by llama.cpp
        raise GGUFError(f"{cursor.path} cannot be read: the metadata key {key!r} is an array of arrays")
    if kind is ValueType.STRING:
        cursor.skip_strings(count)
    else:
        cursor.skip(count * _LAYOUTS[kind].size)
    return GGUFArray(kind, count, start, cursor.position - start)


def _alignment(path: Path, metadata: Mapping[str, Scalar | GGUFArray]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(value, int) or isinstance(value, bool):
        raise GGUFError(f"{path} is damaged: general.alignment is no integer")
    if not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
        raise GGUFError(f"{path} is damaged: general.alignment is {value}, not a power of two up to {MAX_ALIGNMENT}")
    return value


def _read_tensors(cursor: _Cursor, count: int, alignment: int, longest_name: int) -> tuple[TensorInfo, ...]:
    tensors: dict[str, TensorInfo] = {}
    for _ in range(count):
        tensor = _read_tensor(cursor, longest_name)
        if tensor.name in tensors:
            raise GGUFError(f"{cursor.path} is damaged: the tensor {tensor.name!r} stands in it twice")
        if tensor.offset % alignment:
            raise GGUFError(
                f"{cursor.path} is damaged: the tensor {tensor.name!r} begins at {tensor.offset}, "
                f"not at a multiple of {alignment}"
            )
        tensors[tensor.name] = tensor
    return tuple(tensors.values())


def _read_tensor(cursor: _Cursor, longest_name: int) -> TensorInfo:
    name = cursor.string("a tensor's name", longest_name).decode(errors="replace")
    where = f"{cursor.path} is damaged: the tensor {name!r}"
    dims = cursor.number(_U32)
    if dims > 4:
        raise GGUFError(f"{where} has {dims} dimensions; four are the most allowed")
    shape = tuple(cursor.number(_U64) for _ in range(dims))
    if not all(shape) or math.prod(shape) >= 2**63:
        raise GGUFError(f"{where} has the impossible shape {list(shape)}")
    kind = cursor.number(_U32)
    if kind in _REMOVED_TENSOR_TYPES:
        raise GGUFError(
            f"{cursor.path} uses a quantisation that llama.cpp has removed (ggml type {kind}, tensor {name!r})",
            hint="fetch the model's Q4_0 or Q4_K_M file instead",
        )
    if kind not in _TENSOR_TYPES:
        raise GGUFError(
            f"{cursor.path} needs a newer llama.cpp: the tensor {name!r} has the unknown ggml type {kind}", hint=_NEWER
        )
    label, block, _ = _TENSOR_TYPES[kind]
    row = shape[0] if shape else 1
    if row % block:
        raise GGUFError(f"{where} has rows of {row} weights, not a multiple of {label}'s block of {block}")
    return TensorInfo(name, shape, kind, cursor.number(_U64))


def _check_weights(path: Path, size: int, data_offset: int, tensors: Iterable[TensorInfo]) -> None:
    end = max((data_offset + tensor.offset + tensor.size for tensor in tensors), default=0)
    if end > size:
        raise GGUFError(
            f"{path} is truncated: {size} of {end} bytes are there, {end - size} bytes of its weights are missing",
            hint=_FETCH_AGAIN,
        )


def _read_back(header: GGUFHeader, array: GGUFArray) -> bytes:
    """Read an array's bytes, which ``read_header`` stepped over."""
    descriptor, size = _open(header.path)
    try:
        data = os.pread(descriptor, array.size, array.offset)
    except OSError as error:
        raise GGUFError(f"{header.path} cannot be read: {error.strerror or error}") from error
    finally:
        os.close(descriptor)
    if size != header.file_size - sum(part.size for part in header.others) or len(data) != array.size:
        raise _changed(header.path)
    return data


def _changed(path: Path) -> GGUFError:
    return GGUFError(f"{path} was changed while it was in use")


def _spans(data: bytes, count: int, path: Path) -> Iterable[tuple[int, int]]:
    """Yield where each string of an array begins and ends."""
    unpack, at, size = _U64.unpack_from, 0, len(data)
    for _ in range(count):
        start = at + 8
        if start > size:
            raise _changed(path)
        at = start + unpack(data, at)[0]
        if at > size:
            raise _changed(path)
        yield start, at


def _string_array(header: GGUFHeader, key: str) -> GGUFArray | None:
    value = header.metadata.get(key)
    return value if isinstance(value, GGUFArray) and value.type is ValueType.STRING else None
