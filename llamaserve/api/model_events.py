"""``GET /v1/internal/events``: what happens to models, as it happens. Each event is a JSON object; the first of them
says how things stand.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from fastapi import APIRouter, Depends, Response

from llamaserve.api.access import admin
from llamaserve.api.downloads import describe
from llamaserve.api.services import Services, UsesServices
from llamaserve.api.sse import EventStream, event
from llamaserve.registry.downloads import State
from llamaserve.registry.model_events import Subscription

router = APIRouter(tags=["models by command"], dependencies=[Depends(admin)])


@router.get("/v1/internal/events", summary="What happens to models?")
async def events(services: UsesServices) -> Response:
    """Stream the loads, unloads, downloads and crashes of models, with percentages, until the client hangs up."""
    listening = contextlib.ExitStack()
    subscription = listening.enter_context(services.pool.events.subscribe())
    return EventStream(
        _events(services, subscription),
        close=listening.close,
        phase=lambda: "nothing new",
        heartbeat=services.settings.heartbeat,
        headers={},
    )


async def _events(services: Services, subscription: Subscription) -> AsyncIterator[bytes]:
    yield event(_snapshot(services))
    async for each in subscription:
        yield event(msgspec.to_builtins(each))


def _snapshot(services: Services) -> dict[str, Any]:
    pool = services.pool
    models = [
        {"name": model.name, "status": model.status.value, "percent": round(100 * model.progress)}
        for model in pool.models
    ]
    running = [describe(each) for each in services.downloads.listed() if each.state is State.RUNNING]
    current = pool.current
    data = {"current": current.name if current is not None else None, "models": models, "downloads": running}
    return {"kind": "snapshot", "model": None, "at": time.time(), "data": data}
