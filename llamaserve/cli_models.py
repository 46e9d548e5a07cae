"""The commands for models on this machine: ``llamaserve pull | rm | show | verify | models``.

They ask and tell; what they do is in ``registry``. Serving is ``cli``'s business.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypedDict

import typer
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from llamaserve.chat.formats.known import thinks
from llamaserve.chat.template import TemplateRenderer
from llamaserve.chat.traits import ProbeJob, Traits
from llamaserve.cli_output import err, models_folder, out, read_registry, read_settings, say, say_json, tell
from llamaserve.errors import LlamaserveError, ModelFileMissing, RegistryError
from llamaserve.registry import sources
from llamaserve.registry.deleting import deletable, delete_model
from llamaserve.registry.facts import ModelFacts, gather
from llamaserve.registry.fetching import locate
from llamaserve.registry.folder import FoundModel, resolve, scan
from llamaserve.registry.gguf import GGUFHeader
from llamaserve.registry.lock_file import LockFile, pinned
from llamaserve.registry.pulling import pull as pull_model
from llamaserve.registry.spec import ModelSpec, Registry
from llamaserve.registry.verifying import Finding, verify_model

ModelsFile = Annotated[
    Path | None, typer.Option(help="models.yaml to use.  [default: ./models.yaml, else the shipped]")
]
ModelsDir = Annotated[
    Path | None, typer.Option(help="Folder with GGUF files to serve, too.  [default: ./models, if there is one]")
]
Json = Annotated[bool, typer.Option("--json", help="Write JSON, for scripts.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(pull)
    app.command()(rm)
    app.command()(show)
    app.command()(verify)
    app.command("models")(list_models)


def pull(
    models: Annotated[list[str], typer.Argument(help="Names, aliases or hf: references.")],
    update: Annotated[
        bool, typer.Option("--update", help="Take the newest version, and note it in models.lock.")
    ] = False,
    models_file: ModelsFile = None,
    models_dir: ModelsDir = None,
) -> None:
    """Fetch models without serving them, as models.lock says."""
    settings = read_settings(models_file=models_file, models_dir=models_dir)
    registry, folder = read_registry(settings), models_folder(settings)
    for reference in models:
        say(f"{reference}: {fetch_model(registry, folder, reference, update=update)}")


def rm(
    models: Annotated[list[str], typer.Argument(help="Names, aliases or hf: references.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    models_file: ModelsFile = None,
    models_dir: ModelsDir = None,
) -> None:
    """Delete models' files: downloaded ones, and those in the models folder. models.yaml and models.lock stay."""
    settings = read_settings(models_file=models_file, models_dir=models_dir)
    registry, folder = read_registry(settings), models_folder(settings)
    specs = dict(resolve(registry, folder, reference) for reference in models)
    for name, spec in specs.items():
        _show_deletion(registry, folder, name, spec)
    _confirm(yes, models)
    for name, spec in specs.items():
        deleted = delete_model(registry, spec, folder)
        say(f"{name}: deleted {_counted(len(deleted.files), 'file')}, which freed {_size(deleted.freed)}")


def show(
    model: Annotated[str, typer.Argument(help="Name, alias, path.gguf or hf:owner/repo:QUANT.")],
    as_json: Json = False,
    models_file: ModelsFile = None,
    models_dir: ModelsDir = None,
) -> None:
    """Show all that is known of a model."""
    settings = read_settings(models_file=models_file, models_dir=models_dir)
    registry = read_registry(settings)
    name, spec = resolve(registry, models_folder(settings), model)
    facts, header = gather(registry, name, spec, LockFile.beside(registry.path))
    abilities = _abilities(header)
    if as_json:
        say_json({**_plain(facts), "template_abilities": abilities})
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in _rows(facts, abilities):
        table.add_row(label, escape(value))
    out.print(table)


def verify(
    models: Annotated[list[str] | None, typer.Argument(help="Names or aliases; none: all that are here.")] = None,
    as_json: Json = False,
    models_file: ModelsFile = None,
    models_dir: ModelsDir = None,
) -> None:
    """Read models' files anew, and compare them with models.yaml and models.lock."""
    settings = read_settings(models_file=models_file, models_dir=models_dir)
    registry, folder = read_registry(settings), models_folder(settings)
    lock = LockFile.beside(registry.path)
    specs = dict(resolve(registry, folder, each) for each in models) if models else _all_here(registry, folder, lock)
    found: list[Finding] = []
    for name, spec in specs.items():
        with err.status(f"reading {escape(name)}"):
            findings = verify_model(registry, name, spec, lock)
        found += findings
        for finding in findings if not as_json else []:
            say(f"{name}: {finding.problem}\n  fix: {finding.fix}")
        if not findings and not as_json:
            say(f"{name}: good")
    if as_json:
        say_json({"verified": [*specs], "findings": found})
    if found:
        raise typer.Exit(1)


def list_models(as_json: Json = False, models_file: ModelsFile = None, models_dir: ModelsDir = None) -> None:
    """List the models of models.yaml and of the models folder, and which of them are on this machine."""
    settings = read_settings(models_file=models_file, models_dir=models_dir)
    registry, folder = read_registry(settings), models_folder(settings)
    found = scan(folder) if folder is not None else []
    if as_json:
        say_json({"models": _listed(registry), "folder": folder, "found": found})
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("model", "here", "size", "licence"):
        table.add_column(heading, no_wrap=True)
    table.add_column("what it is")
    for each in _listed(registry):
        default = " (default)" if each["default"] else ""
        task = "" if each["task"] == "generation" else f"{each['task']}; "
        also = f" (also: {', '.join(each['aliases'])})" if each["aliases"] else ""
        here = "yes" if each["here"] else "no"
        table.add_row(
            f"{each['model']}{default}", here, each["size"], each["licence"], f"{task}{each['description'] or ''}{also}"
        )
    for model in found:
        table.add_row(escape(model.name), *_found_columns(model, registry))
    out.print(table)
    places = f"{registry.path}" if folder is None else f"{registry.path} and {folder}"
    say(f"\nfrom {places}; serve one with: llamaserve run <model>")


def fetch_model(
    registry: Registry, folder: Path | None, reference: str, *, update: bool = False, record_files: bool = True
) -> Path:
    """Fetch a model unless it is here, with a progress bar, and return its file."""
    name, spec = resolve(registry, folder, reference)
    lock = LockFile.beside(registry.path)
    here = locate(pinned(registry.source(spec), lock.get(spec.source))) is not None
    if update or not here:
        tell(f"fetching {name} ({spec.size or 'size unknown'}) from {spec.source}")
    with _bar(name) as progress:
        return pull_model(registry, spec, lock, progress, update=update, record_files=record_files)


@contextmanager
def _bar(name: str) -> Iterator[sources.Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=err, transient=True) as progress:
        task = progress.add_task(escape(name), total=None, visible=False)
        yield lambda done, total: progress.update(task, completed=done, total=total, visible=True)


def _show_deletion(registry: Registry, folder: Path | None, name: str, spec: ModelSpec) -> None:
    """Say what would be deleted; refuse here already what may not be."""
    files = deletable(registry.source(spec), folder)
    others = [other for other, each in registry.models.items() if each.source == spec.source and other != name]
    also = f" (also the file of {', '.join(others)})" if others else ""
    size = sum(file.stat().st_size for file in files)
    tell(f"{name}: {_counted(len(files), 'file')}, {_size(size)}{also}")
    for file in files:
        tell(f"  {file}")


def _confirm(yes: bool, models: list[str]) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise RegistryError("nothing is deleted without asking", hint=f"llamaserve rm --yes {' '.join(models)}")
    if not typer.confirm("Delete?", err=True):
        raise typer.Exit(1)


def _all_here(registry: Registry, folder: Path | None, lock: LockFile) -> dict[str, ModelSpec]:
    """Return all models with files on this machine, also those that only models.lock knows."""
    specs = {name: spec for name, spec in registry.models.items() if _is_here(registry, spec)}
    known = {spec.source for spec in registry.models.values()}
    for text in lock.entries():
        if text not in known and text.startswith(("hf:", "pypi:")) and not _is_adapter(registry, text):
            spec = ModelSpec(source=text)
            if _is_here(registry, spec):
                specs[text] = spec
    for model in scan(folder) if folder is not None else []:
        specs.setdefault(model.name, ModelSpec(source=model.source))
    return specs


def _is_adapter(registry: Registry, text: str) -> bool:
    return any(adapter.source == text for spec in registry.models.values() for adapter in spec.lora)


def _is_here(registry: Registry, spec: ModelSpec) -> bool:
    try:
        return locate(registry.source(spec)) is not None
    except LlamaserveError:
        return False


def require_local(registry: Registry, folder: Path | None, reference: str) -> None:
    """Raise ``ModelFileMissing`` when a model is not on this machine."""
    name, spec = resolve(registry, folder, reference)
    if locate(registry.source(spec)) is None:
        raise ModelFileMissing(f"{name} is not on this machine", hint=f"llamaserve pull {reference}")


class _Listed(TypedDict):
    """A model of models.yaml, as scripts get it."""

    model: str
    aliases: list[str]
    default: bool
    here: bool
    source: str
    task: str
    size: str | None
    licence: str | None
    description: str | None


def _listed(registry: Registry) -> list[_Listed]:
    return [
        _Listed(
            model=name,
            aliases=[alias for alias, target in registry.aliases.items() if target == name],
            default=name == registry.default_model,
            here=_is_here(registry, spec),
            source=spec.source,
            task=spec.task,
            size=spec.size,
            licence=spec.licence,
            description=spec.description,
        )
        for name, spec in registry.models.items()
    ]


def _found_columns(model: FoundModel, registry: Registry) -> tuple[str, str, str, str]:
    if model.error is not None:
        return "broken", _size(model.size), "", escape(model.error)
    shadowed = model.name in registry.models or model.name in registry.aliases
    return "yes", _size(model.size), "", "hidden by the one of this name in models.yaml" if shadowed else ""


def _abilities(header: GGUFHeader | None) -> list[str] | None:
    """Return in words what the chat template can do; None without one."""
    template = header.chat_template if header is not None else None
    if header is None or not template:
        return None

    async def probe() -> Traits:
        async with TemplateRenderer(1) as renderer:
            return await renderer.probe(ProbeJob(template, header.bos_token, header.eos_token))

    try:
        traits = asyncio.run(probe())
    except LlamaserveError as error:
        return [error.message]
    words = ["chat"]
    words += ["tools"] if traits.tools else []
    words += ["tool calls"] if traits.calls else []
    words += ["tool results"] if traits.results else []
    words += ["thoughts"] if traits.thinking or thinks(template) else []
    return words


def _plain(facts: ModelFacts) -> dict[str, object]:
    return {field: getattr(facts, field) for field in facts.__struct_fields__}


def _rows(facts: ModelFacts, abilities: list[str] | None) -> Iterator[tuple[str, str]]:
    yield "model", facts.model
    if facts.aliases:
        yield "also", ", ".join(facts.aliases)
    for label, text in (("what it is", facts.description), ("licence", facts.licence)):
        if text:
            yield label, text
    yield "task", facts.task
    yield "source", facts.source
    yield "here", "yes" if facts.here else f"no; llamaserve pull {facts.model}"
    for file in facts.files:
        yield "file", file
    if facts.size is not None:
        yield "size", _size(facts.size)
    if facts.sha256 is not None:
        yield "sha256", f"{facts.sha256} (models.yaml)"
    for adapter in facts.adapters:
        yield "LoRA", adapter
    if facts.lock is not None:
        version = f"commit {facts.lock.revision}, " if facts.lock.revision else ""
        yield "locked", f"{version}{facts.lock.date}"
        for locked in facts.lock.files:
            yield "", f"{locked.sha256} {locked.name}"
    if facts.problem is not None:
        yield "problem", facts.problem
    yield from _header_rows(facts, abilities)


def _header_rows(facts: ModelFacts, abilities: list[str] | None) -> Iterator[tuple[str, str]]:
    header, memory = facts.header, facts.memory
    if header is not None:
        yield "architecture", header.architecture + (f", {header.name}" if header.name else "")
        yield "parameters", f"{header.parameters:,}"
        yield "quantisation", header.quantisation
        yield "layers", f"{header.layers} of width {header.width}"
        yield "heads", f"{header.heads}, {header.key_value_heads} of keys and values"
        yield "context", f"{header.context} tokens a request, trained for {header.trained_context}"
        yield "vocabulary", f"{header.vocabulary:,} tokens" + (", fills gaps" if header.fills_gaps else "")
        yield "template", "none" if header.template is None else header.template
        if abilities:
            yield "", ", ".join(abilities)
    if memory is not None:
        parts = f"weights {_size(memory.weights)}, cache {_size(memory.cache)}, compute {_size(memory.compute)}"
        yield "memory", f"{_size(memory.total)} on a CPU: {parts}, vocabulary {_size(memory.vocabulary)}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _size(size: int) -> str:
    """Return bytes as models.yaml writes a size."""
    for unit, factor, digits in (("GB", 1e9, 2), ("MB", 1e6, 0), ("kB", 1e3, 0)):
        if size >= factor:
            return f"{size / factor:.{digits}f} {unit}"
    return f"{size} bytes"
