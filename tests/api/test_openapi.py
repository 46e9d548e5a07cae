"""The OpenAPI document is valid and complete, its examples are right, and answers are what it says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_helpers import ENDLESS, MODEL
from audio_helpers import SPEECH
from fastapi.routing import APIRoute
from fim_model import write_fim_model
from jsonschema import Draft202012Validator
from local_hub import Hub, running_hub, settings_for
from lora_files import random_lora, shapes_of
from openapi_spec_validator import validate
from running_server import RunningServer, wait_until
from tiny_diffusion import image_entry

from llamaserve.api.answers.errors import codes_of
from llamaserve.api.openapi import ROUTES
from llamaserve.app import _RESOURCES, create_app
from llamaserve.engine.params import Footprint
from llamaserve.registry.gguf import read_header
from llamaserve.registry.pool import ModelPool
from llamaserve.registry.spec import load_registry
from llamaserve.settings import Settings

ROOT = Path(__file__).resolve().parent.parent.parent
EVENTS = "text/event-stream"
# Programs that were made from the document call their functions by these names: they stay.
OPERATIONS = {
    *("create_chat_completion", "chat_prompt", "create_completion", "create_fim_completion", "infill"),
    *("create_embeddings", "create_ranking", "create_ranking_rerank", "create_ranking_v1_reranking"),
    *("create_ranking_reranking", "create_ranking_v2", "create_moderation", "create_transcription"),
    *("create_translation", "create_image", "edit_image", "vary_image", "get_image", "list_models", "get_model"),
    *("encode", "decode", "token_count", "logits", "stop_generation", "health", "internal_health", "model_info"),
    *("list_model_names", "load_model", "unload_model", "download_model", "list_downloads", "cancel_download"),
    *("billing_usage", "dashboard_usage", "dashboard_subscription", "metrics", "status"),
    *("delete_model", "list_lora_names", "load_adapters", "unload_adapters", "list_scales", "set_scales", "events"),
}


def _document() -> dict[str, Any]:
    pool = ModelPool(load_registry(ROOT / "models.yaml"), budget=lambda _: Footprint())
    return create_app(Settings(), pool).openapi()


DOCUMENT = _document()
OPERATION = {
    f"{method.upper()} {path}": operation
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
}


def schema_for(schema: Mapping[str, Any]) -> Draft202012Validator:
    return Draft202012Validator({"components": DOCUMENT["components"], **schema})


def data_schema(schema: Mapping[str, Any]) -> Draft202012Validator:
    """Return the schema of the data of a stream's events."""
    data = schema["properties"]["data"]
    return schema_for(next(each for each in data.get("anyOf", [data]) if "contentSchema" in each)["contentSchema"])


def content_of(route: str, status: str) -> dict[str, Any]:
    response = OPERATION[route]["responses"][status]
    if "$ref" in response:
        response = DOCUMENT["components"]["responses"][response["$ref"].rpartition("/")[2]]
    content: dict[str, Any] = response["content"]
    return content


def test_the_document_is_valid() -> None:
    assert DOCUMENT["openapi"].startswith("3.1")
    validate(DOCUMENT)


def test_it_is_json_and_made_once() -> None:
    assert json.loads(json.dumps(DOCUMENT, allow_nan=False)) == DOCUMENT
    pool = ModelPool(load_registry(ROOT / "models.yaml"), budget=lambda _: Footprint())
    app = create_app(Settings(), pool)
    assert app.openapi() is app.openapi()


def test_every_route_is_described_and_nothing_else_is() -> None:
    routes = [route for resource in _RESOURCES for route in resource.router.routes if isinstance(route, APIRoute)]
    paths = {
        f"{method} {route.path.replace(':path', '')}"
        for route in routes
        if route.include_in_schema
        for method in route.methods or ()
    }
    assert set(ROUTES) == set(OPERATION) == paths


def test_operations_have_names_that_stay() -> None:
    assert {operation["operationId"] for operation in OPERATION.values()} == OPERATIONS


def test_tags_are_described() -> None:
    described = {tag["name"] for tag in DOCUMENT["tags"] if tag["description"]}
    assert {tag for operation in OPERATION.values() for tag in operation["tags"]} == described


@pytest.mark.parametrize("route", OPERATION)
def test_a_route_is_complete(route: str) -> None:
    operation = OPERATION[route]
    assert operation["summary"]
    assert operation["description"]
    assert len(operation["tags"]) == 1
    assert "422" not in operation["responses"]
    assert "500" in operation["responses"]
    assert {"400", "413", "429"} <= set(operation["responses"]) or "requestBody" not in operation
    for status in operation["responses"]:
        content = content_of(route, status)
        assert content
        for media_type, body in content.items():
            assert body["schema"] not in ({}, True)
            assert body.get("examples") or media_type.startswith("image/")


@pytest.mark.parametrize("route", OPERATION)
def test_examples_are_right(route: str) -> None:
    operation = OPERATION[route]
    for body in operation.get("requestBody", {"content": {}})["content"].values():
        assert body["examples"]
        for example in body["examples"].values():
            schema_for(body["schema"]).validate(example["value"])
    for status in operation["responses"]:
        for media_type, body in content_of(route, status).items():
            for example in body.get("examples", {}).values():
                schema_for(body["schema"]).validate(example["value"])
                if media_type == EVENTS:
                    data_schema(body["schema"]).validate(json.loads(example["value"]["data"]))


@pytest.mark.parametrize("route", OPERATION)
def test_errors_have_one_shape(route: str) -> None:
    name = "InternalErrorAnswer" if "/v1/internal/" in route else "ErrorAnswer"
    for status in OPERATION[route]["responses"]:
        if status == "200":
            continue
        schema = content_of(route, status)["application/json"]["schema"]
        assert schema["allOf"][0] == {"$ref": f"#/components/schemas/{name}"}
        assert schema["allOf"][1]["properties"]["error"]["properties"]["code"]["enum"] == codes_of(int(status))


def test_answers_have_no_fields_that_are_not_described() -> None:
    answers = [schema for name, schema in DOCUMENT["components"]["schemas"].items() if not name.endswith("Request")]
    closed = [schema for schema in answers if schema.get("additionalProperties") is False]
    assert len(closed) > 60


def test_fields_have_their_other_names() -> None:
    chat = DOCUMENT["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"n_predict", "typ_p", "tfs_z", "repeat_penalty", "samplers", "think", "chat_template"} <= set(chat)
    load = schema_for({"$ref": "#/components/schemas/LoadRequest"})
    assert load.is_valid({"model": "x"})
    assert load.is_valid({"model_name": "x", "model": None})
    assert not load.is_valid({"model": None})
    assert not load.is_valid({})


def test_null_is_not_given() -> None:
    chat = schema_for({"$ref": "#/components/schemas/ChatRequest"})
    messages = [{"role": "user", "content": "Hello"}]
    assert chat.is_valid({"messages": messages, "temperature": None, "n": None, "stop": None, "tools": None})
    assert not chat.is_valid({"messages": None})
    assert not chat.is_valid({"messages": messages, "temperature": "hot"})


def test_bounds_are_exact() -> None:
    seed = DOCUMENT["components"]["schemas"]["ChatRequest"]["properties"]["seed"]["anyOf"][0]
    assert (seed["minimum"], seed["maximum"]) == (-(2**63) + 1, 2**63 - 1)
    assert isinstance(seed["maximum"], int)


# What a real server answers

TOKENS = ("max_tokens", "n_predict", "max_completion_tokens")


@pytest.fixture(scope="module")
def documented_server(
    starter_model: Path,
    embedding_model: Path,
    speech_model: Path,
    multilingual_speech_model: Path,
    image_model: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RunningServer]:
    """A server with a model of each kind under the names that the examples use, a hub and an adapter."""
    folder = tmp_path_factory.mktemp("documented")
    write_fim_model(starter_model, folder / "fim.gguf")
    (folder / "loras").mkdir()
    random_lora(shapes_of(read_header(starter_model).tensors, "attn_q.weight")).write(folder / "loras/style.gguf")
    minilm = "all-minilm-l6-v2"
    models = folder / "models.yaml"
    models.write_text(
        f"defaults: {{context: 1024, parallel: 4, embedding_model: {minilm}, moderation_model: {minilm}, "
        "image_model: tiny, transcription_model: whisper-tiny.en}\n"
        f"models:\n  {MODEL}: {{source: 'file:{starter_model}'}}\n"
        f"  fim: {{source: 'file:{folder / 'fim.gguf'}'}}\n"
        f"  {minilm}: {{source: 'file:{embedding_model}'}}\n"
        f"  whisper-tiny.en: {{source: 'file:{speech_model}'}}\n"
        f"  whisper-base: {{source: 'file:{multilingual_speech_model}'}}\n"
        f"  tiny: {image_entry(image_model, 'steps: 1, size: 64x64')}\n"
        "  qwen3-0.6b: {source: 'hf:o/r:Q8_0'}\n"
        f"aliases: {{starter: {MODEL}, whisper-1: whisper-tiny.en, base: whisper-base}}\n"
    )
    with running_hub(Hub({"m-Q8_0.gguf": starter_model.read_bytes()})) as hub:
        environment = settings_for(hub, folder) | {"LLAMASERVE_LORAS_DIR": str(folder / "loras")}
        with RunningServer("serve", MODEL, "--models-file", str(models), environment=environment) as running:
            yield running


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """What the examples of forms send, by name."""
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (96, 64), "steelblue").save(tmp_path / "room.png")
    mask = image.new("RGBA", (96, 64), "black")
    mask.paste((0, 0, 0, 0), (48, 0, 96, 64))
    mask.save(tmp_path / "mask.png")
    pictures = {name: (tmp_path / name).read_bytes() for name in ("room.png", "mask.png")}
    return pictures | {"speech.flac": SPEECH.read_bytes()}


def check(route: str, response: httpx.Response, status: int = 200) -> None:
    """Check an answer against what the document says of its route."""
    assert response.status_code == status, response.text[:500]
    content = content_of(route, str(status))
    media_type = response.headers["content-type"].partition(";")[0]
    assert media_type in content
    schema = content[media_type]["schema"]
    headers = OPERATION[route]["responses"]["200"].get("headers", {})
    ours = [name for name in response.headers if name.startswith(("x-llamaserve", "x-compute"))]
    assert [name for name in ours if name not in headers] == []
    if media_type == EVENTS:
        check_events(response.text, schema)
    elif media_type == "application/json":
        schema_for(schema).validate(response.json())
    else:
        assert response.content


def check_events(text: str, schema: Mapping[str, Any]) -> None:
    data = re.findall(r"^data: (.*)$", text, re.MULTILINE)
    events = [each for each in data if each != "[DONE]"]
    assert len(events) > 0
    for each in data:
        schema_for(schema).validate({"data": each})
    for each in events:
        data_schema(schema).validate(json.loads(each))
        assert "error" not in json.loads(each)


def send(server: RunningServer, route: str, body: Any, files: Mapping[str, bytes]) -> httpx.Response:
    path = route.removeprefix("POST ")
    if "multipart/form-data" not in OPERATION[route]["requestBody"]["content"]:
        return httpx.post(server.url + path, json=body, timeout=60)
    values = {name: value[0] if isinstance(value, list) else value for name, value in body.items()}
    sent = {name: (value, files[value]) for name, value in values.items() if value in files}
    fields = {name: str(value) for name, value in values.items() if value not in files}
    return httpx.post(server.url + path, data=fields, files=sent, timeout=60)


EXAMPLES = [
    (route, name, example["value"])
    for route, operation in OPERATION.items()
    for body in operation.get("requestBody", {"content": {}})["content"].values()
    for name, example in body["examples"].items()
    if not re.search("/internal/(model|lora)|/lora-adapters", route)
]


@pytest.mark.parametrize(("route", "name", "body"), EXAMPLES, ids=[f"{route}-{name}" for route, name, _ in EXAMPLES])
def test_examples_are_answered_as_described(
    documented_server: RunningServer, files: dict[str, bytes], route: str, name: str, body: dict[str, Any]
) -> None:
    if "infill" in route or "fim" in route:
        body = {**body, "model": "fim"}
    if "/images/" in route and "image" in body:
        body = {**body, "size": "64x64"}
    check(route, send(documented_server, route, body, files))


HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALLING = {"messages": HELLO, "tools": [TOOL], "tool_choice": "required", "max_tokens": 40}
OLD_CALLING = {"messages": HELLO, "functions": [TOOL["function"]], "function_call": {"name": "f"}, "max_tokens": 40}
CHATS: dict[str, Any] = {
    "several": {"messages": HELLO, "n": 2, "max_tokens": 3, "user": "x", "nonsense": 1},
    "log-probabilities": {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "max_tokens": 3},
    "calls": CALLING,
    "an older call": OLD_CALLING,
    "thoughts": {
        "messages": HELLO,
        "chat_template": "{{ messages[0].content }}<think>",
        "max_tokens": 8,
        "reasoning_format": "both",
    },
    "left out": {"messages": HELLO * 400 + HELLO, "truncation": "auto", "max_tokens": 2},
}


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize(
    "streamed", [{}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}]
)
def test_chats_are_answered_as_described(documented_server: RunningServer, name: str, streamed: dict[str, Any]) -> None:
    check(route := "POST /v1/chat/completions", send(documented_server, route, CHATS[name] | streamed, {}))


OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("POST /v1/completions", {"prompt": "x", "echo": True, "logprobs": 2, "max_tokens": 2, "stream": True}),
    ("POST /v1/completions", {"prompt": ["x", "y"], "echo": True, "n": 2, "max_tokens": 2}),
    ("POST /v1/completions", {"prompt": "x " * 2000, "truncation_length": 64, "max_tokens": 2}),
    ("POST /v1/completions", {"model": "fim", "prompt": "x", "suffix": "y", "max_tokens": 2}),
    ("POST /v1/fim/completions", {"model": "fim", "prompt": "x", "suffix": "y", "max_tokens": 2, "stream": True}),
    ("POST /infill", {"model": "fim", "input_prefix": "x", "input_suffix": "y", "n_predict": 0}),
    ("POST /v1/embeddings", {"input": ["word " * 1000, "x"], "truncate": True}),
    ("POST /v1/rerank", {"query": "x", "documents": ["word " * 1000, "y"], "truncate": True, "raw_scores": True}),
    ("POST /rerank", {"query": "x", "texts": ["word " * 1000, "y"], "truncate": True}),
    ("POST /v1/moderations", {"input": ["", "You are disgusting."]}),
    ("POST /v1/internal/logits", {"prompt": "x", "use_samplers": True, "top_k": 3}),
    ("POST /v1/images/generations", {"prompt": "x", "response_format": "data_url", "output_format": "webp"}),
    ("POST /v1/internal/chat-prompt", CHATS["left out"]),
]


@pytest.mark.parametrize(("route", "body"), OTHERS)
def test_other_requests_are_answered_as_described(
    documented_server: RunningServer, route: str, body: dict[str, Any]
) -> None:
    check(route, send(documented_server, route, body, {}))


@pytest.mark.parametrize(
    ("route", "body", "status"),
    [
        ("POST /v1/chat/completions", {"messages": HELLO}, 400),
        ("POST /v1/fim/completions", {"model": "fim", "prompt": "x", "suffix": "y"}, 400),
        ("POST /v1/completions", {"prompt": "x"}, 200),
        ("POST /infill", {"model": "fim", "input_prefix": "x", "input_suffix": "y"}, 200),
    ],
)
def test_schemas_say_where_an_answer_may_have_no_tokens(
    documented_server: RunningServer, route: str, body: dict[str, Any], status: int
) -> None:
    schema = schema_for(OPERATION[route]["requestBody"]["content"]["application/json"]["schema"])
    for name in TOKENS:
        asked = {**body, name: 0}
        assert schema.is_valid(asked) == (status == 200)
        assert schema.is_valid({**body, name: 1})
        assert schema.is_valid({**body, name: -1})
        response = send(documented_server, route, asked, {})
        check(route, response, status)
        if status == 400:
            assert response.json()["error"]["param"] == name


TRANSCRIPTS = [
    {"response_format": "json", "include[]": "logprobs"},
    {"response_format": "verbose_json", "timestamp_granularities[]": "word"},
    {"response_format": "verbose_json", "stream": "true"},
    {"response_format": "text"},
    {"response_format": "srt"},
]


@pytest.mark.parametrize("fields", TRANSCRIPTS)
def test_transcripts_are_as_described(
    documented_server: RunningServer, files: dict[str, bytes], fields: dict[str, str]
) -> None:
    route = "POST /v1/audio/transcriptions"
    check(route, send(documented_server, route, {"file": "speech.flac", **fields}, files))


def test_pictures_under_links_are_as_described(documented_server: RunningServer) -> None:
    route = "POST /v1/images/generations"
    body = {"prompt": "x", "stream": True, "partial_images": 1}
    check(route, send(documented_server, route, body, {}))
    made = send(documented_server, route, {"prompt": "x"}, {}).json()
    check("GET /v1/images/files/{name}", httpx.get(made["data"][0]["url"], timeout=10))


@pytest.mark.parametrize("route", [route for route in OPERATION if route.startswith("GET ") and "{" not in route])
def test_what_can_be_read_is_as_described(documented_server: RunningServer, route: str) -> None:
    url = documented_server.url + route.removeprefix("GET ")
    if not route.endswith("/events"):
        check(route, httpx.get(url, timeout=30))
        return
    with httpx.stream("GET", url, timeout=30) as response:
        line = next(line for line in response.iter_lines() if line.startswith("data: "))
    check_events(line, content_of(route, "200")[EVENTS]["schema"])


def test_a_model_is_as_described(documented_server: RunningServer) -> None:
    for name in (MODEL, "all-minilm-l6-v2", "whisper-1", "tiny"):
        check("GET /v1/models/{model_id}", httpx.get(f"{documented_server.url}/v1/models/{name}", timeout=10))


def latest_download(server: RunningServer) -> str:
    return str(server.get("/v1/internal/model/downloads")["downloads"][0]["state"])


def test_commands_are_answered_as_described(documented_server: RunningServer) -> None:
    """In an order in which they can be followed; at the end all is as before."""
    server = documented_server
    for route, body in [
        ("POST /v1/internal/model/load", {"model_name": MODEL, "verbose": True, "settings": {"x": 1}}),
        ("POST /v1/internal/lora/load", {"lora_names": ["style"]}),
        ("POST /lora-adapters", [{"id": 0, "scale": 0.5}]),
    ]:
        check(route, send(server, route, body, {}))
    for route in ("GET /lora-adapters", "GET /v1/internal/lora/list", "GET /v1/internal/model/info"):
        check(route, httpx.get(server.url + route.removeprefix("GET "), timeout=10))
    download = send(server, route := "POST /v1/internal/model/download", {"model_name": "qwen3-0.6b"}, {})
    check(route, download)
    check(route := "POST /v1/internal/model/download/cancel", send(server, route, {"id": download.json()["id"]}, {}))
    wait_until(lambda: latest_download(server) == "cancelled")
    send(server, "POST /v1/internal/model/download", {"model_name": "qwen3-0.6b"}, {})
    wait_until(lambda: latest_download(server) == "done", 30)
    check("GET /v1/internal/model/downloads", httpx.get(f"{server.url}/v1/internal/model/downloads", timeout=10))
    check(route := "POST /v1/internal/model/delete", send(server, route, {"model_name": "qwen3-0.6b"}, {}))
    for route, body in [
        ("POST /v1/internal/lora/unload", {}),
        ("POST /v1/internal/model/unload", {"model_name": MODEL}),
        ("POST /v1/internal/model/load", {"model_name": MODEL}),
    ]:
        check(route, send(server, route, body, {}))


ERRORS: list[tuple[str, dict[str, Any], int]] = [
    ("POST /v1/chat/completions", {"messages": []}, 400),
    ("POST /v1/chat/completions", {"messages": HELLO, "model": "nobody"}, 404),
    ("POST /v1/chat/completions", {"messages": [{"role": "user", "content": "x " * 5000}]}, 400),
    ("POST /v1/chat/completions", {"messages": HELLO, "chat_template": "{% if"}, 400),
    ("POST /v1/completions", {"prompt": "x", "suffix": "y"}, 501),
    ("POST /v1/completions", {"prompt": ENDLESS["prompt"], "model": "all-minilm-l6-v2"}, 400),
    ("POST /v1/embeddings", {"input": "x" * 20_000_000}, 413),
    ("POST /v1/internal/encode", {"text": 5}, 400),
    ("POST /v1/internal/encode", {"text": "x", "model": "nobody"}, 404),
    ("POST /v1/internal/model/load", {"model_name": MODEL, "args": {"nonsense": 1}}, 400),
]


@pytest.mark.parametrize(("route", "body", "status"), ERRORS, ids=[f"{e[0]}-{e[2]}-{i}" for i, e in enumerate(ERRORS)])
def test_errors_are_as_described(
    documented_server: RunningServer, route: str, body: dict[str, Any], status: int
) -> None:
    check(route, send(documented_server, route, body, {}), status)


def test_a_server_without_models_answers_as_described(empty_server: RunningServer) -> None:
    check(route := "POST /v1/chat/completions", send(empty_server, route, {"messages": HELLO}, {}), 503)
    for route in ("GET /v1/models", "GET /v1/internal/model/info", "GET /v1/internal/health"):
        check(route, httpx.get(empty_server.url + route.removeprefix("GET "), timeout=10))
