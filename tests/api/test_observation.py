"""What can be seen of the server: metrics that count what was asked, a status, and lines in the log that say no more
than they should.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_helpers import CHAT, COMPLETIONS, TINY
from prometheus_client.parser import text_string_to_metric_families
from running_server import RunningServer, wait_until

from llamaserve.api.metrics import Metrics
from llamaserve.engine.params import Footprint
from llamaserve.registry.pool import ModelPool
from llamaserve.registry.spec import load_registry

ROOT = Path(__file__).resolve().parent.parent.parent
SECRET = "a-secret-that-nobody-shall-read"


@pytest.fixture(scope="module")
def seen(starter_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server of its own, since others would count in the shared one, whose log is of JSON."""
    path = tmp_path_factory.mktemp("seen") / "models.yaml"
    path.write_text(f"defaults: {{context: 1024}}\nmodels: {{smollm2: {{source: 'file:{starter_model}'}}}}\n")
    flags = ("--models-file", str(path), "--log-format", "json")
    with RunningServer("serve", "smollm2", *flags) as running:
        yield running


def values(server: RunningServer) -> dict[tuple[str, ...], float]:
    """Return all samples by their name and the values of their labels, in the order of the labels' names."""
    answer = httpx.get(server.url + "/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(answer.text)
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def lines(server: RunningServer, logger: str = "llamaserve.access") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in server.lines if line.startswith("{")]
    return [line for line in found if line["logger"] == logger]


def test_metrics_count_what_was_asked(seen: RunningServer) -> None:
    before = values(seen)
    answer = seen.post(COMPLETIONS, {"prompt": SECRET, "max_tokens": 20}).json()["usage"]
    text = seen.post(COMPLETIONS, {"prompt": SECRET, "max_tokens": 30, "stream": True}).text
    assert "[DONE]" in text
    assert seen.post(COMPLETIONS, {**TINY, "prompt": "x " * 5000}).status_code == 400
    after = values(seen)

    def grown(*name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown("llamaserve_requests_total", COMPLETIONS, "smollm2", "answered") == 2
    assert grown("llamaserve_requests_total", COMPLETIONS, "smollm2", "refused") == 1
    assert grown("llamaserve_prompt_tokens_total", "smollm2") == 2 * answer["prompt_tokens"]
    assert grown("llamaserve_completion_tokens_total", "smollm2") >= answer["completion_tokens"] + 1
    assert grown("llamaserve_cached_tokens_total", "smollm2") > 0
    assert grown("llamaserve_request_seconds_count", COMPLETIONS, "smollm2") == 2
    assert grown("llamaserve_time_to_first_token_seconds_count", "smollm2") == 1
    assert grown("llamaserve_inter_token_seconds_count", "smollm2") > 3
    assert after["llamaserve_model_loads_total", "smollm2", "loaded"] == 1
    assert after["llamaserve_models", "loaded"] == 1
    assert after["llamaserve_kv_cells", "smollm2"] >= 1024
    assert after["llamaserve_model_memory_bytes", "host", "smollm2"] > 50e6
    assert after["llamaserve_event_loop_lag_seconds_count",] > 5
    assert after["process_resident_memory_bytes",] > 1e7
    assert after["llamaserve_requests_open",] == after["llamaserve_requests_waiting",] == 0
    assert not any(name[0].endswith("_created") for name in after)
    wait_until(lambda: values(seen)["llamaserve_kv_cells_used", "smollm2"] > 0)
    guessed, right = (after[f"llamaserve_{kind}_tokens_total", "smollm2"] for kind in ("drafted", "accepted_draft"))
    assert guessed >= right >= 0


def test_the_status_says_how_things_are(seen: RunningServer) -> None:
    status = seen.get("/v1/internal/status")
    (model,) = status["models"]
    assert (model["name"], model["status"]) == ("smollm2", "loaded")
    assert model["pid"] == seen.worker_pid()
    assert status["pid"] == seen.process.pid
    assert status["keys"] is None
    assert status["usage"]["problem"] is None
    assert status["models_claimed"]["host"] <= status["models_budget"]["host"]


def test_each_request_has_a_line_and_its_id_is_everywhere(seen: RunningServer) -> None:
    answer = httpx.post(
        seen.url + COMPLETIONS, json={**TINY, "prompt": SECRET}, headers={"x-request-id": "my-id.1"}, timeout=60
    )
    assert answer.headers["x-request-id"] == "my-id.1"
    wait_until(lambda: any(line["request_id"] == "my-id.1" for line in lines(seen)))
    (line,) = [line for line in lines(seen) if line["request_id"] == "my-id.1"]
    assert (line["method"], line["path"], line["status"]) == ("POST", COMPLETIONS, 200)
    assert line["model"] == "smollm2"
    assert line["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"]
    assert line["client"] == "127.0.0.1"
    assert not any(SECRET in line for line in seen.lines)


@pytest.mark.parametrize("given", ["", "two words", "x" * 129, "a\tb", "{}", 'a"b'])
def test_an_id_that_could_do_harm_is_replaced(seen: RunningServer, given: str) -> None:
    answer = httpx.get(seen.url + "/health", headers={"x-request-id": given})
    assert re.fullmatch(r"req_[0-9a-f]{24}", answer.headers["x-request-id"])


def test_a_path_can_not_forge_a_line(seen: RunningServer) -> None:
    httpx.get(seen.url + "/v1/%0A%7B%22level%22:%22error%22%7D?api_key=" + SECRET)
    wait_until(lambda: any("%0A" in line["path"] for line in lines(seen)))
    assert not any(SECRET in line for line in seen.lines)
    assert all(line["level"] == "info" for line in lines(seen))


def test_the_name_of_a_picture_is_nobodys_business(seen: RunningServer) -> None:
    httpx.get(seen.url + "/v1/images/files/some-name-that-is-a-secret.png")
    wait_until(lambda: any(line["path"] == "/v1/images/files/…" for line in lines(seen)))
    assert not any("some-name" in line for line in seen.lines)


def test_health_is_not_what_a_log_is_full_of(seen: RunningServer) -> None:
    before = len(lines(seen))
    for path in ("/health", "/v1/internal/health", "/metrics", "/v1/models"):
        assert httpx.get(seen.url + path).status_code == 200
    wait_until(lambda: len(lines(seen)) > before)
    assert [line["path"] for line in lines(seen)[before:]] == ["/v1/models"]


def test_crashes_are_counted(seen: RunningServer) -> None:
    os.kill(seen.worker_pid(), signal.SIGKILL)
    wait_until(lambda: values(seen).get(("llamaserve_model_crashes_total", "smollm2")) == 1)
    assert seen.post(COMPLETIONS, TINY).status_code == 200
    assert values(seen)["llamaserve_model_loads_total", "smollm2", "loaded"] == 2


def test_prompts_are_logged_if_somebody_wants_that(starter_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(f"models: {{smollm2: {{source: 'file:{starter_model}', context: 512}}}}\n")
    environment = {"LLAMASERVE_LOG_PROMPTS": "true"}
    with RunningServer("serve", "smollm2", "--models-file", str(path), environment=environment) as server:
        body = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 1}
        assert server.post(CHAT, body).status_code == 200
        wait_until(lambda: any(SECRET in line for line in server.lines))


def test_every_metric_is_documented() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    pool = ModelPool(load_registry(ROOT / "models.yaml"), budget=lambda _: Footprint())
    names = {family.name for family in Metrics(pool, None).registry.collect()}
    names |= {"llamaserve_usage_pending", "llamaserve_usage_lost"}
    assert {name for name in names if f"`{name}`" not in text and not name.startswith("process_")} == set()
