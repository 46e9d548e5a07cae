"""Reads CTranslate2's model files: which variables there are, and the bytes of one.

The file may come from anywhere, so nothing in it is believed: lengths, shapes and places are checked against each other
and against the file's size before any variable is read. Source: how CTranslate2 writes and loads them
(python/ctranslate2/specs/model_spec.py and src/models/model.cc there). This module does not know what variables are
for, and needs no numpy.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, NoReturn

from llamaserve.errors import SourceError
from llamaserve.registry.safetensors import StoredTensor

VERSIONS: Final = range(4, 7)  # of the format; older ones have no types, or no aliases
MAX_VARIABLES: Final = 100_000
MAX_DIMENSIONS: Final = 8
MAX_NAME: Final = 1024  # bytes

_TYPES: Final = ("F32", "I8", "I16", "I32", "F16", "BF16")  # by their numbers in the file
_ITEM_SIZES: Final = {"F32": 4, "I8": 1, "I16": 2, "I32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class CTranslate2File:
    """A file of a model: what kind of model it says it is (``WhisperSpec``), in which revision, and its variables by
    name. Two names may stand for one variable.
    """

    path: Path
    specification: str
    revision: int
    variables: Mapping[str, StoredTensor]

    def integer(self, name: str) -> int | None:
        """Return a variable that is one integer; None for another, or if there is none."""
        variable = self.variables.get(name)
        if variable is None or variable.shape or variable.dtype not in ("I8", "I16", "I32"):
            return None
        return int.from_bytes(self.read(name, 0, variable.size), "little", signed=True)

    def read(self, name: str, start: int, size: int) -> bytes:
        """Return some of a variable's bytes, little-endian, the last dimension contiguous. Raises ``SourceError``."""
        variable = self.variables[name]
        assert 0 <= start <= start + size <= variable.size
        with self.path.open("rb") as file:
            file.seek(variable.start + start)
            data = file.read(size)
        if len(data) != size:
            raise SourceError(f"{self.path.name} is no good CTranslate2 file: the variable {name!r} is cut short")
        return data


def read_ctranslate2(path: Path) -> CTranslate2File:
    """Read and check what is in a file; the variables' bytes are there, their values are not looked at.

    Raises ``SourceError``.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            reader = _Reader(path.name, file, status.st_size)
            if not stat.S_ISREG(status.st_mode):
                reader.refuse("it is no regular file")
            return reader.whole(path)
    except OSError as error:
        raise SourceError(f"{path.name} cannot be read: {error.strerror or error}") from error


@dataclass
class _Reader:
    """Goes through a file once, from its beginning to its end."""

    name: str
    file: BinaryIO
    size: int
    position: int = 0

    def refuse(self, what: str) -> NoReturn:
        raise SourceError(f"{self.name} is no good CTranslate2 file: {what}")

    def whole(self, path: Path) -> CTranslate2File:
        version = self._integer(4)
        if version not in VERSIONS:
            self.refuse(f"version {version} of the format is not known, {VERSIONS[0]} to {VERSIONS[-1]} are")
        specification, revision = self._text(), self._integer(4)
        variables: dict[str, StoredTensor] = {}
        for _ in range(self._count("variables")):
            name = self._new_name(variables)
            variables[name] = self._variable(name)
        for _ in range(self._count("aliases")):
            name, target = self._new_name(variables), self._text()
            if target not in variables:
                self.refuse(f"{name!r} is to be {target!r}, which is not there")
            variables[name] = variables[target]
        if self.position != self.size:
            self.refuse(f"it ends at byte {self.position}, and has {self.size}")
        return CTranslate2File(path, specification, revision, variables)

    def _variable(self, name: str) -> StoredTensor:
        rank = self._integer(1)
        if rank > MAX_DIMENSIONS:
            self.refuse(f"the variable {name!r} has {rank} dimensions, and {MAX_DIMENSIONS} are the most")
        shape = tuple(self._integer(4) for _ in range(rank))
        number, size = self._integer(1), self._integer(4)
        if number >= len(_TYPES):
            self.refuse(f"the variable {name!r} is of the unknown type {number}")
        dtype, start = _TYPES[number], self.position
        needed = math.prod(shape) * _ITEM_SIZES[dtype]
        if size != needed:
            self.refuse(f"the variable {name!r} needs {needed} bytes for {dtype} in {list(shape)}, and has {size}")
        self._skip(size)
        return StoredTensor(dtype, shape, start, size)

    def _count(self, what: str) -> int:
        count = self._integer(4)
        if count > MAX_VARIABLES:
            self.refuse(f"it has {count} {what}, and {MAX_VARIABLES} are the most")
        return count

    def _new_name(self, variables: Mapping[str, StoredTensor]) -> str:
        name = self._text()
        if name in variables:
            self.refuse(f"the variable {name!r} is there twice")
        return name

    def _text(self) -> str:
        size = self._integer(2)
        if size > MAX_NAME:
            self.refuse(f"a name has {size} bytes at byte {self.position}, and {MAX_NAME} are the most")
        data = self._bytes(size)
        if not data.endswith(b"\0") or not data[:-1].isascii() or not data[:-1].decode("ascii").isprintable():
            self.refuse(f"there is no name before byte {self.position}")
        return data[:-1].decode("ascii")

    def _integer(self, size: int) -> int:
        return int.from_bytes(self._bytes(size), "little")

    def _bytes(self, size: int) -> bytes:
        start = self.position
        self._move(size)
        data = self.file.read(size)
        if len(data) != size:
            self.refuse(f"it is cut short at byte {start}")
        return data

    def _skip(self, size: int) -> None:
        self._move(size)
        self.file.seek(self.position)

    def _move(self, size: int) -> None:
        if self.position + size > self.size:
            self.refuse(f"{size} bytes are missing from byte {self.position} on, and it has {self.size}")
        self.position += size
