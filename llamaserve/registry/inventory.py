"""What is on this machine: models of models.yaml, those that were fetched without being there, and the models folder's.

This module reads no more than headers, and does not know what is done with a model.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llamaserve.registry.cache import place_of
from llamaserve.registry.fetching import locate
from llamaserve.registry.folder import is_something_else, scan
from llamaserve.registry.sources import parse_source
from llamaserve.registry.spec import ModelSpec, Registry


def models_here(registry: Registry, folder: Path | None, locked: Iterable[str]) -> dict[str, ModelSpec]:
    """Return all models with files on this machine, by the names that commands take. ``locked`` are the sources of
    models.lock, ``folder`` is the models folder; a file there that models.yaml has, too, is no other model.

    Raises ``RegistryError`` as ``folder.scan`` does.
    """
    specs = {name: spec for name, spec in registry.models.items() if is_here(registry, spec)}
    specs |= fetched(registry, locked)
    places = _places(registry, specs.values())
    for model in scan(folder) if folder is not None else ():
        hidden = model.name in registry.models or model.name in registry.aliases
        if not hidden and place_of(model.path) not in places:
            specs[model.name] = registry.by_defaults(model.source)
    return specs


def fetched(registry: Registry, locked: Iterable[str]) -> dict[str, ModelSpec]:
    """Return the models on this machine that were fetched by their source alone, which is their name: no files that
    models.yaml has by another name, no adapters, and each file once.
    """
    places = _places(registry, registry.models.values())
    known = {source for spec in registry.models.values() for source in spec.other_sources}
    specs: dict[str, ModelSpec] = {}
    for text in locked:
        if not text.startswith(("hf:", "pypi:")) or text in known:
            continue
        spec = registry.by_defaults(text)
        path = locate(registry.source(spec))
        if path is not None and place_of(path) not in places and not is_something_else(path):
            specs[text] = spec
            places.add(place_of(path))
    return specs


def is_here(registry: Registry, spec: ModelSpec) -> bool:
    """Whether a model's files are all on this machine, but for adapters, without which it can be used."""
    parts = [parse_source(source, registry.path.parent) for source in spec.parts.sources.values()]
    return all(locate(source) is not None for source in (registry.source(spec), *parts))


def _places(registry: Registry, specs: Iterable[ModelSpec]) -> set[Path]:
    """Return where the (first) files of models lie, of those that are here."""
    paths = [locate(registry.source(spec)) for spec in specs]
    return {place_of(path) for path in paths if path is not None}
