"""A hub on this machine, with one repository in several versions, and the settings that lead huggingface_hub to it.

It can be slow, cut downloads, send other bytes than it promised, be gated or in trouble. It knows nothing of what is
tested.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A hub on this machine with one repository, o/r, and what was asked of it. ``commits`` are all its versions; those
    of ``main`` are ``files``.
    """

    files: dict[str, bytes]
    commit: str = COMMIT
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    port: int = 0
    token: str | None = None  # the one that is asked for
    gated: bool = False
    cut_after: int | None = None  # the next download ends after this many bytes
    corrupt: bool = False  # downloads hold other bytes than the ETag promises
    claimed_size: int | None = None
    status: int | None = None  # answered to everything
    gate: threading.Event | None = None  # what the second half of a download waits for
    asked: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)  # method, path, range, token

    def requests(self, method: str) -> list[tuple[str, str, str | None, str | None]]:
        return [asked for asked in self.asked if asked[0] == method and "/agent-harnesses" not in asked[1]]

    def publish(self, **changes: bytes) -> str:
        """Make a new version, with these files changed (``_`` for what a name can't hold), and return its commit."""
        self.commits[self.commit] = self.files
        self.commit = hashlib.sha1(self.commit.encode(), usedforsecurity=False).hexdigest()
        names = {re.sub(r"[^A-Za-z0-9]", "_", name): name for name in self.files}
        self.files = {**self.files, **{names[key]: data for key, data in changes.items()}}
        return self.commit

    def version(self, revision: str) -> tuple[str, dict[str, bytes]]:
        if revision in ("main", self.commit):
            return self.commit, self.files
        return revision, self.commits.get(revision, {})


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        hub = self.hub
        sent = (self.headers.get("authorization") or "").removeprefix("Bearer ") or None
        hub.asked.append((self.command, self.path, self.headers.get("range"), sent))
        if hub.status is not None:
            return self.reply(hub.status, {}, b"")
        found = re.fullmatch(r"/o/r/resolve/([^/]+)/(.+)", self.path)
        if found is None and not self.path.startswith("/api/models/o/r"):
            return self.reply(401, {"X-Error-Code": "RepoNotFound"}, b"")
        if hub.token is not None and sent != hub.token:
            return self.reply(401, {"X-Error-Code": "GatedRepo"} if hub.gated else {}, b"")
        if found is None:
            names = [{"rfilename": name} for name in hub.files]
            return self.reply(200, {"Content-Type": "application/json"}, json.dumps({"id": "o/r", "siblings": names}))
        commit, files = hub.version(found[1])
        data = files.get(found[2])
        if data is None:
            return self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b"")
        return self.send(data, commit, body=body)

    def send(self, data: bytes, commit: str, *, body: bool) -> None:
        hub, start = self.hub, 0
        etag = hashlib.sha256(data).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        size = hub.claimed_size or len(data)
        if asked := self.headers.get("range"):
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        content = data[::-1] if hub.corrupt else data
        headers["Content-Length"] = str(size - start)
        end = len(data)
        if body and hub.cut_after is not None:
            end, hub.cut_after = hub.cut_after, None
            self.close_connection = True
        self.reply(206 if start else 200, headers, content[start:end] if body else b"")

    def reply(self, status: int, headers: dict[str, str], body: bytes | str) -> None:
        body = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(ConnectionError):  # the client has given up
                self.write(body)

    def write(self, body: bytes) -> None:
        half = len(body) // 2
        self.wfile.write(body[:half])
        if self.hub.gate is not None and "/resolve/" in self.path:
            self.hub.gate.wait(30)
        self.wfile.write(body[half:])


@contextlib.contextmanager
def running_hub(hub: Hub) -> Iterator[Hub]:
    """Let a hub answer on a free port."""
    handler = type("Handler", (HubHandler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def settings_for(hub: Hub, folder: Path) -> dict[str, str]:
    """Return the whole environment of a process that finds this hub, and keeps everything below a folder."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return kept | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.port}",
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "LLAMASERVE_CACHE": str(folder / "cache"),
        "XDG_DATA_HOME": str(folder / "data"),
        "NO_PROXY": "*",
    }
