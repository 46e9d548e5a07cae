"""``llamaserve service install | uninstall | status``: the server as a service of the user, without root.

What is installed is checked as ``serve`` would, before anything is written. How services are written and asked is in
``service``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from llamaserve.cli_models import Json, ModelsDir, ModelsFile, require_local
from llamaserve.cli_output import models_folder, read_registry, read_settings, say, say_json, tell
from llamaserve.errors import LlamaserveError
from llamaserve.registry.folder import named, resolve
from llamaserve.registry.sources import FileSource
from llamaserve.registry.spec import Registry
from llamaserve.service.definition import Definition, define
from llamaserve.service.environment import environment_file, left_behind, of_service, read_environment, write_template
from llamaserve.service.launchd import Launchd
from llamaserve.service.manager import Manager, own_text
from llamaserve.service.status import Status, status_of
from llamaserve.service.systemd import Systemd
from llamaserve.settings import Settings

service = typer.Typer(
    help="Keep the server running: as a service of this user, under systemd or launchd.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.add_typer(service, name="service")


@service.command()
def install(
    models: Annotated[list[str] | None, typer.Argument(help="Names, aliases or paths; none: start empty.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.  [default: 127.0.0.1 and ::1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.  [default: 5000]")] = None,
    models_file: ModelsFile = None,
    models_dir: ModelsDir = None,
    memory: Annotated[str | None, typer.Option(help="Main memory that models may take: 6GB, 75%.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.  [default: info]")] = None,
    linger: Annotated[
        bool, typer.Option("--linger", help="Also have it start at boot and run on after logout (Linux).")
    ] = False,
    as_text: Annotated[bool, typer.Option("--print", help="Write the service's file to the output instead.")] = False,
) -> None:
    """Have `llamaserve serve` with these models and options run from now on, in this folder. Again: with other ones."""
    manager, file = _manager(), environment_file()
    own = read_environment(file)
    _tell_left_behind(left_behind(os.environ, own), file)
    _see_as_the_service(own)
    flags = {
        "host": host,
        "port": port,
        "models_file": _absolute(models_file),
        "models_dir": _absolute(models_dir),
        "memory": memory,
        "log_level": log_level,
    }
    settings = read_settings(**flags)
    definition = define(_checked(settings, models or []), _options(flags), file)
    if as_text:
        sys.stdout.write(manager.text(definition))
        return
    _install(manager, definition, settings, file)
    _tell_installed(manager, file)
    if isinstance(manager, Systemd):
        _linger(manager, linger)


@service.command()
def uninstall() -> None:
    """Stop the service and remove it. Models, settings and keys stay."""
    manager, file = _manager(), environment_file()
    if not manager.uninstall():
        say("there is no service to remove")
        return
    say(f"removed: {manager.file}")
    if file.exists():
        say(f"  settings, keys   stay in {file}")


@service.command()
def status(as_json: Json = False) -> None:
    """Show how the service is; exit status 0 if it runs, 3 if not, 4 if it is not installed."""
    manager = _manager()
    found = status_of(manager)
    if as_json:
        say_json(found)
    else:
        _show(found, manager)
    raise typer.Exit(found.exit_status)


def _manager() -> Manager:
    match sys.platform:
        case "linux":
            return Systemd()
        case "darwin":
            return Launchd()
    raise LlamaserveError(f"services are written for Linux and macOS, not for {sys.platform}", hint="llamaserve serve")


def _see_as_the_service(own: Mapping[str, str]) -> None:
    """Have this process see the settings that the service will see, so that it is checked with these."""
    environment = of_service(os.environ, own)
    os.environ.clear()
    os.environ.update(environment)


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.expanduser().absolute()


def _options(flags: Mapping[str, object]) -> list[str]:
    """Return the options that were given, as words."""
    given = ((f"--{name.replace('_', '-')}", value) for name, value in flags.items() if value is not None)
    return [word for option, value in given for word in (option, str(value))]


def _checked(settings: Settings, models: Sequence[str]) -> list[str]:
    """Return the models as the service is to name them, all of which it can serve."""
    if settings.port == 0:
        raise LlamaserveError("a service needs a port that stays", hint="llamaserve service install --port 5000")
    registry, folder = read_registry(settings), models_folder(settings)
    for model in models:
        require_local(registry, folder, model, settings.options)
    return [_lasting(registry, folder, model) for model in models]


def _lasting(registry: Registry, folder: Path | None, reference: str) -> str:
    """Return a reference that means the same in any folder: a path becomes absolute."""
    _, spec = resolve(registry, folder, reference)
    source = registry.source(spec)
    is_name = reference in registry.models or reference in registry.aliases
    if is_name or not isinstance(source, FileSource) or (folder is not None and named(folder, reference) is not None):
        return reference
    return str(source.path)


def _install(manager: Manager, definition: Definition, settings: Settings, file: Path) -> None:
    manager.check()
    own_text(manager.file)  # which must not be another program's
    _require_address(manager, settings)
    write_template(file)
    manager.install(definition)


def _require_address(manager: Manager, settings: Settings) -> None:
    """Raise what ``serve`` would say of keys, names, certificate, address and port, unless the service itself listens
    there.
    """
    from llamaserve.listening import listen, refuse_the_world
    from llamaserve.serving import check_names, make_keys, tls_context

    check_names(settings)
    tls_context(settings)
    keys, url = make_keys(settings), status_of(manager).url
    ours = url is not None and url.endswith(f":{settings.port}")
    sockets = listen(settings.host, 0 if ours else settings.port)
    try:
        if not keys.needed and not settings.insecure:
            refuse_the_world(sockets)
    finally:
        for sock in sockets:
            sock.close()


def _tell_left_behind(names: Sequence[str], file: Path) -> None:
    if names:
        tell(f"not for the service: {', '.join(names)}, set in this shell only; what it needs belongs into {file}")


def _tell_installed(manager: Manager, file: Path) -> None:
    say(f"installed: {manager.file}")
    say(f"  settings, keys   {file}; after a change: {manager.restart}")
    say(f"  log              {manager.logs}")
    say("  how it is        llamaserve service status")


def _linger(manager: Systemd, wanted: bool) -> None:
    if wanted:
        manager.linger()
    elif not manager.lingers():
        say("  start            when you log in; at boot, after: loginctl enable-linger")


def _show(found: Status, manager: Manager) -> None:
    if not found.installed:
        say("not installed; install it with: llamaserve service install")
        return
    since = "" if found.since is None else f", since {found.since.astimezone():%Y-%m-%d %H:%M:%S}"
    say(f"{found.state}{since}")
    say(f"  file       {found.file}")
    say(f"  start      {'at login' if found.enabled else 'by hand only'}")
    if found.url is not None:
        say(f"  base URL   {found.url}/v1, which {'answers' if found.healthy else 'does not answer'}")
    say(f"  log        {manager.logs}")
