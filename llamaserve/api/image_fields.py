"""The fields of requests for pictures.

Names are OpenAI's, those of text-generation-webui's endpoint, and for the rest the usual ones of programs with
diffusion models. docs/images.md has all fields.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Final, Literal

from fastapi import UploadFile
from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, WithJsonSchema

from llamaserve.api.fields import Text
from llamaserve.api.vectors import Plain, TextFields, lower
from llamaserve.errors import InvalidRequest
from llamaserve.images.prompts import checked_prompt
from llamaserve.images.values import (
    SAMPLERS,
    SCHEDULERS,
    Format,
    Sampler,
    Scheduler,
    Size,
)
from llamaserve.registry.spec import LARGEST_SIDE, LEAST_SIDE, MOST_GUIDANCE, MOST_STEPS

MOST_IMAGES: Final = 10  # of one request,
MOST_FILES: Final = 16  # that may be made from so many
MOST_PIXELS: Final = 2048 * 2048

_LARGEST_SEED: Final = 2**53 - 1  # what JavaScript can count to; pictures after the first count on
_SIZE: Final = re.compile(r"(-?\d{1,9})\s*[x*]\s*(-?\d{1,9})", re.ASCII)

_PROMPT: Final = "What the picture shows. (word:1.3) stresses a word, <lora:name> adds a LoRA."
_SIZE_SCHEMA: Final = {
    "type": "string",
    "pattern": "^(auto|[0-9]{2,4}[x*][0-9]{2,4})$",
    "examples": ["512x768"],
    "default": "auto",
}
_SAMPLER_SCHEMA: Final = {"enum": [*SAMPLERS], "type": "string"}

ResponseFormat = Literal["b64_json", "url", "data_url"]
_Quality = Literal["auto", "low", "medium", "standard", "high", "hd"]


def _size(value: Any) -> Any:
    if isinstance(value, str) and value.strip().lower() == "auto":
        return None
    found = _SIZE.fullmatch(value.strip().lower()) if isinstance(value, str) else None
    if found is None:
        raise ValueError("must be width and height in pixels, such as 512x768, or auto")
    size = Size(int(found[1]), int(found[2]))
    if not min(size) >= LEAST_SIDE or max(size) > LARGEST_SIDE or size.pixels > MOST_PIXELS:
        raise ValueError(
            f"must have {LEAST_SIDE} to {LARGEST_SIDE} pixels on each side, and {MOST_PIXELS:,} in all at most"
        )
    return size


def _joined(text: str) -> str:
    """Return a sampler's or scheduler's name as all programs' spellings of it have it in common."""
    text = re.sub(r"^k_|[\s_\-]", "", text.lower())
    return text.replace("pp", "++").replace("ancestral", "a")


_SAMPLER_NAMES: Final[dict[str, Sampler]] = {_joined(name): name for name in SAMPLERS}
_SCHEDULER_NAMES: Final[dict[str, Scheduler]] = {_joined(name): name for name in SCHEDULERS}
_SUFFIXES: Final = tuple(_joined(name) for name in ("karras", "exponential"))


def _named_scheduler(value: Any) -> Any:
    if not isinstance(value, str) or _joined(value) not in _SCHEDULER_NAMES:
        raise ValueError(f"must be one of {', '.join(SCHEDULERS)}")
    return _SCHEDULER_NAMES[_joined(value)]


def _named_sampler(value: Any) -> Any:
    """Take a name in any program's spelling; some have the scheduler behind it, as in "DPM++ 2M Karras"."""
    if isinstance(value, str):
        name = _joined(value)
        if name in _SAMPLER_NAMES:
            return _SAMPLER_NAMES[name], None
        for suffix in _SUFFIXES:
            if (first := name.removesuffix(suffix)) != name and first in _SAMPLER_NAMES:
                return _SAMPLER_NAMES[first], _SCHEDULER_NAMES[suffix]
    raise ValueError(f"must be one of {', '.join(SAMPLERS)}")


def _jpeg(value: Any) -> Any:
    value = lower(value)
    return "jpeg" if value == "jpg" else value


def _files(value: Any) -> Any:
    if any(isinstance(each, str) for each in value):
        raise ValueError("must be a file with a name (curl -F image=@picture.png), not text")
    return value


Prompt = Annotated[Text, AfterValidator(checked_prompt)]


class ImageFields(TextFields):
    """Fields of every request for pictures."""

    not_offered: ClassVar[Plain] = {"background": (("auto", "opaque"), "pictures are opaque")}

    prompt: Prompt = Field("", description=_PROMPT)
    negative_prompt: Prompt = Field("", description="What it shall not show; only with guidance, cfg_scale over 1.")
    n: int | None = Field(None, ge=1, le=MOST_IMAGES, description="How many pictures; 1 if not given.")
    batch_size: int | None = Field(None, ge=1, le=MOST_IMAGES, description="The same as n.")
    batch_count: int = Field(1, ge=1, le=MOST_IMAGES, description="How many times as many pictures.")
    size: Annotated[Size | None, BeforeValidator(_size), WithJsonSchema(_SIZE_SCHEMA)] = Field(
        None, description="Width and height, such as 512x768; auto: what the model was made for."
    )
    size_policy: Literal["crop", "refuse"] = Field(
        "crop", description="What to do about a size that the model can't make: cut a larger picture, or refuse."
    )
    quality: Annotated[_Quality, BeforeValidator(lower)] = Field(
        "auto", description="low: half as many steps, high or hd: twice as many."
    )
    steps: int | None = Field(None, ge=1, le=MOST_STEPS, description="Steps of the sampler.")
    cfg_scale: float | None = Field(
        None, ge=0, le=MOST_GUIDANCE, description="How closely to follow the prompts; 1 or 0: no guidance, and faster."
    )
    guidance: float | None = Field(
        None, ge=0, le=MOST_GUIDANCE, description="The same for models that have learnt it, such as FLUX.1 dev."
    )
    seed: int = Field(
        -1,
        ge=-1,
        le=_LARGEST_SEED,
        validation_alias=AliasChoices("seed", "image_seed"),
        description="Decides what is left to chance; each further picture has the next one. -1: a random one.",
    )
    sampler: Annotated[
        tuple[Sampler, Scheduler | None] | None, BeforeValidator(_named_sampler), WithJsonSchema(_SAMPLER_SCHEMA)
    ] = Field(
        None,
        validation_alias=AliasChoices("sampler", "sampler_name", "sample_method"),
        description="How a step is made.",
    )
    scheduler: Annotated[Scheduler | None, BeforeValidator(_named_scheduler)] = Field(
        None, description="How the steps are spread."
    )
    response_format: Annotated[ResponseFormat, BeforeValidator(lower)] | None = Field(
        None, description="b64_json, url (a link to this server, good for an hour) or data_url; else the first two."
    )
    output_format: Annotated[Format, BeforeValidator(_jpeg)] = Field("png", description="png, jpeg or webp.")
    output_compression: int | None = Field(
        None, ge=0, le=100, description="Quality of JPEG and WebP; 100: without loss in WebP."
    )
    stream: bool = Field(default=False, description="Send events about the progress, and pictures as they are ready.")
    partial_images: int = Field(0, ge=0, le=3, description="How many unfinished pictures to send in a stream.")

    @property
    def count(self) -> int:
        """How many pictures are wanted. Raises ``InvalidRequest`` when that is too many, for seeds as well."""
        if None not in (self.n, self.batch_size) and self.n != self.batch_size:
            raise InvalidRequest(f"n is {self.n} and batch_size is {self.batch_size}; give one", param="batch_size")
        count = (self.n or self.batch_size or 1) * self.batch_count
        if count > MOST_IMAGES:
            raise InvalidRequest(f"{count} pictures are wanted; {MOST_IMAGES} are the most", param="batch_count")
        if self.seed + count - 1 > _LARGEST_SEED:
            raise InvalidRequest(f"the last picture's seed would be over {_LARGEST_SEED}", param=self.called("seed"))
        return count


class GenerationRequest(ImageFields):
    """A picture from a prompt."""

    prompt: Prompt = Field(description=_PROMPT)


class VariationRequest(ImageFields):
    """A picture like another."""

    image: Annotated[list[UploadFile], BeforeValidator(_files)] = Field(
        min_length=1, max_length=1, description="The picture."
    )
    strength: float | None = Field(
        None,
        ge=0,
        le=1,
        validation_alias=AliasChoices("strength", "denoising_strength"),
        description="How much becomes new, from 0 to 1.",
    )


class EditRequest(VariationRequest):
    """A picture from others."""

    prompt: Prompt = Field(min_length=1, description=_PROMPT)
    image: Annotated[list[UploadFile], BeforeValidator(_files)] = Field(
        min_length=1, max_length=MOST_FILES, description="The picture, or several for the model to look at."
    )
    mask: Annotated[list[UploadFile], BeforeValidator(_files)] = Field(
        [], max_length=1, description="Where it is transparent, or else white, the picture is made anew."
    )
