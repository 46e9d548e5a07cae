"""``llamaserve service`` as a user types it, on a machine of which the service manager is a stand-in."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from child_processes import listening
from fake_managers import FakeCommands, answer
from unit_supervisor import Unit

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="these look at units of systemd")

SHOW = "systemctl --user show --property=ActiveState,"
RUNNING = "ActiveState=active\nSubState=running\nResult=success\nUnitFileState=enabled\nMainPID={}\n"
STOPPED = "ActiveState=inactive\nSubState=dead\nResult=success\nUnitFileState=enabled\nMainPID=0\n"


class Machine:
    """A home, a folder to type in, and commands of a service manager."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.folder = folder / "a folder"
        self.folder.mkdir()
        self.commands = FakeCommands(folder / "commands", "systemctl", "loginctl")
        self.unit = self.home / ".config" / "systemd" / "user" / "llamaserve.service"
        self.environment_file = self.home / ".config" / "llamaserve" / "service.env"
        self.commands.answers(
            answer("systemctl --user show --property=UnitPath", f"{self.unit.parent}\n"), answer(SHOW, STOPPED)
        )
        with socket.create_server(("127.0.0.1", 0)) as sock:
            self.port = str(sock.getsockname()[1])

    def __call__(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("LLAMASERVE", "HF_", "XDG"))}
        return subprocess.run(
            [sys.executable, "-m", "llamaserve", "service", *words],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=self.folder,
            env={**kept, **self.commands.environment, "HOME": str(self.home), **environment},
        )

    def settings(self, text: str) -> None:
        self.environment_file.parent.mkdir(parents=True)
        self.environment_file.write_text(text)
        self.environment_file.chmod(0o600)

    def untouched(self) -> bool:
        """Tell whether nothing was written, and nothing but questions asked."""
        asked = all(" show " in call or "show-user" in call for call in self.commands.calls())
        return asked and not self.unit.exists() and not self.environment_file.exists()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def models(machine: Machine, starter_model: Path) -> Path:
    """A models.yaml in the folder, with a model called ``m``."""
    path = machine.folder / "models.yaml"
    path.write_text(f"models:\n  m: {{source: 'file:{starter_model}'}}\n")
    return path


def test_installing_runs_what_was_asked_for_in_this_folder(machine: Machine, models: Path) -> None:
    done = machine("install", "m", "--port", machine.port, "--memory", "2GB", "--host", "127.0.0.1")
    assert done.returncode == 0, done.stderr
    unit = Unit(machine.unit.read_text())
    expected = ["serve", "--host", "127.0.0.1", "--port", machine.port, "--memory", "2GB", "m"]
    assert unit.command == [sys.executable, "-P", "-m", "llamaserve", *expected]
    assert unit.folder == str(machine.folder)
    assert unit.environment_files == [str(machine.environment_file)]
    assert "systemctl --user restart llamaserve.service" in machine.commands.calls()
    for shown in (str(machine.unit), str(machine.environment_file), "journalctl --user", "loginctl enable-linger"):
        assert shown in done.stdout
    assert "Traceback" not in done.stderr


def test_paths_become_absolute(machine: Machine, starter_model: Path) -> None:
    (machine.folder / "files").mkdir()
    (machine.folder / "files" / "a model.gguf").symlink_to(starter_model)
    (machine.folder / "mine.yaml").write_text("models: {}\n")
    words = ("files/a model.gguf", "--models-file", "mine.yaml", "--port", machine.port)
    done = machine("install", *words)
    assert done.returncode == 0, done.stderr
    here = machine.folder
    expected = ["--port", machine.port, "--models-file", f"{here}/mine.yaml", f"{here}/files/a model.gguf"]
    assert Unit(machine.unit.read_text()).command[5:] == expected
    done = machine("install", "a model", "--models-dir", "files", "--port", machine.port)
    assert done.returncode == 0, done.stderr
    expected = ["--port", machine.port, "--models-dir", f"{here}/files", "a model"]
    assert Unit(machine.unit.read_text()).command[5:] == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing-like-it"], "no model is called 'nothing-like-it'"),
        (["./absent.gguf"], "there is no file"),
        (["qwen3-4b", "--models-file", "shipped.yaml"], "there is no file"),
        (["--models-dir", "absent"], "there is no folder"),
        (["--port", "99999"], "port"),
        (["--port", "0"], "a service needs a port that stays"),
        (["--memory", "much"], "memory"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
        (["--log-level", "loud"], "log_level"),
        (["--", "-m.gguf"], "-m"),
    ],
)
def test_what_serve_refuses_is_refused_before_anything_is_written(
    machine: Machine, models: Path, words: list[str], message: str
) -> None:
    options = () if "--port" in words else ("--port", machine.port)
    done = machine("install", *options, *words)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert machine.untouched()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("LLAMASERVE_ALLOWED_HOSTS=a b", "allowed_hosts"),
        ("LLAMASERVE_CORS_ORIGINS=example.com/page", "cors_origins"),
        ("LLAMASERVE_SSL_CERTFILE=/absent.pem", "TLS can't be spoken"),
        ("LLAMASERVE_KEYS_FILE=/absent.yaml", "there is no file"),
    ],
)
def test_what_serve_refuses_of_the_environment_file_is_refused(
    machine: Machine, models: Path, line: str, message: str
) -> None:
    machine.settings(f"{line}\n")
    done = machine("install", "--port", machine.port)
    assert done.returncode == 1
    assert message in done.stderr
    assert not machine.unit.exists()


def test_a_port_that_another_program_has_is_refused(machine: Machine, models: Path) -> None:
    with socket.create_server(("127.0.0.1", int(machine.port))):
        done = machine("install", "m", "--port", machine.port)
    assert done.returncode == 1
    assert f"port {machine.port} on 127.0.0.1 is taken" in done.stderr
    assert machine.untouched()


def test_the_port_of_the_service_itself_is_no_obstacle(machine: Machine, models: Path) -> None:
    assert machine("install", "--port", machine.port).returncode == 0
    with listening(int(machine.port), "127.0.0.1") as pid:
        machine.commands.answers(answer(SHOW, RUNNING.format(pid)))
        done = machine("install", "m", "--port", machine.port)
    assert done.returncode == 0, done.stderr
    assert Unit(machine.unit.read_text()).command[-1] == "m"


def test_without_a_user_manager_nothing_is_written(machine: Machine, models: Path) -> None:
    machine.commands.answers(answer("systemctl", status=1, err="Failed to connect to bus: No medium found\n"))
    done = machine("install", "m", "--port", machine.port)
    assert done.returncode == 1
    assert "Failed to connect to bus" in done.stderr
    assert "without su and sudo" in done.stderr
    assert machine.untouched()


def test_a_unit_of_others_is_not_replaced(machine: Machine, models: Path) -> None:
    machine.unit.parent.mkdir(parents=True)
    machine.unit.write_text("[Service]\n")
    for words in (("install", "m", "--port", machine.port), ("uninstall",), ("status",)):
        done = machine(*words)
        assert done.returncode == 1
        assert "is not from llamaserve" in done.stderr
    assert machine.unit.read_text() == "[Service]\n"
    assert not machine.environment_file.exists()


def test_printing_writes_the_file_and_touches_nothing(machine: Machine, models: Path) -> None:
    machine.commands.answers(answer("systemctl", status=1, err="Failed to connect to bus\n"))
    done = machine("install", "m", "--print", LLAMASERVE_API_KEY="a-secret")
    assert done.returncode == 0, done.stderr
    assert Unit(done.stdout).command[-2:] == ["serve", "m"]
    assert machine.untouched()
    assert "LLAMASERVE_API_KEY" in done.stderr
    assert "a-secret" not in done.stdout + done.stderr


def test_it_is_checked_with_the_settings_that_the_service_will_have(machine: Machine, models: Path) -> None:
    other = machine.folder / "other.yaml"
    other.write_text("models: {}\n")
    done = machine("install", "m", "--port", machine.port, LLAMASERVE_MODELS_FILE=str(other), LLAMASERVE_MEMORY="1GB")
    assert done.returncode == 0, done.stderr
    assert "LLAMASERVE_MEMORY, LLAMASERVE_MODELS_FILE" in done.stderr
    assert machine("uninstall").returncode == 0
    machine.environment_file.unlink()
    machine.environment_file.parent.rmdir()
    machine.settings(f"LLAMASERVE_MODELS_FILE={other}\nLLAMASERVE_API_KEY=a-secret\n")
    done = machine("install", "m", "--port", machine.port)
    assert done.returncode == 1
    assert "no model is called 'm'" in done.stderr
    assert "secret" not in done.stderr
    assert not machine.unit.exists()


def test_keys_stay_in_their_file(machine: Machine, models: Path) -> None:
    machine.settings("LLAMASERVE_API_KEY=a-secret\n")
    done = machine("install", "m", "--port", machine.port)
    assert done.returncode == 0, done.stderr
    assert "secret" not in done.stdout + done.stderr + machine.unit.read_text() + str(machine.commands.calls())
    assert machine.environment_file.read_text() == "LLAMASERVE_API_KEY=a-secret\n"
    machine.environment_file.chmod(0o644)
    done = machine("install", "m", "--port", machine.port)
    assert done.returncode == 1
    assert "others may read" in done.stderr


def test_the_first_install_makes_a_file_for_keys(machine: Machine, models: Path) -> None:
    assert machine("install", "m", "--port", machine.port).returncode == 0
    assert machine.environment_file.stat().st_mode & 0o777 == 0o600


def test_lingering_is_done_when_asked_for(machine: Machine, models: Path) -> None:
    done = machine("install", "m", "--port", machine.port, "--linger")
    assert done.returncode == 0, done.stderr
    assert any(call.startswith("loginctl --no-ask-password enable-linger") for call in machine.commands.calls())
    machine.commands.answers(answer("loginctl show-user", "yes\n"))
    assert "enable-linger" not in machine("install", "m", "--port", machine.port).stdout


def test_uninstalling_removes_the_unit_and_leaves_the_keys(machine: Machine, models: Path) -> None:
    assert machine("uninstall").returncode == 0
    assert machine("install", "m", "--port", machine.port).returncode == 0
    done = machine("uninstall")
    assert done.returncode == 0, done.stderr
    assert not machine.unit.exists()
    assert machine.environment_file.exists()
    assert str(machine.environment_file) in done.stdout
    done = machine("uninstall")
    assert (done.returncode, done.stdout) == (0, "there is no service to remove\n")


@pytest.mark.parametrize(
    ("answered", "expected"), [(None, 4), (STOPPED, 3), (RUNNING.format(os.getpid()), 0)], ids=["none", "off", "on"]
)
def test_the_status_is_told_and_is_the_exit_status(
    machine: Machine, models: Path, answered: str | None, expected: int
) -> None:
    if answered is not None:
        assert machine("install", "m", "--port", machine.port).returncode == 0
        machine.commands.answers(answer(SHOW, answered))
    done = machine("status", "--json")
    assert done.returncode == expected, done.stderr
    told = json.loads(done.stdout)
    assert told["installed"] is (answered is not None)
    assert told["running"] is (expected == 0)
    assert (told["since"] is not None) is (expected == 0)
    plain = machine("status")
    assert plain.returncode == expected
    word: dict[int, str] = {4: "not installed", 3: "inactive (dead)", 0: "active (running), since 2"}
    assert word[expected] in plain.stdout


@pytest.mark.parametrize("words", [("install", "--print"), ("status",), ("uninstall",)])
def test_other_systems_are_told_so(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    on = _on("freebsd14")
    done = on(*words)
    assert done.returncode == 1
    assert "not for freebsd14" in done.stderr


def test_on_a_mac_it_is_an_agent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    done = _on("darwin")("install", "--print", "--port", "5055")
    assert done.returncode == 0, done.stderr
    assert "<string>local.llamaserve</string>" in done.stdout
    assert "<string>5055</string>" in done.stdout


def _on(platform: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return ``llamaserve service`` with the idea of being on another system; what differs otherwise is not needed."""
    code = f"import sys; from llamaserve.cli import main; sys.platform = {platform!r}; main()"

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, "service", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    return call
