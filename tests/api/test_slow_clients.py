"""Five hundred clients at once that read slowly: as many as may be are served, the others are told when to come again,
and nothing of them is left.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from api_helpers import COMPLETIONS, TINY
from running_server import RunningServer, wait_until

CLIENTS, PARALLEL, QUEUE = 500, 8, 64
PIECE, PAUSE, PIECES = 200, 0.2, 30  # bytes that a client reads at once, seconds between, and how often


@pytest.fixture
def crowded(starter_model: Path, tmp_path: Path) -> Iterator[RunningServer]:
    path = tmp_path / "models.yaml"
    path.write_text(
        f"defaults: {{context: 1024, parallel: {PARALLEL}, queue: {QUEUE}}}\n"
        f"models: {{smollm2: {{source: 'file:{starter_model}'}}}}\n"
    )
    environment = {"LLAMASERVE_HEARTBEAT": "0.2"}  # so that those who wait have something to read
    with RunningServer("serve", "smollm2", "--models-file", str(path), environment=environment) as running:
        yield running


async def read_slowly(url: httpx.URL, number: int, answers: Counter[str]) -> None:
    reader, writer = await asyncio.open_connection(url.host, url.port, limit=1024)
    body = json.dumps({"prompt": f"Story {number}:", "max_tokens": 300, "stream": True}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    try:
        writer.write(head.encode() + body)
        lines = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)).lower().split(b"\r\n")
        answers[lines[0].split()[1].decode()] += 1
        answers["told when to come again"] += any(line.startswith(b"retry-after: ") for line in lines)
        for _ in range(PIECES):
            if not await reader.read(PIECE):
                break
            await asyncio.sleep(PAUSE)
    finally:
        writer.close()


def test_slow_clients_are_served_or_refused(crowded: RunningServer) -> None:
    answers: Counter[str] = Counter()

    async def run() -> None:
        url = httpx.URL(crowded.url)
        await asyncio.gather(*(read_slowly(url, number, answers) for number in range(CLIENTS)))

    files = crowded.get("/v1/internal/status")["memory"]["files"]
    asyncio.run(run())
    assert answers["200"] + answers["429"] == CLIENTS
    assert answers["200"] >= PARALLEL + QUEUE
    assert answers["429"] == answers["told when to come again"] > 0
    wait_until(lambda: crowded.running == 0, limit=30)
    wait_until(lambda: crowded.get("/v1/internal/status")["memory"]["files"] <= files + 3)
    assert crowded.post(COMPLETIONS, TINY).status_code == 200
    assert not any("ERROR" in line or "Traceback" in line for line in crowded.lines)
