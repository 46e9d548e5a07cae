"""Which command mends what."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
from pathlib import Path

from llamaserve.errors import ChecksumMismatch, GGUFError
from llamaserve.registry.lock_file import LockedFile, LockEntry
from llamaserve.registry.remedies import Files, Remedies
from llamaserve.registry.sources import FileSource, WheelFile, WheelSource
from llamaserve.registry.spec import load_registry

WHEEL = WheelSource((WheelFile("foo", "1.0", "foo/m.gguf"),))


def remedies(folder: Path) -> Remedies:
    path = folder / "my models.yaml"
    path.write_text("models: {m: {source: 'pypi:foo==1.0/foo/m.gguf'}}")
    return Remedies(load_registry(path), "m")


def test_an_editor_may_have_options(tmp_path: Path) -> None:
    fix = remedies(tmp_path).correct(WHEEL)
    environment = {**os.environ, "EDITOR": "printf %s| --wait"}
    done = subprocess.run(["bash", "-c", fix], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"--wait|{tmp_path}/my models.yaml|"


def test_the_part_that_cannot_be_read_is_the_one_that_is_made_readable(tmp_path: Path) -> None:
    first, second = (tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2))
    files = Files(FileSource(first), first)
    advice = remedies(tmp_path).mend(files, PermissionError(errno.EACCES, "Permission denied", str(second)))
    assert advice == (f"{second} cannot be read: Permission denied", f"chmod u+r {second}")
    advice = remedies(tmp_path).mend(files, OSError(errno.EIO, "Input/output error"))
    assert advice == (f"{first} cannot be read: Input/output error", f"ls -l {first}")
    error = GGUFError("cannot be read")
    error.__cause__ = PermissionError(errno.EACCES, "Permission denied", str(second))
    assert remedies(tmp_path).mend(files, error).fix == f"chmod u+r {second}"


def test_only_files_that_differ_from_what_was_promised_are_fetched_again(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"weights")
    actual, other = hashlib.sha256(b"weights").hexdigest(), "f" * 64
    good, bad = (LockEntry((LockedFile("m.gguf", 7, each),)) for each in (actual, other))
    edit = remedies(tmp_path).correct(WHEEL)
    for entry, sha256, kept in (
        (None, None, False),
        (good, None, True),
        (bad, None, False),
        (None, actual, True),
        (None, other, False),
        (good, other, True),
        (bad, actual, False),
    ):
        for error in (GGUFError("bad"), ChecksumMismatch("bad")):
            advice = remedies(tmp_path).mend(Files(WHEEL, path, entry, sha256), error)
            assert (advice.fix == edit) is kept
            assert ("deletes the files" in advice.problem) is not kept
