"""Requests for other hosts and of web pages that may not call are refused, whatever they ask for."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from api_helpers import assert_error
from hypothesis import given, strategies as st
from running_server import RunningServer

from llamaserve.api.hosts import Hosts, Origins, host_problem, origin_problem

HEALTH, MODELS, UNLOAD = "/health", "/v1/models", "/v1/internal/model/unload"


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST", "localhost.", "localhost:5000", "chat.localhost:5000", "127.0.0.1", "127.0.0.1:80"),
        *("[::1]", "[::1]:5000", "192.168.1.20:5000", "[fe80::1]:5000", "host.docker.internal:5000"),
        *(socket.gethostname(), f"{socket.gethostname().partition('.')[0]}.local:5000"),
    ],
)
def test_names_of_this_machine(host: str) -> None:
    assert Hosts([]).allow(host)


@pytest.mark.parametrize(
    "host",
    [
        *("", "evil", "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "127.0.0.1.nip.io:5000"),
        *(
            "localhost@evil.example",
            "evil.example#localhost",
            "localhost evil",
            "localhost,evil.example",
            "[::1",
            "::1",
        ),
        *("localhost:", "localhost:5000:80", "localhost:99999999", "localhost/evil", "2130706433", "0x7f.1", "[]"),
        *("xlocalhost", ".localhost.evil", "local host", "localhost\t", "l\u043ecalhost", "[::1]evil", "[evil]"),
    ],
)
def test_other_names(host: str) -> None:
    assert not Hosts([]).allow(host)


def test_names_that_are_allowed() -> None:
    hosts = Hosts(["llama.example.com", "*.home.arpa"])
    assert all(map(hosts.allow, ["llama.example.com:443", "LLAMA.example.com", "a.home.arpa", "a.b.home.arpa:5000"]))
    assert not any(
        map(hosts.allow, ["example.com", "xllama.example.com", "home.arpa", "evil-home.arpa", "home.arpa.x"])
    )
    assert Hosts(["*"]).allow("anything.example")
    assert not Hosts(["*"]).allow("no host")


@given(st.text(max_size=30))
def test_whatever_a_header_says_has_an_answer(host: str) -> None:
    assert Hosts([]).allow(host) in (True, False)
    assert Origins(None, lambda: False).allow(host) in (True, False)


@pytest.mark.parametrize("pattern", ["https://example.com", "example.com:80", "*", "*.x.example", "a*b", "*.*", ""])
def test_which_hosts_can_be_allowed(pattern: str) -> None:
    assert (host_problem(pattern) is None) == (pattern in ("*", "*.x.example"))


@pytest.mark.parametrize(
    ("origin", "good"),
    [
        *((each, True) for each in ("*", "null", "https://a.example", "http://localhost:*", "https://*.a.example")),
        *((each, True) for each in ("http://[::1]:8080", "app://obsidian.md", "chrome-extension://*")),
        *((each, False) for each in ("", "a.example", "https://a.example/", "https://a.example/x", "https://a b")),
    ],
)
def test_which_origins_can_be_allowed(origin: str, good: bool) -> None:
    assert (origin_problem(origin) is None) == good


LOCAL = [
    "http://localhost",
    "http://localhost:3000",
    "https://127.0.0.1:8443",
    "http://[::1]:3000",
    "app://obsidian.md",
]
LOCAL += ["http://chat.localhost:8080", "vscode-webview://1a2b", "tauri://localhost", "chrome-extension://abc"]
FOREIGN = ["https://evil.example", "http://localhost.evil.example", "http://127.0.0.1.evil.example", "null", ""]
FOREIGN += [
    "https://localhost@evil.example",
    "http://192.168.1.9",
    "HTTPS://EVIL.example",
    "http://localhost:3000/evil",
]


def test_pages_of_this_machine_may_call_without_a_key_and_all_with_one() -> None:
    without, needed = Origins(None, lambda: False), Origins(None, lambda: True)
    assert [each for each in LOCAL if not without.allow(each)] == []
    assert [each for each in FOREIGN if without.allow(each)] == []
    assert all(needed.allow(each) for each in LOCAL + FOREIGN)


def test_origins_that_are_allowed() -> None:
    origins = Origins(["https://chat.example.com", "http://localhost:*", "https://*.a.example"], lambda: True)
    good = ["https://chat.example.com", "http://localhost:3000", "https://x.a.example", "https://x.y.a.example"]
    bad = ["https://chat.example.com.evil", "http://chat.example.com", "https://chatXexample.com", "http://localhost"]
    bad += [
        "http://localhost:3000.evil",
        "https://a.example",
        "https://evil?.a.example",
        "https://evil/.a.example",
        "null",
    ]
    assert [each for each in good if not origins.allow(each)] == []
    assert [each for each in bad if origins.allow(each)] == []


@pytest.mark.parametrize("path", [HEALTH, MODELS, "/docs", "/nothing", "/v1/internal/model/info"])
def test_requests_for_another_host_are_refused(server: RunningServer, path: str) -> None:
    answer = httpx.get(server.url + path, headers={"host": "evil.example"})
    message = assert_error(answer, 403, "host_not_allowed")
    assert "evil.example" in message
    assert "--allowed-host" in message


def raw(server: RunningServer, head: str) -> str:
    """Send the head of a request as it is, and return the status line."""
    address = httpx.URL(server.url)
    with socket.create_connection((address.host, address.port or 80), timeout=10) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n")
        return connection.recv(65536).split(b"\r\n")[0].decode()


@pytest.mark.parametrize(
    "head",
    [
        "GET /v1/models HTTP/1.1",
        "GET /v1/models HTTP/1.0",
        "GET /v1/models HTTP/1.1\r\nHost:",
        "GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example",
        "GET /v1/models HTTP/1.1\r\nHost: evil.example\r\nX-Forwarded-Host: localhost",
        "GET http://localhost/v1/models HTTP/1.1\r\nHost: evil.example",
        "GET /v1/models HTTP/1.1\r\nHost: localhost evil.example",
    ],
)
def test_there_is_exactly_one_host_and_it_is_ours(server: RunningServer, head: str) -> None:
    assert raw(server, head).split()[1] in ("400", "403")
    assert raw(server, "GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close").split()[1] == "200"


def test_a_page_of_another_origin_can_not_change_anything(server: RunningServer) -> None:
    """A browser sends such a request without asking first, since text is harmless elsewhere."""
    headers = {"origin": "https://evil.example", "content-type": "text/plain"}
    answer = httpx.post(server.url + UNLOAD, headers=headers)
    assert_error(answer, 403, "origin_not_allowed")
    assert "access-control-allow-origin" not in answer.headers
    assert server.get("/v1/internal/model/info")["model_name"] != "None"


def test_pages_of_this_server_and_of_this_machine_may_call_without_credentials(server: RunningServer) -> None:
    for origin in (server.url, "http://localhost:3000"):
        answer = httpx.get(server.url + MODELS, headers={"origin": origin})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == origin
        assert "access-control-allow-credentials" not in answer.headers
        assert "Origin" in answer.headers["vary"]


@pytest.mark.parametrize(("origin", "status"), [("http://localhost:3000", 200), ("https://evil.example", 403)])
def test_browsers_that_ask_first_are_told(server: RunningServer, origin: str, status: int) -> None:
    headers = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type, x-api-key",
        "access-control-request-private-network": "true",
    }
    answer = httpx.options(server.url + "/v1/chat/completions", headers=headers)
    assert answer.status_code == status
    assert ("access-control-allow-origin" in answer.headers) == (status == 200)
    assert "access-control-allow-credentials" not in answer.headers
    if status == 200:
        assert "authorization" in answer.headers["access-control-allow-headers"]
        assert answer.headers["access-control-allow-private-network"] == "true"


@pytest.fixture(scope="module")
def listed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that goes by another name, too, and lets pages of one origin call."""
    path: Path = tmp_path_factory.mktemp("listed") / "models.yaml"
    path.write_text("models: {}\n")
    environment = {"LLAMASERVE_CORS_ORIGINS": "https://chat.example.com"}
    flags = ("--allowed-host", "llama.example.com", "--models-file", str(path))
    with RunningServer("serve", *flags, environment=environment) as running:
        yield running


def test_lists_of_hosts_and_origins(listed_server: RunningServer) -> None:
    host, origin = {"host": "llama.example.com"}, {"origin": "https://chat.example.com"}
    assert httpx.get(listed_server.url + MODELS, headers=host).status_code == 200
    assert httpx.get(listed_server.url + MODELS, headers=origin).status_code == 200
    assert httpx.get(listed_server.url + MODELS, headers={"origin": "http://localhost:3000"}).status_code == 403
    assert httpx.get(listed_server.url + MODELS, headers={"host": "example.com"}).status_code == 403
