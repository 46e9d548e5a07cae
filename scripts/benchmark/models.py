"""Which models are measured: found in models.yaml, and fetched if need be."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamaserve.registry.fetching import locate
from llamaserve.registry.spec import RunOptions, find_models_file, load_registry
from llamaserve.settings import Settings

_OPTIONS = {*RunOptions.model_fields, "task", "pooling", "parts", "image"}  # that decide how a model runs


@dataclass(frozen=True)
class FoundModel:
    """A model on this machine, and how models.yaml runs it."""

    name: str
    file: Path
    options: Mapping[str, Any]


def find_model(reference: str | None) -> FoundModel:
    """Return a model of models.yaml, or a .gguf file's; for None the one that is served by default.

    Raises:
        LlamaserveError: there is none of this name.
        subprocess.CalledProcessError: it can't be fetched, which was explained on standard error.
    """
    registry = load_registry(find_models_file(Settings().models_file))
    name, spec = registry.resolve_reference(reference or registry.default_model or "starter")
    file = locate(registry.source(spec), spec.sha256)
    if file is None:
        subprocess.run([sys.executable, "-m", "llamaserve", "pull", reference or name], check=True)
        file = locate(registry.source(spec), spec.sha256)
        assert file is not None
    return FoundModel(name, file, spec.model_dump(include=_OPTIONS))
