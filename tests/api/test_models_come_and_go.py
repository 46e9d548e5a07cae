"""Several models under a memory budget that does not hold all of them, over HTTP: none fails, none hangs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from api_helpers import CHAT, COMPLETIONS, ENDLESS, TINY, assert_error, streamed, unanswered
from model_helpers import Listener, children, comments_of, loaded, text_of, write_registry
from running_server import RunningServer, wait_until

NAMES = ("one", "two", "three")
LONGEST = 60  # seconds for one answer
SETTINGS = "context: 8192, parallel: 2, speculation: false"
LONG: dict[str, Any] = {**ENDLESS, "max_tokens": 8000}  # generates for half a minute or more, unless it is stopped


@pytest.fixture(scope="module")
def models_file(starter_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models.yaml with the starter model three times."""
    path = tmp_path_factory.mktemp("three") / "models.yaml"
    return write_registry(path, dict.fromkeys(NAMES, starter_model), SETTINGS)


@pytest.fixture(scope="module")
def need(models_file: Path) -> int:
    """The bytes that one of them takes by plan."""
    command = [sys.executable, "-m", "llamaserve", "plan", "--json", "--models-file", str(models_file), NAMES[0]]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return int(json.loads(done.stdout)["models"][0]["need"]["host"])


@pytest.fixture
def server(models_file: Path, need: int) -> Iterator[RunningServer]:
    """A server for one test alone, with memory for two of the three; none is loaded."""
    environment = {"LLAMASERVE_HEARTBEAT": "0.2", "LLAMASERVE_MEMORY": str(int(2.5 * need))}
    with RunningServer("serve", "--models-file", str(models_file), environment=environment) as running:
        yield running


def ask(server: RunningServer, name: str, **fields: Any) -> str:
    response = httpx.post(server.url + COMPLETIONS, json={**TINY, "model": name, **fields}, timeout=LONGEST)
    assert response.json().get("model") == name, response.text
    return text_of(response)


def test_three_models_in_turn_all_answer_and_the_longest_unused_goes(server: RunningServer) -> None:
    with Listener(server) as listener:
        order = [*NAMES, *NAMES, "two", "three", "one", "one", "two"]
        memory: list[str] = []  # the one used last at the end
        gone: list[str] = []
        for name in order:
            assert ask(server, name) == " Paris."
            memory = [*(each for each in memory if each != name), name]
            while len(memory) > 2:
                gone.append(memory.pop(0))
            assert sorted(loaded(server)) == sorted(memory)
        listener.wait("unloaded", count=len(gone))
        unloaded = listener.of("unloaded")
        assert [event["model"] for event in unloaded] == gone
        assert {event["data"]["reason"] for event in unloaded} == {"evicted"}
        assert listener.of("crashed") == listener.of("load_failed") == []


def test_the_sdk_notices_nothing_but_the_time(server: RunningServer) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        for name in (*NAMES, *NAMES):
            answer = client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": "Hello"}], max_tokens=3
            )
            assert answer.model == name


def test_requests_for_all_models_at_once_are_all_answered(server: RunningServer) -> None:
    with Listener(server) as listener, ThreadPoolExecutor(12) as threads:
        answers = [*threads.map(lambda name: ask(server, name, max_tokens=2), NAMES * 4)]
        assert answers == [" Paris."] * 12
        assert len(loaded(server)) == 2
        counts = [len(listener.of("loaded", name)) for name in NAMES]
        assert max(counts) <= 2, "nobody is loaded again and again"


def test_twenty_requests_for_a_cold_model_cause_one_load(server: RunningServer) -> None:
    with Listener(server) as listener, ThreadPoolExecutor(20) as threads:
        assert {*threads.map(lambda _: ask(server, "one"), range(20))} == {" Paris."}
        assert len(listener.of("loading", "one")) == len(listener.of("loaded", "one")) == 1


def test_a_client_that_gives_up_does_not_stop_the_load_of_others(server: RunningServer) -> None:
    with Listener(server) as listener, ThreadPoolExecutor(1) as threads:
        with unanswered(server, COMPLETIONS, {**TINY, "model": "one"}):
            listener.wait("loading", "one")
            patient = threads.submit(ask, server, "one")
            wait_until(lambda: "one" in {each["model"] for each in listener.events})
        assert patient.result() == " Paris."
        assert len(listener.of("loaded", "one")) == 1


def test_one_that_generates_is_never_unloaded(server: RunningServer) -> None:
    with Listener(server) as listener, streamed(server, COMPLETIONS, {**LONG, "model": "one"}) as stream:
        next(stream)
        for name in ("two", "three", "two", "three"):
            assert ask(server, name) == " Paris."
        assert "one" in loaded(server)
        assert listener.of("unloaded", "one") == []
        server.post("/v1/internal/stop-generation", {})
        *_, done = stream
        assert done == "[DONE]"
        assert {event["model"] for event in listener.of("unloaded")} == {"two", "three"}


def test_a_client_that_is_slow_to_read_keeps_no_model_in_memory(server: RunningServer) -> None:
    """What it has not taken yet is there already."""
    body = {**LONG, "model": "one", "max_tokens": 60, "max_tokens_second": 3, "stream_options": {"include_usage": True}}
    with streamed(server, COMPLETIONS, body) as stream:
        next(stream)
        wait_until(lambda: server.running == 0)
        assert server.post("/v1/internal/model/unload", {"model_name": "one"}).json() == "OK"
        assert loaded(server) == []
        assert [ask(server, name) for name in ("two", "three")] == [" Paris."] * 2
        *_, last, usage, done = stream
        assert (last["choices"][0]["finish_reason"], done) == ("length", "[DONE]")
        assert usage["usage"]["completion_tokens"] == 60


def test_a_request_for_which_there_is_no_room_says_what_it_waits_for(server: RunningServer) -> None:
    """Both models in memory are generating; who used them last does not matter, one of them has to come to an end."""
    with (
        streamed(server, COMPLETIONS, {**LONG, "model": "one"}) as one,
        streamed(server, COMPLETIONS, {**LONG, "model": "two"}) as two,
        Listener(server) as listener,
    ):
        first = next(one)
        next(two)
        body = {**TINY, "model": "three", "stream": True}
        with httpx.stream("POST", server.url + COMPLETIONS, json=body, timeout=LONGEST) as third:
            lines = third.iter_lines()
            assert next(iter(comments_of(lines))) == "waiting for other models to make room"
            server.post("/v1/internal/stop-generation", {"id": first["id"]})
            assert [*one][-1] == "[DONE]"
            rest = [*lines]
            assert rest[-2] == "data: [DONE]"
            assert any('"text":" Paris' in line for line in rest)
        assert [event["model"] for event in listener.of("unloaded")] == ["one"]
        assert loaded(server) == ["three", "two"] or loaded(server) == ["two", "three"]
        assert next(two)["choices"][0]["finish_reason"] is None  # it was not disturbed
        server.post("/v1/internal/stop-generation", {})
        assert [*two][-1] == "[DONE]"


# What a conversation is to be shortened to can be counted by its model only.
@pytest.mark.parametrize(
    ("endpoint", "fields"),
    [
        (COMPLETIONS, TINY),
        (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "truncation": "auto"}),
    ],
)
def test_a_stream_that_waits_for_a_load_says_how_much_is_loaded(
    server: RunningServer, endpoint: str, fields: dict[str, Any]
) -> None:
    assert ask(server, "one") == " Paris."
    wait_until(lambda: len(children(server)) == 2)  # the next model's process is there already, and is held up
    (spare,) = [pid for pid in children(server) if not any(f"(process {pid})" in line for line in server.lines)]
    os.kill(spare, signal.SIGSTOP)
    body = {**fields, "model": "two", "stream": True}
    try:
        with httpx.stream("POST", server.url + endpoint, json=body, timeout=LONGEST) as stream:
            lines = stream.iter_lines()
            assert next(iter(comments_of(lines))) == "loading 0%"
            models = {model["id"]: model["status"] for model in server.get("/v1/models")["data"]}
            assert models["two"] == {"value": "loading", "progress": 0.0}
            assert server.get("/v1/internal/health")["models"]["two"] == "loading"
            os.kill(spare, signal.SIGCONT)
            assert [*lines][-2] == "data: [DONE]"
    finally:
        os.kill(spare, signal.SIGCONT)


def test_a_model_too_large_is_refused_at_once_and_disturbs_nobody(
    starter_model: Path, tmp_path: Path, need: int
) -> None:
    large = f"source: 'file:{starter_model}', kv_cells: 262144"
    path = write_registry(tmp_path / "models.yaml", {"one": starter_model, "large": large}, SETTINGS)
    environment = {"LLAMASERVE_MEMORY": str(2 * need)}
    with RunningServer("serve", "one", "--models-file", str(path), environment=environment) as server:
        pid = server.worker_pid()
        for path_, body in ((COMPLETIONS, TINY), (CHAT, {"messages": [{"role": "user", "content": "x"}]})):
            for extra in ({}, {"stream": True}):
                start = time.monotonic()
                response = server.post(path_, {**body, **extra, "model": "large"})
                message = assert_error(response, 507, "insufficient_memory")
                assert "large needs" in message
                assert time.monotonic() - start < 10
        assert ask(server, "one") == " Paris."
        assert server.worker_pid() == pid


def test_what_a_model_has_evaluated_is_there_when_it_comes_back(starter_model: Path, tmp_path: Path, need: int) -> None:
    path = write_registry(tmp_path / "models.yaml", {"one": starter_model, "two": starter_model}, SETTINGS)
    environment = {
        "LLAMASERVE_MEMORY": str(int(1.5 * need)),  # for one at a time
        "LLAMASERVE_SAVED_PREFIXES": "1GB",
        "LLAMASERVE_CACHE": str(tmp_path / "cache"),
    }
    prompt = "Once upon a time there was a king who had three daughters. " * 20

    def cached(server: RunningServer, name: str) -> float:
        """Return how much of the prompt was there, from 0 to 1."""
        body = {"prompt": prompt, "max_tokens": 2, "temperature": 0, "model": name}
        usage = server.post(COMPLETIONS, body).json()["usage"]
        return float(usage["prompt_tokens_details"]["cached_tokens"] / usage["prompt_tokens"])

    with RunningServer("serve", "--models-file", str(path), environment=environment) as server:
        assert cached(server, "one") == 0
        assert cached(server, "two") == 0
        assert loaded(server) == ["two"]
        assert cached(server, "one") > 0.99
    with RunningServer("serve", "--models-file", str(path), environment=environment) as server:
        assert cached(server, "one") > 0.99  # what was there when the server ended
        for file in (tmp_path / "cache" / "prefixes").iterdir():
            file.write_bytes(b"damaged" * 1000)
        assert cached(server, "two") == 0
        assert any("two" in line and "prefixes" in line for line in server.lines)


def test_every_pair_of_requests_finds_its_model(server: RunningServer) -> None:
    for first, second in pairwise([*NAMES, "one", "three", "two", "one"]):
        with ThreadPoolExecutor(2) as threads:
            assert [*threads.map(lambda name: ask(server, name), (first, second))] == [" Paris."] * 2


def test_an_endless_answer_does_not_keep_others_waiting_for_ever(server: RunningServer) -> None:
    """Both models in memory get one request after another; a third gets its turn all the same."""
    with ThreadPoolExecutor(4) as threads:
        over: list[bool] = []

        def keep_busy(name: str) -> None:
            while not over:
                ask(server, name, **{**ENDLESS, "max_tokens": 20})

        busy = [threads.submit(keep_busy, name) for name in ("one", "two") for _ in range(2)]
        wait_until(lambda: len(loaded(server)) == 2, 20)
        try:
            assert ask(server, "three") == " Paris."
        finally:
            over.append(True)
        for each in busy:
            each.result()
