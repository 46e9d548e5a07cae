from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from gguf_splitter import split_gguf
from gguf_writer import F32, File, Tensor, tiny_llama, tiny_llama_metadata

from llamaserve.engine.params import Adapter, LoadParams
from llamaserve.engine.saved_prefixes import NOTHING, PrefixWriter
from llamaserve.registry import saved_prefixes
from llamaserve.registry.gguf import GGUFHeader, read_header
from llamaserve.registry.saved_prefixes import SavedPrefixes, saved_prefixes_folder

_BUDGET = 1000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAMASERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def header(tmp_path: Path) -> GGUFHeader:
    (tmp_path / "tiny.gguf").write_bytes(tiny_llama())
    return read_header(tmp_path / "tiny.gguf")


@pytest.fixture
def params(header: GGUFHeader) -> LoadParams:
    return LoadParams(
        path=str(header.path),
        context=100,
        parallel=4,
        kv_cells=256,
        kv_unified=True,
        batch=64,
        threads=2,
        adaptive_threads=False,
        gpu_layers="auto",
        flash_attention="auto",
        key_type="f16",
        value_type="f16",
        prefix_cache=True,
        spill=None,
        speculation=True,
    )


@pytest.fixture
def saved(cache: Path) -> SavedPrefixes:
    return SavedPrefixes(saved_prefixes_folder(), _BUDGET)


def _changed(params: Any, **changes: Any) -> Any:
    return msgspec.structs.replace(params, **changes)


# Which file


def test_it_lies_in_the_cache_folder(saved: SavedPrefixes, header: GGUFHeader, params: LoadParams, cache: Path) -> None:
    path, identity = saved.path_for(header, params)
    assert path.parent == cache / "prefixes"
    assert not path.exists()
    assert identity.isprintable()
    assert saved.path_for(header, params) == (path, identity)


@pytest.mark.parametrize(
    "changes",
    [
        {"key_type": "q8_0"},
        {"value_type": "q8_0"},
        {"flash_attention": "on"},
        {"kv_unified": False},
        {"full_window": True},
        {"rope_freq_base": 1e6},
        {"rope_freq_scale": 0.5},
    ],
    ids=str,
)
def test_what_a_state_depends_on_tells_files_apart(
    saved: SavedPrefixes, header: GGUFHeader, params: LoadParams, changes: dict[str, object]
) -> None:
    path, identity = saved.path_for(header, params)
    other_path, other_identity = saved.path_for(header, _changed(params, **changes))
    assert (path == other_path, identity == other_identity) == (False, False)


@pytest.mark.parametrize(
    "changes",
    [
        {"context": 50, "kv_cells": 4096},
        {"parallel": 8, "batch": 512, "micro_batch": 128},
        {"threads": 1, "batch_threads": 2, "adaptive_threads": True, "numa": "distribute"},
        {"gpu_layers": "none", "gpu_cache": False, "split_mode": "row", "tensor_split": (1.0, 2.0)},
        {"mmap": False, "mlock": True},
        {"spill": 0, "speculation": False, "prefix_cache": False},
        {"adapters": (Adapter("name", "/path"),)},
        {"saved_prefixes": "/file", "prefixes_identity": "that"},
    ],
    ids=str,
)
def test_all_else_may_change(
    saved: SavedPrefixes, header: GGUFHeader, params: LoadParams, changes: dict[str, object]
) -> None:
    assert saved.path_for(header, _changed(params, **changes)) == saved.path_for(header, params)


def test_models_of_other_names_or_places_have_files_of_their_own(
    saved: SavedPrefixes, header: GGUFHeader, params: LoadParams, tmp_path: Path
) -> None:
    path, identity = saved.path_for(header, params, name="one")
    shutil.copy2(header.path, tmp_path / "copy.gguf")
    for other in (
        saved.path_for(header, params, name="other"),
        saved.path_for(read_header(tmp_path / "copy.gguf"), params, name="one"),
    ):
        assert other[0] != path
        assert other[1] == identity


@pytest.mark.parametrize("part", ["metadata", "weights", "size"])
def test_another_model_at_the_same_place_is_another_one(
    saved: SavedPrefixes, header: GGUFHeader, params: LoadParams, part: str
) -> None:
    before = saved.path_for(header, params)
    data = bytearray(header.path.read_bytes())
    if part == "metadata":
        data = data.replace(b"<0x41>", b"<0x42>", 1)
    elif part == "weights":
        data[-1000] ^= 1
    else:
        data += bytes(32)
    header.path.write_bytes(data)
    os.utime(header.path, ns=(1, 1))
    path, identity = saved.path_for(read_header(header.path), params)
    assert path != before[0]
    assert identity != before[1]


def test_other_weights_are_noticed_though_size_and_time_are_the_same(
    saved: SavedPrefixes, header: GGUFHeader, params: LoadParams
) -> None:
    os.utime(header.path, ns=(1, 1))
    before = saved.path_for(header, params)
    data = bytearray(header.path.read_bytes())
    data[-1000] ^= 1
    header.path.write_bytes(data)
    os.utime(header.path, ns=(1, 1))
    assert saved.path_for(header, params)[1] != before[1]


def test_what_was_written_again_is_another_model(saved: SavedPrefixes, header: GGUFHeader, params: LoadParams) -> None:
    before = saved.path_for(header, params)
    os.utime(header.path, ns=(1, 1))
    assert saved.path_for(header, params)[1] != before[1]


def test_small_tensors_are_looked_at_as_a_whole(
    saved: SavedPrefixes, params: LoadParams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples alone would miss all of them but the bytes at certain places."""
    monkeypatch.setattr(saved_prefixes, "_SAMPLE", 1)
    monkeypatch.setattr(saved_prefixes, "recall", lambda *arguments: None)
    path = tmp_path / "whole.gguf"
    path.write_bytes(tiny_llama())
    whole = read_header(path)
    norms = [tensor for tensor in whole.tensors if tensor.name.endswith("_norm.weight")]
    data = path.read_bytes()
    identities: set[str] = set()
    for tensor in (None, *norms):
        changed = bytearray(data)
        if tensor is not None:
            changed[whole.data_offset + tensor.offset + 37] ^= 64
        path.write_bytes(changed)
        os.utime(path, ns=(1, 1))
        identities.add(saved.path_for(read_header(path), params)[1])
    assert len(identities) == 1 + len(norms)


def test_the_small_tensors_of_all_files_of_a_model_are_looked_at(
    saved: SavedPrefixes, params: LoadParams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_prefixes, "_SAMPLE", 1)
    monkeypatch.setattr(saved_prefixes, "recall", lambda *arguments: None)
    monkeypatch.setattr(saved_prefixes, "_SAMPLES", 0)
    (tmp_path / "whole.gguf").write_bytes(tiny_llama())
    paths = split_gguf(tmp_path / "whole.gguf", tmp_path, "model", 3)
    identities: set[str] = set()
    for changed in (None, *paths):
        for path in paths:
            data = bytearray(path.read_bytes())
            if path == changed:
                data[-40] ^= 64
            path.write_bytes(data)
            os.utime(path, ns=(1, 1))
        identities.add(saved.path_for(read_header(paths[0]), params)[1])
    assert len(identities) == 4


def test_the_weights_are_looked_at_once(
    saved: SavedPrefixes, header: GGUFHeader, params: LoadParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.path_for(header, params)
    monkeypatch.setattr(os, "pread", None)
    assert saved.path_for(header, params) == before


def test_another_build_of_llama_cpp_is_another_one(
    saved: SavedPrefixes, header: GGUFHeader, params: LoadParams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identities = {saved.path_for(header, params)[1]}
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path / "lib"))
    (tmp_path / "lib").mkdir()
    for content in ("one", "another"):
        (tmp_path / "lib" / "libllama.so").write_text(content)
        identities.add(saved.path_for(header, params)[1])
    assert len(identities) == 3


def test_environment_variables_that_turn_keys_otherwise_tell_files_apart(
    saved: SavedPrefixes, header: GGUFHeader, params: LoadParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    identities = {saved.path_for(header, params)[1]}
    for value in ("1", "0", "\udcff\n"):
        monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", value)
        _, identity = saved.path_for(header, params)
        assert identity.isprintable()
        identities.add(identity)
    assert len(identities) == 4
    monkeypatch.delenv("LLAMA_ATTN_ROT_DISABLE")
    monkeypatch.setenv("LLAMA_KV_CACHE_DEBUG", "1")
    assert saved.path_for(header, params)[1] in identities


@pytest.mark.parametrize(("cells", "long"), [(256, False), (300, True), (512, True)])
def test_a_model_that_turns_long_contexts_otherwise(
    saved: SavedPrefixes, params: LoadParams, tmp_path: Path, cells: int, long: bool
) -> None:
    """In which it was trained for 300 tokens at first, and llama.cpp makes 512 cells of 300."""
    path = tmp_path / "long.gguf"
    metadata = tiny_llama_metadata() | {"llama.rope.scaling.original_context_length": 300}
    path.write_bytes(File(metadata, [Tensor("blk.0.rope_factors_long.weight", (4,), F32)]).bytes())
    header = read_header(path)
    short = saved.path_for(header, params)
    assert (saved.path_for(header, _changed(params, kv_cells=cells)) != short) is long


# How many of them


def _file(saved: SavedPrefixes, name: str, size: int, used: int) -> Path:
    path = saved_prefixes_folder() / name
    assert saved.room(path) == _BUDGET
    path.write_bytes(bytes(size))
    os.utime(path, ns=(used, used))
    return path


def test_others_may_not_look_into_the_folder(saved: SavedPrefixes, cache: Path) -> None:
    folder = cache / "prefixes"
    for mode in (None, 0o755):
        if mode:
            folder.chmod(mode)
        assert saved.room(folder / "file") == _BUDGET
        assert folder.stat().st_mode & 0o777 == 0o700


def test_what_was_used_last_stays(saved: SavedPrefixes) -> None:
    paths = [_file(saved, f"{number}.prefixes", 400, used) for number, used in enumerate((4, 2, 1, 3))]
    saved.prune()
    assert [path.exists() for path in paths] == [True, False, False, True]
    saved.prune()
    assert [path.exists() for path in paths] == [True, False, False, True]


def test_a_file_that_is_too_large_does_not_stay_at_all(saved: SavedPrefixes) -> None:
    path = _file(saved, "one.prefixes", _BUDGET + 1, time.time_ns())
    saved.prune()
    assert not path.exists()


def test_what_was_never_finished_is_removed_once_it_is_old(saved: SavedPrefixes) -> None:
    now = time.time_ns()
    old = _file(saved, ".one.prefixes.1.part", 10, now - int(120e9))
    new = _file(saved, ".two.prefixes.2.part", 10, now)
    other = _file(saved, "unknown", 2 * _BUDGET, now - int(2 * 3600e9))
    saved.prune()
    assert [path.exists() for path in (old, new, other)] == [False, True, True]


def test_what_is_being_written_stays_and_is_counted(saved: SavedPrefixes) -> None:
    now = time.time_ns()
    files = [_file(saved, f"{number}.prefixes", 400, number) for number in (1, 2)]
    path = saved_prefixes_folder() / "3.prefixes"
    with PrefixWriter(path, "this", block=4, room=1 << 20) as writer:
        writer.add(NOTHING, (), [1], bytearray(300))
        [part] = saved_prefixes_folder().glob(".*.part")
        os.utime(part, ns=(now, now - int(2 * 3600e9)))
        saved.prune()
        assert part.exists()
        assert [each.exists() for each in files] == [False, True]
        writer.finish()
    assert path.exists()


def test_where_locks_say_nothing_age_does(saved: SavedPrefixes, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", without)
    now = time.time_ns()
    ages = (7200, 120)
    paths = [_file(saved, f".{age}.prefixes.1.part", 10, now - int(age * 1e9)) for age in ages]
    saved.prune()
    assert [path.exists() for path in paths] == [False, True]


def test_a_file_can_be_discarded(saved: SavedPrefixes) -> None:
    path = _file(saved, "one.prefixes", 10, 1)
    for _ in range(2):
        saved.discard(path)
        assert not path.exists()


@pytest.mark.parametrize(("free", "room"), [(10 << 30, _BUDGET), ((1 << 30) + 10, 10), (10, 0)])
def test_the_disk_is_not_filled(
    saved: SavedPrefixes, cache: Path, monkeypatch: pytest.MonkeyPatch, free: int, room: int
) -> None:
    usage: Callable[[Path], tuple[int, int, int]] = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=free))  # type: ignore[attr-defined]
    assert saved.room(cache / "prefixes" / "one") == room


@pytest.mark.parametrize(
    ("free", "room"), [((1 << 30) + 10, 310), ((1 << 30) - 100, 200), (10, 0), (10 << 30, _BUDGET)]
)
def test_what_a_file_takes_already_is_no_more_taken_of_the_disk(
    saved: SavedPrefixes, monkeypatch: pytest.MonkeyPatch, free: int, room: int
) -> None:
    path = _file(saved, "one.prefixes", 300, 1)
    usage: Callable[[Path], tuple[int, int, int]] = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=free))  # type: ignore[attr-defined]
    assert saved.room(path) == room


def test_where_there_can_be_no_folder_nothing_is_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    saved = SavedPrefixes(tmp_path / "file" / "folder", _BUDGET)
    assert saved.room(tmp_path / "file" / "folder" / "one") == 0
    assert "prefixes can't be saved in" in caplog.text
    saved.prune()
