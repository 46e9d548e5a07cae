"""The command line as a user types it: in a process of its own."""

from __future__ import annotations

import hashlib
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from running_server import RunningServer
from whisper_writer import whisper_file

from llamaserve import __version__
from llamaserve.registry.cache import cache_folder
from llamaserve.settings import Settings

Models = Callable[[str], str]


def llamaserve(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-m", "llamaserve", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "200", **environment},
    )


@pytest.fixture
def models(tmp_path: Path) -> Models:
    """Write a models.yaml and return its path."""

    def write(text: str) -> str:
        path = tmp_path / "models.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_help_shows_examples() -> None:
    for arguments in (("--help",), ("run", "--help")):
        answer = llamaserve(*arguments)
        assert answer.returncode == 0
        assert "llamaserve run hf:Qwen/Qwen3-4B-GGUF:Q4_K_M" in answer.stdout


def test_version() -> None:
    assert llamaserve("--version").stdout.strip() == __version__


def test_models_lists_the_shipped_file() -> None:
    answer = llamaserve("models")
    assert answer.returncode == 0
    assert re.search(r"smollm2-135m \(default\)\s+(yes|no)\s+98 MB\s+Apache-2.0", answer.stdout)


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["run", "qwen3-4"], "no model is called 'qwen3-4'", "qwen3-4b"),
        (["run", "/nowhere/model.gguf"], "there is no file /nowhere/model.gguf", "/nowhere"),
        (["run", "hf:no-owner"], "hf:OWNER/REPO", ""),
        (["serve", "qwen3-4b"], "qwen3-4b is not on this machine", "llamaserve pull qwen3-4b"),
        (["pull", "nonsense"], "no model is called 'nonsense'", "llamaserve models"),
        (["run", "--port", "99999"], "port", "llamaserve run --help"),
        (["run", "--log-level", "loud"], "log_level", "llamaserve run --help"),
        (["models", "--models-file", "/nowhere.yaml"], "/nowhere.yaml", ""),
    ],
)
def test_an_error_is_two_lines_with_the_next_command(
    arguments: list[str], message: str, hint: str, tmp_path: Path
) -> None:
    answer = llamaserve(*arguments, LLAMASERVE_CACHE=str(tmp_path), HF_HOME=str(tmp_path))
    assert answer.returncode == 1
    assert message in answer.stderr
    assert hint in answer.stderr
    assert "Traceback" not in answer.stderr


def test_an_error_in_models_yaml_names_file_line_and_field(models: Models) -> None:
    answer = llamaserve(
        "models", "--models-file", models("models:\n  a:\n    source: file:a.gguf\n    context: many\n")
    )
    assert answer.returncode == 1
    assert "models.yaml:4: models.a.context:" in answer.stderr


def test_a_bad_file_ends_the_start_with_a_reason(models: Models, tmp_path: Path, starter_model: Path) -> None:
    whole = starter_model.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.gguf").write_text("this is no model")
    for name, reason in (("cut.gguf", "truncated"), ("text.gguf", "not a GGUF file")):
        answer = llamaserve("serve", str(tmp_path / name), "--port", "0")
        assert answer.returncode == 1
        assert reason in answer.stderr
        assert "Traceback" not in answer.stderr


def test_a_wrong_checksum_ends_the_start(models: Models, starter_model: Path, tmp_path: Path) -> None:
    wrong = hashlib.sha256(b"").hexdigest()
    path = models(f"models:\n  a: {{source: 'file:{starter_model}', sha256: '{wrong}'}}\n")
    answer = llamaserve("run", "a", "--models-file", path, LLAMASERVE_CACHE=str(tmp_path))
    assert answer.returncode == 1
    assert wrong in answer.stderr


def test_a_taken_port_is_named_with_the_next_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        answer = llamaserve("serve", "--port", str(port))
    assert answer.returncode == 1
    assert f"port {port} on 127.0.0.1 is taken" in answer.stderr
    assert f"--port {port + 1}" in answer.stderr


def test_pull_fetches_and_says_where(starter_model: Path) -> None:
    answer = llamaserve("pull", "starter")
    assert answer.returncode == 0
    assert str(starter_model) in answer.stdout


def test_run_serves_the_default_model_and_prints_a_line_that_works(starter_model: Path) -> None:
    kept = Settings.model_fields["saved_prefixes"].default
    environment = {"LLAMASERVE_CACHE": str(cache_folder()), "LLAMASERVE_SAVED_PREFIXES": kept}  # a user's own
    with RunningServer("run", environment=environment) as server:
        output = "\n".join(server.lines)
        assert f"base URL   {server.url}/v1" in output
        (line,) = re.findall(r"try it\s+(curl .*)", output)
        with subprocess.Popen(
            ["bash", "-c", line], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as curl:
            try:
                streamed, _ = curl.communicate(timeout=10)
            except subprocess.TimeoutExpired:  # now and then so small a model finds no end
                server.post("/v1/internal/stop-generation", {})
                streamed, _ = curl.communicate(timeout=30)
        assert streamed.endswith("data: [DONE]\n\n")
        assert server.stop(signal.SIGINT) in (0, 130)


@pytest.mark.parametrize(("vocabulary", "extent"), [(51864, "English only"), (51865, "99 languages")])
def test_a_model_for_speech_is_served_and_said_to_be_one(vocabulary: int, extent: str, tmp_path: Path) -> None:
    pytest.importorskip("_pywhispercpp")
    (tmp_path / "ear.bin").write_bytes(whisper_file(ftype=2002, n_vocab=vocabulary, n_text_ctx=448).bytes())
    with RunningServer("serve", str(tmp_path / "ear.bin")) as server:
        output = "\n".join(server.lines)
        assert re.search(f"is ready: ear, Q4_0, {extent}, on the (CPU|GPU)\n", output)
        assert f"try it     curl -N {server.url}/v1/audio/transcriptions -F file=@speech.wav" in output


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_with_streams_under_way(how: signal.Signals, starter_model: Path) -> None:
    with RunningServer("serve", str(starter_model)) as server:
        body = {"prompt": "Once upon a time", "stream": True, "max_tokens": 5000}
        with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60) as answer:
            next(answer.iter_lines())
            server.stop(how)


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback address")
def test_both_loopback_addresses_answer(server: RunningServer) -> None:
    port = httpx.URL(server.url).port
    assert httpx.get(f"http://127.0.0.1:{port}/health").json() == {"status": "ok"}
    assert httpx.get(f"http://[::1]:{port}/health").json() == {"status": "ok"}


def test_a_server_without_a_model_says_so(models: Models) -> None:
    with RunningServer("serve", "--models-file", models("models: {}")) as server:
        assert server.get("/v1/models")["data"] == []
        assert server.get("/v1/internal/model/info")["model_name"] == "None"
        answer = server.post("/v1/completions", {"prompt": "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_not_loaded")
