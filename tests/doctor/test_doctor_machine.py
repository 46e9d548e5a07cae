"""How a machine and an installation are read, and the commands that they need."""

from __future__ import annotations

import shlex
from pathlib import Path

from doctor_machine import described, installed
from hypothesis import given, strategies as st

from llamaserve.doctor.findings import command, one_after_the_other
from llamaserve.doctor.installation import Installation
from llamaserve.doctor.machine import Machine, run_program


@given(st.lists(st.text(st.characters(exclude_characters="\0"), max_size=20), min_size=1, max_size=5))
def test_a_shell_reads_a_command_as_it_was_meant(words: list[str]) -> None:
    assert shlex.split(command(*words)) == words


def test_commands_that_are_not_known_are_left_out() -> None:
    assert one_after_the_other(None, "one", None, "two") == "one && two"


def test_what_is_not_there_reads_as_nothing(tmp_path: Path) -> None:
    machine = described(tmp_path, {"a/file": " text \n", "a/b/file": "x"})
    assert machine.read("a/file") == "text"
    assert machine.read("a/none") is None
    assert machine.read("a") is None
    assert machine.read("a/file/below") is None
    assert machine.exists("a/b")
    assert not machine.exists("a/none")
    assert machine.matching("a/*/file") == [Path("a/b/file")]
    assert machine.ask("none") is None
    assert machine.sysctl("hw.memsize") is None


def test_a_file_is_read_whatever_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\xff\xfe" * 1_000_000)
    text = described(tmp_path).read("file")
    assert text is not None
    assert len(text) <= 256 * 1024


def test_programs_that_fail_are_as_if_they_were_not_there() -> None:
    assert run_program(("/bin/sh", "-c", "echo told")) == "told"
    assert run_program(("/bin/sh", "-c", "exit 3")) is None
    assert run_program(("/no/such/program",)) is None


def test_packages_are_installed_with_what_the_system_has(tmp_path: Path) -> None:
    wanted = {
        "apt-get": "sudo apt-get update && sudo apt-get install -y build-essential",
        "dnf": "sudo dnf install -y gcc-c++ make",
        "pacman": "sudo pacman -S --needed --noconfirm base-devel",
        "apk": "sudo apk add build-base",
        "none": None,
    }
    for manager, line in wanted.items():
        assert described(tmp_path, found=(manager,)).install("compiler") == line
    assert described(tmp_path, found=("apk",), superuser=True).install("compiler") == "apk add build-base"
    assert described(tmp_path, system="Darwin").install("compiler") == "xcode-select --install"
    assert described(tmp_path, found=("apk",)).install("cuda") is None


def test_containers_are_noticed(tmp_path: Path) -> None:
    assert not described(tmp_path / "a").in_container
    assert described(tmp_path / "b", {"proc/1/cgroup": "0::/docker/abc"}).in_container
    assert described(tmp_path / "c", {"run/.containerenv": ""}).in_container


def test_this_machine_and_installation_are_read() -> None:
    assert Machine().system in ("Linux", "Darwin")
    assert any(line.startswith("llama-cpp-python") for line in Installation().requirements())
    assert any(line.startswith("uvloop") for line in Installation().requirements("fast"))


def test_an_installation_by_pip_knows_its_requirements() -> None:
    installation = installed(Path("/opt/venv"))
    assert any(line.startswith("llama-cpp-python") for line in installation.requirements())
    assert not any(line.startswith("pytest") for line in installation.requirements())
    assert any(line.startswith("uvloop") for line in installation.requirements("fast"))
    assert installation.install("a>=1") == "/opt/venv/bin/python -m pip install 'a>=1'"
