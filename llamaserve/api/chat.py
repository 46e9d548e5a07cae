"""``POST /v1/chat/completions``: the next message of a conversation. ``POST /v1/internal/chat-prompt``: its prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from llamaserve.api.adapters import adapters_for
from llamaserve.api.chat_answers import AnswerStyle, Chunks, answer_object, choice
from llamaserve.api.chat_options import ChatRequest
from llamaserve.api.generating import Job, generate_whole, new_id, stream_response, unless_client_leaves
from llamaserve.api.options import IGNORED_HEADER
from llamaserve.api.request_defaults import with_defaults
from llamaserve.api.services import Services, UsesServices
from llamaserve.chat.preparation import ChatWish, Prepared
from llamaserve.errors import ChatTemplateError, UnsupportedParameter
from llamaserve.registry.served import ServedModel, Use
from llamaserve.worker.protocol import Prompt

router = APIRouter()

TRUNCATED_HEADER = "x-llamaserve-truncated"
_RESERVED = 512  # tokens kept for an answer of which the length is not said, but at most a quarter of the context
_LONG = 16  # characters a token: a prompt that is longer is not tokenised to see that it is too long
_KEYWORD = re.compile(r'"([\w$]+)"')


@router.post("/v1/chat/completions", summary="Answer a conversation", tags=["generation"])
async def create_chat_completion(body: ChatRequest, request: Request, services: UsesServices) -> Response:
    """Answer with ``n`` messages."""
    model = services.pool.get(body.model)
    body = with_defaults(body, model.defaults)
    use = model.use(body.keep_alive)
    try:
        wish = body.wish(services, await model.file.read())
        prepared = await _prepare(services, model, body, wish, use)
        job = _job(services, model, body, prepared)
        headers = _headers(services, body, prepared)
    except BaseException:
        use.leave()
        raise
    job.use = use
    legacy = wish.toolbox is not None and wish.toolbox.legacy
    style = AnswerStyle(body.thought_fields(services.settings.reasoning_field), legacy, _truncated(prepared))
    if body.stream:
        chunks = Chunks(job, prepared.reader, prepared.begun, style, include_usage=body.include_usage)
        return await stream_response(services, job, chunks, include_usage=body.include_usage, headers=headers)

    async def answer() -> Response:
        answers, usage = await generate_whole(services, job)
        choices = [choice(job, each, prepared.reader(), prepared.begun, style) for each in answers]
        return JSONResponse(answer_object(job, "chat.completion", choices, style) | {"usage": usage}, headers=headers)

    return await unless_client_leaves(request, answer())


@router.post("/v1/internal/chat-prompt", summary="What would the model be given?", tags=["internal"])
async def chat_prompt(body: ChatRequest, request: Request, services: UsesServices) -> Response:
    """Return the text that a chat completion with this body gives to the model. No model is loaded for it, unless the
    conversation is to be shortened.
    """

    async def answer() -> Response:
        model = services.pool.get(body.model)
        filled = with_defaults(body, model.defaults)
        model.hold()  # how long it stays is for answers to say
        use = Use(model)
        try:
            prepared = await _prepare(services, model, filled, filled.wish(services, await model.file.read()), use)
        finally:
            use.leave()
        found = {"prompt": prepared.prompt, "stop": [*filled.stop, *prepared.stop]} | _truncated(prepared)
        return JSONResponse(found, headers=_headers(services, filled, prepared))

    return await unless_client_leaves(request, answer())


async def _prepare(services: Services, model: ServedModel, body: ChatRequest, wish: ChatWish, use: Use) -> Prepared:
    try:
        return await _prepared(services, model, body, wish, use)
    except ChatTemplateError as error:
        error.param = error.param or body.own_template or "messages"
        raise


async def _prepared(services: Services, model: ServedModel, body: ChatRequest, wish: ChatWish, use: Use) -> Prepared:
    if not body.shortens:
        return await services.conversations.prepare(wish)
    context = min(model.context, body.truncation_length or model.context)
    wanted = min(_RESERVED, context // 4) if body.answer_tokens is None else body.answer_tokens
    room = context - min(wanted, context // 2)

    async def count(prompt: str) -> int:
        if len(prompt) > _LONG * context:
            return len(prompt)
        worker = await use.worker()
        return len(await worker.tokenize(prompt, add_bos=body.add_bos_token, parse_special=True))

    return await services.conversations.prepare(wish, room=room, count=count)


def _job(services: Services, model: ServedModel, body: ChatRequest, prepared: Prepared) -> Job:
    async def prompts() -> Sequence[Prompt]:
        return [prepared.prompt]

    generation = body.generation(
        services.presets,
        logprobs=body.wanted_logprobs(),
        constraint=prepared.constraint,
        stop=(*body.stop, *prepared.stop),
        shown=prepared.shown,
        thinking=prepared.thinking,
        adapters=adapters_for(model, body.lora),
    )
    job = Job(new_id("chatcmpl"), model, generation, prompts, param="messages", sequences=body.n)
    job.tokens_per_second = body.max_tokens_second
    return job


def _truncated(prepared: Prepared) -> dict[str, Any]:
    return {"truncated_messages": prepared.dropped} if prepared.dropped else {}


def _headers(services: Services, body: ChatRequest, prepared: Prepared) -> dict[str, str]:
    """Return the headers that say what was left out. Raises ``UnsupportedParameter`` if nothing may be."""
    idle = [name for place, words in prepared.relaxed.items() for name in _keywords(place, words)]
    if body.changes(ChatRequest).get("reasoning_budget", -1) != -1 and not prepared.thinks:
        idle.append(body.called("reasoning_budget"))
    if idle and body.strict:
        raise UnsupportedParameter(f"strict: {', '.join(idle)} would have no effect", param=idle[0])
    headers = body.ignored_header(services.presets)
    if idle:
        headers[IGNORED_HEADER] = ", ".join([*filter(None, [headers.get(IGNORED_HEADER)]), *idle[:64]])
    if prepared.dropped:
        headers[TRUNCATED_HEADER] = f"{prepared.dropped} messages"
    return headers


def _keywords(place: str, words: str) -> list[str]:
    """Return the places of the keywords that llguidance's words are about."""
    return [f"{place}.{keyword}" for keyword in _KEYWORD.findall(words)] or [place]
