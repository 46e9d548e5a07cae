"""The seam between ordinary routes and the admin's: what changes the server is behind it, and nothing else is."""

from __future__ import annotations

import importlib
import pkgutil

from fastapi import APIRouter
from fastapi.routing import APIRoute

from llamaserve import api
from llamaserve.api.access import admin

ADMINS = {
    "GET /v1/internal/model/list",
    "POST /v1/internal/model/load",
    "POST /v1/internal/model/unload",
    "POST /v1/internal/model/download",
    "GET /v1/internal/model/downloads",
    "POST /v1/internal/model/download/cancel",
    "POST /v1/internal/model/delete",
    "GET /v1/internal/lora/list",
    "POST /v1/internal/lora/load",
    "POST /v1/internal/lora/unload",
    "GET /lora-adapters",
    "POST /lora-adapters",
    "GET /v1/internal/events",
    "GET /v1/internal/status",
}


def routes() -> list[APIRoute]:
    """Return all routes of the modules of ``api``."""
    modules = [importlib.import_module(f"{api.__name__}.{each.name}") for each in pkgutil.iter_modules(api.__path__)]
    routers = [router for module in modules if isinstance(router := getattr(module, "router", None), APIRouter)]
    return [route for router in routers for route in router.routes if isinstance(route, APIRoute)]


def test_what_changes_the_server_is_the_admins() -> None:
    behind = {
        f"{method} {route.path}"
        for route in routes()
        for method in route.methods or ()
        if any(dependency.call is admin for dependency in route.dependant.dependencies)
    }
    assert behind == ADMINS
