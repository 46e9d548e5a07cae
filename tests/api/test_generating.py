"""A generation between a request and the engine, where the wire can't show the moment."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from llamaserve.api.generating import Job, generate_whole
from llamaserve.api.services import Services
from llamaserve.engine.params import Footprint, Generation, Sampling
from llamaserve.registry.pool import ModelPool
from llamaserve.registry.spec import load_registry
from llamaserve.worker.protocol import Prompt


def test_an_answer_that_begins_when_the_server_has_been_told_to_end_is_ended_too(
    starter_model: Path, tmp_path: Path
) -> None:
    """Its prompts take a while, and all that was generated has been told before it begins."""

    async def test() -> None:
        pool = ModelPool(load_registry(path), budget=lambda _: Footprint(1 << 40))
        model = await pool.load("one")
        closing: list[asyncio.Task[None]] = []

        async def prompts() -> Sequence[Prompt]:
            closing.append(asyncio.create_task(pool.aclose()))
            await asyncio.sleep(0.1)
            return ["Once upon a time"]

        generation = Generation(sampling=Sampling(seed=1), max_tokens=2000)
        job = Job("cmpl-1", model, generation, prompts, param="prompt", sequences=1)
        services = cast("Services", SimpleNamespace(running={}))
        (answer,), _ = await generate_whole(services, job)
        assert (answer.reason, answer.stopped) == ("stop", True)
        await asyncio.gather(*closing)

    path = tmp_path / "models.yaml"
    path.write_text(f"models: {{one: {{source: 'file:{starter_model}', context: 4096, parallel: 1}}}}\n")
    asyncio.run(asyncio.wait_for(test(), 60))
