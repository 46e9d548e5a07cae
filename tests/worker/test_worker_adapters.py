"""LoRA adapters of a running child: what comes from the other process, and that damaged files don't end it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
from gguf_writer import tiny_llama, tiny_llama_tensors
from lora_files import random_lora, shapes_of

from llamaserve.engine.events import Finished
from llamaserve.engine.params import Adapter, Generation, LoadParams, Sampling
from llamaserve.errors import InvalidRequest, ModelLoadFailed
from llamaserve.worker.process import GenerationStream, WorkerProcess

_PROMPT = [1, 70, 71, 72, 73, 74]
_GREEDY = Generation(sampling=Sampling(seed=1, temperature=0.0, ban_eos=True), max_tokens=12, special=True)
_TIMEOUT = 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and adapters for it."""
    folder = tmp_path_factory.mktemp("adapters")
    (folder / "tiny.gguf").write_bytes(tiny_llama())
    for seed, name in enumerate("abc"):
        random_lora(shapes_of(tiny_llama_tensors()), size=5.0, seed=seed).write(folder / f"{name}.gguf")
    return folder


@pytest.fixture(scope="module")
def params(load_params: LoadParams, folder: Path) -> LoadParams:
    return msgspec.structs.replace(
        load_params,
        path=str(folder / "tiny.gguf"),
        context=128,
        kv_cells=512,
        kv_unified=True,
        threads=1,
        adapters=(Adapter("a", str(folder / "a.gguf")),),
    )


def _with_worker(params: LoadParams, test: Callable[[WorkerProcess], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(_TIMEOUT):
            worker = await WorkerProcess.start("tiny", params, lambda fraction: None)
            try:
                await test(worker)
            finally:
                await worker.aclose()

    asyncio.run(run())


def _ask(worker: WorkerProcess, adapters: tuple[tuple[str, float], ...] | None, **changes: object) -> GenerationStream:
    return worker.generate([list(_PROMPT)], msgspec.structs.replace(_GREEDY, adapters=adapters, **changes))


async def _text(stream: GenerationStream) -> str:
    try:
        await stream.accepted()
        return "".join([event.text async for event in stream.events()])
    finally:
        stream.close()


def test_each_request_has_its_adapters(params: LoadParams, folder: Path) -> None:
    async def test(worker: WorkerProcess) -> None:
        plain, default = await asyncio.gather(_text(_ask(worker, ())), _text(_ask(worker, None)))
        assert plain != default
        assert await _text(_ask(worker, (("a", 1.0),))) == default
        assert await _text(_ask(worker, (("a", 0.0),))) == plain
        await worker.set_adapters([Adapter("b", str(folder / "b.gguf"))])
        assert await _text(_ask(worker, None)) not in (plain, default)
        with pytest.raises(InvalidRequest, match="no LoRA adapter 'a'; the model has 'b'") as caught:
            await _text(_ask(worker, (("a", 1.0),)))
        assert caught.value.param == "lora"
        await worker.set_adapters([])
        assert await _text(_ask(worker, None)) == plain

    _with_worker(params, test)


def test_adapters_change_while_an_answer_streams(params: LoadParams, folder: Path) -> None:
    async def test(worker: WorkerProcess) -> None:
        expected = await _text(_ask(worker, (("a", 1.0),), max_tokens=100))
        stream = _ask(worker, None, max_tokens=100, stream=True)
        await stream.accepted()
        events = stream.events()
        text = (await anext(events)).text
        await worker.set_adapters([Adapter("b", str(folder / "b.gguf")), Adapter("c", str(folder / "c.gguf"), 0.0)])
        other = await _text(_ask(worker, None, max_tokens=100))
        async for event in events:
            text += event.text
        assert isinstance(event, Finished)
        stream.close()
        assert text == expected != other

    _with_worker(params, test)


def test_requests_keep_the_order_of_commands(params: LoadParams, folder: Path) -> None:
    """One that was sent before its adapter went has it, even if it is still being encoded then."""

    async def test(worker: WorkerProcess) -> None:
        expected = await _text(_ask(worker, (("a", 1.0),)))
        before = _ask(worker, (("a", 1.0),))
        gone = asyncio.create_task(worker.set_adapters([]))
        assert await _text(before) == expected
        await gone

    _with_worker(params, test)


def test_a_damaged_file_changes_nothing_and_ends_no_child(params: LoadParams, folder: Path, tmp_path: Path) -> None:
    async def test(worker: WorkerProcess) -> None:
        expected = await _text(_ask(worker, None))
        whole = (folder / "b.gguf").read_bytes()
        for number, damaged in enumerate((b"", whole[:300], whole[:-3000], whole.replace(b"llama", b"gemma"))):
            path = tmp_path / f"{number}.gguf"
            path.write_bytes(damaged)
            with pytest.raises(ModelLoadFailed, match=f"{number}.gguf"):
                await worker.set_adapters([Adapter("b", str(folder / "b.gguf")), Adapter("bad", str(path))])
            assert await _text(_ask(worker, None)) == expected
        assert await _text(_ask(worker, (("a", 1.0),))) == expected

    _with_worker(params, test)


def test_a_model_whose_adapter_is_damaged_is_not_loaded(params: LoadParams, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF")

    async def start() -> None:
        with pytest.raises(ModelLoadFailed, match=r"bad\.gguf"):
            await WorkerProcess.start(
                "tiny",
                msgspec.structs.replace(params, adapters=(Adapter("bad", str(path)),)),
                lambda fraction: None,
            )

    asyncio.run(start())
