"""Whatever a chat's body is, the answer is one that the document has, and comes; the server and its model go on."""

from __future__ import annotations

import json
import random
import time
from functools import cache
from typing import Any

import httpx
from chat_bodies import bodies
from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import sampled_from
from jsonschema import Draft202012Validator
from running_server import RunningServer

CHAT = "/v1/chat/completions"
PATHS = (CHAT, CHAT, "/v1/internal/chat-prompt")
FAULTS = {"internal_error", "engine_crashed", "engine_error", "model_quarantined", "time_limit_exceeded"}
HANGS = 90  # seconds; more than a template may take to get on
SHORT = 120  # examples


def test_any_chat_gets_an_answer_that_is_documented(fuzzed_server: RunningServer, minutes: float) -> None:
    check = _checking(fuzzed_server)
    ends = time.monotonic() + minutes * 60
    first = 0 if minutes < 1 else random.randrange(2**31)
    pid, number = fuzzed_server.worker_pid(), 0
    while not number or (time.monotonic() < ends and minutes >= 1):
        seed(first + number)(check)()
        number += 1
    greeting = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    assert fuzzed_server.post(CHAT, greeting).status_code == 200
    assert fuzzed_server.worker_pid() == pid, "the model's process was replaced"
    assert not [line for line in fuzzed_server.lines if "Traceback" in line]


def _checking(server: RunningServer) -> Any:
    document = server.get("/openapi.json")

    @cache
    def validator(path: str, status: int, media_type: str) -> Draft202012Validator:
        responses = document["paths"][path]["post"]["responses"]
        assert str(status) in responses, f"{status} is not documented"
        response = responses[str(status)]
        if "$ref" in response:
            response = document["components"]["responses"][response["$ref"].rpartition("/")[2]]
        return Draft202012Validator({"components": document["components"], **response["content"][media_type]["schema"]})

    @given(body=bodies(), path=sampled_from(PATHS))
    @settings(
        max_examples=SHORT, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
    )
    def check(body: bytes, path: str) -> None:
        response = httpx.post(server.url + path, content=body, timeout=HANGS)
        media_type = response.headers["content-type"].partition(";")[0]
        expected = validator(path, response.status_code, media_type)
        if media_type == "application/json":
            answers = [response.json()]
            expected.validate(answers[0])
        else:
            answers = _events(response.text, expected)
        for answer in answers:
            assert answer.get("error", {}).get("code") not in FAULTS, answer

    return check


def _events(text: str, expected: Draft202012Validator) -> list[dict[str, Any]]:
    """Return the data of a whole stream, all of which is right."""
    *events, last = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert last == "[DONE]"
    schema = expected.schema["properties"]["data"]["anyOf"][1]["contentSchema"]
    inner = Draft202012Validator({"components": expected.schema["components"], **schema})
    found = [json.loads(event) for event in events]
    for each in found:
        inner.validate(each)
    return found
