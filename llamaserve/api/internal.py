"""The small endpoints: tokens in and out, health, what is loaded, and stopping what runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, Field

from llamaserve.api.accounting import account, metered
from llamaserve.api.adapters import adapters_for
from llamaserve.api.caller import caller
from llamaserve.api.fields import Text, whole
from llamaserve.api.generating import Job, generate_whole, new_id, unless_client_leaves
from llamaserve.api.logprobs import probabilities
from llamaserve.api.models import capabilities
from llamaserve.api.options import GenerationOptions, asked_of
from llamaserve.api.request_defaults import with_defaults
from llamaserve.api.services import UsesServices
from llamaserve.engine.params import LoadParams, NextToken
from llamaserve.errors import LlamaserveError
from llamaserve.registry.load_args import effective
from llamaserve.registry.served import ServedModel
from llamaserve.speech.values import TranscriberParams
from llamaserve.worker.protocol import Prompt

router = APIRouter(tags=["internal"])

_METERED = [Depends(metered)]
_MAX_TOKEN_ID = 2**31 - 1


class TextRequest(BaseModel):
    """A text to be tokenised."""

    text: Text
    model: str | None = None
    add_bos_token: bool = Field(default=True, description="Put the begin token first, if the model has one.")
    parse_special: bool = Field(default=True, description="Read the names of control tokens as those tokens.")


class TokensRequest(BaseModel):
    """Token ids to be turned into text."""

    tokens: list[Annotated[int, Field(strict=True, ge=0, le=_MAX_TOKEN_ID), BeforeValidator(whole)]]
    model: str | None = None
    skip_special_tokens: bool = Field(default=False, description="Leave out control tokens.")


class StopRequest(BaseModel):
    """Which generation to stop."""

    id: str | None = Field(None, description="The id of a completion under way; null stops all.")


async def _tokens(body: TextRequest, services: UsesServices) -> list[int]:
    model = services.pool.get(body.model)
    await account().turn(model.name)
    async with model.in_use() as worker:
        return await worker.tokenize(body.text, add_bos=body.add_bos_token, parse_special=body.parse_special)


@router.post("/v1/internal/encode", summary="Turn text into token ids", dependencies=_METERED)
async def encode(body: TextRequest, services: UsesServices) -> dict[str, Any]:
    """Return the token ids of the text and their number."""
    tokens = await _tokens(body, services)
    return {"tokens": tokens, "length": len(tokens)}


@router.post("/v1/internal/token-count", summary="Count the tokens of a text", dependencies=_METERED)
async def token_count(body: TextRequest, services: UsesServices) -> dict[str, int]:
    """Return the number of tokens of the text, begin token included."""
    return {"length": len(await _tokens(body, services))}


@router.post("/v1/internal/decode", summary="Turn token ids into text", dependencies=_METERED)
async def decode(body: TokensRequest, services: UsesServices) -> dict[str, str]:
    """Return the text of the token ids; bytes that are no UTF-8 become U+FFFD."""
    model = services.pool.get(body.model)
    await account().turn(model.name)
    async with model.in_use() as worker:
        return {"text": await worker.detokenize(body.tokens, special=not body.skip_special_tokens)}


class LogitsRequest(GenerationOptions):
    """A prompt of which the next token is asked for."""

    may_generate_nothing = True

    prompt: Text
    use_samplers: bool = Field(default=False, description="After the bans and stages of the sampler; else the model's.")
    top_logits: int = Field(50, ge=1, le=_MAX_TOKEN_ID, description="How many of the most probable tokens.")


@router.post("/v1/internal/logits", summary="How probable is each next token?", dependencies=_METERED)
async def logits(body: LogitsRequest, request: Request, services: UsesServices) -> Response:
    """Return a map from the most probable next tokens to their probabilities."""
    model = services.pool.get(body.model)
    body = with_defaults(body, model.defaults)
    wanted = NextToken(body.top_logits, sampled=body.use_samplers)
    generation = body.generation(services.presets, next_token=wanted, adapters=adapters_for(model, body.lora))
    nothing = {"max_tokens": 0, "choices": 1, "stream": False}
    generation = msgspec.structs.replace(generation, **nothing)

    async def prompts() -> Sequence[Prompt]:
        return [body.prompt]

    async def answer() -> Response:
        job = Job(new_id("logits"), model, generation, prompts, param="prompt", sequences=1)
        job.keep_alive = body.keep_alive
        with asked_of(body.model):
            (finished,), _ = await generate_whole(services, job)
        return JSONResponse(probabilities(finished.next_tokens), headers=body.ignored_header(services.presets))

    return await unless_client_leaves(request, answer())


@router.post("/v1/internal/stop-generation", summary="Stop generating")
async def stop_generation(services: UsesServices, body: StopRequest | None = None) -> str:
    """End one generation, or all, with a normal finish and the text so far. Answers at once, also when nothing runs.
    With a key that is no admin's, these are the generations that the key has asked for.
    """
    asking = caller()
    if asking.admin and (body is None or body.id is None):
        services.pool.stop_all()
        return "OK"
    for name, running in services.running.items():
        mine = asking.admin or running.owner == asking.name
        if mine and (body is None or body.id in (None, name)):
            running.stream.stop()
    return "OK"


@router.head("/health", include_in_schema=False)
@router.get("/health", summary="Is the server up?")
async def health() -> dict[str, str]:
    """Answer as soon as the server takes requests, whatever the models do."""
    return {"status": "ok"}


@router.head("/v1/internal/health", include_in_schema=False)
@router.get("/v1/internal/health", summary="Is the server up, and how busy is it?")
async def internal_health(services: UsesServices) -> dict[str, Any]:
    """Return the number of sequences being evaluated and waiting, and each model's state. Without a key, where the
    server has any, it is only said that it is up.
    """
    if caller().is_stranger:
        return {"status": "ok"}
    occupancy = services.pool.occupancy
    return {
        "status": "ok",
        "running": occupancy.running,
        "waiting": occupancy.waiting,
        "models": {model.name: model.status.value for model in services.pool.models},
    }


@router.get("/v1/internal/model/info", summary="What is loaded?")
def model_info(services: UsesServices) -> dict[str, Any]:
    """Describe the current model; ``"None"``, as a word, is the name when there is none."""
    model = services.pool.current
    if model is None:
        return {"model_name": "None", "lora_names": [], "loader": None}
    worker = model.live_worker
    info: dict[str, Any] = {"model_name": model.name, "lora_names": [], "loader": "llama.cpp"}
    info |= {"status": model.status.value, "gpu": worker.gpu if worker else None, "pid": worker.pid if worker else None}
    info["capabilities"] = capabilities(model)
    try:
        params = model.load_params()
        if not isinstance(params, LoadParams):
            loader = "whisper.cpp" if isinstance(params, TranscriberParams) else "stable-diffusion.cpp"
            return info | {"loader": loader, "args": effective(params), "memory": _memory(model)}
        header = model.header
        info["lora_names"] = [adapter.name for adapter in model.adapters]
    except LlamaserveError as error:
        return info | {"error": error.message}
    return info | {
        "ctx_size": params.context,
        "n_vocab": header.vocabulary_size,
        "chat_template": header.chat_template,
        "args": effective(params),
        "lora": [{"name": adapter.name, "scale": adapter.scale} for adapter in model.adapters],
        "memory": _memory(model),
    }


def _memory(model: ServedModel) -> dict[str, Any]:
    """Return what the last load was planned to take, and what it took, in bytes."""
    if model.plan is None:
        return {"estimated": None, "measured": None}
    parts = model.plan.estimate
    estimated = {
        "host": parts.total.host,
        "gpu": parts.total.device,
        "weights": parts.weights.host + parts.weights.device,
        "cache": parts.cache.host + parts.cache.device,
        "compute": parts.compute.host + parts.compute.device,
        "vocabulary": parts.vocabulary,
    }
    measured = model.measured and {"host": model.measured.host, "gpu": model.measured.device}
    return {
        "estimated": estimated,
        "measured": measured,
        "planned": model.plan.need.host,
        "spill": getattr(model.plan.params, "spill", 0),
    }
