"""Presets: named sets of sampling options in YAML files, ours and the operator's.

Names come from requests and never become paths: they are looked up in the list of files that there are. Files are read
anew for each use, so that an edit counts at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, ValidationError

from llamaserve.api.sampling_options import SamplingOptions
from llamaserve.errors import InvalidRequest, RegistryError

_SHIPPED = Path(__file__).resolve().parent.parent / "presets"
_SHOWN = 3  # names like the one that there is none of


class _Preset(SamplingOptions):
    """What a preset's file may contain."""

    model_config = ConfigDict(extra="forbid")


class Presets:
    """The presets of a server. A file in the operator's folder stands before one of ours with the same name."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folders = [folder for folder in (_SHIPPED, folder) if folder is not None]

    def names(self) -> list[str]:
        """Return the names there are."""
        return sorted(self._files(), key=str.lower)

    def get(self, name: str) -> Mapping[str, Any]:
        """Return the options that a preset sets, by their own names. Upper and lower case make no difference.

        Raises:
            InvalidRequest: there is no such preset.
            RegistryError: its file is wrong.
        """
        files = self._files()
        found = {known.lower(): known for known in files}.get(name.lower())
        if found is None:
            near = difflib.get_close_matches(name, files, _SHOWN, 0.4) or sorted(files)
            raise InvalidRequest(f"there is no preset {name[:64]!r}; there is {', '.join(near)}", param="preset")
        return _read(files[found])

    def _files(self) -> dict[str, Path]:
        return {path.stem: path for folder in self._folders for path in folder.glob("*.yaml") if path.is_file()}


def _read(path: Path) -> Mapping[str, Any]:
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
        preset = _Preset.model_validate({} if values is None else values)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"])) or "it"
        raise RegistryError(f"preset {path.name}: {field}: {problem['msg']}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RegistryError(f"preset {path.name} can't be read: {error}") from error
    return {name: getattr(preset, name) for name in preset.model_fields_set}
