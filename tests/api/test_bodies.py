"""How much memory bodies may take: who fills it does not keep others out, and each is told so in a way that it sees."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_helpers import COMPLETIONS, TINY
from model_helpers import write_registry
from running_server import RunningServer, wait_until
from starlette.types import Message

from llamaserve.api.bodies import Body, BodyAdmission
from llamaserve.api.handlers import BodyRefused

LARGEST = 256 * 1024
MANY = 8  # that may be in memory


class Client:
    """Sends a body of so many pieces of 1000 bytes."""

    def __init__(self, pieces: int) -> None:
        self.left = pieces

    async def __call__(self) -> Message:
        self.left -= 1
        return {"type": "http.request", "body": b"x" * 1000, "more_body": self.left > 0}


async def read(body: Body) -> None:
    while (await body())["more_body"]:
        pass


def test_what_is_refused_is_read_to_its_end_and_stays_refused() -> None:
    async def run() -> None:
        admission = BodyAdmission(100_000)
        first, second, third, small = Client(100), Client(90), Client(90), Client(60)
        bodies = [Body(client, 200_000, admission) for client in (first, second, third, small)]
        await read(bodies[0])
        for body, client in ((bodies[1], second), (bodies[2], third)):
            with pytest.raises(BodyRefused) as caught:
                await read(body)
            assert (caught.value.error.status, caught.value.error.code) == (429, "queue_full")
            assert (caught.value.error.retry_after or 0) > 0
            assert client.left == 0, "it has sent all, or it would not read why"
            with pytest.raises(BodyRefused):
                await body()
        await read(bodies[3])
        for body in bodies:
            body.close()
        assert admission.open == 0

    asyncio.run(asyncio.wait_for(run(), 10))


def test_of_many_that_come_together_as_many_are_read_as_there_is_room_for() -> None:
    async def run() -> None:
        admission = BodyAdmission(400_000)
        bodies = [Body(Client(100), 200_000, admission, length=100_000) for _ in range(10)]
        for _ in range(70):  # each is over what is let in without room, and none is whole
            outcomes = await asyncio.gather(*(body() for body in bodies), return_exceptions=True)
        refused = [body for body in bodies if body.refusal is not None]
        assert len(refused) == 6
        assert sum(isinstance(outcome, BodyRefused) for outcome in outcomes) == 6
        await asyncio.gather(*(read(body) for body in bodies if body not in refused))
        for body in bodies:
            body.close()
        assert admission.open == 0

    asyncio.run(asyncio.wait_for(run(), 10))


def test_a_body_that_is_too_large_is_read_to_its_end() -> None:
    client = Client(50)
    with pytest.raises(BodyRefused) as caught:
        asyncio.run(read(Body(client, 10_000, None)))
    assert (caught.value.error.status, client.left) == (413, 0)


def test_it_is_not_read_for_ever() -> None:
    client = Client(10**9)
    with pytest.raises(BodyRefused):
        asyncio.run(asyncio.wait_for(read(Body(client, 10_000, None)), 10))
    assert client.left > 10**8


@pytest.fixture
def server(starter_model: Path, tmp_path: Path) -> Iterator[RunningServer]:
    path = write_registry(tmp_path / "models.yaml", {"smollm2": starter_model})
    settings = {
        "LLAMASERVE_MAX_BODY": str(LARGEST),
        "LLAMASERVE_API_KEY": "a-large-one,another-one",
        "LLAMASERVE_ADMIN_KEY": "an-admin-one",
    }
    with RunningServer("serve", "smollm2", "--models-file", str(path), environment=settings) as running:
        yield running


def ask(server: RunningServer, key: str, size: int, **fields: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    return server.post(COMPLETIONS, {**TINY, "user": "x" * size, **fields}, headers=headers)


def test_bodies_have_room_and_each_key_has_its_share_of_it(server: RunningServer) -> None:
    with contextlib.ExitStack() as senders:
        for _ in range(MANY):
            senders.enter_context(half_a_body(server, "a-large-one"))
        wait_until(lambda: ask(server, "a-large-one", 200_000).status_code == 429)
        response = ask(server, "a-large-one", 200_000)
        assert response.json()["error"]["code"] == "queue_full"
        assert int(response.headers["retry-after"]) > 0
        assert ask(server, "a-large-one", 50_000).status_code == 200, "a small one needs no room"
        assert ask(server, "another-one", 200_000).status_code == 200, "its share is free"
        headers = {"x-api-key": "an-admin-one"}
        assert server.post("/v1/internal/stop-generation", {}, headers=headers).status_code == 200
        metrics = httpx.get(f"{server.url}/metrics", headers=headers).text
        assert 'llamaserve_refused_requests_total{reason="queue_full"}' in metrics
    wait_until(lambda: ask(server, "a-large-one", 200_000).status_code == 200)
    for _ in range(3 * MANY):
        assert ask(server, "a-large-one", 200_000, prompt=1).status_code == 400
    assert ask(server, "a-large-one", 200_000).status_code == 200, "all room has come back"


def half_a_body(server: RunningServer, key: str) -> socket.socket:
    """Send some of a body that is as large as one may be."""
    sender = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nx-api-key: {key}\r\nContent-Length: {LARGEST}\r\n\r\n"
    sender.sendall(head.encode() + b" " * (LARGEST // 2))
    return sender
