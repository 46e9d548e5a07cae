"""What earlier loads teach of a model's memory."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
from synthetic_models import Shape, write_model
from test_memory import loading

from llamaserve.engine.params import Footprint, LoadParams
from llamaserve.registry import measurements
from llamaserve.registry.gguf import GGUFHeader, read_header
from llamaserve.registry.measurements import correction, record
from llamaserve.registry.memory import Estimate, estimate

MIB = 1024 * 1024


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAMASERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def header(tmp_path: Path) -> GGUFHeader:
    return read_header(write_model(tmp_path / "model.gguf", Shape(), hollow=True))


def parts(header: GGUFHeader, params: LoadParams) -> Estimate:
    return estimate(header, params, params.gpu_layers if isinstance(params.gpu_layers, int) else 0)


def corrected(header: GGUFHeader, params: LoadParams) -> Footprint:
    """Return what is planned for."""
    return correction(header)(params, parts(header, params))


def load(header: GGUFHeader, params: LoadParams, more: int, more_on_gpus: int = 0) -> None:
    """Take note of a load that took so much more than was expected right after it."""
    each = parts(header, params)
    record(header, params, each.total, each.total - each.later + Footprint(more, more_on_gpus))


def test_nothing_is_corrected_before_a_load(header: GGUFHeader) -> None:
    params = loading(header.path)
    assert corrected(header, params) == parts(header, params).total


@pytest.mark.parametrize("more", [3 * MIB, -2 * MIB, 0])
def test_with_the_same_settings_a_model_takes_what_it_took(more: int, header: GGUFHeader) -> None:
    params = loading(header.path)
    load(header, params, more)
    total = parts(header, params).total
    assert corrected(header, params) == total + Footprint(more)
    elsewhere = msgspec.structs.replace(params, threads=7, saved_prefixes="/tmp/prefixes", spill=5 * MIB)
    assert corrected(header, elsewhere) == total + Footprint(more)


def test_with_other_settings_the_estimate_is_off_by_as_many_bytes(header: GGUFHeader) -> None:
    load(header, loading(header.path), 3 * MIB)
    large = loading(header.path, context=16384)
    assert corrected(header, large) == parts(header, large).total + Footprint(3 * MIB)


def test_the_load_with_the_same_settings_counts_before_the_latest(header: GGUFHeader) -> None:
    small, large = loading(header.path), loading(header.path, context=16384)
    load(header, small, 3 * MIB)
    load(header, large, 5 * MIB)
    for params, more in ((small, 3 * MIB), (large, 5 * MIB), (loading(header.path, context=512), 5 * MIB)):
        assert corrected(header, params) == parts(header, params).total + Footprint(more)
    load(header, small, 4 * MIB)
    assert corrected(header, small) == parts(header, small).total + Footprint(4 * MIB)


def test_gpus_are_not_corrected(header: GGUFHeader) -> None:
    there, here = loading(header.path, gpu_layers=5), loading(header.path)
    for more_on_gpus in (90 * MIB, -320 * MIB, 10**12):  # other programs come and go meanwhile
        load(header, there, MIB, more_on_gpus)
        assert corrected(header, there) == parts(header, there).total + Footprint(MIB)
        assert corrected(header, here) == parts(header, here).total + Footprint(MIB)


def test_what_is_certain_is_never_left_out(header: GGUFHeader) -> None:
    params = loading(header.path)
    each = parts(header, params)
    record(header, params, each.total, Footprint(int(0.6 * each.total.host)))
    assert corrected(header, params).host == each.certain.host


@pytest.mark.parametrize("measured", [Footprint(), Footprint(10**12)])
def test_a_measurement_that_cannot_be_is_not_believed(measured: Footprint, header: GGUFHeader) -> None:
    params = loading(header.path)
    record(header, params, parts(header, params).total, measured)
    assert corrected(header, params) == parts(header, params).total


def test_a_file_that_has_changed_is_another_one(header: GGUFHeader) -> None:
    params = loading(header.path)
    load(header, params, 3 * MIB)
    os.utime(header.path, ns=(1, 1))
    assert corrected(header, params) == parts(header, params).total


def test_another_llama_cpp_may_take_something_else(header: GGUFHeader, monkeypatch: pytest.MonkeyPatch) -> None:
    params = loading(header.path)
    load(header, params, 3 * MIB)
    monkeypatch.setattr(measurements, "_build", lambda: "9.9.9")
    assert corrected(header, params) == parts(header, params).total


@pytest.mark.parametrize(
    "damage", [b"", b"{", b'{"size": 1}', b"\xff\xfe", b'{"size":1,"mtime_ns":1,"build":"","excess":{"": [1, 2]}}']
)
def test_a_damaged_record_is_ignored_and_replaced(damage: bytes, header: GGUFHeader, cache_folder: Path) -> None:
    params = loading(header.path)
    load(header, params, 3 * MIB)
    (path,) = (cache_folder / "memory").iterdir()
    path.write_bytes(damage)
    assert corrected(header, params) == parts(header, params).total
    load(header, params, 2 * MIB)
    assert corrected(header, params) == parts(header, params).total + Footprint(2 * MIB)


def test_a_record_that_was_made_up_is_kept_within_bounds(header: GGUFHeader, cache_folder: Path) -> None:
    params = loading(header.path)
    load(header, params, 3 * MIB)
    (path,) = (cache_folder / "memory").iterdir()
    known = msgspec.json.decode(path.read_bytes())
    key = next(iter(known["excess"]))
    total = parts(header, params).total
    for lie, limit in ((10**15, 2 * total.host), (-(10**15), parts(header, params).certain.host)):
        known["excess"][key] = lie
        path.write_bytes(msgspec.json.encode(known))
        assert corrected(header, params) == Footprint(limit, 0)


def test_only_so_many_settings_are_kept(header: GGUFHeader, cache_folder: Path) -> None:
    for number in range(measurements.MOST_SETTINGS + 5):
        load(header, loading(header.path, context=256 * (number + 1)), number * 1024)
    (path,) = (cache_folder / "memory").iterdir()
    assert len(msgspec.json.decode(path.read_bytes())["excess"]) == measurements.MOST_SETTINGS
