"""The current model's LoRA adapters, by command: text-generation-webui's routes, and llama-server's list of scales.

What is set here holds for requests that do not say which adapters they want, and names those that they may want.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field

from llamaserve.api.access import admin
from llamaserve.api.adapters import MAX_ADAPTERS, MAX_SCALE, AdapterWishes, resolve_adapters
from llamaserve.api.fields import Text
from llamaserve.api.services import Services, UsesServices
from llamaserve.engine.params import Adapter
from llamaserve.errors import GGUFError, InvalidRequest
from llamaserve.registry.adapters import adapter_file, list_adapters
from llamaserve.registry.served import ServedModel

router = APIRouter(tags=["LoRA"], dependencies=[Depends(admin)])

_MAX_NAME = 512
_HERE = Path("loras")

Scale = Annotated[float, Field(strict=True, ge=-MAX_SCALE, le=MAX_SCALE)]


class AdaptersRequest(BaseModel):
    """All adapters that the model shall have."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    lora_names: list[Annotated[Text, Field(max_length=_MAX_NAME)]] = Field(
        max_length=MAX_ADAPTERS, description="Names of GET /v1/internal/lora/list; others are removed."
    )
    scales: list[Scale] | None = Field(None, description="How strongly each works; null: 1, or what models.yaml says.")


class NoFields(BaseModel):
    """Nothing is to be said."""

    model_config = ConfigDict(extra="forbid")


@router.get("/v1/internal/lora/list", summary="Which LoRA adapters are there?")
def list_lora_names(services: UsesServices) -> dict[str, list[str]]:
    """Return the names of the adapters in the folder for them, and of those that the current model has."""
    model = services.pool.current
    own = [adapter.name for adapter in model.adapters] if model is not None else []
    return {"lora_names": list(dict.fromkeys([*own, *list_adapters(_folder(services))]))}


@router.post("/v1/internal/lora/load", summary="Give the current model LoRA adapters")
async def load_adapters(body: AdaptersRequest, services: UsesServices) -> str:
    """Let the current model have these adapters and no others, and answer ``"OK"``."""
    model = services.pool.get(None)
    adapters = await asyncio.to_thread(_wanted, body, model, _folder(services))
    await _set(model, adapters)
    return "OK"


@router.post("/v1/internal/lora/unload", summary="Take all LoRA adapters from the current model")
async def unload_adapters(services: UsesServices, _: NoFields | None = None) -> str:
    """Leave the current model without adapters. Answers ``"OK"``, also when it had none."""
    if services.pool.current is not None:
        await services.pool.current.set_adapters([])
    return "OK"


@router.get("/lora-adapters", summary="The LoRA adapters of the current model")
def list_scales(services: UsesServices) -> list[dict[str, Any]]:
    """Return the current model's adapters with their places and scales, as llama-server does."""
    model = services.pool.current
    adapters = model.adapters if model is not None else ()
    return [
        {"id": number, "name": adapter.name, "path": adapter.path, "scale": adapter.scale}
        for number, adapter in enumerate(adapters)
    ]


@router.post("/lora-adapters", summary="Scale the LoRA adapters of the current model")
async def set_scales(wishes: AdapterWishes, services: UsesServices) -> dict[str, bool]:
    """Set how strongly the current model's adapters work; those not listed do not."""
    model = services.pool.get(None)
    scales = dict(resolve_adapters(wishes, [adapter.name for adapter in model.adapters], field="") or ())
    await _set(
        model, [Adapter(adapter.name, adapter.path, scales.get(adapter.name, 0.0)) for adapter in model.adapters]
    )
    return {"success": True}


def _folder(services: Services) -> Path:
    return services.settings.loras_dir or _HERE


def _wanted(body: AdaptersRequest, model: ServedModel, folder: Path) -> list[Adapter]:
    names, scales = body.lora_names, body.scales
    if scales is not None and len(scales) != len(names):
        raise InvalidRequest(f"scales: there are {len(scales)} for {len(names)} adapters", param="scales")
    for number, name in enumerate(names):
        if name in names[:number]:
            raise InvalidRequest(f"lora_names[{number}]: {name!r} is there twice", param=f"lora_names[{number}]")
    own = {adapter.name: Adapter(adapter.name, adapter.path) for adapter in model.adapters}
    own |= {adapter.name: adapter for adapter in model.file.adapters()}
    found = [own.get(name) or Adapter(name, str(adapter_file(folder, name))) for name in names]
    if scales is None:
        return found
    return [Adapter(each.name, each.path, scale) for each, scale in zip(found, scales, strict=True)]


async def _set(model: ServedModel, adapters: Sequence[Adapter]) -> None:
    try:
        await model.set_adapters(adapters)
    except GGUFError as error:  # it is the request that names a file which does not fit
        raise InvalidRequest(error.message, param="lora_names") from error
