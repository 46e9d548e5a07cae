"""A model's file: where it is, what it says of itself, and how it is loaded by the model's settings.

Knows nothing of processes, or of whether it is loaded. Reads files, so what may take long is for a thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import msgspec

from llamaserve.engine.params import Adapter, Footprint, LoadParams
from llamaserve.errors import ModelError, ModelFileMissing, ModelNotCapable
from llamaserve.registry.adapters import check_adapter
from llamaserve.registry.budget import is_unified
from llamaserve.registry.fetching import locate
from llamaserve.registry.gguf import GGUFHeader, read_header
from llamaserve.registry.load_plan import (
    PROCESS,
    LoadPlan,
    configured_adapters,
    load_params,
    plan_load,
)
from llamaserve.registry.loadable import check_loadable
from llamaserve.registry.sources import parse_source
from llamaserve.registry.spec import ModelSpec
from llamaserve.worker.protocol import Device, ModelParams

logger = logging.getLogger(__name__)

FAILURE_KEPT: Final = 5.0  # seconds for which a header that can't be read is not tried again, only to list the model

_Stamp = tuple[tuple[int, int, int], ...]


class ModelFile:
    """The file of a model with these settings; relative paths begin at ``base``."""

    def __init__(self, name: str, spec: ModelSpec, base: Path) -> None:
        self.spec = spec
        self._name = name
        self._base = base
        self._header: GGUFHeader | None = None
        self._loadable: _Stamp | None = None  # of the header's files when they were last found to be good
        self._unreadable_until = 0.0

    @property
    def is_here(self) -> bool:
        """Whether it is on this machine."""
        try:
            return locate(parse_source(self.spec.source, self._base)) is not None
        except ModelError:
            return False

    @property
    def header(self) -> GGUFHeader:
        """What it says of itself; read once it is needed. Raises ``ModelError``."""
        if self._header is None:
            self._header = read_header(self._path(self.spec.sha256))
        return self._header

    @property
    def known_header(self) -> GGUFHeader | None:
        """The header, or None when the file is missing or bad. A promised sum is not looked at."""
        if self._header is not None or time.monotonic() < self._unreadable_until:
            return self._header
        try:
            self._header = read_header(self._path())
        except ModelError as error:
            logger.info("%s: %s", self._name, error.message)
            self._unreadable_until = time.monotonic() + FAILURE_KEPT
        return self._header

    async def peek(self) -> GGUFHeader | None:
        """Return the header, read in a thread if it is not known yet; None when the file is missing or bad."""
        return self._header if self._header is not None else await asyncio.to_thread(lambda: self.known_header)

    async def read(self) -> GGUFHeader:
        """Return the header, read in a thread if it is not known yet. Raises ``ModelError``."""
        return self._header if self._header is not None else await asyncio.to_thread(lambda: self.header)

    def adapters(self) -> list[Adapter]:
        """Return the LoRA adapters that the settings name. Raises ``ModelError`` when one is not here."""
        return configured_adapters(self._name, self.spec, self._base)

    def checked(self, adapters: Sequence[Adapter]) -> tuple[Adapter, ...]:
        """Return LoRA adapters that fit the model. Raises ``ModelError`` when one does not."""
        for each in adapters:
            check_adapter(read_header(Path(each.path)), self.header)
        return tuple(adapters)

    def load_params(self) -> ModelParams:
        """Return how it is loaded, as far as the settings decide it."""
        return load_params(self.spec, self.header)

    def plan(self, adapters: Sequence[Adapter], budget: Footprint, devices: Sequence[Device]) -> LoadPlan:
        """Check the file, and decide how it is loaded. Raises ``ModelError`` for one that llama.cpp must not see,
        ``ModelNotCapable`` and ``InsufficientMemory``.
        """
        header, spec = self._checked_header(), self.spec
        try:
            params = load_params(spec, header, self.checked(adapters))
        except ModelNotCapable as error:
            raise ModelNotCapable(f"{self._name} can't be loaded: {error.message}") from error
        context = params.context
        if context < spec.context and params.pooling is None:
            logger.warning(
                "%s was trained for %d tokens of context; the configured %d are cut to that",
                *(self._name, context, spec.context),
            )
        return plan_load(self._name, header, params, budget, len(devices), unified=is_unified(devices))

    def plan_again(
        self, plan: LoadPlan, adapters: Sequence[Adapter], budget: Footprint, devices: Sequence[Device]
    ) -> LoadPlan:
        """Return the plan of a load with other LoRA adapters, which have been checked, and all else as it was. Raises
        ``InsufficientMemory``.
        """
        assert isinstance(plan.params, LoadParams)
        params = msgspec.structs.replace(plan.params, adapters=tuple(adapters), spill=plan.fixed.host - PROCESS.host)
        again = plan_load(self._name, self.header, params, budget, len(devices), unified=is_unified(devices))
        assert isinstance(again.params, LoadParams)
        return replace(again, params=msgspec.structs.replace(again.params, spill=plan.params.spill), spill=plan.spill)

    def _path(self, sha256: str | None = None) -> Path:
        """Return where it is, checked against a sum if there is one. Raises ``ModelFileMissing``."""
        path = locate(parse_source(self.spec.source, self._base), sha256)
        if path is None:
            raise ModelFileMissing(
                f"the weights of {self._name} are not on this machine", hint=f"llamaserve pull {self._name}"
            )
        return path

    def _checked_header(self) -> GGUFHeader:
        """Return the header of a file that llama.cpp may see. One that has not changed since it was looked at is not
        looked at again, which takes a tenth of a second.
        """
        path = self._path(self.spec.sha256)
        if self._header is None or self._header.path != path or _stamp(self._header) != self._loadable:
            self._header = header = read_header(path)
            before = _stamp(header)
            check_loadable(header)
            self._loadable = before
        return self._header


def _stamp(header: GGUFHeader) -> _Stamp:
    """Return what changes when one of a model's files does."""
    status = [path.stat() for path in header.paths]
    return tuple((each.st_ino, each.st_size, each.st_mtime_ns) for each in status)
