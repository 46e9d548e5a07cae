"""What clients learn of the models, and the small endpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from api_helpers import CHAT, COMPLETIONS, MODEL, TINY, assert_error
from model_helpers import write_registry
from rank_model import RankModel
from running_server import RunningServer


def test_the_sdk_lists_and_retrieves(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    assert client.models.retrieve("org/starter").id == MODEL


def test_a_model_has_what_clients_look_for(server: RunningServer) -> None:
    (model,) = server.get("/v1/models")["data"]
    assert server.get(f"/v1/models/{MODEL}") == model
    assert (model["id"], model["object"], model["owned_by"]) == (MODEL, "model", "llamaserve")
    assert model["created"] > 1_700_000_000
    assert model["aliases"] == ["org/starter", "starter"]
    assert model["context_length"] == model["max_model_len"] == model["max_context_length"] == 2048
    assert model["meta"]["n_ctx"] == 2048
    assert model["meta"]["n_ctx_train"] == 8192
    assert 130e6 < model["meta"]["n_params"] < 140e6
    assert model["meta"]["size"] > 90e6
    assert model["architecture"] == {"input_modalities": ["text"], "output_modalities": ["text"]}
    offered = {name for name, value in model["capabilities"].items() if value}
    assert offered == {"completion", "chat", "tools"}
    assert {"tools", "vision", "reasoning", "fim", "embeddings"} < set(model["capabilities"])
    assert model["status"] == {"value": "loaded"}


def test_models_for_other_tasks_offer_what_they_are_for(
    embedding_model: Path, starter_model: Path, tmp_path: Path
) -> None:
    RankModel().write(tmp_path / "ranker.gguf")
    models: dict[str, Path | str] = {
        "minilm": f"source: 'file:{embedding_model}'",
        "ranker": f"source: 'file:{tmp_path}/ranker.gguf'",
        "headless": f"source: 'file:{embedding_model}', task: rerank",
        "judge": f"source: 'file:{starter_model}', task: moderation",
        "embedder": f"source: 'file:{starter_model}', task: embedding, context: 1024",
        "ears": f"source: 'file:{starter_model}', task: transcription",
    }
    with RunningServer("serve", "--models-file", str(write_registry(tmp_path / "models.yaml", models, ""))) as server:
        found = {model["id"]: model for model in server.get("/v1/models")["data"]}
        assert server.get("/v1/models?loaded=true")["data"] == []
    offered = {
        name: {what for what, offers in model["capabilities"].items() if offers} for name, model in found.items()
    }
    assert offered["minilm"] == offered["embedder"] == {"embeddings", "rerank"}
    assert offered["ranker"] == {"rerank"}
    assert {"completion", "chat", "moderation"} <= offered["judge"]
    assert offered["judge"].isdisjoint({"embeddings", "rerank"})
    assert offered["ears"] == set()
    minilm = found["minilm"]
    assert minilm["context_length"] == minilm["meta"]["n_ctx"] == minilm["meta"]["n_ctx_train"] == 512
    assert (minilm["meta"]["n_embd"], minilm["meta"]["n_vocab"]) == (384, 30522)
    assert (minilm["meta"]["architecture"], minilm["meta"]["quantization"]) == ("bert", "F16")
    assert found["embedder"]["context_length"] == 1024
    assert found["ranker"]["context_length"] == 96


@pytest.mark.parametrize("name", ["nope", "org/nope", "smollm2-135m/x", "\0", "a" * 5000, "%ff"])
def test_an_unknown_model_is_not_found(server: RunningServer, name: str) -> None:
    path = "".join(f"%{byte:02x}" for byte in name.encode())
    response = httpx.get(f"{server.url}/v1/models/{path}", timeout=10)
    message = assert_error(response, 404, "model_not_found", "model")
    assert MODEL in message


@pytest.mark.parametrize("name", ["nope", "", "SMOLLM2-135M", "gpt-4o", "\0", "smollm2-135m ", "名"])
def test_no_other_model_answers_for_an_unknown_one(server: RunningServer, name: str) -> None:
    bodies: list[tuple[str, dict[str, Any]]] = [
        (COMPLETIONS, TINY),
        (COMPLETIONS, {**TINY, "stream": True}),
        (CHAT, {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/internal/encode", {"text": "x"}),
        ("/v1/internal/token-count", {"text": "x"}),
        ("/v1/internal/decode", {"tokens": [1]}),
    ]
    for path, body in bodies:
        assert_error(server.post(path, {**body, "model": name}), 404, "model_not_found", "model")


@pytest.mark.parametrize("model", [None, MODEL, "starter", "org/starter"])
def test_a_model_may_be_named_in_several_ways(server: RunningServer, model: str | None) -> None:
    assert server.post(COMPLETIONS, {**TINY, "model": model}).json()["model"] == MODEL


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/org/starter", "/health", "/v1/internal/health", "/v1/internal/model/info"]
)
def test_a_trailing_slash_changes_nothing(server: RunningServer, path: str) -> None:
    plain = httpx.get(server.url + path, timeout=10)
    slashed = httpx.get(f"{server.url}{path}/", timeout=10)
    assert (slashed.status_code, slashed.json()) == (200, plain.json())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, TINY),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}),
        ("/v1/internal/encode", {"text": "x"}),
        ("/v1/internal/decode", {"tokens": [1]}),
        ("/v1/internal/token-count", {"text": "x"}),
        ("/v1/internal/stop-generation", {}),
    ],
)
def test_a_trailing_slash_is_taken_by_posts(server: RunningServer, path: str, body: dict[str, Any]) -> None:
    assert server.post(f"{path}/", body).status_code == 200


def test_the_api_describes_itself(server: RunningServer) -> None:
    paths = server.get("/openapi.json")["paths"]
    assert {COMPLETIONS, CHAT, "/v1/models", "/health", "/v1/internal/encode"} <= set(paths)
    assert httpx.get(f"{server.url}/docs", timeout=10).status_code == 200


def test_a_web_page_may_call(server: RunningServer) -> None:
    headers = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
    asked = {**headers, "Access-Control-Request-Headers": "authorization,content-type"}
    preflight = httpx.options(server.url + CHAT, headers=asked, timeout=10)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == headers["Origin"]
    assert "access-control-allow-credentials" not in preflight.headers
    error = httpx.get(f"{server.url}/v1/models/nope", headers=headers, timeout=10)
    assert error.headers["access-control-allow-origin"] == headers["Origin"]
