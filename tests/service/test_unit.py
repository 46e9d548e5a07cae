"""The unit: whatever paths and names are in it, systemd reads what was meant."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from unit_supervisor import Unit

from llamaserve import serving
from llamaserve.errors import LlamaserveError
from llamaserve.service.definition import MARK, Definition, define
from llamaserve.service.unit import FILE_NAME, unit_text

QUOTES = set("\"'\\")
HOSTILE = "a b%n$HOME ${PATH}'c'\"d\"\\e;#{f}[g]*?~é"
ENVIRONMENT = "/home/ann/.config/llamaserve/service.env"

characters = st.characters(exclude_categories=("Cc", "Cs", "Cn", "Co"), exclude_characters="/")
names = st.one_of(st.text(characters, min_size=1, max_size=20), st.text(" \"'\\%$;*?[]{}:-@a", min_size=1, max_size=12))


def folder(name: str) -> str:
    """Return a folder by this name, such as a definition takes."""
    return "/" + (name.strip() + "_" if name.endswith("\\") else name.strip())


def definition(
    *words: str, folder: str = "/srv", interpreter: str = sys.executable, file: str = ENVIRONMENT
) -> Definition:
    return Definition(interpreter, ("serve", *words), folder, file)


@given(st.lists(names), names, names.filter(lambda name: not set(name) & QUOTES), names)
def test_systemd_reads_what_was_meant(words: list[str], path: str, python: str, config: str) -> None:
    what = definition(*words, folder=folder(path), interpreter=f"/{python}/python", file=f"/{config}/service.env")
    unit = Unit(unit_text(what))
    assert unit.command == [f"/{python}/python", "-P", "-m", "llamaserve", "serve", *words]
    assert unit.folder == folder(path)
    assert unit.values["Service"].keys() == Unit(unit_text(definition())).values["Service"].keys()


def test_an_environment_file_is_found_whatever_it_is_called(tmp_path: Path) -> None:
    file = tmp_path / HOSTILE / "service.env"
    file.parent.mkdir()
    file.write_text("A=1\n")
    (tmp_path / "abcdefgh").mkdir()
    assert Unit(unit_text(definition(file=str(file)))).environment_files == [str(file)]


@pytest.mark.parametrize("hostile", [False, True])
def test_systemd_has_nothing_to_complain_of(tmp_path: Path, hostile: bool) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not here")
    what = definition("starter")
    if hostile:
        (tmp_path / HOSTILE).mkdir()
        python = tmp_path / HOSTILE.translate(dict.fromkeys(map(ord, QUOTES)))
        python.symlink_to(sys.executable)
        here = str(tmp_path / HOSTILE)
        what = definition(HOSTILE, ";", "", folder=here, interpreter=str(python), file=f"{here}/service.env")
    file = tmp_path / FILE_NAME
    file.write_text(unit_text(what))
    verify = ["systemd-analyze", "verify", "--user", "--recursive-errors=no", str(file)]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(verify, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_unit_says_what_a_server_needs() -> None:
    text = unit_text(definition())
    service = Unit(text).values["Service"]
    assert MARK in text.splitlines()[0]
    assert service["Type"] == "notify"
    assert service["Restart"] == "on-failure"
    assert service["KillMode"] == "mixed"
    assert service["OOMPolicy"] == "continue"  # a model that is killed for memory does not end the server
    assert service["NoNewPrivileges"] == "yes"
    assert service["ExecReload"] == "kill -HUP $MAINPID"
    assert Unit(text).values["Install"] == {"WantedBy": "default.target"}
    assert Unit(text).stop_limit >= 2 * serving._STOP_LIMIT


@pytest.mark.parametrize("bad", ["a\nExecStartPre=/bin/false", "a\0b", "a\rb", "a\x1bb", "\udcff", "a\x85b"])
def test_what_no_line_can_hold_is_refused(bad: str) -> None:
    for make in (
        lambda: definition(bad),
        lambda: definition(folder=f"/{bad}"),
        lambda: definition(interpreter=f"/{bad}"),
        lambda: definition(file=f"/{bad}"),
    ):
        with pytest.raises(LlamaserveError, match="cannot hold"):
            make()


@pytest.mark.parametrize("bad", ["/a ", "/a\\", "/a\u00a0"])
def test_a_folder_of_which_the_end_would_be_lost_is_refused(bad: str) -> None:
    with pytest.raises(LlamaserveError, match="ends as no line"):
        definition(folder=bad)


@pytest.mark.parametrize("bad", sorted(QUOTES))
def test_a_program_that_systemd_does_not_run_is_refused(bad: str) -> None:
    with pytest.raises(LlamaserveError, match="runs no program"):
        unit_text(definition(interpreter=f"/{bad}/python"))


def test_a_model_that_looks_like_an_option_is_refused() -> None:
    with pytest.raises(LlamaserveError, match="looks like an option"):
        define(["--host=0.0.0.0"], [], Path(ENVIRONMENT))


def test_a_folder_that_is_gone_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(LlamaserveError, match="folder is gone"):
        define([], [], Path(ENVIRONMENT))
