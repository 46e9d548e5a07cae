"""How downloads and deletions look."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from msgspec import UNSET, Meta, UnsetType

from llamaserve.api.answers.answer import OK, Answer, Content, Documented
from llamaserve.api.answers.errors import BODY, ErrorObject
from llamaserve.api.answers.generation import CREATED
from llamaserve.api.answers.internal import Said


class DownloadState(Answer):
    """Where a download stands."""

    id: str
    model_name: str
    source: str
    state: Literal["running", "done", "failed", "cancelled"]
    done: Annotated[int, Meta(ge=0, description="Bytes that are here.")]
    total: Annotated[int | None, Meta(description="Bytes in all, where that is known.")]
    percent: Annotated[float, Meta(ge=0, le=100)] | None
    file: str | None
    started: Annotated[float, Meta(description="In seconds since 1970.")]
    ended: float | None
    error: Annotated[ErrorObject, Meta(description="Why it has failed.")] | UnsetType = UNSET


class DownloadList(Answer):
    """Downloads, the newest first."""

    downloads: list[DownloadState]


class DeletedModel(Answer):
    """What was deleted."""

    status: Said
    files: list[str]
    freed: Annotated[int, Meta(ge=0, description="Bytes that are free again.")]


_MODEL: Final = "qwen3-0.6b"
_STATE: Final[dict[str, Any]] = {
    "id": "download-1",
    "model_name": _MODEL,
    "source": "hf:Qwen/Qwen3-0.6B-GGUF:Q8_0",
    "state": "running",
    "done": 104_857_600,
    "total": 639_446_688,
    "percent": 16.4,
    "file": "Qwen3-0.6B-Q8_0.gguf",
    "started": float(CREATED),
    "ended": None,
}
_CANCELLED: Final = _STATE | {"state": "cancelled", "ended": CREATED + 7.5}
_DELETED: Final = {"status": OK, "files": ["Qwen3-0.6B-Q8_0.gguf"], "freed": 639_446_688}

ROUTES: Final = {
    "POST /v1/internal/model/download": Documented(
        answers=(Content(DownloadState, {"begun": _STATE}),), errors=BODY, requests={"model": {"model_name": _MODEL}}
    ),
    "GET /v1/internal/model/downloads": Documented(answers=(Content(DownloadList, {"one": {"downloads": [_STATE]}}),)),
    "POST /v1/internal/model/download/cancel": Documented(
        answers=(Content(DownloadState, {"cancelled": _CANCELLED}),),
        errors=BODY,
        requests={"one": {"id": "download-1"}},
    ),
    "POST /v1/internal/model/delete": Documented(
        answers=(Content(DeletedModel, {"deleted": _DELETED}),),
        errors=(*BODY, 404),
        requests={"model": {"model_name": _MODEL}},
    ),
}
