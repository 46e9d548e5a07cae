"""From the fields of a request for pictures to what the model is told, and what is said of it.

What a model can't do exactly is refused, or told in a header.
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec

from llamaserve import __version__
from llamaserve.api.image_fields import EditRequest, ImageFields, VariationRequest
from llamaserve.errors import InvalidRequest, ModelNotCapable
from llamaserve.images.prompts import checked_prompt
from llamaserve.images.values import Course, ImageGeneration, LoraFile, PictureFile, Size
from llamaserve.registry.diffusion_file import DiffusionHeader
from llamaserve.registry.diffusion_lora import check_lora
from llamaserve.registry.diffusion_memory import is_tiled
from llamaserve.registry.image_file import ImageFile, ImageSettings
from llamaserve.registry.spec import MOST_STEPS

MOST_LORAS: Final = 8

_NO_GUIDANCE: Final = 1.0
_LARGEST_SCALE: Final = 10.0  # of a LoRA
_RANDOM_SEEDS: Final = 2**32
_REPAINTED, _CHANGED = 1.0, 0.75  # strength with a mask and without one, if nobody names another one
_OTHER_SHAPE: Final = 0.02  # by how much shapes may differ before it is told
_JPEG, _WEBP = 95, 90  # quality, if nobody names another one
_FEW_STEPS: Final = frozenset({"karras", "exponential", "gits"})  # schedulers that need two steps at least
_LARGEST_COURSES: Final[dict[str | None, int]] = {"lcm": 50, "smoothstep": 75}  # past which steps are alike
_LORA: Final = re.compile(r"<lora:([^<>:]+)(?::([^<>:]*))?>")


@dataclass(frozen=True)
class Order:
    """What a request's pictures are like: ``first``, and so many that differ in the seed only, which counts on.
    ``idle`` are fields that do nothing, and ``warnings`` say what is not just as it was asked for.
    """

    first: ImageGeneration
    count: int
    idle: tuple[str, ...]
    warnings: tuple[str, ...]

    def with_first(self, **fields: Any) -> Order:
        """Return it with other fields of the pictures."""
        return replace(self, first=msgspec.structs.replace(self.first, **fields))

    def jobs(self) -> Iterator[ImageGeneration]:
        """Yield the pictures, each with its settings."""
        for number in range(self.count):
            yield _with_seed(self.first, self.first.seed + number)


def order(body: ImageFields, file: ImageFile, contents: DiffusionHeader) -> Order:
    """Return what a request asks of a model; if it has uploads, without these, and in a size that is not final unless
    it says which. Raises ``InvalidRequest`` for what the model can't do, and for LoRAs that are not there.
    """
    usual = ImageSettings.of(file.spec, contents)
    if isinstance(body, VariationRequest):
        _check_uploads(body, usual, contents)
    prompt, loras, warnings = _without_loras(body.prompt, file, contents)
    sampler, spread = body.sampler or (usual.sampler, None)
    if body.scheduler and spread not in (None, body.scheduler):
        raise InvalidRequest(f"sampler names the scheduler {spread}, and scheduler {body.scheduler}", param="scheduler")
    scheduler = body.scheduler or spread or (usual.scheduler if body.sampler is None else None)
    first = ImageGeneration(
        prompt=prompt,
        negative_prompt=body.negative_prompt,
        **_sizes(body.size or usual.size, contents),
        seed=secrets.randbelow(_RANDOM_SEEDS) if body.seed < 0 else body.seed,
        steps=_steps(body, usual.steps),
        cfg_scale=(usual.cfg_scale if body.cfg_scale is None else body.cfg_scale) or _NO_GUIDANCE,
        guidance=usual.guidance if body.guidance is None else body.guidance,
        sampler=sampler,
        scheduler=scheduler,
        loras=loras,
        partial_images=body.partial_images if body.stream else 0,
        format=body.output_format,
        quality=_quality(body),
    )
    _check_scheduler(body, first, contents)
    made = Order(first, body.count, tuple(_idle(body, first, usual, contents)), warnings)
    if not isinstance(body, VariationRequest):
        return sized(made, first.size, body, contents)
    if body.size is not None:
        sized(made, first.size, body, contents)  # refuses it, if that is to be done, before there is work
    return made


def sized(made: Order, size: Size, body: ImageFields, contents: DiffusionHeader) -> Order:
    """Return an order with the size that its pictures get. Raises ``InvalidRequest`` when that is to be exact, and the
    model can't make it.
    """
    made = made.with_first(**_sizes(size, contents))
    return replace(made, warnings=(*made.warnings, *_inexact(body, made.first, contents)))


def looks(body: VariationRequest, usual: ImageSettings) -> bool:
    """Whether the model looks at the pictures of a request, and does not, or not only, begin with one."""
    return usual.edits == "reference" and isinstance(body, EditRequest)


def beginning(
    made: Order, body: VariationRequest, own: Size, init: PictureFile, mask: PictureFile | None = None
) -> Order:
    """Return an order for pictures that begin with one whose ``own`` size is this. Raises ``InvalidRequest`` for a
    scheduler that has not as many steps as that takes.
    """
    strength = (_CHANGED if mask is None else _REPAINTED) if body.strength is None else body.strength
    made = made.with_first(init=init, mask=mask, strength=strength)
    warnings, first = list(made.warnings), made.first
    total, steps = Course.of(first.steps, strength)
    if total > (most := _LARGEST_COURSES.get(first.scheduler, total)):
        raise InvalidRequest(
            f"the scheduler {first.scheduler} has {most} steps at most, and with a strength of {strength:g} it would "
            f"need {total}",
            param=body.called("strength" if body.strength is not None else "steps"),
        )
    if steps < first.steps:
        warnings.append(f"a strength of {strength:g} leaves {steps} of {first.steps} steps")
    if abs(math.log(own.width * first.height / (own.height * first.width))) > _OTHER_SHAPE:
        warnings.append(f"the picture of {own} is cut to the shape of {first.size}")
    return replace(made, warnings=tuple(warnings))


def _sizes(size: Size, contents: DiffusionHeader) -> dict[str, Any]:
    """Return the fields of a job in which its size stands."""
    canvas = contents.family.canvas(size)
    return {
        "width": size.width,
        "height": size.height,
        "canvas_width": canvas.width,
        "canvas_height": canvas.height,
        "tiled": is_tiled(canvas),
    }


def _check_uploads(body: VariationRequest, usual: ImageSettings, contents: DiffusionHeader) -> None:
    if not contents.encodes:
        raise ModelNotCapable("this model can't see pictures: its files have no encoder for them", param="image")
    if len(body.image) > 1 and (contents.family.is_unet or not looks(body, usual)):
        raise ModelNotCapable(f"this model takes one picture, not {len(body.image)}", param="image")


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


def _without_loras(
    prompt: str, file: ImageFile, contents: DiffusionHeader
) -> tuple[str, tuple[LoraFile, ...], tuple[str, ...]]:
    """Return a prompt without the LoRAs that it names, these, and what is to be said of them. One that is named twice
    works for both.
    """
    scales: dict[str, float] = {}
    for found in _LORA.finditer(prompt):
        scales[found[1]] = scales.get(found[1], 0.0) + _scale(found[2])
    if len(scales) > MOST_LORAS:
        raise InvalidRequest(f"the prompt names {len(scales)} LoRAs; {MOST_LORAS} are the most", param="prompt")
    for name, scale in scales.items():
        if abs(scale) > _LARGEST_SCALE:
            raise InvalidRequest(f"the LoRA {name[:100]!r} is named too often: {scale:g} in all", param="prompt")
    try:
        rest = checked_prompt(_LORA.sub("", prompt))
    except ValueError as error:
        raise InvalidRequest(f"the prompt without its LoRAs {error}", param="prompt") from None
    loras, warnings = [], []
    for name, scale in scales.items():
        path = file.lora(name)
        fit = check_lora(path, contents)
        loras.append(LoraFile(str(path), scale, fit.size))
        if fit.used < fit.tensors:
            warnings.append(f"only {fit.used} of {fit.tensors} tensors of the LoRA {path.stem!a} are for this model")
    return rest, tuple(loras), tuple(warnings)


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
    if job.steps > (most := _LARGEST_COURSES.get(job.scheduler, job.steps)):
        raise InvalidRequest(f"the scheduler {job.scheduler} has {most} steps at most", param=param)


def _idle(body: ImageFields, job: ImageGeneration, usual: ImageSettings, contents: DiffusionHeader) -> Iterator[str]:
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
    if isinstance(body, EditRequest) and body.strength is not None and looks(body, usual) and not body.mask:
        yield "strength"


def _inexact(body: ImageFields, job: ImageGeneration, contents: DiffusionHeader) -> Iterator[str]:
    if job.canvas == job.size:
        return
    multiple = contents.family.multiple
    if body.size_policy == "refuse":
        raise InvalidRequest(
            f"{contents.family.name} models make pictures whose sides are multiples of {multiple} pixels, such as "
            f"{job.canvas}, and not {job.size}",
            param="size" if body.size else "size_policy",
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
