"""Models for different tasks in one pool: which one answers, what is refused, and a chat model beside an embedder."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from rank_model import RankModel

from llamaserve.engine.events import Finished
from llamaserve.engine.params import Embedding, Footprint, Generation, Sampling
from llamaserve.errors import ModelNotCapable, ModelNotFound, ModelNotLoaded, QueueFull
from llamaserve.registry.pool import ModelPool
from llamaserve.registry.served import MAX_EMBEDDING_REQUESTS
from llamaserve.registry.spec import Task, load_registry
from llamaserve.worker.supervisor import Status

DEFAULTS = "context: 256, parallel: 2, batch: 256, spill: 0, threads: 2"
ROOMY = Footprint(1 << 40)
TEXTS = ("The cat sleeps.", "A kitten naps.", "Shares fell.")


@pytest.fixture
def listed(tmp_path: Path, starter_model: Path, embedding_model: Path) -> Path:
    """A models.yaml with models for all tasks; the judge is for one that its file does not name."""
    RankModel().write(tmp_path / "ranker.gguf")
    path = tmp_path / "models.yaml"
    path.write_text(
        f"defaults: {{{DEFAULTS}}}\nmodels:\n"
        f"  chat: {{source: 'file:{starter_model}'}}\n"
        f"  vectors: {{source: 'file:{embedding_model}'}}\n"
        f"  ranker: {{source: 'file:ranker.gguf', context: 64}}\n"
        f"  judge: {{source: 'file:{starter_model}', task: moderation}}\n"
        "aliases: {ada: vectors}\n"
    )
    return path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def give(path: Path, name: str, field: str) -> None:
    """Give a model one field more."""
    lines = path.read_text().splitlines()
    path.write_text("\n".join(f"{line[:-1]}, {field}}}" if line.startswith(f"  {name}:") else line for line in lines))


def pool_of(path: Path, *named: str, budget: Footprint = ROOMY) -> ModelPool:
    return ModelPool(load_registry(path), named, budget=lambda _devices: budget)


def run(pool: ModelPool, test: Callable[[ModelPool], Awaitable[None]]) -> None:
    async def work() -> None:
        try:
            await test(pool)
        finally:
            await pool.aclose()

    asyncio.run(asyncio.wait_for(work(), 100))


async def embed(pool: ModelPool, name: str = "vectors", texts: Sequence[str] = TEXTS) -> np.ndarray[tuple[int, int]]:
    """Return the vectors of texts as a request does."""
    use = pool.get(name).use()
    try:
        found = await (await use.worker()).embed(list(texts), Embedding())
        use.keep(None)
    finally:
        use.leave()
    return np.frombuffer(found.vectors, "<f4").reshape(len(texts), found.width)


async def say(pool: ModelPool, name: str = "chat") -> str:
    generation = Generation(sampling=Sampling(seed=1, temperature=0.0), max_tokens=8)
    async with pool.get(name).in_use() as worker:
        stream = worker.generate(["Once upon a time"], generation)
        try:
            await stream.accepted()
            (finished,) = [event async for event in stream.events() if isinstance(event, Finished)]
        finally:
            stream.close()
    return finished.reason


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 (what is waited for knows nothing of tests)
            await asyncio.sleep(0.01)


# ---- which one answers -------------------------------------------------------------------------------------------


def test_a_named_model_answers_whatever_it_is_for(listed: Path) -> None:
    async def test(pool: ModelPool) -> None:
        for task in ("embedding", "rerank", "moderation"):
            assert pool.get_for(task, "chat").name == "chat"
            assert pool.get_for(task, "ada").name == "vectors"
            with pytest.raises(ModelNotFound):
                pool.get_for(task, "nobody")

    run(pool_of(listed), test)


@pytest.mark.parametrize(("task", "name"), [("embedding", "vectors"), ("rerank", "ranker"), ("moderation", "judge")])
def test_without_a_name_the_current_model_answers_if_it_is_for_that(listed: Path, task: Task, name: str) -> None:
    async def test(pool: ModelPool) -> None:
        assert pool.get_for(task, None).name == name

    run(pool_of(listed, name), test)


@pytest.mark.parametrize("task", ["embedding", "rerank", "moderation"])
def test_or_else_the_one_that_models_yaml_has_for_it(listed: Path, task: Task) -> None:
    async def none(pool: ModelPool) -> None:
        with pytest.raises(ModelNotLoaded, match=f"models.yaml has no `{task}_model` under `defaults`"):
            pool.get_for(task, None)

    async def chosen(pool: ModelPool) -> None:
        assert pool.get_for(task, None).name == "vectors"

    run(pool_of(listed, "chat"), none)
    edit(listed, "defaults: {", f"defaults: {{{task}_model: ada, ")
    run(pool_of(listed, "chat"), chosen)
    run(pool_of(listed), chosen)


def test_a_default_of_which_the_weights_are_missing_is_not_replaced_by_another(listed: Path) -> None:
    async def test(pool: ModelPool) -> None:
        with pytest.raises(ModelNotFound, match="the weights of absent are not on this machine"):
            pool.get_for("embedding", None)

    edit(listed, "models:\n", "models:\n  absent: {source: 'file:none.gguf', task: embedding}\n")
    edit(listed, "defaults: {", "defaults: {embedding_model: absent, ")
    run(pool_of(listed, "chat"), test)


def test_a_request_for_what_a_model_is_not_there_for_is_refused(listed: Path) -> None:
    async def test(pool: ModelPool) -> None:
        found = {model.name: await model.task() for model in pool.models}
        assert found == {"chat": "generation", "vectors": "embedding", "ranker": "rerank", "judge": "moderation"}
        await pool.get("vectors").require("rerank", "embedding")
        await pool.get("judge").require("moderation", "generation")
        with pytest.raises(ModelNotCapable, match=r"vectors makes embeddings .* needs a model that generates text"):
            await pool.get("vectors").require("generation", "moderation")
        with pytest.raises(ModelNotCapable, match=r"chat generates text; .* needs a model that makes embeddings"):
            await pool.get("chat").require("embedding")
        with pytest.raises(ModelNotCapable, match="needs a model that scores documents"):
            await pool.get("chat").require("rerank", "embedding")
        assert all(model.status is Status.UNLOADED for model in pool.models)

    run(pool_of(listed), test)


def test_a_model_that_is_asked_for_more_than_it_can_is_not_loaded(listed: Path) -> None:
    async def test(pool: ModelPool) -> None:
        with pytest.raises(ModelNotCapable, match=r"it is an encoder; it can't generate text"):
            await embed(pool)

    give(listed, "vectors", "task: generation")
    run(pool_of(listed), test)


# ---- many at once ------------------------------------------------------------------------------------------------


def test_requests_for_vectors_have_a_queue_of_their_own(listed: Path) -> None:
    async def test(pool: ModelPool) -> None:
        model = pool.get("vectors")
        places = [model.embedding_admission.enter(1) for _ in range(MAX_EMBEDDING_REQUESTS)]
        with pytest.raises(QueueFull) as full:
            model.embedding_admission.enter(1)
        assert full.value.retry_after is not None
        model.admission.enter(1).leave()  # nobody who wants text waits behind them
        places.pop().leave()
        model.embedding_admission.enter(1).leave()

    run(pool_of(listed), test)


def test_an_embedder_and_a_chat_model_work_side_by_side(listed: Path) -> None:
    async def test(pool: ModelPool) -> None:
        alone = await embed(pool)
        said, *found = await asyncio.gather(say(pool), *(embed(pool) for _ in range(8)))
        assert said == "length"
        assert {model.name for model in pool.models if model.status is Status.LOADED} == {"chat", "vectors"}
        for vectors in found:
            assert np.allclose(vectors, alone, atol=1e-6)
        likeness = alone @ alone.T
        assert likeness[0, 1] > likeness[0, 2]
        assert np.allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-6)
        for name in ("chat", "vectors"):
            model = pool.get(name)
            assert model.measured is not None
            assert model.plan is not None
            assert model.measured.host == pytest.approx(
                (model.plan.estimate.total - model.plan.estimate.later).host, rel=0.1
            )

    run(pool_of(listed), test)


def test_without_room_for_both_they_take_turns(listed: Path) -> None:
    async def needs(pool: ModelPool) -> None:
        nonlocal most
        for name in ("chat", "vectors"):
            plan = pool.get(name).file.plan((), ROOMY, ())
            most = max(most, plan.need.host)

    async def test(pool: ModelPool) -> None:
        for _ in range(2):
            assert len(await embed(pool)) == len(TEXTS)
            assert await say(pool) == "length"
            assert [model.name for model in pool.models if model.status is Status.LOADED] == ["chat"]

    most = 0
    run(pool_of(listed), needs)
    run(pool_of(listed, budget=Footprint(most + (16 << 20))), test)


# ---- settings and life -------------------------------------------------------------------------------------------


def test_other_prefixes_need_no_new_load_and_another_pooling_does(listed: Path) -> None:
    async def test(pool: ModelPool) -> None:
        before = await embed(pool)
        model = pool.get("vectors")
        process = model.live_worker
        give(listed, "vectors", "prefixes: {query: 'query: '}")
        await pool.reload()
        assert pool.get("vectors") is model
        assert model.spec.prefixes.query == "query: "
        assert model.live_worker is process
        assert np.allclose(await embed(pool), before, atol=1e-6)
        give(listed, "vectors", "pooling: cls")
        await pool.reload()
        assert pool.get("vectors") is not model
        assert not np.allclose(await embed(pool), before)
        assert pool.get("vectors").live_worker is not process

    run(pool_of(listed), test)


def test_a_new_default_counts_at_once(listed: Path) -> None:
    async def test(pool: ModelPool) -> None:
        with pytest.raises(ModelNotLoaded):
            pool.get_for("embedding", None)
        edit(listed, "defaults: {", "defaults: {embedding_model: vectors, ")
        await pool.reload()
        assert pool.get_for("embedding", None).name == "vectors"

    run(pool_of(listed, "chat"), test)


def test_an_embedder_leaves_after_its_time(listed: Path) -> None:
    async def test(pool: ModelPool) -> None:
        await embed(pool)
        assert pool.get("vectors").status is Status.LOADED
        await until(lambda: pool.get("vectors").status is Status.UNLOADED)
        assert len(await embed(pool)) == len(TEXTS)

    give(listed, "vectors", "keep_alive: 0.3")
    run(pool_of(listed), test)
