"""Every error that llamaserve raises on purpose, and how each one looks to an HTTP client.

The tree::

    LlamaserveError                 500 server_error            internal_error
    ├── InvalidRequest              400 invalid_request_error   (none)
    │   ├── ContextLengthExceeded   400 invalid_request_error   context_length_exceeded
    │   ├── UnsupportedParameter    400 invalid_request_error   unsupported_parameter
    │   ├── ModelNotCapable         400 invalid_request_error   model_not_capable
    │   ├── ChatTemplateError       400 invalid_request_error   chat_template_error
    │   ├── BodyTooLarge            413 invalid_request_error   body_too_large
    │   ├── RequestTimeout          408 invalid_request_error   request_timeout
    │   ├── Unauthenticated         401 invalid_request_error   invalid_api_key
    │   ├── AdminKeyRequired        403 invalid_request_error   admin_key_required
    │   ├── HostNotAllowed          403 invalid_request_error   host_not_allowed
    │   ├── OriginNotAllowed        403 invalid_request_error   origin_not_allowed
    │   └── ModelNotFound           404 invalid_request_error   model_not_found
    ├── NotSupported                501 not_supported_error     not_supported
    ├── Unavailable                 503 server_error            unavailable
    │   ├── ModelNotLoaded          503 server_error            model_not_loaded
    │   ├── EngineCrashed           503 server_error            engine_crashed
    │   ├── ModelQuarantined        503 server_error            model_quarantined
    │   ├── InsufficientMemory      507 server_error            insufficient_memory
    │   ├── QueueFull               429 rate_limit_error        queue_full
    │   ├── RateLimitExceeded       429 rate_limit_error        rate_limit_exceeded
    │   ├── TimeLimitExceeded       504 server_error            time_limit_exceeded
    │   └── LedgerUnavailable       503 server_error            ledger_unavailable
    ├── KeysError                   500 server_error            keys_error              keys.yaml or a key is wrong
    ├── EngineError                 500 server_error            engine_error
    │   └── OutOfCells              500 server_error            engine_error
    └── ModelError                  500 server_error            model_error
        ├── RegistryError           500 server_error            registry_error        models.yaml is wrong
        ├── SourceError             500 server_error            model_source_error    the weights could not be fetched
        │   ├── ModelFileMissing    500 server_error            model_file_not_found
        │   └── ChecksumMismatch    500 server_error            model_checksum_mismatch
        ├── GGUFError               500 server_error            model_file_invalid
        └── ModelLoadFailed         500 server_error            model_load_failed

Deep code raises the specific class. The HTTP boundary turns it into OpenAI's ``{"error": {...}}``, the command line
into one line and ``hint``, the next command to type. This module knows nothing of HTTP frameworks, processes or
llama.cpp.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec


class LlamaserveError(Exception):
    """Base of all errors raised on purpose. ``param`` is the request field at fault, ``hint`` the next thing to do."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = "internal_error"

    def __init__(
        self, message: str, *, param: str | None = None, hint: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.hint = hint
        self.retry_after = retry_after  # seconds, for the Retry-After header

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object: ``{"error": {"message", "type", "param", "code"}}``."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequest(LlamaserveError):
    """The request can never work as it is written."""

    status = 400
    type = "invalid_request_error"
    code: ClassVar[str | None] = None


class ContextLengthExceeded(InvalidRequest):
    """The prompt leaves no room for even one new token."""

    code = "context_length_exceeded"


class UnsupportedParameter(InvalidRequest):
    """A known field asks for something this server does not do; answering without it would mislead the client."""

    code = "unsupported_parameter"


class ModelNotCapable(InvalidRequest):
    """The model exists but cannot do this, such as chat with an embedding model."""

    code = "model_not_capable"


class ChatTemplateError(InvalidRequest):
    """The model's chat template refused the messages, or took too much time or memory."""

    code = "chat_template_error"


class BodyTooLarge(InvalidRequest):
    """The request body is over the configured limit."""

    status = 413
    code = "body_too_large"


class RequestTimeout(InvalidRequest):
    """The client does not send the rest of its request."""

    status = 408
    code = "request_timeout"


class Unauthenticated(InvalidRequest):
    """The server has keys, and the request brings none of them."""

    status = 401
    code = "invalid_api_key"


class AdminKeyRequired(InvalidRequest):
    """The key is good, but not for what changes the server."""

    status = 403
    code = "admin_key_required"


class HostNotAllowed(InvalidRequest):
    """The request is for a host that is not this one, as when a web page has its name lead here."""

    status = 403
    code = "host_not_allowed"


class OriginNotAllowed(InvalidRequest):
    """A web page asks that may not."""

    status = 403
    code = "origin_not_allowed"


class ModelNotFound(InvalidRequest):
    """No served model has this name or alias."""

    status = 404
    code = "model_not_found"


class NotSupported(LlamaserveError):
    """The model has not what this needs, such as tokens for filling in the middle; no other request would change it."""

    status = 501
    type = "not_supported_error"
    code = "not_supported"


class Unavailable(LlamaserveError):
    """The server cannot do this now, and may be able to later."""

    status = 503
    code = "unavailable"


class ModelNotLoaded(Unavailable):
    """The server was started without a model."""

    code = "model_not_loaded"


class EngineCrashed(Unavailable):
    """The process that ran the model ended before the request was finished."""

    code = "engine_crashed"


class ModelQuarantined(Unavailable):
    """The model crashed too often to be started again by a mere request."""

    code = "model_quarantined"


class InsufficientMemory(Unavailable):
    """The model does not fit into the memory that this server may use, whatever else is unloaded."""

    status = 507
    code = "insufficient_memory"


class QueueFull(Unavailable):
    """As many requests as may wait for the model do so already."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class RateLimitExceeded(Unavailable):
    """The key has used up for now what its limits allow."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class TimeLimitExceeded(Unavailable):
    """The request's time was up before its answer had begun."""

    status = 504
    code = "time_limit_exceeded"


class LedgerUnavailable(Unavailable):
    """The ledger of usage can't be read or written as it is: damaged, out of reach, or of a newer program."""

    code = "ledger_unavailable"


class KeysError(LlamaserveError):
    """A key or keys.yaml is no good, so it is not known who may use the server."""

    code = "keys_error"


class EngineError(LlamaserveError):
    """llama.cpp reported a failure, or produced logits that are no numbers."""

    code = "engine_error"


class OutOfCells(EngineError):
    """The key-value cache has no room for what is to be evaluated; nothing was."""


class ModelError(LlamaserveError):
    """A model that is listed cannot be used."""

    code = "model_error"


class RegistryError(ModelError):
    """models.yaml cannot be read; the message names file, line and field."""

    code = "registry_error"


class SourceError(ModelError):
    """A model's weights could not be fetched."""

    code = "model_source_error"


class ModelFileMissing(SourceError):
    """The weights are not on this machine."""

    code = "model_file_not_found"


class ChecksumMismatch(SourceError):
    """The weights are not the bytes that models.yaml promises."""

    code = "model_checksum_mismatch"


class GGUFError(ModelError):
    """The file is no GGUF file, is cut short, or holds values that llama.cpp must not see."""

    code = "model_file_invalid"


class ModelLoadFailed(ModelError):
    """llama.cpp refused to load the model."""

    code = "model_load_failed"


class ErrorValue(msgspec.Struct, frozen=True):
    """An error as a value that crosses a process boundary."""

    name: str
    message: str
    param: str | None = None
    hint: str | None = None
    retry_after: float | None = None


def _tree(cls: type[LlamaserveError]) -> dict[str, type[LlamaserveError]]:
    found = {cls.__name__: cls}
    for child in cls.__subclasses__():
        found |= _tree(child)
    return found


def to_value(error: LlamaserveError) -> ErrorValue:
    """Turn an error into a value that another process can read."""
    return ErrorValue(type(error).__name__, error.message, error.param, error.hint, error.retry_after)


def from_value(value: ErrorValue) -> LlamaserveError:
    """Rebuild the error that ``to_value`` wrote; an unknown name becomes the base class."""
    cls = _tree(LlamaserveError).get(value.name, LlamaserveError)
    return cls(value.message, param=value.param, hint=value.hint, retry_after=value.retry_after)
