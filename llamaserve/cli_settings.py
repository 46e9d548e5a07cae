"""The options of commands that start a server: one for each setting that is worth a flag."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from llamaserve.cli_models import ModelsDir, ModelsFile
from llamaserve.cli_output import read_settings

_OPTIONS: Final[dict[str, Any]] = {
    "host": Annotated[str | None, typer.Option(help="Address to listen on.  [default: 127.0.0.1 and ::1]")],
    "port": Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.  [default: 5000]")],
    "models_file": ModelsFile,
    "models_dir": ModelsDir,
    "memory": Annotated[
        str | None, typer.Option(help="Main memory that models may take: 6GB, 75%.  [default: 80 % of what is free]")
    ],
    "api_key": Annotated[
        list[str] | None,
        typer.Option(help="Key that clients must send; others can see it in the list of processes. Repeatable."),
    ],
    "admin_key": Annotated[
        list[str] | None, typer.Option(help="Key for what changes the server, and all else. Repeatable.")
    ],
    "keys_file": Annotated[
        Path | None, typer.Option(help="File with named keys.  [default: the one of `llamaserve keys`]")
    ],
    "insecure": Annotated[bool | None, typer.Option("--insecure", help="Listen beyond this machine without any key.")],
    "allowed_hosts": Annotated[
        list[str] | None,
        typer.Option("--allowed-host", help="Name by which clients may call this machine, beside its own. Repeatable."),
    ],
    "cors_origins": Annotated[
        list[str] | None,
        typer.Option(
            "--cors-origin",
            help="Origin of web pages that may call, or *. Repeatable.  [default: all with keys, else local ones]",
        ),
    ],
    "ssl_certfile": Annotated[Path | None, typer.Option(help="Certificate as PEM; with it the server speaks TLS.")],
    "ssl_keyfile": Annotated[Path | None, typer.Option(help="Its private key as PEM, if not in that file.")],
    "log_format": Annotated[str | None, typer.Option(help="human or json.  [default: human]")],
    "log_level": Annotated[str | None, typer.Option(help="debug, info, warning or error.  [default: info]")],
}


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command these options, and call it with the ``settings`` that they and the environment make."""

    @functools.wraps(command)
    def run(**given: Any) -> None:
        flags = {name: given.pop(name) for name in _OPTIONS}
        command(**given, settings=read_settings(**{name: value for name, value in flags.items() if value != []}))

    own = [each for each in inspect.signature(command, eval_str=True).parameters.values() if each.name != "settings"]
    kind = inspect.Parameter.KEYWORD_ONLY
    added = [inspect.Parameter(name, kind, default=None, annotation=option) for name, option in _OPTIONS.items()]
    parameters = [each.replace(kind=kind) for each in own] + added
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run
