"""The server under test: the real program in folders of its own, which can be ended, killed and started again.

It keeps its port, so that clients need not be told. What it logs goes through a pipe into a file, which a limit on the
size of its own files does not touch. Knows nothing of clients and faults.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import ssl
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from faults.questions import CHAT_MODEL, HUGE_MODEL, SMALL_MODEL, SPEECH_MODEL, VECTOR_MODEL
from faults.vitals import session
from llamaserve.keys.key_file import create_key
from llamaserve.keys.keyring import Limits

START_LIMIT = 120.0  # seconds
STOP_LIMIT = 60.0
ENDED = (0, -signal.SIGTERM)  # exit statuses after SIGTERM: uvicorn passes the signal on, once all is over
_ENDING = 20.0  # seconds for what is left of a server to see that it is gone
_WORDS = 400  # lines of the log that are kept
_READY = "API docs"  # what it says last of its start
_BUG_LINES = 200  # lines of it that are evidence of one bug, up to the next record
_RECORD = re.compile(r"\d{4}-\d\d-\d\d \d\d:")
_LONGEST_LINE = 16 * 1024 * 1024
BUG = re.compile(
    r"Traceback \(most recent call last\)|was never (retrieved|awaited)|Task was destroyed"
    r"|was ended by (?!SIGKILL)|ended with exit code|GGML_ASSERT|Fatal Python error|terminate called"  # nobody did that
)

KEYS = {"ann": False, "bob": False, "root": True}  # and whether they are admin keys
_EXACT = {"flash_attention": "off", "spill": 8}


# For clients of plain HTTP: each would read the machine's certificates otherwise, which takes 20 ms.
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class Down(Exception):
    """The server is not there, or does not answer. ``began`` is the moment of the question."""

    def __init__(self, what: str, began: float) -> None:
        super().__init__(what)
        self.began = began


@dataclass(frozen=True)
class Weights:
    """The files of models that are served."""

    chat: Path
    vectors: Path
    speech: Path | None


def models_text(weights: Weights, *, context: int = 1024, queue: int = 64) -> str:
    """Return a models.yaml: the chat model under three names, one of which asks for more memory than there is."""
    source = f"file:{weights.chat}"
    models: dict[str, Any] = {
        CHAT_MODEL: {"source": source, "context": context, "parallel": 4, "queue": queue, **_EXACT},
        SMALL_MODEL: {"source": source, "context": 256, "parallel": 2, **_EXACT},
        HUGE_MODEL: {"source": source, "context": 8192, "parallel": 64, **_EXACT},
    }
    models[VECTOR_MODEL] = {"source": f"file:{weights.vectors}", "context": 512, "batch": 512}
    if weights.speech is not None:
        models[SPEECH_MODEL] = {"source": f"file:{weights.speech}", "task": "transcription"}
    return yaml.safe_dump({"models": models}, sort_keys=False)


@dataclass(frozen=True)
class Folders:
    """Where the server has its files."""

    root: Path

    @property
    def state(self) -> Path:
        """The ledger's folder."""
        return self.root / "state"

    @property
    def ledger(self) -> Path:
        """The ledger."""
        return self.state / "usage.sqlite3"

    @property
    def temporary(self) -> Path:
        """Its folder for files that don't last."""
        return self.root / "tmp"

    @property
    def models_file(self) -> Path:
        """What it serves."""
        return self.root / "models.yaml"

    @property
    def keys_file(self) -> Path:
        """Its keys."""
        return self.root / "keys.yaml"

    @property
    def clock(self) -> Path:
        """By how much its clock is set wrong, as libfaketime reads it."""
        return self.root / "clock"

    @property
    def log(self) -> Path:
        """What it says."""
        return self.root / "server.log"


class Server:
    """A server that comes and goes. ``secrets`` are its keys by name, ``bugs`` unforeseen errors in its log, ``humble``
    begins its command where it would have more rights than a user has. ``false_clock``: its clock may be wrong.
    """

    def __init__(self, root: Path, weights: Weights, faketime: Path | None) -> None:
        self.folders = Folders(root)
        self.weights = weights
        self.faketime = faketime
        self.humble = _humble()
        self.starts = 0
        self.false_clock = False
        self.bugs: list[str] = []
        self.words: deque[str] = deque(maxlen=_WORDS)
        self._ready = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        for folder in (self.folders.state, self.folders.temporary, root / "cache"):
            folder.mkdir()
        self.folders.models_file.write_text(models_text(weights))
        self.folders.clock.write_text("+0")
        self.secrets = {
            name: create_key(self.folders.keys_file, name, Limits(), admin=admin) for name, admin in KEYS.items()
        }
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Its first process, once its start is over. Raises ``Down``."""
        if self._process is None or not self._ready.is_set() or self._process.returncode is not None:
            raise Down("the server is not running", time.monotonic())
        return self._process.pid

    @property
    def leader(self) -> int | None:
        """Its first process, if it was ever started."""
        return None if self._process is None else self._process.pid

    @property
    def lives(self) -> bool:
        """Whether its first process is there."""
        return self._process is not None and self._process.returncode is None

    @property
    def ended(self) -> int | None:
        """The exit status with which it ended by itself; None if it did not."""
        return self._process.returncode if self._process is not None and self._ready.is_set() else None

    @property
    def models(self) -> list[str]:
        """The names of models that can be loaded."""
        return [CHAT_MODEL, SMALL_MODEL, VECTOR_MODEL, *([SPEECH_MODEL] if self.weights.speech is not None else [])]

    def _environment(self, *, false_clock: bool) -> Mapping[str, str]:
        root = self.folders.root
        ours = {"LLAMASERVE_STATE_DIR": str(self.folders.state), "LLAMASERVE_CACHE": str(root / "cache")}
        ours |= {"TMPDIR": str(self.folders.temporary), "PYTHONUNBUFFERED": "1", "LLAMASERVE_SAVED_PREFIXES": "256MB"}
        ours |= {"LLAMASERVE_MEMORY": "3GB"}
        if false_clock:
            ours |= {"LD_PRELOAD": str(self.faketime), "FAKETIME_TIMESTAMP_FILE": str(self.folders.clock)}
            ours |= {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "FAKETIME_CACHE_DURATION": "1", "NO_FAKE_STAT": "1"}
            ours |= {"FAKETIME_DISABLE_SHM": "1"}  # of which a process that stands still may have the lock
        return {**os.environ, **ours}

    async def start(self, *, false_clock: bool = False) -> None:
        """Start it, and return when it has loaded its first model: until then, a load that fails ends it. Raises
        ``RuntimeError`` with its last words. A false clock goes as ``Folders.clock`` says.
        """
        command = [*self.humble, sys.executable, "-m", "llamaserve", "serve", CHAT_MODEL, "--port", str(self.port)]
        command += ["--host", "127.0.0.1", "--models-file", str(self.folders.models_file)]
        command += ["--keys-file", str(self.folders.keys_file)]
        self._process = await asyncio.create_subprocess_exec(
            *command,
            env=self._environment(false_clock=false_clock),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            limit=_LONGEST_LINE,
        )
        self.starts += 1
        self.false_clock = false_clock
        self._reader = asyncio.create_task(self._read(self._process))
        ready = asyncio.ensure_future(self._ready.wait())
        await asyncio.wait({ready, self._reader}, timeout=START_LIMIT, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            return
        ready.cancel()
        await self.kill()
        raise RuntimeError("the server did not start: " + " / ".join(list(self.words)[-5:]))

    async def stop(self) -> tuple[int | None, list[int]]:
        """Ask it to end. Returns its exit status, None if it had to be killed, and the processes that it left."""
        assert self._process is not None
        self._ready.clear()
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        status: int | None = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_LIMIT):
                status = await _status(self._process)
        return status, await self._end()

    async def kill(self) -> list[int]:
        """Kill its first process, as the out-of-memory killer does, and return the processes that outlive it."""
        assert self._process is not None
        self._ready.clear()
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await _status(self._process)
        return await self._end()

    async def _end(self) -> list[int]:
        """Wait until all of its processes are gone, and return those that had to be killed."""
        assert self._process is not None
        assert self._reader is not None
        leader, deadline = self._process.pid, time.monotonic() + _ENDING
        while (left := _alive(leader)) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        for pid in (*left, leader):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await _status(self._process)
        await asyncio.wait({self._reader}, timeout=_ENDING)
        if self._reader.done():
            self._reader.result()
        else:
            self._reader.cancel()  # somebody else has its output open
        return [pid for pid in left if pid != leader]

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Keep what it says. A line that tells of a bug is kept with those that follow."""
        assert process.stdout is not None
        follow = 0
        with self.folders.log.open("ab") as log:
            while line := await process.stdout.readline():
                log.write(line)
                log.flush()
                self.words.append(line.decode("utf-8", "replace").rstrip())
                if _READY in self.words[-1]:
                    self._ready.set()
                if follow and not _RECORD.match(self.words[-1]):
                    self.bugs[-1] += f"\n{self.words[-1]}"
                    follow -= 1
                else:
                    follow = 0
                    if BUG.search(self.words[-1]):
                        self.bugs.append("\n".join(list(self.words)[-2:]))
                        follow = _BUG_LINES

    async def ask(self, method: str, path: str, body: Any = None, *, key: str = "root", limit: float = 60.0) -> Any:
        """Return what the server answers to a request of whoever runs it. Raises ``Down`` when it can't answer, and
        ``Refused`` with an error's status and code.
        """
        began, headers = time.monotonic(), {"authorization": f"Bearer {self.secrets.get(key, key)}"}
        try:
            async with httpx.AsyncClient(base_url=self.url, timeout=limit, verify=NO_TLS) as client:
                answer = await client.request(method, path, json=body, headers=headers)
        except httpx.TransportError as error:
            raise Down(f"{method} {path} was not answered: {type(error).__name__}: {error}", began) from error
        if answer.status_code != 200:
            raise Refused(answer.status_code, answer.text)
        return answer.json() if answer.headers["content-type"].startswith("application/json") else answer.text


async def _status(process: asyncio.subprocess.Process) -> int:
    """Wait for its end; ``wait`` waits until nobody has its output open, too, in Python 3.11."""
    while (status := process.returncode) is None:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    return status


def _humble() -> list[str]:
    """Return the beginning of a command that runs without root's right to write whatever modes of files say; nothing
    if that is not needed, or not possible.
    """
    program = shutil.which("setpriv") if os.geteuid() == 0 else None
    return [program, "--bounding-set", "-dac_override,-dac_read_search"] if program else []


class Refused(Exception):
    """The server answered with an error."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text[:300]}")
        self.status = status
        self.text = text


def _alive(leader: int) -> list[int]:
    """Return the processes of a session; one that has ended is no matter of a server that has, too."""
    found = []
    for process in session(leader):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found
