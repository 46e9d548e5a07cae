"""Many uploads at once, clients that leave at any time, and forms that can't be read."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from api_helpers import LIMIT, assert_error
from audio_files import SPEECH, spoken
from audio_helpers import (
    FORM,
    HEAD,
    SAID,
    TRANSCRIPTIONS,
    forgotten,
    hearing,
    speech_server_in,
    spoken_times,
    upload,
    words_of,
)
from hostile_audio import (
    silent_opus,
)
from running_server import RunningServer, wait_until

LONG = 40  # times the clip: ten minutes, which take most of a minute
SOON = 2.0  # seconds within which a client that has left must be forgotten


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("load")


@pytest.fixture(scope="module")
def shared(speech_model: Path, folder: Path) -> Iterator[RunningServer]:
    with speech_server_in(folder, {"tiny.en": speech_model}, {}) as running:
        yield running
        assert words_of(upload(running).json()["text"]) == SAID
        assert list((folder / "tmp").iterdir()) == []


@pytest.fixture
def server(shared: RunningServer, folder: Path) -> Iterator[RunningServer]:
    """A server that has nothing to do, and nothing in its temporary folder; nor has it after the test."""
    files = psutil.Process(shared.process.pid).num_fds()
    yield shared
    wait_until(lambda: forgotten(shared, folder / "tmp"), SOON)
    wait_until(lambda: psutil.Process(shared.process.pid).num_fds() <= files + 8)  # connections of clients


# ---- at once -------------------------------------------------------------------------------------------------------


def test_eight_uploads_are_all_answered_in_the_order_in_which_they_came(server: RunningServer) -> None:
    answered: list[int] = []

    def send(number: int) -> None:
        assert words_of(upload(server).json()["text"]) == SAID
        answered.append(number)

    with ThreadPoolExecutor(8) as clients:
        for number in range(8):
            clients.submit(send, number)
            wait_until(lambda sent=number + 1: server.running + len(answered) >= sent)
    assert answered == list(range(8))


def test_a_short_one_does_not_wait_for_the_end_of_a_long_one(server: RunningServer) -> None:
    with hearing(server, spoken_times(LONG)) as long:
        wait_until(lambda: server.running == 1)
        assert words_of(upload(server, spoken_times(2)).json()["text"]) == SAID * 2
        assert server.running == 1
        assert not long.is_stream_consumed


# ---- clients that leave --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def sent(server: RunningServer, content: bytes, *, stream: bool) -> Iterator[None]:
    """Send a file, and hang up at the end of the block."""
    fields = {"stream": "true"} if stream else {}
    request = httpx.Request("POST", server.url + TRANSCRIPTIONS, data=fields, files={"file": ("a", content)})
    with connected(server, request.read(), request.headers["content-type"]):
        yield


@contextlib.contextmanager
def connected(server: RunningServer, body: bytes, kind: str, length: int | None = None) -> Iterator[socket.socket]:
    """Send a body, or the beginning of one, and hang up at the end of the block."""
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST {TRANSCRIPTIONS} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\n"
    size = f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall((head + size).encode() + body)
        yield connection


def busy(server: RunningServer) -> tuple[int, int]:
    health = server.get("/v1/internal/health")
    return health["running"], health["waiting"]


@pytest.mark.parametrize("stream", [False, True])
def test_one_that_leaves_while_it_is_decoded(server: RunningServer, folder: Path, stream: bool) -> None:
    with sent(server, silent_opus("ogg", 2 * 3600), stream=stream):
        wait_until(lambda: any(path.stat().st_size > 0 for path in (folder / "tmp").glob("*/samples")))
        assert busy(server) == (0, 0)
    wait_until(lambda: forgotten(server, folder / "tmp"), SOON)


@pytest.mark.parametrize("stream", [False, True])
def test_one_that_leaves_while_it_is_heard(server: RunningServer, folder: Path, stream: bool) -> None:
    with sent(server, spoken_times(LONG), stream=stream):
        wait_until(lambda: busy(server) == (1, 0))
    wait_until(lambda: forgotten(server, folder / "tmp"), SOON)


@pytest.mark.parametrize("stream", [False, True])
def test_one_that_leaves_while_it_waits(server: RunningServer, folder: Path, stream: bool) -> None:
    with sent(server, spoken_times(LONG), stream=False):
        wait_until(lambda: busy(server) == (1, 0))
        with sent(server, spoken_times(LONG), stream=stream):
            wait_until(lambda: busy(server) == (1, 1))
        wait_until(lambda: len(list((folder / "tmp").iterdir())) == 1, SOON)
        wait_until(lambda: busy(server) == (1, 0))  # which shows when the other one has its next window
    wait_until(lambda: forgotten(server, folder / "tmp"), SOON)


def test_many_that_leave_at_any_time(server: RunningServer, folder: Path) -> None:
    for number in range(24):
        with sent(server, spoken_times(8), stream=bool(number % 2)):
            time.sleep(number / 60)
    wait_until(lambda: forgotten(server, folder / "tmp"), SOON)


@pytest.mark.parametrize("size", [100, 100_000, 5_000_000])
def test_one_that_sends_half_of_a_file(server: RunningServer, size: int) -> None:
    """Twenty times, so that what is left open by each shows."""
    for _ in range(20):
        with connected(server, HEAD + bytes(size), FORM["content-type"], length=2 * size):
            time.sleep(0.02)


def test_a_server_that_ends_decodes_no_more(speech_model: Path, tmp_path: Path) -> None:
    server = speech_server_in(tmp_path, {"tiny.en": speech_model}, {})
    with server, ThreadPoolExecutor(1) as clients:
        answer = clients.submit(upload, server, silent_opus("ogg", 3 * 3600))
        wait_until(lambda: any(path.stat().st_size > 0 for path in (tmp_path / "tmp").glob("*/samples")))
        begun = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - begun < 4
        assert_error(answer.result(), 503, "unavailable")
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not any("Traceback" in line for line in server.lines)


# ---- odd forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["speech.flac", "../../../etc/passwd", "/tmp/a", "a\0b", "é\u2028\U0001f600", ".", "C:\\a", "x" * 3000]
)
@pytest.mark.parametrize("kind", ["audio/flac"])
def test_a_file_s_name_and_kind_mean_nothing(server: RunningServer, name: str, kind: str) -> None:
    response = httpx.post(server.url + TRANSCRIPTIONS, files={"file": (name, SPEECH.read_bytes(), kind)}, timeout=LIMIT)
    assert words_of(response.json()["text"]) == SAID


def form(*parts: bytes, end: bytes = b"--x--\r\n") -> bytes:
    return b"".join(b"--x\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts) + end


FILE = b'name="file"; filename="a"\r\n\r\n' + SPEECH.read_bytes()
FORMS = {
    "no boundary": ("multipart/form-data", form(FILE)),
    "an empty boundary": ("multipart/form-data; boundary=", form(FILE)),
    "another boundary": ("multipart/form-data; boundary=y", form(FILE)),
    "a long boundary": ("multipart/form-data; boundary=" + "x" * 300, form(FILE)),
    "another kind of form": ("multipart/mixed; boundary=x", form(FILE)),
    "another encoding": ("multipart/form-data; boundary=x; charset=idna", form(b'name="model"\r\n\r\nxn--', FILE)),
    "one without a codec": ("multipart/form-data; boundary=x; charset=undefined", form(b'name="model"\r\n\r\na', FILE)),
    "nothing": (FORM["content-type"], b""),
    "no end": (FORM["content-type"], form(end=HEAD)),
    "no parts": (FORM["content-type"], form()),
    "no name": (FORM["content-type"], form(b'filename="a"\r\n\r\n' + b"a")),
    "no disposition": (FORM["content-type"], b"--x\r\nContent-Type: audio/wav\r\n\r\na\r\n--x--\r\n"),
    "a header without a colon": (FORM["content-type"], b"--x\r\nhello\r\n\r\na\r\n--x--\r\n"),
    "many headers": (FORM["content-type"], b"--x\r\n" + b"A: b\r\n" * 1000 + b"\r\na\r\n--x--\r\n"),
    "a long header": (FORM["content-type"], form(b'name="file"; filename="' + b"x" * 10_000 + b'"\r\n\r\na')),
    "a header without an end": (FORM["content-type"], b"--x\r\nA: " + b"x" * 5_000_000),
    "1000 fields": (FORM["content-type"], form(*[b'name="a"\r\n\r\nb'] * 1000, FILE)),
    "1000 files": (FORM["content-type"], form(*[FILE[:100]] * 1000)),
    "5 MB in a field": (FORM["content-type"], form(b'name="prompt"\r\n\r\n' + b"x" * 5_000_000, FILE)),
    "a file as a field": (FORM["content-type"], form(FILE.replace(b"file", b"model", 1))),
    "text before the form": (FORM["content-type"], b"hello\r\n" * 1000 + form(FILE)),
    "JSON": ("application/json", b"{}"),
    "a body that is no form": ("audio/flac", SPEECH.read_bytes() * 20),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_that_can_not_be_read(shared: RunningServer, name: str) -> None:
    kind, body = FORMS[name]
    response = httpx.post(shared.url + TRANSCRIPTIONS, content=body, headers={"content-type": kind}, timeout=LIMIT)
    assert len(assert_error(response, 400, None, response.json()["error"]["param"])) < 200


@pytest.mark.parametrize("size", [100_000, 5_000_000])
def test_no_temporary_folder(server: RunningServer, folder: Path, size: int) -> None:
    (folder / "tmp").rename(folder / "away")
    try:
        response = upload(server, spoken("wav") + bytes(size))
    finally:
        (folder / "away").rename(folder / "tmp")
    assert "temporary folder: No such file" in assert_error(response, 503, "unavailable")
