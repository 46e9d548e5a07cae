"""What errors look like, and which statuses go together. Their codes are those of the tree in ``errors.py``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Literal

from msgspec import Meta

from llamaserve import errors
from llamaserve.api.answers.answer import JSON, Answer
from llamaserve.errors import LlamaserveError

# Statuses of every route; and of those that
EVERYWHERE: Final = (403, 500)
KEYS: Final = (401,)  # are not open to strangers,
BODY: Final = (400, 408, 413, 429)  # read a body, which needs room and may count against a key's limits,
LOADS: Final = (404, 503, 507)  # need a model, which may have to be loaded,
WAITS: Final = (*LOADS, 504)  # wait for their turn there as well,
LACKS: Final = (501,)  # for something that not every model or installation has.

_RETRY_AFTER: Final = {"schema": {"type": "string"}, "description": "Seconds after which to try again."}
_NO_RETRY: Final = {"schema": {"const": "false"}, "description": "Tells OpenAI's SDK that trying again won't help."}
_AUTHENTICATE: Final = {"schema": {"const": "Bearer"}, "description": "How a key is sent."}
_HEADERS: Final[Mapping[int, dict[str, Any]]] = {
    401: {"WWW-Authenticate": _AUTHENTICATE},
    429: {"Retry-After": _RETRY_AFTER},
    501: {"x-should-retry": _NO_RETRY},
    503: {"Retry-After": _RETRY_AFTER},
    504: {"x-should-retry": _NO_RETRY},
}


class ErrorObject(Answer):
    """What went wrong."""

    message: Annotated[str, Meta(description="The error in words.")]
    type: Literal["invalid_request_error", "rate_limit_error", "not_supported_error", "server_error"]
    param: Annotated[str | None, Meta(description="The field at fault, such as `messages[0].role`.")]
    code: Annotated[str | None, Meta(description="The kind of error, for programs.")]


class ErrorAnswer(Answer):
    """An error, in OpenAI's shape."""

    error: ErrorObject


class InternalErrorAnswer(Answer):
    """An error of an internal endpoint, which has the message once more in `detail`."""

    error: ErrorObject
    detail: Annotated[str, Meta(description="The same message.")]


_DESCRIPTIONS: Final[Mapping[int, str]] = {
    400: "The request can't work as it is written.",
    401: "The server has keys, and the request brings none of them.",
    403: "The key is no admin's, or the request is for another host or of a page that may not call.",
    404: "There is no such model, picture or route.",
    408: "Nothing more of the request has come for a minute.",
    413: "The body is over the limit.",
    429: "As many requests wait as may, there is no room for the body, or the key's limits are reached.",
    500: "The model's file is bad or missing, llama.cpp failed, or the server did.",
    501: "The model or the installation lacks what this needs.",
    503: "It can't be done now: there is no model, or its process has ended.",
    504: "The time limit was over before there was an answer.",
    507: "The model does not fit into the memory that models may take.",
}
_OF_ROUTES: Final[Mapping[int, set[None]]] = {404: {None}}  # there is no such path
_EXAMPLES: Final[tuple[LlamaserveError, ...]] = (
    errors.InvalidRequest("temperature: Input should be less than or equal to 100", param="temperature"),
    errors.ContextLengthExceeded(
        "the prompt has 5012 tokens, but the context has room for 4096 with at least one for the answer",
        param="messages",
    ),
    errors.Unauthenticated("this is none of the server's keys"),
    errors.AdminKeyRequired("this needs an admin key; the one that came is for ordinary requests"),
    errors.HostNotAllowed("the request is for the host evil.example, which this server does not go by"),
    errors.ModelNotFound("there is no model 'smolm'; did you mean 'smollm2-135m'?", param="model"),
    errors.RequestTimeout("nothing more of the request has come for 60 seconds"),
    errors.BodyTooLarge("the request body is larger than 33554432 bytes"),
    errors.QueueFull("64 requests wait for smollm2-135m already; try again later"),
    errors.RateLimitExceeded("the key laptop has used up its 20000 tokens a minute; try again in 12 s"),
    errors.ModelFileMissing("smollm2-135m is not on this machine; fetch it: llamaserve pull smollm2-135m"),
    errors.NotSupported("smollm2-135m can't fill in the middle: it has no tokens for that"),
    errors.ModelNotLoaded("no model is loaded, and the request names none"),
    errors.TimeLimitExceeded("the time limit was over before the first token"),
    errors.InsufficientMemory("llama-70b needs 40.1 GiB, and models may take 12.0 GiB"),
)


def name_of(status: int, *, internal: bool) -> str:
    """Return what the component of a status is called."""
    return f"{'InternalError' if internal else 'Error'}{status}"


def components() -> dict[str, Any]:
    """Return the answers of all statuses as components of the document, by name."""
    return {
        name_of(status, internal=internal): _component(status, internal=internal)
        for status in _DESCRIPTIONS
        for internal in (False, True)
    }


def _component(status: int, *, internal: bool) -> dict[str, Any]:
    kind = InternalErrorAnswer if internal else ErrorAnswer
    codes = {"error": {"properties": {"code": {"enum": codes_of(status)}}}}
    schema = {"allOf": [{"$ref": f"#/components/schemas/{kind.__name__}"}, {"properties": codes}]}
    examples = {
        error.code or "invalid": {"value": error.body() | ({"detail": error.message} if internal else {})}
        for error in _EXAMPLES
        if error.status == status
    }
    described: dict[str, Any] = {"description": _DESCRIPTIONS[status]}
    if status in _HEADERS:
        described["headers"] = _HEADERS[status]
    return described | {"content": {JSON: {"schema": schema, "examples": examples}}}


def codes_of(status: int) -> list[str | None]:
    """Return the codes that errors of this status have."""
    codes = {kind.code for kind in _kinds(LlamaserveError) if kind.status == status} | _OF_ROUTES.get(status, set())
    return sorted(code for code in codes if code is not None) + [None] * (None in codes)


def _kinds(kind: type[LlamaserveError]) -> Iterator[type[LlamaserveError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _kinds(child)
