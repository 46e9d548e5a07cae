"""``POST /v1/audio/transcriptions`` and ``/v1/audio/translations``: speech to text, in its own language or in English,
as OpenAI's endpoints have it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

import msgspec
from fastapi import APIRouter, Depends, Request, Response, UploadFile
from pydantic import AfterValidator, BeforeValidator, Field
from starlette.datastructures import FormData
from starlette.requests import ClientDisconnect

from llamaserve.api import transcripts
from llamaserve.api.accounting import account, metered
from llamaserve.api.fields import Text
from llamaserve.api.generating import CLIENT_CLOSED, EARLY, unless_client_leaves
from llamaserve.api.options import TRUNCATED_HEADER, WARNING_HEADER
from llamaserve.api.services import Services, UsesServices
from llamaserve.api.sse import EventStream, event
from llamaserve.api.transcribing import Hearing
from llamaserve.api.transcripts import Transcript
from llamaserve.api.uploads import KIND, MAX_FIELD, Expected, receive, validated, values_of
from llamaserve.api.vectors import Plain, TextFields, lower
from llamaserve.errors import UnsupportedParameter
from llamaserve.speech.audio import Audio
from llamaserve.speech.languages import code_of
from llamaserve.speech.values import Heard, Transcribed, Transcription

router = APIRouter(tags=["audio"], dependencies=[Depends(metered)])

_Format = Literal["json", "text", "srt", "verbose_json", "vtt"]

_AUDIO: Final = Expected("the audio", "file", 1)
_LISTS: Final = ("timestamp_granularities", "include", "known_speaker_names", "known_speaker_references")


def _file(value: Any) -> Any:
    if isinstance(value, str):
        raise ValueError("must be a file with a name (curl -F file=@audio.wav), not text")
    return value


def _language(text: str) -> str | None:
    """Take a code or a name; ``auto`` stands for the language that is spoken."""
    if text.strip().lower() == "auto":
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

    file: Annotated[UploadFile, BeforeValidator(_file)] = Field(
        description="The audio: flac, mp3, mp4, mpeg, mpga, m4a, ogg, wav, webm or another usual format."
    )
    language: Annotated[str, Field(max_length=64), AfterValidator(_language)] | None = Field(
        None, description="The language that is spoken, as a code of ISO 639-1; found out if not given."
    )
    prompt: Text = Field(
        "", max_length=MAX_FIELD, description="Text that might come before the audio, for names and style."
    )
    response_format: Annotated[_Format, BeforeValidator(lower)] = Field(
        "json", description="What the answer looks like."
    )
    temperature: float = Field(
        0.0, ge=0, le=1, description="0: the most probable words; higher ones are tried where that fails."
    )
    stream: bool = Field(default=False, description="Send the text as it is heard, as server-sent events.")
    timestamp_granularities: list[Literal["segment", "word"]] = Field(
        ["segment"], description="Which times verbose_json has."
    )
    include: list[Literal["logprobs"]] = Field(
        [], description="What json has beside the text: the log-probabilities of its tokens."
    )

    def _idle(self) -> Iterator[str]:
        """Yield the fields that do nothing beside the others."""
        if "timestamp_granularities" in self.model_fields_set and self.response_format != "verbose_json":
            yield "timestamp_granularities"
        if self.include and self.response_format != "json":
            yield "include"


def _parsed(form: FormData) -> AudioRequest:
    """Return what a form says. Raises what FastAPI does when something in it is wrong."""
    body = validated(AudioRequest, values_of(form, AudioRequest, texts=_LISTS))
    if body.stream and body.response_format in ("srt", "vtt"):
        raise UnsupportedParameter(
            f"stream goes with json, text and verbose_json, not {body.response_format}", param="stream"
        )
    return body


_FORM: Final[Mapping[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {KIND: {"schema": AudioRequest.model_json_schema()}},
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
        upload = await receive(request, services.upload_admission, _AUDIO)
    except ClientDisconnect:
        return Response(status_code=CLIENT_CLOSED)
    try:
        body = _parsed(upload.form)
        headers = body.ignored_header()
        model = services.pool.get_for("transcription", body.model)
    except BaseException:
        upload.close()
        raise
    transcription = Transcription(
        language=body.language, translate=translate, prompt=body.prompt, temperature=body.temperature
    )
    hearing = Hearing(services, model, upload, transcription, named=body.model is not None, keep_alive=body.keep_alive)
    answering = _streamed(services, body, hearing, headers) if body.stream else _whole(body, hearing, headers)
    answer: Response | None = None
    try:
        answer = await unless_client_leaves(request, answering)
    finally:
        if not isinstance(answer, EventStream):  # which closes it when it is over
            hearing.close()
    return answer


async def _whole(body: AudioRequest, hearing: Hearing, headers: dict[str, str]) -> Response:
    audio = await hearing.open()
    headers |= _warnings(audio)
    transcript = Transcript(audio.seconds)
    async for each in hearing.events():
        _take(transcript, each, headers)
    _count(transcript)
    return _formatted(body, transcript, translate=hearing.translates, headers=headers)


async def _streamed(services: Services, body: AudioRequest, hearing: Hearing, headers: dict[str, str]) -> EventStream:
    """Return the streamed answer. Errors that show within the first seconds are raised, later ones go in-band."""
    opening = asyncio.create_task(hearing.open())
    opening.add_done_callback(lambda done: done.cancelled() or done.exception())

    def close() -> None:
        opening.cancel()
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
    """Yield OpenAI's events: the text piece by piece, and all of it at the end, together with what would be in headers
    if it were known in time. Of verbose JSON also segments.
    """
    audio = await asyncio.shield(opening)
    transcript = Transcript(audio.seconds)
    logprobs = bool(body.include)
    notes = _warnings(audio)
    async for each in hearing.events():
        account().progressed()
        known = len(transcript.segments)
        _take(transcript, each, notes)
        for number, segment in enumerate(transcript.segments[known:], known):
            delta: dict[str, Any] = {"type": "transcript.text.delta"}
            delta["delta"] = segment.text if number else segment.text.lstrip()
            if logprobs:
                delta["logprobs"] = [transcripts.logprob(token) for token in segment.tokens]
            yield event(delta)
            if body.response_format == "verbose_json":
                described = transcripts.described(segment, number) | {"id": str(number)}  # as OpenAI has it in a stream
                yield event({"type": "transcript.text.segment", **described})
    _count(transcript)
    await account().settle("answered")
    yield event({"type": "transcript.text.done", **_json(body, transcript, translate=hearing.translates), **notes})


def _count(transcript: Transcript) -> None:
    """Put into the account what the answer says of its usage."""
    account().used(audio=transcripts.usage(transcript)["seconds"])


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
