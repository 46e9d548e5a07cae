"""Files that requests name: characters and instruction templates, ours and the operator's.

A name never becomes a path: it is looked up in the list of files that there are. Files are read anew for each use, so
that an edit counts at once. This module knows nothing of what is in them but that it is YAML or JSON.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from llamaserve.chat.values import shown
from llamaserve.errors import InvalidRequest, RegistryError

MAX_FILE = 256 * 1024  # bytes of a text; long characters have some 20,000

_SHOWN = 3  # names like the one that there is none of
_LISTED = 40  # names in a refusal, when none is like it


class NamedFiles:
    """The files of some folders, by their names without the ending. Upper and lower case make no difference.

    Of two files with one name that in the later folder counts, and in one folder that with the earlier ending.
    ``kind`` is what a client reads that they are, ``param`` the field of a request that names one.
    """

    def __init__(self, kind: str, param: str, folders: Sequence[Path], endings: Sequence[str]) -> None:
        self._kind = kind
        self._param = param
        self._folders = folders
        self._endings = endings

    def names(self) -> list[str]:
        """Return the names there are."""
        return sorted((path.stem for path in self._files().values()), key=str.lower)

    def find(self, name: str) -> Path:
        """Return the file with the name. Raises ``InvalidRequest`` when there is none."""
        files = self._files()
        found = files.get(name.lower())
        if found is None:
            raise InvalidRequest(
                f"there is no {self._kind} {shown(name)}; there is {_near(name, self.names())}", param=self._param
            )
        return found

    def read(self, path: Path) -> str:
        """Return the text of a file. Raises ``RegistryError`` when it can't be read."""
        try:
            with path.open("rb") as file:
                content = file.read(MAX_FILE + 1)
            if len(content) > MAX_FILE:
                raise self.broken(path, f"it has more than {MAX_FILE} bytes")
            return content.decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise self.broken(path, f"it can't be read: {error}") from error

    def read_mapping(self, path: Path) -> dict[str, object]:
        """Return what is in a YAML or JSON file. Raises ``RegistryError`` when it is none, or has no keys."""
        text = self.read(path)
        try:
            values = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            raise self.broken(path, f"it can't be read: {error}") from error
        return self.mapping(path, values)

    def mapping(self, path: Path, values: object) -> dict[str, object]:
        """Return the values that were in a file, which must have keys that are texts."""
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise self.broken(path, "it must have keys and values")
        return values

    def text(self, path: Path, values: dict[str, object], *keys: str) -> str:
        """Return the first value that is not empty of those with the keys, or "". Each one must be a text."""
        for key in keys:
            value = values.get(key)
            if value is None or value == "":
                continue
            if not isinstance(value, str):
                raise self.broken(path, f"{key} must be a text; one in quotes always is")
            try:
                value.encode()
            except UnicodeEncodeError as error:  # an escaped half of a surrogate pair
                raise self.broken(path, f"{key} holds half a surrogate pair at position {error.start}") from None
            return value
        return ""

    def broken(self, path: Path, why: str) -> RegistryError:
        """Return the error for a file that is wrong."""
        return RegistryError(f"{self._kind} {path.name}: {why}")

    def _files(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for folder in self._folders:
            paths = sorted(folder.iterdir()) if folder.is_dir() else []
            for ending in reversed(self._endings):
                matching = (path for path in paths if path.suffix.lower() == ending and path.is_file())
                found |= {path.stem.lower(): path for path in matching}
        return found


def _near(name: str, names: Sequence[str]) -> str:
    by_lower = {known.lower(): known for known in names}
    near = difflib.get_close_matches(name[:100].lower(), by_lower, _SHOWN, 0.4)
    return ", ".join([by_lower[each] for each in near] or names[:_LISTED]) or "none at all"
