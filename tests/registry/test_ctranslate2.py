"""Reading CTranslate2's model files: what is written comes back, and a file that contradicts itself is refused."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st
from tiny_whisper import TYPES, Variable, entry, text, variable, write_ctranslate2

from llamaserve.errors import SourceError
from llamaserve.registry.ctranslate2 import CTranslate2File, read_ctranslate2

SIZES = {"F32": 4, "I8": 1, "I16": 2, "I32": 4, "F16": 2, "BF16": 2}
PAIR: dict[str, Variable] = {"a/b": (0, (2, 3), bytes(range(24))), "c": (4, (1,), b"\1\2")}
WHOLE = write_ctranslate2(PAIR, {"d": "a/b"})
HEAD = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<I", 3)


def read(folder: Path, data: bytes) -> CTranslate2File:
    path = folder / "model.bin"
    path.write_bytes(data)
    return read_ctranslate2(path)


@st.composite
def stored(draw: st.DrawFn) -> Variable:
    dtype, shape = draw(st.sampled_from([*SIZES])), tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    size = SIZES[dtype]
    for dimension in shape:
        size *= dimension
    return TYPES[dtype], shape, draw(st.binary(min_size=size, max_size=size))


@given(
    variables=st.dictionaries(st.from_regex(r"[a-z0-9_/]{1,20}", fullmatch=True), stored()),
    version=st.integers(4, 6),
    revision=st.integers(0, 9),
)
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, variables: dict[str, Variable], version: int, revision: int
) -> None:
    aliases = {f"{name}.again": name for name in variables}
    data = write_ctranslate2(variables, aliases, "OtherSpec", revision, version)
    file = read(tmp_path_factory.mktemp("written"), data)
    assert (file.specification, file.revision) == ("OtherSpec", revision)
    found = {
        name: (TYPES[each.dtype], each.shape, file.read(name, 0, each.size)) for name, each in file.variables.items()
    }
    assert found == variables | {alias: variables[name] for alias, name in aliases.items()}


def test_some_of_a_variable_is_read(tmp_path: Path) -> None:
    file = read(tmp_path, WHOLE)
    assert file.read("a/b", 4, 3) == file.read("d", 4, 3) == b"\4\5\6"
    (tmp_path / "model.bin").write_bytes(WHOLE[:50])
    with pytest.raises(SourceError, match="the variable 'a/b' is cut short"):
        file.read("a/b", 0, 24)


def test_integers_are_read(tmp_path: Path) -> None:
    numbers = {"I8": -3, "I16": 300, "I32": -70_000}
    variables = {dtype: variable(np.array(number), dtype) for dtype, number in numbers.items()}
    file = read(tmp_path, write_ctranslate2({**PAIR, **variables, "f": variable(np.array(1.0), "F32")}))
    assert {dtype: file.integer(dtype) for dtype in numbers} == numbers
    assert [file.integer(name) for name in ("a/b", "c", "f", "none")] == [None] * 4


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "4 bytes are missing from byte 0 on, and it has 0"),
        (b"GGUF" + bytes(40), "version 1179993927 of the format is not known, 4 to 6 are"),
        (write_ctranslate2(PAIR, version=3), "version 3 of the format is not known"),
        (write_ctranslate2(PAIR, version=7), "version 7 of the format is not known"),
        (WHOLE + b"\0", "it ends at byte"),
        (WHOLE[:-1], "bytes are missing from byte"),
        (struct.pack("<IH", 6, 5000), "a name has 5000 bytes at byte 6, and 1024 are the most"),
        (struct.pack("<IH", 6, 0) + bytes(40), "there is no name before byte 6"),
        (struct.pack("<IH", 6, 2) + b"ab" + bytes(40), "there is no name before byte 8"),
        (struct.pack("<IH", 6, 3) + b"a\n\0" + bytes(40), "there is no name before byte 9"),
        (struct.pack("<IH", 6, 3) + b"\xc3\xa9\0" + bytes(40), "there is no name before byte 9"),
        (struct.pack("<IH", 6, 3) + b"a\0\0" + bytes(40), "there is no name before byte 9"),
        (HEAD + b"\xff" * 4 + bytes(40), "it has 4294967295 variables, and 100000 are the most"),
        (HEAD + struct.pack("<II", 0, 0xFFFFFFFF), "it has 4294967295 aliases"),
        (HEAD + struct.pack("<I", 1) + text("a") + b"\x09" + bytes(60), "'a' has 9 dimensions, and 8 are the most"),
        (HEAD + struct.pack("<I", 1) + entry("a", 6, (1,), b"\0"), "'a' is of the unknown type 6"),
        (HEAD + struct.pack("<I", 1) + entry("a", 0, (2, 2), bytes(15)), "'a' needs 16 bytes for F32 in [2, 2], and"),
        (HEAD + struct.pack("<I", 1) + entry("a", 1, (0xFFFFFFFF,) * 8, b""), "'a' needs 115792"),
        (
            HEAD + struct.pack("<I", 1) + entry("a", 1, (0xFFFFFFFF,), b"", 0xFFFFFFFF),
            "4294967295 bytes are missing from byte",
        ),
        (HEAD + struct.pack("<I", 2) + entry("a", 1, (), b"\0") * 2, "the variable 'a' is there twice"),
        (write_ctranslate2(PAIR, {"c": "a/b"}), "the variable 'c' is there twice"),
        (write_ctranslate2(PAIR, {"d": "e"}), "'d' is to be 'e', which is not there"),
        (write_ctranslate2(PAIR, {"d": "d"}), "'d' is to be 'd', which is not there"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    with pytest.raises(SourceError) as caught:
        read(tmp_path, data)
    assert caught.value.message.startswith("model.bin is no good CTranslate2 file: ")
    assert said in caught.value.message
    assert len(caught.value.message) < 300


def test_a_file_that_ends_anywhere_is_refused(tmp_path: Path) -> None:
    for length in range(len(WHOLE)):
        with pytest.raises(SourceError, match="is no good CTranslate2 file"):
            read(tmp_path, WHOLE[:length])


@given(changes=st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_whatever_is_damaged_is_refused_or_consistent(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(WHOLE)
    for place, value in changes:
        data[place] = value
    try:
        file = read(tmp_path_factory.mktemp("damaged"), bytes(data))
    except SourceError:
        return
    for name, each in file.variables.items():
        assert len(file.read(name, 0, each.size)) == each.size <= len(data)


def test_a_file_that_promises_too_much_takes_no_time(tmp_path: Path) -> None:
    many = HEAD + struct.pack("<I", 100_000) + entry("a", 1, (0,) * 8, b"")
    before = time.monotonic()
    with pytest.raises(SourceError):
        read(tmp_path, many)
    assert time.monotonic() - before < 1


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"model\.bin cannot be read: No such file"):
        read_ctranslate2(tmp_path / "model.bin")
    with pytest.raises(SourceError, match="cannot be read: Is a directory"):
        read_ctranslate2(tmp_path)
    with pytest.raises(SourceError, match="it is no regular file"):
        read_ctranslate2(Path(os.devnull))
