"""Models that come and go: real ones, copies of the starter under several names, in children of this process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from child_processes import model_processes
from lora_files import random_lora, shapes_of

from llamaserve.engine.events import Finished
from llamaserve.engine.params import Adapter, Footprint, Generation, Sampling
from llamaserve.errors import (
    InsufficientMemory,
    InvalidRequest,
    LlamaserveError,
    ModelError,
    ModelLoadFailed,
    ModelNotFound,
    ModelNotLoaded,
    Unavailable,
)
from llamaserve.registry import hub, served
from llamaserve.registry.gguf import read_header
from llamaserve.registry.load_plan import load_params, plan_load
from llamaserve.registry.lock_file import LockedFile, LockEntry, LockFile
from llamaserve.registry.model_events import ModelEvent
from llamaserve.registry.pool import ModelPool
from llamaserve.registry.saved_prefixes import SavedPrefixes
from llamaserve.registry.spec import load_registry
from llamaserve.registry.watching import watch
from llamaserve.worker.supervisor import Status

DEFAULTS = "context: 256, parallel: 2, batch: 64, spill: 0, threads: 2"
ROOMY = Footprint(1 << 40)


def models_yaml(folder: Path, starter: Path, *names: str, defaults: str = DEFAULTS, fields: str = "") -> Path:
    """Write a models.yaml that offers the starter under several names."""
    lines = [f"  {name}: {{source: 'file:{starter}'{fields}}}" for name in names]
    path = folder / "models.yaml"
    path.write_text(f"defaults: {{{defaults}}}\nmodels:\n" + "\n".join(lines) + "\n")
    return path


def edit(path: Path, *changes: tuple[str, str]) -> None:
    """Replace some text in a file."""
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


def need_of(starter: Path, models: Path) -> Footprint:
    """Return what the first model of a models.yaml takes."""
    spec = next(iter(load_registry(models).models.values()))
    header = read_header(starter)
    return plan_load("x", header, load_params(spec, header), ROOMY, 0).need


class House:
    """A pool, its events, and the ways of a request."""

    def __init__(self, pool: ModelPool) -> None:
        self.pool = pool
        self.events: list[ModelEvent] = []

    async def say(
        self, name: str | None, prompt: str = "Once upon a time", tokens: int = 4, keep_alive: float | None = None
    ) -> Finished:
        """Generate a few tokens as a request does."""
        generation = Generation(sampling=Sampling(seed=1, temperature=0.0), max_tokens=tokens)
        use = self.pool.get(name).use()
        try:
            stream = (await use.worker()).generate([prompt], generation)
            try:
                await stream.accepted()
                use.keep(keep_alive)
                (finished,) = [event async for event in stream.events() if isinstance(event, Finished)]
            finally:
                stream.close()
            return finished
        finally:
            use.leave()

    @property
    def loaded(self) -> set[str]:
        return {model.name for model in self.pool.models if model.status is Status.LOADED}

    def kinds(self, model: str) -> list[str]:
        """Return what happened to a model, progress left out."""
        return [event.kind for event in self.events if event.model == model and event.kind != "load_progress"]


@asynccontextmanager
async def _house(pool: ModelPool) -> AsyncIterator[House]:
    house = House(pool)

    async def listen() -> None:
        with pool.events.subscribe() as events:
            async for event in events:
                house.events.append(event)

    listening = asyncio.create_task(listen())
    await asyncio.sleep(0)
    try:
        yield house
    finally:
        await pool.aclose()
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)


async def until(condition: Callable[[], bool], limit: float = 30.0) -> None:
    """Return as soon as the condition holds; fail when it does not in time."""
    async with asyncio.timeout(limit):
        while not condition():  # noqa: ASYNC110 (what is waited for knows nothing of tests)
            await asyncio.sleep(0.01)


def run(pool: Callable[[], ModelPool], test: Callable[[House], Awaitable[None]], limit: float = 110) -> None:
    async def work() -> None:
        async with _house(pool()) as house:
            await test(house)

    asyncio.run(asyncio.wait_for(work(), limit))


def pool_of(models: Path, budget: Footprint = ROOMY, *references: str, **options: object) -> Callable[[], ModelPool]:
    return lambda: ModelPool(load_registry(models), references, budget=lambda _: budget, **options)  # type: ignore[arg-type]


def times(need: Footprint, count: float) -> Footprint:
    return Footprint(int(need.host * count), int(need.device * count))


@pytest.fixture
def three(tmp_path: Path, starter_model: Path) -> Path:
    return models_yaml(tmp_path, starter_model, "a", "b", "c")


def test_three_models_take_turns_under_a_budget_for_two(three: Path, starter_model: Path) -> None:
    async def test(house: House) -> None:
        for name, loaded in [("a", "a"), ("b", "ab"), ("c", "bc"), ("a", "ac"), ("c", "ac"), ("b", "bc")]:
            answer = await house.say(name)
            assert answer.completion_tokens == 4
            assert house.loaded == set(loaded)
            assert house.pool.claimed.fits(house.pool.budget)
        await asyncio.sleep(0)
        assert house.kinds("a") == ["loading", "loaded", "unloading", "unloaded"] * 2
        assert {e.data["reason"] for e in house.events if e.kind == "unloaded"} == {"evicted"}

    run(pool_of(three, times(need_of(starter_model, three), 2.2)), test)


def test_twenty_requests_for_a_cold_model_load_it_once(three: Path) -> None:
    async def test(house: House) -> None:
        answers = await asyncio.gather(*(house.say("b") for _ in range(20)))
        assert len({answer.text for answer in answers}) == 1
        assert house.kinds("b") == ["loading", "loaded"]

    run(pool_of(three), test)


def test_loading_is_reported_as_it_goes(three: Path) -> None:
    async def test(house: House) -> None:
        await house.say("a")
        await asyncio.sleep(0)
        (*_, last) = (event.data["percent"] for event in house.events if event.kind == "load_progress")
        assert last == 100
        (loaded,) = [event.data for event in house.events if event.kind == "loaded"]
        assert loaded["seconds"] > 0

    run(pool_of(three), test)


def test_a_model_that_answers_is_waited_for(three: Path, starter_model: Path) -> None:
    async def test(house: House) -> None:
        await house.say("a", tokens=1)
        long = asyncio.create_task(house.say("a", tokens=200))
        await asyncio.sleep(0.1)
        other = asyncio.create_task(house.say("b"))
        await until(lambda: house.pool.get("b").waits_for_room)
        late = asyncio.create_task(house.say("a"))
        assert (await long).completion_tokens == 200
        await asyncio.gather(other, late)
        assert house.loaded == {"a"}
        assert house.kinds("b").count("loaded") == 1

    run(pool_of(three, times(need_of(starter_model, three), 1.5)), test)


def test_at_hand_is_what_needs_nobody_to_leave(three: Path, starter_model: Path) -> None:
    async def test(house: House) -> None:
        one, two, other = (house.pool.get(name) for name in ("a", "b", "c"))
        assert await one.is_at_hand()
        await house.say("a", keep_alive=0)
        assert one.leaving
        assert await one.is_at_hand()  # there is room for it once it has left
        use = one.use()
        loading = asyncio.create_task(use.worker())
        await until(lambda: one.status is Status.LOADING and not one.waits_for_room)
        assert await one.is_at_hand()
        await loading
        assert not await two.is_at_hand()
        waiting = asyncio.create_task(house.say("c"))
        await until(lambda: other.waits_for_room)
        assert [await each.is_at_hand() for each in (one, two, other)] == [False] * 3
        use.leave()
        await waiting
        assert [await each.is_at_hand() for each in (one, two, other)] == [False, False, True]
        await other.unload("test")
        held = two.use()
        await held.worker()
        leaving = asyncio.create_task(two.unload_when_done("test"))
        await asyncio.sleep(0)
        assert not await two.is_at_hand()
        held.leave()
        await leaving

    run(pool_of(three, times(need_of(starter_model, three), 1.5)), test)


def test_a_model_that_need_not_make_room_is_at_hand_while_another_waits(three: Path, starter_model: Path) -> None:
    async def test(house: House) -> None:
        uses = [house.pool.get(name).use() for name in ("a", "b")]
        for use in uses:
            await use.worker()
        uses[0].leave()
        uses.append(house.pool.get("a").use())
        await uses[-1].worker()  # so that b is the one used longest ago
        waiting = asyncio.create_task(house.say("c"))
        await until(lambda: house.pool.get("c").waits_for_room)
        assert [await house.pool.get(name).is_at_hand() for name in ("a", "b", "c")] == [True, False, False]
        for use in uses:
            use.leave()
        await waiting

    run(pool_of(three, times(need_of(starter_model, three), 2.5)), test)


def test_a_model_that_can_never_fit_is_refused_with_numbers_and_disturbs_nobody(
    tmp_path: Path, starter_model: Path
) -> None:
    path = models_yaml(tmp_path, starter_model, "small")
    big = f"  big: {{source: 'file:{starter_model}', context: 8192, parallel: 8, kv_cells: 65536}}\n"
    path.write_text(path.read_text() + big)

    async def test(house: House) -> None:
        await house.say("small")
        with pytest.raises(InsufficientMemory, match=r"big .*context") as refusal:
            await house.say("big")
        assert refusal.value.status == 507
        assert house.loaded == {"small"}
        with pytest.raises(InsufficientMemory):
            await house.pool.load("small", {"context": 8192, "kv_cells": 65536})
        assert house.loaded == {"small"}
        assert house.pool.get("small").context == 256

    run(pool_of(path, times(need_of(starter_model, path), 1.5)), test)


def test_idle_models_are_unloaded_after_their_time_and_requests_can_say_another(
    tmp_path: Path, starter_model: Path
) -> None:
    path = models_yaml(tmp_path, starter_model, "a", "b", fields=", keep_alive: 1.0")

    async def test(house: House) -> None:
        await house.say("b", keep_alive=-1)
        await house.say("a")
        assert house.loaded == {"a", "b"}
        await until(lambda: house.kinds("a")[-1] == "unloaded")
        assert house.loaded == {"b"}
        await house.say("b", keep_alive=0)
        await until(lambda: house.kinds("b")[-1] == "unloaded")
        reasons = [event.data["reason"] for event in house.events if event.kind == "unloaded"]
        assert reasons == ["idle", "idle"]

    run(pool_of(path), test)


def test_who_gives_up_does_not_stop_the_load_of_others(three: Path) -> None:
    async def test(house: House) -> None:
        first = asyncio.create_task(house.say("a"))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(house.say("a"))
        await asyncio.sleep(0.05)
        first.cancel()
        assert (await second).completion_tokens == 4
        assert house.kinds("a") == ["loading", "loaded"]

    run(pool_of(three), test)


def test_load_takes_settings_and_a_failed_one_leaves_all_as_it_was(three: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"

    async def test(house: House) -> None:
        pool = house.pool
        assert pool.current is None
        with pytest.raises(ModelNotLoaded):
            pool.get(None)
        model = await pool.load("a", {"context": 128})
        assert pool.current is model
        assert model.load_params().context == 128
        before = (await house.say(None)).text
        with pytest.raises(InvalidRequest):
            await pool.load("a", {"context": 1})
        with pytest.raises(ModelNotFound):
            await pool.load("nothing")
        with pytest.raises(LlamaserveError):
            await pool.load("broken")
        with pytest.raises(ModelLoadFailed):  # llama.cpp itself refuses
            await pool.load(
                "a",
                {
                    "value_type": "q4_0",
                    "flash_attention": "auto",
                    "key_type": "iq4_nl",
                    "batch": 64,
                    "tensor_split": tuple([1.0] * 16),
                },
            )
        assert pool.current is model
        assert house.loaded == {"a"}
        assert model.load_params().context == 128
        assert (await house.say(None)).text == before

    broken.write_bytes(b"GGUF" + bytes(100))
    three.write_text(three.read_text() + f"  broken: {{source: 'file:{broken}'}}\n")
    run(pool_of(three), test)


def test_loading_with_other_settings_disturbs_no_running_answer(three: Path) -> None:
    async def test(house: House) -> None:
        await house.pool.load("a")
        plain = (await house.say("a", tokens=100)).text
        running = asyncio.create_task(house.say("a", tokens=100))
        await asyncio.sleep(0.05)
        model = await house.pool.load("a", {"parallel": 1})
        assert model.load_params().parallel == 1
        assert (await running).text == plain
        assert house.pool.get(None) is model

    run(pool_of(three), test)


def test_unload_waits_for_answers_and_then_nothing_is_current(three: Path) -> None:
    async def test(house: House) -> None:
        await house.pool.load("a")
        await house.say("b")
        running = asyncio.create_task(house.say("a", tokens=100))
        await asyncio.sleep(0.05)
        await house.pool.unload()
        assert (await running).completion_tokens == 100
        assert house.loaded == set()
        assert house.pool.current is None
        await house.pool.unload()
        assert (await house.say("a")).completion_tokens == 4  # by name it comes back

    run(pool_of(three), test)


def test_a_crash_gives_its_memory_back(three: Path, starter_model: Path) -> None:
    async def test(house: House) -> None:
        await house.say("a")
        worker = house.pool.get("a").live_worker
        assert worker is not None
        os.kill(worker.pid, signal.SIGKILL)
        await worker.ended.wait()
        await house.say("b")
        await house.say("c")
        assert house.loaded == {"b", "c"}
        assert house.kinds("a")[-1] == "crashed"

    run(pool_of(three, times(need_of(starter_model, three), 2.2)), test)


def test_an_edited_models_yaml_is_taken_over_and_no_stream_is_disturbed(three: Path, starter_model: Path) -> None:
    async def test(house: House) -> None:
        plain = (await house.say("a", tokens=150)).text
        running = asyncio.create_task(house.say("a", tokens=150))
        await asyncio.sleep(0.05)
        old = house.pool.get("a")
        edit(three, ("context: 256", "context: 200"), ("  b: ", "  d: "))
        await house.pool.reload()
        assert house.pool.get("a") is not old
        assert house.pool.get("a").context == 200
        assert (await running).text == plain
        with pytest.raises(ModelNotFound):
            house.pool.get("b")
        assert (await house.say("d")).completion_tokens == 4
        (changed,) = [event.data["changed"] for event in house.events if event.kind == "registry_reloaded"]
        assert set(changed) == {"a", "b", "c", "d"}

    run(pool_of(three), test)


def test_a_broken_edit_changes_nothing_and_says_so(three: Path) -> None:
    async def test(house: House) -> None:
        await house.say("a")
        edit(three, ("models:\n", "models:\n  x: {surce: nothing}\n"))
        await house.pool.reload()
        await asyncio.sleep(0)
        assert house.pool.registry_problem is not None
        assert "surce" in house.pool.registry_problem
        assert house.kinds("a") == ["loading", "loaded"]
        assert [event.kind for event in house.events if event.model is None] == ["registry_rejected"]
        edit(three, ("  x: {surce: nothing}\n", ""))
        await house.pool.reload()
        assert house.pool.registry_problem is None
        assert house.loaded == {"a"}

    run(pool_of(three), test)


def test_a_broken_models_lock_changes_nothing_and_says_so(
    three: Path, starter_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither to a model that was fetched by its source, which goes on running, nor to the list of others."""
    source = "hf:someone/tiny-GGUF/tiny-Q4_1.gguf"
    lock = LockFile.beside(three)
    lock.put(source, LockEntry((LockedFile("tiny-Q4_1.gguf", starter_model.stat().st_size, "0" * 64),), "0" * 40))
    monkeypatch.setattr(hub, "cached_file", lambda source: starter_model)

    async def test(house: House) -> None:
        await house.say("tiny-Q4_1")
        whole = lock.path.read_text()
        lock.path.write_text(whole + "<<<<<<< ours")
        await house.pool.reload()
        await asyncio.sleep(0)
        assert house.loaded == {"tiny-Q4_1"}
        assert house.pool.registry_problem is not None
        assert "models.lock" in house.pool.registry_problem
        assert [event.kind for event in house.events if event.model is None] == ["registry_rejected"]
        lock.path.write_text(whole)
        await house.pool.reload()
        assert house.pool.registry_problem is None
        assert house.kinds("tiny-Q4_1") == ["loading", "loaded"]

    run(pool_of(three), test)


def test_an_adapter_that_was_fetched_is_no_model(
    three: Path, starter_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "hf:someone/style-lora/style-F16.gguf"
    lock = LockFile.beside(three)
    lock.put(source, LockEntry((LockedFile("style-F16.gguf", 5, "0" * 64),), "0" * 40))
    assert "style-F16" in pool_of(three)()._models
    models_yaml(three.parent, starter_model, "a", fields=f", lora: [{{source: '{source}'}}]")
    assert set(pool_of(three)()._models) == {"a"}
    models_yaml(three.parent, starter_model, "a")  # has it no more; the file says itself what it is
    lora = Path(adapter(starter_model, tmp_path, "style").path)
    monkeypatch.setattr(hub, "cached_file", lambda source: lora)
    assert set(pool_of(three)()._models) == {"a"}


def test_what_matters_to_requests_only_needs_no_new_load(three: Path) -> None:
    async def test(house: House) -> None:
        await house.say("a")
        model = house.pool.get("a")
        edit(three, ("threads: 2", "threads: 2, keep_alive: 5m, queue: 7"))
        await house.pool.reload()
        assert house.pool.get("a") is model
        assert model.spec.keep_alive == 300
        assert house.loaded == {"a"}

    run(pool_of(three), test)


def adapter(starter: Path, folder: Path, name: str, rank: int = 2) -> Adapter:
    """Return a LoRA adapter for the starter: a quarter of a megabyte for each of its rank."""
    shapes = shapes_of(read_header(starter).tensors, "ffn_down.weight")
    lora = random_lora(shapes, rank=rank, seed=len(name), size=2.0, alpha=float(rank))
    return Adapter(name, str(lora.write(folder / f"{name}.gguf")))


def test_adapters_by_command_are_planned_for_like_those_of_the_settings(
    three: Path, starter_model: Path, tmp_path: Path
) -> None:
    one, two, small = (
        adapter(starter_model, tmp_path, name, rank) for name, rank in (("one", 200), ("two", 200), ("s", 2))
    )
    size = Path(one.path).stat().st_size
    need = need_of(starter_model, three)
    budget = need + Footprint(int(1.5 * size))

    async def test(house: House) -> None:
        await house.say("a")
        model, before = house.pool.get("a"), house.pool.claimed
        with pytest.raises(InsufficientMemory):
            await model.set_adapters([one, two])
        assert (model.adapters, house.pool.claimed) == ((), before)
        await model.set_adapters([one])
        assert model.load_params().adapters == (one,)
        assert size < (house.pool.claimed - before).host < 1.2 * size
        await house.say("a")
        await model.set_adapters([small])
        assert (house.pool.claimed - before).host < 0.1 * size
        assert house.kinds("a") == ["loading", "loaded"]

    run(pool_of(three, budget), test)


def test_adapters_by_command_make_idle_models_leave_and_no_others(
    three: Path, starter_model: Path, tmp_path: Path
) -> None:
    big = adapter(starter_model, tmp_path, "big", 200)
    budget = times(need_of(starter_model, three), 2) + Footprint(Path(big.path).stat().st_size // 2)

    async def test(house: House) -> None:
        await house.say("a")
        await house.say("b")
        model = house.pool.get("b")
        async with house.pool.get("a").in_use():
            with pytest.raises(Unavailable, match="no room for these LoRA adapters of b"):
                await model.set_adapters([big])
            assert house.pool.claimed.fits(budget)
        assert (house.loaded, model.adapters) == ({"a", "b"}, ())
        await model.set_adapters([big])
        assert (house.loaded, model.adapters) == ({"b"}, (big,))

    run(pool_of(three, budget), test)


def test_of_adapters_set_around_the_end_of_a_load_the_last_ones_are_there(
    three: Path, starter_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (adapter(starter_model, tmp_path, name) for name in ("one", "second"))
    before = served.record

    def slow_record(*arguments: Any) -> None:
        time.sleep(0.2)
        before(*arguments)

    monkeypatch.setattr(served, "record", slow_record)

    async def test(house: House) -> None:
        model = house.pool.get("a")
        use = model.use()
        loading = asyncio.create_task(use.worker())
        await until(lambda: model.plan is not None)
        setting = [asyncio.create_task(model.set_adapters([one]))]
        await until(lambda: model.live_worker is not None)
        setting.append(asyncio.create_task(model.set_adapters([two])))
        worker = await loading
        await asyncio.gather(*setting)
        assert model.adapters == model.load_params().adapters == (two,)
        for name, there in (("one", False), ("second", True)):
            generation = Generation(sampling=Sampling(seed=1), max_tokens=1, adapters=((name, 1.0),))
            stream = worker.generate(["Once"], generation)
            with contextlib.nullcontext() if there else pytest.raises(InvalidRequest, match="no LoRA adapter 'one'"):
                await stream.accepted()
            stream.close()
        use.leave()

    run(pool_of(three), test)


def test_a_load_by_command_goes_back_to_the_adapters_of_the_settings(
    three: Path, starter_model: Path, tmp_path: Path
) -> None:
    given = adapter(starter_model, tmp_path, "given")

    async def test(house: House) -> None:
        await house.pool.load("a")
        await house.pool.get("a").set_adapters([given])
        await asyncio.to_thread(Path(given.path).write_text, "damaged")
        await house.pool.unload()
        with pytest.raises(ModelError):
            await house.say("a")
        with pytest.raises(InsufficientMemory):
            await house.pool.load("a", {"kv_cells": 1 << 28})
        assert house.pool.get("a").adapters == (given,), "a failed load leaves all as it was"
        await house.pool.load("a")
        assert house.pool.get("a").adapters == ()
        assert (await house.say("a")).completion_tokens == 4

    run(pool_of(three), test)


def test_files_of_the_models_folder_are_served_by_their_names(tmp_path: Path, starter_model: Path) -> None:
    models = models_yaml(tmp_path, starter_model, "a")
    folder = tmp_path / "models"
    (folder / "sub").mkdir(parents=True)
    shutil.copy(starter_model, folder / "one.gguf")

    async def test(house: House) -> None:
        assert {model.name for model in house.pool.models} == {"a", "one.gguf"}
        assert (await house.say("one")).completion_tokens == 4
        (folder / "sub" / "two.gguf").hardlink_to(folder / "one.gguf")
        await house.pool.reload()
        assert (await house.say("sub/two.gguf")).completion_tokens == 4
        (folder / "one.gguf").unlink()
        await house.pool.reload()
        with pytest.raises(ModelNotFound):
            house.pool.get("one")

    run(pool_of(models, ROOMY, folder=folder), test)


def test_a_file_that_another_reload_found_while_the_watcher_reloaded_does_not_stay(
    tmp_path: Path, starter_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = models_yaml(tmp_path, starter_model, "a")
    folder = tmp_path / "models"
    folder.mkdir()

    async def test(house: House) -> None:
        plain = house.pool.reload

        async def reload() -> None:
            monkeypatch.setattr(house.pool, "reload", plain)
            await plain()
            short = folder / "short.gguf"
            short.symlink_to(starter_model)
            await plain()
            assert "short.gguf" in [model.name for model in house.pool.models]
            short.unlink()

        monkeypatch.setattr(house.pool, "reload", reload)
        watching = asyncio.create_task(watch(house.pool, interval=0.02))
        await asyncio.sleep(0.1)
        (folder / "long.gguf").symlink_to(starter_model)
        await until(lambda: [model.name for model in house.pool.models] == ["a", "long.gguf"], 10)
        watching.cancel()

    run(pool_of(models, ROOMY, folder=folder), test)


def test_a_conversation_is_not_evaluated_again_after_a_swap(three: Path, starter_model: Path, tmp_path: Path) -> None:
    prompt = "word " * 200
    saved = SavedPrefixes(tmp_path / "prefixes", 1 << 30)

    async def test(house: House) -> None:
        first = await house.say("a", prompt)
        assert first.cached_tokens == 0
        await house.say("b")
        assert house.loaded == {"b"}
        again = await house.say("a", prompt)
        assert again.cached_tokens >= 190
        assert again.text == first.text

    edit(three, ("spill: 0, ", ""))
    run(pool_of(three, times(need_of(starter_model, three), 1.5), saved=saved), test)


def test_the_first_named_model_is_current_and_all_that_fit_are_loaded(three: Path, starter_model: Path) -> None:
    async def test(house: House) -> None:
        house.pool.start_loading()
        assert await house.pool.preloaded() == {}
        assert house.loaded == {"b", "a"}
        assert house.pool.current is house.pool.get("b")
        assert (await house.say("c")).completion_tokens == 4

    run(pool_of(three, times(need_of(starter_model, three), 2.2), "b", "a", "c"), test)


def test_automatic_spill_throws_nobody_out(tmp_path: Path, starter_model: Path) -> None:
    models = models_yaml(tmp_path, starter_model, "a", "b", defaults="context: 2048, parallel: 2, batch: 64")
    need = need_of(starter_model, models)

    async def test(house: House) -> None:
        for name in "abab":
            await house.say(name)
            assert house.pool.claimed.fits(house.pool.budget)
        assert house.loaded == {"a", "b"}
        assert house.kinds("a") == ["loading", "loaded"]

    run(pool_of(models, times(need, 2.2)), test)


def test_the_end_during_a_load_leaves_no_process(three: Path, starter_model: Path) -> None:
    async def test(house: House) -> None:
        await house.say("a")
        await house.say("b")
        loading = asyncio.create_task(house.pool.load("a", {"parallel": 1}))
        await asyncio.sleep(0.05)
        await house.pool.aclose()
        with pytest.raises((LlamaserveError, asyncio.CancelledError)):
            await loading
        assert model_processes() == set()

    run(pool_of(three), test)


def test_the_end_during_the_pause_after_crashes_leaves_nobody_waiting_and_no_process(three: Path) -> None:
    async def test(house: House) -> None:
        for _ in range(2):
            await house.say("a")
            worker = house.pool.get("a").live_worker
            assert worker is not None
            os.kill(worker.pid, signal.SIGKILL)
            await worker.ended.wait()
        waiting = asyncio.create_task(house.say("a"))
        await until(lambda: house.pool.get("a").status is Status.LOADING)
        await house.pool.aclose()
        assert house.pool.get("a").status is Status.UNLOADED
        with pytest.raises(Unavailable):
            await waiting
        with pytest.raises(Unavailable, match="shut down"):
            await house.say("a")
        assert model_processes() == set()

    run(pool_of(three), test)


def test_the_end_finishes_answers_and_does_not_wait_for_ever_for_a_use(
    three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamaserve.registry.served._ANSWERS_LIMIT", 1.0)

    async def test(house: House) -> None:
        use = house.pool.get("b").use()
        worker = await use.worker()
        saying = asyncio.create_task(house.say("a", tokens=200))
        await until(lambda: house.pool.occupancy.running == 1)
        await house.pool.aclose()
        assert (await saying).reason == "stop"
        assert worker.ended.is_set()
        assert model_processes() == set()
        use.leave()

    run(pool_of(three), test)


def test_who_waits_for_a_replaced_model_gets_the_new_one(three: Path, starter_model: Path) -> None:
    async def test(house: House) -> None:
        await house.say("a")
        old = house.pool.get("a")
        use = old.use()
        await house.pool.load("a", {"parallel": 1})
        await until(lambda: old.live_worker is None or not old.busy)
        worker = await use.worker()
        assert worker is house.pool.get("a").live_worker or old.live_worker is worker
        use.leave()
        await until(lambda: old.live_worker is None)
        assert house.loaded == {"a"}

    run(pool_of(three), test)


def test_a_short_stay_that_one_request_wants_is_not_that_of_the_next(three: Path) -> None:
    async def test(house: House) -> None:
        await house.say("a", keep_alive=0)
        await until(lambda: house.loaded == set())
        async with house.pool.get("a").in_use():
            pass
        await asyncio.sleep(0.2)
        assert house.loaded == {"a"}

    run(pool_of(three), test)


@pytest.mark.timeout(300)
def test_the_budget_holds_whatever_comes(tmp_path: Path, starter_model: Path) -> None:
    """Five hundred steps of loads, unloads and answers with three copies of the model, in memory for two."""
    dice = random.Random(6)
    models = models_yaml(tmp_path, starter_model, "a", "b", "c", defaults=DEFAULTS.replace("spill: 0, ", ""))
    need = need_of(starter_model, models)
    budget = times(need, 2.4)

    def resident(house: House) -> int:
        total = 0
        for model in house.pool.models:
            worker = model.live_worker
            if worker is not None:
                with contextlib.suppress(psutil.NoSuchProcess):  # one that is being unloaded ends at any moment
                    total += psutil.Process(worker.pid).memory_info().rss
        return total

    async def test(house: House) -> None:
        served = 0
        open_answers: set[asyncio.Task[Finished]] = set()
        name = "a"
        for _ in range(500):
            name = dice.choice("abc") if dice.random() < 0.2 else name  # most clients stay with a model for a while
            step = dice.random()
            if step < 0.9:
                open_answers.add(
                    asyncio.create_task(house.say(name, "word " * dice.randint(1, 120), dice.randint(1, 8)))
                )
            elif step < 0.95:
                await house.pool.load(name)
            elif step < 0.985:
                await house.pool.unload(name)
            else:
                await house.pool.unload()
            while len(open_answers) > dice.randint(0, 4):
                done, open_answers = await asyncio.wait(open_answers, return_when=asyncio.FIRST_COMPLETED)
                served += sum(answer.result().completion_tokens > 0 for answer in done)
            assert house.pool.claimed.fits(budget)
            assert resident(house) <= budget.host
        await asyncio.gather(*open_answers)
        assert served > 300

    run(pool_of(models, budget), test, limit=290)


def test_gone_models_are_forgotten(three: Path) -> None:
    async def test(house: House) -> None:
        await house.say("a")
        edit(three, ("  a: ", "  z: "))
        await house.pool.reload()
        await until(lambda: house.kinds("a")[-1] == "unloaded")
        assert house.pool.claimed == Footprint()

    run(pool_of(three), test)


# ---- commands and requests that meet -----------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [{}, {"parallel": 1}])
@pytest.mark.parametrize("loaded_before", [False, True])
def test_an_unload_during_a_load_by_command_comes_after_it(
    three: Path, overrides: dict[str, int], loaded_before: bool
) -> None:
    async def test(house: House) -> None:
        if loaded_before:
            await house.pool.load("b")
        loading = asyncio.create_task(house.pool.load("b", overrides))
        await asyncio.sleep(0.1)
        await asyncio.gather(house.pool.unload("b"), loading)
        assert house.loaded == set()
        assert house.pool.current is None

    run(pool_of(three), test)


def test_an_unload_of_all_at_the_start_is_the_end_of_the_start(three: Path) -> None:
    async def test(house: House) -> None:
        house.pool.start_loading()
        await until(lambda: "loading" in house.kinds("a"))
        await house.pool.unload()
        assert await house.pool.preloaded() == {}
        assert house.loaded == set()
        assert house.pool.current is None
        assert house.kinds("b") == []

    run(pool_of(three, ROOMY, "a", "b"), test)


def test_requests_go_over_to_a_model_that_is_loaded_with_other_settings(three: Path, starter_model: Path) -> None:
    """There is room for one of both, so those that come while the new one is loaded wait for room for the old one."""

    async def test(house: House) -> None:
        await house.pool.load("a")
        over = False

        async def client() -> None:
            while not over:
                await house.say("a", tokens=3)
                await asyncio.sleep(0.02)

        clients = [asyncio.create_task(client()) for _ in range(3)]
        await asyncio.sleep(0.2)
        await house.pool.load("a", {"parallel": 1})
        await asyncio.sleep(1)
        over = True
        await asyncio.gather(*clients)
        assert house.kinds("a").count("loaded") == 2
        assert "load_failed" not in house.kinds("a")
        current = house.pool.current
        assert current is not None
        assert current.load_params().parallel == 1
        assert current.status is Status.LOADED

    run(pool_of(three, times(need_of(starter_model, three), 1.5)), test)


def test_how_long_a_model_is_kept_holds_for_requests_that_waited_for_it(three: Path, starter_model: Path) -> None:
    async def test(house: House) -> None:
        await house.say("a")
        unloading = asyncio.create_task(house.pool.unload("a"))
        await asyncio.sleep(0)
        await house.say("a", keep_alive=0)
        await unloading
        await until(lambda: house.loaded == set())
        await house.say("b")
        await house.say("a", keep_alive=0)
        await until(lambda: house.loaded == set())

    run(pool_of(three, times(need_of(starter_model, three), 1.5)), test)


def test_a_request_that_fails_does_not_say_how_long_a_model_is_kept(three: Path) -> None:
    async def test(house: House) -> None:
        await house.say("a")
        with pytest.raises(InvalidRequest):
            await house.say("a", "word " * 1000, keep_alive=0)
        await asyncio.sleep(0.1)
        assert house.loaded == {"a"}

    run(pool_of(three), test)


@pytest.mark.parametrize("overrides", [{}, {"parallel": 1}])
def test_an_edit_of_what_matters_to_requests_during_a_load_is_not_lost(three: Path, overrides: dict[str, int]) -> None:
    async def test(house: House) -> None:
        if overrides:
            await house.pool.load("a")
        loading = asyncio.create_task(house.pool.load("a", overrides))
        await asyncio.sleep(0.05)
        edit(three, ("a: {", "a: {queue: 7, keep_alive: 33, "))
        await house.pool.reload()
        model = await loading
        for _ in range(2):
            assert (model.spec.queue, model.spec.keep_alive) == (7, 33)
            assert model.spec.parallel == overrides.get("parallel", 2)
            assert house.pool.get("a") is model
            await house.pool.reload()

    run(pool_of(three), test)


@pytest.mark.parametrize("overrides", [{}, {"parallel": 1}])
def test_an_edit_of_how_it_is_loaded_during_a_load_is_followed(three: Path, overrides: dict[str, int]) -> None:
    async def test(house: House) -> None:
        loading = asyncio.create_task(house.pool.load("a", overrides))
        await until(lambda: "loading" in house.kinds("a"))
        edit(three, ("context: 256", "context: 512"))
        await house.pool.reload()
        model = await loading
        assert house.pool.current is house.pool.get("a") is model
        assert model.status is Status.LOADED
        assert model.load_params().context == 512
        assert model.spec.parallel == overrides.get("parallel", 2)
        await until(lambda: house.kinds("a").count("loaded") - house.kinds("a").count("unloaded") == 1)

    run(pool_of(three), test)


def test_a_model_that_is_taken_off_during_its_load_is_not_found_and_others_are_as_before(
    three: Path, starter_model: Path
) -> None:
    async def test(house: House) -> None:
        await house.say("b")
        loading = asyncio.create_task(house.pool.load("a"))
        await until(lambda: "loading" in house.kinds("a"))
        edit(three, (f"  a: {{source: 'file:{starter_model}'}}\n", ""))
        await house.pool.reload()
        with pytest.raises(ModelNotFound):
            await loading
        await until(lambda: house.kinds("a").count("unloaded") == 1)
        assert house.loaded == {"b"}

    run(pool_of(three, times(need_of(starter_model, three), 1.5)), test)


def test_which_process_was_unloaded_is_told(three: Path) -> None:
    async def test(house: House) -> None:
        await house.pool.load("a")
        await house.pool.load("a", {"parallel": 1})
        await until(lambda: house.kinds("a").count("unloaded") == 1)
        first, second = [event.data["pid"] for event in house.events if event.kind == "loaded"]
        assert first != second
        assert [event.data["pid"] for event in house.events if event.kind in ("unloading", "unloaded")] == [first] * 2

    run(pool_of(three), test)


def test_the_adapters_of_the_settings_given_by_command_are_no_others(three: Path) -> None:
    async def test(house: House) -> None:
        model = house.pool.get("a")
        await model.set_adapters([])
        assert not model.adapted
        assert await house.pool.load("a") is model
        assert house.kinds("a") == ["loading", "loaded"]

    run(pool_of(three), test)


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_children_are_forked_where_that_is_safe_and_programs_elsewhere(three: Path, platform: str) -> None:
    def pool() -> ModelPool:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(sys, "platform", platform)
            return pool_of(three)()

    async def test(house: House) -> None:
        await house.say("a")
        worker = house.pool.get("a").live_worker
        assert worker is not None
        assert ("llamaserve.worker.host" in psutil.Process(worker.pid).cmdline()) == (platform == "darwin")

    run(pool, test)
