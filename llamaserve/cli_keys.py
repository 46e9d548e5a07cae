"""``llamaserve keys create | list | revoke``: the named keys in keys.yaml. What a key is, is ``keys``' business."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.table import Table

from llamaserve.cli_models import Json
from llamaserve.cli_output import out, read_settings, say, say_json, tell
from llamaserve.errors import KeysError
from llamaserve.keys.key_file import KeyFile, create_key, read_keys, revoke_key
from llamaserve.keys.keyring import Limits

keys = typer.Typer(help="Make, list and revoke keys for the server.", no_args_is_help=True, rich_markup_mode=None)

KeysFile = Annotated[
    Path | None, typer.Option(help="The file with the keys.  [default: keys.yaml in the state folder]")
]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.add_typer(keys, name="keys")


@keys.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is, such as laptop.")],
    admin: Annotated[
        bool, typer.Option("--admin", help="May change the server: load, fetch and delete models.")
    ] = False,
    concurrent: Annotated[int | None, typer.Option(help="Requests at once.")] = None,
    queue: Annotated[int | None, typer.Option(help="Requests that may wait beside those.  [default: 64]")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="Requests a minute.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Tokens a minute, of prompts and answers.")] = None,
    keys_file: KeysFile = None,
) -> None:
    """Make a key, and show it once. A running server knows it within seconds, and needs one from then on."""
    given = {"concurrent": concurrent, "queue": queue}
    given |= {"requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute}
    try:
        limits = Limits(**given)
    except ValidationError as error:
        problem = error.errors()[0]
        option = str(problem["loc"][0]).replace("_", "-")
        raise KeysError(f"--{option}: {problem['msg']}", hint="llamaserve keys create --help") from None
    path = read_settings(keys_file=keys_file).keys_path
    secret = create_key(path, name, limits, admin=admin)
    tell(f"{name}{' (admin)' if admin else ''} is in {path}. This is its key, which is shown just once:")
    say(secret)


@keys.command("list")
def list_keys(
    as_json: Json = False,
    keys_file: KeysFile = None,
) -> None:
    """List the keys by name, with what they may use."""
    path = read_settings(keys_file=keys_file).keys_path
    found = read_keys(path) if path.exists() else KeyFile()
    rows = {name: _row(found, name) for name in found.keys}
    if as_json:
        say_json({"file": path, "keys": rows})
        return
    if not rows:
        tell(f"there are no keys in {path}; llamaserve keys create NAME makes one")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("name", *next(iter(rows.values()))):
        table.add_column(column.replace("_", " "))
    for name, row in rows.items():
        table.add_row(name, *("" if value is None else str(value) for value in row.values()))
    out.print(table)


def _row(file: KeyFile, name: str) -> dict[str, Any]:
    entry = file.keys[name]
    created = None if entry.created is None else entry.created.isoformat()
    return {"kind": "admin" if entry.admin else "api", "created": created, **entry.limits(file.defaults).model_dump()}


@keys.command()
def revoke(name: Annotated[str, typer.Argument(help="Whose key.")], keys_file: KeysFile = None) -> None:
    """Take a key away. A running server refuses it within seconds."""
    path = read_settings(keys_file=keys_file).keys_path
    left = revoke_key(path, name)
    tell(f"{name} is revoked")
    if not left:
        tell(
            f"There are no keys left in {path}, so nobody gets in with one of them. Delete the file to need none again."
        )
