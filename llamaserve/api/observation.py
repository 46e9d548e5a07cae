"""What can be seen of the server: ``GET /metrics`` for Prometheus, ``GET /v1/internal/status`` for who runs it."""

from __future__ import annotations

import os
import time
from typing import Any

import psutil
from fastapi import APIRouter, Depends, Response
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from llamaserve import __version__
from llamaserve.api.access import admin
from llamaserve.api.services import Services, UsesServices
from llamaserve.engine.params import Footprint
from llamaserve.registry.served import ServedModel

router = APIRouter(tags=["observation"])

_STARTED = time.monotonic()


@router.get("/metrics", summary="Figures for Prometheus", response_class=Response)
async def metrics(services: UsesServices) -> Response:
    """Return all metrics in Prometheus' text format."""
    return Response(generate_latest(services.books.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/internal/status", summary="How is the server?", dependencies=[Depends(admin)])
def status(services: UsesServices) -> dict[str, Any]:
    """Return how the server and each of its models are."""
    pool, process = services.pool, psutil.Process()
    return {
        "version": __version__,
        "pid": os.getpid(),
        "uptime": round(time.monotonic() - _STARTED, 1),
        "memory": {"process": process.memory_info().rss, "files": process.num_fds()},
        "models_budget": _footprint(pool.budget),
        "models_claimed": _footprint(pool.claimed),
        "running": pool.occupancy.running,
        "waiting": pool.occupancy.waiting,
        "keys": sorted(key.name for key in services.keys.keyring.keys) if services.keys.needed else None,
        "usage": _usage(services),
        "registry_problem": pool.registry_problem,
        "models": [_model(model) for model in pool.models],
    }


def _usage(services: Services) -> dict[str, Any] | None:
    ledger = services.books.ledger
    if ledger is None:
        return None
    return {
        "file": str(services.settings.ledger_path),
        "problem": ledger.problem,
        "pending": ledger.pending,
        "lost": ledger.lost,
    }


def _footprint(memory: Footprint) -> dict[str, int]:
    return {"host": memory.host, "gpu": memory.device}


def _model(model: ServedModel) -> dict[str, Any]:
    worker = model.live_worker
    found: dict[str, Any] = {"name": model.name, "status": model.status.value}
    if worker is None or model.plan is None:
        return found
    busy = worker.occupancy
    return found | {
        "pid": worker.pid,
        "gpu": worker.gpu,
        "memory": _footprint(model.plan.need),
        "running": busy.running,
        "waiting": busy.waiting + model.queued,
        "kv_cells": model.cells,
        "kv_cells_used": busy.cells,
        "drafted_tokens": busy.drafted,
        "accepted_draft_tokens": busy.accepted,
        "preemptions": busy.preempted,
        "requests_open": model.admission.open,
    }
