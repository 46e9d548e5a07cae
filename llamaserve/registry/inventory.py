"""What is on this machine: models of models.yaml, those that were fetched without being there, and the models folder's.

This module reads no more than headers, and does not know what is done with a model.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llamaserve.errors import LlamaserveError
from llamaserve.registry.fetching import locate
from llamaserve.registry.folder import scan
from llamaserve.registry.spec import ModelSpec, Registry


def models_here(registry: Registry, folder: Path | None, locked: Iterable[str]) -> dict[str, ModelSpec]:
    """Return all models with files on this machine, by the names that commands take. ``locked`` are the sources of
    models.lock, ``folder`` is the models folder; a file there that models.yaml has, too, is no other model.

    Raises ``RegistryError`` as ``folder.scan`` does.
    """
    specs = {name: spec for name, spec in registry.models.items() if is_here(registry, spec)}
    files = {locate(registry.source(spec)) for spec in specs.values()}
    specs |= fetched(registry, locked)
    for model in scan(folder) if folder is not None else ():
        hidden = model.name in registry.models or model.name in registry.aliases
        if not hidden and model.path not in files:
            specs[model.name] = _by_defaults(registry, model.source)
    return specs


def fetched(registry: Registry, locked: Iterable[str]) -> dict[str, ModelSpec]:
    """Return the models on this machine that were fetched by their source alone, which is their name; adapters of
    models.yaml's models are none.
    """
    known = {spec.source for spec in registry.models.values()}
    known |= {adapter.source for spec in registry.models.values() for adapter in spec.lora}
    sources = [text for text in locked if text.startswith(("hf:", "pypi:")) and text not in known]
    specs = {text: _by_defaults(registry, text) for text in sources}
    return {text: spec for text, spec in specs.items() if is_here(registry, spec)}


def is_here(registry: Registry, spec: ModelSpec) -> bool:
    """Whether a model's files are all on this machine."""
    try:
        return locate(registry.source(spec)) is not None
    except LlamaserveError:
        return False


def _by_defaults(registry: Registry, source: str) -> ModelSpec:
    """Return a model that runs as the defaults of models.yaml say."""
    return ModelSpec(source=source, **registry.defaults.model_dump(exclude={"model"}))
