"""The end of the server, as its clients see it: everything that is under way is answered, and soon."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import pytest
from api_helpers import CHAT, COMPLETIONS, ENDLESS, TINY, assert_alive, assert_error
from model_helpers import EVENTS, LOAD, Listener, write_registry
from running_server import RunningServer, wait_until

FIRST, SECOND = "first", "second"
LONG: dict[str, Any] = {**ENDLESS, "max_tokens": 900}  # runs for longer than most tests
SOON = 3.0  # seconds
SIGNALS = [signal.SIGTERM, signal.SIGINT]


@pytest.fixture
def models_file(starter_model: Path, tmp_path: Path) -> Path:
    """Two models, the starter twice."""
    return write_registry(tmp_path / "models.yaml", {FIRST: starter_model, SECOND: starter_model})


@pytest.fixture
def server(models_file: Path) -> Iterator[RunningServer]:
    """A server for one test alone, with the first of the models and memory for no other."""
    environment = {"LLAMASERVE_HEARTBEAT": "0.2", "LLAMASERVE_MEMORY": "300MB"}
    with RunningServer("serve", FIRST, "--models-file", str(models_file), environment=environment) as running:
        yield running


class Client:
    """Sends a request within a ``with`` block and takes the answer, to its end, in a thread."""

    def __init__(self, server: RunningServer, path: str, body: dict[str, Any] | None) -> None:
        self._method, self._url, self._body = "GET" if body is None else "POST", server.url + path, body
        self._thread = threading.Thread(target=self._read)
        self.text = ""
        self.failure: httpx.HTTPError | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.join()

    def _read(self) -> None:
        try:
            with httpx.stream(self._method, self._url, json=self._body, timeout=60) as self.response:
                for text in self.response.iter_text():
                    self.text += text
        except httpx.HTTPError as failure:
            self.failure = failure

    def whole(self) -> httpx.Response:
        """Return the answer, which must be complete."""
        self._thread.join()
        assert self.failure is None
        return httpx.Response(self.response.status_code, headers=self.response.headers, text=self.text)

    def events(self) -> list[Any]:
        """Return the events of a stream, which must be complete and end with ``[DONE]``."""
        assert self.whole().status_code == 200
        *data, done = [line.removeprefix("data: ") for line in self.text.splitlines() if line.startswith("data: ")]
        assert done == "[DONE]"
        return [json.loads(each) for each in data]


def end(server: RunningServer, how: signal.Signals) -> None:
    """Send a signal; the server must end soon, without leaving a process, and have nothing to complain of."""
    before, lines = time.monotonic(), len(server.lines)
    assert server.stop(how) in (0, 130, -how)
    assert time.monotonic() - before < SOON
    assert complaints(server.lines[lines:]) == []


def complaints(lines: Sequence[str]) -> list[str]:
    """Return what the log should not have."""
    return [line for line in lines if re.search("ERROR|WARNING|Traceback|exception", line)]


@pytest.mark.parametrize("how", SIGNALS)
def test_a_stream_ends_with_a_normal_finish(server: RunningServer, how: signal.Signals) -> None:
    with Client(server, COMPLETIONS, {**LONG, "stream": True}) as client:
        wait_until(lambda: client.text.count("data: ") > 5)
        end(server, how)
        *chunks, last = client.events()
    assert last["choices"][0]["finish_reason"] == "stop"
    assert 5 < len(chunks) < LONG["max_tokens"]


@pytest.mark.parametrize(("how", "path"), [(signal.SIGTERM, COMPLETIONS), (signal.SIGINT, CHAT)])
def test_a_whole_answer_is_what_there_is(server: RunningServer, how: signal.Signals, path: str) -> None:
    body = {**LONG, "messages": [{"role": "user", "content": "Tell me a story"}]}
    del body["messages" if path == COMPLETIONS else "prompt"]
    with Client(server, path, body) as client, Client(server, COMPLETIONS, {**LONG, "stream": True}) as beside:
        wait_until(lambda: server.running == 2)
        seen = beside.text.count("data: ")
        wait_until(lambda: beside.text.count("data: ") > seen + 100, limit=60)
        end(server, how)
        answer = client.whole().json()
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] if path == COMPLETIONS else choice["message"]["content"]
    assert 0 < answer["usage"]["completion_tokens"] < LONG["max_tokens"]


def test_a_paced_stream_is_not_slow_any_more(server: RunningServer) -> None:
    body = {**LONG, "max_tokens": 200, "max_tokens_second": 5, "stream": True}
    with Client(server, COMPLETIONS, body) as client:
        wait_until(lambda: client.text.count("data: ") > 2)
        wait_until(lambda: server.running == 0, limit=30)  # all is generated
        end(server, signal.SIGTERM)
        *_, last = client.events()
    assert last["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("group", [False, True])
def test_a_signal_to_all_processes_is_one_to_the_server(server: RunningServer, group: bool) -> None:
    """As a service manager, a terminal that closes or `timeout` sends it."""
    with Client(server, COMPLETIONS, {**LONG, "stream": True}) as client:
        wait_until(lambda: client.text.count("data: ") > 3)
        (os.killpg if group else os.kill)(server.process.pid, signal.SIGTERM)
        assert client.events()[-1]["choices"][0]["finish_reason"] == "stop"
    assert server.process.wait(20) in (0, -signal.SIGTERM, 143)


@pytest.mark.parametrize("how", SIGNALS)
def test_listeners_hear_that_models_leave_and_then_nothing_more(server: RunningServer, how: signal.Signals) -> None:
    with Client(server, EVENTS, None) as client:
        wait_until(lambda: "snapshot" in client.text)
        end(server, how)
        told = [(event["kind"], event["model"], event["data"].get("reason")) for event in client.events()[1:]]
    assert told == [("unloading", FIRST, "shutdown"), ("unloaded", FIRST, "shutdown")]


@pytest.mark.parametrize("how", SIGNALS)
def test_who_waits_for_a_model_is_refused(server: RunningServer, how: signal.Signals) -> None:
    """There is no room for it while the other one answers."""
    with (
        Client(server, COMPLETIONS, {**LONG, "prompt": ["Once"] * 30, "stream": True}) as answered,
        Client(server, COMPLETIONS, {**TINY, "model": SECOND, "stream": True}) as stream,
        Client(server, COMPLETIONS, {**TINY, "model": SECOND}) as whole,
        Client(server, LOAD, {"model_name": SECOND}) as command,
    ):
        wait_until(lambda: ": waiting for other models to make room" in stream.text, limit=30)
        end(server, how)
        assert_error(whole.whole(), 503, "unavailable")
        assert_error(command.whole(), 503, "unavailable")
        (error,) = stream.events()
        assert error["error"]["code"] == "unavailable"
        assert {event["choices"][0]["finish_reason"] for event in answered.events()[-28:]} == {"stop"}


def test_who_waits_out_the_pause_after_crashes_is_refused(server: RunningServer) -> None:
    with Listener(server) as listener:
        for number in (1, 2):
            assert_alive(server)
            os.kill(server.worker_pid(), signal.SIGKILL)
            listener.wait("crashed", FIRST, number)
        with Client(server, COMPLETIONS, TINY) as client:
            wait_until(lambda: server.get("/v1/models")["data"][0]["status"]["value"] == "loading")
            end(server, signal.SIGTERM)
            assert_error(client.whole(), 503, "unavailable")


def test_an_answer_that_does_not_end_holds_up_the_server_for_some_seconds_only(server: RunningServer) -> None:
    with Client(server, COMPLETIONS, {**LONG, "stream": True}) as client:
        wait_until(lambda: client.text.count("data: ") > 5)
        os.kill(server.worker_pid(), signal.SIGSTOP)
        before = time.monotonic()
        server.stop(signal.SIGTERM)
        assert time.monotonic() - before < 10
    assert not any("Traceback" in line for line in server.lines)


@pytest.mark.parametrize("how", SIGNALS)
def test_a_request_that_never_comes_whole_is_not_waited_for(server: RunningServer, how: signal.Signals) -> None:
    port = httpx.URL(server.url).port
    assert port is not None
    with socket.create_connection(("127.0.0.1", port)) as silent:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 50\r\n\r\n"
        silent.sendall(head.encode())
        assert b"100 Continue" in silent.recv(1000)  # somebody waits for the body
        silent.sendall(b"{")
        end(server, how)


@pytest.fixture
def patient(models_file: Path, request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    """A server that lets answers be finished, for as many seconds as the test says."""
    environment = {"LLAMASERVE_SHUTDOWN_LIMIT": str(request.param)}
    with RunningServer("serve", FIRST, "--models-file", str(models_file), environment=environment) as running:
        yield running


@pytest.mark.parametrize(("patient", "how"), [(60, signal.SIGTERM), (60, signal.SIGINT)], indirect=["patient"])
def test_answers_are_finished_and_nobody_else_is_let_in(patient: RunningServer, how: signal.Signals) -> None:
    body = {**LONG, "max_tokens": 300}
    with (
        Client(patient, COMPLETIONS, {**body, "stream": True}) as stream,
        Client(patient, COMPLETIONS, body) as whole,
        Client(patient, EVENTS, None) as events,
    ):
        wait_until(lambda: stream.text.count("data: ") > 5 and patient.running == 2 and "snapshot" in events.text)
        patient.process.send_signal(how)
        wait_until(lambda: not reachable(patient))
        assert patient.process.poll() is None
        reasons = [event["choices"][0]["finish_reason"] for event in stream.events()]
        assert sorted(filter(None, reasons)) == ["length"]
        assert whole.whole().json()["usage"]["completion_tokens"] == 300
        assert patient.process.wait(20) in (0, 130, -how)
        assert "unloaded" in events.text
    assert complaints(patient.lines) == []
    assert any("have 60 seconds" in line for line in patient.lines)


def reachable(server: RunningServer) -> bool:
    try:
        return httpx.get(server.url + "/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("patient", [1], indirect=True)
def test_answers_that_take_too_long_end_as_they_are(patient: RunningServer) -> None:
    with Client(patient, COMPLETIONS, {**LONG, "n": 4, "stream": True}) as client:
        wait_until(lambda: client.text.count("data: ") > 5)
        before = time.monotonic()
        patient.process.send_signal(signal.SIGTERM)
        assert client.events()[-1]["choices"][0]["finish_reason"] == "stop"
        assert 0.9 < time.monotonic() - before < 1 + SOON
    assert patient.process.wait(20) in (0, -signal.SIGTERM, 143)


@pytest.mark.parametrize("patient", [1], indirect=True)
def test_half_a_request_holds_nothing_up(patient: RunningServer) -> None:
    url = httpx.URL(patient.url)
    with socket.create_connection((url.host, url.port or 80)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        wait_until(lambda: patient.get("/health") == {"status": "ok"})
        end(patient, signal.SIGTERM)


@pytest.mark.parametrize("patient", [60], indirect=True)
def test_without_a_request_nothing_is_waited_for(patient: RunningServer) -> None:
    with Client(patient, EVENTS, None) as client:
        wait_until(lambda: "snapshot" in client.text)
        end(patient, signal.SIGTERM)


@pytest.mark.parametrize("how", SIGNALS)
def test_a_second_signal_ends_the_server_at_once(server: RunningServer, how: signal.Signals) -> None:
    with Client(server, COMPLETIONS, {**LONG, "stream": True}) as client:
        wait_until(lambda: client.text.count("data: ") > 5)
        os.kill(server.worker_pid(), signal.SIGSTOP)  # so that the answer does not end
        server.process.send_signal(how)
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(0.5)
        server.process.send_signal(how)
        assert server.process.wait(0.5) == -how
        wait_until(lambda: not server.has_processes)
