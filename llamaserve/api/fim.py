"""``POST /v1/fim/completions``: what fills the gap between a prompt and a suffix, in the form of a chat's answer.

Mistral's endpoint for code completion, which Continue and others use. Without a suffix the prompt is continued.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from pydantic import AliasChoices, Field

from llamaserve.api.accounting import metered
from llamaserve.api.adapters import adapters_for
from llamaserve.api.fields import Text
from llamaserve.api.fim_prompt import Gaps, fim_prompts, fim_tokens
from llamaserve.api.generating import (
    Job,
    TextChunks,
    generate_whole,
    new_id,
    stream_response,
    unless_client_leaves,
)
from llamaserve.api.options import GenerationOptions, asked_of
from llamaserve.api.request_defaults import with_defaults
from llamaserve.api.services import UsesServices
from llamaserve.engine.events import Delta, Finished, FinishReason
from llamaserve.registry.tasks import GENERATING
from llamaserve.worker.protocol import Prompt

router = APIRouter(tags=["generation"], dependencies=[Depends(metered)])

_INT64 = 2**63 - 1


class FimRequest(GenerationOptions):
    """A request to fill a gap."""

    prompt: Text = Field(description="The text in front of the gap.")
    suffix: Text | None = Field(None, description="The text behind it; null or empty: continue the prompt.")
    seed: int | None = Field(
        None,
        ge=-_INT64,
        le=_INT64,
        validation_alias=AliasChoices("seed", "random_seed"),
        description="Null or -1: a random one.",
    )


@router.post("/v1/fim/completions", summary="Fill in the middle")
async def create_fim_completion(body: FimRequest, request: Request, services: UsesServices) -> Response:
    """Answer with what stands between prompt and suffix, as a chat's message or its pieces."""
    model = services.pool.get(body.model)
    with asked_of(body.model):
        await model.require(*GENERATING)
    body = with_defaults(body, model.defaults)
    truncate = body.truncation_length > 0 and not body.suffix
    generation = body.generation(services.presets, truncate=truncate, adapters=adapters_for(model, body.lora))
    marks = await fim_tokens(model) if body.suffix else None

    async def prompts() -> Sequence[Prompt]:
        return [body.prompt] if marks is None else await fim_prompts(job, marks, Gaps([body.prompt], body.suffix or ""))

    job = Job(new_id("fim"), model, generation, prompts, param="prompt", sequences=generation.choices)
    job.tokens_per_second = body.max_tokens_second
    job.keep_alive = body.keep_alive
    job.headers = body.ignored_header(services.presets)
    if body.stream:
        chunks = _Chunks(job, include_usage=body.include_usage)
        return await stream_response(services, job, chunks, include_usage=body.include_usage)

    async def answer() -> Response:
        answers, usage = await generate_whole(services, job)
        choices = [_choice(each) for each in answers]
        return JSONResponse(_body(job, "chat.completion", choices) | {"usage": usage}, headers=job.headers)

    return await unless_client_leaves(request, answer())


def _choice(answer: Finished) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.text}
    return {"index": answer.index, "message": message, "finish_reason": answer.reason}


def _body(job: Job, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": job.id,
        "object": kind,
        "created": job.created,
        "model": job.model.name,
        "seed": job.generation.sampling.seed,
        "choices": choices,
    }


class _Chunks(TextChunks):
    """The chunks of a streamed answer. Every delta has a content, since clients put together what they find there
    without a look.
    """

    def __init__(self, job: Job, *, include_usage: bool) -> None:
        super().__init__()
        self._job = job
        self._extra: dict[str, Any] = {"usage": None} if include_usage else {}

    async def start(self) -> Sequence[Mapping[str, Any]]:
        return [self._chunk(index, "", None) for index in range(self._job.generation.choices)]

    def text(self, index: int, text: str) -> Mapping[str, Any]:
        return self._chunk(index, text, None)

    def with_logprobs(self, piece: Delta | Finished) -> Mapping[str, Any]:
        return self._chunk(piece.index, piece.text, None)

    def finish(self, index: int, reason: FinishReason) -> Mapping[str, Any]:
        return self._chunk(index, "", reason)

    def usage(self, usage: Mapping[str, Any]) -> Mapping[str, Any]:
        return _body(self._job, "chat.completion.chunk", []) | {"usage": usage}

    def _chunk(self, index: int, text: str, reason: FinishReason | None) -> Mapping[str, Any]:
        choice = {"index": index, "delta": {"role": "assistant", "content": text}, "finish_reason": reason}
        return _body(self._job, "chat.completion.chunk", [choice]) | self._extra
