"""Fetching models and deleting them, by command. What a request may name is ``registry/downloads.py``'s business."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field

from llamaserve.api.access import admin
from llamaserve.api.fields import Text
from llamaserve.api.services import UsesServices
from llamaserve.errors import ModelFileMissing, ModelNotFound, from_value
from llamaserve.registry.downloads import LONGEST_REFERENCE, Download
from llamaserve.registry.lock_file import LockFile, lock_path

router = APIRouter(tags=["downloads"], dependencies=[Depends(admin)])


class DownloadRequest(BaseModel):
    """What to fetch."""

    model_name: Text = Field(
        max_length=LONGEST_REFERENCE, description="A model of models.yaml, or hf:OWNER/REPO:QUANT."
    )
    update: bool = Field(default=False, description="Look for a newer version than models.lock has.")


class CancelRequest(BaseModel):
    """Which download to give up."""

    id: Text = Field(max_length=64, description="The id of a download.")


class DeleteRequest(BaseModel):
    """Which model to delete."""

    model_name: Text = Field(
        max_length=LONGEST_REFERENCE, description="A model of models.yaml or of the models folder."
    )


@router.post("/v1/internal/model/download", summary="Fetch a model")
async def download_model(body: DownloadRequest, services: UsesServices) -> dict[str, Any]:
    """Begin to fetch a model, and answer at once with where the download stands."""
    registry = services.pool.registry
    lock = LockFile(lock_path(registry.path))
    return describe(services.downloads.start(registry, body.model_name, lock, update=body.update))


@router.get("/v1/internal/model/downloads", summary="Where do downloads stand?")
async def list_downloads(services: UsesServices) -> dict[str, list[dict[str, Any]]]:
    """Return the downloads under way and the latest that are over, newest first."""
    return {"downloads": [describe(download) for download in services.downloads.listed()]}


@router.post("/v1/internal/model/download/cancel", summary="Give a download up")
async def cancel_download(body: CancelRequest, services: UsesServices) -> dict[str, Any]:
    """Give a download up. What is here already stays for the next attempt."""
    return describe(services.downloads.cancel(body.id))


@router.post("/v1/internal/model/delete", summary="Delete a model's files")
async def delete_model(body: DeleteRequest, services: UsesServices) -> dict[str, Any]:
    """Delete a model's files, only such as were fetched or lie in the models folder, and unload it."""
    pool = services.pool
    try:
        name = pool.get(body.model_name).name
    except ModelNotFound:  # it may be an hf: reference
        name = None
    try:
        deleted = await services.downloads.delete(pool.registry, name or body.model_name, pool.folder)
    except ModelFileMissing as error:
        raise ModelNotFound(error.message, param="model_name") from error
    if name is not None:
        await pool.unload(name)
    await pool.reload()
    return {"status": "OK", "files": [path.name for path in deleted.files], "freed": deleted.freed}


def describe(download: Download) -> dict[str, Any]:
    """Return a download as JSON."""
    answer: dict[str, Any] = {
        "id": download.id,
        "model_name": download.model,
        "source": download.source,
        "state": download.state.value,
        "done": download.done,
        "total": download.total,
        "percent": download.percent,
        "file": Path(download.path).name if download.path else None,
        "started": download.started,
        "ended": download.ended,
    }
    return answer | (from_value(download.error).body() if download.error is not None else {})
