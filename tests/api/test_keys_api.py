"""Keys on the wire: what answers without one, what needs an admin's, and where a key may stand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from api_helpers import CHAT, COMPLETIONS, TINY, assert_error
from fastapi.routing import APIRoute
from running_server import RunningServer, wait_until
from test_access import ADMINS, routes

from llamaserve.keys.key_file import create_key, revoke_key
from llamaserve.keys.keyring import Limits

API, ADMIN = "sk-api-key-for-tests", "sk-admin-key-for-tests"
OPEN = {"GET /health", "GET /v1/internal/health", "HEAD /health", "HEAD /v1/internal/health"}


@pytest.fixture(scope="module")
def locked_server(starter_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with an ordinary and an admin key."""
    models = tmp_path_factory.mktemp("locked") / "models.yaml"
    models.write_text(f"defaults: {{context: 1024}}\nmodels: {{smollm2-135m: {{source: 'file:{starter_model}'}}}}\n")
    environment = {"LLAMASERVE_API_KEY": API, "LLAMASERVE_ADMIN_KEY": ADMIN}
    with RunningServer("serve", "smollm2-135m", "--models-file", str(models), environment=environment) as running:
        yield running


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def every_request() -> list[tuple[str, str]]:
    """Return a method and a path for each route there is, the framework's own included, and for some that are none."""
    found = [
        (method, re.sub(r"{.*?}", "x", route.path))
        for route in routes()
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    ]
    others = ["/docs", "/openapi.json", "/redoc", "/docs/oauth2-redirect", "/", "/nothing", "/v1", "/v1/../v1/models"]
    others += ["/v1/models/", "//v1/models", "/health/x", "/health/../v1/models", "/health%2f..%2fv1/models", "/HEALTH"]
    others += ["/v1/images/files/", "/v1/images/files/../../models", "/v1/internal/health/../model/info"]
    return [*found, *(("GET", path) for path in others), ("POST", "/health"), ("DELETE", "/v1/models/x")]


@pytest.mark.parametrize("headers", [{}, bearer("wrong"), {"x-api-key": API[:-1]}, {"authorization": f"Basic {API}"}])
def test_nothing_but_health_answers_without_a_key(locked_server: RunningServer, headers: dict[str, str]) -> None:
    with httpx.Client(timeout=30) as client:
        for method, path in every_request():
            answer = client.request(method, locked_server.url + path, headers=headers)
            if f"{method} {path}" in OPEN:
                assert (answer.status_code, answer.text in ("", '{"status":"ok"}')) == (200, True), path
                continue
            assert answer.status_code == 401, f"{method} {path}"
            if method != "HEAD":
                assert_error(answer, 401, "invalid_api_key")
    assert locked_server.get("/v1/internal/health") == {"status": "ok"}


def test_a_refused_request_says_how_a_key_is_sent(locked_server: RunningServer) -> None:
    answer = httpx.post(locked_server.url + CHAT, json={"messages": []})
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "x-api-key" in answer.json()["error"]["message"]
    internal = httpx.get(locked_server.url + "/v1/internal/model/info")
    assert internal.json()["detail"] == internal.json()["error"]["message"]


@pytest.mark.parametrize(
    "headers",
    [
        *(bearer(API), bearer(ADMIN), {"authorization": f"bearer {API}"}, {"authorization": f"BEARER   {API}"}),
        *({"x-api-key": API}, {"api-key": API}, {**bearer("none"), "x-api-key": API}, {**bearer(API), "api-key": "x"}),
    ],
)
def test_a_key_may_stand_where_clients_put_it(locked_server: RunningServer, headers: dict[str, str]) -> None:
    answer = httpx.post(locked_server.url + COMPLETIONS, json=TINY, headers=headers, timeout=60)
    assert answer.status_code == 200
    health = httpx.get(locked_server.url + "/v1/internal/health", headers=headers).json()
    assert health["models"] == {"smollm2-135m": "loaded"}


def test_only_some_of_many_keys_in_a_request_are_looked_at(locked_server: RunningServer) -> None:
    for guesses, status in ((3, 200), (4, 401), (500, 401)):
        headers = [*([("api-key", "guess")] * guesses), ("authorization", f"Bearer {API}")]
        assert httpx.get(locked_server.url + "/v1/models", headers=headers).status_code == status


def test_what_changes_the_server_needs_an_admin_key(locked_server: RunningServer) -> None:
    for each in sorted(ADMINS - {"GET /v1/internal/events"}):
        method, path = each.split()
        answer = httpx.request(method, locked_server.url + path, headers=bearer(API), json=[] if "lora" in path else {})
        assert_error(answer, 403, "admin_key_required")
    assert httpx.get(locked_server.url + "/v1/internal/events", headers=bearer(API)).status_code == 403
    listed = httpx.get(locked_server.url + "/v1/internal/model/list", headers=bearer(ADMIN))
    assert listed.json() == {"model_names": ["smollm2-135m"]}


def test_the_openai_sdk_knows_what_is_wrong(locked_server: RunningServer) -> None:
    base = locked_server.url + "/v1"
    body: dict[str, Any] = {"model": "smollm2-135m", "max_tokens": 2, "messages": [{"role": "user", "content": "Hi"}]}
    with openai.OpenAI(base_url=base, api_key="none", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.chat.completions.create(**body)
        with pytest.raises(openai.AuthenticationError):
            list(stranger.chat.completions.create(**body, stream=True))
    with openai.OpenAI(base_url=base, api_key=API, max_retries=0) as client:
        assert client.chat.completions.create(**body).choices
        assert list(client.chat.completions.create(**body, stream=True))


def test_a_large_body_of_a_stranger_is_refused_as_well(locked_server: RunningServer) -> None:
    answer = httpx.post(locked_server.url + COMPLETIONS, content=b"x" * 900_000, timeout=30)
    assert_error(answer, 401, "invalid_api_key")


def test_keys_are_in_no_log(locked_server: RunningServer) -> None:
    httpx.get(locked_server.url + "/v1/models", headers=bearer(API))
    assert not any(API in line or ADMIN in line for line in locked_server.lines)


def test_web_pages_of_all_origins_may_call_if_they_know_a_key(locked_server: RunningServer) -> None:
    page = {"origin": "https://chat.example"}
    refused = httpx.get(locked_server.url + "/v1/models", headers=page)
    assert_error(refused, 401, "invalid_api_key")
    assert refused.headers["access-control-allow-origin"] == "https://chat.example"
    answer = httpx.get(locked_server.url + "/v1/models", headers=page | bearer(API))
    assert answer.status_code == 200
    assert "access-control-allow-credentials" not in answer.headers


def test_the_only_key_is_the_admins(tmp_path: Path) -> None:
    """As with text-generation-webui."""
    (tmp_path / "models.yaml").write_text("models: {}\n")
    flags = ("--models-file", str(tmp_path / "models.yaml"), "--api-key", API)
    with RunningServer("serve", *flags) as running:
        answer = httpx.get(running.url + "/v1/internal/model/list", headers=bearer(API))
        assert answer.json() == {"model_names": []}


def test_keys_that_are_made_and_revoked_count_at_once(tmp_path: Path) -> None:
    (tmp_path / "models.yaml").write_text("models: {}\n")
    state = tmp_path / "state"
    environment = {"LLAMASERVE_STATE_DIR": str(state)}
    with RunningServer("serve", "--models-file", str(tmp_path / "models.yaml"), environment=environment) as running:

        def status(key: str = "") -> int:
            return httpx.get(running.url + "/v1/models", headers=bearer(key) if key else {}).status_code

        assert status() == 200
        laptop = create_key(state / "keys.yaml", "laptop", Limits(), admin=False)
        wait_until(lambda: status() == 401)
        assert status(laptop) == 200
        create_key(state / "keys.yaml", "phone", Limits(), admin=False)
        revoke_key(state / "keys.yaml", "laptop")
        wait_until(lambda: status(laptop) == 401)
        assert httpx.get(running.url + "/v1/internal/model/list", headers=bearer(laptop)).status_code == 401
