"""Starts the real server as a user does, in its own process on a free port, and ends it without leaving a trace."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import httpx

_CACHE, _STATE = (tempfile.mkdtemp(prefix=f"llamaserve-{what}-") for what in ("tests", "state"))
for _folder in (_CACHE, _STATE):
    atexit.register(shutil.rmtree, _folder, ignore_errors=True)

START_LIMIT = 60  # seconds
STOP_LIMIT = 20


class RunningServer:
    """``llamaserve COMMAND ARGUMENTS...`` within a ``with`` block. ``url`` has no path; ``lines`` is its output."""

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self._command = [sys.executable, "-m", "llamaserve", *arguments, "--port", "0"]
        # No test shall find what an earlier one has evaluated, unless it wants to, or touch what a user keeps.
        defaults = {"PYTHONUNBUFFERED": "1", "LLAMASERVE_SAVED_PREFIXES": "0", "LLAMASERVE_SHUTDOWN_LIMIT": "0"}
        defaults |= {"LLAMASERVE_CACHE": _CACHE, "LLAMASERVE_STATE_DIR": _STATE}
        self._environment = {**os.environ, **defaults, **(environment or {})}
        self.lines: list[str] = []
        self.url = ""

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(START_LIMIT) or not self.url:
            self.stop()
            raise RuntimeError("the server did not become ready:\n" + "\n".join(self.lines))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self, how: signal.Signals = signal.SIGINT) -> int:
        """End the server and return its exit status; its process group must be empty then."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            code = self.process.wait(STOP_LIMIT)
        finally:
            leftovers = self._kill_group()
            self._reader.join()
            assert self.process.stdout is not None
            self.process.stdout.close()
        assert not leftovers, "the server left processes behind"
        return code

    def kill(self) -> None:
        """Kill the server and all of its processes, as a machine that loses its power does."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        wait_until(lambda: not self.has_processes)

    @property
    def has_processes(self) -> bool:
        """Whether there is anything of the server."""
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def _kill_group(self) -> bool:
        """Kill what is left of the server's process group, and tell whether there was anything."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        self.process.wait()
        return True

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if (match := re.search(r"base URL\s+(https?://\S+)/v1", line)) is not None:
                self.url = match[1]
            if "API docs" in line:
                self._ready.set()
        self._ready.set()

    def get(self, path: str) -> Any:
        """Return the JSON at a path."""
        answer = httpx.get(self.url + path, timeout=30)
        answer.raise_for_status()
        return answer.json()

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """Send a JSON body and return the response, whatever its status."""
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    @property
    def running(self) -> int:
        """Number of sequences under evaluation or waiting."""
        health = self.get("/v1/internal/health")
        return int(health["running"]) + int(health["waiting"])

    def worker_pid(self) -> int:
        """Return the process id of the current model's child, which must be there."""
        return int(self.get("/v1/internal/model/info")["pid"])


def wait_until(condition: Callable[[], bool], limit: float = 10.0) -> None:
    """Return as soon as the condition holds; fail when it does not within ``limit`` seconds."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)
