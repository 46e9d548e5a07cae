"""One model that this server offers: its settings, and its life in memory.

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
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import msgspec

from llamaserve.engine.params import Adapter, Footprint, Generation, LoadParams
from llamaserve.errors import LlamaserveError, ModelError, ModelNotCapable, Unavailable
from llamaserve.registry.admission import Admission, TextAdmission
from llamaserve.registry.budget import is_unified
from llamaserve.registry.gguf import GGUFHeader
from llamaserve.registry.image_file import ImageFile, insufficient
from llamaserve.registry.load_plan import PROCESS, LoadPlan, context_of
from llamaserve.registry.measurements import record
from llamaserve.registry.memory import claimed
from llamaserve.registry.model_events import ModelEvents
from llamaserve.registry.model_file import ModelFile
from llamaserve.registry.other_file import OtherFile
from llamaserve.registry.residency import Residency
from llamaserve.registry.saved_prefixes import SavedPrefixes
from llamaserve.registry.sources import parse_source
from llamaserve.registry.spec import ModelSpec, Task
from llamaserve.registry.speech_file import SpeechFile
from llamaserve.registry.tasks import GENERATING, WORK, Kind, kind_of, task_of
from llamaserve.registry.turns import Turns
from llamaserve.worker.process import WorkerProcess
from llamaserve.worker.protocol import Device, ModelParams
from llamaserve.worker.spare import Spares
from llamaserve.worker.supervisor import Status, Supervisor

logger = logging.getLogger(__name__)

# Requests for vectors or scores of texts that may be at one model, and the bytes of their texts, which wait with them.
MAX_EMBEDDING_REQUESTS = 1024
MAX_EMBEDDING_TEXT = 64 * 1024 * 1024
_SAVING_LIMIT = 10.0  # seconds in which a model that leaves must have written its prefixes
_FILES: Final[Mapping[Kind, type[ModelFile]]] = {"text": ModelFile, "speech": SpeechFile, "image": ImageFile}
_ANSWERS_LIMIT = 3.0  # seconds for answers to come to their end when the server ends


class Facilities:
    """What all models of a server share. ``ready`` tells what GPUs there are; the budget is known from then on.
    ``alive`` are the models that are in memory or on their way in or out, and some that could not be loaded.
    """

    def __init__(
        self,
        residency: Residency,
        events: ModelEvents,
        spares: Spares | None = None,
        saved: SavedPrefixes | None = None,
        ready: Callable[[], Awaitable[Sequence[Device]]] | None = None,
    ) -> None:
        self.residency = residency
        self.events = events
        self.spares = spares
        self.saved = saved
        self.alive: set[ServedModel] = set()
        self.closing = False
        self._ready = ready

    async def devices(self) -> Sequence[Device]:
        """Return the GPUs; from then on the budget is known."""
        return await self._ready() if self._ready else ()


class _Replaced(Exception):
    """Another model has taken this one's name, and this one is not in memory any more."""

    def __init__(self, successor: ServedModel) -> None:
        super().__init__()
        self.successor = successor


class Use:
    """A request's hold on a model. It must be left."""

    def __init__(self, model: ServedModel, *, follows: bool = True) -> None:
        """If the model is replaced while the request waits for it, it ``follows`` to the one that has its name then, or
        else is refused.
        """
        self._model: ServedModel | None = model
        self._follows = follows
        self._worker: WorkerProcess | None = None

    async def worker(self) -> WorkerProcess:
        """Return the process that runs the model, loading it first if need be; the same one each time, unless ``again``
        is called.
        """
        while self._worker is None:
            if self._model is None:
                raise Unavailable("the request is over")
            try:
                self._worker = await self._model.attach()
            except _Replaced as replaced:
                if not self._follows:
                    raise self._model.replaced() from None
                self._model.detach(attached=False)
                self._model = replaced.successor
                self._model.hold()
        return self._worker

    async def again(self) -> WorkerProcess:
        """Return the process that runs the model now, loading it again if the one before has ended. ``worker`` must
        have returned that. Raises ``Unavailable`` when the model has been replaced meanwhile.
        """
        if self._model is None:
            raise Unavailable("the request is over")
        self._worker = await self._model.attach_again()
        return self._worker

    @property
    def model(self) -> ServedModel | None:
        """The model that is held; another one than at first if that was replaced."""
        return self._model

    def keep(self, seconds: float | None) -> None:
        """Say how long the model is kept after it: so many seconds, -1 for ever, None as its settings say. Nothing but
        requests that are answered should say so.
        """
        if self._model is not None:
            self._model.keep(seconds)

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
        self.file = _FILES[kind_of(spec, parse_source(spec.source, base))](name, spec, base)
        self.admission = Admission(self._parallel(spec), spec.queue)
        self._turns = Turns()
        self.embedding_admission = TextAdmission(MAX_EMBEDDING_REQUESTS, MAX_EMBEDDING_TEXT)
        self.last_used = 0.0
        self.measured: Footprint | None = None  # what the last load took, the child's own memory not counted
        self.plan: LoadPlan | None = None  # of the last load
        self._facilities = facilities
        self._supervisor = Supervisor(name, self._prepare, self, facilities.spares)
        self._configured: tuple[Adapter, ...] | None = None  # adapters of the settings, once they are looked up
        self._given: tuple[Adapter, ...] | None = None  # others, by command
        self._giving = asyncio.Lock()
        self._keep_alive = spec.keep_alive
        self._timer: asyncio.TimerHandle | None = None
        self._waiting = 0  # uses without a process yet
        self._arriving = 0  # those among them for which it is being loaded
        self._active = 0  # uses with one
        self._leaving: asyncio.Task[None] | None = None
        self._departure: str | None = None  # why it leaves once what runs is done; nothing new begins until then
        self._gone = asyncio.Event()  # cleared while it leaves, or is about to
        self._gone.set()
        self._successor: ServedModel | None = None  # that has taken its name
        self._retired = False  # whether it is offered no longer, and leaves for good once nobody uses it
        self._settling: asyncio.Task[None] | None = None  # what is done between the end of a load and the first use

    # ---- what it is ----------------------------------------------------------------------------------------------

    @property
    def header(self) -> GGUFHeader:
        """What its file says of itself. Raises ``ModelError``."""
        return self.file.header

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
    def closing(self) -> bool:
        """Whether the server ends."""
        return self._facilities.closing

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
        return self._of_settings() if self._given is None else self._given

    @property
    def adapted(self) -> bool:
        """Whether it has other LoRA adapters than its settings name, by somebody's command."""
        return self._given is not None

    @property
    def sparable(self) -> bool:
        """Whether it has been loaded and may be unloaded: nobody uses it."""
        return self.live_worker is not None and not self.busy

    async def task(self) -> Task:
        """Return what it is there for. One whose file would have to say so and can't be read is believed to generate
        text; loading it will tell what is wrong.
        """
        return self.spec.task or task_of(self.spec, await self.file.peek())

    async def require(self, *tasks: Task) -> None:
        """Refuse a request that needs a model for one of these tasks if it is there for another. Raises
        ``ModelNotCapable``.
        """
        task = await self.task()
        if task not in tasks:
            message = f"{self.name} {WORK[task]}; this request needs a model that {WORK[tasks[0]]}"
            if "embedding" in tasks and task in GENERATING:
                message += ". Its file can make embeddings, too: list it under another name with `task: embedding`"
            raise ModelNotCapable(message)

    def _parallel(self, spec: ModelSpec) -> int:
        """Return how many requests are worked on at once; speech and pictures are worked on one by one."""
        return 1 if isinstance(self.file, OtherFile) else spec.parallel

    @property
    def cells(self) -> int | None:
        """How many tokens its key-value cache holds, if it is loaded and has one."""
        params = self.plan and self.plan.params
        return params.kv_cells if isinstance(params, LoadParams) and self.live_worker is not None else None

    def load_params(self) -> ModelParams:
        """Return how it was loaded last, or else how its settings say."""
        return self.plan.params if self.plan else self.file.load_params()

    def limited(self, generation: Generation) -> Generation:
        """Return the generation with a time limit no longer than the model's."""
        limits = [limit for limit in (generation.time_limit, self.spec.time_limit) if limit is not None]
        return msgspec.structs.replace(generation, time_limit=min(limits)) if limits else generation

    # ---- using it ------------------------------------------------------------------------------------------------

    def use(self, *, follows: bool = True) -> Use:
        """Take hold of it for a request. See ``Use``."""
        self.hold()
        return Use(self, follows=follows)

    def keep(self, seconds: float | None) -> None:
        """See ``Use``."""
        self._keep_alive = self.spec.keep_alive if seconds is None else seconds

    def hold(self) -> None:
        """Begin a ``Use``."""
        self._cancel_timer()
        self._waiting += 1

    @contextlib.asynccontextmanager
    async def in_use(self) -> AsyncIterator[WorkerProcess]:
        """Have its process for a moment, within a ``with`` block, loading it first if need be."""
        use = self.use()
        try:
            yield await use.worker()
        finally:
            use.leave()

    async def attach(self) -> WorkerProcess:
        """Return its process to a ``Use``, loading it first if need be. Raises ``_Replaced``."""
        while True:
            if self._facilities.closing:
                raise Unavailable("the server is being shut down", retry_after=1)
            if self._leaving is not None or self._departure is not None:
                await self._gone.wait()
            elif self.live_worker is None:
                if self._successor is not None and not self._arriving:
                    raise _Replaced(self._successor)
                try:
                    worker = await self._arrive()
                except Unavailable:
                    if self._successor is None:
                        raise
                    raise _Replaced(self._successor) from None
                break
            elif self._facilities.residency.admits(self):
                worker = self.live_worker
                break
            else:
                await self._facilities.residency.wait_turn(self)
        self._waiting -= 1
        self._active += 1
        return worker

    async def attach_again(self) -> WorkerProcess:
        """Return its process to a ``Use`` that has had one, and so waits for no other model unless it has to be loaded
        again. Raises ``Unavailable``.
        """
        while self._leaving is not None:
            await self._gone.wait()
        if (worker := self.live_worker) is not None:
            return worker
        if self._facilities.closing:
            raise Unavailable("the server is being shut down", retry_after=1)
        if self._successor is not None:
            raise self.replaced()
        self._active -= 1
        self._waiting += 1
        try:
            return await self._arrive()
        except Unavailable:
            if self._successor is None:
                raise
            raise self.replaced() from None
        finally:
            self._waiting -= 1
            self._active += 1

    def replaced(self) -> Unavailable:
        """Return what is said to requests that can't go on with the model that has its name now."""
        return Unavailable(f"{self.name} was replaced while the request waited for it", retry_after=1)

    async def _arrive(self) -> WorkerProcess:
        self._arriving += 1
        self._facilities.alive.add(self)  # and not only after the pause that follows crashes
        try:
            worker = await self._supervisor.worker()
            await self._settled()
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
        if self._unused:
            self._rest()

    def stop_all(self) -> None:
        """End all its running requests with a normal finish."""
        self._supervisor.stop_all()

    async def set_adapters(self, adapters: Sequence[Adapter]) -> None:
        """Have these LoRA adapters and no others, from the next request on. Raises, and changes nothing, when one of
        them does not fit the model, or all of them not into the memory beside it.
        """
        async with self._giving:
            checked = await asyncio.to_thread(self.file.checked, adapters)
            await self._settled()
            while self.status is Status.LOADING and self._leaving is None:  # with the former ones
                with contextlib.suppress(LlamaserveError):
                    await self._supervisor.worker()
                await self._settled()
            if (worker := self.live_worker) is not None and self._leaving is None:
                await self._give(worker, checked)
            self._given = None if await asyncio.to_thread(self._are_of_settings, checked) else checked

    def _of_settings(self) -> tuple[Adapter, ...]:
        if self._configured is None:
            self._configured = tuple(self.file.adapters())
        return self._configured

    def _are_of_settings(self, adapters: tuple[Adapter, ...]) -> bool:
        try:
            return adapters == self._of_settings()
        except ModelError:  # one that its settings name can't be used
            return False

    async def _give(self, worker: WorkerProcess, adapters: Sequence[Adapter]) -> None:
        """Have its process load adapters, once there is room for them. It stays in memory meanwhile."""
        former, residency = self.plan, self._facilities.residency
        assert former is not None
        self._cancel_timer()
        self._active += 1
        try:
            devices = await self._facilities.devices()
            plan = await asyncio.to_thread(self.file.plan_again, former, adapters, residency.budget, devices)
            await self._claim(worker, plan)
            if not (plan.need.fits(former.need) or residency.claimed.fits(residency.budget)):
                raise Unavailable(
                    f"there is no room for these LoRA adapters of {self.name} beside the models in use; try again later"
                )
            await worker.set_adapters(list(adapters))
            self.plan = plan
        except BaseException:
            await self._claim(worker, former)
            raise
        finally:
            self.detach(attached=True)

    @property
    def taken(self) -> bool:
        """Whether somebody has a turn."""
        return self._turns.taken

    @property
    def queued(self) -> int:
        """How many wait for their turn."""
        return self._turns.waiting

    def turn(self, share: str = "") -> contextlib.AbstractAsyncContextManager[None]:
        """Wait until nobody else has a turn, and have one within a ``with`` block. Turns go round the shares of the
        model's time that requests count for; of one share, those who came first are first.
        """
        return self._turns.turn(share)

    @contextlib.asynccontextmanager
    async def more_room(
        self, taken: Callable[[Sequence[Device]], Footprint], *, lasting: int = 0
    ) -> AsyncIterator[None]:
        """Have the model, which is in memory and used by the caller, take more than was planned within a ``with``
        block: what is ``taken``, given the GPUs. So many ``lasting`` bytes over the plan it takes after that, too,
        until the next time. Raises ``InsufficientMemory`` when that is more than the whole budget, and ``Unavailable``
        when models in use leave no room for it.
        """
        plan, worker, residency = self.plan, self.live_worker, self._facilities.residency
        if plan is None or worker is None:  # it has just ended
            yield
            return
        devices = await self._facilities.devices()
        need = claimed(taken(devices), unified=is_unified(devices)) + plan.fixed
        if not need.fits(residency.budget) and not need.fits(plan.need):
            raise insufficient(self.name, need, residency.budget, " for this")
        if not need.fits(plan.need) and not residency.could_take(self, need):
            raise self._crowded()
        try:
            await self._claim(worker, plan, need)
            if not need.fits(plan.need) and not residency.claimed.fits(residency.budget):
                raise self._crowded()
            yield
        finally:
            if self.live_worker is worker:
                await self._claim(worker, plan, plan.need + Footprint(lasting, lasting if plan.need.device else 0))

    def _crowded(self) -> Unavailable:
        return Unavailable(
            f"there is no room for this beside the models in use: {self.name} has to take more", retry_after=1
        )

    # ---- coming and going ----------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether somebody uses it, or it is being loaded for somebody."""
        return self._active > 0 or self._arriving > 0 or self._supervisor.status is Status.LOADING

    @property
    def leaving(self) -> bool:
        """Whether it is giving its memory back."""
        return self._leaving is not None

    @property
    def _unused(self) -> bool:
        return not self._active and not self._waiting

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for it, and for no other that has its name now."""
        return self._waiting > 0 and self._successor is None

    async def has_room(self) -> bool:
        """Whether it could be loaded without anybody's leaving. Raises why it can't be loaded at all."""
        devices = await self._facilities.devices()
        residency = self._facilities.residency
        return residency.has_room_for((await asyncio.to_thread(self._plan, residency.budget, devices)).need)

    async def is_at_hand(self) -> bool:
        """Whether a request could use it with no other model's leaving memory or being waited for; if it is just
        leaving itself, it may come back after that. Raises why it can't be loaded at all.
        """
        if self._leaving is not None:
            await asyncio.shield(self._leaving)
        residency = self._facilities.residency
        if self._departure is not None:
            return False
        return residency.admits(self) or (not residency.crowded and await self.has_room())

    async def vacate(self) -> None:
        """Leave memory for another model."""
        await self.unload("evicted")

    async def unload(self, reason: str) -> None:
        """Leave memory now, whatever runs. What was evaluated is saved."""
        self._begin_to_leave(reason)
        if self._leaving is not None:
            await asyncio.shield(self._leaving)

    async def wind_up(self) -> None:
        """Leave memory since the server ends: soon after its answers, which end now with what there is of them."""
        self.stop_all()
        if self.live_worker is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ANSWERS_LIMIT):
                    await self.unload_when_done("shutdown")
                    return
        await self.unload("shutdown")

    async def unload_when_done(self, reason: str) -> None:
        """Leave memory as soon as what runs is done; what comes meanwhile waits, and loads it again."""
        if not self._active and not self._arriving:
            await self.unload(reason)
            return
        self._departure = reason
        self._gone.clear()
        await self._gone.wait()

    def retire(self, successor: ServedModel | None) -> None:
        """Leave memory for good as soon as nobody uses it, since another has taken its name, or it is not offered any
        more. Those that wait for it without need go over to the successor.
        """
        self._retired, self._successor = True, successor
        self._facilities.residency.wake()  # it may stand in the queue there
        if self._unused:
            self._begin_to_leave("replaced")

    async def limit_spill(self, size: int) -> None:
        """Keep at most so many bytes of prefixes in main memory."""
        if (worker := self.live_worker) is not None:
            with contextlib.suppress(LlamaserveError):  # it has just ended
                await worker.limit_spill(size)

    def adopt(self, listed: ModelSpec, spec: ModelSpec, overrides: Mapping[str, Any]) -> None:
        """Take settings that differ in what matters to requests only, not to how it is loaded."""
        if self._keep_alive == self.spec.keep_alive:  # no request has said otherwise
            self._keep_alive = spec.keep_alive
        self.listed, self.spec, self.overrides = listed, spec, dict(overrides)
        self.file.spec = spec
        self.admission.limit(self._parallel(spec), spec.queue)
        if self.sparable and self._unused:
            self._rest()

    def forgive(self) -> None:
        """Forget crashes and failures, because somebody wants it tried again now."""
        self._supervisor.forgive()

    def retry(self) -> None:
        """Forget that a load has failed, because its reason may be gone."""
        self._supervisor.retry()

    def loading(self, fraction: float) -> None:
        """See ``Listener``."""
        self._facilities.events.publish("load_progress", self.name, percent=round(100 * fraction))

    def loaded(self, worker: WorkerProcess, seconds: float) -> None:
        """See ``Listener``."""
        self.measured = worker.memory
        where = {"gpu": worker.gpu, "pid": worker.pid, "seconds": round(seconds, 3)}
        self._facilities.events.publish("loaded", self.name, **where)
        self.last_used = time.monotonic()
        self._settling = asyncio.create_task(self._settle(worker))

    def failed(self, error: LlamaserveError) -> None:
        """See ``Listener``."""
        self._forget()
        if self._successor is None:
            self._facilities.events.publish("load_failed", self.name, **error.body())

    def crashed(self, error: LlamaserveError, *, quarantined: bool) -> None:
        """See ``Listener``."""
        self._forget()
        self._facilities.events.publish("crashed", self.name, quarantined=quarantined, **error.body())

    def _forget(self) -> None:
        """Take note that it takes no memory."""
        self._facilities.alive.discard(self)
        self._facilities.residency.left(self)

    async def _settle(self, worker: WorkerProcess) -> None:
        """Do what a finished load leaves to do: take note of what it took, have others make room if that is more than
        was planned, and tell the child if it may have another spill than it was told.
        """
        plan, residency = self.plan, self._facilities.residency
        assert plan is not None
        try:
            if isinstance(plan.params, LoadParams):
                await asyncio.to_thread(record, self.header, plan.params, plan.estimate.total, worker.memory)
            await self._claim(worker, plan)
            if isinstance(
                plan.params, LoadParams
            ) and plan.params.spill != plan.fixed.host - PROCESS.host + residency.spill_of(self):
                await self.limit_spill(residency.spill_of(self))
        except LlamaserveError as error:  # it has ended just now, which others notice
            logger.warning("%s: %s", self.name, error.message)
        if self._unused:  # those who wanted it have given up
            residency.wake()
            self._rest()

    async def _settled(self) -> None:
        """Wait until what the last load has left to do is done."""
        if self._settling is not None:
            await asyncio.shield(self._settling)

    async def _claim(self, worker: WorkerProcess, plan: LoadPlan, more: Footprint | None = None) -> None:
        """Claim what it takes by plan, or what it took when it was loaded, or ``more`` than both; others make room."""
        taken = worker.memory.host + plan.fixed.host  # that of GPUs is measured for all processes together
        more = more or plan.need
        need = Footprint(max(taken, plan.need.host, more.host), max(plan.need.device, more.device))
        await self._facilities.residency.settle(self, need)

    def _rest(self) -> None:
        """Leave now or later, since nobody uses it."""
        self._cancel_timer()
        if self._retired:
            self._begin_to_leave("replaced")
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
        here = self._supervisor.status in (Status.LOADED, Status.LOADING)
        facts = {"reason": reason} if worker is None else {"reason": reason, "pid": worker.pid}
        try:
            if worker is not None:
                self._facilities.events.publish("unloading", self.name, **facts)
                if not self._active:  # else it does not hear that it is to end its answers, and would not hear of this
                    await self._save(worker)
        finally:
            try:
                await self._supervisor.aclose()
            finally:
                self._left(here=here, **facts)

    def _left(self, *, here: bool, **facts: object) -> None:
        """Take note that it has left; ``here``: that it was in memory or on its way there."""
        if here:
            logger.info("%s is unloaded (%s)", self.name, facts["reason"])
            self._facilities.events.publish("unloaded", self.name, **facts)
        self._leaving = self._departure = None
        self._keep_alive = self.spec.keep_alive
        self._forget()
        self._gone.set()

    async def _save(self, worker: WorkerProcess) -> None:
        saved, plan = self._facilities.saved, self.plan
        params = plan and plan.params
        if saved is None or not isinstance(params, LoadParams) or not params.saved_prefixes or not params.prefix_cache:
            return
        path = Path(params.saved_prefixes)
        try:
            async with asyncio.timeout(_SAVING_LIMIT):
                result = await worker.save_prefixes(path, saved.room(path))
            logger.debug("%s: saved %d tokens of prefixes, %d bytes", self.name, result.tokens, result.size)
            await asyncio.to_thread(saved.prune)
        except (LlamaserveError, OSError, TimeoutError) as error:
            logger.warning("%s: its prefixes could not be saved: %s", self.name, error or "it took too long")

    async def _prepare(self) -> ModelParams:
        """Check the file anew, since it may have changed since the last load, and wait for room."""
        facilities = self._facilities
        facilities.alive.add(self)  # again, if the end of its last process was noticed only after a request had come
        devices = await facilities.devices()
        facilities.events.publish("loading", self.name)
        self.plan = plan = await asyncio.to_thread(self._plan, facilities.residency.budget, devices)
        spill = await facilities.residency.enter(self, plan.need, plan.spill)
        params = plan.params
        if not isinstance(params, LoadParams):
            return params
        if params.spill is None:
            params = msgspec.structs.replace(params, spill=spill)
        if facilities.saved is not None and params.prefix_cache:
            params = await asyncio.to_thread(self._with_saved_prefixes, facilities.saved, params)
        self.plan = replace(plan, params=params)
        return params

    def _with_saved_prefixes(self, saved: SavedPrefixes, params: LoadParams) -> LoadParams:
        try:
            path, identity = saved.path_for(self.header, params, name=self.name)
        except OSError as error:
            logger.warning("%s: its prefixes will not be saved: %s", self.name, error)
            return params
        return msgspec.structs.replace(params, saved_prefixes=str(path), prefixes_identity=identity)

    def _plan(self, budget: Footprint, devices: Sequence[Device]) -> LoadPlan:
        return self.file.plan(self.adapters, budget, devices)
