"""The files of a diffusion model: what they say of themselves, and how it is loaded by the model's settings.

The same for stable-diffusion.cpp's files as ``model_file`` is for llama.cpp's. Knows nothing of processes, or of
whether it is loaded.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement

from llamaserve.engine.params import Adapter, Footprint
from llamaserve.errors import (
    InsufficientMemory,
    InvalidRequest,
    ModelError,
    ModelFileMissing,
    ModelNotCapable,
    NotSupported,
)
from llamaserve.images.values import DiffusionParams, Edits, Part, Sampler, Scheduler, Size
from llamaserve.registry.budget import is_unified
from llamaserve.registry.cache import is_file
from llamaserve.registry.diffusion_file import DiffusionHeader, read_diffusion
from llamaserve.registry.diffusion_memory import PictureWork, estimate_diffusion, flash_attention
from llamaserve.registry.fetching import locate
from llamaserve.registry.hardware import performance_cores
from llamaserve.registry.load_plan import PROCESS, LoadPlan
from llamaserve.registry.memory import Estimate, claimed
from llamaserve.registry.other_file import OtherFile, refuse_adapters, refuse_text_settings
from llamaserve.registry.sources import parse_source
from llamaserve.registry.spec import ModelSpec
from llamaserve.registry.tasks import task_of
from llamaserve.worker.protocol import Device

_EXTRA: Final = "images"
_LORA: Final = ".safetensors"
_LORA_NAME: Final = re.compile(r"[\w(\[+][^/\\<>:\x00-\x1f\x7f]{0,199}")  # a file of the folder, and not a hidden one


class ImageFile(OtherFile[DiffusionHeader]):
    """The files of a diffusion model with these settings; relative paths begin at ``base``."""

    task = "image"

    @property
    def is_here(self) -> bool:
        """Whether all of them are on this machine."""
        try:
            locate_parts(self._name, self.spec, self._base)
        except ModelError:
            return False
        return super().is_here

    def _read_contents(self, *, check_sum: bool) -> DiffusionHeader:
        path = self._path(self.spec.sha256 if check_sum else None)
        return read_diffusion(path, locate_parts(self._name, self.spec, self._base))

    def load_params(self) -> DiffusionParams:
        """Return how it is loaded."""
        return image_params(self.spec, self.contents)

    def plan(self, adapters: Sequence[Adapter], budget: Footprint, devices: Sequence[Device]) -> LoadPlan:
        """Check the files, and decide how it is loaded. Raises ``ModelError`` for files that stable-diffusion.cpp must
        not see, ``ModelNotCapable``, ``InsufficientMemory``, and ``NotSupported`` when the library is not here.
        """
        require_packages()
        self.checked(adapters)
        self._contents = self._read_contents(check_sum=True)  # anew, which takes a tenth of a second
        return plan_images(self._name, self.spec, self._contents, budget, devices)

    def lora(self, name: str) -> Path:
        """Return the LoRA of this name, which a prompt has named. Raises ``InvalidRequest`` when there is none."""
        folder = self.spec.image.loras
        path = None if folder is None else self._base / folder.expanduser() / (name.removesuffix(_LORA) + _LORA)
        if path is None or not _LORA_NAME.fullmatch(name) or not is_file(path):
            why = ": models.yaml names no folder with some" if folder is None else ""
            raise InvalidRequest(f"{self._name} has no LoRA called {name[:100]!r}{why}", param="prompt")
        return path


@functools.cache
def require_packages() -> None:
    """Refuse what this installation can't do, and say which command would change that. Raises ``NotSupported``, and
    looks again the next time.
    """
    needed = [*_of_extra()]
    lacking = [each for each in needed if not _is_installed(each)]
    if lacking:
        command = [sys.executable, "-m", "pip", "install", *map(_written, needed)]
        raise NotSupported(
            f"pictures need {' and '.join(map(_written, lacking))}, which is not installed; this compiles what has to "
            f"be, in some minutes: {shlex.join(command)}"
        )


def _of_extra() -> Iterator[Requirement]:
    for text in importlib.metadata.requires("llamaserve") or ():
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}) and wanted.marker.evaluate({"extra": _EXTRA}):
            yield wanted


def _written(wanted: Requirement) -> str:
    return f"{wanted.name}{wanted.specifier}"


def _is_installed(wanted: Requirement) -> bool:
    try:
        return wanted.specifier.contains(importlib.metadata.version(wanted.name), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        return False


def locate_parts(name: str, spec: ModelSpec, base: Path) -> dict[Part, Path]:
    """Return where the parts of a diffusion model are; relative paths begin at ``base``. Raises ``ModelFileMissing``
    when one is not here.
    """
    found: dict[Part, Path] = {}
    for part, source in spec.parts.sources.items():
        path = locate(parse_source(source, base))
        if path is None:
            raise ModelFileMissing(
                f"the part {part} of {name} is not on this machine: {source}", hint=f"llamaserve pull {name}"
            )
        found[part] = path
    return found


def image_params(spec: ModelSpec, header: DiffusionHeader) -> DiffusionParams:
    """Return how a diffusion model is loaded. Raises ``ModelNotCapable`` when it can't do what its settings say."""
    task = task_of(spec, None)
    if task != "image":
        raise ModelNotCapable(f"its file is one of a diffusion model, which does nothing but make pictures: {task}")
    refuse_text_settings(spec)
    if spec.image.edits == "reference" and not header.family.looks:
        raise ModelNotCapable(f"{header.family.name} models can't look at pictures: `edits` must be repaint")
    return DiffusionParams(
        path=str(header.path),
        whole=header.whole,
        parts={part: str(path) for part, path in header.parts.items()},
        encodes=header.encodes,
        small_decoder="taesd" in header.parts or header.decodes_small,
        flash_attention=flash_attention(header, ImageSettings.of(spec, header).size),
        threads=performance_cores() if spec.threads == "auto" else spec.threads,
    )


def footprint(
    spec: ModelSpec, header: DiffusionHeader, devices: Sequence[Device], work: PictureWork | None = None
) -> Footprint:
    """Return what a model takes while it makes a picture, one of the usual size unless it is another ``work``. These
    are GPUs that llama.cpp can use, and only the child learns whether the other library can, too: so both must have
    room for it, but where they use the main memory.
    """
    usual = ImageSettings.of(spec, header).size
    work = work or PictureWork(header.family.canvas(usual))
    host = estimate_diffusion(header, work, flash=flash_attention(header, usual))
    if not devices:
        return Footprint(host)
    return Footprint(0, host) if is_unified(devices) else Footprint(host, host)


@dataclass(frozen=True)
class ImageSettings:
    """How a model's pictures are made where nobody says otherwise."""

    size: Size
    steps: int
    cfg_scale: float
    guidance: float
    sampler: Sampler
    scheduler: Scheduler | None
    edits: Edits

    @classmethod
    def of(cls, spec: ModelSpec, header: DiffusionHeader) -> ImageSettings:
        """Return a model's: as models.yaml says, or else as its family's makers recommend."""
        own, family = spec.image, header.family
        return cls(
            size=own.size or family.size,
            steps=family.steps if own.steps is None else own.steps,
            cfg_scale=family.cfg_scale if own.cfg_scale is None else own.cfg_scale,
            guidance=family.guidance if own.guidance is None else own.guidance,
            sampler=own.sampler or family.sampler,
            scheduler=own.scheduler,
            edits=own.edits or family.edits,
        )


def plan_images(
    name: str, spec: ModelSpec, header: DiffusionHeader, budget: Footprint, devices: Sequence[Device]
) -> LoadPlan:
    """Decide how a diffusion model is loaded, and return what it takes with pictures of its usual size. Raises
    ``ModelNotCapable``, and ``InsufficientMemory`` when that is more than the whole budget.
    """
    refuse_adapters(bool(spec.lora))
    try:
        params = image_params(spec, header)
    except ModelNotCapable as error:
        raise ModelNotCapable(f"{name} can't be loaded: {error.message}") from error
    taken = footprint(spec, header, devices)
    need = claimed(taken, unified=is_unified(devices)) + PROCESS
    if not need.fits(budget):
        raise insufficient(name, need, budget)
    weights = Footprint(0, header.weight_bytes) if taken.device else Footprint(header.weight_bytes)
    return LoadPlan(params, Estimate(weights, Footprint(), taken - weights, 0, Footprint()), need, PROCESS, 0)


def insufficient(name: str, need: Footprint, budget: Footprint, what: str = "") -> InsufficientMemory:
    """Return the error for what is more than the whole budget."""
    return InsufficientMemory(
        f"{name} needs {need.host / 1e6:.0f} MB of memory{what}, and models may use {budget.host / 1e6:.0f} MB",
        hint="choose a smaller model, or give models more with --memory",
    )
