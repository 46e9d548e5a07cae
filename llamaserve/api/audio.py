"""``POST /v1/audio/transcriptions`` and ``/v1/audio/translations``: speech to text, in its own language or in English,
as OpenAI's endpoints have it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

import msgspec
from fastapi import APIRouter, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, ValidationError
from starlette.datastructures import FormData
from starlette.requests import ClientDisconnect

from llamaserve.api import transcripts
from llamaserve.api.fields import Text
from llamaserve.api.generating import CLIENT_CLOSED, EARLY, unless_client_leaves
from llamaserve.api.options import TRUNCATED_HEADER
from llamaserve.api.services import Services, UsesServices
from llamaserve.api.sse import EventStream, event
from llamaserve.api.transcribing import Hearing, heard
from llamaserve.api.transcripts import Transcript
from llamaserve.api.vectors import Plain, TextFields, lower
from llamaserve.errors import InvalidRequest, UnsupportedParameter
from llamaserve.speech.audio import Audio
from llamaserve.speech.languages import code_of
from llamaserve.speech.values import Heard, Transcribed, Transcription

logger = logging.getLogger(__name__)

router = APIRouter(tags=["audio"])

WARNING_HEADER: Final = "x-llamaserve-warning"

_Format = Literal["json", "text", "srt", "verbose_json", "vtt"]

_MAX_FIELDS: Final = 64
_MAX_FIELD: Final = 64 * 1024  # bytes
_LISTS: Final = ("timestamp_granularities", "include")
_KIND: Final = "multipart/form-data"


def _language(text: str) -> str | None:
    """Take a code or a name; nothing, or ``auto``, stands for the language that is spoken."""
    if text.strip().lower() in ("", "auto"):
        return None
    code = code_of(text)
    if code is None:
        raise ValueError(f"{text[:40]!r} is no language that Whisper knows; give a code of ISO 639-1, such as en")
    return code


class AudioRequest(TextFields):
    """An audio to be transcribed or translated."""

    not_offered: ClassVar[Plain] = {
        "known_speaker_names": ((), "speakers are not told apart"),
        "known_speaker_references": ((), "speakers are not told apart"),
        "diarize": (("false", "0", False), "speakers are not told apart"),
    }

    file: UploadFile = Field(
        description="The audio: flac, mp3, mp4, mpeg, mpga, m4a, ogg, wav, webm or another usual format."
    )
    language: Annotated[str | None, AfterValidator(lambda text: _language(text) if text else None)] = Field(
        None, max_length=64, description="The language that is spoken, as a code of ISO 639-1; found out if not given."
    )
    prompt: Text = Field(
        "", max_length=_MAX_FIELD, description="Text that might come before the audio, for names and style."
    )
    response_format: Annotated[_Format, BeforeValidator(lower)] = Field(
        "json", description="What the answer looks like."
    )
    temperature: float = Field(
        0.0, ge=0, le=1, description="0: the most probable words; higher ones are tried where that fails."
    )
    stream: bool = Field(default=False, description="Send the text as it is heard, as server-sent events.")
    timestamp_granularities: list[Literal["segment", "word"]] = Field(
        ["segment"],
        validation_alias=AliasChoices("timestamp_granularities[]", "timestamp_granularities"),
        description="Which times verbose_json has.",
    )
    include: list[Literal["logprobs"]] = Field(
        [],
        validation_alias=AliasChoices("include[]", "include"),
        description="What json has beside the text: the log-probabilities of its tokens.",
    )

    def _idle(self) -> Any:
        """Yield the fields that do nothing beside the others."""
        if "timestamp_granularities" in self.model_fields_set and self.response_format != "verbose_json":
            yield "timestamp_granularities"
        if self.include and self.response_format != "json":
            yield "include"


async def _read(request: Request) -> AudioRequest:
    """Read a form. Raises what FastAPI does when something in it is wrong."""
    if not request.headers.get("content-type", "").startswith(_KIND):
        raise InvalidRequest(f"the audio must be sent as {_KIND}, with a field `file`", param="file")
    form = await request.form(max_files=1, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD)
    try:
        body = AudioRequest.model_validate(_values(form))
    except ValidationError as error:
        await form.close()
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in error.errors()]) from None
    if body.stream and body.response_format in ("srt", "vtt"):
        raise UnsupportedParameter(f"stream goes with json, text and verbose_json, not {body.response_format}")
    return body


def _values(form: FormData) -> dict[str, Any]:
    """Return the fields of a form; those that may be lists are."""
    values: dict[str, Any] = {}
    for name in form:
        several = form.getlist(name)
        if name.removesuffix("[]") in _LISTS:
            values[name] = [part for each in several for part in str(each).split(",")]
        else:
            values[name] = several[-1]
    return values


_FORM: Final[Mapping[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {_KIND: {"schema": AudioRequest.model_json_schema(by_alias=False)}},
    }
}


@router.post("/v1/audio/transcriptions", summary="Write down speech", openapi_extra=dict(_FORM))
async def create_transcription(request: Request, services: UsesServices) -> Response:
    """Answer with what is said in an audio, in its own language."""
    return await _answer(request, services, translate=False)


@router.post("/v1/audio/translations", summary="Translate speech into English", openapi_extra=dict(_FORM))
async def create_translation(request: Request, services: UsesServices) -> Response:
    """Answer with what is said in an audio, in English."""
    return await _answer(request, services, translate=True)


async def _answer(request: Request, services: Services, *, translate: bool) -> Response:
    try:
        body = await _read(request)
    except ClientDisconnect:
        return Response(status_code=CLIENT_CLOSED)
    try:
        headers = body.ignored_header()
        hearing = Hearing(
            services,
            services.pool.get_for("transcription", body.model),
            body.file.file,
            Transcription(
                language=body.language, translate=translate, prompt=body.prompt, temperature=body.temperature
            ),
            named=body.model is not None,
        )
        if body.stream:
            return await _streamed(services, body, hearing, headers)
        return await unless_client_leaves(request, _whole(body, hearing, headers))
    finally:
        await body.file.close()


async def _whole(body: AudioRequest, hearing: Hearing, headers: dict[str, str]) -> Response:
    async with heard(hearing) as audio:
        headers |= _warnings(audio)
        transcript = Transcript(audio.seconds)
        async for each in hearing.events():
            _take(transcript, each, headers)
        hearing.keep(body.keep_alive)
    return _formatted(body, transcript, translate=hearing.translates, headers=headers)


async def _streamed(
    services: Services, body: AudioRequest, hearing: Hearing, headers: dict[str, str]
) -> EventStream | Response:
    """Return the streamed answer. Errors that show within the first seconds are raised, later ones go in-band."""
    opening = asyncio.create_task(hearing.open())
    opening.add_done_callback(lambda done: done.cancelled() or done.exception())

    def close() -> None:
        if not opening.cancel():
            hearing.close()

    try:
        await asyncio.wait({opening}, timeout=EARLY)
        if opening.done():
            headers |= _warnings(opening.result())
    except BaseException:
        close()
        raise
    return EventStream(
        _events(body, hearing, opening),
        close=close,
        phase=lambda: hearing.phase,
        heartbeat=services.settings.heartbeat,
        headers=headers,
    )


async def _events(body: AudioRequest, hearing: Hearing, opening: asyncio.Task[Audio]) -> AsyncIterator[bytes]:
    """Yield OpenAI's events: the text piece by piece, and all of it at the end. Of verbose JSON also segments."""
    audio = await asyncio.shield(opening)
    transcript = Transcript(audio.seconds)
    logprobs = bool(body.include)
    truncated: dict[str, str] = {}
    async for each in hearing.events():
        known = len(transcript.segments)
        _take(transcript, each, truncated)
        for number, segment in enumerate(transcript.segments[known:], known):
            delta: dict[str, Any] = {"type": "transcript.text.delta"}
            delta["delta"] = segment.text if number else segment.text.lstrip()
            if logprobs:
                delta["logprobs"] = [transcripts.logprob(token) for token in segment.tokens]
            yield event(delta)
            if body.response_format == "verbose_json":
                yield event({"type": "transcript.text.segment", **transcripts.described(segment, number)})
    hearing.keep(body.keep_alive)
    yield event({"type": "transcript.text.done", **_json(body, transcript, translate=hearing.translates)})


def _take(transcript: Transcript, each: Heard | Transcribed, headers: dict[str, str]) -> None:
    """Add what is heard to a transcript."""
    if isinstance(each, Heard):
        transcript.segments += each.segments
        return
    transcript.language = each.language
    if each.truncated:
        headers[TRUNCATED_HEADER] = f"prompt: {each.truncated} tokens"


def _warnings(audio: Audio) -> dict[str, str]:
    """Return the header that tells what of an audio could not be heard."""
    words = []
    if audio.damaged:
        words.append("the audio is damaged or cut short, and a part of it could not be decoded")
    if audio.gaps:
        words.append(f"{audio.gaps:.1f} seconds in the middle of the file have no audio")
    return {WARNING_HEADER: "; ".join(words)} if words else {}


def _json(body: AudioRequest, transcript: Transcript, *, translate: bool) -> dict[str, Any]:
    if body.response_format != "verbose_json":
        return transcripts.as_json(transcript, logprobs=bool(body.include))
    return transcripts.as_verbose_json(
        transcript,
        task="translate" if translate else "transcribe",
        segments="segment" in body.timestamp_granularities,
        words="word" in body.timestamp_granularities,
    )


def _formatted(body: AudioRequest, transcript: Transcript, *, translate: bool, headers: Mapping[str, str]) -> Response:
    match body.response_format:
        case "text":
            return Response(transcript.text + "\n", media_type="text/plain", headers=headers)
        case "srt":
            return Response(transcripts.as_srt(transcript), media_type="text/plain", headers=headers)
        case "vtt":
            return Response(transcripts.as_vtt(transcript), media_type="text/vtt", headers=headers)
        case _:
            content = msgspec.json.encode(_json(body, transcript, translate=translate))
            return Response(content, media_type="application/json", headers=headers)
