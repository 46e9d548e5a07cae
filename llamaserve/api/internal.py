"""The small endpoints: tokens in and out, health, what is loaded, and stopping what runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from llamaserve.api.fields import Text
from llamaserve.api.generating import Job, generate_whole, new_id, unless_client_leaves
from llamaserve.api.logprobs import probabilities
from llamaserve.api.models import capabilities
from llamaserve.api.options import GenerationOptions
from llamaserve.api.services import UsesServices
from llamaserve.engine.params import NextToken
from llamaserve.errors import LlamaserveError
from llamaserve.worker.protocol import Prompt

router = APIRouter(tags=["internal"])

_MAX_TOKEN_ID = 2**31 - 1


class TextRequest(BaseModel):
    """A text to be tokenised."""

    text: Text
    model: str | None = None
    add_bos_token: bool = Field(default=True, description="Put the begin token first, if the model has one.")
    parse_special: bool = Field(default=True, description="Read the names of control tokens as those tokens.")


class TokensRequest(BaseModel):
    """Token ids to be turned into text."""

    tokens: list[Annotated[int, Field(ge=0, le=_MAX_TOKEN_ID)]]
    model: str | None = None
    skip_special_tokens: bool = Field(default=False, description="Leave out control tokens.")


class StopRequest(BaseModel):
    """Which generation to stop."""

    id: str | None = Field(None, description="The id of a completion under way; null stops all.")


async def _tokens(body: TextRequest, services: UsesServices) -> list[int]:
    worker = await services.pool.get(body.model).worker()
    return await worker.tokenize(body.text, add_bos=body.add_bos_token, parse_special=body.parse_special)


@router.post("/v1/internal/encode", summary="Turn text into token ids")
async def encode(body: TextRequest, services: UsesServices) -> dict[str, Any]:
    """Return the token ids of the text and their number."""
    tokens = await _tokens(body, services)
    return {"tokens": tokens, "length": len(tokens)}


@router.post("/v1/internal/token-count", summary="Count the tokens of a text")
async def token_count(body: TextRequest, services: UsesServices) -> dict[str, int]:
    """Return the number of tokens of the text, begin token included."""
    return {"length": len(await _tokens(body, services))}


@router.post("/v1/internal/decode", summary="Turn token ids into text")
async def decode(body: TokensRequest, services: UsesServices) -> dict[str, str]:
    """Return the text of the token ids; bytes that are no UTF-8 become U+FFFD."""
    worker = await services.pool.get(body.model).worker()
    return {"text": await worker.detokenize(body.tokens, special=not body.skip_special_tokens)}


class LogitsRequest(GenerationOptions):
    """A prompt of which the next token is asked for."""

    may_generate_nothing = True

    prompt: Text
    use_samplers: bool = Field(default=False, description="After the bans and stages of the sampler; else the model's.")
    top_logits: int = Field(50, ge=1, le=_MAX_TOKEN_ID, description="How many of the most probable tokens.")


@router.post("/v1/internal/logits", summary="How probable is each next token?")
async def logits(body: LogitsRequest, request: Request, services: UsesServices) -> Response:
    """Return a map from the most probable next tokens to their probabilities."""
    wanted = NextToken(body.top_logits, sampled=body.use_samplers)
    generation = body.generation(services.presets, next_token=wanted)
    nothing = {"max_tokens": 0, "choices": 1, "stream": False}
    generation = msgspec.structs.replace(generation, **nothing)

    async def prompts() -> Sequence[Prompt]:
        return [body.prompt]

    async def answer() -> Response:
        job = Job(new_id("logits"), services.pool.get(body.model), generation, prompts, param="prompt", sequences=1)
        (finished,), _ = await generate_whole(services, job)
        return JSONResponse(probabilities(finished.next_tokens), headers=body.ignored_header(services.presets))

    return await unless_client_leaves(request, answer())


@router.post("/v1/internal/stop-generation", summary="Stop generating")
async def stop_generation(services: UsesServices, body: StopRequest | None = None) -> str:
    """End one generation, or all, with a normal finish and the text so far. Answers at once, also when nothing runs."""
    if body is None or body.id is None:
        services.pool.stop_all()
    elif (stream := services.running.get(body.id)) is not None:
        stream.stop()
    return "OK"


@router.get("/health", summary="Is the server up?")
async def health() -> dict[str, str]:
    """Answer as soon as the server takes requests, whatever the models do."""
    return {"status": "ok"}


@router.get("/v1/internal/health", summary="Is the server up, and how busy is it?")
async def internal_health(services: UsesServices) -> dict[str, Any]:
    """Return the number of sequences being evaluated and waiting, and each model's state."""
    occupancy = services.pool.occupancy
    return {
        "status": "ok",
        "running": occupancy.running,
        "waiting": occupancy.waiting,
        "models": {model.name: model.supervisor.status.value for model in services.pool.models},
    }


@router.get("/v1/internal/model/info", summary="What is loaded?")
def model_info(services: UsesServices) -> dict[str, Any]:
    """Describe the first model; ``"None"``, as a word, is the name when there is none."""
    if not services.pool.models:
        return {"model_name": "None", "lora_names": [], "loader": None}
    model = services.pool.get(None)
    info: dict[str, Any] = {"model_name": model.name, "lora_names": [], "loader": "llama.cpp"}
    info |= {"status": model.supervisor.status.value, "gpu": model.supervisor.gpu}
    info["capabilities"] = capabilities(model)
    try:
        header, params = model.header, model.load_params()
    except LlamaserveError as error:
        return info | {"error": error.message}
    args = msgspec.to_builtins(params)
    del args["path"]
    return info | {
        "ctx_size": params.context,
        "n_vocab": header.vocabulary_size,
        "chat_template": header.chat_template,
        "args": args,
    }
