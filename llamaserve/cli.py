"""The command line: ``llamaserve run | serve``, and the commands of ``cli_models``.

Every error ends with the next command to type. Imports of the web framework wait until a command needs them, so that
``--help`` and ``models`` answer at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from llamaserve import __version__, cli_doctor, cli_keys, cli_models, cli_plan, cli_service, cli_usage, heap, logs
from llamaserve.cli_models import fetch_model, require_local
from llamaserve.cli_output import err, models_folder, out, print_error, read_registry
from llamaserve.cli_settings import takes_settings
from llamaserve.errors import LlamaserveError, RegistryError
from llamaserve.registry.image_file import ImageFile, ImageSettings
from llamaserve.registry.spec import Registry, Task
from llamaserve.registry.speech_file import SpeechFile
from llamaserve.registry.tasks import task_of
from llamaserve.settings import Settings

if TYPE_CHECKING:
    from llamaserve.registry.pool import ModelPool
    from llamaserve.registry.served import ServedModel

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


@app.command(epilog=_EXAMPLES)
@takes_settings
def run(
    settings: Settings,
    model: Annotated[str | None, typer.Argument(help="Name, alias, path or hf:owner/repo:QUANT.")] = None,
) -> None:
    """Fetch a model if need be, and serve it."""
    registry = read_registry(settings)
    reference = model or registry.default_model
    if reference is None:
        raise RegistryError(
            "no model is named, and models.yaml has no `defaults: model:`", hint="llamaserve run <model>"
        )
    fetch_model(registry, models_folder(settings), reference, record_files=False)
    _serve(settings, registry, [reference])


@app.command()
@takes_settings
def serve(
    settings: Settings,
    models: Annotated[list[str] | None, typer.Argument(help="Names, aliases or paths; none: start empty.")] = None,
) -> None:
    """Serve models that are on this machine; nothing is downloaded."""
    registry = read_registry(settings)
    for reference in models or []:
        require_local(registry, models_folder(settings), reference, settings.options)
    _serve(settings, registry, models or [])


cli_models.register(app)
cli_plan.register(app)
cli_doctor.register(app)
cli_keys.register(app)
cli_usage.register(app)
cli_service.register(app)


def main() -> None:
    """Run the command line; an expected error becomes two lines and exit status 1."""
    heap.use_one_arena()
    try:
        app()
    except LlamaserveError as error:
        print_error(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _serve(settings: Settings, registry: Registry, references: Sequence[str]) -> None:
    from llamaserve.serving import make_keys, make_pool, serve_forever

    logs.set_up(settings.log_level, settings.log_format)
    keys = make_keys(settings)
    pool = make_pool(settings, registry, references)

    async def announce(url: str) -> None:
        with _loading_bars(pool):
            failures = await pool.preloaded()
        if failures and len(failures) == len(pool.named):
            raise next(iter(failures.values()))
        for failure in failures.values():
            print_error(failure)
        _print_ready(pool, url, needs_key=keys.needed)

    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is how a server is meant to end
        serve_forever(settings, pool, keys, announce)


@contextlib.contextmanager
def _loading_bars(pool: ModelPool) -> Iterator[None]:
    """Show how much of each model is loaded, on a terminal only and only if it takes a while."""
    if not err.is_terminal:
        yield
        return
    with Progress(TextColumn("loading {task.description}"), BarColumn(), console=err, transient=True) as progress:
        tasks = {model: progress.add_task(model.name, total=1.0) for model in pool.named}
        following = asyncio.create_task(_follow(tasks, progress))
        try:
            yield
        finally:
            following.cancel()


async def _follow(tasks: Mapping[ServedModel, TaskID], progress: Progress) -> None:
    while True:
        for model, task in tasks.items():
            progress.update(task, completed=model.progress)
        await asyncio.sleep(0.1)


def _described(model: ServedModel) -> str:
    where = "GPU" if model.live_worker is not None and model.live_worker.gpu else "CPU"
    if isinstance(model.file, SpeechFile):
        header = model.file.contents
        extent = f"{header.languages} languages" if header.multilingual else "English only"
        return f"{model.name}, {header.quantisation}, {extent}, on the {where}"
    if isinstance(model.file, ImageFile):
        contents = model.file.contents
        size = ImageSettings.of(model.spec, contents).size
        return f"{model.name}, {contents.family.name}, {contents.quantisation}, pictures of {size}, on the {where}"
    return f"{model.name}, {model.header.quantisation}, {model.context} tokens of context, on the {where}"


_CHAT = '{"messages": [{"role": "user", "content": "Hello!"}], "stream": true}'
_TO_TRY: dict[Task, tuple[str, ...]] = {  # where a task is asked for, and curl's words for what is sent there
    "generation": ("/v1/chat/completions", "-d", _CHAT),
    "embedding": ("/v1/embeddings", "-d", '{"input": ["Hello!", "Good morning"]}'),
    "rerank": ("/v1/rerank", "-d", '{"query": "a greeting", "documents": ["Hello!", "It rains"]}'),
    "moderation": ("/v1/moderations", "-d", '{"input": "Hello!"}'),
    "transcription": ("/v1/audio/transcriptions", "-F", "file=@speech.wav"),
    "image": ("/v1/images/generations", "-d", '{"prompt": "a lighthouse at dawn", "stream": true}'),
}


def _print_ready(pool: ModelPool, url: str, *, needs_key: bool) -> None:
    loaded = [model for model in pool.models if model.live_worker is not None]
    names = "; ".join(_described(model) for model in loaded) or "no model"
    lines = [f"[bold green]llamaserve {__version__} is ready:[/] {escape(names)}", ""]
    lines.append(f"  base URL   {url}/v1")
    lines.append(f"  API docs   {url}/docs")
    if others := len(pool.models) - len(loaded):
        lines.append(f"  also       {others} more, loaded when a request names one: {url}/v1/models")
    if loaded:
        path, *body = _TO_TRY[task_of(loaded[0].spec, loaded[0].file.known_header)]
        header = '-H "Authorization: Bearer $KEY" ' if needs_key else ""
        lines.append(f"  try it     curl -N {header}{url}{path} {escape(shlex.join(body))}")
    out.print("\n".join(lines), highlight=False, soft_wrap=True)
    sys.stdout.flush()
