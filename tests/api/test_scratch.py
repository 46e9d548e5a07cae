"""Files of requests go with them, and those of a server that was killed when the next one starts."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from llamaserve.api.scratch import Scratch, sweep

_HOLD = """
import sys
from llamaserve.api.scratch import Scratch
scratch = Scratch()
(scratch.path / "upload").write_text("confidential")
print(scratch.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def age(path: Path, seconds: float = 3600.0) -> None:
    moment = time.time() - seconds
    os.utime(path, (moment, moment))


def test_a_folder_is_ours_alone_and_goes_with_what_is_in_it() -> None:
    scratch = Scratch()
    assert scratch.path.stat().st_mode & 0o777 == 0o700
    (scratch.path / "upload").touch()
    scratch.close()
    assert not scratch.path.exists()


def test_a_folder_that_is_gone_already_can_be_closed() -> None:
    scratch = Scratch()
    scratch.path.rmdir()
    scratch.close()
    scratch.close()


def test_what_a_killed_process_leaves_is_deleted_and_what_a_living_one_has_is_not(temporary: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().decode().strip())
        assert path.parent == temporary
        age(path)
        sweep()
        assert (path / "upload").exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
        sweep()
        assert not path.exists()


def test_without_a_temporary_folder_a_server_starts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    sweep()
    assert "No usable temporary directory found" in caplog.text


def test_a_file_system_without_locks_takes_uploads_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    scratch = Scratch()
    age(scratch.path)
    sweep()
    assert scratch.path.exists()
    scratch.close()
    assert not scratch.path.exists()


def test_a_new_folder_is_left_alone_and_so_is_what_is_not_ours(temporary: Path) -> None:
    new, other, file = (temporary / name for name in ("llamaserve-upload-new", "other", "llamaserve-upload-file"))
    new.mkdir()
    other.mkdir()
    file.touch()
    link = temporary / "llamaserve-upload-link"
    link.symlink_to(other)
    for path in (other, file):
        age(path)
    sweep()
    assert new.exists()
    assert other.exists()
    assert file.exists()
    assert link.is_symlink()
