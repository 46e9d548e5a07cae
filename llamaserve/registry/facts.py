"""Everything that is known of a model without loading it, as plain values for a person or a script.

This module reads headers, and of adapters all weights, and asks no network. It knows nothing of running servers.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec

from llamaserve.engine.params import Footprint
from llamaserve.errors import LlamaserveError
from llamaserve.registry.adapters import check_adapter
from llamaserve.registry.diffusion_file import DiffusionHeader, read_diffusion
from llamaserve.registry.fetching import locate
from llamaserve.registry.gguf import GGUFHeader, read_header
from llamaserve.registry.image_file import ImageSettings, locate_parts, plan_images
from llamaserve.registry.inventory import is_here
from llamaserve.registry.load_plan import configured_adapters, context_of, load_params, plan_load
from llamaserve.registry.loadable import check_loadable
from llamaserve.registry.lock_file import LockEntry, LockFile
from llamaserve.registry.memory import Estimate
from llamaserve.registry.pulling import hash_of_template
from llamaserve.registry.spec import ModelSpec, Registry
from llamaserve.registry.speech_file import plan_speech
from llamaserve.registry.split import part_paths
from llamaserve.registry.tasks import kind_of, task_of
from llamaserve.registry.whisper_file import WhisperHeader, read_whisper

_EVERYTHING = Footprint(sys.maxsize)


class HeaderFacts(msgspec.Struct, frozen=True):
    """What the file says of itself. ``context`` is what requests get, ``trained_context`` what the model knows."""

    architecture: str
    name: str | None
    parameters: int
    quantisation: str
    layers: int | None
    width: int | None
    heads: int | list[int] | None
    key_value_heads: int | list[int] | None
    context: int
    trained_context: int | None
    vocabulary: int
    fills_gaps: bool
    template: str | None


class SpeechFacts(msgspec.Struct, frozen=True):
    """What a Whisper model's file says of itself. One of 1 language knows English only."""

    size: str
    parameters: int
    quantisation: str
    languages: int


class ImageFacts(msgspec.Struct, frozen=True):
    """What a diffusion model's files say of themselves, and how its pictures are made if a request does not say it."""

    family: str
    parameters: int
    quantisation: str
    size: str
    steps: int
    cfg_scale: float
    edits: bool


class MemoryFacts(msgspec.Struct, frozen=True):
    """The estimate of the memory that it takes on a CPU, its adapters included, in bytes."""

    weights: int
    cache: int
    compute: int
    vocabulary: int
    total: int


class ModelFacts(msgspec.Struct, frozen=True):
    """All that is known. ``size`` is bytes on this machine; ``problem`` says why the model cannot be loaded."""

    model: str
    aliases: list[str]
    source: str
    task: str
    description: str | None
    licence: str | None
    here: bool
    files: list[str]
    size: int | None
    sha256: str | None
    lock: LockEntry | None
    adapters: list[str]
    parts: dict[str, str]
    header: HeaderFacts | None
    speech: SpeechFacts | None
    image: ImageFacts | None
    memory: MemoryFacts | None
    problem: str | None


def gather(registry: Registry, name: str, spec: ModelSpec, lock: LockFile) -> tuple[ModelFacts, GGUFHeader | None]:
    """Return what is known of a model, and its header if it has one. Raises ``RegistryError`` for a damaged
    models.lock.
    """
    source = registry.source(spec)
    path = locate(source)
    header, speech, image, estimate, problem = None, None, None, None, None
    files = [] if path is None else list(part_paths(path))
    try:
        match None if path is None else (kind_of(spec, source), path):
            case ("speech", Path() as path):
                speech = read_whisper(path)
                estimate = plan_speech(name, spec, speech, _EVERYTHING, ()).estimate
            case ("image", Path() as path):
                image = read_diffusion(path, locate_parts(name, spec, registry.path.parent))
                files = list(image.paths)
                estimate = plan_images(name, spec, image, _EVERYTHING, ()).estimate
            case ("text", Path() as path):
                header = read_header(path)
                estimate = _estimate(registry, name, spec, header)
    except LlamaserveError as error:
        problem = error.message
    facts = ModelFacts(
        model=name,
        aliases=sorted(alias for alias, target in registry.aliases.items() if target == name),
        source=spec.source,
        task=task_of(spec, header),
        description=spec.description,
        licence=spec.licence,
        here=is_here(registry, spec),
        files=[os.fsencode(file).decode("utf-8", "replace") for file in files],
        size=sum(file.stat().st_size for file in files) if files else None,
        sha256=spec.sha256,
        lock=lock.get(spec.source),
        adapters=[adapter.source for adapter in spec.lora],
        parts={str(part): text for part, text in spec.parts.sources.items()},
        header=None if header is None else _header_facts(header, spec),
        speech=None if speech is None else _speech_facts(speech),
        image=None if image is None else _image_facts(image, spec),
        memory=None if estimate is None else _memory_facts(estimate),
        problem=problem,
    )
    return facts, header


def _header_facts(header: GGUFHeader, spec: ModelSpec) -> HeaderFacts:
    heads, key_value_heads = (_heads(header, key) for key in ("head_count", "head_count_kv"))
    return HeaderFacts(
        architecture=header.architecture,
        name=header.name,
        parameters=header.parameter_count,
        quantisation=header.quantisation,
        layers=header.block_count,
        width=header.embedding_length,
        heads=heads,
        key_value_heads=heads if key_value_heads is None else key_value_heads,
        context=context_of(spec, header),
        trained_context=header.context_length,
        vocabulary=header.vocabulary_size,
        fills_gaps=header.fim_tokens is not None,
        template=hash_of_template(header),
    )


def _heads(header: GGUFHeader, key: str) -> int | list[int] | None:
    """Return a number of heads, or one for each layer where they differ."""
    name = f"{header.architecture}.attention.{key}"
    if (number := header.integer(name)) is not None:
        return number
    try:
        each = [value for value in header.read_array(name) if isinstance(value, int)]
    except KeyError:
        return None
    return each[0] if len(set(each)) == 1 else each


def _speech_facts(header: WhisperHeader) -> SpeechFacts:
    return SpeechFacts(
        size=header.size_name,
        parameters=header.parameter_count,
        quantisation=header.quantisation,
        languages=header.languages,
    )


def _image_facts(header: DiffusionHeader, spec: ModelSpec) -> ImageFacts:
    usual = ImageSettings.of(spec, header)
    return ImageFacts(
        family=header.family.name,
        parameters=header.parameter_count,
        quantisation=header.quantisation,
        size=str(usual.size),
        steps=usual.steps,
        cfg_scale=usual.cfg_scale,
        edits=header.encodes,
    )


def _estimate(registry: Registry, name: str, spec: ModelSpec, header: GGUFHeader) -> Estimate:
    """Return what a model takes with its LoRA adapters. Raises ``ModelError`` and ``ModelNotCapable`` for what is wrong
    with it, with one of these, or with its settings.
    """
    check_loadable(header)
    adapters = configured_adapters(name, spec, registry.path.parent)
    for each in adapters:
        check_adapter(read_header(Path(each.path)), header)
    return plan_load(name, header, load_params(spec, header, adapters), _EVERYTHING, 0).estimate


def _memory_facts(estimate: Estimate) -> MemoryFacts:
    return MemoryFacts(
        weights=estimate.weights.host,
        cache=estimate.cache.host,
        compute=estimate.compute.host,
        vocabulary=estimate.vocabulary,
        total=estimate.total.host,
    )
