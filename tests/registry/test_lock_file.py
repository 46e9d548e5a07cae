"""models.lock: where it lies, what is written, and every way in which it may be damaged."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import shlex
from pathlib import Path
from typing import Any

import platformdirs
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from llamaserve import errors
from llamaserve.registry import lock_file
from llamaserve.registry.lock_file import LockedFile, LockEntry, LockFile, lock_path, pinned
from llamaserve.registry.sources import HubSource, WheelFile, WheelSource
from llamaserve.registry.spec import find_models_file

SUM = "a" * 64
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ENTRY = LockEntry((LockedFile("d/a.gguf", 7, SUM), LockedFile("d/b.gguf", 0, "0" * 64)), COMMIT, "b" * 64, "2026-01-02")
SOURCE = "hf:o/r:Q8_0"


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMASERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture
def lock(tmp_path: Path) -> LockFile:
    return LockFile(tmp_path / "models.lock")


def test_what_is_written_is_read_in_a_stable_order(lock: LockFile) -> None:
    assert lock.entries() == {}
    other = LockEntry((LockedFile("a.gguf", 1, SUM),), date="2026-01-01")
    for source in ("pypi:b==1/a.gguf", SOURCE, "file:a.gguf"):
        lock.put(source, ENTRY if source == SOURCE else other)
    assert [*lock.entries()] == ["file:a.gguf", SOURCE, "pypi:b==1/a.gguf"]
    assert lock.get(SOURCE) == ENTRY
    assert lock.get("hf:o/r") is None
    text = lock.path.read_text()
    lock.put(SOURCE, ENTRY)
    assert lock.path.read_text() == text
    plain = json.loads(text)["sources"]
    assert plain["file:a.gguf"] == {"files": [{"name": "a.gguf", "size": 1, "sha256": SUM}], "date": "2026-01-01"}
    assert [path.name for path in lock.path.parent.iterdir() if path.is_file()] == ["models.lock"]
    assert lock.path.stat().st_mode & 0o777 == 0o644


def test_it_lies_beside_models_yaml_or_in_the_users_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "models.yaml"
    assert lock_path(mine) == tmp_path / "models.lock"
    assert LockFile.beside(mine).path == tmp_path / "models.lock"
    data = platformdirs.user_data_path("llamaserve")
    assert data.is_relative_to(tmp_path)
    assert lock_path(find_models_file()) == data / "models.lock"  # the shipped one's folder is not the user's
    monkeypatch.setattr(os, "access", lambda *_: False)
    elsewhere = lock_path(mine)
    assert elsewhere.parent == data
    assert lock_path(tmp_path / "other" / "models.yaml") != elsewhere != data / "models.lock"
    (tmp_path / "models.lock").write_text("{}")  # one that was delivered with it counts
    assert lock_path(mine) == tmp_path / "models.lock"


def test_an_entry_pins_a_source_to_a_commit_and_a_file() -> None:
    source = HubSource("o/r", quant="Q8_0")
    assert pinned(source, ENTRY) == HubSource("o/r", "d/a.gguf", revision=COMMIT)
    assert pinned(source, None) == source
    wheel = WheelSource((WheelFile("a", "1", "b.gguf"),))
    assert pinned(wheel, ENTRY) == wheel


def damaged(lock: LockFile, text: str | bytes) -> tuple[int, str]:
    """Return the line and the message of the error for a file, which must stay as it is."""
    data = text.encode() if isinstance(text, str) else text
    lock.path.write_bytes(data)
    with pytest.raises(errors.RegistryError) as caught:
        lock.put(SOURCE, ENTRY)
    with pytest.raises(errors.RegistryError):
        lock.entries()
    assert lock.path.read_bytes() == data
    assert f"rm {shlex.quote(str(lock.path))}" in str(caught.value.hint)
    found = re.match(rf"{re.escape(str(lock.path))}:(\d+): (.*)", caught.value.message, re.DOTALL)
    assert found is not None
    return int(found[1]), found[2]


def test_a_file_that_is_no_json_is_told_with_its_line(lock: LockFile) -> None:
    lock.put(SOURCE, ENTRY)
    lines = lock.path.read_text().splitlines()
    for number in (3, 9, len(lines)):
        text = "\n".join([*lines[: number - 1], "<<<<<<< HEAD", *lines[number - 1 :]])
        assert damaged(lock, text)[0] == number
    assert damaged(lock, b'{\n"a": "\xff"}') == (2, "the file is not UTF-8: invalid start byte")
    assert damaged(lock, "")[0] == 1
    assert "no JSON that can be read" in damaged(lock, "[" * 100_000)[1]
    assert "no JSON that can be read" in damaged(lock, "9" * 10_000)[1]
    assert "is larger than" in damaged(lock, " " * (lock_file.MAX_FILE + 1))[1]


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ('"version": 1', '"version": 2', 2, "version 2 is not known"),
        ('"version": 1', '"version": "x"', 1, "Expected `int`"),
        ('"size": 7', '"size": "7"', 8, "Expected `int`"),
        ('"size": 7', '"size": -7', 7, "has the size -7"),
        ('"size": 7,', "", 5, "missing required field `size`"),
        (f'"{SUM}"', '"none"', 9, "is no SHA-256 sum"),
        (f'"{COMMIT}"', '"main"', 17, "is no commit"),
        ('"revision"', '"rev"', 17, "unknown field `rev`"),
        ('"d/a.gguf"', '"../../a.gguf"', 7, "names no source"),
        (f'"{"b" * 64}"', '"bb"', 18, "is no SHA-256 sum"),
        ('"date"', '"template"', 19, '"template" is given twice'),
        ('"d/a.gguf"', '"\\ud800.gguf"', 7, "'\\ud800.gguf' holds half a surrogate pair"),
        ('"hf:o/r:Q8_0"', '"hf:o/r/\\udfff.gguf"', 4, "'hf:o/r/\\udfff.gguf' holds half a surrogate pair"),
        ('"2026-01-02"', '"\\ud800"', 19, "holds half a surrogate pair"),
    ],
)
def test_a_wrong_value_is_told_with_its_line(lock: LockFile, old: str, new: str, line: int, said: str) -> None:
    lock.put(SOURCE, ENTRY)
    text = lock.path.read_text()
    assert text.count(old) == 1
    found = damaged(lock, text.replace(old, new))
    assert said in found[1]
    assert found[0] == line


@pytest.mark.parametrize("source", ["pypi:garbage", "hf:garbage", "hf:", "pypi:a==1/../m.gguf"])
def test_a_source_that_cannot_be_read_is_told(lock: LockFile, source: str) -> None:
    lock.put(SOURCE, ENTRY)
    text = lock.path.read_text().replace(json.dumps(SOURCE), json.dumps(source))
    assert "names no source" in damaged(lock, text)[1]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["files", "name", SOURCE]), inner),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(JSON)
def test_whatever_is_in_the_file_it_is_read_or_refused(lock: LockFile, value: Any) -> None:
    lock.path.write_text(json.dumps({"version": 1, "sources": value}))
    try:
        entries = lock.entries()
    except errors.RegistryError as error:
        said = error.message
    else:
        assert all(isinstance(entry, LockEntry) for entry in entries.values())
        return
    assert f"{lock.path}:" in said


def put_many(path: str, start: int) -> None:
    for number in range(start, start + 10):
        LockFile(Path(path)).put(f"file:{number}.gguf", LockEntry((LockedFile("a", number, SUM),)))


def test_processes_that_write_at_once_lose_nothing(lock: LockFile) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=put_many, args=(str(lock.path), start)) for start in (0, 10, 20)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(lock.entries()) == 30


def test_a_disk_that_is_full_is_told_and_leaves_nothing(lock: LockFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    lock.put("file:a.gguf", ENTRY)
    before = lock.path.read_text()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(errors.RegistryError, match="cannot be written: No space left on device"):
        lock.put(SOURCE, ENTRY)
    assert lock.path.read_text() == before
    assert [path.name for path in lock.path.parent.iterdir() if path.is_file()] == ["models.lock"]


def test_a_source_whose_name_is_no_text_is_not_noted(lock: LockFile) -> None:
    with pytest.raises(errors.RegistryError, match="its name is no UTF-8"):
        lock.put("file:/m\udcff.gguf", ENTRY)
    assert not lock.path.exists()


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "models.lock").mkdir()
    with pytest.raises(errors.RegistryError, match="cannot be read: Is a directory"):
        LockFile(tmp_path / "models.lock").entries()


def test_a_folder_of_any_name_is_quoted_in_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "ann's models; true"
    folder.mkdir()
    lock = LockFile(folder / "models.lock")
    lock.path.write_text("{")
    with pytest.raises(errors.RegistryError) as damaged_file:
        lock.entries()
    words = shlex.split(str(damaged_file.value.hint).partition(": ")[2])
    assert words == ["rm", str(lock.path)]
    lock.path.unlink()

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(lock, "_write", refuse)
    with pytest.raises(errors.RegistryError) as refused:
        lock.put(SOURCE, ENTRY)
    assert shlex.split(str(refused.value.hint)) == ["chmod", "u+w", str(folder)]
