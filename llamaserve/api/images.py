"""``POST /v1/images/generations``, ``/v1/images/edits`` and ``/v1/images/variations``: pictures from a prompt or from
other pictures, as OpenAI's endpoints have it; and the links to those that are kept for a while.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from starlette.requests import ClientDisconnect

from llamaserve.api.accounting import account, metered
from llamaserve.api.caller import caller
from llamaserve.api.generating import CLIENT_CLOSED, EARLY, unless_client_leaves
from llamaserve.api.image_fields import MOST_FILES, EditRequest, GenerationRequest, ImageFields, VariationRequest
from llamaserve.api.image_order import Order
from llamaserve.api.options import WARNING_HEADER
from llamaserve.api.painting import Made, Painting
from llamaserve.api.services import Services, UsesServices
from llamaserve.api.sse import EventStream, event
from llamaserve.api.uploads import KIND, Expected, Upload, receive, validated, values_of
from llamaserve.errors import InvalidRequest, Unauthenticated, Unavailable
from llamaserve.images.values import GeneratedImage, ImageGeneration, ImageStep, PartialImage

logger = logging.getLogger(__name__)
router = APIRouter(tags=["images"])

_METERED = [Depends(metered)]
_LINKS: Final = "/v1/images/files/"
_PICTURES: Final = Expected("the picture", "image", MOST_FILES + 1)  # and a mask
_FILES: Final = ("image", "mask")


def _form(model: type[ImageFields]) -> dict[str, Any]:
    schema = model.model_json_schema()
    return {"requestBody": {"required": True, "content": {KIND: {"schema": schema}}}}


@router.post(
    "/v1/images/generations", summary="Make pictures from a prompt", dependencies=_METERED, response_model=None
)
async def create_image(body: GenerationRequest, request: Request, services: UsesServices) -> Response:
    """Answer with pictures of what a prompt says."""
    return await _answer(_Answering(request, services, body, "image_generation"))


@router.post(
    "/v1/images/edits", summary="Make pictures from others", dependencies=_METERED, openapi_extra=_form(EditRequest)
)
async def edit_image(request: Request, services: UsesServices) -> Response:
    """Answer with a picture that is changed as a prompt says, in whole or where a mask says so."""
    return await _with_uploads(request, services, EditRequest, "image_edit")


@router.post(
    "/v1/images/variations",
    summary="Make pictures like another",
    dependencies=_METERED,
    openapi_extra=_form(VariationRequest),
)
async def vary_image(request: Request, services: UsesServices) -> Response:
    """Answer with pictures that are like another one."""
    return await _with_uploads(request, services, VariationRequest, "image_variation")


@router.head(_LINKS + "{name}", include_in_schema=False)
@router.get(_LINKS + "{name}", summary="Fetch a picture by its link", response_class=Response)
def get_image(name: str, services: UsesServices) -> Response:
    """Return a picture that was made within the last hour."""
    found = services.image_links.get(name)
    if found is None and caller().is_stranger:
        raise Unauthenticated("there is no picture under this link, and nothing else here without a key")
    if found is None:
        raise _Gone("there is no picture under this link, or no longer: links are good for an hour")
    headers = {"cache-control": f"private, max-age={found.seconds:.0f}", "x-content-type-options": "nosniff"}
    return Response(found.data, media_type=found.media_type, headers=headers)


class _Gone(InvalidRequest):
    """A link that leads nowhere."""

    status = 404
    code = "image_not_found"


class _Answering:
    """A request, and how its answer says what was made. ``kind`` is how the types of streamed events begin, and
    ``unlinked`` says why a picture could not be kept under a link.
    """

    def __init__(
        self, request: Request, services: Services, body: ImageFields, kind: str, upload: Upload | None = None
    ) -> None:
        self.http = request
        self.services = services
        self.body = body
        self.kind = kind
        self.upload = upload
        self.created = int(time.time())
        self.unlinked: str | None = None

    def facts(self, job: ImageGeneration) -> dict[str, Any]:
        """Return what is said of a picture beside the picture, as OpenAI says it."""
        return {
            "size": str(job.size),
            "quality": self.body.quality,
            "background": "opaque",
            "output_format": job.format,
        }

    async def picture(self, data: bytes, job: ImageGeneration) -> dict[str, Any]:
        """Return a picture in the form that is wanted. Raises ``Unavailable`` when its link can't be kept."""
        fields = await asyncio.to_thread(self._in_form, data, f"image/{job.format}")
        return fields | {"revised_prompt": self.body.prompt, "seed": job.seed}

    def _in_form(self, data: bytes, media_type: str) -> dict[str, Any]:
        match self.body.response_format:
            case "b64_json":
                return {"b64_json": _base64(data)}
            case "data_url":
                return {"url": f"data:{media_type};base64,{_base64(data)}"}
            case "url":
                return {"url": self._link(data, media_type)}
        try:
            return {"b64_json": _base64(data), "url": self._link(data, media_type)}
        except Unavailable as error:
            logger.warning("%s", error.message)
            self.unlinked = error.message
            return {"b64_json": _base64(data)}

    def _link(self, data: bytes, media_type: str) -> str:
        return str(self.http.base_url).rstrip("/") + _LINKS + self.services.image_links.put(data, media_type)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


async def _with_uploads(request: Request, services: Services, kind: type[ImageFields], events: str) -> Response:
    try:
        upload = await receive(request, services.upload_admission, _PICTURES)
    except ClientDisconnect:
        return Response(status_code=CLIENT_CLOSED)
    try:
        body = validated(kind, values_of(upload.form, kind, files=_FILES))
        return await _answer(_Answering(request, services, body, events, upload))
    except BaseException:
        upload.close()
        raise


async def _answer(request: _Answering) -> Response:
    services, body = request.services, request.body
    painting = Painting(services, services.pool.get_for("image", body.model), body, request.upload)
    answering = _streamed(request, painting) if body.stream else _whole(request, painting)
    answer: Response | None = None
    try:
        answer = await unless_client_leaves(request.http, answering)
    finally:
        if not isinstance(answer, EventStream):  # which closes it when it is over
            painting.close()
    return answer


def _headers(request: _Answering, order: Order) -> dict[str, str]:
    """Return the headers that say what has no effect, and what is not just as it was asked for."""
    warnings = [*order.warnings, *([request.unlinked] if request.unlinked else [])]
    return request.body.ignored_header(order.idle) | ({WARNING_HEADER: "; ".join(warnings)} if warnings else {})


async def _whole(request: _Answering, painting: Painting) -> Response:
    order = await painting.open()
    pictures: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    async for made in painting.pictures():
        if isinstance(made.event, GeneratedImage):
            account().used(images=1)
            pictures.append(await request.picture(made.event.data, made.job))
            facts = request.facts(made.job)
    answer = {"created": request.created, **facts, "data": pictures}
    content = await asyncio.to_thread(msgspec.json.encode, answer)  # which may have 100 MB
    return Response(content, media_type="application/json", headers=_headers(request, order))


async def _streamed(request: _Answering, painting: Painting) -> EventStream:
    """Return the streamed answer. Errors that show within the first seconds are raised, later ones go in-band."""
    headers = _headers(request, await painting.open())
    events = _events(request, painting)
    first = asyncio.ensure_future(anext(events))
    first.add_done_callback(lambda done: done.cancelled() or done.exception())

    def close() -> None:
        first.cancel()
        painting.close()

    try:
        await asyncio.wait({first}, timeout=EARLY)
        if first.done():
            first.result()
    except BaseException:
        close()
        raise
    return EventStream(
        _after(first, events),
        close=close,
        phase=lambda: painting.phase,
        heartbeat=request.services.settings.heartbeat,
        headers=headers,
    )


async def _after(first: asyncio.Future[bytes], events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield await asyncio.shield(first)
    async for each in events:
        yield each


async def _events(request: _Answering, painting: Painting) -> AsyncIterator[bytes]:
    """Yield OpenAI's events, and one for each step."""
    count = painting.order.count
    async for made in painting.pictures():
        written = event(await _event(request, made))
        if isinstance(made.event, GeneratedImage):
            account().used(images=1)
            count -= 1
            if not count:
                await account().settle("answered")
        else:
            account().progressed()
        yield written


async def _event(request: _Answering, made: Made) -> Mapping[str, Any]:
    common, job = {"created_at": request.created, "index": made.number}, made.job
    match made.event:
        case ImageStep(_, step, steps):
            return {"type": f"{request.kind}.progress", **common, "step": step, "steps": steps}
        case PartialImage(_, index, data):
            picture = {"b64_json": _base64(data), "partial_image_index": index}
            return {"type": f"{request.kind}.partial_image", **common, **picture, **request.facts(job)}
        case GeneratedImage(_, data):
            picture = await request.picture(data, job)
            if request.unlinked is not None and "url" not in picture:
                picture["warning"] = request.unlinked
            return {"type": f"{request.kind}.completed", **common, **picture, **request.facts(job)}
