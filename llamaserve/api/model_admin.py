"""Which model is loaded, by command: text-generation-webui's ``model/list``, ``model/load`` and ``model/unload``.

Loads are atomic: one that fails leaves everything as it was. What is said at a load of how the model runs and of what
its requests get where they say nothing holds until it is loaded again.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Depends, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from llamaserve.api.access import admin
from llamaserve.api.fields import ModelName, RequestFields, StrictFields, Text
from llamaserve.api.options import KeepAlive, header_words, ignored_header
from llamaserve.api.request_defaults import RequestDefaults, check_names, read_settings
from llamaserve.api.services import Services, UsesServices
from llamaserve.errors import ChatTemplateError, ModelNotFound
from llamaserve.registry.folder import find, natural
from llamaserve.registry.load_args import LoadArgs, apply, effective, translate
from llamaserve.registry.pool import ModelPool

router = APIRouter(tags=["models by command"], dependencies=[Depends(admin)])

_MAX_NAME = 512
_SOURCE = "instruction_template_str"
_TEMPLATES = ("instruction_template", _SOURCE)


class LoadRequest(RequestFields):
    """Which model to load, and how."""

    model_name: Text = Field(
        validation_alias=ModelName,
        max_length=_MAX_NAME,
        description="A name of GET /v1/internal/model/list, or an alias.",
    )
    args: dict[str, Any] = Field({}, description="How it is run: settings of models.yaml, or of text-generation-webui.")
    settings: dict[str, Any] = Field({}, description="Fields that its requests have where they do not give them.")
    instruction_template: Text | None = Field(
        None, max_length=_MAX_NAME, description="The instruction template of its chats, by name."
    )
    instruction_template_str: Text | None = Field(None, description="The same as Jinja source, which wins.")
    keep_alive: KeepAlive | None = Field(
        None, description="How long it stays loaded when nobody uses it: seconds, or such as 5m; -1: for ever."
    )
    verbose: bool = Field(default=False, description="Answer with what is in force instead of OK.")


class UnloadRequest(StrictFields):
    """Which model to unload."""

    model_name: Text | None = Field(
        None, validation_alias=ModelName, max_length=_MAX_NAME, description="Null: all that are loaded."
    )


@router.get("/v1/internal/model/list", summary="Which models can be loaded?")
async def list_model_names(services: UsesServices) -> dict[str, list[str]]:
    """Return the names of all models on this machine, with ``model2`` before ``model10``."""
    return {"model_names": sorted((model.name for model in services.pool.models), key=natural)}


@router.post("/v1/internal/model/load", summary="Load a model, and make it the one that answers")
async def load_model(body: LoadRequest, services: UsesServices) -> Response:
    """Load a model, and answer ``"OK"`` when that is done. When it fails, all is as before."""
    args = translate(body.args)
    defaults = _defaults(body, services)
    await _check_templates(body, defaults, services)
    name = await known_name(services.pool, body.model_name, body.called("model_name"))
    apply(services.pool.get(name).listed, args.overrides, args.keys)  # so that mistakes have the client's words
    keep_alive = {} if body.keep_alive is None else {"keep_alive": body.keep_alive}
    model = await services.pool.load(name, args.overrides | keep_alive)
    model.defaults = defaults.values
    ignored = _ignored(body, args, defaults)
    if not body.verbose:
        return JSONResponse("OK", headers=ignored_header(ignored))
    answer = {
        "status": "OK",
        "model_name": model.name,
        "effective": effective(model.load_params()),
        "settings": defaults.values,
        "ignored": ignored,
    }
    return JSONResponse(answer, headers=ignored_header(ignored))


@router.post("/v1/internal/model/unload", summary="Unload models")
async def unload_model(services: UsesServices, body: UnloadRequest | None = None) -> str:
    """Unload a model, or all, once their requests are answered. Answers ``"OK"``, also when nothing was loaded."""
    if body is None or body.model_name is None:
        await services.pool.unload()
    else:
        await services.pool.unload(await known_name(services.pool, body.model_name, body.called("model_name")))
    return "OK"


async def known_name(pool: ModelPool, wanted: str, param: str = "model_name") -> str:
    """Return the name of the model that a command means: its own, an alias, or a folder that it is the first model of.
    Files that were put into the models folder a moment ago are found, too. Raises ``ModelNotFound``.
    """
    try:
        return pool.get(wanted).name
    except ModelNotFound:
        await pool.reload()
    found = None if pool.folder is None else await asyncio.to_thread(find, pool.folder, wanted)
    try:
        return pool.get(wanted if found is None else found.name).name
    except ModelNotFound as error:
        error.param = param
        raise


def _defaults(body: LoadRequest, services: Services) -> RequestDefaults:
    """Return what the model's requests get. A template in a field of its own wins over one among the settings."""
    defaults = read_settings(body.settings)
    templates = {name: value for name in _TEMPLATES if (value := getattr(body, name))}
    if templates:
        others = {name: value for name, value in defaults.values.items() if name not in _TEMPLATES}
        defaults = RequestDefaults(others | read_settings(templates, place="").values, defaults.ignored)
    check_names(defaults.values, services)
    return defaults


async def _check_templates(body: LoadRequest, defaults: RequestDefaults, services: Services) -> None:
    """Refuse a template that no chat could be written with."""
    for name in (_SOURCE, "chat_template_str"):
        if source := defaults.values.get(name):
            try:
                await services.conversations.check(source)
            except ChatTemplateError as error:
                error.param = name if getattr(body, name, None) else f"settings.{name}"
                raise


def _ignored(body: LoadRequest, args: LoadArgs, defaults: RequestDefaults) -> list[str]:
    """Return the places of what has no effect."""
    of_args = (f"args.{key}" for key in args.ignored)
    of_settings = (f"settings.{name}" for name in defaults.ignored)
    return header_words([*(body.model_extra or {}), *of_args, *of_settings])
