"""``/v1/internal/*`` and ``/health``, with the oddities that clients of the seed API rely on."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_helpers import (
    CHAT,
    COMPLETIONS,
    ENDLESS,
    LIMIT,
    MODEL,
    TINY,
    assert_alive,
    assert_error,
    length_of,
    streamed,
    tokens_of,
    unanswered,
)
from hypothesis import given, settings, strategies as st
from running_server import RunningServer, wait_until


def decode(server: RunningServer, tokens: list[int], **options: Any) -> str:
    response = server.post("/v1/internal/decode", {"tokens": tokens, **options})
    response.raise_for_status()
    return str(response.json()["text"])


@pytest.mark.parametrize("text", ["", "Hello world", "naïve 🎉 你好", "\0", "a\0b\r\n\t", " ", "<|im_end|>", "￿"])
def test_decoding_undoes_encoding(server: RunningServer, text: str) -> None:
    tokens = tokens_of(server, text)
    assert decode(server, tokens) == text
    assert server.post("/v1/internal/token-count", {"text": text}).json() == {"length": len(tokens)}


# The model's vocabulary lacks a few bytes: those of some control characters, and of rare characters beyond U+FFFF.
_CHARACTERS = st.characters(categories=("L", "N", "P", "S", "Zs"), max_codepoint=0xD7FF)


@given(text=st.text(_CHARACTERS, max_size=60))
@settings(max_examples=30, deadline=None)
def test_decoding_undoes_encoding_of_any_text(server: RunningServer, text: str) -> None:
    assert decode(server, tokens_of(server, text)) == text


def test_special_tokens_can_be_text_or_left_out(server: RunningServer) -> None:
    assert tokens_of(server, "<|im_end|>") == [2]
    plain = server.post("/v1/internal/encode", {"text": "<|im_end|>", "parse_special": False}).json()
    assert plain["length"] > 1
    assert decode(server, [*plain["tokens"], 2], skip_special_tokens=True) == "<|im_end|>"


def test_part_of_a_character_is_decoded_with_a_replacement(server: RunningServer) -> None:
    first, *_ = tokens_of(server, "🎉")
    assert decode(server, [first]).endswith("�")


@pytest.mark.parametrize("tokens", [[49152], [2**31 - 1], [1, 2, 999_999]])
def test_tokens_that_do_not_exist_are_refused(server: RunningServer, tokens: list[int]) -> None:
    message = assert_error(server.post("/v1/internal/decode", {"tokens": tokens}), 400, None, "tokens")
    assert str(tokens[-1]) in message
    assert_alive(server)


def test_health(server: RunningServer) -> None:
    assert server.get("/health") == {"status": "ok"}
    wait_until(lambda: server.running == 0)
    health = server.get("/v1/internal/health")
    assert health == {"status": "ok", "running": 0, "waiting": 0, "models": {MODEL: "loaded"}}


def test_model_info(server: RunningServer) -> None:
    info = server.get("/v1/internal/model/info")
    assert (info["model_name"], info["lora_names"], info["loader"]) == (MODEL, [], "llama.cpp")
    assert (info["ctx_size"], info["n_vocab"]) == (2048, 49152)
    assert "<|im_start|>" in info["chat_template"]
    assert info["args"]["parallel"] == 4
    assert "path" not in info["args"]


def test_errors_carry_a_detail(server: RunningServer) -> None:
    for response in (
        server.post("/v1/internal/encode", {}),
        httpx.get(f"{server.url}/v1/internal/nope", timeout=10),
        server.post("/v1/internal/decode", {"tokens": [10**6]}),
        httpx.get(f"{server.url}/v1/internal/encode", timeout=10),
    ):
        assert response.json()["detail"] == response.json()["error"]["message"]


def test_the_error_of_too_large_a_body_carries_a_detail(server: RunningServer) -> None:
    response = httpx.post(f"{server.url}/v1/internal/encode", content=b"x" * (17 * 2**20), timeout=LIMIT)
    assert response.json().get("detail") == response.json()["error"]["message"]


@pytest.mark.parametrize("content", [b"", b"null", b"{}", b'{"id": null}', b'{"id": "cmpl-nobody"}'])
def test_stopping_when_nothing_runs_is_ok(server: RunningServer, content: bytes) -> None:
    response = httpx.post(f"{server.url}/v1/internal/stop-generation", content=content, timeout=10)
    assert (response.status_code, response.text) == (200, '"OK"')


def test_stopping_ends_everything_with_the_text_so_far(server: RunningServer) -> None:
    wait_until(lambda: server.running == 0)
    with ExitStack() as stack, ThreadPoolExecutor(2) as threads:
        streams = [stack.enter_context(streamed(server, COMPLETIONS, ENDLESS)) for _ in range(2)]
        starts = [next(stream) for stream in streams]
        whole = threads.submit(server.post, COMPLETIONS, ENDLESS)
        waiting = threads.submit(server.post, COMPLETIONS, {**ENDLESS, "n": 4})
        wait_until(lambda: server.running == 7)
        assert server.post("/v1/internal/stop-generation", None).json() == "OK"
        for start, stream in zip(starts, streams, strict=True):
            *chunks, done = stream
            assert done == "[DONE]"
            assert start["choices"][0]["text"]
            assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        assert whole.result().json()["choices"][0]["finish_reason"] == "stop"
        assert [choice["finish_reason"] for choice in waiting.result().json()["choices"]] == ["stop"] * 4
    wait_until(lambda: server.running == 0, 2)
    assert_alive(server)


def test_stopping_one_leaves_the_others(server: RunningServer) -> None:
    wait_until(lambda: server.running == 0)
    with streamed(server, COMPLETIONS, ENDLESS) as one, streamed(server, COMPLETIONS, ENDLESS) as other:
        first = next(one)
        next(other)
        assert server.post("/v1/internal/stop-generation", {"id": first["id"]}).json() == "OK"
        *_, last, done = one
        assert (last["choices"][0]["finish_reason"], done) == ("stop", "[DONE]")
        assert server.running == 1
        assert next(other)["choices"][0]["finish_reason"] is None
    wait_until(lambda: server.running == 0, 2)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_client_that_leaves_a_stream_frees_its_sequence(server: RunningServer, path: str) -> None:
    wait_until(lambda: server.running == 0)
    body = {**ENDLESS, "messages": [{"role": "user", "content": "Tell me a story."}], "n": 2}
    with streamed(server, path, body) as stream:
        next(stream)
        wait_until(lambda: server.running == 2)
    wait_until(lambda: server.running == 0, 2)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_sequence(server: RunningServer, path: str, stream: bool) -> None:
    wait_until(lambda: server.running == 0)
    body = {**ENDLESS, "messages": [{"role": "user", "content": "Tell me a story."}], "n": 6, "stream": stream}
    with unanswered(server, path, body):
        wait_until(lambda: server.running == 6)
    wait_until(lambda: server.running == 0, 2)
    assert_alive(server)


def test_a_client_that_hangs_up_during_a_long_prompt_frees_its_sequence(server: RunningServer) -> None:
    wait_until(lambda: server.running == 0)
    with unanswered(server, COMPLETIONS, {"prompt": "many words " * 900}):
        wait_until(lambda: server.running == 1)
    wait_until(lambda: server.running == 0, 3)


def test_a_long_text_to_count_does_not_hold_up_others(server: RunningServer) -> None:
    """Tokenising megabytes takes seconds; what runs must go on, and be stopped, meanwhile."""

    def count() -> float:
        begin = time.monotonic()
        assert length_of(server, "x" * 1_000_000) > 0
        return time.monotonic() - begin

    with ThreadPoolExecutor(2) as threads:
        running = threads.submit(server.post, "/v1/completions", {"prompt": "Once", "max_tokens": 2000, "seed": 1})
        wait_until(lambda: server.running == 1)
        counting = threads.submit(count)
        wait_until(lambda: counting.running())
        assert server.post("/v1/internal/stop-generation", {}).json() == "OK"
        assert running.result().json()["choices"][0]["finish_reason"] == "stop"
        assert not counting.done()
        assert counting.result() > 0


def test_a_text_that_is_too_long_to_tokenise_is_refused(server: RunningServer) -> None:
    for path in ("encode", "token-count"):
        answer = server.post(f"/v1/internal/{path}", {"text": "x" * 1_100_000})
        assert answer.status_code == 400
        assert "1048576" in answer.json()["error"]["message"]
    answer = server.post("/v1/internal/decode", {"tokens": [1] * 300_000})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tokens"


def test_a_long_penalty_range_costs_no_memory(server: RunningServer) -> None:
    """The window can't be longer than the context, whatever the request says."""
    status = Path(f"/proc/{server.worker_pid()}/status")
    if not status.exists():
        pytest.skip("needs /proc")

    def peak() -> int:
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) // 1024

    assert_alive(server)
    (status.parent / "clear_refs").write_text("5")  # the peak starts anew
    before = peak()
    body = {**TINY, "repetition_penalty": 1.1, "repetition_penalty_range": 200_000_000}
    assert server.post(COMPLETIONS, body).status_code == 200
    assert peak() - before < 100, "MiB more"


def test_without_a_model(empty_server: RunningServer) -> None:
    assert empty_server.get("/health") == {"status": "ok"}
    assert empty_server.get("/v1/models") == {"object": "list", "data": []}
    info = {"model_name": "None", "lora_names": [], "loader": None}
    assert empty_server.get("/v1/internal/model/info") == info
    assert empty_server.get("/v1/internal/health") == {"status": "ok", "running": 0, "waiting": 0, "models": {}}
    assert empty_server.post("/v1/internal/stop-generation", None).json() == "OK"
    for path, body in (
        (COMPLETIONS, TINY),
        (COMPLETIONS, {**TINY, "stream": True}),
        (CHAT, {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/internal/encode", {"text": "x"}),
        ("/v1/internal/decode", {"tokens": [1]}),
        ("/v1/internal/token-count", {"text": "x"}),
    ):
        assert_error(empty_server.post(path, body), 503, "model_not_loaded")
