"""The service under systemd, as far as that can be seen from what ``systemctl`` is told."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from fake_managers import FakeCommands, answer

from llamaserve.errors import LlamaserveError
from llamaserve.service.definition import Definition
from llamaserve.service.manager import State
from llamaserve.service.systemd import Systemd

UNIT = "llamaserve.service"
SHOW = "systemctl --user show --property=ActiveState,"
NO_BUS = answer("systemctl", status=1, err="Failed to connect to bus: No medium found\n")


def shown(active: str, sub: str, result: str = "success", enabled: str = "enabled", pid: int = 0) -> str:
    return f"MainPID={pid}\nResult={result}\nActiveState={active}\nSubState={sub}\nUnitFileState={enabled}\n"


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCommands:
    commands = FakeCommands(tmp_path / "commands", "systemctl", "loginctl")
    monkeypatch.setenv("PATH", commands.environment["PATH"])
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    commands.answers(
        answer("systemctl --user show --property=UnitPath", f"/etc/x {tmp_path}/config/systemd/user /usr/lib/y\n"),
        answer(SHOW, shown("inactive", "dead")),
    )
    return commands


@pytest.fixture
def systemd(commands: FakeCommands) -> Systemd:
    return Systemd()


def definition(word: str = "starter") -> Definition:
    return Definition(sys.executable, ("serve", word), "/srv", "/etc/service.env")


def test_installing_writes_enables_and_starts(systemd: Systemd, commands: FakeCommands, tmp_path: Path) -> None:
    systemd.check()
    systemd.install(definition())
    assert systemd.file == tmp_path / "config" / "systemd" / "user" / UNIT
    assert systemd.file.read_text() == systemd.text(definition())
    assert systemd.file.stat().st_mode & 0o777 == 0o644
    assert [*systemd.file.parent.iterdir()] == [systemd.file]
    _, *calls = commands.calls()
    assert [call for call in calls if "show" not in call] == [
        "systemctl --user daemon-reload",
        f"systemctl --user enable {UNIT}",
        f"systemctl --user restart {UNIT}",
    ]


def test_installing_again_updates(systemd: Systemd, commands: FakeCommands) -> None:
    systemd.install(definition())
    systemd.install(definition("other"))
    assert systemd.file.read_text() == systemd.text(definition("other"))
    assert commands.calls().count(f"systemctl --user restart {UNIT}") == 2


def test_a_service_that_has_given_up_gets_another_chance(systemd: Systemd, commands: FakeCommands) -> None:
    commands.answers(answer(SHOW, shown("failed", "failed", "start-limit-hit")))
    systemd.install(definition())
    calls = commands.calls()
    assert calls.index(f"systemctl --user reset-failed {UNIT}") < calls.index(f"systemctl --user restart {UNIT}")


def test_without_a_user_manager_nothing_is_done(systemd: Systemd, commands: FakeCommands) -> None:
    commands.answers(NO_BUS)
    with pytest.raises(LlamaserveError, match="Failed to connect to bus: No medium found") as refused:
        systemd.check()
    assert "without su and sudo" in str(refused.value.hint)


def test_without_systemd_nothing_is_done(systemd: Systemd, commands: FakeCommands) -> None:
    (commands.path / "systemctl").unlink()
    with pytest.raises(LlamaserveError, match="there is no systemctl on this machine"):
        systemd.check()


def test_a_folder_that_systemd_does_not_read_is_refused(systemd: Systemd, commands: FakeCommands) -> None:
    commands.answers(answer("systemctl --user show --property=UnitPath", "/home/ann/.config/systemd/user\n"))
    with pytest.raises(LlamaserveError, match="does not read"):
        systemd.check()


@pytest.mark.parametrize("former", [None, "older"])
def test_a_unit_that_systemd_does_not_take_leaves_all_as_it_was(
    systemd: Systemd, commands: FakeCommands, former: str | None
) -> None:
    if former is not None:
        systemd.install(definition(former))
    commands.answers(answer("systemctl --user enable", status=1, err="Read-only file system\n"))
    with pytest.raises(LlamaserveError, match="Read-only file system"):
        systemd.install(definition())
    if former is None:
        assert [*systemd.file.parent.iterdir()] == []
    else:
        assert systemd.file.read_text() == systemd.text(definition(former))
    assert commands.calls()[-1] == "systemctl --user daemon-reload"


def test_a_server_that_does_not_start_is_told_with_its_log(systemd: Systemd, commands: FakeCommands) -> None:
    commands.answers(answer("systemctl --user restart", status=1, err="Job for llamaserve.service failed.\n"))
    with pytest.raises(LlamaserveError, match="Job for llamaserve") as failed:
        systemd.install(definition())
    assert failed.value.hint == f"journalctl --user -u {UNIT} -n 50"
    assert systemd.file.exists()


def test_a_unit_of_others_stays(systemd: Systemd, commands: FakeCommands) -> None:
    systemd.file.parent.mkdir(parents=True)
    systemd.file.write_text("[Service]\nExecStart=/bin/true\n")
    for act in (lambda: systemd.install(definition()), systemd.uninstall, systemd.state):
        with pytest.raises(LlamaserveError, match="is not from llamaserve"):
            act()
    assert systemd.file.read_text() == "[Service]\nExecStart=/bin/true\n"
    assert commands.calls() == []


@pytest.mark.parametrize("failed", [False, True])
def test_uninstalling_stops_disables_and_removes(systemd: Systemd, commands: FakeCommands, failed: bool) -> None:
    systemd.install(definition())
    commands.answers(answer(SHOW, shown("failed" if failed else "inactive", "dead")))
    commands.calls()
    assert systemd.uninstall()
    assert not systemd.file.exists()
    assert [call for call in commands.calls() if "show" not in call] == [
        f"systemctl --user disable --now {UNIT}",
        "systemctl --user daemon-reload",
        *([f"systemctl --user reset-failed {UNIT}"] if failed else []),
    ]


def test_uninstalling_nothing_is_fine_even_without_systemd(systemd: Systemd, commands: FakeCommands) -> None:
    commands.answers(NO_BUS)
    assert not systemd.uninstall()
    assert commands.calls() == []


def test_what_systemd_cannot_stop_stays(systemd: Systemd, commands: FakeCommands) -> None:
    systemd.install(definition())
    commands.answers(NO_BUS)
    with pytest.raises(LlamaserveError, match="bus"):
        systemd.uninstall()
    assert systemd.file.exists()


@pytest.mark.parametrize(
    ("answered", "state"),
    [
        (shown("active", "running", pid=7), State(True, True, True, 7, "active (running)")),
        (shown("reloading", "reload", pid=7), State(True, True, True, 7, "reloading (reload)")),
        (shown("activating", "start", pid=7), State(True, True, False, 7, "activating (start)")),
        (shown("failed", "failed", "exit-code"), State(True, True, False, None, "failed (failed), exit-code")),
        (shown("inactive", "dead", enabled="disabled"), State(True, False, False, None, "inactive (dead)")),
    ],
)
def test_the_state_is_what_systemd_says(systemd: Systemd, commands: FakeCommands, answered: str, state: State) -> None:
    assert systemd.state() == State(installed=False)
    systemd.install(definition())
    commands.answers(answer(SHOW, answered))
    assert systemd.state() == state


def test_lingering_is_asked_for_and_seen(systemd: Systemd, commands: FakeCommands) -> None:
    commands.answers(answer("loginctl show-user", "no\n"))
    assert not systemd.lingers()
    commands.answers(answer("loginctl show-user", "yes\n"))
    assert systemd.lingers()
    commands.answers(answer("loginctl show-user", status=1))
    assert not systemd.lingers()
    commands.calls()
    systemd.linger()
    (call,) = commands.calls()
    assert call.startswith("loginctl --no-ask-password enable-linger ")
    commands.answers(answer("loginctl --no-ask-password", status=1, err="Access denied\n"))
    with pytest.raises(LlamaserveError, match="Access denied") as refused:
        systemd.linger()
    assert str(refused.value.hint).startswith("sudo loginctl enable-linger ")
