"""The command line: ``llamaserve run | serve | pull | models``.

Every error ends with the next command to type. Imports of the web framework wait until a command needs them, so that
``--help`` and ``models`` answer at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from llamaserve import __version__
from llamaserve.errors import LlamaserveError, ModelFileMissing, RegistryError
from llamaserve.registry.fetching import fetch, locate
from llamaserve.registry.spec import ModelSpec, Registry, find_models_file, load_registry
from llamaserve.settings import Settings

if TYPE_CHECKING:
    from llamaserve.registry.pool import ModelPool, ServedModel

_EXAMPLES = """\b
Examples:
  llamaserve run                                fetch the starter model and serve it
  llamaserve run qwen3-4b --port 8080           a model of models.yaml, on another port
  llamaserve run ~/models/my-model.gguf         a file
  llamaserve run hf:Qwen/Qwen3-4B-GGUF:Q4_K_M   a model on the Hugging Face hub
  llamaserve models                             what there is
"""

app = typer.Typer(
    help="Serve quantised GGUF models behind an OpenAI-compatible API.",
    epilog=_EXAMPLES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out = Console()
err = Console(stderr=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(__version__, highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Serve quantised GGUF models behind an OpenAI-compatible API."""


Host = Annotated[str | None, typer.Option(help="Address to listen on.  [default: 127.0.0.1 and ::1]")]
Port = Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.  [default: 5000]")]
ModelsFile = Annotated[
    Path | None, typer.Option(help="models.yaml to use.  [default: ./models.yaml, else the shipped]")
]
LogLevel = Annotated[str | None, typer.Option(help="debug, info, warning or error.  [default: info]")]


@app.command(epilog=_EXAMPLES)
def run(
    model: Annotated[str | None, typer.Argument(help="Name, alias, path.gguf or hf:owner/repo:QUANT.")] = None,
    host: Host = None,
    port: Port = None,
    models_file: ModelsFile = None,
    log_level: LogLevel = None,
) -> None:
    """Fetch a model if need be, and serve it."""
    settings = _settings(host=host, port=port, models_file=models_file, log_level=log_level)
    registry = _registry(settings)
    reference = model or registry.default_model
    if reference is None:
        raise RegistryError(
            "no model is named, and models.yaml has no `defaults: model:`", hint="llamaserve run <model>"
        )
    _pull(registry, reference)
    _serve(settings, registry, [reference])


@app.command()
def serve(
    models: Annotated[list[str] | None, typer.Argument(help="Names, aliases or paths; none: start empty.")] = None,
    host: Host = None,
    port: Port = None,
    models_file: ModelsFile = None,
    log_level: LogLevel = None,
) -> None:
    """Serve models that are on this machine; nothing is downloaded."""
    settings = _settings(host=host, port=port, models_file=models_file, log_level=log_level)
    registry = _registry(settings)
    for reference in models or []:
        _require_local(registry, reference)
    _serve(settings, registry, models or [])


@app.command()
def pull(
    models: Annotated[list[str], typer.Argument(help="Names, aliases or hf: references.")],
    models_file: ModelsFile = None,
) -> None:
    """Fetch models without serving them."""
    registry = _registry(_settings(models_file=models_file))
    for reference in models:
        out.print(f"{reference}: {_pull(registry, reference)}", highlight=False, soft_wrap=True)


@app.command("models")
def list_models(models_file: ModelsFile = None) -> None:
    """List the models of models.yaml, and which of them are on this machine."""
    registry = _registry(_settings(models_file=models_file))
    aliases: dict[str, list[str]] = {}
    for alias, name in registry.aliases.items():
        aliases.setdefault(name, []).append(alias)
    table = Table(box=None, pad_edge=False)
    for heading in ("model", "here", "size", "licence"):
        table.add_column(heading, no_wrap=True)
    table.add_column("what it is")
    for name, spec in registry.models.items():
        here = "yes" if _is_here(registry, spec) else "no"
        default = " (default)" if name == registry.default_model else ""
        task = "" if spec.task == "generation" else f"{spec.task}; "
        also = f" (also: {', '.join(aliases[name])})" if name in aliases else ""
        table.add_row(name + default, here, spec.size, spec.licence, f"{task}{spec.description or ''}{also}")
    out.print(table)
    out.print(f"\nfrom {registry.path}; serve one with: llamaserve run <model>", highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line; an expected error becomes two lines and exit status 1."""
    try:
        app()
    except LlamaserveError as error:
        _print_error(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _print_error(error: LlamaserveError) -> None:
    err.print(f"[bold red]error:[/] {escape(error.message)}", highlight=False, soft_wrap=True)
    hint = error.hint or "llamaserve models (lists the models there are), llamaserve run --help"
    err.print(f"[bold]try:[/]   {escape(hint)}", highlight=False, soft_wrap=True)


def _settings(**flags: Any) -> Settings:
    """Return the settings; a flag that was given wins over the environment."""
    from pydantic import ValidationError

    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"]))
        raise LlamaserveError(f"setting {name}: {problem['msg']}", hint="llamaserve run --help") from None


def _registry(settings: Settings) -> Registry:
    return load_registry(find_models_file(settings.models_file))


def _is_here(registry: Registry, spec: ModelSpec) -> bool:
    try:
        return locate(registry.source(spec)) is not None
    except LlamaserveError:
        return False


def _pull(registry: Registry, reference: str) -> Path:
    """Fetch a model unless it is here, with a progress bar, and return its file."""
    name, spec = registry.resolve_reference(reference)
    source = registry.source(spec)
    if (path := locate(source, spec.sha256)) is not None:
        return path
    err.print(f"fetching {name} ({spec.size or 'size unknown'}) from {spec.source}", highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=err, transient=True) as progress:
        task = progress.add_task(name, total=None)
        return fetch(source, spec.sha256, lambda done, total: progress.update(task, completed=done, total=total))


def _require_local(registry: Registry, reference: str) -> None:
    name, spec = registry.resolve_reference(reference)
    if locate(registry.source(spec)) is None:
        raise ModelFileMissing(f"{name} is not on this machine", hint=f"llamaserve pull {reference}")


def _serve(settings: Settings, registry: Registry, references: Sequence[str]) -> None:
    from llamaserve.registry.pool import ModelPool
    from llamaserve.serving import serve_forever

    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    pool = ModelPool.of(registry, references)

    async def announce(url: str) -> None:
        failures: list[LlamaserveError] = []
        for model in pool.models:
            try:
                with _loading_bar(model):
                    await model.worker()
            except LlamaserveError as error:
                failures.append(error)
        if failures and len(failures) == len(pool.models):
            raise failures[0]
        for failure in failures:
            _print_error(failure)
        _print_ready(pool, url)

    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is how a server is meant to end
        serve_forever(settings, pool, announce)


@contextlib.contextmanager
def _loading_bar(model: ServedModel) -> Iterator[None]:
    """Show how much of a model is loaded, on a terminal only and only if it takes a while."""
    if not err.is_terminal:
        yield
        return
    with Progress(TextColumn("loading {task.description}"), BarColumn(), console=err, transient=True) as progress:
        task = progress.add_task(model.name, total=1.0)
        following = asyncio.create_task(_follow(model, lambda done: progress.update(task, completed=done)))
        try:
            yield
        finally:
            following.cancel()


async def _follow(model: ServedModel, show: Callable[[float], None]) -> None:
    while True:
        show(model.supervisor.progress)
        await asyncio.sleep(0.1)


def _described(model: ServedModel) -> str:
    where = "GPU" if model.supervisor.gpu else "CPU"
    return f"{model.name}, {model.header.quantisation}, {model.context} tokens of context, on the {where}"


def _print_ready(pool: ModelPool, url: str) -> None:
    loaded = [model for model in pool.models if model.supervisor.pid is not None]
    names = "; ".join(_described(model) for model in loaded) or "no model"
    lines = [f"[bold green]llamaserve {__version__} is ready:[/] {escape(names)}", ""]
    lines.append(f"  base URL   {url}/v1")
    lines.append(f"  API docs   {url}/docs")
    if pool.models:
        body = '{"messages": [{"role": "user", "content": "Hello!"}], "stream": true}'
        lines.append(f"  try it     curl -N {url}/v1/chat/completions -d {escape(shlex.quote(body))}")
    out.print("\n".join(lines), highlight=False, soft_wrap=True)
    sys.stdout.flush()
