"""A key that fills the queue before a model does not keep another one out, or waiting for all that it has asked for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from api_helpers import COMPLETIONS
from running_server import RunningServer, wait_until

ALICE, BOB = "sk-key-of-alice-0123", "sk-key-of-bob-012345"


@pytest.fixture
def small(starter_model: Path, tmp_path: Path) -> Iterator[RunningServer]:
    path = tmp_path / "models.yaml"
    path.write_text(
        f"defaults: {{context: 1024, parallel: 1, queue: 5}}\nmodels: {{smollm2: {{source: 'file:{starter_model}'}}}}\n"
    )
    environment = {"LLAMASERVE_API_KEY": f"{ALICE},{BOB}"}
    with RunningServer("serve", "smollm2", "--models-file", str(path), environment=environment) as running:
        yield running


def test_a_busy_key_leaves_another_its_share(small: RunningServer) -> None:
    ends: dict[str, float] = {}
    statuses: list[int] = []

    def ask(name: str, key: str) -> None:
        body = {"prompt": f"{name}: once", "max_tokens": 60, "logit_bias": {"0": -100}}
        answer = httpx.post(small.url + COMPLETIONS, json=body, headers={"x-api-key": key}, timeout=120)
        statuses.append(answer.status_code)
        if answer.status_code == 200:
            ends[name] = time.monotonic()

    def waiting() -> int:
        health = httpx.get(small.url + "/v1/internal/health", headers={"x-api-key": ALICE}).json()
        return int(health["running"] + health["waiting"])

    threads = [threading.Thread(target=ask, args=(f"alice {number}", ALICE)) for number in range(9)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(statuses) >= 3 and waiting() >= 4, limit=30)
    bob = threading.Thread(target=ask, args=("bob", BOB))
    bob.start()
    for thread in (*threads, bob):
        thread.join()
    assert sorted(statuses) == [200] * 7 + [429] * 3
    assert "bob" in ends
    assert sum(ends["bob"] < end for name, end in ends.items() if name != "bob") >= 2
