"""Turns every error into OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``.

Internal endpoints carry a top-level ``detail`` as well, because clients of the seed API look for it there. This is one
of the two places that catch everything: a bug becomes a logged 500, never a lost connection.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import Match

from llamaserve.errors import InvalidRequest, LlamaserveError, NotSupported, RequestTimeout, TimeLimitExceeded

logger = logging.getLogger(__name__)

_SHOWN_PROBLEMS = 3
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


class _RouteError(InvalidRequest):
    """An error that the web framework found: no such route, wrong method."""


class BodyRefused(HTTPException):
    """An error that is found while a body is read. FastAPI lets only errors of this kind through."""

    def __init__(self, error: LlamaserveError) -> None:
        super().__init__(error.status, error.message)
        self.error = error


def add_error_handlers(app: FastAPI) -> None:
    """Make the application answer every error in OpenAI's shape."""
    app.add_exception_handler(LlamaserveError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_bug)


def error_body(path: str, error: LlamaserveError) -> dict[str, Any]:
    """Return the JSON of an error for a request to this path."""
    return error.body() | ({"detail": error.message} if path.startswith("/v1/internal/") else {})


def server_bug() -> LlamaserveError:
    """Return what a client is told of a bug."""
    return LlamaserveError("the server failed to answer; its log has the details")


def error_response(path: str, error: LlamaserveError, status: int | None = None) -> JSONResponse:
    """Return the answer that an error makes of a request to this path."""
    body = error_body(path, error)
    headers = {} if error.retry_after is None else {"retry-after": str(max(1, math.ceil(error.retry_after)))}
    if isinstance(error, TimeLimitExceeded | NotSupported):
        headers["x-should-retry"] = "false"  # to the openai SDK, which would try twice more, and wait as long
    if isinstance(error, RequestTimeout):
        headers["connection"] = "close"  # the rest of the request may still come
    return JSONResponse(body, status or error.status, headers)


def _respond(request: Request, error: LlamaserveError, status: int | None = None) -> JSONResponse:
    return error_response(request.url.path, error, status)


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, LlamaserveError)
    return _respond(request, error)


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problems = [_describe(problem) for problem in error.errors()]
    message = "; ".join(problems[:_SHOWN_PROBLEMS])
    if len(problems) > _SHOWN_PROBLEMS:
        message += f"; and {len(problems) - _SHOWN_PROBLEMS} more"
    first = error.errors()[0]
    return _respond(
        request, InvalidRequest(message, param=None if first["type"] == "json_invalid" else _field(first["loc"]))
    )


def _field(location: Sequence[str | int]) -> str | None:
    """Return ``messages[0].role`` for ``("body", "messages", 0, "role")``."""
    name = ""
    for part in location[1:]:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    return name or None


def _describe(problem: dict[str, Any]) -> str:
    if problem["type"] == "json_invalid":
        return f"the body is not valid JSON: {problem.get('ctx', {}).get('error', problem['msg'])}"
    field = _field(problem["loc"])
    message = str(problem["msg"]).removeprefix("Value error, ")
    if field:
        return f"{field}: {message}"
    return "there is no body; it must be a JSON object" if problem["type"] == "missing" else f"the body: {message}"


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error, BodyRefused):
        return _respond(request, error.error)
    if error.status_code == HTTPStatus.NOT_FOUND:
        return _respond(request, _RouteError(f"there is no {request.method} {request.url.path}"), error.status_code)
    response = _respond(request, _RouteError(error.detail), error.status_code)
    response.headers.update(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        response.headers["allow"] = ", ".join(_methods_of(request))
    return response


def _methods_of(request: Request) -> list[str]:
    """Return the methods that a path has; the framework knows only those of the first function there."""
    matching = ((method, {**request.scope, "method": method}) for method in _METHODS)
    return [
        method
        for method, scope in matching
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.router.routes)
    ]


async def _on_bug(request: Request, error: Exception) -> JSONResponse:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _respond(request, server_bug())
