"""``POST /v1/chat/completions``: the next message of a conversation, through the model's own chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from llamaserve.api.generating import Job, generate_whole, new_id, stream_response, unless_client_leaves
from llamaserve.api.logprobs import for_chat
from llamaserve.api.options import GenerationOptions
from llamaserve.api.services import Services, UsesServices
from llamaserve.chat.messages import normalise
from llamaserve.chat.template import RenderJob
from llamaserve.engine.events import Delta, Finished, FinishReason
from llamaserve.engine.params import Logprobs
from llamaserve.errors import InvalidRequest, ModelNotCapable
from llamaserve.registry.pool import ServedModel
from llamaserve.worker.protocol import Prompt

router = APIRouter(tags=["generation"])


class ChatRequest(GenerationOptions):
    """A request for the next message."""

    messages: list[dict[str, Any]] = Field(
        description="The conversation; roles system, developer, user and assistant, content as text or text parts.",
        examples=[[{"role": "user", "content": "Why is the sky blue?"}]],
    )
    logprobs: bool = Field(default=False, description="Report the log-probabilities of the answer's tokens.")
    top_logprobs: int = Field(0, ge=0, le=20, description="And of so many of the most probable ones in their places.")

    def wanted_logprobs(self) -> Logprobs | None:
        """Return which log-probabilities are asked for."""
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        return Logprobs(self.top_logprobs) if self.logprobs else None


@router.post("/v1/chat/completions", summary="Answer a conversation")
async def create_chat_completion(body: ChatRequest, request: Request, services: UsesServices) -> Response:
    """Answer with ``n`` messages."""
    messages = normalise(body.messages)
    model = services.pool.get(body.model)

    async def prompts() -> Sequence[Prompt]:
        return [await _render(services, model, messages)]

    generation = body.generation(services.presets, logprobs=body.wanted_logprobs())
    job = Job(new_id("chatcmpl"), model, generation, prompts, param="messages", sequences=body.n)
    job.tokens_per_second = body.max_tokens_second
    headers = body.ignored_header(services.presets)
    if body.stream:
        chunks = _Chunks(job, include_usage=body.include_usage)
        return await stream_response(services, job, chunks, include_usage=body.include_usage, headers=headers)

    async def answer() -> Response:
        answers, usage = await generate_whole(services, job)
        choices = [_choice(job, answer) for answer in answers]
        return JSONResponse(_body(job, "chat.completion", choices) | {"usage": usage}, headers=headers)

    return await unless_client_leaves(request, answer())


async def _render(services: Services, model: ServedModel, messages: list[dict[str, Any]]) -> str:
    header = model.header
    if not header.chat_template:
        raise ModelNotCapable(
            f"{model.name} has no chat template, so it was probably not trained for conversations; "
            "use /v1/completions with the whole text as the prompt",
            param="model",
        )
    return await services.renderer.render(RenderJob(header.chat_template, messages, header.bos_token, header.eos_token))


def _choice(job: Job, answer: Finished) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.text, "refusal": None}
    logprobs = for_chat(answer.logprobs) if job.generation.logprobs else None
    return {"index": answer.index, "message": message, "logprobs": logprobs, "finish_reason": answer.reason}


def _body(job: Job, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": job.id,
        "object": kind,
        "created": job.created,
        "model": job.model.name,
        "system_fingerprint": None,
        "seed": job.generation.sampling.seed,
        "choices": choices,
    }


class _Chunks:
    """The chunks of a streamed answer: the role first, then text, then the reason; ``usage: null`` on every one when
    usage is wanted at the end.
    """

    def __init__(self, job: Job, *, include_usage: bool) -> None:
        self._job = job
        self._extra: dict[str, Any] = {"usage": None} if include_usage else {}

    async def start(self) -> Sequence[Mapping[str, Any]]:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self._chunk(index, delta, None) for index in range(self._job.generation.choices)]

    def text(self, index: int, text: str) -> Mapping[str, Any]:
        return self._chunk(index, {"content": text}, None)

    def with_logprobs(self, piece: Delta | Finished) -> Mapping[str, Any]:
        return self._chunk(piece.index, {"content": piece.text}, None, for_chat(piece.logprobs))

    def finish(self, index: int, reason: FinishReason) -> Mapping[str, Any]:
        return self._chunk(index, {}, reason)

    def usage(self, usage: Mapping[str, Any]) -> Mapping[str, Any]:
        return _body(self._job, "chat.completion.chunk", []) | {"usage": usage}

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, Any],
        reason: FinishReason | None,
        logprobs: Mapping[str, Any] | None = None,
    ) -> Mapping[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return _body(self._job, "chat.completion.chunk", [choice]) | self._extra
