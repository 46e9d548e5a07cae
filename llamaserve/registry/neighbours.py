"""The files that lie beside published weights: read as text or JSON, and none that is too large.

They may come from anywhere. This module does not know what is in them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NoReturn, TypeVar

import msgspec

from llamaserve.errors import SourceError

MAX_NEIGHBOUR: Final = 16 << 20  # bytes

_T = TypeVar("_T")


def refuse(name: str, what: str) -> NoReturn:
    """Raise ``SourceError``: a model cannot be converted for what is in one of its files."""
    raise SourceError(f"the model cannot be converted: {name}: {what}")


def read_text(folder: Path, name: str) -> str:
    """Return a file's text. Raises ``SourceError``."""
    try:
        with (folder / name).open("rb") as file:
            data = file.read(MAX_NEIGHBOUR + 1)
    except FileNotFoundError:
        refuse(name, "it is missing beside the weights")
    except OSError as error:
        refuse(name, f"it cannot be read: {error.strerror or error}")
    if len(data) > MAX_NEIGHBOUR:
        refuse(name, f"it is larger than {MAX_NEIGHBOUR} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse(name, f"it is not UTF-8: {error.reason}")


def decode(folder: Path, name: str, kind: type[_T]) -> _T:
    """Return what a JSON file says, as a value of this kind. Raises ``SourceError``."""
    try:
        return msgspec.json.decode(read_text(folder, name), type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        refuse(name, str(error))
