"""Fetching models and deleting them, by command. What a request may name is ``registry/downloads.py``'s business."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends
from pydantic import Field

from llamaserve.api.access import admin
from llamaserve.api.fields import ModelName, StrictFields, Text
from llamaserve.api.services import UsesServices
from llamaserve.errors import ModelFileMissing, ModelNotFound, from_value
from llamaserve.registry.deleting import goes_with
from llamaserve.registry.downloads import LONGEST_REFERENCE, Download, find
from llamaserve.registry.lock_file import LockFile, lock_path
from llamaserve.registry.pool import ModelPool
from llamaserve.registry.spec import ModelSpec

router = APIRouter(tags=["downloads"], dependencies=[Depends(admin)])


class DownloadRequest(StrictFields):
    """What to fetch."""

    model_name: Text = Field(
        validation_alias=ModelName,
        max_length=LONGEST_REFERENCE,
        description="A model of models.yaml, or hf:OWNER/REPO:QUANT.",
    )
    update: bool = Field(default=False, description="Look for a newer version than models.lock has.")


class CancelRequest(StrictFields):
    """Which download to give up."""

    id: Text = Field(max_length=64, description="The id of a download.")


class DeleteRequest(StrictFields):
    """Which model to delete."""

    model_name: Text = Field(
        validation_alias=ModelName,
        max_length=LONGEST_REFERENCE,
        description="A model of the list, or hf:OWNER/REPO:QUANT.",
    )


@router.post("/v1/internal/model/download", summary="Fetch a model")
async def download_model(body: DownloadRequest, services: UsesServices) -> dict[str, Any]:
    """Begin to fetch a model, and answer at once with where the download stands."""
    registry = services.pool.registry
    lock = LockFile(lock_path(registry.path))
    param = body.called("model_name")
    return describe(services.downloads.start(registry, body.model_name, lock, update=body.update, param=param))


@router.get("/v1/internal/model/downloads", summary="Where do downloads stand?")
async def list_downloads(services: UsesServices) -> dict[str, list[dict[str, Any]]]:
    """Return the downloads under way and the latest that are over, newest first."""
    return {"downloads": [describe(download) for download in services.downloads.listed()]}


@router.post("/v1/internal/model/download/cancel", summary="Give a download up")
async def cancel_download(body: CancelRequest, services: UsesServices) -> dict[str, Any]:
    """Give a download up. What is here already stays for the next attempt, but for a package of models.yaml's, whose
    download begins anew.
    """
    return describe(services.downloads.cancel(body.id))


@router.post("/v1/internal/model/delete", summary="Delete a model's files")
async def delete_model(body: DeleteRequest, services: UsesServices) -> dict[str, Any]:
    """Delete a model's files, only such as were fetched or lie in the models folder, once all models that lie in them
    are unloaded.
    """
    pool, downloads = services.pool, services.downloads
    param = body.called("model_name")
    try:
        spec = pool.get(body.model_name).spec
    except ModelNotFound:
        spec = await find(pool.registry, body.model_name, pool.folder, param)
    try:
        files = await downloads.deletable(pool.registry, spec, pool.folder, param=param)
        users = await _users(pool, spec, files)
        await _unload(pool, users)
        deleted = await downloads.delete(pool.registry, spec, pool.folder, param=param)
    except ModelFileMissing as error:
        raise ModelNotFound(error.message, param=param) from error
    finally:
        await pool.reload()
    await _unload(pool, users)  # requests that came meanwhile may have loaded them again
    return {"status": "OK", "files": [path.name for path in deleted.files], "freed": deleted.freed}


async def _users(pool: ModelPool, spec: ModelSpec, files: Sequence[Path]) -> list[str]:
    """Return the names of the models that are gone when these files of a model's are."""
    models = [(model.name, model.spec) for model in pool.models]
    registry = pool.registry
    return await asyncio.to_thread(lambda: [name for name, each in models if goes_with(registry, each, spec, files)])


async def _unload(pool: ModelPool, names: Sequence[str]) -> None:
    """Unload models, once their requests are answered; some may be gone already."""
    for name in names:
        with contextlib.suppress(ModelNotFound):
            await pool.unload(name)


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
