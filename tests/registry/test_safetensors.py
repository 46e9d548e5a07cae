"""Reading safetensors files: what is written comes back, and a file that contradicts itself is refused."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from tiny_bert import Stored, write_safetensors

from llamaserve.errors import SourceError
from llamaserve.registry.safetensors import MAX_HEADER, SafetensorsFile, read_safetensors

SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1}
PAIR = {"a": ("F32", (2, 3), bytes(24)), "b": ("F16", (1,), b"\1\2")}


def read(folder: Path, data: bytes) -> SafetensorsFile:
    path = folder / "model.safetensors"
    path.write_bytes(data)
    return read_safetensors(path)


@st.composite
def stored_tensors(draw: st.DrawFn) -> Stored:
    dtype, shape = draw(st.sampled_from([*SIZES])), tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    size = SIZES[dtype]
    for dimension in shape:
        size *= dimension
    return dtype, shape, draw(st.binary(min_size=size, max_size=size))


@given(tensors=st.dictionaries(st.text(min_size=1).filter(lambda name: name != "__metadata__"), stored_tensors()))
def test_what_was_written_is_read(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Stored]) -> None:
    file = read(tmp_path_factory.mktemp("written"), write_safetensors(tensors, __metadata__={"format": "pt"}))
    assert {name: (each.dtype, each.shape, file.read(name)) for name, each in file.tensors.items()} == tensors


def entry(start: int, end: int, shape: object = (1,), dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("", "cannot be read"),
        ("[]", "no JSON object"),
        ("{", "cannot be read"),
        (b'{"\xff": 1}', "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"a": ' + "9" * 5000 + "}", "cannot be read"),
        ('{"a": 1}', "cannot be read"),
        ('{"__metadata__": {"a": 1}}', "cannot be read"),
        ('{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1], "dtype": "I8"}}', "a name twice"),
        ({"a": entry(0, 4) | {"more": 1}}, "cannot be read"),
        ({"a": entry(0, 4, [-4])}, "cannot be read"),
        ({"a": entry(0, 4, [4.0])}, "cannot be read"),
        ({"a": entry(0, 4, [True, 4])}, "cannot be read"),
        ({"a": entry(0, 4, [1] * 8 + [4])}, "cannot be read"),
        ({"a": entry(-4, 0, [4])}, "cannot be read"),
        ({"a": entry(0, 1 << 64, [1 << 64])}, "cannot be read"),
        ({"a": entry(0, 4, [4], "F3")}, "unknown type 'F3'"),
        ({"a": entry(0, 4, [5])}, "needs 5 bytes from 0 on, and 0 to 4 are named"),
        ({"a": entry(0, 4, [1 << 62, 1 << 62, 1 << 62])}, "bytes from 0 on"),
        ({"a": entry(1, 4, [3])}, "needs 3 bytes from 0 on"),
        ({"a": entry(4, 0, [4])}, "needs 4 bytes from 0 on"),
        ({"a": entry(0, 2, [2]), "b": entry(1, 4, [3])}, "needs 3 bytes from 2 on"),
        ({"a": entry(0, 1), "b": entry(2, 4, [2])}, "needs 2 bytes from 1 on"),
        ({"\ud800": entry(0, 4, [5])}, r"'\\ud800' needs"),
        ({"a": entry(0, 3, [3])}, "end at byte"),
        ({"a": entry(0, 5, [5])}, "end at byte"),
        ({}, "end at byte"),
    ],
)
def test_a_header_that_cannot_be_is_refused(tmp_path: Path, header: object, said: str) -> None:
    text = header if isinstance(header, str | bytes) else json.dumps(header)
    with pytest.raises(SourceError, match=said):
        read(tmp_path, write_safetensors({"": ("U8", (4,), b"1234")}, text))


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write_safetensors(PAIR)
    read(tmp_path, whole)
    for length in range(len(whole)):
        with pytest.raises(SourceError, match=r"model\.safetensors"):
            read(tmp_path, whole[:length])
    with pytest.raises(SourceError, match="end at byte"):
        read(tmp_path, whole + b"\0")


def test_a_file_that_is_cut_after_its_header_was_read_is_noticed(tmp_path: Path) -> None:
    file = read(tmp_path, write_safetensors(PAIR))
    os.truncate(file.path, file.path.stat().st_size - 1)
    with pytest.raises(SourceError, match="'b' is cut short"):
        file.read("b")


@given(data=st.data())
def test_whatever_a_damaged_file_names_is_in_it(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = bytearray(write_safetensors(PAIR))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        file = read(tmp_path_factory.mktemp("damaged"), bytes(whole))
    except SourceError:
        return
    assert sum(len(file.read(name)) for name in file.tensors) == 26


def test_no_more_is_read_than_a_header_can_have(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 40))
    os.truncate(path, 1 << 41)  # no room is taken
    with pytest.raises(SourceError, match="its header should have 1099511627776 bytes"):
        read_safetensors(path)
    path.write_bytes(struct.pack("<Q", MAX_HEADER + 1) + bytes(100))
    with pytest.raises(SourceError, match="its header should have"):
        read_safetensors(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="none cannot be read"):
        read_safetensors(tmp_path / "none")
    with pytest.raises(SourceError, match="cannot be read"):
        read_safetensors(tmp_path)
    with pytest.raises(SourceError, match="no regular file"):
        read_safetensors(Path("/dev/null"))
