"""The models that this server offers, by name: those of models.yaml, those of the models folder, and those named at the
start. Any of them is loaded when a request names it.

Knows which names there are and which model answers where none is named; how a model comes and goes is ``served``'s
business, and who has to go is ``residency``'s.
"""

from __future__ import annotations

import asyncio
import difflib
import logging
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llamaserve.engine.events import Occupancy
from llamaserve.engine.params import Footprint
from llamaserve.errors import LlamaserveError, ModelNotFound, ModelNotLoaded, RegistryError
from llamaserve.registry.fetching import locate
from llamaserve.registry.folder import FoundModel, is_something_else, resolve, scan, without_ending
from llamaserve.registry.load_args import apply
from llamaserve.registry.lock_file import LockFile
from llamaserve.registry.model_events import ModelEvents
from llamaserve.registry.residency import Residency
from llamaserve.registry.saved_prefixes import SavedPrefixes
from llamaserve.registry.served import Facilities, ServedModel
from llamaserve.registry.sources import Source, parse_source
from llamaserve.registry.spec import ModelSpec, Registry, Task, load_registry
from llamaserve.registry.tasks import GENERATING, task_of
from llamaserve.worker.child import Child
from llamaserve.worker.fork_server import ForkServer
from llamaserve.worker.protocol import Device
from llamaserve.worker.spare import Spares

logger = logging.getLogger(__name__)

T = TypeVar("T")

_COMPARED = 1000  # names that may be meant by one that is unknown; comparing them takes time

# What matters to requests only. A change of these needs no new load.
_LIGHT = frozenset({"queue", "time_limit", "keep_alive", "prefixes", "size", "licence", "description"})


class ModelPool:
    """All models on offer; ``current`` answers requests that name none."""

    def __init__(
        self,
        registry: Registry,
        references: Sequence[str] = (),
        *,
        budget: Callable[[Sequence[Device]], Footprint],
        folder: Path | None = None,
        saved: SavedPrefixes | None = None,
    ) -> None:
        """``references`` are what the command line takes for models; they are loaded at the start, and the first is the
        current one. ``budget`` says how much memory models may take, given the GPUs.
        """
        self.events = ModelEvents()
        self.registry = registry
        self.registry_problem: str | None = None  # why the last edit of models.yaml or models.lock does not count
        self.reloads = 0  # how often models.yaml was read again
        self.folder = folder
        self._budget = budget
        self._devices: Sequence[Device] | None = None
        self._fork_server = ForkServer() if sys.platform == "linux" else None
        self._spares = Spares(Child.start if self._fork_server is None else self._fork_server.start)
        facilities = Facilities(Residency(Footprint()), self.events, self._spares, saved, self._learn_of_hardware)
        self._facilities = facilities
        self._named = dict(resolve(registry, folder, reference) for reference in references)
        self._coming = set(self._named)  # those that are loaded at the start, unless they are unloaded before
        self._models: dict[str, ServedModel] = {}
        self._aliases: dict[str, str] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._begun = asyncio.Event()  # set when the models named at the start are being loaded
        self._preloading: asyncio.Task[None] | None = None
        self._failures: dict[str, LlamaserveError] = {}
        self._reloading = asyncio.Lock()
        self._commands: dict[str, asyncio.Lock] = {}  # of loads and unloads by command, for each name
        self._found: list[FoundModel] = []
        self._locked: list[str] = []  # the models of models.lock, by source
        self._current = next(iter(self._named), None)
        self._reject(self._read_lock())
        self._take_over(self._look_into_folder())
        self._here = self._all_here(list(self._models.values()))

    # ---- names ---------------------------------------------------------------------------------------------------

    @property
    def models(self) -> list[ServedModel]:
        """The models that are on this machine: the current one first, then other loaded ones."""
        here = [model for model in list(self._models.values()) if self._offers(model)]  # maybe in another thread
        return sorted(here, key=lambda model: (model.name != self._current, model.live_worker is None))

    @property
    def current(self) -> ServedModel | None:
        """The model that answers requests which name none."""
        return self._models.get(self._current) if self._current else None

    @property
    def named(self) -> list[ServedModel]:
        """The models that were named at the start."""
        return [self._models[name] for name in self._named if name in self._models]

    @property
    def occupancy(self) -> Occupancy:
        """How busy all models are together."""
        workers = [model.live_worker for model in self._facilities.alive]
        each = [worker.occupancy for worker in workers if worker is not None]
        queued = sum(model.queued for model in self._facilities.alive)
        return Occupancy(
            sum(o.running for o in each), sum(o.waiting for o in each) + queued, sum(o.cells for o in each)
        )

    @property
    def budget(self) -> Footprint:
        """The memory that models may take."""
        return self._facilities.residency.budget

    @property
    def claimed(self) -> Footprint:
        """The memory that models take by plan."""
        return self._facilities.residency.claimed

    def aliases_of(self, name: str) -> list[str]:
        """Return the other names of a model."""
        return sorted(alias for alias, target in self._aliases.items() if target == name)

    def get(self, name: str | None) -> ServedModel:
        """Return the model with this name or alias, or the current one for None; never another than the named one."""
        if name is None:
            model = self.current
            if model is None:
                raise ModelNotLoaded(
                    "no model is loaded; name one of GET /v1/models in the request, or start the server with one"
                )
            return model
        model = self._models.get(self._aliases.get(name, name))
        if model is None or not (self._offers(model) or model.file.is_here):  # it may have been fetched since we looked
            raise self._not_found(name, model)
        return model

    def get_for(self, task: Task, name: str | None) -> ServedModel:
        """Return the model with this name or alias; for None the current one if it is there for this task, or else the
        one that models.yaml has for it.
        """
        if name is not None:
            return self.get(name)
        current = self.current
        if current is not None and task_of(current.spec, current.file.known_header) == task:
            return current
        if (default := self.registry.default_models.get(task)) is not None:
            return self.get(default)
        raise ModelNotLoaded(f"the request names no model, and models.yaml has no `{task}_model` under `defaults`")

    def _offers(self, model: ServedModel) -> bool:
        return model.name in self._here or model.name in self._named or model.live_worker is not None

    def _not_found(self, name: str, listed: ServedModel | None) -> ModelNotFound:
        if listed is not None:
            return ModelNotFound(
                f"the weights of {listed.name} are not on this machine; fetch them with `llamaserve pull "
                f"{listed.name}` or POST /v1/internal/model/download",
                param="model",
            )
        names = [model.name for model in self.models]
        names += [alias for alias, target in self._aliases.items() if target in self._here]
        close = difflib.get_close_matches(name[:200], names[:_COMPARED], n=3) or names[:3]
        there = f"there is {', '.join(close)}" if close else "there is no model at all"
        return ModelNotFound(f"no model {name[:200]!r} is served here; {there}", param="model")

    # ---- by command ----------------------------------------------------------------------------------------------

    async def load(self, name: str, overrides: Mapping[str, Any] | None = None) -> ServedModel:
        """Load a model with some settings other than models.yaml's, and make it the current one, unless it generates
        nothing and there is one already. When that fails, all is as before: the same models are loaded, with the same
        settings. A caller that gives up does not stop it.
        """
        loading = self._background(self._load(name, overrides or {}))
        loading.add_done_callback(lambda done: done.cancelled() or done.exception())  # the caller may have given up
        return await asyncio.shield(loading)

    async def _load(self, name: str, overrides: Mapping[str, Any]) -> ServedModel:
        name = self.get(name).name
        async with self._command(name):
            loaded = [each for each in self._models.values() if each.live_worker is not None]
            try:
                while (model := await self._loaded(name, overrides)) is None:
                    logger.info("the settings of %s have changed while it was loaded; it is loaded again", name)
            except BaseException:
                await self._restore(loaded)
                raise
            if self.current is None or await model.task() in GENERATING:
                self._current = name
            return model

    async def _loaded(self, name: str, overrides: Mapping[str, Any]) -> ServedModel | None:
        """Return the model after it is loaded with these settings, or None if models.yaml says otherwise meanwhile."""
        old = self.get(name)
        spec = apply(old.listed, overrides)
        new = old.adapted or _differ(spec, old.spec, but=_LIGHT)
        model = self._served(name, spec, old.listed, overrides) if new else old
        model.forgive()
        await self._bring(model, spec.keep_alive)
        if (now := self._models.get(name)) is not old:
            if new:
                model.retire(now)
            return None
        model.adopt(old.listed, apply(old.listed, overrides), overrides)
        if new:
            model.defaults = dict(old.defaults)
            self._models[name] = model
            old.retire(model)
        return model

    def _command(self, name: str) -> asyncio.Lock:
        return self._commands.setdefault(name, asyncio.Lock())

    async def _bring(self, model: ServedModel, keep_alive: float | None = None) -> None:
        """Have a model loaded, and kept for so long."""
        use = model.use()
        try:
            await use.worker()
            use.keep(keep_alive)
        finally:
            use.leave()

    async def _restore(self, models: Sequence[ServedModel]) -> None:
        """Load those of some models again that had to leave in vain, those unused longest first, so that none of them
        has to leave for another.
        """
        for model in sorted(models, key=lambda each: each.last_used):
            try:
                if model.live_worker is None and self._models.get(model.name) is model and not self._facilities.closing:
                    async with model.in_use():
                        pass
            except LlamaserveError as error:
                logger.warning("%s could not be loaded again: %s", model.name, error.message)

    async def unload(self, name: str | None = None) -> None:
        """Unload a model, or all for None, once what runs there is done. Without a current model, requests must name
        theirs.
        """
        names = list(self._models) if name is None else [self.get(name).name]
        self._coming.difference_update(names)
        if self._current in names:
            self._current = None
        await asyncio.gather(*map(self._unload, names))

    async def _unload(self, name: str) -> None:
        async with self._command(name):  # and after a load that is under way, which may have made it the current one
            if self._current == name:
                self._current = None
            if (model := self._models.get(name)) is not None:
                await model.unload_when_done("requested")

    def stop_all(self) -> None:
        """End all running requests with a normal finish."""
        for model in self._facilities.alive:
            model.stop_all()

    # ---- changes of what is on offer -----------------------------------------------------------------------------

    async def reload(self) -> None:
        """Read models.yaml and models.lock again, and look into the models folder. What has mistakes counts as it did
        before.
        """
        async with self._reloading:
            self.reloads += 1
            problem: RegistryError | None = None
            try:
                self.registry = await asyncio.to_thread(load_registry, self.registry.path)
            except RegistryError as error:
                problem = error
            locked = await asyncio.to_thread(self._read_lock)
            self._reject(problem or locked)
            found = await asyncio.to_thread(self._look_into_folder)
            changed = self._take_over(found)
            self._here = await asyncio.to_thread(self._all_here, list(self._models.values()))
            for model in self._models.values():
                model.retry()
            self._spares.keep = len(self.models) > 1
            if changed:
                logger.info("the list of models has changed: %s", ", ".join(changed))
                self.events.publish("registry_reloaded", changed=changed)

    def reload_soon(self) -> None:
        """Reload in the background."""
        self._background(self.reload())

    def _reject(self, problem: RegistryError | None) -> None:
        """Take note of why models.yaml or models.lock counts as it was before, if it does."""
        if problem is not None and problem.message != self.registry_problem:
            logger.error("models.lock or models.yaml is not reloaded: %s", problem.message)
            self.events.publish("registry_rejected", **problem.body())
        self.registry_problem = None if problem is None else problem.message

    def _take_over(self, found: Sequence[FoundModel]) -> list[str]:
        """Offer what models.yaml, the folder and the command line name now; return the names of what has changed.
        Models whose settings have changed go on with what they are doing, and leave then.
        """
        specs, self._aliases = self._listing(found, self._pulled())
        changed = sorted(self._models.keys() - specs.keys())
        for name in changed:
            self._models.pop(name).retire(None)
        for name, spec in specs.items():
            model = self._models.get(name)
            if model is not None and model.listed == spec:
                continue
            changed.append(name)
            if model is None:
                self._models[name] = self._served(name, spec, spec)
            elif not _differ(model.listed, spec, but=_LIGHT):
                model.adopt(spec, apply(spec, model.overrides), model.overrides)
            else:
                self._models[name] = self._served(name, spec, spec)
                model.retire(self._models[name])
        return changed

    def _listing(
        self, found: Sequence[FoundModel], pulled: Sequence[Source]
    ) -> tuple[dict[str, ModelSpec], dict[str, str]]:
        """Return all models by name, and other names for them. models.yaml wins over the folder, and that over what was
        fetched.
        """
        specs = {**self._named, **self.registry.models}
        aliases = dict(self.registry.aliases)
        for each in found:
            if each.error is None and each.name not in specs and each.name not in aliases:
                specs[each.name] = self.registry.by_defaults(each.source)
        named = {spec.source for spec in specs.values()}
        for source in pulled:
            if str(source) not in named and source.name not in specs and source.name not in aliases:
                specs[source.name] = self.registry.by_defaults(str(source))
        for each in found:
            short = without_ending(each.name)
            if each.name in specs and short not in specs and short not in aliases:
                aliases[short] = each.name
        return specs, {alias: name for alias, name in aliases.items() if name in specs}

    def _look_into_folder(self) -> list[FoundModel]:
        try:
            self._found = scan(self.folder) if self.folder is not None else []
        except RegistryError as error:  # it can't be looked into just now; a disk may be missing for a moment
            logger.warning("%s", error.message)
        return self._found

    def _read_lock(self) -> RegistryError | None:
        """Read which models models.lock has, or return why they are those that it had before."""
        try:
            entries = LockFile.beside(self.registry.path).entries()
        except RegistryError as error:
            return error
        self._locked = [text for text in entries if text.startswith("hf:") and self._may_be_model(text)]
        return None

    def _may_be_model(self, source: str) -> bool:
        path = locate(parse_source(source, self.registry.path.parent))
        return path is None or not is_something_else(path)

    def _pulled(self) -> list[Source]:
        """Return the models that have been fetched without being in models.yaml: sources in models.lock."""
        specs = self.registry.models.values()
        listed = {source for spec in specs for source in (spec.source, *spec.other_sources)}
        base = self.registry.path.parent
        return [parse_source(text, base) for text in self._locked if text not in listed]

    def _all_here(self, models: Sequence[ServedModel]) -> set[str]:
        return {model.name for model in models if model.file.is_here}

    def _served(
        self, name: str, spec: ModelSpec, listed: ModelSpec, overrides: Mapping[str, Any] | None = None
    ) -> ServedModel:
        base = self.registry.path.parent
        return ServedModel(name, spec, base, self._facilities, listed=listed, overrides=overrides)

    # ---- the server's life ---------------------------------------------------------------------------------------

    def start_loading(self) -> None:
        """Begin to load the models that were named at the start, without waiting for it. Errors show when a model is
        used. Those for which there is no room beside the first ones are left until a request wants them.
        """
        self._preloading = self._background(self._preload())
        self._begun.set()

    async def preloaded(self) -> dict[str, LlamaserveError]:
        """Wait until the models that were named at the start are loaded, and return why some are not."""
        await self._begun.wait()
        assert self._preloading is not None
        await asyncio.shield(self._preloading)
        return self._failures

    async def _preload(self) -> None:
        if self._facilities.saved is not None:  # what a server that was killed has left behind
            await asyncio.to_thread(self._facilities.saved.prune)
        for place, name in enumerate(self._named):
            model = self._models.get(name)
            try:
                room = model is not None and (place == 0 or await model.has_room())
                if model is None or name not in self._coming:
                    continue
                if room:
                    await self._bring(model)
                else:
                    logger.warning("there is no room for %s beside the others; it is loaded on demand", name)
            except LlamaserveError as error:
                self._failures[name] = error
        self._spares.keep = len(self.models) > 1

    async def aclose(self) -> None:
        """End all processes; what was evaluated is saved. Before that all running requests end with a normal finish,
        those that wait for a model are refused, and who listens to events hears of it all.
        """
        self._facilities.closing = True
        while self._facilities.alive:
            await asyncio.gather(*(model.wind_up() for model in list(self._facilities.alive)))
        self.events.end()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._spares.aclose()
        if self._fork_server is not None:
            await self._fork_server.aclose()

    def _background(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run work that nobody may cancel, until the pool ends."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _learn_of_hardware(self) -> Sequence[Device]:
        """Learn of GPUs and of how much memory there is, once."""
        if self._devices is None:
            devices = await self._spares.hardware()
            self._facilities.residency.budget = self._budget(devices)
            self._devices = devices
        return self._devices


def _differ(one: ModelSpec, other: ModelSpec, but: frozenset[str]) -> bool:
    return one.model_dump(exclude=set(but)) != other.model_dump(exclude=set(but))
