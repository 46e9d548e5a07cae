"""Requests that can't be right: each gets a 4xx in OpenAI's shape, and the server goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from api_helpers import CHAT, COMPLETIONS, LIMIT, TINY, assert_alive, assert_error, is_error
from chat_helpers import PROMPT
from child_processes import renderers
from hypothesis import HealthCheck, given, settings, strategies as st
from running_server import RunningServer

from llamaserve.api.chat_options import ChatRequest
from llamaserve.api.fields import names_of
from llamaserve.api.options import GenerationOptions

HELLO = [{"role": "user", "content": "Hello"}]
MEBIBYTE = 2**20

NUMBERS = {
    "max_tokens": (-2, 2**63, 1.5),
    "max_completion_tokens": (-2, 2**63, 1.5),
    "n": (-1, 0, 129, 10**9, 1.5),
    "seed": (2**63, -(2**63), 0.5),
    "temperature": (-0.1, 101, -1e300, 1e308),
    "dynatemp_low": (-0.1, 101),
    "dynatemp_exponent": (-0.1, 101),
    "smoothing_factor": (-0.1, 101),
    "top_p": (-0.1, 1.1),
    "top_k": (-2, 2**31, 0.5),
    "min_p": (-0.1, 1.1),
    "typ_p": (-0.1, 1.1),
    "tfs": (-0.1, 1.1),
    "top_a": (-0.1, 101),
    "top_n_sigma": (-1.1, 1e7),
    "epsilon_cutoff": (-1, 10_001),
    "eta_cutoff": (-1, 10_001),
    "xtc_probability": (-0.1, 1.1),
    "xtc_threshold": (-0.1, 1.1),
    "mirostat": (-1, 3, 0.5),
    "mirostat_tau": (-0.1, 101),
    "mirostat_eta": (-0.1, 11),
    "adaptive_target": (-1.1, 1.1),
    "adaptive_decay": (-0.1, 1.1),
    "repetition_penalty": (0, -1, 101),
    "repeat_penalty": (0, -1, 101),
    "repetition_penalty_range": (-2, 2**31, 0.5),
    "repeat_last_n": (-2, 2**31, 0.5),
    "encoder_repetition_penalty": (0, 101),
    "no_repeat_ngram_size": (-1, 2**31, 0.5),
    "dry_multiplier": (-0.1, 1001),
    "dry_base": (0.9, 101),
    "dry_allowed_length": (0, 2**31, 0.5),
    "dry_penalty_last_n": (-2, 2**31, 0.5),
    "min_length": (-1, 2**31, 0.5),
    "frequency_penalty": (-101, 101),
    "presence_penalty": (-101, 101),
    "truncation_length": (-1, 2**31, 0.5),
    "max_tokens_second": (-1, 2**31, 0.5),
    "time_limit": (0, -1, 2**31),
}
OUT_OF_RANGE = [(name, value) for name, values in NUMBERS.items() for value in values]
WRONG = ("x", [], {}, [1], {"a": 1}, "NaN", "1e400", "\0")
WRONG_TYPES = [
    *((name, value) for name in NUMBERS for value in WRONG),
    *((name, value) for name in ("stream", "echo") for value in ("x", [], {}, 7, -1)),
    *(("stop", value) for value in (5, {}, [5], [None], [["x"]], True, ["x"] * 1025, "x" * 65537)),
    *(("stream_options", value) for value in ("x", [], 5, {"include_usage": "x"}, {"include_usage": []})),
    *(("sampler_priority", value) for value in (5, {}, [5], ["nothing"], "top_k,nothing", "kz")),
    *(("custom_token_bans", value) for value in (5, {}, ["x"], "1,x", [1.5], [-1], "49152", [2**31])),
    *(("dry_sequence_breakers", value) for value in (5, {}, [5], '"a', "a", "5", [""], ["x" * 41], ["x"] * 33, ["\0"])),
    *((name, value) for name in ("preset", "preset_mode") for value in (5, [], {}, "nothing", "../simple-1", "\0")),
    *((name, value) for name in ("do_sample", "ban_eos_token", "strict") for value in ("x", [], {}, 7)),
    *(("logit_bias", value) for value in ([[1]], [["a", 1]], [[1, 2, 3]], [[49152, False]], [[1, "x"]])),
    *(("logit_bias", value) for value in ({"1": True}, {"1": "ban"}, [[1, True]], [[1, 90], [1, 90]])),
    ("dry_sequence_breakers", "[" * 100_000),
    *((name, 1e-40) for name in ("repetition_penalty", "repeat_penalty", "encoder_repetition_penalty")),
    *(("model", value) for value in (5, [], {}, True, "x" * 513)),
    *(("logit_bias", value) for value in ("x", [5], 5, {"x": 1}, {"1": "x"}, {"1": None}, {"1": 101}, {"1.5": 1})),
    *(("logit_bias", value) for value in ({"-1": 1}, {"49152": 1}, {"2147483648": 1}, {"9" * 5000: 1}, {"": 1})),
]
PROMPTS = [
    *(None, 5, {}, True, 1.5, [], "", [""], [[]], [[], "x"], [1.5], [None], ["x", None], [1, "x"], [[["x"]]], [[1.5]]),
    *([49152], [-1], [2**31], [10**30], [[1], [49152]], [True], ["x"] * 129, [[1]] * 129, {"text": "x"}),
]
MESSAGES = [
    *(None, "x", {}, 5, [], [5], [None], ["x"], [[]], [{}], [{"role": "user"}], [{"content": "x"}]),
    *([{"role": role, "content": "x"}] for role in ("", "USER", "nobody", 5, None, [], {}, "\0")),
    *([{"role": "user", "content": content}] for content in (5, True, {}, [5], [{}], [{"type": "text"}])),
    *([{"role": "user", "content": [part]}] for part in ({"type": "text", "text": 5}, {"type": 5}, {"text": "x"}, [])),
    [*HELLO, {"role": "user", "content": "x", "name": 5}],
]


@pytest.fixture(scope="module", autouse=True)
def _alive_afterwards(server: RunningServer) -> Iterator[None]:
    pid = server.worker_pid()
    yield
    assert_alive(server)
    assert server.worker_pid() == pid, "the child was replaced"


def send(server: RunningServer, path: str, content: bytes, **headers: str) -> httpx.Response:
    return httpx.post(server.url + path, content=content, headers=headers, timeout=LIMIT, verify=False)


def send_json(server: RunningServer, path: str, body: Any) -> httpx.Response:
    """Send JSON that httpx refuses to write: NaN, half surrogate pairs."""
    return send(server, path, json.dumps(body).encode())


@pytest.mark.parametrize(("field", "value"), OUT_OF_RANGE)
def test_numbers_out_of_range(server: RunningServer, field: str, value: float) -> None:
    message = assert_error(send_json(server, COMPLETIONS, {"prompt": "x", field: value}), 400, None, field)
    assert field in message
    assert_error(send_json(server, CHAT, {"messages": HELLO, "stream": True, field: value}), 400, None, field)


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("field", [*sorted(NUMBERS), "logprobs"])
def test_true_and_false_are_no_numbers(server: RunningServer, field: str, value: bool) -> None:
    assert "number" in assert_error(server.post(COMPLETIONS, {**TINY, field: value}), 400, None, field)


def test_whole_numbers_may_be_written_with_a_point(server: RunningServer) -> None:
    assert server.post(COMPLETIONS, {**TINY, "max_tokens": 2.0, "seed": 3.0}).json()["seed"] == 3
    assert server.post("/v1/internal/decode", {"tokens": [19556.0, 905]}).json() == {"text": "Hello world"}
    for token in (True, "905", 1.5):
        assert is_error(server.post("/v1/internal/decode", {"tokens": [token]}))


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_message_has_a_token(server: RunningServer, field: str) -> None:
    assert_error(server.post(CHAT, {"messages": HELLO, field: 0}), 400, None, field)


@pytest.mark.parametrize(("field", "value"), WRONG_TYPES)
def test_wrong_types(server: RunningServer, field: str, value: object) -> None:
    response = send_json(server, COMPLETIONS, {**TINY, field: value})
    assert is_error(response)
    error = response.json()["error"]
    assert field in error["message"] or error["param"] == field


@pytest.mark.parametrize("field", sorted(NUMBERS))
@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1" + "0" * 400, "9" * 5000])
def test_numbers_that_are_no_numbers(server: RunningServer, field: str, literal: str) -> None:
    response = send(server, COMPLETIONS, f'{{"prompt": "x", "max_tokens": 1, "{field}": {literal}}}'.encode())
    assert_error(response, 400, None, None if literal == "9" * 5000 else field)


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: repr(prompt)[:30])
def test_bad_prompts(server: RunningServer, prompt: object) -> None:
    for extra in ({}, {"stream": True}, {"echo": True}):
        assert is_error(send_json(server, COMPLETIONS, {**TINY, **extra, "prompt": prompt}))


@pytest.mark.parametrize("messages", MESSAGES, ids=lambda messages: repr(messages)[:60])
def test_bad_messages(server: RunningServer, messages: object) -> None:
    for stream in (False, True):
        response = send_json(server, CHAT, {"messages": messages, "max_tokens": 1, "stream": stream})
        assert is_error(response)
        assert response.json()["error"]["param"].startswith("messages")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"prompt": "a\ud800b"}, "prompt"),
        (COMPLETIONS, {"prompt": ["x", "\udfff"]}, "prompt"),
        (COMPLETIONS, {"prompt": "x", "stop": "\ud800"}, "stop"),
        (COMPLETIONS, {"prompt": "x", "stop": ["x", "\ud800"]}, "stop"),
        (COMPLETIONS, {"prompt": "x", "model": "\ud800"}, "model"),
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "\ud800", "content": "x"}]}, "messages[0].role"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]}, None),
        ("/v1/internal/encode", {"text": "\ud800"}, "text"),
    ],
)
def test_half_a_surrogate_pair(server: RunningServer, path: str, body: Any, param: str | None) -> None:
    response = send_json(server, path, body)
    assert is_error(response)
    if param:
        assert response.json()["error"]["param"] == param
        assert "JSON object" not in response.json()["error"]["message"]


@pytest.mark.parametrize("key", ["\ud800", "\0", "", "x" * 100_000, "é", "a\r\nb: c", "__class__", "model_config"])
def test_odd_names_of_unknown_fields(server: RunningServer, key: str) -> None:
    for body in ({**TINY, key: 1}, {**TINY, "logit_bias": {key: 1}}):
        response = send_json(server, COMPLETIONS, body)
        assert response.status_code == 200 or is_error(response)
    message = {"role": "user", "content": "x", key: 1}
    response = send_json(server, CHAT, {"messages": [message], "max_tokens": 1})
    assert response.status_code == 200 or is_error(response)


def test_nul_characters_are_text(server: RunningServer) -> None:
    response = server.post(COMPLETIONS, {"prompt": "a\0b", "max_tokens": 2, "stop": ["\0"], "echo": True})
    assert response.json()["choices"][0]["text"].startswith("a\0b")
    assert response.json()["usage"]["prompt_tokens"] == 3
    assert server.post(CHAT, {"messages": [{"role": "user", "content": "a\0b"}], "max_tokens": 1}).status_code == 200


PATHS = (COMPLETIONS, CHAT, "/v1/internal/encode", "/v1/internal/decode", "/v1/internal/token-count")
NO_OBJECTS = [
    b"",
    b" ",
    b"null",
    b"[]",
    b"5",
    b'"x"',
    b"true",
    b"{",
    b'{"prompt": "x"',
    b"{'prompt': 'x'}",
    b"{}",
    b"[{}]",
]
NO_JSON = [b"\xff\xfe\x00", b'{"prompt": "\xff"}', b"\x00" * 10, b"prompt=x", b"\x1f\x8b\x08", b'{"prompt": "x"}}']


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("content", [*NO_OBJECTS, *NO_JSON])
def test_bodies_that_are_no_json_object(server: RunningServer, path: str, content: bytes) -> None:
    assert is_error(send(server, path, content))
    assert is_error(send(server, path, content, **{"content-type": "application/json"}))


@pytest.mark.parametrize("content", [b"{", b'{"prompt": "x"', b"nope"])
def test_the_place_in_broken_json_is_no_parameter(server: RunningServer, content: bytes) -> None:
    message = assert_error(send(server, COMPLETIONS, content), 400, None, None)
    assert "not valid JSON" in message


@pytest.mark.parametrize("depth", [500, 2000, 100_000])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deep_nesting(server: RunningServer, path: str, opening: str, depth: int) -> None:
    deep = opening * depth + "1" + ("]" if opening == "[" else "}") * depth
    assert is_error(send(server, path, deep.encode()))
    start = '"messages": 5' if path == CHAT else '"max_tokens": 1'
    for field in ("prompt", "stop", "text", "tokens", "n"):
        response = send(server, path, f'{{{start}, "{field}": {deep}}}'.encode())
        assert is_error(response)


@pytest.mark.parametrize("depth", [500, 900, 2000, 100_000])
@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deep_nesting_in_messages_and_unknown_fields(server: RunningServer, opening: str, depth: int) -> None:
    deep = opening * depth + "1" + ("]" if opening == "[" else "}") * depth
    assert is_error(send(server, CHAT, f'{{"messages": [{{"role": {deep}, "content": "x"}}]}}'.encode()))
    assert is_error(send(server, CHAT, f'{{"messages": [{{"role": "user", "content": {deep}}}]}}'.encode()))
    message = f'{{"role": "user", "content": "x", "name": "x", "zz": {deep}}}'
    for body in (f'"messages": [{message}]', f'"messages": [{{"role": "user", "content": "x"}}], "zz": {deep}'):
        response = send(server, CHAT, f'{{"max_tokens": 1, {body}}}'.encode())
        assert response.status_code == 200 or is_error(response)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/octet-stream"])
def test_json_is_read_whatever_the_content_type(server: RunningServer, kind: str) -> None:
    assert send(server, COMPLETIONS, json.dumps(TINY).encode(), **{"content-type": kind}).status_code == 200


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary=x"])
def test_a_form_is_no_json(server: RunningServer, kind: str) -> None:
    assert is_error(send(server, COMPLETIONS, json.dumps(TINY).encode(), **{"content-type": kind}))


@pytest.mark.parametrize("path", [*PATHS, "/v1/internal/stop-generation", "/v1/nope", "/v1/models"])
def test_a_body_of_50_megabytes(server: RunningServer, path: str) -> None:
    assert_error(send(server, path, b"x" * 50_000_000), 413, "body_too_large")


@pytest.mark.parametrize("path", PATHS)
def test_a_body_of_50_megabytes_in_chunks(server: RunningServer, path: str) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(50):
            yield b"x" * 1_000_000

    response = httpx.post(server.url + path, content=chunks(), timeout=LIMIT)
    assert_error(response, 413, "body_too_large")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "word " * MEBIBYTE}),
        (COMPLETIONS, {"prompt": "x" * 5_000_000, "stream": True}),
        (COMPLETIONS, {"prompt": [1] * 1_000_000}),
        (COMPLETIONS, {"prompt": ["x", "word " * MEBIBYTE]}),
        (CHAT, {"messages": [{"role": "user", "content": "word " * MEBIBYTE}]}),
        (CHAT, {"messages": [{"role": "user", "content": "x"}] * 9_000, "stream": True}),
        (COMPLETIONS, {"prompt": "word " * 3000}),
    ],
    ids=["text", "stream", "tokens", "second", "chat", "messages", "a little"],
)
def test_a_prompt_over_the_context(server: RunningServer, path: str, body: Any) -> None:
    begin = time.monotonic()
    field = "messages" if "messages" in body else "prompt"
    message = assert_error(server.post(path, body), 400, "context_length_exceeded", field)
    assert time.monotonic() - begin < 5
    assert "2048 tokens" in message
    number = int(message.partition("the prompt has ")[2].removeprefix("at least ").split()[0])
    assert number > 2048


def test_more_messages_than_anybody_needs(server: RunningServer) -> None:
    messages = [{"role": "user", "content": "x"}] * 50_000
    for options in ({}, {"truncation": "auto"}, {"stream": True}):
        assert "50000 messages" in assert_error(
            server.post(CHAT, {"messages": messages, **options}), 400, None, "messages"
        )


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/nope", "/v1/chat", "//v1/models", "/v1/engines/x/completions"])
def test_unknown_routes(server: RunningServer, path: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        assert_error(httpx.request(method, server.url + path, timeout=10), 404, None)


@pytest.mark.parametrize("path", [*PATHS, "/v1/models", "/health", "/v1/internal/health", "/v1/models/starter"])
def test_wrong_methods(server: RunningServer, path: str) -> None:
    right = "POST" if path in PATHS else "GET"
    for method in {"GET", "POST", "PUT", "DELETE", "PATCH"} - {right}:
        response = httpx.request(method, server.url + path, timeout=10)
        assert_error(response, 405, None)
        assert right in response.headers["allow"]


def test_wrong_methods_are_told_all_methods_of_a_path(server: RunningServer) -> None:
    allowed = httpx.delete(f"{server.url}/lora-adapters", timeout=10).headers["allow"]
    assert allowed.split(", ") == ["GET", "POST"]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["\ud800", 10**400]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
FIELDS = (
    *NUMBERS,
    "stop",
    "stream",
    "stream_options",
    "logit_bias",
    "model",
    "echo",
    "prompt",
    "user",
    "tools",
)


@given(field=st.sampled_from(FIELDS), value=JSON)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_value_of_any_field_is_answered_or_refused(server: RunningServer, field: str, value: object) -> None:
    body = {"prompt": "x", "logit_bias": {"0": 100}, field: value}  # the end token: every answer ends at once
    if field == "logit_bias":
        body["max_tokens"] = 1
    response = send_json(server, COMPLETIONS, body)
    assert response.status_code == 200 or is_error(response)


@given(messages=JSON | st.lists(st.fixed_dictionaries({"role": st.just("user") | JSON, "content": JSON}), max_size=3))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_messages_are_answered_or_refused(server: RunningServer, messages: object) -> None:
    response = send_json(server, CHAT, {"messages": messages, "max_tokens": 1})
    assert response.status_code == 200 or is_error(response)


CHAT_FIELDS = sorted(
    name
    for field in ChatRequest.model_fields.keys() - GenerationOptions.model_fields.keys() - {"messages"}
    for name in names_of(ChatRequest, field)
)
WORDS = st.sampled_from(["none", "auto", "required", "chat", "chat-instruct", "ChatML", "Assistant", "{{ messages }}"])
TOOLS = st.lists(
    st.fixed_dictionaries(
        {
            "type": st.just("function"),
            "function": st.fixed_dictionaries({"name": st.sampled_from("fg"), "parameters": JSON}),
        }
    )
)


@given(fields=st.dictionaries(st.sampled_from(CHAT_FIELDS), JSON | WORDS | TOOLS, min_size=1, max_size=3))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_values_of_any_chat_fields_are_answered_or_refused(server: RunningServer, fields: dict[str, Any]) -> None:
    for path in (CHAT, PROMPT):
        response = send_json(server, path, {"messages": HELLO, "logit_bias": {"0": 100}, "max_tokens": 2, **fields})
        assert response.status_code == 200 or is_error(response)


# Templates from a request are programs of strangers

FOREVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
BOMBS = {
    "endless": FOREVER,
    "exponential": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a giant power": "{{ 10 ** (10 ** 9) }}",
    "a giant string": "{{ 'x' * 10 ** 10 }}",
    "strings that add up": "{% for a in range(200) %}{{ 'x' * 10 ** 6 }}{% endfor %}",
    "a giant list": "{% set n = namespace(a=[1]) %}{% for i in range(60) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "a giant width": "{{ '%9999999999d' % 1 }}",
    "without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "too deep": f"{{{{ {'(' * 5000}1{')' * 5000} }}}}",
    "too long": "{{ messages }}" * 20_000,
    "what no template may": "{{ messages.__class__.__mro__ }}",
    "no template": "{% if",
}
TEMPLATE_FIELDS: dict[str, dict[str, Any]] = {
    "chat_template": {},
    "instruction_template_str": {"mode": "chat-instruct"},
    "chat_template_str": {"mode": "chat"},
}


@pytest.mark.parametrize(
    ("field", "name"),
    [("chat_template", name) for name in BOMBS]
    + [(field, name) for field in list(TEMPLATE_FIELDS)[1:] for name in ("endless", "a giant string")],
)
def test_a_hostile_template_is_refused_soon_and_costs_little(server: RunningServer, field: str, name: str) -> None:
    body = {"messages": HELLO, "max_tokens": 1, field: BOMBS[name], **TEMPLATE_FIELDS[field]}
    begin = time.monotonic()
    assert_error(server.post(CHAT, body), 400, "chat_template_error", field)
    assert time.monotonic() - begin < 10


def test_what_a_template_refuses_are_the_messages(server: RunningServer) -> None:
    body = {"messages": HELLO, "max_tokens": 1, "chat_template": "{{ raise_exception('No.') }}"}
    assert "No." in assert_error(server.post(CHAT, body), 400, "chat_template_error", "messages")


def test_others_are_not_held_up_by_templates(server: RunningServer) -> None:
    """Not by many at once, nor do these take much memory: not more than two of them run at a time."""
    bodies = [{"messages": HELLO, "chat_template": f"{FOREVER}{number}"} for number in range(4)]
    with ThreadPoolExecutor(len(bodies)) as threads:
        bombs = [threads.submit(server.post, CHAT, body) for body in bodies]
        most, slowest = 0, 0.0
        while not all(bomb.done() for bomb in bombs):
            begin = time.monotonic()
            assert server.post(CHAT, {"messages": HELLO, "max_tokens": 1}).status_code == 200
            slowest = max(slowest, time.monotonic() - begin)
            most = max(most, len(renderers(server.process.pid)))
        assert [bomb.result().status_code for bomb in bombs] == [400] * len(bodies)
    assert slowest < 1.5
    assert 0 < most <= 4  # of both kinds: for templates of models, and of requests
