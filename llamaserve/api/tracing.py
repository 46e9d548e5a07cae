"""A span for each request that uses a model, for OpenTelemetry, with the attributes that it has for generative AI.

It is made once the request is over, out of what the ledger notes, and belongs to the trace that the client began, if it
says so. Where spans go is said by OpenTelemetry's own variables, such as ``OTEL_EXPORTER_OTLP_ENDPOINT``. Never has
prompts or answers.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
from threading import Thread
from typing import TYPE_CHECKING, Any, Final, Self

from llamaserve import __version__
from llamaserve.errors import LlamaserveError
from llamaserve.usage.record import UsageRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_NEEDED: Final = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
_SERVICE: Final = "llamaserve"
_CLOSE_LIMIT: Final = 2.0  # seconds for spans that are not sent when the server ends
_NANO: Final = 1_000_000_000
_OPERATIONS: Final = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/fim/completions": "text_completion",
    "/infill": "text_completion",
    "/v1/embeddings": "embeddings",
}


class Tracing:
    """Sends spans, in a thread of its own."""

    def __init__(self) -> None:
        """Raises ``LlamaserveError`` when the packages for it are missing."""
        if not all(map(_is_here, _NEEDED)):
            raise LlamaserveError(
                "tracing needs packages that are not installed", hint="pip install 'llamaserve[telemetry]'"
            )
        self._provider = _provider()
        self._tracer = self._provider.get_tracer(_SERVICE, __version__)

    def request(self, record: UsageRecord, traceparent: str | None) -> None:
        """Send the span of a request that is over."""
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        operation = _OPERATIONS.get(record.endpoint)
        parent = TraceContextTextMapPropagator().extract({"traceparent": traceparent} if traceparent else {})
        began = round(record.at * _NANO)
        span = self._tracer.start_span(
            f"{operation or record.endpoint} {record.model or ''}".strip(),
            context=parent,
            kind=SpanKind.SERVER,
            start_time=began,
            attributes=_attributes(record, operation),
        )
        if record.first_token is not None:
            span.add_event("first token", timestamp=began + round(record.first_token * _NANO))
        if record.outcome == "failed":
            span.set_status(Status(StatusCode.ERROR))
        span.end(began + round(record.seconds * _NANO))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        ending = Thread(target=self._provider.shutdown, daemon=True)  # which sends what is left
        ending.start()
        await asyncio.to_thread(ending.join, _CLOSE_LIMIT)


def _is_here(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _provider() -> TracerProvider:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = os.environ.get("OTEL_SERVICE_NAME", _SERVICE)
    provider = TracerProvider(resource=Resource.create({"service.name": name, "service.version": __version__}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def _attributes(record: UsageRecord, operation: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "gen_ai.provider.name": _SERVICE,
        "gen_ai.operation.name": operation,
        "gen_ai.request.model": record.model,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "http.route": record.endpoint,
        "http.response.status_code": record.status,
        "error.type": None if record.outcome == "answered" else record.outcome,
        "llamaserve.request_id": record.request_id,
        "llamaserve.key": record.key,
        "llamaserve.cached_tokens": record.cached_tokens,
        "llamaserve.streamed": record.streamed,
    }
    return {name: value for name, value in found.items() if value is not None}
