"""Spans of requests, as a collector gets them."""

from __future__ import annotations

import gzip
import importlib.util
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from api_helpers import CHAT, COMPLETIONS, TINY
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from running_server import RunningServer

from llamaserve.api import tracing
from llamaserve.errors import LlamaserveError


class Collector(ThreadingHTTPServer):
    """Keeps the spans that it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[Any] = []
        self.services: set[str] = set()
        self.bodies: list[bytes] = []


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.bodies.append(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
            self.server.services |= {
                each.value.string_value for each in resource.resource.attributes if each.key == "service.name"
            }
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in the base class
        """Say nothing."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def attributes(span: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


def test_each_request_has_a_span_in_the_trace_of_its_client(
    starter_model: Path, tmp_path: Path, collector: Collector
) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(f"models: {{smollm2: {{source: 'file:{starter_model}', context: 512}}}}\n")
    address = f"http://127.0.0.1:{collector.server_address[1]}"
    environment = {"LLAMASERVE_TRACING": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": address}
    trace = "0af7651916cd43dd8448eb211c80319c"
    with RunningServer("serve", "smollm2", "--models-file", str(path), environment=environment) as server:
        headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01", "x-request-id": "mine"}
        usage = server.post(COMPLETIONS, {**TINY, "prompt": "a secret"}, headers=headers).json()["usage"]
        body = {"messages": [{"role": "user", "content": "a secret"}], "max_tokens": 3, "stream": True}
        assert "[DONE]" in server.post(CHAT, body, headers={"traceparent": "nonsense"}).text
        assert server.post(COMPLETIONS, {**TINY, "prompt": "x " * 3000}).status_code == 400
        server.get("/v1/models")
    whole, streamed, refused = sorted(collector.spans, key=lambda span: span.start_time_unix_nano)
    assert collector.services == {"llamaserve"}
    assert whole.trace_id.hex() == trace
    assert whole.name == "text_completion smollm2"
    found = attributes(whole)
    assert found["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert found["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
    assert found["llamaserve.request_id"] == "mine"
    assert whole.end_time_unix_nano > whole.start_time_unix_nano
    assert streamed.trace_id.hex() != trace
    assert [event.name for event in streamed.events] == ["first token"]
    assert attributes(refused)["error.type"] == "refused"
    assert not any(b"secret" in body for body in collector.bodies)


def test_a_collector_that_does_not_answer_keeps_no_server_from_ending(starter_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(f"models: {{smollm2: {{source: 'file:{starter_model}', context: 512}}}}\n")
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"http://127.0.0.1:{mute.getsockname()[1]}"
        environment = {"LLAMASERVE_TRACING": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": address}
        with RunningServer("serve", "smollm2", "--models-file", str(path), environment=environment) as server:
            assert server.post(COMPLETIONS, TINY).status_code == 200
            began = time.monotonic()
        assert time.monotonic() - began < 8  # OpenTelemetry itself would wait for ten seconds and more


def test_without_its_packages_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def nothing_of_it(name: str, package: str | None = None) -> Any:
        return None if name.startswith("opentelemetry.exporter") else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", nothing_of_it)
    with pytest.raises(LlamaserveError) as caught:
        tracing.Tracing()
    assert "llamaserve[telemetry]" in (caught.value.hint or "")
