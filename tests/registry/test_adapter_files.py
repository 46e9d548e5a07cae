from __future__ import annotations

import os
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_writer import (
    F16,
    FLOAT64,
    Q4_0,
    UINT32,
    Array,
    File,
    Tensor,
    Value,
    tiny_llama,
    tiny_llama_metadata,
    tiny_llama_tensors,
)
from lora_files import Lora, random_lora, shapes_of

from llamaserve.errors import GGUFError, InvalidRequest, ModelError
from llamaserve.registry import adapters
from llamaserve.registry.adapters import adapter_file, check_adapter, list_adapters
from llamaserve.registry.gguf import GGUFHeader, read_header

_QUERY = "blk.0.attn_q.weight"
_BYTES = 16 * 1024  # more than any tensor here has


@pytest.fixture
def model(tmp_path: Path) -> GGUFHeader:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_llama())
    return read_header(path)


@pytest.fixture
def untied(tmp_path: Path) -> GGUFHeader:
    """A model whose output is not its embedding."""
    path = tmp_path / "untied.gguf"
    tensors = tiny_llama_tensors()
    path.write_bytes(File(tiny_llama_metadata(), [*tensors, replace(tensors[0], name="output.weight")]).bytes())
    return read_header(path)


@pytest.fixture
def lora() -> Lora:
    return random_lora(shapes_of(tiny_llama_tensors()))


def _check(path: Path, model: GGUFHeader, metadata: dict[str, Any], tensors: list[Tensor]) -> None:
    kept = {key: value for key, value in metadata.items() if value is not None}
    path.write_bytes(File(kept, tensors).bytes())
    check_adapter(read_header(path), model)


def _pair(name: str, down: tuple[int, ...], up: tuple[int, ...], kind: int = 0) -> list[Tensor]:
    return [Tensor(f"{name}.lora_a", down, kind, bytes(_BYTES)), Tensor(f"{name}.lora_b", up, kind, bytes(_BYTES))]


def test_an_adapter_for_all_layers_is_taken(tmp_path: Path, model: GGUFHeader, lora: Lora) -> None:
    check_adapter(read_header(lora.write(tmp_path / "lora.gguf")), model)
    check_adapter(read_header(lora.write(tmp_path / "lora.gguf", adapter__lora__alpha=None)), model)


def test_an_adapter_of_another_file_type_is_taken(tmp_path: Path, model: GGUFHeader, lora: Lora) -> None:
    _check(tmp_path / "x.gguf", model, lora.metadata(), _pair(_QUERY, (32, 4), (4, 32), F16))
    _check(tmp_path / "x.gguf", model, lora.metadata(), _pair(_QUERY, (32, 4), (4, 32), 30))  # BF16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.type": "model"}, "is no LoRA adapter"),
        ({"general.type": 5}, "is no LoRA adapter"),
        ({"general.type": None}, "is no LoRA adapter"),
        ({"adapter.type": "control_vector"}, "adapter.type is not 'lora'"),
        ({"adapter.type": 5}, "adapter.type is not 'lora'"),
        ({"general.architecture": "qwen2"}, "architecture 'qwen2', and tiny.gguf is a llama"),
        ({"general.architecture": None}, "for no architecture"),
        ({"general.architecture": 5}, "for no architecture"),
        ({"adapter.lora.alpha": 8}, "no 32-bit float"),
        ({"adapter.lora.alpha": "8"}, "no 32-bit float"),
        ({"adapter.lora.alpha": [8.0]}, "no 32-bit float"),
        ({"adapter.lora.alpha": Value(FLOAT64, 8.0)}, "no 32-bit float"),
        ({"adapter.lora.alpha": float("nan")}, "alpha is nan"),
        ({"adapter.alora.invocation_tokens": Array(UINT32, [1, 2])}, "activated LoRA"),
        ({"adapter.alora.invocation_tokens": 1}, "activated LoRA"),
    ],
)
def test_a_file_that_says_something_else_is_refused(
    tmp_path: Path, model: GGUFHeader, lora: Lora, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(GGUFError, match=message):
        _check(tmp_path / "x.gguf", model, lora.metadata() | changes, lora.tensors())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([], "no tensors"),
        (_pair(_QUERY, (32, 4), (4, 32))[:1], "'blk.0.attn_q.weight.lora_b' is missing"),
        (_pair(_QUERY, (32, 4), (4, 32))[1:], "'blk.0.attn_q.weight.lora_a' is missing"),
        ([Tensor(_QUERY, (32, 32))], "not half of a change"),
        ([*_pair(_QUERY, (32, 4), (4, 32)), Tensor("blk.0.attn_norm.weight", (32,))], "not half of a change"),
        (_pair("", (32, 4), (4, 32)), "no tensor ''"),
        (_pair("blk.7.attn_q.weight", (32, 4), (4, 32)), "made for another model"),
        (_pair("output.weight", (32, 4), (4, 261)), "made for another model"),
        (_pair("blk.0.attn_norm.weight", (32, 4), (4, 1)), "no matrix"),
        (_pair("token_embd.weight", (4, 261), (4, 32)), "output, too"),
        (_pair(_QUERY, (32, 4), (5, 32)), "shapes"),
        (_pair(_QUERY, (31, 4), (4, 32)), "shapes"),
        (_pair(_QUERY, (32, 4), (4, 31)), "shapes"),
        (_pair(_QUERY, (4, 32), (32, 4)), "shapes"),
        (_pair(_QUERY, (32, 4, 2), (4, 32)), "shapes"),
        (_pair(_QUERY, (32, 4, 2), (4, 32, 2)), "shapes"),
        (_pair(_QUERY, (32, 4), (4, 32, 1, 2)), "shapes"),
        (_pair(_QUERY, (), ()), "shapes"),
        (_pair(_QUERY, (32, 4), (4, 32), 26), "type I32"),
        (_pair(_QUERY, (32, 4), (4, 32), 24), "type I8"),
        (_pair(_QUERY, (32, 4), (4, 32), 28), "type F64"),
        (_pair(_QUERY, (32, 32), (32, 32), Q4_0), "type Q4_0"),
    ],
)
def test_weights_that_do_not_go_with_the_model_are_refused(
    tmp_path: Path, model: GGUFHeader, lora: Lora, tensors: list[Tensor], message: str
) -> None:
    with pytest.raises(GGUFError, match=message):
        _check(tmp_path / "x.gguf", model, lora.metadata(), tensors)


@pytest.mark.parametrize("alpha", [401.0, 1e38, -401.0])
def test_a_change_that_is_multiplied_beyond_measure_is_refused(
    tmp_path: Path, model: GGUFHeader, lora: Lora, alpha: float
) -> None:
    path = tmp_path / "x.gguf"
    _check(path, model, lora.metadata() | {"adapter.lora.alpha": 400.0}, _pair(_QUERY, (32, 4), (4, 32)))
    with pytest.raises(GGUFError, match="for the rank 4 at most 400 are possible"):
        _check(path, model, lora.metadata() | {"adapter.lora.alpha": alpha}, _pair(_QUERY, (32, 4), (4, 32)))


def _damaged(kind: int, place: int, value: bytes) -> list[Tensor]:
    """Return an adapter's tensors with some bytes of their own at a place of the second."""
    down, up = _pair(_QUERY, (32, 32), (32, 32), kind)
    data = bytearray(_BYTES)
    data[place : place + len(value)] = value
    return [down, replace(up, data=bytes(data))]


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan"), 1e38, -1e30])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, model: GGUFHeader, lora: Lora, number: float) -> None:
    cases = [(0, struct.pack("<f", number)), (30, struct.pack("<f", number)[2:])]  # F32, BF16
    if abs(number) not in (1e38, 1e30):
        cases += [(F16, struct.pack("<e", number)), (8, struct.pack("<e", number))]  # Q8_0
    for kind, value in cases:
        for place in (0, 68, 1020):  # where a weight of each type begins, and a block of Q8_0
            with pytest.raises(GGUFError, match=r"'blk\.0\.attn_q\.weight\.lora_b' has weights that are no numbers"):
                _check(tmp_path / "x.gguf", model, lora.metadata(), _damaged(kind, place, value))


@pytest.mark.parametrize("number", [1e18, -1e-40, 65504.0, -0.0])
def test_weights_that_are_numbers_are_taken(tmp_path: Path, model: GGUFHeader, lora: Lora, number: float) -> None:
    path = tmp_path / "x.gguf"
    _check(path, model, lora.metadata(), _damaged(0, 4, struct.pack("<f", number)))
    _check(path, model, lora.metadata(), _damaged(30, 4, struct.pack("<f", number)[2:]))
    if abs(number) < 1e18:
        _check(path, model, lora.metadata(), _damaged(F16, 4, struct.pack("<e", number)))
        _check(path, model, lora.metadata(), _damaged(8, 34, struct.pack("<e", number) + b"\x7f\xff" * 16))


def test_weights_are_looked_at_to_their_end(
    tmp_path: Path, model: GGUFHeader, lora: Lora, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "_PIECE", 34 * 4)
    for place in (136, 32 * 32 * 4 - 4):
        with pytest.raises(GGUFError, match="no numbers"):
            _check(tmp_path / f"{place}.gguf", model, lora.metadata(), _damaged(0, place, struct.pack("<f", np.inf)))


def test_few_weights_are_held_at_a_time(tmp_path: Path, lora: Lora) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(File(lora.metadata(), [Tensor(f"{_QUERY}.lora_a", (1024, 4096), 0, bytes(1 << 24))]).bytes())
    header = read_header(path)
    tracemalloc.start()
    try:
        adapters._check_weights(header)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 1 << 20  # while a piece is looked at, no other thread runs


_KINDS = ["attn_k_b", "attn_v_b", "ssm_f_a", "ssm_f_b", "ssm_g_a", "ssm_g_b", "ssm_beta", "ssm_conv1d", "ssm_conv1d_q"]


@pytest.mark.parametrize("kind", [*_KINDS, "shortconv.conv", "time_mix_w1", "time_mix_decay_w2", "time_mix_g1"])
def test_a_change_of_what_llama_cpp_does_not_change_is_refused(
    tmp_path: Path, model: GGUFHeader, lora: Lora, kind: str
) -> None:
    name = f"blk.0.{kind}.weight"
    base = Tensor(name, (32, 64), 0, bytes(32 * 64 * 4))
    model.path.write_bytes(File(tiny_llama_metadata(), [*tiny_llama_tensors(), base]).bytes())
    with pytest.raises(GGUFError, match=f"changes '{name}', which llama.cpp would leave out"):
        _check(tmp_path / "x.gguf", read_header(model.path), lora.metadata(), _pair(name, (32, 4), (4, 64)))


def test_an_embedding_can_be_changed_where_it_is_not_the_output(tmp_path: Path, untied: GGUFHeader, lora: Lora) -> None:
    path = tmp_path / "x.gguf"
    _check(path, untied, lora.metadata(), _pair("token_embd.weight", (4, 261), (4, 32)))
    _check(path, untied, lora.metadata(), _pair("output.weight", (32, 4), (4, 261)))
    for down, up in (((4, 261), (5, 32)), ((32, 4), (4, 261)), ((4, 261, 2), (4, 32))):
        with pytest.raises(GGUFError, match="shapes"):
            _check(path, untied, lora.metadata(), _pair("token_embd.weight", down, up))


def test_experts_need_a_change_each(tmp_path: Path, model: GGUFHeader, lora: Lora) -> None:
    name = "blk.0.ffn_up_exps.weight"
    base = Tensor(name, (32, 64, 3), 0, bytes(32 * 64 * 3 * 4))
    model.path.write_bytes(File(tiny_llama_metadata(), [*tiny_llama_tensors(), base]).bytes())
    experts = read_header(model.path)
    _check(tmp_path / "x.gguf", experts, lora.metadata(), _pair(name, (32, 4, 3), (4, 64, 3)))
    for count in (1, 2, 4):
        with pytest.raises(GGUFError, match="shapes"):
            _check(tmp_path / "x.gguf", experts, lora.metadata(), _pair(name, (32, 4, count), (4, 64, count)))


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, model: GGUFHeader, lora: Lora) -> None:
    path = tmp_path / "x.gguf"
    whole = lora.write(path).read_bytes()
    for end in np.linspace(0, len(whole) - 33, 50, dtype=int):  # the last 32 bytes may be padding
        path.write_bytes(whole[:end])
        with pytest.raises(ModelError):
            check_adapter(read_header(path), model)


@pytest.fixture
def folder(tmp_path: Path, lora: Lora) -> Path:
    """A folder with adapters, and with much else."""
    folder = tmp_path / "loras"
    (folder / "inner").mkdir(parents=True)
    for name in ("a10.gguf", "a2.gguf", "B.GGUF", ".hidden.gguf", "inner/c.gguf", "../outside.gguf"):
        lora.write(folder / name)
    (folder / "model.gguf").write_bytes(tiny_llama())
    (folder / "broken.gguf").write_bytes(b"GGUF")
    (folder / "empty.gguf").touch()
    (folder / "folder.gguf").mkdir()
    (folder / "notes.txt").write_text("notes")
    (folder / "linked.gguf").symlink_to(tmp_path / "outside.gguf")
    (folder / "dangling.gguf").symlink_to(tmp_path / "nothing.gguf")
    os.mkfifo(folder / "pipe.gguf")
    lora.write(Path(os.fsdecode(os.fsencode(folder) + b"/\xff.gguf")))
    return folder


def test_the_adapters_of_a_folder_are_listed_in_natural_order(folder: Path) -> None:
    assert list_adapters(folder) == ["a2", "a10", "B", "linked"]


def test_without_the_folder_there_are_no_adapters(tmp_path: Path) -> None:
    assert list_adapters(tmp_path / "loras") == []
    with pytest.raises(InvalidRequest, match="there is no LoRA adapter"):
        adapter_file(tmp_path / "loras", "a")


def test_a_name_stands_for_its_file(folder: Path) -> None:
    assert {name: adapter_file(folder, name).name for name in list_adapters(folder)} == {
        "a2": "a2.gguf",
        "a10": "a10.gguf",
        "B": "B.GGUF",
        "linked": "linked.gguf",
    }


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "/", "../outside", "inner/c", "./a2", "a2.gguf", "a2\0", "A2", ".hidden", "model", "broken"),
        *("pipe", "folder", "dangling", "\udcff", "x" * 100_000, "{folder}/a2", "a2/../a2", "~/a2", "a2\n"),
    ],
)
def test_no_other_name_stands_for_anything(folder: Path, name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        adapter_file(folder, name.format(folder=folder))
    assert len(caught.value.message) < 1000
    assert caught.value.param == "lora_names"
    caught.value.message.encode()


def test_a_file_that_has_become_an_adapter_is_found(tmp_path: Path, lora: Lora) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(tiny_llama())
    assert list_adapters(tmp_path) == []
    lora.write(path)
    assert list_adapters(tmp_path) == ["x"]
    path.unlink()
    assert list_adapters(tmp_path) == []
