"""models.yaml, and the models that are on this machine: their files, what they take, and their chat templates."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from llamaserve.chat.modes import ModelTemplate
from llamaserve.chat.template import TemplateRenderer
from llamaserve.doctor.case import Case
from llamaserve.doctor.findings import (
    EDITOR,
    Finding,
    command,
    gigabytes,
    note,
    ok,
    one_after_the_other,
    problem,
    warning,
)
from llamaserve.doctor.llama import Build, NoAnswer, read_build, read_vocabulary
from llamaserve.doctor.template_lint import lint
from llamaserve.engine.events import Device
from llamaserve.errors import (
    ChecksumMismatch,
    InsufficientMemory,
    LlamaserveError,
    ModelFileMissing,
    ModelNotFound,
    RegistryError,
)
from llamaserve.registry import folder
from llamaserve.registry.budget import is_unified, memory_budget
from llamaserve.registry.cache import known_checksum
from llamaserve.registry.fetching import check_sum, locate
from llamaserve.registry.gguf import GGUFHeader, read_header
from llamaserve.registry.load_plan import configured_adapters, load_params, plan_load
from llamaserve.registry.loadable import check_loadable
from llamaserve.registry.sources import FileSource
from llamaserve.registry.spec import ModelSpec, Registry, find_models_file, load_registry

_READ_AT_ONCE = 2e9  # bytes of a file whose sum is not known yet; it takes some 10 s
_PLACE = re.compile(r".+?:(\d+): ")


@dataclass(frozen=True)
class _Model:
    """A model by the name that commands take."""

    name: str
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

    found = False
    for item in _named(case, registry) if case.models else _here(case, registry):
        found = True
        if isinstance(item, Finding):
            yield item
        else:
            yield from _model(case, registry, item, devices)
    if not found:
        name = registry.default_model or next(iter(registry.models), None)
        fix = case.installation.command(*(("pull", name) if name else ("models",)))
        yield note("models", "none is on this machine", fix)


def _wrong_list(case: Case, error: RegistryError) -> Iterator[Finding]:
    """Yield a finding for each mistake, and the command that opens its line in an editor."""
    place = case.settings.models_file
    if place is None:
        try:
            place = find_models_file()
        except RegistryError:
            yield problem("models.yaml", error.message, case.installation.command("run", "--help"))
            return
    for line in error.message.splitlines():
        found = _PLACE.match(line)
        at = f" +{found[1]}" if found else ""
        yield problem("models.yaml", line, f"{EDITOR}{at} {command(place.expanduser().absolute())}")


# ---- which models ------------------------------------------------------------------------------------------------


def _named(case: Case, registry: Registry) -> Iterator[_Model | Finding]:
    for reference in case.models:
        try:
            yield _Model(reference, folder.resolve(registry, _models_folder(case), reference)[1])
        except ModelNotFound as error:
            yield problem(reference, error.message, case.installation.command("models"))
        except LlamaserveError as error:
            told = f"{error.message}; {error.hint}" if error.hint else error.message
            yield problem(reference, told, case.installation.command("models"))


def _here(case: Case, registry: Registry) -> Iterator[_Model | Finding]:
    """Yield all models whose files are on this machine."""
    known: set[Path] = set()
    for name, spec in registry.models.items():
        try:
            path = locate(registry.source(spec))
        except LlamaserveError as error:
            yield problem(name, error.message, case.installation.command("pull", name))
            continue
        if path is not None:
            known.add(path)
            yield _Model(name, spec)
    place = _models_folder(case)
    for inside in folder.scan(place) if place is not None else ():
        if inside.path not in known:
            yield _Model(inside.name, folder.resolve(registry, place, inside.name)[1])


def _models_folder(case: Case) -> Path | None:
    configured = case.settings.models_dir
    place = (configured or Path("models")).expanduser().absolute()
    return place if configured is not None or place.is_dir() else None


# ---- one model ---------------------------------------------------------------------------------------------------


def _model(case: Case, registry: Registry, model: _Model, devices: Callable[[], list[Device]]) -> Iterator[Finding]:
    source = registry.source(model.spec)
    try:
        path = locate(source)
    except LlamaserveError as error:
        yield problem(model.name, error.message, _again(case, registry, model, None))
        return
    if path is None:
        yield problem(model.name, "it is not on this machine", case.installation.command("pull", model.name))
        return
    try:
        header = read_header(path)
        check_loadable(header)
    except LlamaserveError as error:
        yield problem(model.name, error.message, _again(case, registry, model, path))
        return
    size = gigabytes(path.stat().st_size) if header.split_count == 1 else f"{header.split_count} files"
    yield ok(model.name, f"{header.architecture}, {header.quantisation}, {size}: the file is whole and can be loaded")
    yield from _sum(case, registry, model, path)
    if model.spec.task == "generation" and not header.is_embedding_model:
        yield from _fit(case, registry, model, header, devices)
        yield from asyncio.run(_template(case, model, header))


async def _template(case: Case, model: _Model, header: GGUFHeader) -> list[Finding]:
    template = ModelTemplate(header.chat_template, header.bos_token, header.eos_token)
    vocabulary = partial(read_vocabulary, str(header.path))
    async with TemplateRenderer(1) as renderer:
        return await lint(model.name, template, vocabulary, case.settings.port, renderer)


def _again(case: Case, registry: Registry, model: _Model, path: Path | None) -> str:
    """Return the command that fetches a file anew; what was not fetched can only be looked at."""
    if isinstance(registry.source(model.spec), FileSource):
        return command("ls", "-l", path or registry.source(model.spec))
    fetch = case.installation.command("pull", model.name)
    return one_after_the_other(case.installation.command("rm", model.name), fetch)


def _sum(case: Case, registry: Registry, model: _Model, path: Path) -> Iterator[Finding]:
    promised = model.spec.sha256
    if promised is None:
        return
    if known_checksum(path) is None and path.stat().st_size > _READ_AT_ONCE:
        message = "its checksum has not been looked at yet, which takes a while"
        yield note(model.name, message, case.installation.command("verify", model.name))
        return
    try:
        check_sum(path, promised)
    except ChecksumMismatch as error:
        own = isinstance(registry.source(model.spec), FileSource)
        tool = ("shasum", "-a", "256") if case.machine.is_mac else ("sha256sum",)
        yield problem(model.name, error.message, command(*tool, path) if own else _again(case, registry, model, path))
    except RegistryError as error:
        yield problem(model.name, error.message, f"{EDITOR} {command(registry.path)}")
    else:
        yield ok(model.name, "its checksum is that of models.yaml")


def _fit(
    case: Case, registry: Registry, model: _Model, header: GGUFHeader, devices: Callable[[], list[Device]]
) -> Iterator[Finding]:
    """Say whether a model fits into the memory that is free now."""
    gpus = devices()
    budget = memory_budget(case.settings.memory, case.settings.gpu_memory)(gpus)
    try:
        adapters = configured_adapters(model.name, model.spec, registry.path.parent)
        params = load_params(model.spec, header, adapters)
        plan = plan_load(model.name, header, params, budget, len(gpus), unified=is_unified(gpus))
    except ModelFileMissing as error:
        yield problem(model.name, error.message, case.installation.command("pull", model.name))
        return
    except InsufficientMemory as error:
        listed = model.name in registry.models or model.name in registry.aliases
        fix = f"{EDITOR} {command(registry.path)}" if listed else case.installation.command("models")
        told = f"{error.message}; {error.hint}" if error.hint else error.message
        yield warning(model.name, told, fix)
        return
    on_gpu = f" and {gigabytes(plan.need.device)} of the GPU's" if plan.need.device else ""
    share = f"{gigabytes(plan.need.host)} of memory{on_gpu}"
    context = plan.params.context
    yield ok(model.name, f"it takes {share} with {context} tokens of context; {gigabytes(budget.host)} may be used")
