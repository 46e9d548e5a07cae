"""``POST /v1/completions``: text that continues a prompt, OpenAI's legacy endpoint. No chat template is applied."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BeforeValidator, Field, WithJsonSchema

from llamaserve.api.accounting import metered
from llamaserve.api.adapters import adapters_for
from llamaserve.api.fields import Text, check_text
from llamaserve.api.fim_prompt import Gaps, fim_prompts, fim_tokens
from llamaserve.api.generating import (
    Job,
    TextChunks,
    generate_whole,
    new_id,
    stream_response,
    unless_client_leaves,
)
from llamaserve.api.logprobs import Echo, for_completion
from llamaserve.api.options import MAX_SEQUENCES, GenerationOptions, asked_of
from llamaserve.api.request_defaults import with_defaults
from llamaserve.api.services import UsesServices
from llamaserve.engine.events import Delta, Finished, FinishReason
from llamaserve.engine.params import Logprobs
from llamaserve.registry.tasks import GENERATING
from llamaserve.worker.protocol import Prompt

router = APIRouter(tags=["generation"], dependencies=[Depends(metered)])

_MAX_TOKEN_ID = 2**31 - 1
_MAX_TOKENS = 1024 * 1024  # of all prompts together; more could not fit, and looking at each takes time
_TOKEN_SCHEMA = {"type": "integer", "minimum": 0, "maximum": _MAX_TOKEN_ID}


def _list_of(schema: dict[str, Any], most: int = MAX_SEQUENCES) -> dict[str, Any]:
    return {"type": "array", "items": schema, "minItems": 1, "maxItems": most}


_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        _list_of({"type": "string"}),
        _list_of(_TOKEN_SCHEMA, _MAX_TOKENS),
        _list_of(_list_of(_TOKEN_SCHEMA, _MAX_TOKENS)),
    ]
}


def _prompts(value: Any) -> list[Prompt]:
    """Take a string, a list of strings, one list of token ids, or a list of such lists."""
    if isinstance(value, list) and value and isinstance(value[0], int):
        value = [value]
    prompts = value if isinstance(value, list) else [value]
    if not prompts:
        raise ValueError("the list is empty; it needs at least one prompt")
    if len(prompts) > MAX_SEQUENCES:
        raise ValueError(f"there are {len(prompts)} prompts; at most {MAX_SEQUENCES} are taken")
    if sum(len(prompt) for prompt in prompts if isinstance(prompt, list)) > _MAX_TOKENS:
        raise ValueError(f"there are more than {_MAX_TOKENS} token ids")
    for prompt in prompts:
        if isinstance(prompt, str):
            check_text(prompt)
        elif not isinstance(prompt, list) or not all(_is_token(token) for token in prompt):
            raise ValueError("must be a string, a list of strings, a list of token ids or a list of lists of token ids")
    return prompts


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_TOKEN_ID


class CompletionRequest(GenerationOptions):
    """A request to continue text."""

    may_generate_nothing = True

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)] = Field(
        description="One text or several, or token ids of the model's own vocabulary."
    )
    echo: bool = Field(default=False, description="Put the prompt before each answer.")
    logprobs: int | None = Field(
        None, ge=0, le=20, description="Report the log-probabilities of the tokens, and of so many in their places."
    )
    suffix: Text | None = Field(None, description="Text behind the gap that the answer fills.")
    suffix_mode: Literal["fim", "append"] = Field(
        "fim", description="append: the model does not see the suffix; it is put behind the answer."
    )

    @property
    def gap(self) -> str:
        """The text behind the gap that is to be filled; empty when there is none."""
        return self.suffix or "" if self.suffix_mode == "fim" else ""

    @property
    def appendix(self) -> str:
        """What comes behind each answer."""
        return self.suffix or "" if self.suffix_mode == "append" else ""

    def _idle(self) -> Iterator[str]:
        yield from super()._idle()
        if self.suffix_mode == "append" and not self.suffix:
            yield "suffix_mode"


@router.post("/v1/completions", summary="Continue text")
async def create_completion(body: CompletionRequest, request: Request, services: UsesServices) -> Response:
    """Answer with one choice for each prompt and each of its ``n`` answers."""

    async def prompts() -> Sequence[Prompt]:
        if marks is None:
            return body.prompt
        filled = await fim_prompts(job, marks, Gaps(body.prompt, body.gap))
        if body.echo and logprobs is not None:  # which are of all that the model sees
            echoes.prompts = filled
        return filled

    model = services.pool.get(body.model)
    with asked_of(body.model):
        await model.require(*GENERATING)
    body = with_defaults(body, model.defaults)
    logprobs = Logprobs(body.logprobs, prompt=body.echo) if body.logprobs is not None else None
    truncate = body.truncation_length > 0 and not body.gap
    adapters = adapters_for(model, body.lora)
    others = {"truncate": truncate, "logprobs": logprobs, "adapters": adapters}
    generation = body.generation(services.presets, len(body.prompt), **others)
    sequences = len(body.prompt) * generation.choices
    marks = await fim_tokens(model) if body.gap else None
    job = Job(new_id("cmpl"), model, generation, prompts, param="prompt", sequences=sequences)
    job.tokens_per_second = body.max_tokens_second
    job.keep_alive = body.keep_alive
    job.headers = body.ignored_header(services.presets)
    echoes = _Echoes(job, body.prompt if body.echo else [])
    if body.stream:
        chunks = _Chunks(job, echoes, body.appendix, include_usage=body.include_usage)
        return await stream_response(services, job, chunks, include_usage=body.include_usage)

    async def answer() -> Response:
        answers, usage = await generate_whole(services, job, echoes.resolve)
        choices = [_whole(job, each, echoes.of(each.index), body.appendix) for each in answers]
        return JSONResponse(_body(job, choices) | {"usage": usage}, headers=job.headers)

    return await unless_client_leaves(request, answer())


class _Echoes:
    """The prompts as text, to put before the answers; token ids are turned into text by the model."""

    def __init__(self, job: Job, prompts: Sequence[Prompt]) -> None:
        self.prompts = prompts
        self._job = job
        self._texts: list[str] = []

    async def resolve(self) -> None:
        """Get the texts; the job must be open."""
        self._texts = await asyncio.gather(*(self._text(prompt) for prompt in self.prompts))

    async def _text(self, prompt: Prompt) -> str:
        if isinstance(prompt, str):
            return prompt
        return await (await self._job.worker()).detokenize(prompt, special=True)

    def of(self, index: int) -> str:
        """Return what comes before the answer of this index."""
        return self._texts[index // self._job.generation.choices] if self._texts else ""


def _whole(job: Job, answer: Finished, prompt: str, appendix: str) -> dict[str, Any]:
    text = answer.text + appendix
    if not job.generation.logprobs:
        return _choice(answer.index, prompt + text, answer.reason)
    echo = Echo(prompt, answer.prompt_logprobs)
    return _choice(answer.index, echo.text + text, answer.reason, for_completion(answer.logprobs, echo))


def _choice(
    index: int, text: str, reason: FinishReason | None, logprobs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _body(job: Job, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": job.id,
        "object": "text_completion",
        "created": job.created,
        "model": job.model.name,
        "system_fingerprint": None,
        "seed": job.generation.sampling.seed,
        "choices": choices,
    }


class _Chunks(TextChunks):
    """The chunks of a streamed completion; every one carries ``usage: null`` when usage is wanted at the end."""

    def __init__(self, job: Job, echoes: _Echoes, appendix: str, *, include_usage: bool) -> None:
        super().__init__()
        self._job = job
        self._echoes = echoes
        self._appendix = appendix
        self._echoed: dict[int, int] = {}  # characters before each answer
        self._extra: dict[str, Any] = {"usage": None} if include_usage else {}

    async def start(self) -> Sequence[Mapping[str, Any]]:
        await self._echoes.resolve()
        if self._job.generation.logprobs:  # a prompt's come with its first piece, and the echo with them
            return []
        count = len(self._job.prompt_tokens) * self._job.generation.choices
        return [self.text(index, echo) for index in range(count) if (echo := self._echoes.of(index))]

    def text(self, index: int, text: str) -> Mapping[str, Any]:
        return _body(self._job, [_choice(index, text, None)]) | self._extra

    def with_logprobs(self, piece: Delta | Finished) -> Mapping[str, Any]:
        if not piece.prompt_logprobs:
            logprobs = for_completion(piece.logprobs, after=self._echoed.get(piece.index, 0))
            return _body(self._job, [_choice(piece.index, piece.text, None, logprobs)]) | self._extra
        echo = Echo(self._echoes.of(piece.index), piece.prompt_logprobs)
        self._echoed[piece.index] = len(echo.text)
        logprobs = for_completion(piece.logprobs, echo)
        return _body(self._job, [_choice(piece.index, echo.text + piece.text, None, logprobs)]) | self._extra

    def finish(self, index: int, reason: FinishReason) -> Mapping[str, Any]:
        return _body(self._job, [_choice(index, self._appendix, reason)]) | self._extra

    def usage(self, usage: Mapping[str, Any]) -> Mapping[str, Any]:
        return _body(self._job, []) | {"usage": usage}
