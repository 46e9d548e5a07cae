"""``POST /infill``: llama-server's endpoint for editors, with its fields, its answer and its stream.

An editor wants a line or two within a moment, so an answer may be given a time and a least indentation. Source:
llama-server's README and what llama.vim and llama.vscode send and read.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from pydantic import AliasChoices, BaseModel, BeforeValidator, Field

from llamaserve.api.accounting import metered
from llamaserve.api.adapters import adapters_for
from llamaserve.api.fields import Text
from llamaserve.api.fim_prompt import Gaps, Snippet, fim_prompts, fim_tokens
from llamaserve.api.generating import (
    Job,
    close_generation,
    count_used,
    let_go_when_over,
    new_id,
    open_early,
    open_generation,
    phase,
    unless_client_leaves,
)
from llamaserve.api.indentation import IndentLimit
from llamaserve.api.options import MAX_SEQUENCES, GenerationOptions, asked_of
from llamaserve.api.sampling_options import Order
from llamaserve.api.services import Services, UsesServices
from llamaserve.api.sse import EventStream, event
from llamaserve.engine.events import Delta, Finished, Progress
from llamaserve.engine.stopping import StopMatcher
from llamaserve.errors import UnsupportedParameter
from llamaserve.registry.gguf import FimTokens
from llamaserve.registry.tasks import GENERATING
from llamaserve.worker.process import GenerationStream
from llamaserve.worker.protocol import Prompt

router = APIRouter(tags=["generation"], dependencies=[Depends(metered)])

T = TypeVar("T")

StopType = Literal["eos", "limit", "word"]

_INT32 = 2**31 - 1
_MAX_SNIPPETS = 1024
_MAX_RESPONSE_FIELDS = 256
_INFILL = "infill"  # llama-server's stage that settles unclear choices by whole words; there is none here
_NO_SLOT = -1
_NO_LIMIT = -1
_MOMENT = 0.05  # seconds
_MISSING = object()
_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty")


def _without_infill(value: Any) -> Any:
    return [name for name in value if name != _INFILL] if isinstance(value, list) else value


class ExtraText(BaseModel):
    """A text from another file."""

    text: Text
    filename: Text | None = None


class InfillRequest(GenerationOptions):
    """A request to fill the gap at an editor's cursor."""

    may_generate_nothing = True

    input_prefix: Text = Field(description="The lines before the cursor's.")
    input_suffix: Text = Field(description="The text after the cursor.")
    input_extra: list[ExtraText] = Field([], max_length=_MAX_SNIPPETS, description="Texts from other files.")
    prompt: Text = Field("", description="What stands in the cursor's line before it.")
    n: int = Field(
        1, ge=1, le=MAX_SEQUENCES, description="There is one answer.", json_schema_extra={"minimum": 1, "maximum": 1}
    )
    n_indent: int = Field(0, ge=0, le=_INT32, description="End before a line that is indented less; 0: don't.")
    t_max_prompt_ms: float = Field(0, ge=-1, le=_INT32, description="Time until the first token; 0 or -1: any.")
    t_max_predict_ms: float = Field(0, ge=-1, le=_INT32, description="Time for more than one line; 0 or -1: any.")
    cache_prompt: bool = Field(default=True, description="False is not honoured.")
    id_slot: int = Field(_NO_SLOT, description="There are no slots; not honoured.")
    response_fields: list[Text] = Field(
        [], max_length=_MAX_RESPONSE_FIELDS, description="What the answer has; a/b is b of a. Empty: everything."
    )
    sampler_priority: Annotated[Order, BeforeValidator(_without_infill)] | None = Field(
        None, max_length=64, validation_alias=AliasChoices("sampler_priority", "samplers"), description="The stages."
    )

    def wants(self, name: str) -> bool:
        """Tell whether a field is to be in the answer."""
        return not self.response_fields or name in self.response_fields

    def _idle(self) -> Iterator[str]:
        yield from super()._idle()
        samplers = self._given.get("sampler_priority", self._given.get("samplers"))
        if isinstance(samplers, list) and _INFILL in samplers:
            yield f"samplers.{_INFILL}"
        if self.max_tokens == 0:
            yield from (name for name in ("t_max_prompt_ms", "t_max_predict_ms") if getattr(self, name) > 0)
        if not self.cache_prompt:
            yield "cache_prompt"
        if self.id_slot != _NO_SLOT:
            yield "id_slot"
        if self.max_tokens_second and self.stream:
            yield "max_tokens_second"
        if self.include_usage and self.stream:
            yield "stream_options"


@router.post("/infill", summary="Fill in the middle, as llama-server does")
async def infill(body: InfillRequest, request: Request, services: UsesServices) -> Response:
    """Answer with what stands at the cursor. With ``n_predict`` 0 the prompt is only evaluated, to be known when it is
    needed.
    """
    if body.n != 1:
        raise UnsupportedParameter("n: there is one answer to an infill", param="n")
    # Stop texts are looked for here, since the answer says which one it was; and pieces are needed to end it in time.
    model = services.pool.get(body.model)
    with asked_of(body.model):
        await model.require(*GENERATING)
    generation = body.generation(services.presets, stream=True, stop=(), adapters=adapters_for(model, body.lora))
    marks = await fim_tokens(model)

    async def prompts() -> Sequence[Prompt]:
        return await run.prompts(marks)

    job = Job(new_id("infill"), model, generation, prompts, param="input_prefix", sequences=1)
    job.keep_alive = body.keep_alive
    run = _Run(job, body)
    job.headers = body.ignored_header(services.presets)
    if body.stream:
        return await _stream(services, run)

    async def answer() -> Response:
        stream = await open_generation(services, job)
        try:
            content = "".join([text async for text in run.pieces(stream)])
            return JSONResponse(run.answer(content), headers=job.headers)
        finally:
            close_generation(services, job)

    return await unless_client_leaves(request, answer())


async def _stream(services: Services, run: _Run) -> Response:
    """Return the stream. As in all of llama-server's own endpoints the answer is its last event, not ``[DONE]``."""
    opening, close = await open_early(services, run.job)
    response = EventStream(
        run.events(opening),
        close=close,
        phase=functools.partial(phase, run.job),
        heartbeat=services.settings.heartbeat,
        headers=run.job.headers,
    )
    response.body_iterator = _without_end(response.body_iterator)
    return response


async def _without_end(events: AsyncIterable[T]) -> AsyncIterator[T]:
    async for some in events:
        if some != b"data: [DONE]\n\n":
            yield some


class _Run:
    """One infill under way: it takes the pieces, ends the generation when it is time to, and keeps the figures."""

    def __init__(self, job: Job, body: InfillRequest) -> None:
        self.job = job
        self._body = body
        self._stops = StopMatcher(body.stop)
        self._indent = IndentLimit(body.n_indent)
        self._prompt = ""
        self._started = self._first = self._last = 0.0  # when it was accepted, and its first and last token came
        self._broken = False  # whether a line has ended
        self._late = False
        self._told = False  # to end
        self._reached = 0  # how much of the prompt was evaluated when it was told to end
        self._queued: Progress | None = None  # the first report of it
        self._predicted = 0
        self._finished: Finished | None = None

    async def prompts(self, marks: FimTokens) -> list[Prompt]:
        """Return the one prompt."""
        body = self._body
        snippets = [Snippet(each.text, each.filename) for each in body.input_extra]
        params = ("prompt", "input_suffix", "input_extra")
        gaps = Gaps([body.input_prefix + body.prompt], body.input_suffix, snippets, params)
        (prompt,) = await fim_prompts(self.job, marks, gaps)
        if body.wants("prompt"):
            worker = await self.job.worker()
            self._prompt = await worker.detokenize([*prompt], special=True)
        return [prompt]

    async def events(self, opening: asyncio.Task[GenerationStream]) -> AsyncIterator[bytes]:
        """Yield the events of a stream."""
        stream = await asyncio.shield(opening)
        let_go_when_over(self.job, stream)
        content: list[str] = []
        async with aclosing(self.pieces(stream)) as pieces:
            async for text in pieces:
                self.job.account.progressed()
                content.append(text)
                yield event(self._piece(text))
        answer = self.answer("".join(content))
        await self.job.account.settle("answered")
        yield event(answer | ({"content": ""} if self._body.wants("content") else {}))

    async def pieces(self, stream: GenerationStream) -> AsyncGenerator[str, None]:
        """Yield the pieces of the answer."""
        self._started = self._first = self._last = time.monotonic()
        while arrived := await self._arrived(stream):
            text = "".join(self._take(each) for each in arrived)
            if self._cut:
                self._end(stream)
            if text:
                yield text

    async def _arrived(self, stream: GenerationStream) -> list[Delta | Finished]:
        while True:
            try:
                async with asyncio.timeout(self._wait(stream)):
                    return await stream.arrived()
            except TimeoutError:
                pass

    def _wait(self, stream: GenerationStream) -> float | None:
        """Return how long to wait for more, and end it if its time is up; None: as long as it takes."""
        seconds = self._seconds_left()
        if seconds is None or seconds > 0:
            return seconds
        if not self._predicted and not self._is_under_way(stream.progress):
            return _MOMENT
        self._late = True
        self._end(stream)
        return None

    def _is_under_way(self, progress: Progress | None) -> bool:
        """Whether some of the prompt is evaluated for good, or others go before it. A step that is given up leaves
        nothing, so that a prompt which is ended in its first one would never get further, however often it comes.
        """
        if progress is None or progress.evaluated:
            return progress is not None
        self._queued = self._queued or progress  # it may have got its turn since that was said
        return progress is not self._queued

    def _seconds_left(self) -> float | None:
        """Return how long to wait for more; None: as long as it takes."""
        body = self._body
        if self._late or self._cut or self.job.generation.max_tokens == 0:  # only evaluating is meant to take long
            return None
        since, limit = (
            (self._first, body.t_max_predict_ms) if self._predicted else (self._started, body.t_max_prompt_ms)
        )
        if limit <= 0 or (self._predicted and not self._broken):
            return None
        return since + limit / 1000 - time.monotonic()

    def _end(self, stream: GenerationStream) -> None:
        """Let it end; what it has more to say, above all its figures, still comes."""
        if not self._told and self._finished is None:
            self._told = True
            self._reached = stream.progress.evaluated if stream.progress is not None else 0
            stream.stop()

    @property
    def _cut(self) -> bool:
        return self._stops.matched is not None or self._indent.ended

    def _take(self, piece: Delta | Finished) -> str:
        """Count a piece and return its text, or what is left of it."""
        if isinstance(piece, Finished):
            self._finished = piece
        if self._cut:
            return ""
        predicted = piece.completion_tokens if isinstance(piece, Finished) else self._predicted + piece.tokens
        if predicted:
            self._last = time.monotonic()
            self._first = self._first if self._predicted else self._last
        self._predicted = self.job.generated = predicted
        text = self._indent.push(self._stops.push(piece.text))
        if isinstance(piece, Finished) and self._stops.matched is None:
            text += self._indent.push(self._stops.finish())
        if isinstance(piece, Finished) or self._stops.matched is not None:
            text += self._indent.finish()
        self._broken = self._broken or "\n" in piece.text
        return text

    @property
    def _stop_type(self) -> StopType:
        if self._stops.matched is not None:
            return "word"
        assert self._finished is not None
        return "limit" if self._late or self._indent.ended or self._finished.reason == "length" else "eos"

    @property
    def _evaluated(self) -> int:
        """How many tokens of the prompt were evaluated, now or before: all of them, or where its time was up first, as
        many as were reported by then.
        """
        finished = self._finished
        if finished is None or self._predicted or not (self._late and finished.stopped):
            return sum(self.job.prompt_tokens)
        return max(self._reached, finished.cached_tokens)

    def _piece(self, text: str) -> dict[str, Any]:
        return {
            "index": 0,
            "content": text,
            "tokens": [],
            "stop": False,
            "id_slot": _NO_SLOT,
            "tokens_predicted": self._predicted,
            "tokens_evaluated": self._evaluated,
        }

    def answer(self, content: str) -> dict[str, Any]:
        """Return the answer: all of it, or the wanted fields, which have the names that they were asked for by."""
        assert self._finished is not None
        job, finished = self.job, self._finished
        count_used(job, self._predicted, finished.cached_tokens)
        full = finished.reason == "length" and sum(job.prompt_tokens) + self._predicted >= job.model.context
        answer = self._piece(content) | {
            "model": job.model.name,
            "stop": True,
            "stop_type": self._stop_type,
            "stopping_word": self._stops.matched or "",
            "has_new_line": "\n" in content,
            "truncated": job.truncated_tokens > 0 or full,
            "tokens_cached": finished.cached_tokens,
            "prompt": self._prompt,
            "generation_settings": self._settings(),
            "timings": self._timings(self._evaluated - finished.cached_tokens, finished.cached_tokens),
        }
        return _selected(answer, self._body.response_fields) if self._body.response_fields else answer

    def _settings(self) -> dict[str, Any]:
        body, generation = self._body, self.job.generation
        limit = _NO_LIMIT if generation.max_tokens is None else generation.max_tokens
        return {
            "n_ctx": self.job.model.context,
            "n_predict": limit,
            "max_tokens": limit,
            "seed": generation.sampling.seed,
            **{name: getattr(generation.sampling, name) for name in _SETTINGS},
            "samplers": list(generation.sampling.stages),
            "stop": body.stop,
            "stream": body.stream,
            "n_indent": body.n_indent,
            "t_max_prompt_ms": body.t_max_prompt_ms,
            "t_max_predict_ms": body.t_max_predict_ms,
        }

    def _timings(self, prompt: int, cached: int) -> dict[str, float]:
        evaluating = (self._first if self._predicted else time.monotonic()) - self._started
        return {
            "cache_n": cached,
            **_figures("prompt", prompt, evaluating * 1000),
            **_figures("predicted", self._predicted, (self._last - self._first) * 1000),
        }


def _figures(name: str, count: int, milliseconds: float) -> dict[str, float]:
    return {
        f"{name}_n": count,
        f"{name}_ms": milliseconds,
        f"{name}_per_token_ms": milliseconds / count if count else 0.0,
        f"{name}_per_second": count / milliseconds * 1000 if milliseconds else 0.0,
    }


def _selected(answer: Mapping[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """Return the fields at these paths, flat; those that there are not are left out."""
    found: dict[str, Any] = {}
    for path in paths:
        value: Any = answer
        for name in path.split("/"):
            value = value.get(name, _MISSING) if isinstance(value, Mapping) else _MISSING
        if value is not _MISSING:
            found[path] = value
    return found
