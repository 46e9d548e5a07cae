"""How much may wait for a model, how long an answer may take, and what a waiting client is told."""

from __future__ import annotations

import time

import openai
import pytest
from api_helpers import CHAT, COMPLETIONS, ENDLESS, TINY, all_events, assert_error, streamed
from running_server import RunningServer, wait_until


@pytest.mark.parametrize("stream", [False, True])
def test_past_the_queue_a_request_is_refused_at_once(narrow_server: RunningServer, stream: bool) -> None:
    with streamed(narrow_server, COMPLETIONS, ENDLESS) as first, streamed(narrow_server, COMPLETIONS, ENDLESS):
        next(first)
        wait_until(lambda: narrow_server.running == 2)
        response = narrow_server.post(COMPLETIONS, {**TINY, "stream": stream})
        assert response.status_code == 429
        error = response.json()["error"]
        assert (error["type"], error["code"], error["param"]) == ("rate_limit_error", "queue_full", None)
        assert 1 <= int(response.headers["retry-after"]) <= 60
        with (
            openai.OpenAI(base_url=narrow_server.url + "/v1", api_key="none", max_retries=0) as client,
            pytest.raises(openai.RateLimitError, match="wait for this model"),
        ):
            client.completions.create(model="smollm2-135m", prompt="A")
    wait_until(lambda: narrow_server.running == 0)
    assert narrow_server.post(COMPLETIONS, TINY).status_code == 200


def test_a_refused_or_failed_request_keeps_no_place(narrow_server: RunningServer) -> None:
    for body in ({**TINY, "prompt": "x " * 5000}, {**TINY, "logit_bias": {"999999": 1}}) * 3:
        assert narrow_server.post(COMPLETIONS, body).status_code == 400
    assert narrow_server.post(COMPLETIONS, TINY).status_code == 200


def test_an_answer_ends_when_its_time_is_up(narrow_server: RunningServer) -> None:
    body = {**ENDLESS, "max_tokens": 1900, "time_limit": 0.7}
    before = time.monotonic()
    answer = narrow_server.post(COMPLETIONS, body).json()
    assert time.monotonic() - before < 10
    assert answer["choices"][0]["finish_reason"] == "length"
    assert 0 < answer["usage"]["completion_tokens"] < 1900
    *chunks, done = all_events(narrow_server, COMPLETIONS, body)
    assert done == "[DONE]"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_one_whose_time_is_up_before_it_has_begun_is_told_so(narrow_server: RunningServer) -> None:
    with streamed(narrow_server, COMPLETIONS, ENDLESS) as ahead:
        next(ahead)
        response = narrow_server.post(COMPLETIONS, {**TINY, "time_limit": 0.3})
    assert "0.3 seconds" in assert_error(response, 504, "time_limit_exceeded")
    assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("limit", [0, -1, "soon", 1e300])
def test_a_time_limit_is_a_number_of_seconds(narrow_server: RunningServer, limit: object) -> None:
    assert_error(narrow_server.post(COMPLETIONS, {**TINY, "time_limit": limit}), 400, None, "time_limit")


def test_a_long_prompt_tells_how_far_it_is(narrow_server: RunningServer) -> None:
    story = " ".join(f"Chapter {number} of the long history of the lighthouse." for number in range(150))
    body = {"messages": [{"role": "user", "content": story}], "max_tokens": 1, "stream": True}
    text = narrow_server.post(CHAT, body).text
    shares = [int(line[9:-1]) for line in text.splitlines() if line.startswith(": prompt ")]
    assert shares == sorted(shares)
    assert any(0 < share <= 100 for share in shares), text[:500]
