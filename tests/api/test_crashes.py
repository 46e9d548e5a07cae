"""What a client sees when the child dies, the weights vanish, or the server can't even start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from api_helpers import COMPLETIONS, ENDLESS, MODEL, TINY, assert_alive, assert_error, streamed, write_models_file
from running_server import RunningServer, wait_until


def status(server: RunningServer) -> str:
    return str(server.get("/v1/internal/health")["models"][MODEL])


def kill(server: RunningServer) -> None:
    """Kill the child and wait until the server knows."""
    os.kill(server.worker_pid(), signal.SIGKILL)
    wait_until(lambda: status(server) != "loaded")


def test_a_crash_ends_a_stream_with_an_error_and_the_next_request_works(fresh_server: RunningServer) -> None:
    with ThreadPoolExecutor(2) as threads, streamed(fresh_server, COMPLETIONS, ENDLESS) as stream:
        first = next(stream)
        whole = threads.submit(fresh_server.post, COMPLETIONS, ENDLESS)
        waiting = threads.submit(fresh_server.post, COMPLETIONS, {**ENDLESS, "n": 6})
        wait_until(lambda: fresh_server.running == 8)
        kill(fresh_server)
        *_, error, done = [first, *stream]
        assert done == "[DONE]"
        assert error["error"]["code"] == "engine_crashed"
        assert error["error"]["type"] == "server_error"
        assert "SIGKILL" in error["error"]["message"]
        for response in (whole.result(), waiting.result()):
            assert_error(response, 503, "engine_crashed")
            assert response.headers["retry-after"] == "1"
    assert_alive(fresh_server)
    assert status(fresh_server) == "loaded"


def test_the_sdk_raises_when_the_child_dies_during_a_stream(fresh_server: RunningServer) -> None:
    with openai.OpenAI(base_url=fresh_server.url + "/v1", api_key="none", max_retries=0) as client:
        messages: list[Any] = [{"role": "user", "content": "Tell me a long story."}]
        stream = client.chat.completions.create(model=MODEL, messages=messages, stream=True)
        next(stream)
        kill(fresh_server)
        with pytest.raises(openai.APIError, match="SIGKILL"):
            list(stream)
        assert client.completions.create(model=MODEL, **TINY).choices[0].text.startswith(" Paris")


def test_three_crashes_quarantine_the_model(fresh_server: RunningServer) -> None:
    kill(fresh_server)
    assert_alive(fresh_server)
    kill(fresh_server)
    assert_alive(fresh_server)  # after a pause of seconds
    kill(fresh_server)
    for extra in ({}, {"stream": True}):
        assert_error(fresh_server.post(COMPLETIONS, {**TINY, **extra}), 503, "model_quarantined")
    assert status(fresh_server) == "quarantined"
    assert fresh_server.get("/v1/models")["data"][0]["status"] == {"value": "quarantined"}
    assert_error(fresh_server.post("/v1/internal/encode", {"text": "x"}), 503, "model_quarantined")
    assert fresh_server.get("/health") == {"status": "ok"}


def test_weights_that_vanish_are_reported_and_may_come_back(fresh_server: RunningServer, tmp_path: Path) -> None:
    weights = tmp_path / "weights.gguf"
    weights.rename(tmp_path / "away")
    assert_alive(fresh_server)  # the loaded model needs no file
    kill(fresh_server)
    for extra in ({}, {"stream": True}):
        message = assert_error(fresh_server.post(COMPLETIONS, {**TINY, **extra}), 500, "model_file_not_found")
        assert MODEL in message
    assert fresh_server.get("/health") == {"status": "ok"}
    assert fresh_server.get("/v1/models")["data"][0]["status"] == {"value": "unloaded"}
    (tmp_path / "away").rename(weights)
    wait_until(lambda: fresh_server.post(COMPLETIONS, TINY).status_code == 200, 20)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "header"])
def test_weights_that_are_damaged_later_are_reported(fresh_server: RunningServer, tmp_path: Path, damage: str) -> None:
    weights = tmp_path / "weights.gguf"
    data = bytearray(weights.read_bytes())
    weights.unlink()  # the child has the old file mapped
    weights.write_bytes(damaged(data, damage))
    kill(fresh_server)
    assert_error(fresh_server.post(COMPLETIONS, TINY), 500, "model_file_invalid")
    assert fresh_server.get("/health") == {"status": "ok"}
    assert fresh_server.get("/v1/internal/model/info")["model_name"] == MODEL
    assert fresh_server.get("/v1/models")["data"][0]["id"] == MODEL


def damaged(data: bytearray, damage: str) -> bytes:
    if damage == "truncated":
        return bytes(data[: len(data) // 2])
    if damage == "garbage":
        return os.urandom(100_000)
    if damage == "empty":
        return b""
    data[8:16] = b"\xff" * 8  # the number of tensors
    return bytes(data)


def start(*arguments: str) -> list[str]:
    """Run a command that must fail, and return what it says."""
    command = [sys.executable, "-m", "llamaserve", *arguments]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert process.returncode == 1, process.stderr
    assert "Traceback" not in process.stderr
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    assert any(line.startswith("error:") for line in lines)
    return lines


@pytest.mark.parametrize("command", ["serve", "run"])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "header"])
def test_damaged_weights_end_the_start(starter_model: Path, tmp_path: Path, command: str, damage: str) -> None:
    weights = tmp_path / "bad.gguf"
    weights.write_bytes(damaged(bytearray(starter_model.read_bytes()), damage))
    path = write_models_file(tmp_path, weights, "context: 512, parallel: 1")
    lines = start(command, MODEL, "--models-file", str(path), "--port", "0")
    assert "bad.gguf" in "\n".join(lines)
    assert lines[-1].startswith("try:")


@pytest.mark.parametrize("command", ["serve", "run"])
def test_missing_weights_end_the_start(tmp_path: Path, command: str) -> None:
    path = write_models_file(tmp_path, tmp_path / "nowhere.gguf", "context: 512, parallel: 1")
    lines = start(command, MODEL, "--models-file", str(path), "--port", "0")
    assert lines[-1].startswith("try:")


@pytest.mark.parametrize("command", ["serve", "run"])
def test_a_wrong_sum_ends_the_start(starter_model: Path, tmp_path: Path, command: str) -> None:
    fields = f", sha256: '{'0' * 64}'"
    path = write_models_file(tmp_path, starter_model, "context: 512, parallel: 1", fields)
    lines = start(command, MODEL, "--models-file", str(path), "--port", "0")
    assert "0" * 64 in "\n".join(lines)
    assert lines[-1].startswith("try:")


@pytest.mark.parametrize("command", ["serve", "run", "pull"])
def test_an_unknown_name_ends_the_start(starter_model: Path, tmp_path: Path, command: str) -> None:
    path = write_models_file(tmp_path, starter_model, "context: 512, parallel: 1")
    lines = start(command, "smolm2", "--models-file", str(path))
    assert lines[-1].startswith("try:")


def test_a_taken_port_ends_the_start(server: RunningServer) -> None:
    lines = start("serve", "--port", server.url.rpartition(":")[2])
    assert lines[-1].startswith("try:")
    assert "--port" in lines[-1]
