"""The real server, started from its unit and watched as systemd does it."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from child_processes import listening
from running_server import wait_until
from unit_supervisor import Supervisor, Unit

from llamaserve.service import health
from llamaserve.service.definition import STOP_LIMIT, Definition
from llamaserve.service.manager import State
from llamaserve.service.status import NOT_INSTALLED, NOT_RUNNING, RUNNING, status_of
from llamaserve.service.unit import unit_text

FOLDER = 'the %models\' "$folder" \\n'


class Managed:
    """What ``status_of`` needs of a manager."""

    file = Path("/etc/unit")
    logs = restart = ""

    def __init__(self, state: State) -> None:
        self._state = state

    def state(self) -> State:
        return self._state


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def unit(starter_model: Path, tmp_path: Path, port: int) -> Unit:
    """A unit in a folder with a models.yaml, which an environment file with a port belongs to."""
    folder = tmp_path / FOLDER
    folder.mkdir()
    (folder / "models.yaml").write_text(
        f"defaults: {{context: 512, parallel: 1}}\nmodels:\n  m: {{source: 'file:{starter_model}'}}\n"
    )
    file = folder / "service.env"
    file.write_text(
        f"# settings\nLLAMASERVE_PORT={port}\nLLAMASERVE_SAVED_PREFIXES='0'\nLLAMASERVE_CACHE=\"{tmp_path}/cache\"\n"
    )
    file.chmod(0o600)
    return Unit(unit_text(Definition(sys.executable, ("serve", "m"), str(folder), str(file))))


@pytest.fixture
def supervisor(unit: Unit) -> Iterator[Supervisor]:
    with tempfile.TemporaryDirectory() as folder, Supervisor(unit, dict(os.environ), f"{folder}/notify", 2) as running:
        yield running


def answer(port: int) -> str:
    """Have a model answer, which must be there by then or on its way."""
    body = {"prompt": "One, two,", "max_tokens": 4}
    done = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
    return str(done.raise_for_status().json()["choices"][0]["text"])


def test_a_life_under_supervision(supervisor: Supervisor, port: int) -> None:
    supervisor.start()
    supervisor.wait_for("READY=1")
    assert f"STATUS=listening at http://127.0.0.1:{port}" in supervisor.messages
    assert answer(port)
    supervisor.messages.clear()
    supervisor.wait_for("WATCHDOG=1", limit=5)
    assert supervisor.stop() in (0, -signal.SIGTERM)  # both are a clean end to systemd
    assert "STOPPING=1" in supervisor.messages
    assert f"EXTEND_TIMEOUT_USEC={(5 + STOP_LIMIT) * 1_000_000}" in supervisor.messages
    supervisor.start()
    supervisor.wait_for("READY=1")
    assert answer(port)


def test_a_server_that_is_killed_can_be_started_again_at_once(supervisor: Supervisor, port: int) -> None:
    first = supervisor.start()
    supervisor.wait_for("READY=1")
    answer(port)
    supervisor.kill()
    assert supervisor.start() != first
    supervisor.wait_for("READY=1")
    assert answer(port)
    assert supervisor.stop() in (0, -signal.SIGTERM)


def test_a_server_that_hangs_is_silent(supervisor: Supervisor) -> None:
    pid = supervisor.start()
    supervisor.wait_for("READY=1")
    os.kill(pid, signal.SIGSTOP)
    while supervisor._receive():
        pass  # what it had said before
    supervisor.messages.clear()
    deadline = time.monotonic() + 1.5  # three pauses between signs of life
    while time.monotonic() < deadline:
        supervisor._receive()
    assert supervisor.messages == []
    os.kill(pid, signal.SIGCONT)
    supervisor.wait_for("WATCHDOG=1", limit=5)


def test_the_status_is_that_of_the_process(supervisor: Supervisor, port: int) -> None:
    before = int(time.time())
    pid = supervisor.start()
    supervisor.wait_for("READY=1")
    manager = Managed(State(True, True, True, pid, "active (running)"))
    status = status_of(manager)
    assert status.url == f"http://127.0.0.1:{port}"
    assert status.healthy
    assert status.since is not None
    assert before - 1 <= status.since.timestamp() <= time.time()
    assert status.exit_status == RUNNING
    supervisor.kill()
    wait_until(lambda: status_of(manager).url is None)


def test_the_exit_status_says_if_it_runs() -> None:
    absent = status_of(Managed(State(installed=False)))
    assert (absent.exit_status, absent.healthy, absent.since) == (NOT_INSTALLED, False, None)
    stopped = status_of(Managed(State(True, True, False, None, "inactive (dead)")))
    assert (stopped.exit_status, stopped.url) == (NOT_RUNNING, None)


@pytest.mark.parametrize(
    ("addresses", "url"),
    [
        (("127.0.0.1",), "http://127.0.0.1:{}"),
        (("::1",), "http://[::1]:{}"),
        (("::1", "127.0.0.1"), "http://127.0.0.1:{}"),
        (("0.0.0.0",), "http://127.0.0.1:{}"),
    ],
)
def test_the_url_is_where_the_process_listens(
    addresses: tuple[str, ...], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "_ASKING", 0.1)  # nobody answers
    port = free_port()
    with listening(port, *addresses) as pid:
        status = status_of(Managed(State(True, True, True, pid, "running")))
    assert (status.url, status.healthy) == (url.format(port), False)
