"""What all commands share: the terminal, how errors look there, and reading the settings and models.yaml."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import msgspec
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from llamaserve.errors import LlamaserveError
from llamaserve.registry.folder import folder_in_use, resolve
from llamaserve.registry.spec import ModelSpec, Registry, find_models_file, load_registry
from llamaserve.settings import Settings

out = Console()
err = Console(stderr=True)


def say(text: str) -> None:
    """Write a line to the standard output as it is, however long it is."""
    out.print(escape(text), highlight=False, soft_wrap=True)


def tell(text: str) -> None:
    """Write a line beside the output, as it is."""
    err.print(escape(text), highlight=False, soft_wrap=True)


def say_json(value: object) -> None:
    """Write a value as JSON, for scripts."""
    text = msgspec.json.format(msgspec.json.encode(value, enc_hook=shown), indent=2)
    sys.stdout.write(text.decode() + "\n")
    sys.stdout.flush()


def shown(path: Path) -> str:
    """Return a path as a text; what is no UTF-8 in it is replaced."""
    return os.fsencode(path).decode("utf-8", "replace")


def print_error(error: LlamaserveError) -> None:
    """Write an error and the next command to type."""
    err.print(f"[bold red]error:[/] {escape(error.message)}", highlight=False, soft_wrap=True)
    hint = error.hint or "llamaserve models (lists the models there are), llamaserve run --help"
    err.print(f"[bold]try:[/]   {escape(hint)}", highlight=False, soft_wrap=True)


def read_settings(**flags: Any) -> Settings:
    """Return the settings; a flag that was given wins over the environment."""
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"]))
        raise LlamaserveError(f"setting {name}: {problem['msg']}", hint="llamaserve run --help") from None


def read_registry(settings: Settings) -> Registry:
    """Return the models of the models.yaml in use."""
    return load_registry(find_models_file(settings.models_file))


def models_folder(settings: Settings) -> Path | None:
    """Return the folder that is searched for models: the one that is set, else ./models if there is one."""
    return folder_in_use(settings.models_dir)


def by_name(registry: Registry, folder: Path | None, reference: str) -> tuple[str, ModelSpec]:
    """Return a model and the name by which other commands know it."""
    name, spec = resolve(registry, folder, reference)
    return called(registry, name, reference), spec


def called(registry: Registry, name: str, reference: str) -> str:
    """Return the name by which other commands know a model: that of models.yaml, else what was typed."""
    return name if reference in registry.models or reference in registry.aliases else reference
