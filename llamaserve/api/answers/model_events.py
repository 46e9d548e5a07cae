"""How what happens to models looks."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from msgspec import Meta

from llamaserve.api.answers.answer import EVENTS, Answer, Content, Documented
from llamaserve.api.answers.errors import ErrorAnswer
from llamaserve.api.answers.generation import CREATED, MODEL

Kind = Literal[
    "snapshot",
    "loading",
    "load_progress",
    "loaded",
    "load_failed",
    "unloading",
    "unloaded",
    "crashed",
    "download_progress",
    "download_done",
    "download_failed",
    "download_cancelled",
    "registry_reloaded",
    "registry_rejected",
    "missed",
]


class ModelEventObject(Answer):
    """Something has happened; the first event says how things stand."""

    kind: Kind
    model: Annotated[str | None, Meta(description="Which model it happened to.")]
    at: Annotated[float, Meta(description="In seconds since 1970.")]
    data: Annotated[dict[str, Any], Meta(description="More about it; what, hangs on the kind.")]


_EXAMPLES: Final = {
    "first": {
        "kind": "snapshot",
        "model": None,
        "at": CREATED + 0.25,
        "data": {
            "current": MODEL,
            "models": [{"name": MODEL, "status": "loaded", "percent": 100}],
            "downloads": [],
        },
    },
    "progress": {"kind": "load_progress", "model": MODEL, "at": CREATED + 0.5, "data": {"percent": 40}},
}

ROUTES: Final = {
    "GET /v1/internal/events": Documented(answers=(Content((ModelEventObject, ErrorAnswer), _EXAMPLES, EVENTS),)),
}
