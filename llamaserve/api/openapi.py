"""The OpenAPI document: FastAPI's, with what answers look like (``answers/``), the errors that there are, and examples.

All that every route has in common is put in here, in one place. Knows nothing of how an answer comes about.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

import msgspec
from fastapi import FastAPI

from llamaserve.api.accounting import RATE_LIMIT_HEADERS
from llamaserve.api.answers import (
    audio,
    billing,
    chat,
    completions,
    downloads,
    embeddings,
    errors,
    images,
    infill,
    internal,
    lora,
    model_admin,
    model_events,
    models,
    moderations,
    observation,
    rerank,
)
from llamaserve.api.answers.answer import EVENTS, FORM, JSON, Content, Documented

ROUTES: Final[Mapping[str, Documented]] = {
    route: documented
    for module in (
        *(audio, chat, completions, downloads, embeddings, images, infill, internal, lora, model_admin, model_events),
        *(models, moderations, rerank, billing, observation),
    )
    for route, documented in module.ROUTES.items()
}

_DESCRIPTION: Final = """\
Bodies are JSON, whatever the content type says, but for uploads, which are forms. Null means "not given". Fields that
the server does not know are accepted; those that could have changed the answer are named in `x-llamaserve-ignored`.

Answers that are streamed are server-sent events: the schema of `text/event-stream` is that of an event. The last one is
`[DONE]`, but for `/infill`; an error that shows once the stream has begun is an event before that.
"""
_TAGS: Final = {
    "generation": "Conversations and texts that go on.",
    "embeddings": "Texts to vectors, and documents sorted by them.",
    "moderation": "Is there anything harmful in a text?",
    "audio": "Speech to text.",
    "images": "Pictures from prompts and from other pictures.",
    "models": "Which models there are.",
    "billing": "What requests have used.",
    "observation": "What the server does, for whoever runs it.",
    "internal": "Tokens, prompts, and how the server is.",
    "models by command": "For whoever runs the server: which models are loaded, and what happens to them.",
    "LoRA": "For whoever runs the server: the adapters of the current model.",
    "downloads": "For whoever runs the server: fetching models, and deleting them.",
}
_OPEN: Final = ("GET /health", "GET /v1/internal/health")  # also without a key
_SECURITY: Final = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "A key of the server, if it has any."},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    "api-key": {"type": "apiKey", "in": "header", "name": "api-key"},
}
_REQUEST_ID: Final = "x-request-id"
_HEADERS: Final = {
    _REQUEST_ID: "The request's own, or a new one.",
    "x-llamaserve-ignored": "The fields that have no effect, between commas.",
    "x-llamaserve-truncated": "What was cut.",
    "x-llamaserve-warning": "What is not just as it was asked for.",
    "x-llamaserve-rerank-method": "How documents were compared: cross_encoder or embedding_cosine.",
    "x-compute-tokens": "How many tokens were evaluated, where the answer has TEI's shape.",
}
_DONE: Final = "[DONE]"  # the data of the last event
_BOUNDS: Final = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
_INT64: Final = 2**63 - 1
_METHODS: Final = ("get", "post", "put", "patch", "delete")
_FASTAPIS: Final = ("HTTPValidationError", "ValidationError")  # of a status that this server does not answer with
_REFERENCE: Final = "#/components/schemas/{name}"


class DocumentedAPI(FastAPI):
    """An application whose OpenAPI document is complete. ``operationId`` is a function's name."""

    def openapi(self) -> dict[str, Any]:
        """Return the document, which is made once."""
        if self.openapi_schema is None:
            self.openapi_tags = [{"name": name, "description": words} for name, words in _TAGS.items()]
            self.description = _DESCRIPTION
            complete(super().openapi())
        assert self.openapi_schema is not None
        return self.openapi_schema


def complete(document: dict[str, Any]) -> None:
    """Put in what FastAPI does not know."""
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in _FASTAPIS:
        schemas.pop(name, None)
    kinds = [kind for documented in ROUTES.values() for content in documented.answers for kind in content.kinds]
    kinds += [errors.ErrorAnswer, errors.InternalErrorAnswer]
    found, components = msgspec.json.schema_components(kinds, ref_template=_REFERENCE)
    schemas.update(components)
    known = dict(zip(kinds, found, strict=True))
    document["components"]["responses"] = errors.components()
    document["components"]["securitySchemes"] = _SECURITY
    document["components"]["headers"] = {name: _header(words) for name, words in RATE_LIMIT_HEADERS.items()}
    document["security"] = [{}, *({name: []} for name in _SECURITY)]
    _make_bounds_whole(schemas)
    for path, operation in _operations(document):
        statuses = {*errors.EVERYWHERE, *ROUTES[path].errors, *(() if path in _OPEN else errors.KEYS)}
        _describe(operation, ROUTES[path], known, sorted(statuses), internal="/v1/internal/" in path)


def _operations(document: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each operation with its method and path."""
    for path, methods in document["paths"].items():
        for method in _METHODS:
            if method in methods:
                yield f"{method.upper()} {path}", methods[method]


def _make_bounds_whole(schema: Any) -> None:
    """Undo what FastAPI makes of the bounds of integers: floats, of which the largest are not the bounds."""
    if isinstance(schema, list):
        for each in schema:
            _make_bounds_whole(each)
    elif isinstance(schema, dict):
        for name, value in schema.items():
            if name in _BOUNDS and isinstance(value, float) and value.is_integer():
                schema[name] = max(-_INT64, min(int(value), _INT64))
            else:
                _make_bounds_whole(value)


def _describe(
    operation: dict[str, Any],
    documented: Documented,
    schemas: Mapping[Any, Any],
    statuses: Sequence[int],
    *,
    internal: bool,
) -> None:
    content = {each.media_type: _media_type(each, schemas) for each in documented.answers}
    headers = {name: _header(_HEADERS[name]) for name in (_REQUEST_ID, *documented.headers)}
    if HTTPStatus.TOO_MANY_REQUESTS in statuses:
        headers |= {name: {"$ref": f"#/components/headers/{name}"} for name in RATE_LIMIT_HEADERS}
    responses: dict[str, Any] = {"200": {"description": operation["responses"]["200"]["description"]}}
    responses["200"]["headers"] = headers
    responses["200"]["content"] = content
    for status in statuses:
        responses[str(status)] = {"$ref": f"#/components/responses/{errors.name_of(status, internal=internal)}"}
    operation["responses"] = responses
    for media_type, body in operation.get("requestBody", {}).get("content", {}).items():
        body["examples"] = _examples(documented.requests)
        if media_type == FORM:
            _without_null(body["schema"])


def _header(words: str) -> dict[str, Any]:
    return {"description": words, "schema": {"type": "string"}}


def _without_null(form: dict[str, Any]) -> None:
    """Take null out of a form's fields, which are texts and files."""
    for name, schema in form["properties"].items():
        kept = [each for each in schema.get("anyOf", []) if each != {"type": "null"}]
        if len(kept) == 1:
            others = {key: value for key, value in schema.items() if key not in ("anyOf", "default")}
            form["properties"][name] = kept[0] | others
        elif kept:
            schema["anyOf"] = kept


def _media_type(content: Content, schemas: Mapping[Any, Any]) -> dict[str, Any]:
    first, *others = [schemas[kind] for kind in content.kinds]
    schema = {"anyOf": [first, *others]} if others else first
    examples = content.examples
    if content.media_type == EVENTS:
        schema = _event_of(schema, done=content.done)
        examples = {name: {"data": json.dumps(data)} for name, data in examples.items()}
    return {"schema": schema} | ({"examples": _examples(examples)} if examples else {})


def _event_of(schema: Any, *, done: bool) -> dict[str, Any]:
    """Return the schema of a server-sent event, as OpenAPI describes those, of which the data has this schema."""
    data: dict[str, Any] = {"type": "string", "contentMediaType": JSON, "contentSchema": schema}
    if done:
        data = {"anyOf": [{"const": _DONE}, data]}
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}


def _examples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {"value": value} for name, value in values.items()}
