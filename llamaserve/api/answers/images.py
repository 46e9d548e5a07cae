"""How pictures look in an answer, and the events of their making."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from msgspec import UNSET, Meta, UnsetType

from llamaserve.api.answers.answer import EVENTS, Answer, Content, Documented
from llamaserve.api.answers.errors import BODY, LACKS, WAITS, ErrorAnswer
from llamaserve.api.answers.generation import CREATED, HEADERS, Created, Index

Base64 = Annotated[str, Meta(description="The file in base64.")]
Link = Annotated[str, Meta(description="A link to this server that is good for an hour, or a `data:` URL.")]
Quality = Literal["auto", "low", "medium", "standard", "high", "hd"]
Format = Literal["png", "jpeg", "webp"]


class Picture(Answer):
    """A picture."""

    revised_prompt: Annotated[str, Meta(description="The prompt, which is never revised.")]
    seed: Annotated[int, Meta(description="What makes the same picture again.")]
    b64_json: Base64 | UnsetType = UNSET
    url: Link | UnsetType = UNSET


class Pictures(Answer):
    """Pictures that were made, all of one size."""

    created: Created
    size: Annotated[str, Meta(description="Width and height in pixels, such as `512x768`.")]
    quality: Quality
    background: Literal["opaque"]
    output_format: Format
    data: list[Picture]


class PictureProgress(Answer):
    """An event: a step is done."""

    type: Literal["image_generation.progress", "image_edit.progress", "image_variation.progress"]
    created_at: Created
    index: Annotated[int, Meta(ge=0, description="Of which picture.")]
    step: Annotated[int, Meta(ge=0)]
    steps: Annotated[int, Meta(ge=1)]


class PartialPicture(Answer):
    """An event: an unfinished picture."""

    type: Literal["image_generation.partial_image", "image_edit.partial_image", "image_variation.partial_image"]
    created_at: Created
    index: Index
    partial_image_index: Index
    b64_json: Base64
    size: str
    quality: Quality
    background: Literal["opaque"]
    output_format: Format


class CompletedPicture(Answer):
    """An event: a picture is ready."""

    type: Literal["image_generation.completed", "image_edit.completed", "image_variation.completed"]
    created_at: Created
    index: Index
    revised_prompt: str
    seed: int
    size: str
    quality: Quality
    background: Literal["opaque"]
    output_format: Format
    b64_json: Base64 | UnsetType = UNSET
    url: Link | UnsetType = UNSET
    warning: Annotated[str, Meta(description="Why there is no link.")] | UnsetType = UNSET


_PROMPT: Final = "a lighthouse at dawn"
_FACTS: Final = {"size": "512x512", "quality": "auto", "background": "opaque", "output_format": "png"}
_LINK: Final = "http://localhost:5000/v1/images/files/8d0f.png"
_BYTES: Final = "iVBORw0KGgo="
_PICTURE: Final = {"b64_json": _BYTES, "url": _LINK, "revised_prompt": _PROMPT, "seed": 42}

PictureFile = Annotated[str, Meta(description="The file.", extra_json_schema={"format": "binary"})]


def _documented(kind: str, requests: Mapping[str, Any], errors: tuple[int, ...] = ()) -> Documented:
    head = {"created_at": CREATED, "index": 0}
    events = {
        "step": {"type": f"{kind}.progress", **head, "step": 1, "steps": 20},
        "unfinished": {
            "type": f"{kind}.partial_image",
            **head,
            "b64_json": _BYTES,
            "partial_image_index": 0,
            **_FACTS,
        },
        "ready": {"type": f"{kind}.completed", **head, **_PICTURE, **_FACTS},
    }
    whole = {"created": CREATED, **_FACTS, "data": [_PICTURE]}
    return Documented(
        answers=(
            Content(Pictures, {"one": whole}),
            Content((PictureProgress, PartialPicture, CompletedPicture, ErrorAnswer), events, EVENTS),
        ),
        errors=(*BODY, *errors, *WAITS, *LACKS),
        requests=requests,
        headers=(*HEADERS, "x-llamaserve-warning"),
    )


ROUTES: Final = {
    "POST /v1/images/generations": _documented(
        "image_generation",
        {
            "two pictures": {"prompt": _PROMPT, "n": 2, "size": "auto", "response_format": "url"},
            "streamed": {"prompt": _PROMPT, "stream": True, "partial_images": 1},
        },
    ),
    "POST /v1/images/edits": _documented(
        "image_edit", {"with a mask": {"image": ["room.png"], "mask": ["mask.png"], "prompt": "a fireplace"}}
    ),
    "POST /v1/images/variations": _documented("image_variation", {"picture": {"image": ["room.png"]}}),
    "GET /v1/images/files/{name}": Documented(
        answers=tuple(Content(PictureFile, {}, f"image/{name}") for name in ("png", "jpeg", "webp")), errors=(400, 404)
    ),
}
