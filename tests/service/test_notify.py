"""What a service manager hears, over sockets of both kinds."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamaserve.errors import LlamaserveError
from llamaserve.service.notify import Notifier


@pytest.fixture(params=["path", "abstract"])
def listening(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """A service manager's socket, and its address as the environment has it."""
    if request.param == "abstract" and sys.platform != "linux":
        pytest.skip("abstract sockets are Linux's")
    address = str(tmp_path / "n") if request.param == "path" else f"@llamaserve-tests-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + address[1:] if address.startswith("@") else address)
        manager.settimeout(5)
        yield address, manager


def test_news_come_in_one_message(listening: tuple[str, socket.socket]) -> None:
    address, manager = listening
    Notifier.of({"NOTIFY_SOCKET": address}).tell("READY=1", "STATUS=listening")
    assert manager.recv(100) == b"READY=1\nSTATUS=listening"


def test_signs_of_life_come_from_the_event_loop_several_times_in_the_limit(
    listening: tuple[str, socket.socket],
) -> None:
    address, manager = listening
    environment = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "400000", "WATCHDOG_PID": str(os.getpid())}

    async def follow() -> list[float]:
        loop = asyncio.get_running_loop()
        alive = asyncio.create_task(Notifier.of(environment).stay_in_touch())
        times = []
        for _ in range(3):
            assert await loop.run_in_executor(None, manager.recv, 100) == b"WATCHDOG=1"
            times.append(loop.time())
        alive.cancel()
        return times

    times = asyncio.run(follow())
    assert times[2] - times[0] >= 0.15  # two pauses of a tenth of a second each
    assert environment == {}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WATCHDOG_USEC": "1000"},
        {"NOTIFY_SOCKET": "", "WATCHDOG_USEC": "1000"},
        {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"},
        {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"},
    ],
)
def test_who_does_not_want_signs_of_life_gets_none(environment: dict[str, str]) -> None:
    notifier = Notifier.of(environment)
    asyncio.run(asyncio.wait_for(notifier.stay_in_touch(), 5))


def test_without_a_manager_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        Notifier.of({}).tell("READY=1")
    assert caplog.messages == []


def test_a_manager_that_is_gone_is_told_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Notifier.of({"NOTIFY_SOCKET": str(tmp_path / "gone")}).tell("READY=1")
    (message,) = caplog.messages
    assert "cannot be told READY=1" in message


@pytest.mark.parametrize(
    "environment",
    [
        {"NOTIFY_SOCKET": "relative"},
        {"NOTIFY_SOCKET": "vsock:2:1234"},
        {"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "soon"},
        {"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "0"},
        {"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "-1"},
    ],
)
def test_what_is_no_address_or_time_is_refused(environment: dict[str, str]) -> None:
    name = "WATCHDOG_USEC" if "WATCHDOG_USEC" in environment else "NOTIFY_SOCKET"
    with pytest.raises(LlamaserveError, match=name):
        Notifier.of(environment)


def test_systemds_own_receiver_understands(tmp_path: Path) -> None:
    """What ``systemd-notify`` says."""
    address = str(tmp_path / "n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(5)
        try:
            subprocess.run(["systemd-notify", "--no-block", "READY=1"], env={"NOTIFY_SOCKET": address}, check=True)
        except FileNotFoundError:
            pytest.skip("systemd-notify is not here")
        theirs = manager.recv(100)
        Notifier.of({"NOTIFY_SOCKET": address}).tell("READY=1")
        assert manager.recv(100) == theirs.rstrip(b"\n")
