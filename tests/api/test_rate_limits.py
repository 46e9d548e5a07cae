"""Limits of keys on the wire: refusals with the time to come back, turns, and OpenAI's headers."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_helpers import CHAT, COMPLETIONS, ENDLESS, TINY
from running_server import RunningServer, wait_until

from llamaserve.api.accounting import duration
from llamaserve.keys.key_file import create_key
from llamaserve.keys.keyring import Limits

LIMITS = {
    "free": Limits(),
    "few-tokens": Limits(tokens_per_minute=60),
    "few-requests": Limits(requests_per_minute=2),
    "unheard": Limits(requests_per_minute=1),
    "one-by-one": Limits(concurrent=1, queue=1),
}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A keys.yaml, and the secrets of its keys by name."""
    path = tmp_path_factory.mktemp("limits") / "keys.yaml"
    return path, {name: create_key(path, name, limits, admin=False) for name, limits in LIMITS.items()}


@pytest.fixture(scope="module")
def limited(starter_model: Path, keys: tuple[Path, dict[str, str]]) -> Iterator[RunningServer]:
    models = keys[0].parent / "models.yaml"
    models.write_text(
        f"defaults: {{context: 2048, parallel: 4}}\nmodels: {{smollm2: {{source: 'file:{starter_model}'}}}}\n"
    )
    flags = ("--models-file", str(models), "--keys-file", str(keys[0]))
    with RunningServer("serve", "smollm2", *flags, environment={"LLAMASERVE_HEARTBEAT": "0.2"}) as running:
        yield running


@pytest.fixture
def headers(keys: tuple[Path, dict[str, str]]) -> dict[str, dict[str, str]]:
    return {name: {"authorization": f"Bearer {secret}"} for name, secret in keys[1].items()}


def assert_limited(answer: httpx.Response) -> int:
    """Check a refusal, and return after how many seconds to come back."""
    assert answer.status_code == 429
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    seconds = int(answer.headers["retry-after"])
    assert seconds >= 1
    return seconds


def test_tokens_a_minute(limited: RunningServer, headers: dict[str, dict[str, str]]) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 80, "temperature": 0}
    answer = limited.post(COMPLETIONS, body, headers=headers["few-tokens"])
    used = answer.json()["usage"]["total_tokens"]
    assert used > 60
    told = limited.post(COMPLETIONS, body, headers=headers["few-tokens"])
    seconds = assert_limited(told)
    assert used - 60 - 2 <= seconds <= used - 60 + 2  # one comes back each second
    assert told.headers["x-ratelimit-limit-tokens"] == "60"
    assert told.headers["x-ratelimit-remaining-tokens"] == "0"
    assert re.fullmatch(r"1m\d+s", told.headers["x-ratelimit-reset-tokens"])
    assert limited.post(COMPLETIONS, TINY, headers=headers["free"]).status_code == 200
    assert httpx.get(limited.url + "/v1/models", headers=headers["few-tokens"]).status_code == 200


def test_requests_a_minute(limited: RunningServer, headers: dict[str, dict[str, str]]) -> None:
    remaining = []
    for _ in range(2):
        answer = limited.post(COMPLETIONS, {**TINY, "stream": True}, headers=headers["few-requests"])
        assert answer.status_code == 200
        remaining.append(answer.headers["x-ratelimit-remaining-requests"])
    assert remaining == ["1", "0"]
    for path, body in ((COMPLETIONS, TINY), (CHAT, {}), ("/v1/embeddings", {}), ("/v1/internal/encode", {"text": "a"})):
        assert 1 <= assert_limited(limited.post(path, body, headers=headers["few-requests"])) <= 30


def test_a_client_that_does_not_hear_does_not_fill_the_ledger(
    limited: RunningServer, headers: dict[str, dict[str, str]]
) -> None:
    with httpx.Client(base_url=limited.url, headers=headers["unheard"]) as client:
        assert client.post(COMPLETIONS, json=TINY, timeout=60).status_code == 200
        for _ in range(150):
            assert_limited(client.post(COMPLETIONS, json=TINY))
        (refused,) = client.get("/v1/billing/usage").json()["unanswered"]
    assert refused["outcome"] == "refused"
    assert 60 <= refused["requests"] < 100  # and one more each second


def test_one_request_after_the_other(limited: RunningServer, headers: dict[str, dict[str, str]]) -> None:
    """The second waits for the first, with comments in its stream, though the model has room; a third is refused."""
    second: dict[str, Any] = {}

    def wait() -> None:
        body = {**TINY, "stream": True}
        with httpx.stream("POST", limited.url + COMPLETIONS, json=body, headers=one, timeout=60) as answer:
            second["text"] = ""
            for text in answer.iter_text():
                second["text"] += text
            second["ended"] = time.monotonic()

    one = headers["one-by-one"]
    body = {**ENDLESS, "stream": True}
    thread = threading.Thread(target=wait)
    with httpx.stream("POST", limited.url + COMPLETIONS, json=body, headers=one, timeout=60) as first:
        lines = first.iter_lines()
        next(lines)
        thread.start()
        wait_until(lambda: ": waiting for other requests with this key" in second.get("text", ""), limit=20)
        assert "data:" not in second["text"]
        assert_limited(limited.post(COMPLETIONS, TINY, headers=one))
        assert limited.post(COMPLETIONS, TINY, headers=headers["free"]).status_code == 200
        left = time.monotonic()
    thread.join()
    assert second["ended"] > left
    assert second["text"].endswith("data: [DONE]\n\n")
    assert limited.post(COMPLETIONS, TINY, headers=one).status_code == 200


def waited_in_vain(limited: RunningServer, headers: dict[str, str]) -> bool:
    """Wait a moment for an answer, and tell whether the request had a place in the queue."""
    try:
        assert_limited(httpx.post(limited.url + COMPLETIONS, json=TINY, headers=headers, timeout=0.3))
    except httpx.ReadTimeout:
        return True
    return False


def test_who_leaves_while_waiting_leaves_no_gap(limited: RunningServer, headers: dict[str, dict[str, str]]) -> None:
    one = headers["one-by-one"]
    body = {**ENDLESS, "stream": True}
    with httpx.stream("POST", limited.url + COMPLETIONS, json=body, headers=one, timeout=60) as first:
        lines = first.iter_lines()
        next(lines)
        for _ in range(3):
            wait_until(lambda: waited_in_vain(limited, one))
        assert next(lines) is not None  # it goes on
    answer = httpx.post(limited.url + COMPLETIONS, json=TINY, headers=one, timeout=30)
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("seconds", "written"),
    [(0, "0s"), (0.0201, "21ms"), (0.9999, "1s"), (1, "1s"), (59.2, "1m0s"), (360, "6m0s"), (3630, "1h0m30s")],
)
def test_durations_are_written_as_openai_does(seconds: float, written: str) -> None:
    assert duration(seconds) == written
