"""``llamaserve plan``: what models take of the memory, and which of them fit together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from llamaserve.cli_output import by_name, models_folder, read_registry, read_settings, say, say_json
from llamaserve.engine.events import Device
from llamaserve.engine.params import Footprint, LoadParams
from llamaserve.errors import LlamaserveError
from llamaserve.registry.adapters import check_adapter
from llamaserve.registry.budget import is_unified, memory_budget
from llamaserve.registry.diffusion_file import read_diffusion
from llamaserve.registry.gguf import read_header
from llamaserve.registry.image_file import locate_parts, plan_images
from llamaserve.registry.inventory import models_here
from llamaserve.registry.load_plan import PROCESS, LoadPlan, configured_adapters, load_params, plan_load
from llamaserve.registry.loadable import check_loadable
from llamaserve.registry.lock_file import LockFile
from llamaserve.registry.remedies import Remedies, told
from llamaserve.registry.sources import parse_source
from llamaserve.registry.spec import ModelSpec, Registry
from llamaserve.registry.speech_file import plan_speech
from llamaserve.registry.tasks import kind_of
from llamaserve.registry.whisper_file import read_whisper
from llamaserve.settings import Settings
from llamaserve.worker.spare import Spares

_WIDEST = 1000  # columns of a table


@dataclass(frozen=True)
class _Planned:
    """A model and its plan, or why there is none."""

    name: str
    plan: LoadPlan | None = None
    error: LlamaserveError | None = None


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(plan)


def plan(
    models: Annotated[
        list[str] | None, typer.Argument(help="Names, aliases or files; none: all that are here.")
    ] = None,
    models_file: Annotated[str | None, typer.Option(help="models.yaml to use.")] = None,
    models_dir: Annotated[str | None, typer.Option(help="Folder with model files.")] = None,
    memory: Annotated[str | None, typer.Option(help="Main memory that models may take: 6GB, 75%.")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="GPU memory that models may take.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """Show what models take of the memory, and which fit together; exit status 1 if not all do."""
    settings = read_settings(models_file=models_file, models_dir=models_dir, memory=memory, gpu_memory=gpu_memory)
    registry = read_registry(settings)
    devices = asyncio.run(_devices())
    budget = memory_budget(settings.memory, settings.gpu_memory)(devices)
    chosen = _chosen(settings, registry, models)
    planned = [_plan(Remedies(registry, name, settings.options), spec, budget, devices) for name, spec in chosen]
    together, left_out = _fitting(planned, budget)
    if as_json:
        say_json(_as_json(planned, together, budget))
    else:
        _print(planned, together, left_out, budget, devices)
    if len(together) < len(planned):
        raise typer.Exit(1)


async def _devices() -> list[Device]:
    spares = Spares()
    try:
        return await spares.hardware()
    finally:
        await spares.aclose()


def _chosen(settings: Settings, registry: Registry, references: Sequence[str] | None) -> list[tuple[str, ModelSpec]]:
    """Return the models named, or all models on this machine."""
    folder = models_folder(settings)
    if references:
        return [by_name(registry, folder, reference) for reference in references]
    return [*models_here(registry, folder, LockFile.beside(registry.path).entries()).items()]


def _plan(remedies: Remedies, spec: ModelSpec, budget: Footprint, devices: Sequence[Device]) -> _Planned:
    source = remedies.registry.source(spec)
    try:
        path = remedies.require(source, remedies.name)
        match kind_of(spec, source):
            case "speech":
                plan = plan_speech(remedies.name, spec, read_whisper(path), budget, devices)
            case "image":
                base = remedies.registry.path.parent
                for part, text in spec.parts.sources.items():
                    remedies.require(parse_source(text, base), f"the part {part} {text} of {remedies.name}")
                parts = locate_parts(remedies.name, spec, base)
                plan = plan_images(remedies.name, spec, read_diffusion(path, parts), budget, devices)
            case "text":
                plan = _plan_for_texts(remedies, spec, path, budget, devices)
        return _Planned(remedies.name, plan)
    except LlamaserveError as error:
        return _Planned(remedies.name, error=error)


def _plan_for_texts(
    remedies: Remedies, spec: ModelSpec, path: Path, budget: Footprint, devices: Sequence[Device]
) -> LoadPlan:
    name, base, header = remedies.name, remedies.registry.path.parent, read_header(path)
    check_loadable(header)
    for adapter in spec.lora:
        remedies.require(parse_source(adapter.source, base), f"the LoRA adapter {adapter.source} of {name}")
    adapters = configured_adapters(name, spec, base)
    for each in adapters:
        check_adapter(read_header(Path(each.path)), header)
    params = load_params(spec, header, adapters)
    return plan_load(name, header, params, budget, len(devices), unified=is_unified(devices))


def _fitting(planned: Sequence[_Planned], budget: Footprint) -> tuple[list[_Planned], list[_Planned]]:
    """Return the models that fit together, taken in their order, and those that would fit without these."""
    taken, fitting, left_out = Footprint(), [], []
    for each in planned:
        if each.plan is None:
            continue
        if (taken + each.plan.need).fits(budget):
            taken += each.plan.need
            fitting.append(each)
        else:
            left_out.append(each)
    return fitting, left_out


def _print(
    planned: Sequence[_Planned],
    together: Sequence[_Planned],
    left_out: Sequence[_Planned],
    budget: Footprint,
    devices: Sequence[Device],
) -> None:
    for device in devices:
        say(f"{device.name} ({device.description}): {_size(device.free)} of {_size(device.total)} free")
    say(f"models may take {_both(budget, devices)} (--memory)\n")
    if not planned:
        say("there is no model on this machine; fetch one with: llamaserve pull smollm2-135m")
        return
    Console(width=_WIDEST).print(_table(planned, devices))  # rather lines that wrap than numbers that are cut off
    taken = sum((each.plan.need for each in together if each.plan), Footprint())
    if together:
        say(f"\nfit together: {', '.join(each.name for each in together)} ({_both(taken, devices)})")
    for each in left_out:
        assert each.plan is not None
        left = budget - taken
        say(
            f"{each.name} does not fit beside them: it needs {_both(each.plan.need, devices)}, and "
            f"{_both(left, devices)} are left; the one used least recently is unloaded for it"
        )
    for each in planned:
        if each.error is not None:
            say(f"\n{_said(each.name, told(each.error))}")


def _said(name: str, message: str) -> str:
    """Return a message that says which model it is about; those on memory do so already."""
    return message if message.startswith(f"{name} ") else f"{name}: {message}"


def _table(planned: Sequence[_Planned], devices: Sequence[Device]) -> Table:
    table = Table(box=None, pad_edge=False)
    headings = ["weights", "cache", "compute", "vocabulary", "process", "together"]
    headings += ["on the GPU", "GPU layers"] if devices else []
    table.add_column("model", no_wrap=True)
    for heading in [*headings, "context"]:
        table.add_column(heading, no_wrap=True, justify="right")
    for each in planned:
        if each.plan is None:
            table.add_row(each.name, *["-"] * (len(headings) + 1))
            continue
        parts, settings = each.plan.estimate, _settings(each.plan)
        row = [_all(parts.weights), _all(parts.cache), _all(parts.compute), parts.vocabulary, PROCESS.host]
        cells = [_size(size) for size in (*row, each.plan.need.host)]
        cells += [_size(each.plan.need.device), _cell(settings["gpu_layers"])] if devices else []
        table.add_row(each.name, *cells, _cell(settings["context"]))
    return table


def _settings(plan: LoadPlan) -> dict[str, int | str | None]:
    """Return what a plan has decided; None for what a model for speech or pictures has not."""
    if not isinstance(plan.params, LoadParams):
        return {"context": None, "gpu_layers": None}
    return {"context": plan.params.context, "gpu_layers": plan.params.gpu_layers}


def _cell(value: int | str | None) -> str:
    return "-" if value is None else str(value)


def _as_json(planned: Sequence[_Planned], together: Sequence[_Planned], budget: Footprint) -> dict[str, Any]:
    return {
        "budget": {"host": budget.host, "gpu": budget.device},
        "models": [_model_as_json(each) for each in planned],
        "together": [each.name for each in together],
    }


def _model_as_json(each: _Planned) -> dict[str, Any]:
    if each.plan is None:
        return {"name": each.name, "error": each.error.body()["error"] if each.error else None}
    parts = each.plan.estimate
    return {
        "name": each.name,
        "need": {"host": each.plan.need.host, "gpu": each.plan.need.device},
        "estimate": {"host": parts.total.host, "gpu": parts.total.device},
        "weights": _all(parts.weights),
        "cache": _all(parts.cache),
        "compute": _all(parts.compute),
        "vocabulary": parts.vocabulary,
        "process": PROCESS.host,
        **_settings(each.plan),
    }


def _all(footprint: Footprint) -> int:
    return footprint.host + footprint.device


def _both(footprint: Footprint, devices: Sequence[Device]) -> str:
    if is_unified(devices):
        return f"{_size(footprint.host)} of memory, {_size(footprint.device)} of it for the GPU"
    gpu = f" and {_size(footprint.device)} of GPU memory" if devices else ""
    return f"{_size(footprint.host)} of main memory{gpu}"


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if abs(size) >= 1e9 else f"{size / 1e6:.0f} MB"
