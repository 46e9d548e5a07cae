"""The fields of requests for pictures, and what they become for the model.

Names are OpenAI's, those of text-generation-webui's endpoint, and for the rest the usual ones of programs with
diffusion models. What a model can't do exactly is refused, or told in a header. docs/images.md has all fields.
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

import msgspec
from fastapi import UploadFile
from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, WithJsonSchema

from llamaserve import __version__
from llamaserve.api.fields import Text
from llamaserve.api.vectors import Plain, TextFields, lower
from llamaserve.errors import InvalidRequest
from llamaserve.images.values import (
    SAMPLERS,
    SCHEDULERS,
    Format,
    ImageGeneration,
    LoraFile,
    Sampler,
    Scheduler,
    Size,
)
from llamaserve.registry.diffusion_file import DiffusionHeader
from llamaserve.registry.diffusion_memory import is_tiled
from llamaserve.registry.image_file import ImageFile, ImageSettings
from llamaserve.registry.spec import LARGEST_SIDE, LEAST_SIDE, MOST_GUIDANCE, MOST_STEPS

MOST_IMAGES: Final = 10  # of one request,
MOST_FILES: Final = 16  # that may be made from so many
MOST_PIXELS: Final = 2048 * 2048
MOST_PROMPT: Final = 4096  # bytes; language models take time and memory for the square of it
MOST_BREAKS: Final = 16
MOST_LORAS: Final = 8

_NO_GUIDANCE: Final = 1.0
_LARGEST_SCALE: Final = 10.0  # of a LoRA
_LARGEST_SEED: Final = 2**53 - 1  # what JavaScript can count to; pictures after the first count on
_RANDOM_SEEDS: Final = 2**32
_JPEG, _WEBP = 95, 90  # quality, if nobody names another one
_LEAST_WEIGHT, _LARGEST_WEIGHT = 0.001, 100.0
_FEW_STEPS: Final = frozenset({"karras", "exponential", "gits"})  # schedulers that need two steps at least

_WEIGHT: Final = re.compile(r":([+-]?[.\d]+)\)", re.ASCII)  # as in (word:1.3); the library ends its process over others
_LORA: Final = re.compile(r"<lora:([^<>:]+)(?::([^<>:]*))?>")

_PROMPT: Final = "What the picture shows. (word:1.3) stresses a word, <lora:name> adds a LoRA."
_SIZE_SCHEMA: Final = {"type": "string", "examples": ["512x768"], "default": "auto"}
_SAMPLER_SCHEMA: Final = {"enum": [*SAMPLERS], "type": "string"}

ResponseFormat = Literal["b64_json", "url", "data_url"]
_Quality = Literal["auto", "low", "medium", "standard", "high", "hd"]


def _size(value: Any) -> Any:
    if isinstance(value, str) and value.strip().lower() == "auto":
        return None
    found = re.fullmatch(r"(-?\d{1,9})\s*[x*]\s*(-?\d{1,9})", value.strip().lower()) if isinstance(value, str) else None
    if found is None:
        raise ValueError("must be width and height in pixels, such as 512x768, or auto")
    size = Size(int(found[1]), int(found[2]))
    if not min(size) >= LEAST_SIDE or max(size) > LARGEST_SIDE or size.pixels > MOST_PIXELS:
        raise ValueError(
            f"must have {LEAST_SIDE} to {LARGEST_SIDE} pixels on each side, and {MOST_PIXELS:,} in all at most"
        )
    return size


def _prompt(text: str) -> str:
    """Refuse what the library can't take."""
    if "\0" in text:
        raise ValueError("must not contain the character U+0000")
    if (size := len(text.encode())) > MOST_PROMPT:
        raise ValueError(f"has {size} bytes in UTF-8; {MOST_PROMPT} are the most")
    if (count := text.count("BREAK")) > MOST_BREAKS:
        raise ValueError(f"has the word BREAK {count} times; {MOST_BREAKS} are the most, since each begins a new part")
    for found in _WEIGHT.finditer(text, text.find("(")) if "(" in text else ():
        if not _is_weight(found[1]):
            raise ValueError(
                f"has the weight {found[1][:40]!r} for a word in brackets; it must be 0, or from {_LEAST_WEIGHT} to "
                f"{_LARGEST_WEIGHT:g}"
            )
    return text


def _is_weight(text: str) -> bool:
    try:
        weight = abs(float(text))
    except ValueError:
        return False
    return weight == 0 or _LEAST_WEIGHT <= weight <= _LARGEST_WEIGHT


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


Prompt = Annotated[Text, AfterValidator(_prompt)]


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
        """How many pictures are wanted. Raises ``InvalidRequest`` when that is too many."""
        if None not in (self.n, self.batch_size) and self.n != self.batch_size:
            raise InvalidRequest(f"n is {self.n} and batch_size is {self.batch_size}; give one", param="batch_size")
        count = (self.n or self.batch_size or 1) * self.batch_count
        if count > MOST_IMAGES:
            raise InvalidRequest(f"{count} pictures are wanted; {MOST_IMAGES} are the most", param="batch_count")
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

    prompt: Prompt = Field(description=_PROMPT)
    image: Annotated[list[UploadFile], BeforeValidator(_files)] = Field(
        min_length=1, max_length=MOST_FILES, description="The picture, or several for the model to look at."
    )
    mask: Annotated[list[UploadFile], BeforeValidator(_files)] = Field(
        [], max_length=1, description="Where it is transparent, or else white, the picture is made anew."
    )


@dataclass(frozen=True)
class Order:
    """What a request's pictures are like: ``first``, and so many that differ in the seed only, which counts on.
    ``idle`` are fields that do nothing, and ``warnings`` say what is not just as it was asked for.
    """

    first: ImageGeneration
    count: int
    idle: tuple[str, ...]
    warnings: tuple[str, ...]

    def jobs(self) -> Iterator[ImageGeneration]:
        """Yield the pictures, each with its settings."""
        for number in range(self.count):
            yield _with_seed(self.first, self.first.seed + number)


def order(body: ImageFields, file: ImageFile, contents: DiffusionHeader, *, size: Size | None = None) -> Order:
    """Return what a request asks of a model. ``size`` is the one of the pictures, if it does not say which, and not
    that of the model's settings. Raises ``InvalidRequest`` for what the model can't do, and for LoRAs that are not
    there.
    """
    usual = ImageSettings.of(file.spec, contents)
    wanted = body.size or size or usual.size
    canvas = contents.family.canvas(wanted)
    prompt, loras = _without_loras(body.prompt, file)
    sampler, spread = body.sampler or (usual.sampler, None)
    scheduler = body.scheduler or spread or (usual.scheduler if body.sampler is None else None)
    first = ImageGeneration(
        prompt=prompt,
        negative_prompt=body.negative_prompt,
        width=wanted.width,
        height=wanted.height,
        canvas_width=canvas.width,
        canvas_height=canvas.height,
        seed=secrets.randbelow(_RANDOM_SEEDS) if body.seed < 0 else body.seed,
        steps=_steps(body, usual.steps),
        cfg_scale=(usual.cfg_scale if body.cfg_scale is None else body.cfg_scale) or _NO_GUIDANCE,
        guidance=usual.guidance if body.guidance is None else body.guidance,
        sampler=sampler,
        scheduler=scheduler,
        loras=loras,
        tiled=is_tiled(canvas),
        partial_images=body.partial_images if body.stream else 0,
        format=body.output_format,
        quality=_quality(body),
    )
    _check_scheduler(body, first, contents)
    return Order(first, body.count, tuple(_idle(body, first, contents)), tuple(_inexact(body, first, contents)))


def _steps(body: ImageFields, usual: int) -> int:
    if body.steps is not None:
        return body.steps
    match body.quality:
        case "low":
            return max(1, usual // 2)
        case "high" | "hd":
            return min(2 * usual, MOST_STEPS)
        case _:
            return usual


def _quality(body: ImageFields) -> int:
    if body.output_compression is not None:
        return body.output_compression
    return _JPEG if body.output_format == "jpeg" else _WEBP


def _without_loras(prompt: str, file: ImageFile) -> tuple[str, tuple[LoraFile, ...]]:
    """Return a prompt without the LoRAs that it names, and these. One that is named twice works for both."""
    scales: dict[str, float] = {}
    for found in _LORA.finditer(prompt):
        path = str(file.lora(found[1]))
        scales[path] = scales.get(path, 0.0) + _scale(found[2])
    if len(scales) > MOST_LORAS:
        raise InvalidRequest(f"the prompt names {len(scales)} LoRAs; {MOST_LORAS} are the most", param="prompt")
    return _LORA.sub("", prompt), tuple(LoraFile(path, scale) for path, scale in scales.items())


def _scale(text: str | None) -> float:
    try:
        scale = 1.0 if text is None else float(text)
    except ValueError:
        scale = math.nan
    if not abs(scale) <= _LARGEST_SCALE:
        raise InvalidRequest(
            f"a LoRA works with a strength of -{_LARGEST_SCALE:g} to {_LARGEST_SCALE:g}, not {(text or '')[:40]!r}",
            param="prompt",
        )
    return scale


def _check_scheduler(body: ImageFields, job: ImageGeneration, contents: DiffusionHeader) -> None:
    """Refuse what would make a picture of a single colour, or end the process."""
    param = body.called("scheduler" if body.scheduler else "sampler" if body.sampler else "steps")
    if job.scheduler in contents.family.unaligned:
        raise InvalidRequest(f"the scheduler {job.scheduler} is not for {contents.family.name} models", param=param)
    if job.scheduler in _FEW_STEPS and job.steps < 2:
        raise InvalidRequest(f"the scheduler {job.scheduler} needs two steps or more", param=param)


def _idle(body: ImageFields, job: ImageGeneration, contents: DiffusionHeader) -> Iterator[str]:
    """Yield the fields that do nothing beside the others, or with this model."""
    if body.negative_prompt and job.cfg_scale == _NO_GUIDANCE:
        yield "negative_prompt"
    if body.steps is not None and body.quality not in ("auto", "medium", "standard"):
        yield "quality"
    if body.guidance is not None and not contents.family.guided:
        yield "guidance"
    if body.output_compression is not None and body.output_format == "png":
        yield "output_compression"
    if body.partial_images and not body.stream:
        yield "partial_images"


def _inexact(body: ImageFields, job: ImageGeneration, contents: DiffusionHeader) -> Iterator[str]:
    if job.canvas == job.size:
        return
    multiple = contents.family.multiple
    if body.size_policy == "refuse":
        raise InvalidRequest(
            f"{contents.family.name} models make pictures whose sides are multiples of {multiple} pixels, such as "
            f"{job.canvas}, and not {job.size}",
            param="size",
        )
    yield f"the model can't make {job.size}, so {job.canvas} is made and its edges are cut off"


def _with_seed(job: ImageGeneration, seed: int) -> ImageGeneration:
    return msgspec.structs.replace(job, seed=seed)


def described(job: ImageGeneration, model: str) -> str:
    """Return a picture's settings as programs with diffusion models write and read them."""
    lines = [job.prompt]
    if job.negative_prompt and job.cfg_scale != _NO_GUIDANCE:
        lines.append(f"Negative prompt: {job.negative_prompt}")
    facts = {
        "Steps": str(job.steps),
        "Sampler": job.sampler or "",
        "Schedule type": job.scheduler or "",
        "CFG scale": f"{job.cfg_scale:g}",
        "Seed": str(job.seed),
        "Size": str(job.size),
        "Model": model,
        "Denoising strength": f"{job.strength:g}" if job.init is not None else "",
        "Lora": " ".join(f"{Path(each.path).stem}:{each.scale:g}" for each in job.loras),
        "Version": f"llamaserve {__version__}",
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in facts.items() if value))
    return "\n".join(lines)
