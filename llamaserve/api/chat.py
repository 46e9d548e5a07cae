"""``POST /v1/chat/completions``: the next message of a conversation. ``POST /v1/internal/chat-prompt``: its prompt."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from llamaserve.api.accounting import metered
from llamaserve.api.adapters import adapters_for
from llamaserve.api.chat_answers import AnswerStyle, Chunks, answer_object, choice, truncated
from llamaserve.api.chat_options import ChatRequest
from llamaserve.api.generating import Job, generate_whole, new_id, stream_response, unless_client_leaves
from llamaserve.api.options import IGNORED_HEADER, TRUNCATED_HEADER, asked_of
from llamaserve.api.request_defaults import with_defaults
from llamaserve.api.services import Services, UsesServices
from llamaserve.chat.modes import NO_TEMPLATE, ModelTemplate
from llamaserve.chat.preparation import ChatWish, Prepared
from llamaserve.errors import ChatTemplateError, UnsupportedParameter
from llamaserve.registry.served import ServedModel, Use
from llamaserve.registry.tasks import GENERATING
from llamaserve.worker.protocol import Prompt

router = APIRouter(dependencies=[Depends(metered)])

Count = Callable[[str], Awaitable[int]]

_RESERVED = 512  # tokens kept for an answer of which the length is not said, but at most a quarter of the context
_LONG = 16  # characters a token: a prompt that is longer is not tokenised to see that it is too long
_KEYWORD = re.compile(r'"([\w$]+)"')


@router.post("/v1/chat/completions", summary="Answer a conversation", tags=["generation"])
async def create_chat_completion(body: ChatRequest, request: Request, services: UsesServices) -> Response:
    """Answer with ``n`` messages."""
    model = services.pool.get(body.model)
    with asked_of(body.model):
        await model.require(*GENERATING)
    body = with_defaults(body, model.defaults)
    wish = body.wish(services, await _template_of(model))
    prepared = await _prepared(services, body, wish)
    job = _job(services, model, body, wish, prepared)
    legacy = wish.toolbox is not None and wish.toolbox.legacy
    style = AnswerStyle(body.thought_fields(services.settings.reasoning_field), legacy)
    if body.stream:
        chunks = Chunks(job, prepared.reader, prepared.begun, style, include_usage=body.include_usage)
        return await stream_response(services, job, chunks, include_usage=body.include_usage)

    async def answer() -> Response:
        answers, usage = await generate_whole(services, job)
        choices = [choice(job, each, prepared.reader(), prepared.begun, style) for each in answers]
        whole = answer_object(job, "chat.completion", choices) | {"usage": usage}
        return JSONResponse(whole, headers=job.headers)

    return await unless_client_leaves(request, answer())


@router.post("/v1/internal/chat-prompt", summary="What would the model be given?", tags=["internal"])
async def chat_prompt(body: ChatRequest, request: Request, services: UsesServices) -> Response:
    """Return the text that a chat completion with this body gives to the model. No model is loaded for it, unless the
    conversation is to be shortened; and none is needed for a template that the request brings or names.
    """

    async def answer() -> Response:
        model = services.pool.current if body.model is None else services.pool.get(body.model)
        filled = body if model is None else with_defaults(body, model.defaults)
        wish = filled.wish(services, NO_TEMPLATE if model is None else await _template_of(model))
        if model is None and wish.needs_model:
            services.pool.get(None)
        prepared = await _prepared(services, filled, wish)
        shortening = "truncation" if filled.truncation else "truncation_length"
        idle = [filled.called(shortening)] if model is None and filled.shortens else []
        headers = _headers(services, filled, prepared, idle)
        if filled.shortens and model is not None:
            use = model.use()
            try:
                prepared = await _shortened(services, model, filled, wish, use)
            finally:
                use.leave()
        found = {"prompt": prepared.prompt, "stop": [*filled.stop, *prepared.stop]} | truncated(prepared.dropped)
        return JSONResponse(found, headers=headers | _truncated_header(prepared.dropped))

    return await unless_client_leaves(request, answer())


async def _template_of(model: ServedModel) -> ModelTemplate:
    header = await model.file.read()
    return ModelTemplate(header.chat_template or None, header.bos_token, header.eos_token)


async def _prepared(
    services: Services, body: ChatRequest, wish: ChatWish, room: int | None = None, count: Count | None = None
) -> Prepared:
    try:
        return await services.conversations.prepare(wish, room=room, count=count)
    except ChatTemplateError as error:
        error.param = error.param or body.own_template or "messages"
        raise


async def _shortened(services: Services, model: ServedModel, body: ChatRequest, wish: ChatWish, use: Use) -> Prepared:
    """Leave out what the context has no room for, which the model's own process counts; it is loaded for that."""
    worker = await use.worker()
    context = min(model.context, body.truncation_length or model.context)
    wanted = min(_RESERVED, context // 4) if body.answer_tokens is None else body.answer_tokens
    room = context - min(wanted, context // 2)

    async def count(prompt: str) -> int:
        if len(prompt) > _LONG * context:
            return len(prompt)
        return len(await worker.tokenize(prompt, add_bos=body.add_bos_token, parse_special=True))

    return await _prepared(services, body, wish, room, count)


def _job(services: Services, model: ServedModel, body: ChatRequest, wish: ChatWish, prepared: Prepared) -> Job:
    async def prompts() -> Sequence[Prompt]:
        """Return the one prompt. How a conversation ends does not change when its beginning is left out, and so neither
        does how the answer is read.
        """
        if not body.shortens:
            return [prepared.prompt]
        assert job.use is not None
        shortened = await _shortened(services, model, body, wish, job.use)
        job.dropped_messages = shortened.dropped
        job.headers |= _truncated_header(shortened.dropped)
        return [shortened.prompt]

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
    job.keep_alive = body.keep_alive
    job.headers = _headers(services, body, prepared)
    return job


def _truncated_header(messages: int) -> dict[str, str]:
    return {TRUNCATED_HEADER: f"{messages} messages"} if messages else {}


def _headers(services: Services, body: ChatRequest, prepared: Prepared, others: Sequence[str] = ()) -> dict[str, str]:
    """Return the headers that say what has no effect, ``others`` too. Raises ``UnsupportedParameter`` if nothing may be
    without.
    """
    idle = [*others, *(name for place, words in prepared.relaxed.items() for name in _keywords(place, words))]
    if body.changes(ChatRequest).get("reasoning_budget", -1) != -1 and not prepared.thinks:
        idle.append(body.called("reasoning_budget"))
    if idle and body.strict:
        raise UnsupportedParameter(f"strict: {', '.join(idle)} would have no effect", param=idle[0])
    headers = body.ignored_header(services.presets)
    if idle:
        headers[IGNORED_HEADER] = ", ".join([*filter(None, [headers.get(IGNORED_HEADER)]), *idle[:64]])
    return headers


def _keywords(place: str, words: str) -> list[str]:
    """Return the places of the keywords that llguidance's words are about."""
    return [f"{place}.{keyword}" for keyword in _KEYWORD.findall(words)] or [place]
