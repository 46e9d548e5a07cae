"""models.yaml, and the models that are on this machine: their files, what they take, and their chat templates."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import msgspec

from llamaserve.chat.modes import ModelTemplate
from llamaserve.chat.template import TemplateRenderer
from llamaserve.doctor.case import Case
from llamaserve.doctor.findings import (
    Finding,
    command,
    gigabytes,
    note,
    ok,
    problem,
    warning,
)
from llamaserve.doctor.llama import Build, NoAnswer, read_build, read_vocabulary
from llamaserve.doctor.packages import unfit
from llamaserve.doctor.template_lint import lint
from llamaserve.engine.events import Device
from llamaserve.engine.params import Footprint, LoadParams
from llamaserve.errors import InsufficientMemory, LlamaserveError, ModelNotFound, RegistryError
from llamaserve.registry import folder, wheels
from llamaserve.registry.budget import is_unified, memory_budget
from llamaserve.registry.cache import known_checksum
from llamaserve.registry.diffusion_file import read_diffusion, read_weights
from llamaserve.registry.fetching import check_sum, locate
from llamaserve.registry.gguf import GGUFHeader, read_header
from llamaserve.registry.image_file import locate_parts, plan_images
from llamaserve.registry.inventory import models_here
from llamaserve.registry.load_plan import LoadPlan, configured_adapters, load_params, plan_load
from llamaserve.registry.loadable import check_loadable
from llamaserve.registry.lock_file import LockEntry, LockFile
from llamaserve.registry.remedies import EDITOR, Files, Remedies, told
from llamaserve.registry.sources import FileSource, WheelSource, parse_source
from llamaserve.registry.spec import ModelSpec, Registry, find_models_file, load_registry
from llamaserve.registry.speech_file import plan_speech
from llamaserve.registry.split import part_paths
from llamaserve.registry.tasks import GENERATING, Kind, kind_of, task_of
from llamaserve.registry.verifying import unfit_adapter
from llamaserve.registry.whisper_file import read_whisper

_Devices = Callable[[], list[Device]]

_READ_AT_ONCE = 2e9  # bytes of a file whose sum is not known yet; it takes some 10 s
_PLACE = re.compile(r".+?:(\d+): ")


@dataclass(frozen=True)
class _Model:
    """A model by the name that commands take, and by the one that a request has."""

    name: str
    served: str
    spec: ModelSpec


def models(case: Case, read: Callable[[], Build] = read_build) -> Iterator[Finding]:
    """Examine models.yaml and models. ``read`` asks llamaserve's llama.cpp which GPUs there are."""
    try:
        registry = load_registry(find_models_file(case.settings.models_file))
    except RegistryError as error:
        yield from _wrong_list(case, error)
        return
    yield ok("models.yaml", f"{registry.path}: {len(registry.models)} models")

    @cache  # it takes a process, and as long as one may take where llama.cpp does not start
    def devices() -> list[Device]:
        try:
            return read().devices
        except NoAnswer:  # which is a finding of its own
            return []

    lock = LockFile.beside(registry.path)
    locked: dict[str, LockEntry] = {}
    try:
        locked |= lock.entries()
    except RegistryError as error:
        yield problem("models.lock", error.message, _at_line(error.message, lock.path))
    found = False
    kinds: set[Kind] = set()
    for item in _named(case, registry) if case.models else _here(case, registry, locked):
        found = True
        if isinstance(item, Finding):
            yield item
        else:
            kinds.add(kind_of(item.spec, registry.source(item.spec)))
            yield from _model(case, registry, item, locked, devices)
    hears, paints = "speech" in kinds, "image" in kinds
    if hears or ("transcription" in registry.default_models and not case.models):
        yield _packages(case, "speech", "it can't be transcribed", "transcribe it", needed=hears)
    if paints or ("image" in registry.default_models and not case.models):
        yield _packages(case, "images", "they can't be made", "make them", needed=paints)
    if not found:
        name = registry.default_model or next(iter(registry.models), None)
        fix = _remedies(case, registry, name).fetch(registry.source(registry.models[name])) if name else None
        yield note("models", "none is on this machine", fix or case.command("models"))


def _wrong_list(case: Case, error: RegistryError) -> Iterator[Finding]:
    """Yield a finding for each mistake, and the command that opens its line in an editor."""
    place = case.settings.models_file
    if place is None:
        try:
            place = find_models_file()
        except RegistryError:
            yield problem("models.yaml", error.message, case.command("run", "--help"))
            return
    for line in error.message.splitlines():
        yield problem("models.yaml", line, _at_line(line, place.expanduser().absolute()))


def _at_line(message: str, path: Path) -> str:
    """Return the command that opens a file in an editor, at the line that a message names."""
    found = _PLACE.match(message)
    at = f" +{found[1]}" if found else ""
    return f"{EDITOR}{at} {command(path)}"


def _remedies(case: Case, registry: Registry, name: str) -> Remedies:
    return Remedies(registry, name, case.settings.options, case.installation.program)


# ---- which models ------------------------------------------------------------------------------------------------


def _named(case: Case, registry: Registry) -> Iterator[_Model | Finding]:
    for reference in case.models:
        try:
            yield _Model(reference, *folder.resolve(registry, _models_folder(case), reference))
        except ModelNotFound as error:
            yield problem(reference, error.message, case.command("models"))
        except LlamaserveError as error:
            yield problem(reference, told(error), case.command("models"))


def _here(case: Case, registry: Registry, locked: Iterable[str]) -> Iterator[_Model | Finding]:
    """Yield all models whose files are on this machine."""
    place = _models_folder(case)
    try:
        names = models_here(registry, place, locked)
    except RegistryError as error:
        fix = command("ls", "-l", place) if place and place.is_dir() else command("mkdir", "-p", place)
        yield problem("models folder", error.message, fix)
        place, names = None, models_here(registry, None, locked)
    for name in names:
        yield _Model(name, *folder.resolve(registry, place, name))


def _models_folder(case: Case) -> Path | None:
    configured = case.settings.models_dir
    place = (configured or Path("models")).expanduser().absolute()
    return place if configured is not None or place.is_dir() else None


# ---- one model ---------------------------------------------------------------------------------------------------


def _model(
    case: Case, registry: Registry, model: _Model, locked: Mapping[str, LockEntry], devices: _Devices
) -> Iterator[Finding]:
    source, remedies = registry.source(model.spec), _remedies(case, registry, model.name)
    path = locate(source)
    if path is None:
        yield problem(model.name, *remedies.absent(source))
        return
    files = Files(source, path, locked.get(model.spec.source), model.spec.sha256)
    match kind_of(model.spec, source):
        case "speech":
            yield from _for_speech(case, remedies, model, files, devices)
        case "image":
            yield from _for_images(case, remedies, model, files, locked, devices)
        case "text":
            yield from _for_texts(case, remedies, model, files, locked, devices)


def _for_texts(
    case: Case, remedies: Remedies, model: _Model, files: Files, locked: Mapping[str, LockEntry], devices: _Devices
) -> Iterator[Finding]:
    """Examine a model for llama.cpp whose files are here."""
    try:
        header = read_header(files.path)
        check_loadable(header)
    except LlamaserveError as error:
        yield _broken(case, remedies, files, error)
        return
    size = gigabytes(files.path.stat().st_size) if header.split_count == 1 else f"{header.split_count} files"
    yield ok(model.name, f"{header.architecture}, {header.quantisation}, {size}: the file is whole and can be loaded")
    yield from _sum(case, remedies, files)
    if faults := list(_adapters(remedies, model.spec, header, locked)):
        yield from faults
    else:
        yield _fit(case, remedies, model.spec, partial(_plan_for_texts, remedies, model.spec, header), devices())
    if task_of(model.spec, header) in GENERATING:
        yield from asyncio.run(_template(case, model, header))


def _for_speech(case: Case, remedies: Remedies, model: _Model, files: Files, devices: _Devices) -> Iterator[Finding]:
    """Examine a model for whisper.cpp whose file is here."""
    try:
        header = read_whisper(files.path)
    except LlamaserveError as error:
        yield _broken(case, remedies, files, error)
        return
    kind = f"Whisper, {header.size_name}, {header.quantisation}, {gigabytes(header.file_size)}"
    yield ok(model.name, f"{kind}: the file is whole and can be loaded")
    yield from _sum(case, remedies, files)
    yield _fit(case, remedies, model.spec, partial(plan_speech, model.name, model.spec, header), devices())


def _for_images(
    case: Case,
    remedies: Remedies,
    model: _Model,
    files: Files,
    locked: Mapping[str, LockEntry],
    devices: _Devices,
) -> Iterator[Finding]:
    """Examine a model for stable-diffusion.cpp whose first file is here."""
    base = remedies.registry.path.parent
    all_files = [files]
    for part, text in model.spec.parts.sources.items():
        source = parse_source(text, base)
        if (path := locate(source)) is None:
            yield problem(remedies.name, *remedies.absent(source, f"the part {part} {text}"))
        else:
            all_files.append(Files(source, path, locked.get(text), adapter=True))
    if len(all_files) <= len(model.spec.parts.sources):
        return
    for each in all_files:
        try:
            read_weights(each.path)
        except LlamaserveError as error:
            yield _broken(case, remedies, each, error)
            return
    try:
        header = read_diffusion(files.path, locate_parts(remedies.name, model.spec, base))
    except LlamaserveError as error:
        yield problem(remedies.name, *remedies.unfit(files.source, error))
        return
    kind = f"{header.family.name}, {header.quantisation}, {gigabytes(header.file_size)}"
    yield ok(model.name, f"{kind}: the files are whole and can be loaded")
    yield from _sum(case, remedies, files)
    yield _fit(case, remedies, model.spec, partial(plan_images, model.name, model.spec, header), devices())


def _broken(case: Case, remedies: Remedies, files: Files, error: LlamaserveError) -> Finding:
    """Say what mends files that cannot be loaded. Their sums tell, which take a while for large files."""
    if not isinstance(files.source, FileSource) and _takes_long(files.path):
        return problem(remedies.name, error.message, case.command("verify", remedies.name))
    return problem(remedies.name, *remedies.mend(files, error))


def _takes_long(path: Path) -> bool:
    """Whether the sums of a model's files are not known yet, and it takes more than some seconds to know them."""
    return sum(part.stat().st_size for part in part_paths(path) if known_checksum(part) is None) > _READ_AT_ONCE


async def _template(case: Case, model: _Model, header: GGUFHeader) -> list[Finding]:
    template = ModelTemplate(header.chat_template, header.bos_token, header.eos_token)
    vocabulary = partial(read_vocabulary, str(header.path))
    async with TemplateRenderer(1) as renderer:
        found = await lint(model.served, template, vocabulary, case.settings.port, renderer)
    return [msgspec.structs.replace(finding, subject=model.name) for finding in found]


def _sum(case: Case, remedies: Remedies, files: Files) -> Iterator[Finding]:
    wheel = files.source if isinstance(files.source, WheelSource) and files.source.quant is not None else None
    if files.sha256 is None and wheel is None:
        return
    if _takes_long(files.path):
        message = "its checksum has not been looked at yet, which takes a while"
        yield note(remedies.name, message, case.command("verify", remedies.name))
        return
    try:
        check_sum(files.source, files.path, files.sha256)
    except (LlamaserveError, OSError) as error:
        yield problem(remedies.name, *remedies.mend(files, error))
        return
    if wheel is None:
        yield ok(remedies.name, "its checksum is that of models.yaml")
    elif wheels.is_unknown(wheel):
        yield warning(remedies.name, *remedies.unknown(files))
    else:
        origin = "" if files.sha256 is None else "it was made from the weights that models.yaml names, and "
        yield ok(remedies.name, f"{origin}its checksum is that of its conversion")


def _adapters(
    remedies: Remedies, spec: ModelSpec, header: GGUFHeader, locked: Mapping[str, LockEntry]
) -> Iterator[Finding]:
    """Yield what keeps a model from being loaded with its LoRA adapters."""
    for adapter in spec.lora:
        source = parse_source(adapter.source, remedies.registry.path.parent)
        path = locate(source)
        if path is None:
            yield problem(remedies.name, *remedies.absent(source, f"the LoRA adapter {adapter.source}"))
            continue
        files = Files(source, path, locked.get(adapter.source), adapter=True)
        if advice := unfit_adapter(remedies, files, header):
            yield problem(remedies.name, *advice)


def _plan_for_texts(
    remedies: Remedies, spec: ModelSpec, header: GGUFHeader, budget: Footprint, gpus: Sequence[Device]
) -> LoadPlan:
    adapters = configured_adapters(remedies.name, spec, remedies.registry.path.parent)
    params = load_params(spec, header, adapters)
    return plan_load(remedies.name, header, params, budget, len(gpus), unified=is_unified(gpus))


def _fit(
    case: Case,
    remedies: Remedies,
    spec: ModelSpec,
    plan: Callable[[Footprint, Sequence[Device]], LoadPlan],
    gpus: Sequence[Device],
) -> Finding:
    """Say whether a model can be loaded as its settings say, and fits into the memory that is free now."""
    name, source = remedies.name, remedies.registry.source(spec)
    budget = memory_budget(case.settings.memory, case.settings.gpu_memory)(gpus)
    try:
        planned = plan(budget, gpus)
    except InsufficientMemory as error:
        return warning(name, *remedies.unfit(source, error))
    except LlamaserveError as error:
        return problem(name, *remedies.unfit(source, error))
    on_gpu = f" and {gigabytes(planned.need.device)} of the GPU's" if planned.need.device else ""
    share = f"{gigabytes(planned.need.host)} of memory{on_gpu}"
    if isinstance(planned.params, LoadParams):
        share += f" with {planned.params.context} tokens of context"
    return ok(name, f"it takes {share}; {gigabytes(budget.host)} may be used")


# ---- extras ------------------------------------------------------------------------------------------------------


def _packages(case: Case, extra: str, lack: str, purpose: str, *, needed: bool) -> Finding:
    """Say whether the packages of an extra are here, which a model ``needed`` now, or else may need."""
    wanted = case.installation.requirements(extra)
    if lacking := list(unfit(wanted)):
        finding = problem if needed else note
        return finding(extra, f"{lack}: {'; '.join(lacking)}", case.installation.install(*wanted))
    return ok(extra, f"the packages that {purpose} are here, in fitting versions")
