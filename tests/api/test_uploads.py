"""How much audio may lie on the disk at once, and how long an upload may take."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from unittest import mock

import pytest
from starlette.requests import Request
from starlette.types import Message

from llamaserve.api import bodies, handlers, middleware, uploads
from llamaserve.api.uploads import Expected, UploadAdmission, kept, receive
from llamaserve.errors import InvalidRequest, LlamaserveError, QueueFull, RequestTimeout, Unavailable

HEAD = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
END = b"\r\n--x--\r\n"
FILE = Expected("the file", "file", 1)


def request(receive: Callable[[], Awaitable[Message]], kind: str = "multipart/form-data; boundary=x") -> Request:
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/",
        "query_string": b"",
        "headers": [(b"content-type", kind.encode())],
    }
    return Request(scope, receive)


class Sender:
    """Sends pieces of a body; between the last two of them, everything waits until it may go on."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = list(pieces)
        self.may_end = asyncio.Event()

    async def __call__(self) -> Message:
        if len(self.pieces) == 1:
            await self.may_end.wait()
        piece = self.pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(self.pieces)}


def sent(admission: UploadAdmission, pieces: Sequence[bytes], kind: str = "multipart/form-data; boundary=x") -> bytes:
    """Return the file that is received of a body, and close it."""

    async def run() -> bytes:
        sender = Sender(*pieces)
        sender.may_end.set()
        upload = await receive(request(sender, kind), admission, FILE)
        assert admission.open == sum(map(len, pieces))
        try:
            return upload.file.read()
        finally:
            upload.close()
            upload.close()

    try:
        return asyncio.run(run())
    finally:
        assert admission.open == 0


def test_a_file_counts_until_it_is_closed() -> None:
    assert sent(UploadAdmission(10_000), [HEAD, b"a" * 500, b"b" * 500, END]) == b"a" * 500 + b"b" * 500
    assert sent(UploadAdmission(100), [HEAD, b"a" * 500, b"b", END]) == b"a" * 500 + b"b"  # nobody else is there


def test_bytes_count_as_they_come() -> None:
    """However large the body is said to be: slow ones leave room for others."""

    async def run() -> None:
        admission = UploadAdmission(2000)
        senders = [Sender(HEAD, b"a", END) for _ in range(5)]
        tasks = [asyncio.create_task(receive(request(sender), admission, FILE)) for sender in senders]
        async with asyncio.timeout(10):
            while admission.open < 5 * (len(HEAD) + 1):  # noqa: ASYNC110
                await asyncio.sleep(0)
        refused = Sender(HEAD, *[b"a" * 500] * 5, END)
        refused.may_end.set()
        with pytest.raises(QueueFull, match="as much waits here"):
            await receive(request(refused), admission, FILE)
        assert refused.pieces == []  # it has sent all, or it would not read why
        assert admission.open == 5 * (len(HEAD) + 1)  # and what is refused counts no more
        for sender in senders:
            sender.may_end.set()
        for upload in await asyncio.gather(*tasks):
            upload.close()
        assert admission.open == 0

    asyncio.run(run())


def test_nobody_is_let_in_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        admission = UploadAdmission(1000)
        place = admission.enter(5000)
        monkeypatch.setattr(uploads, "PATIENCE", 0.05)  # nor waited for
        with pytest.raises(QueueFull) as caught:
            await receive(request(Sender(b"a", b"b", b"c")), admission, FILE)
        assert (caught.value.retry_after or 0) >= 1
        place.leave()
        place.grow(1)
        assert admission.open == 0

    asyncio.run(run())


def test_a_client_that_sends_no_more_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "PATIENCE", 0.05)

    async def run() -> None:
        admission = UploadAdmission()
        with pytest.raises(RequestTimeout, match=r"nothing more of the request has come for 0\.05 seconds") as caught:
            await receive(request(Sender(HEAD, b"a", END)), admission, FILE)
        assert (caught.value.status, caught.value.code, admission.open) == (408, "request_timeout", 0)

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x; charset=UTF8", "Multipart/Form-Data; boundary=x"])
def test_forms_in_any_usual_writing(kind: str) -> None:
    assert sent(UploadAdmission(), [HEAD, b"a", END], kind) == b"a"


@pytest.mark.parametrize(
    ("body", "error", "says"),
    [
        (
            HEAD.replace(b'; filename="a"', b"") + b"a" * 70_000 + END,
            InvalidRequest,
            "part with the file has no filename",
        ),
        (HEAD.replace(b"name=", b"n=") + b"a" + END, InvalidRequest, "the form can't be read: the Content-Disposition"),
        (HEAD + b"a" + b"\r\n" + HEAD + b"b" + END, InvalidRequest, "too many files"),
    ],
)
def test_what_is_wrong_with_a_form_is_said(body: bytes, error: type[LlamaserveError], says: str) -> None:
    with pytest.raises(error, match=says):
        sent(UploadAdmission(), [body])


def test_a_full_disk_is_not_the_client_s_fault() -> None:
    with pytest.raises(Unavailable, match="temporary folder: No space left on device"), kept():
        raise OSError(28, "No space left on device")


def test_the_connection_of_a_client_that_sends_no_more_is_closed() -> None:
    response = handlers._respond(request(Sender(b"", b"")), RequestTimeout("nothing more has come"))
    assert (response.status_code, response.headers["connection"]) == (408, "close")


def test_nobody_waits_for_a_body_that_is_too_large_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "_REST_PATIENCE", 0.05)
    answer: list[Any] = []

    async def send(message: Any) -> None:
        answer.append(message)

    async def run() -> None:
        gate = middleware.RequestGate(mock.Mock(), max_body=10, max_upload=10, refused=mock.MagicMock())
        scope = {"type": "http", "method": "POST", "path": "/v1/audio/transcriptions"}
        async with asyncio.timeout(10):
            await gate({**scope, "headers": [(b"content-length", b"100")]}, Sender(b"a", b"b", b"c"), send)

    asyncio.run(run())
    assert answer[0]["status"] == 413
