"""Many clients that want embeddings, of texts short and long in requests of any size, beside one that chats."""

from __future__ import annotations

import asyncio
import base64
import os
import random
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import numpy.typing as npt
import openai
import psutil
import pytest
from child_processes import model_processes
from model_helpers import write_registry
from running_server import RunningServer

TEXTS = int(os.environ.get("EMBEDDING_TEXTS", "480"))  # 3000 take a minute or two
CLIENTS = 16
MOST_WORDS = 190  # which are 1 to 200 tokens with those around them
TOLERANCE = 1e-6  # of a component
LEVEL = 32 * 1024 * 1024  # bytes by which memory may differ between the halves of the work
WORDS = ["time", "year", "people", "the", "of", "woman", "life", "child", "world", "school", "water", "seven", "story"]

Vector = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def both(
    embedding_model: Path, starter_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A server with a model that chats and one that makes embeddings."""
    models: dict[str, Path | str] = {"smollm2-135m": starter_model, "minilm": embedding_model}
    path = write_registry(tmp_path_factory.mktemp("both") / "models.yaml", models, "context: 1024, parallel: 2")
    with RunningServer("serve", "smollm2-135m", "minilm", "--models-file", str(path)) as running:
        yield running


def _texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, MOST_WORDS))) for _ in range(count)]


def _requests(texts: list[str], seed: int) -> list[list[str]]:
    """Divide texts into requests, most of them small."""
    draw, requests = random.Random(seed), []
    while texts:
        size = min(len(texts), draw.choice((1, 1, 2, 5, 17, 40)))
        requests.append(texts[:size])
        texts = texts[size:]
    return requests


async def _embed(client: httpx.AsyncClient, texts: list[str]) -> list[Vector]:
    answer = await client.post("/v1/embeddings", json={"model": "minilm", "input": texts, "encoding_format": "base64"})
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [each["index"] for each in data] == list(range(len(texts)))
    return [np.frombuffer(base64.b64decode(each["embedding"]), "<f4") for each in data]


async def _embed_all(url: str, requests: list[list[str]]) -> dict[str, Vector]:
    """Have all requests answered by some clients at once."""
    waiting, vectors = list(reversed(requests)), dict[str, Vector]()
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def work() -> None:
            while waiting:
                texts = waiting.pop()
                vectors.update(zip(texts, await _embed(client, texts), strict=True))

        await asyncio.gather(*(work() for _ in range(CLIENTS)))
    return vectors


def _memory(server: RunningServer) -> int:
    return sum(psutil.Process(pid).memory_info().rss for pid in model_processes(server.process.pid))


async def _chat(url: str, done: asyncio.Event) -> int:
    """Chat until the others are done, and return how many answers came."""
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    answers = 0
    while not done.is_set():
        question = [{"role": "user", "content": f"Tell me about the number {answers}."}]
        answer = await client.chat.completions.create(model="smollm2-135m", messages=question, max_tokens=8)
        assert answer.choices[0].message.content
        answers += 1
    await client.close()
    return answers


@pytest.mark.timeout(600)
def test_many_clients_get_the_vectors_that_each_text_has_alone_while_another_one_chats(both: RunningServer) -> None:
    texts = _texts(TEXTS, seed=1)
    half = len(texts) // 2

    async def run() -> tuple[dict[str, Vector], int, list[int]]:
        done = asyncio.Event()
        chat = asyncio.create_task(_chat(both.url, done))
        vectors, memory = {}, []
        for part in (texts[:half], texts[half:]):
            vectors |= await _embed_all(both.url, _requests(part, seed=2))
            memory.append(_memory(both))
        done.set()
        return vectors, await chat, memory

    vectors, answers, memory = asyncio.run(run())
    assert answers > 0
    assert len(vectors) == len(set(texts))
    assert memory[1] - memory[0] < LEVEL
    sample = random.Random(3).sample(texts, 24)
    twins = asyncio.run(_embed_all(both.url, [[text] for text in sample]))
    assert max(float(np.abs(vectors[text] - twins[text]).max()) for text in sample) < TOLERANCE


def test_clients_that_leave_are_not_worked_for(both: RunningServer) -> None:
    texts = _texts(400, seed=4)

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=both.url) as client:
            for _ in range(6):
                with pytest.raises(httpx.ReadTimeout):
                    await client.post("/v1/embeddings", json={"model": "minilm", "input": texts}, timeout=0.3)

    asyncio.run(leave())
    answer = httpx.post(f"{both.url}/v1/embeddings", json={"model": "minilm", "input": "Hello"}, timeout=20)
    assert answer.status_code == 200
    health = httpx.get(f"{both.url}/v1/internal/health", timeout=20).json()
    assert (health["running"], health["waiting"]) == (0, 0)
