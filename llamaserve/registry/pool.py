"""The models that this server offers, by name: what is known of each, and the process that runs it.

Knows models.yaml's values, files and worker processes; nothing of HTTP or of what is generated.
"""

from __future__ import annotations

import asyncio
import difflib
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from llamaserve.engine.events import Occupancy
from llamaserve.engine.params import Generation, LoadParams
from llamaserve.errors import ModelError, ModelFileMissing, ModelNotCapable, ModelNotFound, ModelNotLoaded
from llamaserve.registry.admission import Admission
from llamaserve.registry.fetching import locate
from llamaserve.registry.gguf import GGUFHeader, read_header
from llamaserve.registry.hardware import performance_cores
from llamaserve.registry.loadable import check_loadable
from llamaserve.registry.sources import parse_source
from llamaserve.registry.spec import ModelSpec, Registry
from llamaserve.worker.process import WorkerProcess
from llamaserve.worker.supervisor import Supervisor

logger = logging.getLogger(__name__)

MEBIBYTE = 1024 * 1024

_FAILURE_KEPT = 5.0  # seconds for which a header that could not be read is not tried again, only to list the model


def _spill_bytes(spec: ModelSpec) -> int | None:
    if not spec.prefix_cache:
        return 0
    return None if spec.spill == "auto" else spec.spill * MEBIBYTE


class ServedModel:
    """One model: its settings, its file and its process."""

    def __init__(self, name: str, spec: ModelSpec, base: Path) -> None:
        self.name = name
        self.spec = spec
        self.created = int(time.time())
        self._base = base
        self._header: GGUFHeader | None = None
        self._unreadable_until = 0.0
        self.supervisor = Supervisor(name, self._prepare)
        self.admission = Admission(spec.parallel, spec.queue)

    @property
    def header(self) -> GGUFHeader:
        """What the GGUF file says of itself; read once it is needed. Raises ``ModelError``."""
        if self._header is None:
            self._header = read_header(self._locate())
        return self._header

    @property
    def known_header(self) -> GGUFHeader | None:
        """The header, or None when the file is missing or bad."""
        if self._header is None and time.monotonic() < self._unreadable_until:
            return None
        try:
            return self.header
        except ModelError as error:
            logger.info("%s: %s", self.name, error.message)
            self._unreadable_until = time.monotonic() + _FAILURE_KEPT
            return None

    @property
    def context(self) -> int:
        """Largest number of tokens of a request, prompt and answer: the configured one, but never what is over the
        length that the model was trained for.
        """
        trained = self.header.context_length
        return self.spec.context if trained is None else min(self.spec.context, trained)

    def limited(self, generation: Generation) -> Generation:
        """Return the generation with a time limit no longer than the model's."""
        limits = [limit for limit in (generation.time_limit, self.spec.time_limit) if limit is not None]
        return msgspec.structs.replace(generation, time_limit=min(limits)) if limits else generation

    async def worker(self) -> WorkerProcess:
        """Return the process that runs the model, loading it first if need be."""
        return await self.supervisor.worker()

    def load_params(self) -> LoadParams:
        """Return how the model is loaded, with every automatic setting decided.

        Sequences share all cells of the cache, so that prefixes can be shared without copying. With flash attention
        that costs little: a step of eight sequences of 600 tokens takes 55 ms, and 53 with cells for each. Idle
        prefixes would make it slower, so they are kept in main memory. With flash attention off it goes over all
        cells at full cost (measured: 89 against 51 ms for a step of eight sequences of 600 tokens), and what a sequence
        computes would depend on where its cells happen to lie. With cells of its own, a short one computes the same as
        alone.
        """
        spec, context = self.spec, self.context
        unified = spec.flash_attention != "off"
        return LoadParams(
            path=str(self.header.path),
            context=context,
            parallel=spec.parallel,
            kv_cells=max(spec.kv_cells or context, context) if unified else context * spec.parallel,
            kv_unified=unified,
            batch=max(spec.batch, spec.parallel),
            threads=performance_cores() if spec.threads == "auto" else spec.threads,
            adaptive_threads=spec.threads == "auto",
            gpu_layers=spec.gpu_layers,
            flash_attention=spec.flash_attention,
            key_type=spec.key_type,
            value_type=spec.value_type,
            prefix_cache=spec.prefix_cache,
            spill=_spill_bytes(spec),
            speculation=spec.speculation,
        )

    def _locate(self) -> Path:
        path = locate(parse_source(self.spec.source, self._base), self.spec.sha256)
        if path is None:
            raise ModelFileMissing(
                f"the weights of {self.name} are not on this machine", hint=f"llamaserve pull {self.name}"
            )
        return path

    def _prepare(self) -> LoadParams:
        """Check the file anew, since it may have changed since the last load."""
        self._header = header = read_header(self._locate())
        check_loadable(header)
        if header.is_embedding_model or self.spec.task != "generation":
            raise ModelNotCapable(f"{self.name} does not generate text, and this server offers only text generation")
        if self.context < self.spec.context:
            logger.warning(
                "%s was trained for %d tokens of context; the configured %d are cut to that",
                *(self.name, self.context, self.spec.context),
            )
        return self.load_params()


class ModelPool:
    """All served models; the first one answers requests that name none."""

    def __init__(self, models: Sequence[ServedModel], aliases: Mapping[str, str]) -> None:
        self._models = {model.name: model for model in models}
        self._aliases = {alias: name for alias, name in aliases.items() if name in self._models}
        self._loads: list[asyncio.Task[WorkerProcess]] = []

    @classmethod
    def of(cls, registry: Registry, references: Sequence[str]) -> ModelPool:
        """Return a pool of the named models. A reference is whatever the command line takes for a model."""
        resolved = dict(registry.resolve_reference(reference) for reference in references)
        return cls([ServedModel(name, spec, registry.path.parent) for name, spec in resolved.items()], registry.aliases)

    @property
    def models(self) -> list[ServedModel]:
        """All served models, loaded ones first."""
        return sorted(self._models.values(), key=lambda model: model.supervisor.pid is None)

    @property
    def occupancy(self) -> Occupancy:
        """How busy all models are together."""
        each = [model.supervisor.occupancy for model in self._models.values()]
        return Occupancy(sum(o.running for o in each), sum(o.waiting for o in each), sum(o.cells for o in each))

    def aliases_of(self, name: str) -> list[str]:
        """Return the other names of a model."""
        return sorted(alias for alias, target in self._aliases.items() if target == name)

    def get(self, name: str | None) -> ServedModel:
        """Return the model with this name or alias, or the first one for None; never another than the named one."""
        if not self._models:
            raise ModelNotLoaded("no model is served; start the server with one: llamaserve run <model>")
        if name is None:
            return next(iter(self._models.values()))
        model = self._models.get(self._aliases.get(name, name))
        if model is None:
            names = [*self._models, *self._aliases]
            close = difflib.get_close_matches(name, names, n=3) or names[:3]
            raise ModelNotFound(f"no model {name!r} is served here; there is {', '.join(close)}", param="model")
        return model

    def start_loading(self) -> None:
        """Begin to load every model without waiting for it. Errors show when a model is used."""
        self._loads = [asyncio.create_task(model.worker()) for model in self._models.values()]
        for load in self._loads:
            load.add_done_callback(lambda done: done.cancelled() or done.exception())

    def stop_all(self) -> None:
        """End all running requests with a normal finish."""
        for model in self._models.values():
            model.supervisor.stop_all()

    async def aclose(self) -> None:
        """End all processes."""
        await asyncio.gather(*(model.supervisor.aclose() for model in self._models.values()))
        await asyncio.gather(*self._loads, return_exceptions=True)
