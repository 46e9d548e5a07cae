"""The port, who has it, and what is between clients and the server."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from doctor_machine import bad, case_of, checked, described, one

from llamaserve.doctor.findings import Finding, Level
from llamaserve.doctor.network import network
from llamaserve.settings import Settings


def findings(tmp_path: Path, port: int, host: str | None = "127.0.0.1", **environment: str) -> list[Finding]:
    machine = described(tmp_path, **environment)
    return checked(network(case_of(machine, Settings(port=port, host=host))))


@contextmanager
def listening(answer: bytes | None = None) -> Iterator[int]:
    """Listen on a port: with an answer to every GET, or without a word."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer or b"")))
            self.end_headers()
            self.wfile.write(answer or b"")

        def log_message(self, *words: object) -> None:
            pass

    if answer is None:
        with socket.create_server(("127.0.0.1", 0)) as sock:
            yield sock.getsockname()[1]
        return
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def test_a_free_port_is_well(tmp_path: Path) -> None:
    port = free_port()
    assert one(findings(tmp_path, port), "port").message == f"{port} is free on 127.0.0.1"
    assert one(findings(tmp_path, 0), "port").level is Level.OK


def test_a_taken_port_is_a_problem_and_the_next_free_one_is_proposed(tmp_path: Path) -> None:
    with listening() as port:
        finding = one(findings(tmp_path, port), "port")
    assert finding.level is Level.PROBLEM
    assert "is taken by another program: " in finding.message
    assert finding.fix is not None
    _, _, proposed = finding.fix.rpartition(" ")
    assert int(proposed) > port


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b'{"status": "ok"}', b"\xff"])
def test_other_web_servers_are_other_programs(answer: bytes, tmp_path: Path) -> None:
    with listening(answer) as port:
        assert one(findings(tmp_path, port), "port").level is Level.PROBLEM


def test_a_llamaserve_that_runs_already_is_recognised(tmp_path: Path) -> None:
    health = {"status": "ok", "running": 0, "waiting": 0, "models": {}}
    with listening(json.dumps(health).encode()) as port:
        finding = one(findings(tmp_path, port), "port")
    assert finding.level is Level.NOTE
    assert "a llamaserve serves on" in finding.message


def test_an_address_that_is_not_ours(tmp_path: Path) -> None:
    finding = one(findings(tmp_path, 5000, "203.0.113.7"), "port")
    assert finding.message == "203.0.113.7 is no address of this machine"
    assert finding.fix == "llamaserve run --host 127.0.0.1 --port 5000"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"HTTP_PROXY": "http://proxy:3128", "NO_PROXY": "localhost,127.0.0.1"},
        {"ALL_PROXY": "socks5://proxy", "no_proxy": "LOCALHOST, 127.0.0.1 ,::1"},
        {"http_proxy": "http://proxy:3128", "NO_PROXY": "*"},
        {"https_proxy": "http://proxy:3128"},
    ],
)
def test_proxies_that_leave_this_machine_alone(environment: Mapping[str, str], tmp_path: Path) -> None:
    assert one(findings(tmp_path, 0, **environment), "proxies").level is Level.OK


def test_a_proxy_between_clients_and_the_server(tmp_path: Path) -> None:
    finding = one(
        findings(tmp_path, 0, HTTP_PROXY="http://ann:secret@proxy:3128", NO_PROXY="*.corp,127.0.0.1"), "proxies"
    )
    assert finding.level is Level.WARNING
    assert finding.fix == "export NO_PROXY='*.corp,127.0.0.1,localhost,::1' no_proxy='*.corp,127.0.0.1,localhost,::1'"
    assert "secret" not in finding.message


def test_a_localhost_that_leads_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo

    def lookup(host: str, *rest: object, **more: object) -> object:
        if host != "localhost":
            return real(host, *rest, **more)  # type: ignore[arg-type]
        if astray is None:
            raise socket.gaierror(-2, "unknown")
        return [(2, 1, 6, "", (astray, 0)), (10, 1, 6, "", ("::1", 0, 0, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    astray: str | None = "192.0.2.1"
    assert "leads to 192.0.2.1" in one(findings(tmp_path, 0), "localhost").message
    astray = "fe80::1%lo0"
    assert one(findings(tmp_path, 0), "localhost").level is Level.PROBLEM
    astray = "127.0.1.1"
    assert one(findings(tmp_path, 0), "localhost").level is Level.OK
    astray = None
    assert one(findings(tmp_path, 0), "localhost").fix == "echo '127.0.0.1 localhost' | sudo tee -a /etc/hosts"


def test_both_loopback_addresses_are_tried_where_no_host_is_given(tmp_path: Path) -> None:
    with listening() as port:
        assert bad(findings(tmp_path, port, None))
