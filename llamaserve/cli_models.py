"""The commands for models on this machine: ``llamaserve pull | rm | show | verify | models``.

They ask and tell; what they do is in ``registry``. Serving is ``cli``'s business.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, TypedDict

import typer
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from llamaserve.chat.formats.known import thinks
from llamaserve.chat.template import TemplateRenderer
from llamaserve.chat.traits import ProbeJob, Traits
from llamaserve.cli_output import (
    by_name,
    called,
    err,
    models_folder,
    out,
    read_registry,
    read_settings,
    say,
    say_json,
    tell,
)
from llamaserve.errors import LlamaserveError, RegistryError
from llamaserve.registry import sources
from llamaserve.registry.deleting import deletable_with_others, delete_model, goes_with
from llamaserve.registry.facts import ModelFacts, gather
from llamaserve.registry.fetching import locate
from llamaserve.registry.folder import FoundModel, resolve, scan
from llamaserve.registry.gguf import GGUFHeader, read_header
from llamaserve.registry.inventory import fetched, is_here, models_here
from llamaserve.registry.lock_file import LockFile, pinned
from llamaserve.registry.pulling import pull as pull_model
from llamaserve.registry.remedies import Remedies, command
from llamaserve.registry.sources import FileSource, Source, parse_source
from llamaserve.registry.spec import ModelSpec, Registry, Task
from llamaserve.registry.tasks import kind_of, task_of
from llamaserve.registry.verifying import Finding, verify_model

ModelsFile = Annotated[
    Path | None, typer.Option(help="models.yaml to use.  [default: ./models.yaml, else the shipped]")
]
ModelsDir = Annotated[
    Path | None, typer.Option(help="Folder with model files to serve, too.  [default: ./models, if there is one]")
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
    _confirm(yes, models, settings.options)
    for name, spec in specs.items():
        deleted = delete_model(registry, spec, folder)
        say(f"{name}: deleted {_counted(len(deleted.files), 'file')}, which freed {_size(deleted.freed)}")


def show(
    model: Annotated[str, typer.Argument(help="Name, alias, path or hf:owner/repo:QUANT.")],
    as_json: Json = False,
    models_file: ModelsFile = None,
    models_dir: ModelsDir = None,
) -> None:
    """Show all that is known of a model."""
    settings = read_settings(models_file=models_file, models_dir=models_dir)
    registry, folder = read_registry(settings), models_folder(settings)
    name, spec = resolve(registry, folder, model)
    remedies = Remedies(registry, called(registry, name, model), settings.options)
    facts, header = gather(registry, name, spec, LockFile.beside(registry.path))
    abilities = _abilities(header)
    if as_json:
        say_json({**_plain(facts), "template_abilities": abilities})
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in _rows(facts, abilities, remedies.fetch(_first_absent(registry, spec))):
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
    if models:
        specs = dict(by_name(registry, folder, each) for each in models)
    else:
        specs = models_here(registry, folder, lock.entries())
    found: list[Finding] = []
    for name, spec in specs.items():
        with err.status(f"reading {escape(name)}"):
            findings = verify_model(registry, name, spec, lock, settings.options)
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
    """List the models of models.yaml and of the models folder, which of them are on this machine, and what else was
    fetched.
    """
    settings = read_settings(models_file=models_file, models_dir=models_dir)
    registry, folder = read_registry(settings), models_folder(settings)
    locked, damage = _locked(registry)
    listed = _listed(registry, fetched(registry, locked))
    found = scan(folder) if folder is not None else []
    if as_json:
        say_json({"models": listed, "folder": folder, "found": found})
    else:
        _print_models(registry, folder, listed, found)
    if damage is not None:
        raise damage


def _locked(registry: Registry) -> tuple[list[str], RegistryError | None]:
    """Return the sources of models.lock, or what is wrong with it: what models.yaml has can be listed all the same."""
    try:
        return [*LockFile.beside(registry.path).entries()], None
    except RegistryError as error:
        return [], error


def _print_models(
    registry: Registry, folder: Path | None, listed: Sequence[_Listed], found: Sequence[FoundModel]
) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("model", "here", "size", "licence"):
        table.add_column(heading, no_wrap=True)
    table.add_column("what it is")
    for each in listed:
        default = " (default)" if each["default"] else ""
        task = "" if each["task"] == "generation" else f"{each['task']}; "
        also = f" (also: {', '.join(each['aliases'])})" if each["aliases"] else ""
        here = "yes" if each["here"] else "no"
        what = f"{task}{each['description'] or ''}{also}"
        cells = (f"{each['model']}{default}", here, each["size"] or "", each["licence"] or "", what)
        table.add_row(*map(escape, cells))
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
    files = deletable_with_others(registry, spec, folder)
    others = [
        other for other, each in registry.models.items() if other != name and goes_with(registry, each, spec, files)
    ]
    also = f" (also the file of {', '.join(others)})" if others else ""
    size = sum(file.stat().st_size for file in files)
    tell(f"{name}: {_counted(len(files), 'file')}, {_size(size)}{also}")
    for file in files:
        tell(f"  {file}")


def _confirm(yes: bool, models: list[str], options: Sequence[str]) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        hint = command("llamaserve", "rm", "--yes", *models, *options)
        raise RegistryError("nothing is deleted without asking", hint=hint)
    if not typer.confirm("Delete?", err=True):
        raise typer.Exit(1)


def require_local(registry: Registry, folder: Path | None, reference: str, options: Sequence[str]) -> None:
    """Raise ``ModelFileMissing`` when a model is not on this machine. ``options`` make another command see it, too."""
    name, spec = resolve(registry, folder, reference)
    remedies = Remedies(registry, called(registry, name, reference), tuple(options))
    remedies.require(registry.source(spec), name)


class _Listed(TypedDict):
    """A model of models.yaml, or one that was fetched by its source, as scripts get it."""

    model: str
    aliases: list[str]
    default: bool
    here: bool
    source: str
    task: str
    size: str | None
    licence: str | None
    description: str | None


def _listed(registry: Registry, others: Mapping[str, ModelSpec]) -> list[_Listed]:
    return [
        _Listed(
            model=name,
            aliases=[alias for alias, target in registry.aliases.items() if target == name],
            default=name == registry.default_model,
            here=is_here(registry, spec),
            source=spec.source,
            task=_task(registry, spec),
            size=spec.size,
            licence=spec.licence,
            description=spec.description,
        )
        for name, spec in (*registry.models.items(), *others.items())
    ]


def _task(registry: Registry, spec: ModelSpec) -> Task:
    """Return what a model is there for. Where its settings do not say, its file does, if it is here and whole."""
    source = registry.source(spec)
    path = locate(source) if spec.task is None and kind_of(spec, source) == "text" else None
    header = None
    if path is not None:
        with suppress(LlamaserveError):  # a damaged one, which other commands tell
            header = read_header(path)
    return task_of(spec, header)


def _found_columns(model: FoundModel, registry: Registry) -> tuple[str, str, str, str]:
    if model.error is not None:
        return "broken", _size(model.size), "", escape(model.error)
    shadowed = model.name in registry.models or model.name in registry.aliases
    kind = kind_of(registry.by_defaults(model.source), FileSource(model.path))
    task = {"speech": "transcription", "image": "image", "text": ""}[kind]
    return "yes", _size(model.size), "", "hidden by the one of this name in models.yaml" if shadowed else task


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


def _first_absent(registry: Registry, spec: ModelSpec) -> Source:
    """Return where the first file of a model is that is not here; its own where all are."""
    parts = (parse_source(text, registry.path.parent) for text in spec.parts.sources.values())
    own = registry.source(spec)
    return next((source for source in (own, *parts) if locate(source) is None), own)


def _rows(facts: ModelFacts, abilities: list[str] | None, fetch: str) -> Iterator[tuple[str, str]]:
    yield "model", facts.model
    if facts.aliases:
        yield "also", ", ".join(facts.aliases)
    for label, text in (("what it is", facts.description), ("licence", facts.licence)):
        if text:
            yield label, text
    yield "task", facts.task
    yield "source", facts.source
    yield "here", "yes" if facts.here else f"no; {fetch}"
    for file in facts.files:
        yield "file", file
    if facts.size is not None:
        yield "size", _size(facts.size)
    if facts.sha256 is not None:
        yield "sha256", f"{facts.sha256} (models.yaml)"
    for adapter in facts.adapters:
        yield "LoRA", adapter
    yield from facts.parts.items()
    if facts.lock is not None:
        version = f"commit {facts.lock.revision}, " if facts.lock.revision else ""
        yield "locked", f"{version}{facts.lock.date}"
        for locked in facts.lock.files:
            yield "", f"{locked.sha256} {locked.name}"
    if facts.problem is not None:
        yield "problem", facts.problem
    yield from _header_rows(facts, abilities)


def _header_rows(facts: ModelFacts, abilities: list[str] | None) -> Iterator[tuple[str, str]]:
    header, speech, image, memory = facts.header, facts.speech, facts.image, facts.memory
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
    if speech is not None:
        yield "architecture", f"Whisper, {speech.size}"
        yield "parameters", f"{speech.parameters:,}"
        yield "quantisation", speech.quantisation
        yield "languages", "English only" if speech.languages == 1 else str(speech.languages)
    if image is not None:
        yield "architecture", image.family
        yield "parameters", f"{image.parameters:,}"
        yield "quantisation", image.quantisation
        yield "pictures", f"{image.size}, {_counted(image.steps, 'step')}, guidance {image.cfg_scale:g}"
        yield "edits", "pictures" if image.edits else "nothing: its files have no encoder for pictures"
    if memory is not None:
        parts = {name: getattr(memory, name) for name in ("weights", "cache", "compute", "vocabulary")}
        told = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
        yield "memory", f"{_size(memory.total)} on a CPU: {told}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _size(size: int) -> str:
    """Return bytes as models.yaml writes a size."""
    for unit, factor, digits in (("GB", 1e9, 2), ("MB", 1e6, 0), ("kB", 1e3, 0)):
        if size >= factor:
            return f"{size / factor:.{digits}f} {unit}"
    return f"{size} bytes"
