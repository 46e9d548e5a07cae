"""A diffusion model in the pool: pictures that take more memory than was planned, beside models in use and without."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from tiny_diffusion import image_entry

from llamaserve.engine.params import Footprint
from llamaserve.errors import InsufficientMemory, Unavailable
from llamaserve.registry.pool import ModelPool
from llamaserve.registry.served import ServedModel
from llamaserve.registry.spec import load_registry
from llamaserve.worker.supervisor import Status

DEFAULTS = "context: 256, parallel: 2, batch: 256, spill: 0, threads: 2"
MEGABYTE = 10**6

Test = Callable[[ModelPool, ServedModel], Awaitable[None]]


@pytest.fixture
def listed(tmp_path: Path, starter_model: Path, image_model: tuple[Path, Path]) -> Path:
    path = tmp_path / "models.yaml"
    path.write_text(
        f"defaults: {{{DEFAULTS}}}\nmodels:\n"
        f"  chat: {{source: 'file:{starter_model}'}}\n"
        f"  brush: {image_entry(image_model, 'size: 64x64')}\n"
    )
    return path


def run(path: Path, test: Test, budget: int = 1 << 40) -> None:
    """Run a test with a pool of which the brush is in memory and in use."""

    async def work() -> None:
        pool = ModelPool(load_registry(path), [], budget=lambda _devices: Footprint(budget))
        try:
            brush = pool.get("brush")
            async with brush.in_use():
                await test(pool, brush)
        finally:
            await pool.aclose()

    asyncio.run(asyncio.wait_for(work(), 100))


def planned(model: ServedModel) -> int:
    assert model.plan is not None
    return model.plan.need.host


def taking(size: int) -> Callable[[object], Footprint]:
    return lambda _devices: Footprint(size)


def test_what_a_picture_takes_is_claimed_while_it_is_made(listed: Path) -> None:
    async def test(pool: ModelPool, brush: ServedModel) -> None:
        before = pool.claimed.host
        async with brush.more_room(taking(planned(brush) + 500 * MEGABYTE)):
            assert before + 500 * MEGABYTE <= pool.claimed.host < before + 600 * MEGABYTE
        assert pool.claimed.host == before
        async with brush.more_room(taking(1)):
            assert pool.claimed.host == before

    run(listed, test)


def test_what_lasts_is_claimed_until_the_next_picture(listed: Path) -> None:
    async def test(pool: ModelPool, brush: ServedModel) -> None:
        before = pool.claimed.host
        async with brush.more_room(taking(planned(brush)), lasting=300 * MEGABYTE):
            pass
        assert pool.claimed.host == max(before, planned(brush) + 300 * MEGABYTE)
        async with brush.more_room(taking(1)):
            assert pool.claimed.host == before
        assert pool.claimed.host == before

    run(listed, test)


def test_nobody_has_to_go_for_a_picture_that_has_no_room_all_the_same(listed: Path) -> None:
    async def test(pool: ModelPool, brush: ServedModel) -> None:
        chat = pool.get("chat")
        async with chat.in_use():
            pass
        async with chat.in_use():
            with pytest.raises(Unavailable, match="no room for this beside the models in use"):
                async with brush.more_room(taking(1900 * MEGABYTE)):
                    pytest.fail("there is no room")
        assert chat.status is Status.LOADED
        with pytest.raises(InsufficientMemory):
            async with brush.more_room(taking(2100 * MEGABYTE)):
                pytest.fail("there is never room")
        assert chat.status is Status.LOADED
        async with brush.more_room(taking(1900 * MEGABYTE)):
            assert chat.status is Status.UNLOADED

    run(listed, test, budget=2000 * MEGABYTE)


def test_of_two_pictures_for_which_there_is_room_once_one_gets_it(listed: Path, image_model: tuple[Path, Path]) -> None:
    listed.write_text(f"{listed.read_text()}  pen: {image_entry(image_model, 'size: 64x64')}\n")

    async def test(pool: ModelPool, brush: ServedModel) -> None:
        pen = pool.get("pen")

        async def draw(model: ServedModel) -> bool:
            try:
                async with model.more_room(taking(1500 * MEGABYTE)):
                    await asyncio.sleep(0.1)
            except Unavailable:
                return False
            return True

        async with pen.in_use():
            assert sorted(await asyncio.gather(draw(brush), draw(pen))) == [False, True]

    run(listed, test, budget=2000 * MEGABYTE)


def test_a_claim_of_a_process_that_has_ended_is_not_brought_back(listed: Path) -> None:
    async def test(pool: ModelPool, brush: ServedModel) -> None:
        async with brush.more_room(taking(planned(brush) + 500 * MEGABYTE), lasting=500 * MEGABYTE):
            await brush.unload("cancelled")
            async with brush.in_use():
                now = pool.claimed.host
        assert pool.claimed.host == now

    run(listed, test)
