"""The ledger is what clients were told: every answer's usage is in it, whole or streamed, across crashes and restarts;
and a key sees its own.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from api_helpers import CHAT, COMPLETIONS, ENDLESS, TINY, assert_error
from running_server import RunningServer, wait_until

JFK = Path(__file__).resolve().parent.parent / "speech" / "jfk.flac"
USAGE, DASHBOARD = "/v1/billing/usage", "/v1/dashboard/billing"
ALICE, BOB, ADMIN = "sk-key-of-alice-0123", "sk-key-of-bob-012345", "sk-key-of-the-admin"


@pytest.fixture(scope="module")
def folder(
    starter_model: Path, embedding_model: Path, speech_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with the models and the state of a server."""
    folder = tmp_path_factory.mktemp("billing")
    (folder / "models.yaml").write_text(
        "defaults: {context: 1024, parallel: 4, embedding_model: minilm, moderation_model: minilm}\nmodels:\n"
        f"  smollm2: {{source: 'file:{starter_model}'}}\n  minilm: {{source: 'file:{embedding_model}'}}\n"
        f"  whisper: {{source: 'file:{speech_model}'}}\n"
    )
    return folder


def started(folder: Path, state: str = "state", **environment: str) -> RunningServer:
    """Return a server in the folder that has not been started yet."""
    settings = {"LLAMASERVE_STATE_DIR": str(folder / state), **environment}
    return RunningServer("serve", "smollm2", "--models-file", str(folder / "models.yaml"), environment=settings)


def billed(server: RunningServer, secret: str = "", **query: str) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {secret}"} if secret else {}
    answer = httpx.get(server.url + USAGE, params=query, headers=headers, timeout=30)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


class Teller:
    """A client that adds up the usage that it is told."""

    def __init__(self, server: RunningServer, key: str = "none") -> None:
        self.url, self.key = server.url, key
        self.told: Counter[str] = Counter()

    def _take(self, usage: Any) -> None:
        self.told["requests"] += 1
        self.told["prompt_tokens"] += usage.prompt_tokens
        self.told["completion_tokens"] += getattr(usage, "completion_tokens", 0)
        details = getattr(usage, "prompt_tokens_details", None)
        self.told["cached_tokens"] += (details and details.cached_tokens) or 0

    def ask(self, rounds: int = 1) -> None:
        """Send some requests of each kind."""
        with openai.OpenAI(base_url=self.url + "/v1", api_key=self.key, max_retries=0) as sdk:
            for number in range(rounds):
                messages: Any = [{"role": "user", "content": f"Tell me of the number {number}, please."}]
                chat = sdk.chat.completions.create(model="smollm2", messages=messages, max_tokens=9 + number, n=2)
                self._take(chat.usage)
                stream = sdk.chat.completions.create(
                    model="smollm2",
                    messages=messages,
                    max_tokens=5,
                    stream=True,
                    stream_options={"include_usage": True},
                )
                self._take([chunk.usage for chunk in stream if chunk.usage][-1])
                self._take(sdk.completions.create(model="smollm2", prompt=["One", "Two"], max_tokens=3).usage)
                self._take(sdk.embeddings.create(model="minilm", input=["a text", "another one"]).usage)
                judged = sdk.moderations.create(input="What a lovely day.")
                self._take(openai.types.create_embedding_response.Usage.model_validate(judged.to_dict()["usage"]))


def figures(bill: dict[str, Any]) -> dict[str, int]:
    return {name: bill[name] for name in ("requests", "prompt_tokens", "completion_tokens", "cached_tokens")}


def test_the_bill_is_what_clients_were_told_after_a_kill_and_a_restart(folder: Path) -> None:
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    with started(folder) as server:
        tellers = [Teller(server) for _ in range(4)]
        threads = [threading.Thread(target=teller.ask, args=(3,)) for teller in tellers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        told = sum((teller.told for teller in tellers), Counter[str]())
        before = figures(billed(server))
        server.kill()
    assert before == dict(told)
    with started(folder) as server:
        bill = billed(server, start_date=today, end_date=today)
        assert figures(bill) == dict(told)
        assert bill["total_usage"] == bill["total_tokens"] == told["prompt_tokens"] + told["completion_tokens"]
        assert bill["unanswered"] == []
        more = Teller(server)
        more.ask()
        assert figures(billed(server)) == dict(told + more.told)
        rows = billed(server, group_by="day,model")["data"]
        assert {(row["day"], row["model"]) for row in rows} == {(today, "smollm2"), (today, "minilm")}
        assert sum(row["total_tokens"] for row in rows) == billed(server)["total_usage"]
        assert billed(server, end_date="2020-01-01")["total_usage"] == 0


def test_tokens_in_and_out_are_of_the_model_that_was_asked(folder: Path) -> None:
    with started(folder, "tokens") as server:
        for path, body in (
            ("encode", {"text": "Hi"}),
            ("token-count", {"text": "Hi"}),
            ("decode", {"tokens": [28120]}),
        ):
            assert server.post(f"/v1/internal/{path}", body).status_code == 200
        rows = billed(server, group_by="model,endpoint")["data"]
    assert {(row["model"], row["endpoint"].rpartition("/")[2]) for row in rows} == {
        ("smollm2", "encode"),
        ("smollm2", "token-count"),
        ("smollm2", "decode"),
    }


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_in_the_ledger_before_its_client_has_all_of_it(folder: Path, stream: bool) -> None:
    """The process is killed as soon as the client has the usage."""
    state, body = f"killed-{stream}", dict(TINY)
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    with (
        started(folder, state) as server,
        httpx.stream("POST", server.url + COMPLETIONS, json=body, timeout=60) as answer,
    ):
        text = ""
        for piece in answer.iter_text():
            text += piece
            if '"total_tokens"' in text:
                break
        server.kill()
    (told,) = re.findall(r'"total_tokens":(\d+)', text)
    with started(folder, state) as server:
        bill = billed(server)
        assert (bill["requests"], bill["total_usage"]) == (1, int(told))


def test_what_was_not_answered_is_listed_apart(folder: Path) -> None:
    with started(folder, "apart") as server:
        with httpx.stream("POST", server.url + COMPLETIONS, json={**ENDLESS, "stream": True}, timeout=60) as answer:
            pieces = answer.iter_text()
            while not next(pieces).count("text"):
                pass
        too_long = {"prompt": "word " * 5000, "max_tokens": 1}
        assert server.post(COMPLETIONS, too_long).status_code == 400
        assert server.post(COMPLETIONS, {**TINY, "model": "nobody"}).status_code == 404
        wait_until(lambda: len(billed(server)["unanswered"]) == 2)
        bill = billed(server)
        assert bill["total_usage"] == bill["requests"] == 0
        outcomes = {each["outcome"]: each for each in bill["unanswered"]}
        assert outcomes["refused"]["requests"] == 2
        assert outcomes["cancelled"]["requests"] == 1
        assert outcomes["cancelled"]["prompt_tokens"] > 0
        assert outcomes["cancelled"]["completion_tokens"] > 0


def test_what_failed_in_the_middle_has_used_what_it_had(folder: Path) -> None:
    with started(folder, "failed") as server:
        with httpx.stream("POST", server.url + COMPLETIONS, json={**ENDLESS, "stream": True}, timeout=60) as answer:
            lines = answer.iter_lines()
            for _ in range(20):
                next(lines)
            os.kill(server.worker_pid(), signal.SIGKILL)
            assert any("engine_crashed" in line for line in lines)
        (failed,) = billed(server)["unanswered"]
        assert failed["outcome"] == "failed"
        assert failed["prompt_tokens"] > 0
        assert failed["completion_tokens"] >= 5


def test_a_whole_answer_that_nobody_waits_for_has_used_what_it_had(folder: Path) -> None:
    with started(folder, "left") as server:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + COMPLETIONS, json=ENDLESS, timeout=2)
        wait_until(lambda: len(billed(server)["unanswered"]) == 1)
        (cancelled,) = billed(server)["unanswered"]
        assert cancelled["outcome"] == "cancelled"
        assert cancelled["completion_tokens"] >= 5
        wait_until(lambda: server.running == 0)


def test_audio_counts_in_seconds(folder: Path) -> None:
    with started(folder, "audio") as server, openai.OpenAI(base_url=server.url + "/v1", api_key="none") as sdk:
        told = sdk.audio.transcriptions.create(model="whisper", file=JFK).to_dict()["usage"]
        (row,) = billed(server, group_by="endpoint")["data"]
        assert isinstance(told, dict)
        assert row["endpoint"] == "/v1/audio/transcriptions"
        assert row["audio_seconds"] == told["seconds"] == 11


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[RunningServer]:
    """A server with keys of two people and an admin's."""
    keys = {"LLAMASERVE_API_KEY": f"{ALICE},{BOB}", "LLAMASERVE_ADMIN_KEY": ADMIN}
    with started(folder, "shared", **keys) as server:
        yield server


def test_a_key_sees_its_own_usage_and_an_admin_all(shared: RunningServer) -> None:
    alice, bob = Teller(shared, ALICE), Teller(shared, BOB)
    alice.ask(2)
    bob.ask()
    assert figures(billed(shared, ALICE)) == dict(alice.told)
    assert figures(billed(shared, BOB)) == dict(bob.told)
    assert figures(billed(shared, ADMIN)) == dict(alice.told + bob.told)
    assert figures(billed(shared, ADMIN, key="api-key-2")) == dict(bob.told)
    assert figures(billed(shared, ALICE, key="api-key")) == dict(alice.told)
    rows = billed(shared, ADMIN, group_by="key")["data"]
    assert {row["key"]: row["requests"] for row in rows} == {"api-key": 10, "api-key-2": 5}
    answer = httpx.get(shared.url + USAGE, params={"key": "api-key-2"}, headers={"x-api-key": ALICE})
    assert_error(answer, 403, "admin_key_required")


def test_a_key_stops_its_own_generations_only(shared: RunningServer) -> None:
    """Whether all are to be stopped or one by its id."""
    body = {**ENDLESS, "stream": True}
    stop = shared.url + "/v1/internal/stop-generation"
    with httpx.stream("POST", shared.url + COMPLETIONS, json=body, headers={"x-api-key": ALICE}, timeout=60) as answer:
        lines = answer.iter_lines()
        first = next(line for line in lines if line.startswith("data: "))
        name = json.loads(first.removeprefix("data: "))["id"]
        for wish in (None, {"id": name}):
            assert httpx.post(stop, json=wish, headers={"x-api-key": BOB}).json() == "OK"
        seen = [next(lines) for _ in range(40)]
        assert not any('"finish_reason":"stop"' in line for line in seen)
        assert httpx.post(stop, headers={"x-api-key": ALICE}).json() == "OK"
        assert any('"finish_reason":"stop"' in line for line in lines)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"start_date": "yesterday"}, "start_date"),
        ({"start_date": "2026-02-30"}, "start_date"),
        ({"start_date": "2026-01-02", "end_date": "2026-01-01"}, "end_date"),
        ({"start_date": "bad", "end_date": "2026-01-01"}, "start_date"),
        ({"start_date": "2026-01-01", "end_date": "bad"}, "end_date"),
        ({"group_by": "day,password"}, "group_by"),
        ({"group_by": "outcome"}, "group_by"),
        ({"start_date": "9" * 70}, "start_date"),
    ],
)
def test_periods_that_are_none(shared: RunningServer, query: dict[str, str], param: str) -> None:
    for path in (USAGE, f"{DASHBOARD}/usage"):
        if "group_by" in query and path != USAGE:
            continue
        answer = httpx.get(shared.url + path, params=query, headers={"x-api-key": ADMIN})
        assert_error(answer, 400, None, param)


def test_what_the_former_dashboard_had(shared: RunningServer) -> None:
    headers = {"authorization": f"Bearer {ADMIN}"}
    httpx.post(
        shared.url + CHAT, json={"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}, headers=headers
    )
    today = datetime.datetime.now(datetime.UTC).date()
    query = {"start_date": today.replace(day=1).isoformat(), "end_date": (today + datetime.timedelta(1)).isoformat()}
    usage = httpx.get(f"{shared.url}{DASHBOARD}/usage", params=query, headers=headers).json()
    assert usage["total_usage"] == 0
    assert usage["total_tokens"] == billed(shared, ADMIN)["total_usage"] > 0
    (day,) = usage["daily_costs"]
    assert datetime.datetime.fromtimestamp(day["timestamp"], datetime.UTC).date() == today
    assert sum(item["tokens"] for item in day["line_items"]) == usage["total_tokens"]
    plan = httpx.get(f"{shared.url}{DASHBOARD}/subscription", headers=headers).json()
    assert plan["hard_limit_usd"] - usage["total_usage"] / 100 > 0
    assert plan["account_name"] == "admin-key"


def test_a_bill_adds_up_while_requests_go_on(shared: RunningServer) -> None:
    done = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=shared.url, headers={"x-api-key": ALICE}) as client:
            while not done.is_set():
                assert client.post("/v1/internal/encode", json={"text": "a"}).status_code == 200

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(100):
            bill = billed(shared, ADMIN, group_by="key,endpoint")
            for part in ("requests", "prompt_tokens", "completion_tokens"):
                assert bill[part] == sum(row[part] for row in bill["data"])
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_without_records_the_bill_says_so(folder: Path) -> None:
    with started(folder, "off", LLAMASERVE_USAGE_RETENTION="0") as server:
        assert server.post(COMPLETIONS, TINY).status_code == 200
        bill = billed(server, group_by="day")
        assert (bill["total_usage"], bill["recorded"], bill["data"]) == (0, False, [])
        assert not (folder / "off").exists()


def test_a_ledger_that_can_not_be_written_keeps_nobody_from_being_answered(folder: Path) -> None:
    """Rows wait in memory, and are there once it can."""
    state = folder / "blocked"
    state.write_text("a file where the folder should be")
    with started(folder, "blocked") as server:
        answer = server.post(COMPLETIONS, TINY)
        assert answer.status_code == 200
        wait_until(lambda: any("usage" in line and "ERROR" in line for line in server.lines))
        state.unlink()
        wait_until(lambda: billed(server)["requests"] == 1, limit=20)
        assert billed(server)["total_usage"] == answer.json()["usage"]["total_tokens"]
