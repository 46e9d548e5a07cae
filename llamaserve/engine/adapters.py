"""The LoRA adapters of one model: which there are, which a request means, and which are at work.

An adapter is known by what is in its file, so that one of the same name from another file is another one, and what was
evaluated with it can be told from what was not, even by a later process. Requests that run keep the adapters that they
started with; one that is not wanted any more is freed after them. Knows names, scales and files; what is in a file is
llama.cpp's business, and has been checked before.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llamaserve.engine.llama import Context, LoraWeights, Model
from llamaserve.engine.params import Adapter
from llamaserve.engine.sequence import AdapterKey
from llamaserve.errors import InvalidRequest, ModelLoadFailed

MAX_ADAPTERS = 32  # of a model at once
MAX_SCALE = 100.0  # of either sign; with much larger ones the numbers leave their range, and others' answers suffer

_PARAM = "lora"
_RANGE = f"numbers from {-MAX_SCALE:g} to {MAX_SCALE:g} are possible"
_SHOWN = 100  # characters of a name


@dataclass(frozen=True, slots=True)
class FileDigest:
    """What is in a file, and by what can be told that it has not changed."""

    value: str
    stamp: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Named:
    """What a name stands for: the file's digest, and the scale for requests that say nothing."""

    digest: str
    scale: float


_NONE: Mapping[str, FileDigest] = {}


class Adapters:
    """A model's adapters. All but ``resolve`` belongs to the engine's thread."""

    def __init__(self, model: Model, context: Context) -> None:
        self._model = model
        self._context = context
        self._named: dict[str, _Named] = {}  # never changed, only replaced: another thread reads it
        self._loaded: dict[str, LoraWeights] = {}  # by digest
        self._at_work: AdapterKey = ()
        self.unwanted: frozenset[str] = frozenset()  # digests of those that no request to come will use
        context.use_adapters([])

    def replace(self, wanted: Sequence[Adapter], digests: Mapping[str, FileDigest] = _NONE) -> None:
        """Have these adapters, and no others for requests that come. Those that are missing are loaded; the others stay
        loaded until ``free``. Files whose ``digests`` are known by path are not read for that again, if they have not
        changed. Raises ``ModelLoadFailed``, also for one that is written meanwhile, and nothing has changed then.
        """
        if len(wanted) > MAX_ADAPTERS:
            raise ModelLoadFailed(f"there are {len(wanted)} LoRA adapters; a model has {MAX_ADAPTERS} at most")
        named: dict[str, _Named] = {}
        loaded: dict[str, LoraWeights] = {}
        try:
            for adapter in wanted:
                if adapter.name in named:
                    raise ModelLoadFailed(f"two LoRA adapters are called {_shown(adapter.name)}")
                if not _possible(adapter.scale):
                    raise ModelLoadFailed(
                        f"LoRA adapter {_shown(adapter.name)} has the scale {adapter.scale}; {_RANGE}"
                    )
                digest = _digest(adapter.path, digests.get(adapter.path))
                if digest.value not in self._loaded and digest.value not in loaded:
                    loaded[digest.value] = self._model.load_adapter(adapter.path)
                    if _digest(adapter.path, digest).value != digest.value:
                        raise ModelLoadFailed(f"the LoRA adapter {adapter.path} was replaced while it was loaded")
                named[adapter.name] = _Named(digest.value, adapter.scale)
            if excess := _excess((each.digest, each.scale) for each in named.values()):
                raise ModelLoadFailed(
                    f"LoRA adapters that are the same file have the scale {excess} together; {_RANGE}"
                )
        except ModelLoadFailed:
            for weights in loaded.values():
                weights.close()
            raise
        self._loaded |= loaded
        self._named = named
        self.unwanted = frozenset(self._loaded).difference(each.digest for each in named.values())

    def resolve(self, wanted: Sequence[tuple[str, float]] | None) -> AdapterKey:
        """Return the adapters that a request means, by name and scale: all with their own scales for None. Raises
        ``InvalidRequest``. Thread-safe.
        """
        named = self._named
        if wanted is None:
            return _key((each.digest, each.scale) for each in named.values())
        names: set[str] = set()
        for name, scale in wanted:
            if name not in named:
                there = f"the model has {', '.join(map(_shown, named))}" if named else "the model has none"
                raise InvalidRequest(f"there is no LoRA adapter {_shown(name)}; {there}", param=_PARAM)
            if name in names:
                raise InvalidRequest(f"the LoRA adapter {_shown(name)} is named twice", param=_PARAM)
            if not _possible(scale):
                raise InvalidRequest(f"the LoRA adapter {_shown(name)} has the scale {scale}; {_RANGE}", param=_PARAM)
            names.add(name)
        if excess := _excess((named[name].digest, scale) for name, scale in wanted):
            raise InvalidRequest(
                f"LoRA adapters that are the same file have the scale {excess} together; {_RANGE}", param=_PARAM
            )
        return _key((named[name].digest, scale) for name, scale in wanted)

    def use(self, adapters: AdapterKey) -> None:
        """Have these at work from now on. A change makes llama.cpp plan its evaluations anew in the next step, which
        takes 6 ms for the starter model, as long as a step of one token.
        """
        if adapters != self._at_work:
            self._context.use_adapters([(self._loaded[digest], scale) for digest, scale in adapters])
            self._at_work = adapters

    def free(self, digest: str) -> None:
        """Free an adapter that is unwanted and that nobody uses any more."""
        if any(each == digest for each, _ in self._at_work):
            self.use(())
        self._loaded.pop(digest).close()
        self.unwanted -= {digest}


def _key(adapters: Iterable[tuple[str, float]]) -> AdapterKey:
    """Return the canonical form of adapters and scales. One that is there under two names works with both scales."""
    scales: dict[str, float] = {}
    for digest, scale in adapters:
        scales[digest] = scales.get(digest, 0.0) + scale
    return tuple(sorted((digest, scale) for digest, scale in scales.items() if scale))


def _excess(adapters: Iterable[tuple[str, float]]) -> float | None:
    """Return a scale with which an adapter would work and must not."""
    return next((scale for _, scale in _key(adapters) if not _possible(scale)), None)


def _possible(scale: float) -> bool:
    return math.isfinite(scale) and abs(scale) <= MAX_SCALE


def digests_of(adapters: Iterable[Adapter]) -> dict[str, FileDigest]:
    """Read adapters' files, and return their digests by path. Raises ``ModelLoadFailed``. Thread-safe."""
    return {path: _digest(path) for path in {adapter.path for adapter in adapters}}


def _digest(path: str, known: FileDigest | None = None) -> FileDigest:
    """Return a file's digest: the known one if it has not changed since."""
    try:
        with Path(path).open("rb") as file:
            status = os.fstat(file.fileno())
            stamp = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
            if known is not None and known.stamp == stamp:
                return known
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
            return FileDigest(digest.hexdigest(), stamp)
    except (OSError, ValueError) as error:
        raise ModelLoadFailed(f"the LoRA adapter {path} can't be read: {error}") from error


def _shown(name: str) -> str:
    return repr(name if len(name) <= _SHOWN else name[:_SHOWN] + "…")
