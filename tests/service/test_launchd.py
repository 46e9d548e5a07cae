"""The service under launchd, as far as that can be seen from its property list and from what ``launchctl`` is told.

launchd itself is on macOS only; its answers here are those that its manual and its users show.
"""

from __future__ import annotations

import os
import plistlib
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_managers import FakeCommands, answer
from hypothesis import given, strategies as st

from llamaserve.errors import LlamaserveError
from llamaserve.service.definition import MARK, Definition
from llamaserve.service.launchd import Launchd
from llamaserve.service.manager import State
from llamaserve.service.plist import LABEL, plist_text

DOMAIN = f"gui/{os.getuid()}"
TARGET = f"{DOMAIN}/{LABEL}"
PRINT = f"launchctl print {TARGET}"
KEYS = {  # of launchd.plist(5), with the types it gives them
    "Label": str,
    "ProgramArguments": list,
    "WorkingDirectory": str,
    "RunAtLoad": bool,
    "KeepAlive": dict,
    "ThrottleInterval": int,
    "ExitTimeOut": int,
    "ProcessType": str,
    "StandardOutPath": str,
    "StandardErrorPath": str,
    "Umask": int,
}
UNKNOWN = answer(PRINT, status=113, err=f'Could not find service "{LABEL}" in domain for user gui: 501\n')
RUNNING = f"""{TARGET} = {{
	active count = 1
	path = /Users/ann/Library/LaunchAgents/{LABEL}.plist
	type = LaunchAgent
	state = running

	program = /usr/bin/python3
	pid = 4711
	last exit code = (never exited)
}}
"""
ENDED = RUNNING.replace("state = running", "state = spawn scheduled").replace("	pid = 4711\n", "")
ENDED = ENDED.replace("(never exited)", "1")


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCommands:
    """A ``launchctl`` that knows the agent from when it is told of it until it is told to forget it."""
    commands = FakeCommands(tmp_path / "commands", "launchctl")
    monkeypatch.setenv("PATH", commands.environment["PATH"])
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    commands.answers(
        UNKNOWN,
        answer("launchctl bootstrap", then=[answer(PRINT, RUNNING)]),
        answer("launchctl bootout", then=[UNKNOWN]),
    )
    return commands


@pytest.fixture
def launchd(commands: FakeCommands) -> Launchd:
    return Launchd()


def definition(*words: str) -> Definition:
    return Definition(sys.executable, ("serve", *words), "/srv", "/Users/ann/service.env")


def values(text: str) -> dict[str, Any]:
    loaded: dict[str, Any] = plistlib.loads(text.encode())
    return loaded


@given(st.lists(st.text(st.characters(exclude_categories=("Cc", "Cs"), exclude_characters="\ufffe\uffff"))))
def test_launchd_reads_what_was_meant(words: list[str]) -> None:
    read = values(plist_text(definition(*words), Path("/log")))
    launch = [sys.executable, "-P", "-m", "llamaserve.service.launch", "/Users/ann/service.env"]
    assert read["ProgramArguments"] == [*launch, "serve", *words]


def test_the_property_list_has_keys_that_are_documented() -> None:
    text = plist_text(definition(), Path("/Users/ann/Library/Logs/llamaserve/llamaserve.log"))
    read = values(text)
    assert {key: type(value) for key, value in read.items()} == KEYS
    assert read["KeepAlive"] == {"SuccessfulExit": False}
    assert read["Umask"] == 0o077
    assert f"<!-- {MARK}" in text


def test_installing_writes_and_starts(launchd: Launchd, commands: FakeCommands, tmp_path: Path) -> None:
    launchd.check()
    launchd.install(definition("starter"))
    assert launchd.file == tmp_path / "home" / "Library" / "LaunchAgents" / f"{LABEL}.plist"
    assert launchd.file.read_text() == launchd.text(definition("starter"))
    assert Path(values(launchd.file.read_text())["StandardOutPath"]).parent.is_dir()
    assert [call for call in commands.calls() if " print " not in call] == [
        f"launchctl enable {TARGET}",
        f"launchctl bootstrap {DOMAIN} {launchd.file}",
    ]


def test_installing_again_waits_until_the_old_one_is_gone(launchd: Launchd, commands: FakeCommands) -> None:
    launchd.install(definition())
    commands.answers(answer("launchctl bootout", then=[answer(PRINT, RUNNING, then=[UNKNOWN])]))
    commands.calls()
    launchd.install(definition("other"))
    assert launchd.file.read_text() == launchd.text(definition("other"))
    calls = commands.calls()
    out, back = calls.index(f"launchctl bootout {TARGET}"), calls.index(f"launchctl bootstrap {DOMAIN} {launchd.file}")
    assert calls[out:back].count(PRINT) == 2


@pytest.mark.parametrize("former", [None, "older"])
def test_an_agent_that_launchd_does_not_take_leaves_all_as_it_was(
    launchd: Launchd, commands: FakeCommands, former: str | None
) -> None:
    if former is not None:
        launchd.install(definition(former))
    accepted = answer("launchctl bootstrap", then=[answer(PRINT, RUNNING)])
    refusal = "Bootstrap failed: 5: Input/output error\n"
    commands.answers(answer("launchctl bootstrap", status=5, err=refusal, then=[accepted]))
    with pytest.raises(LlamaserveError, match="Bootstrap failed: 5"):
        launchd.install(definition())
    if former is None:
        assert not launchd.file.exists()
    else:
        assert launchd.file.read_text() == launchd.text(definition(former))
        assert launchd.state().running


def test_without_a_login_at_the_screen_nothing_is_done(launchd: Launchd, commands: FakeCommands) -> None:
    commands.answers(answer("launchctl print", status=125, err="Domain does not support specified action\n"))
    with pytest.raises(LlamaserveError, match="Domain does not support") as refused:
        launchd.check()
    assert "log in at the screen" in str(refused.value.hint)
    with pytest.raises(LlamaserveError, match="Domain does not support"):
        launchd.install(definition())
    assert not launchd.file.exists()


def test_an_agent_of_others_stays(launchd: Launchd, commands: FakeCommands) -> None:
    launchd.file.parent.mkdir(parents=True)
    launchd.file.write_bytes(plistlib.dumps({"Label": LABEL}))
    for act in (lambda: launchd.install(definition()), launchd.uninstall, launchd.state):
        with pytest.raises(LlamaserveError, match="is not from llamaserve"):
            act()
    assert commands.calls() == []


def test_uninstalling_stops_and_removes(launchd: Launchd, commands: FakeCommands) -> None:
    assert not launchd.uninstall()
    assert commands.calls() == []
    launchd.install(definition())
    assert launchd.uninstall()
    assert not launchd.file.exists()
    assert f"launchctl bootout {TARGET}" in commands.calls()
    assert launchd.state() == State(installed=False)


def test_uninstalling_one_that_is_not_loaded(launchd: Launchd, commands: FakeCommands) -> None:
    launchd.install(definition())
    commands.answers(UNKNOWN)
    assert launchd.uninstall()
    assert not launchd.file.exists()


@pytest.mark.parametrize(
    ("printed", "disabled", "state"),
    [
        (answer(PRINT, RUNNING), "", State(True, True, True, 4711, "running")),
        (answer(PRINT, ENDED), "", State(True, True, False, None, "spawn scheduled, last exit code 1")),
        (UNKNOWN, f'"{LABEL}" => enabled', State(True, True, False, None, "not loaded")),
        (UNKNOWN, f'"{LABEL}" => disabled', State(True, False, False, None, "not loaded")),
        (UNKNOWN, f'"{LABEL}" => true', State(True, False, False, None, "not loaded")),
    ],
)
def test_the_state_is_what_launchd_says(
    launchd: Launchd, commands: FakeCommands, printed: Any, disabled: str, state: State
) -> None:
    launchd.install(definition())
    commands.answers(
        printed,
        answer("launchctl print-disabled", f'disabled services = {{\n\t\t"a.b" => disabled\n\t\t{disabled}\n}}'),
    )
    assert launchd.state() == state
