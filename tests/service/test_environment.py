"""The file with the service's environment: what is in it, and what is refused rather than read in another way."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from llamaserve.errors import LlamaserveError
from llamaserve.service.environment import (
    TEMPLATE,
    left_behind,
    of_service,
    read_environment,
    write_template,
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "llamaserve" / "service.env"


def write(file: Path, text: str, mode: int = 0o600) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    file.chmod(mode)
    return file


def test_every_form_that_is_taken(file: Path) -> None:
    text = (
        "# a comment\n; another\n\n"
        "PLAIN=a b  \n"
        "  INDENTED= x\n"
        "EMPTY=\n"
        "SINGLE='a \"b\" # $c'\n"
        'DOUBLE="it\'s "\n'
        'LLAMASERVE_ALLOWED_HOSTS=["a", "b"]\n'
        "LATER=it's #no comment\n"
        "FROM_WINDOWS=x\r\n"
        "PLAIN=twice=2"
    )
    assert read_environment(write(file, text)) == {
        "PLAIN": "twice=2",
        "INDENTED": "x",
        "EMPTY": "",
        "SINGLE": 'a "b" # $c',
        "DOUBLE": "it's ",
        "LLAMASERVE_ALLOWED_HOSTS": '["a", "b"]',
        "LATER": "it's #no comment",
        "FROM_WINDOWS": "x",
    }


@pytest.mark.parametrize(
    "line",
    [
        "export A=secret",
        "A secret",
        "A =secret",
        "1A=secret",
        'A="secret',
        "A='secret'b",
        "A='secret''b'",
        "A=sec\\ret",
        "# joined \\",
        "A=sec\x01ret",
    ],
)
def test_what_systemd_would_read_in_its_own_way_is_refused_and_not_told(file: Path, line: str) -> None:
    with pytest.raises(LlamaserveError, match="line 2: ") as refused:
        read_environment(write(file, f"A=1\n{line}\n"))
    assert "secret" not in refused.value.message


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666, 0o620])
def test_a_file_that_others_may_read_is_refused(file: Path, mode: int) -> None:
    with pytest.raises(LlamaserveError, match="others may read") as refused:
        read_environment(write(file, "A=1", mode))
    assert refused.value.hint is not None
    subprocess.run(refused.value.hint, shell=True, check=True)
    assert read_environment(file) == {"A": "1"}


def test_a_file_that_is_no_text_is_refused(file: Path) -> None:
    write(file, "")
    file.write_bytes(b"A=\xff")
    with pytest.raises(LlamaserveError, match="cannot be read"):
        read_environment(file)


def test_there_need_not_be_a_file(file: Path) -> None:
    assert read_environment(file) == {}


def test_the_first_file_sets_nothing_and_is_the_owners_alone(file: Path) -> None:
    assert write_template(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text() == TEMPLATE
    assert read_environment(file) == {}
    write(file, "A=1")
    assert not write_template(file)
    assert read_environment(file) == {"A": "1"}


def test_a_service_does_not_see_the_settings_of_a_shell() -> None:
    shell = {"PATH": "/bin", "LLAMASERVE_PORT": "1", "LLAMASERVE_CACHE": "/c", "HF_TOKEN": "t", "XDG_CACHE_HOME": "/x"}
    own = {"LLAMASERVE_PORT": "2", "LLAMASERVE_CACHE": "/c"}
    assert of_service(shell, own) == {"PATH": "/bin", "LLAMASERVE_PORT": "2", "LLAMASERVE_CACHE": "/c"}
    assert left_behind(shell, own) == ["HF_TOKEN", "LLAMASERVE_PORT", "XDG_CACHE_HOME"]


def launch(file: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llamaserve.service.launch", str(file), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_launching_becomes_the_server_with_the_files_environment(file: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("models: {}\n")
    write(file, f"LLAMASERVE_MODELS_FILE={tmp_path}/mine.yaml\n")
    done = launch(file, "models", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["models"] == []


def test_launching_with_a_file_that_is_wrong_says_so(file: Path) -> None:
    done = launch(write(file, "A"), "models")
    assert (done.returncode, done.stdout) == (78, "")
    assert "line 1: this is not NAME=value" in done.stderr
    assert "Traceback" not in done.stderr
