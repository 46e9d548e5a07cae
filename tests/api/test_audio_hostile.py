"""Uploads that are meant to do harm: they are refused in words, and take no more than there is for them."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import httpx
import psutil
import pytest
from api_helpers import assert_error
from audio_helpers import FORM, HEAD, SAID, TRANSCRIPTIONS, forgotten, speech_server_in, upload, words_of
from child_processes import model_processes
from hostile_audio import beginnings, containers, cut_files, long_files, other_files, time_stamps, wav_headers
from running_server import RunningServer, wait_until
from whisper_writer import whisper_file

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def attacked(speech_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningServer, Path]]:
    """A server for audio of a minute and uploads of 2 GiB, and its temporary folder. It has a second model, which hears
    nothing right, but soon.
    """
    folder = tmp_path_factory.mktemp("attacked")
    (folder / "quick.bin").write_bytes(whisper_file(n_text_ctx=448).bytes())
    models: dict[str, Path | str] = {"tiny.en": speech_model, "quick": folder / "quick.bin"}
    environment = {"LLAMASERVE_MAX_AUDIO": "60", "LLAMASERVE_MAX_UPLOAD": f"{2 * 2**30}"}
    with speech_server_in(folder, models, environment) as running:
        yield running, folder / "tmp"
        assert list((folder / "tmp").iterdir()) == []


class Memory:
    """Watches the memory of a server within a ``with`` block: its own, and that of all its processes together."""

    def __init__(self, server: RunningServer) -> None:
        self._server = psutil.Process(server.process.pid)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.own = self.all = 0  # bytes, at most

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            self.own = max(self.own, self._server.memory_info().rss)
            self.all = max(self.all, all_memory(self._server))


def all_memory(server: psutil.Process) -> int:
    """Return what a server and all processes below it take."""
    sizes = []
    for process in [server, *server.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            sizes.append(process.memory_info().rss)
    return sum(sizes)


@pytest.mark.timeout(300)
def test_hostile_files_do_no_harm(attacked: tuple[RunningServer, Path]) -> None:
    server, temporary = attacked
    assert words_of(upload(server).json()["text"]) == SAID
    upload(server, model="quick")
    pids, process = model_processes(server.process.pid), psutil.Process(server.process.pid)
    own, everything = process.memory_info().rss, all_memory(process)
    files = list(chain(other_files(), beginnings(), wav_headers(), long_files(), containers(), time_stamps()))
    files += [file for file in cut_files() if file[0].endswith((" 0.2% of it", " 2.0% of it"))]
    assert len(files) > 200

    def attack(file: tuple[str, bytes]) -> tuple[str, httpx.Response]:
        return file[0], upload(server, file[1], model="quick", temperature="1")  # at which there is no second attempt

    with Memory(server) as memory, ThreadPoolExecutor(8) as attackers:
        answers = dict(attackers.map(attack, files))
    refused = {name: answer for name, answer in answers.items() if answer.status_code != 200}
    assert len(refused) > 150
    for name, answer in refused.items():
        assert len(assert_error(answer, 400, None, "file")) > 15, name
    assert {name for name in dict(other_files()) if name not in refused} == set()
    assert memory.own - own < 100 * MEGABYTE
    assert memory.all - everything < 1100 * MEGABYTE
    assert words_of(upload(server).json()["text"]) == SAID
    assert process.memory_info().rss - own < 50 * MEGABYTE
    assert pids <= model_processes(server.process.pid)  # a spare process may have joined them
    wait_until(lambda: forgotten(server, temporary))


def test_uploads_that_do_not_come_to_an_end_take_no_room_from_others(attacked: tuple[RunningServer, Path]) -> None:
    server, _ = attacked
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST {TRANSCRIPTIONS} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {FORM['content-type']}\r\n"
    process, ports = psutil.Process(server.process.pid), set()
    with contextlib.ExitStack() as connections:
        for number in range(30):
            connection = connections.enter_context(socket.create_connection((host, int(port)), timeout=10))
            length = "Transfer-Encoding: chunked" if number % 2 else f"Content-Length: {2**30}"
            beginning = f"{len(HEAD):x}\r\n".encode() + HEAD + b"\r\n" if number % 2 else HEAD
            connection.sendall(f"{head}{length}\r\n\r\n".encode() + beginning)
            ports.add(connection.getsockname()[1])
        wait_until(lambda: ports <= {each.raddr.port for each in process.net_connections() if each.raddr})
        assert words_of(upload(server).json()["text"]) == SAID
