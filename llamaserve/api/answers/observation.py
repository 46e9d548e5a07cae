"""How the answers about the server itself look."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import UNSET, Meta, UnsetType

from llamaserve.api.answers.answer import Answer, Content, Documented
from llamaserve.api.answers.generation import MODEL, Count
from llamaserve.api.answers.models import State


class Bytes(Answer):
    """Main memory and memory of GPUs, in bytes."""

    host: Count
    gpu: Count


class ProcessMemory(Answer):
    """What the server's own process has."""

    process: Annotated[int, Meta(ge=0, description="Resident memory in bytes.")]
    files: Annotated[int, Meta(ge=0, description="Open files, connections included.")]


class LedgerStatus(Answer):
    """How the ledger of usage is."""

    file: str
    problem: Annotated[str | None, Meta(description="What keeps rows from being written.")]
    pending: Annotated[int, Meta(ge=0, description="Rows that wait for that.")]
    lost: Annotated[int, Meta(ge=0, description="Rows that never will be written.")]


class ModelStatus(Answer):
    """How a model is; what is only known of loaded ones is left out of others."""

    name: str
    status: State
    pid: int | UnsetType = UNSET
    gpu: bool | UnsetType = UNSET
    memory: Bytes | UnsetType = UNSET
    running: Count | UnsetType = UNSET
    waiting: Count | UnsetType = UNSET
    kv_cells: int | UnsetType | None = UNSET
    kv_cells_used: Count | UnsetType = UNSET
    drafted_tokens: Count | UnsetType = UNSET
    accepted_draft_tokens: Count | UnsetType = UNSET
    preemptions: Count | UnsetType = UNSET
    requests_open: Annotated[int, Meta(ge=0, description="Sequences from admission to end.")] | UnsetType = UNSET


class ServerStatus(Answer):
    """How the server is."""

    version: str
    pid: int
    uptime: Annotated[float, Meta(ge=0, description="Seconds.")]
    memory: ProcessMemory
    models_budget: Bytes
    models_claimed: Bytes
    running: Count
    waiting: Count
    keys: Annotated[list[str] | None, Meta(description="Their names; null where none is needed.")]
    usage: LedgerStatus | None
    registry_problem: Annotated[str | None, Meta(description="Why the last edit of models.yaml does not count.")]
    models: list[ModelStatus]


_STATUS: Final = {
    "version": "0.1.0",
    "pid": 4710,
    "uptime": 3600.0,
    "memory": {"process": 80_000_000, "files": 32},
    "models_budget": {"host": 12_000_000_000, "gpu": 0},
    "models_claimed": {"host": 400_000_000, "gpu": 0},
    "running": 1,
    "waiting": 0,
    "keys": ["laptop"],
    "usage": {"file": "/home/me/.local/state/llamaserve/usage.sqlite3", "problem": None, "pending": 0, "lost": 0},
    "registry_problem": None,
    "models": [
        {
            "name": MODEL,
            "status": "loaded",
            "pid": 4711,
            "gpu": False,
            "memory": {"host": 400_000_000, "gpu": 0},
            "running": 1,
            "waiting": 0,
            "kv_cells": 8192,
            "kv_cells_used": 120,
            "drafted_tokens": 40,
            "accepted_draft_tokens": 30,
            "preemptions": 0,
            "requests_open": 1,
        },
        {"name": "another", "status": "unloaded"},
    ],
}
_METRICS: Final = 'llamaserve_requests_total{endpoint="/v1/completions",model="smollm2-135m",outcome="answered"} 40.0\n'

ROUTES: Final = {
    "GET /v1/internal/status": Documented(answers=(Content(ServerStatus, {"busy": _STATUS}),)),
    "GET /metrics": Documented(
        answers=(Content(str, {"one": _METRICS}, "text/plain"),),
    ),
}
