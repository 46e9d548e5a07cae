"""How requests for vectors and scores hold a model: what waits there is counted by the size of its texts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from rank_model import RankModel

from llamaserve.api.vectors import embed, in_use, place_for, rank
from llamaserve.engine.events import Embedded
from llamaserve.engine.params import Embedding, Footprint
from llamaserve.errors import QueueFull, TimeLimitExceeded
from llamaserve.registry.pool import ModelPool
from llamaserve.registry.served import MAX_EMBEDDING_TEXT, ServedModel
from llamaserve.registry.spec import load_registry

Work = Callable[[ServedModel, str], Awaitable[Embedded]]


@pytest.fixture
def listed(tmp_path: Path, embedding_model: Path) -> Path:
    """A models.yaml with a model for vectors and one for scores."""
    RankModel().write(tmp_path / "ranker.gguf")
    path = tmp_path / "models.yaml"
    path.write_text(
        f"models:\n  vectors: {{source: 'file:{embedding_model}'}}\n  ranker: {{source: 'file:ranker.gguf'}}\n"
    )
    return path


async def _embed(model: ServedModel, text: str) -> Embedded:
    return await embed(model, [text], Embedding(truncate="end"))


async def _embed_ids(model: ServedModel, text: str) -> Embedded:
    return await embed(model, [[7592] * (1 + len(text) // 8)], Embedding(truncate="end"))


async def _rank(model: ServedModel, text: str) -> Embedded:
    return await rank(model, "x", [text], truncate=True)


@pytest.mark.parametrize(("name", "work"), [("vectors", _embed), ("vectors", _embed_ids), ("ranker", _rank)])
def test_what_waits_is_counted_by_its_size(listed: Path, name: str, work: Work) -> None:
    async def test(pool: ModelPool) -> None:
        model = pool.get(name)
        others = model.embedding_admission.enter(MAX_EMBEDDING_TEXT - 1_000_000)
        first = asyncio.create_task(work(model, "word " * 200_000))
        while not model.busy:  # noqa: ASYNC110 - it is a plain value
            await asyncio.sleep(0.001)
        with pytest.raises(QueueFull, match="64 MiB of text"):
            await work(model, "word")
        assert sum((await first).tokens) > 0
        assert sum((await work(model, "word")).tokens) > 0
        others.leave()
        assert model.embedding_admission.open == 0

    run(listed, test)


def run(listed: Path, test: Callable[[ModelPool], Awaitable[None]]) -> None:
    async def run() -> None:
        pool = ModelPool(load_registry(listed), (), budget=lambda _devices: Footprint(1 << 40))
        try:
            await test(pool)
        finally:
            await pool.aclose()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_what_is_done_with_a_model_is_within_its_time_limit(listed: Path) -> None:
    listed.write_text(f"defaults: {{time_limit: 0.2}}\n{listed.read_text()}")

    async def test(pool: ModelPool) -> None:
        model = pool.get("vectors")
        with pytest.raises(TimeLimitExceeded, match=r"0\.2 seconds that this model's `time_limit`"):
            async with in_use(model, lambda: place_for(model, ["x"])):
                await asyncio.sleep(60)
        with pytest.raises(TimeoutError):
            async with in_use(model, lambda: place_for(model, ["x"])):
                raise TimeoutError
        assert model.embedding_admission.open == 0
        assert not model.busy

    run(listed, test)
