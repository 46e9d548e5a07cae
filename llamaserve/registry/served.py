"""One model that this server offers: its settings, its file, and its life in memory.

A request holds a model by a ``Use`` from before it waits for the model to its end; a model that somebody uses is not
unloaded to make room. What is used by nobody leaves after its ``keep_alive``. What was evaluated is written to a file
when a model leaves, and is there when it comes back. Knows nothing of HTTP, of other models' names or of what is
generated.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from llamaserve.engine.params import Adapter, Footprint, Generation, LoadParams
from llamaserve.errors import LlamaserveError, ModelError, ModelFileMissing, ModelNotCapable, Unavailable
from llamaserve.registry.adapters import check_adapter
from llamaserve.registry.admission import Admission
from llamaserve.registry.fetching import locate
from llamaserve.registry.gguf import GGUFHeader, read_header
from llamaserve.registry.load_plan import PROCESS, LoadPlan, context_of, load_params, plan_load
from llamaserve.registry.loadable import check_loadable
from llamaserve.registry.measurements import record
from llamaserve.registry.model_events import ModelEvents
from llamaserve.registry.residency import Residency
from llamaserve.registry.saved_prefixes import SavedPrefixes
from llamaserve.registry.sources import parse_source
from llamaserve.registry.spec import ModelSpec
from llamaserve.worker.process import WorkerProcess
from llamaserve.worker.spare import Spares
from llamaserve.worker.supervisor import Status, Supervisor

logger = logging.getLogger(__name__)

_FAILURE_KEPT = 5.0  # seconds for which a header that could not be read is not tried again, only to list the model
_SAVING_LIMIT = 10.0  # seconds in which a model that leaves must have written its prefixes


_Stamp = tuple[tuple[int, int, int], ...]


def _stamp(header: GGUFHeader) -> _Stamp:
    """Return what changes when one of a model's files does."""
    status = [path.stat() for path in header.paths]
    return tuple((each.st_ino, each.st_size, each.st_mtime_ns) for each in status)


@dataclass(frozen=True)
class Facilities:
    """What all models of a server share. ``devices`` is the number of GPUs, known once ``ready`` has been awaited."""

    residency: Residency
    events: ModelEvents = field(default_factory=ModelEvents)
    spares: Spares | None = None
    saved: SavedPrefixes | None = None
    ready: Callable[[], Awaitable[int]] | None = None

    async def devices(self) -> int:
        """Return the number of GPUs; from then on the budget is known."""
        return await self.ready() if self.ready else 0


class Use:
    """A request's hold on a model. It must be left."""

    def __init__(self, model: ServedModel) -> None:
        self._model: ServedModel | None = model
        self._worker: WorkerProcess | None = None

    async def worker(self) -> WorkerProcess:
        """Return the process that runs the model, loading it first if need be; the same one each time."""
        if self._model is None:
            raise Unavailable("the request is over")
        if self._worker is None:
            self._worker = await self._model.attach()
        return self._worker

    def leave(self) -> None:
        """Give the hold back; further calls do nothing."""
        model, self._model = self._model, None
        if model is not None:
            model.detach(attached=self._worker is not None)


class ServedModel:
    """One model: its settings, its file and its process."""

    def __init__(
        self,
        name: str,
        spec: ModelSpec,
        base: Path,
        facilities: Facilities,
        *,
        overrides: Mapping[str, Any] | None = None,
        listed: ModelSpec | None = None,
    ) -> None:
        """``overrides`` are the settings in which ``spec`` differs from the ``listed`` one by somebody's command."""
        self.name = name
        self.spec = spec
        self.listed = listed or spec
        self.overrides = dict(overrides or {})
        self.created = int(time.time())
        self.defaults: dict[str, Any] = {}  # request fields that hold where a request does not name them
        self.admission = Admission(spec.parallel, spec.queue)
        self.last_used = 0.0
        self.measured: Footprint | None = None  # what the last load took, the child's own memory not counted
        self.plan: LoadPlan | None = None  # of the last load
        self.base = base
        self._facilities = facilities
        self._header: GGUFHeader | None = None
        self._loadable: _Stamp | None = None  # of the header's files when they were last looked at
        self._unreadable_until = 0.0
        self._supervisor = Supervisor(name, self._prepare, self, facilities.spares)
        self._adapters: tuple[Adapter, ...] | None = None  # None: those of the settings
        self._keep_alive = spec.keep_alive
        self._timer: asyncio.TimerHandle | None = None
        self._waiting = 0  # uses without a process yet
        self._arriving = 0  # those among them for which it is being loaded
        self._active = 0  # uses with one
        self._leaving: asyncio.Task[None] | None = None
        self._departure: str | None = None  # why it leaves once what runs is done; nothing new begins until then
        self._farewell: str | None = None  # why it leaves once nobody uses it or waits for it
        self._gone = asyncio.Event()  # cleared while it leaves, or is about to
        self._gone.set()
        self._settled = True  # whether what the last load took is taken note of

    # ---- what it is ----------------------------------------------------------------------------------------------

    @property
    def header(self) -> GGUFHeader:
        """What the GGUF file says of itself; read once it is needed. Raises ``ModelError``."""
        if self._header is None:
            self._header = read_header(self.file())
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
        """Largest number of tokens of a request, prompt and answer."""
        return context_of(self.spec, self.header)

    @property
    def status(self) -> Status:
        """Where it stands now."""
        return self._supervisor.status

    @property
    def progress(self) -> float:
        """How much of it is loaded, from 0 to 1, while it is being loaded."""
        return self._supervisor.progress

    @property
    def waits_for_room(self) -> bool:
        """Whether it can't be loaded before other models have made room."""
        return self._facilities.residency.waits(self)

    @property
    def live_worker(self) -> WorkerProcess | None:
        """Its process, if it is loaded."""
        return self._supervisor.live_worker

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """Its LoRA adapters. Raises ``ModelError`` when one of those that its settings name can't be used."""
        if self._adapters is None:
            self._adapters = tuple(self.listed_adapters())
        return self._adapters

    @property
    def sparable(self) -> bool:
        """Whether it has been loaded and may be unloaded: nobody uses it."""
        return self.live_worker is not None and not self.busy

    def file(self) -> Path:
        """Return its file, checked against its sum if it has one. Raises ``ModelFileMissing``."""
        path = locate(parse_source(self.spec.source, self.base), self.spec.sha256)
        if path is None:
            raise ModelFileMissing(
                f"the weights of {self.name} are not on this machine", hint=f"llamaserve pull {self.name}"
            )
        return path

    def listed_adapters(self) -> list[Adapter]:
        """Return the adapters that its settings name. Raises ``ModelError`` when one is not here."""
        adapters = []
        for each in self.spec.lora:
            source = parse_source(each.source, self.base)
            path = locate(source)
            if path is None:
                raise ModelFileMissing(f"the LoRA adapter {each.source} of {self.name} is not on this machine")
            adapters.append(Adapter(each.name or source.name, str(path), each.scale))
        return adapters

    def load_params(self) -> LoadParams:
        """Return how it was loaded last, or else how its settings say."""
        return self.plan.params if self.plan else load_params(self.spec, self.header)

    def limited(self, generation: Generation) -> Generation:
        """Return the generation with a time limit no longer than the model's."""
        limits = [limit for limit in (generation.time_limit, self.spec.time_limit) if limit is not None]
        return msgspec.structs.replace(generation, time_limit=min(limits)) if limits else generation

    # ---- using it ------------------------------------------------------------------------------------------------

    def use(self, keep_alive: float | None = None) -> Use:
        """Take hold of it for a request, which may say how many seconds it is kept after that (-1: for ever)."""
        self._keep_alive = self.spec.keep_alive if keep_alive is None else keep_alive
        return self._hold()

    def _hold(self) -> Use:
        self._cancel_timer()
        self._waiting += 1
        return Use(self)

    @contextlib.asynccontextmanager
    async def in_use(self) -> AsyncIterator[WorkerProcess]:
        """Have its process for a moment, within a ``with`` block, loading it first if need be. How long it is kept is
        for requests to say.
        """
        use = self._hold()
        try:
            yield await use.worker()
        finally:
            use.leave()

    async def attach(self) -> WorkerProcess:
        """Return its process to a ``Use``, loading it first if need be."""
        while True:
            if self._leaving is not None or self._departure is not None:
                await self._gone.wait()
            elif self.live_worker is None:
                worker = await self._arrive()
                break
            elif self._facilities.residency.admits(self):
                worker = self.live_worker
                break
            else:
                await self._facilities.residency.wait_turn(self)
        self._waiting -= 1
        self._active += 1
        return worker

    async def _arrive(self) -> WorkerProcess:
        self._arriving += 1
        try:
            worker = await self._supervisor.worker()
            await self._settle()
            return worker
        finally:
            self._arriving -= 1

    def detach(self, *, attached: bool) -> None:
        """End a ``Use``."""
        if attached:
            self._active -= 1
        else:
            self._waiting -= 1
        self.last_used = time.monotonic()
        self._facilities.residency.wake()
        if self._departure is not None and not self._active and not self._arriving:
            self._begin_to_leave(self._departure)
        if not self._active and not self._waiting:
            self._rest()

    def stop_all(self) -> None:
        """End all its running requests with a normal finish."""
        self._supervisor.stop_all()

    async def set_adapters(self, adapters: Sequence[Adapter]) -> None:
        """Have these LoRA adapters and no others, from the next request on. Raises, and changes nothing, when one of
        them does not fit the model.
        """
        checked = await asyncio.to_thread(self._checked, adapters)
        if (worker := self.live_worker) is not None:
            await worker.set_adapters(list(checked))
        self._adapters = checked

    # ---- coming and going ----------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether somebody uses it, or it is being loaded for somebody."""
        return self._active > 0 or self._arriving > 0 or self._supervisor.status is Status.LOADING

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for it."""
        return self._waiting > 0

    async def has_room(self) -> bool:
        """Whether it could be loaded without anybody's leaving. Raises why it can't be loaded at all."""
        devices = await self._facilities.devices()
        residency = self._facilities.residency
        return residency.has_room_for((await asyncio.to_thread(self._plan, residency.budget, devices)).need)

    async def vacate(self) -> None:
        """Leave memory for another model."""
        await self.unload("evicted")

    async def unload(self, reason: str) -> None:
        """Leave memory now, whatever runs. What was evaluated is saved."""
        self._begin_to_leave(reason)
        if self._leaving is not None:
            await asyncio.shield(self._leaving)

    async def unload_when_done(self, reason: str) -> None:
        """Leave memory as soon as what runs is done; what comes meanwhile waits, and loads it again."""
        if not self._active and not self._arriving:
            await self.unload(reason)
            return
        self._departure = reason
        self._gone.clear()
        await self._gone.wait()

    async def retire(self) -> None:
        """Leave memory as soon as nobody uses it any more or waits for it, since another has taken its name."""
        if not self._active and not self._waiting:
            await self.unload("replaced")
            return
        self._farewell = "replaced"
        self._gone.clear()
        await self._gone.wait()

    async def limit_spill(self, size: int) -> None:
        """Keep at most so many bytes of prefixes in main memory."""
        if (worker := self.live_worker) is not None:
            with contextlib.suppress(LlamaserveError):  # it has just ended
                await worker.limit_spill(size)

    def adopt(self, listed: ModelSpec, spec: ModelSpec) -> None:
        """Take settings that differ in what matters to requests only, not to how it is loaded."""
        self.listed, self.spec = listed, spec
        self.admission.limit(spec.parallel, spec.queue)

    def forgive(self) -> None:
        """Forget crashes and failures, because somebody wants it tried again now."""
        self._supervisor.forgive()

    def loading(self, fraction: float) -> None:
        """See ``Listener``."""
        self._facilities.events.publish("load_progress", self.name, percent=round(100 * fraction))

    def loaded(self, worker: WorkerProcess, seconds: float) -> None:
        """See ``Listener``."""
        assert self.plan is not None
        assert self._header is not None
        self.measured = worker.memory
        record(self._header, self.plan.params, self.plan.estimate.total, worker.memory)
        where = {"gpu": worker.gpu, "pid": worker.pid, "seconds": round(seconds, 3)}
        self._facilities.events.publish("loaded", self.name, **where)
        self.last_used = time.monotonic()
        self._settled = False
        if not self.wanted:  # those who wanted it have given up
            self._facilities.residency.wake()
            self._rest()

    def failed(self, error: LlamaserveError) -> None:
        """See ``Listener``."""
        self._facilities.residency.left(self)
        self._facilities.events.publish("load_failed", self.name, **error.body())

    def crashed(self, error: LlamaserveError, *, quarantined: bool) -> None:
        """See ``Listener``."""
        self._facilities.residency.left(self)
        self._facilities.events.publish("crashed", self.name, quarantined=quarantined, **error.body())

    async def _settle(self) -> None:
        """Have others make room when the last load has taken more than was planned."""
        if self._settled or self.plan is None or self.measured is None:
            return
        self._settled = True
        taken, planned = self.measured + PROCESS + Footprint(self.plan.params.spill or 0), self.plan.need
        need = Footprint(max(taken.host, planned.host), max(taken.device, planned.device))
        await self._facilities.residency.settle(self, need)

    def _rest(self) -> None:
        """Leave now or later, since nobody uses it."""
        self._cancel_timer()
        if self._farewell is not None:
            self._begin_to_leave(self._farewell)
        elif self._keep_alive == 0:
            self._begin_to_leave("idle")
        elif self._keep_alive > 0:
            self._timer = asyncio.get_running_loop().call_later(self._keep_alive, self._expire)

    def _expire(self) -> None:
        self._timer = None
        if self.sparable:
            self._begin_to_leave("idle")

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _begin_to_leave(self, reason: str) -> None:
        self._cancel_timer()
        if self._leaving is None:
            self._gone.clear()
            self._leaving = asyncio.create_task(self._leave(reason))

    async def _leave(self, reason: str) -> None:
        worker = self.live_worker
        try:
            if worker is not None:
                self._facilities.events.publish("unloading", self.name, reason=reason)
                await self._save(worker)
            await self._supervisor.aclose()
        finally:
            self._leaving = self._departure = self._farewell = None
            self._facilities.residency.left(self)
            self._gone.set()
        await self._facilities.residency.return_spill()
        if worker is not None:
            logger.info("%s is unloaded (%s)", self.name, reason)
            self._facilities.events.publish("unloaded", self.name, reason=reason)

    async def _save(self, worker: WorkerProcess) -> None:
        saved, plan = self._facilities.saved, self.plan
        if saved is None or plan is None or not plan.params.saved_prefixes or not plan.params.prefix_cache:
            return
        path = Path(plan.params.saved_prefixes)
        try:
            async with asyncio.timeout(_SAVING_LIMIT):
                result = await worker.save_prefixes(path, saved.room(path))
            logger.debug("%s: saved %d tokens of prefixes, %d bytes", self.name, result.tokens, result.size)
            await asyncio.to_thread(saved.prune)
        except (LlamaserveError, OSError, TimeoutError) as error:
            logger.warning("%s: its prefixes could not be saved: %s", self.name, error or "it took too long")

    async def _prepare(self) -> LoadParams:
        """Check the file anew, since it may have changed since the last load, and wait for room."""
        facilities = self._facilities
        devices = await facilities.devices()
        facilities.events.publish("loading", self.name)
        self.plan = plan = await asyncio.to_thread(self._plan, facilities.residency.budget, devices)
        spill = await facilities.residency.enter(self, plan.need, plan.spill)
        params = plan.params
        if params.spill is None:
            params = msgspec.structs.replace(params, spill=spill)
        if facilities.saved is not None and params.prefix_cache:
            params = await asyncio.to_thread(self._with_saved_prefixes, facilities.saved, params)
        self.plan = LoadPlan(params, plan.estimate, plan.need, plan.spill)
        return params

    def _with_saved_prefixes(self, saved: SavedPrefixes, params: LoadParams) -> LoadParams:
        try:
            path, identity = saved.path_for(self.header, params, name=self.name)
        except OSError as error:
            logger.warning("%s: its prefixes will not be saved: %s", self.name, error)
            return params
        return msgspec.structs.replace(params, saved_prefixes=str(path), prefixes_identity=identity)

    def _plan(self, budget: Footprint, devices: int) -> LoadPlan:
        header = self._checked_header()
        if header.is_embedding_model or self.spec.task != "generation":
            raise ModelNotCapable(f"{self.name} does not generate text, and this server offers only text generation")
        if self.context < self.spec.context:
            logger.warning(
                "%s was trained for %d tokens of context; the configured %d are cut to that",
                *(self.name, self.context, self.spec.context),
            )
        adapters = self._checked(self.adapters)
        return plan_load(self.name, header, load_params(self.spec, header, adapters), budget, devices)

    def _checked_header(self) -> GGUFHeader:
        """Return the header of a file that llama.cpp may see. One that has not changed since it was looked at is not
        looked at again, which takes a tenth of a second.
        """
        path = self.file()
        if self._header is None or self._header.path != path or _stamp(self._header) != self._loadable:
            self._header = header = read_header(path)
            before = _stamp(header)
            check_loadable(header)
            self._loadable = before
        return self._header

    def _checked(self, adapters: Sequence[Adapter]) -> tuple[Adapter, ...]:
        for each in adapters:
            check_adapter(read_header(Path(each.path)), self.header)
        return tuple(adapters)
