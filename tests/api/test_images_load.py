"""Pictures beside other pictures, chats and models: clients that leave, crashes, turns, memory and time."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from api_helpers import ENDLESS, LIMIT, events
from image_helpers import EDITS, GENERATIONS, LONG, edit, file_of, generate, made, opened, photo, streaming
from model_helpers import Listener, loaded, replace
from running_server import RunningServer, wait_until
from tiny_diffusion import HEAD, image_entry, write_model

from llamaserve.api.options import WARNING_HEADER

SOON = 2.0  # seconds within which a picture that nobody waits for must end


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("load")


@contextlib.contextmanager
def serving(folder: Path, *entries: str, defaults: str = "", **environment: str) -> Iterator[RunningServer]:
    """A server with models, the first of which is loaded; streams that wait say so five times a second."""
    (folder / "tmp").mkdir(exist_ok=True)
    models = folder / "models.yaml"
    settings = f"image_model: tiny, context: 1024, parallel: 4{defaults}"
    models.write_text(f"defaults: {{{settings}}}\nmodels:\n" + "".join(f"  {entry}\n" for entry in entries))
    with RunningServer(
        *("serve", entries[0].partition(":")[0], "--models-file", str(models)),
        environment={"LLAMASERVE_HEARTBEAT": "0.2", "TMPDIR": str(folder / "tmp"), **environment},
    ) as running:
        yield running


def tiny(image_model: tuple[Path, Path], more: str = "", settings: str = "steps: 1, size: 64x64") -> str:
    return f"tiny: {image_entry(image_model, settings)[:-1]}{more}}}"


def chat(starter_model: Path, more: str = "") -> str:
    return f"starter: {{source: 'file:{starter_model}'{more}}}"


@pytest.fixture(scope="module")
def shared(image_model: tuple[Path, Path], starter_model: Path, folder: Path) -> Iterator[RunningServer]:
    with serving(folder, tiny(image_model), chat(starter_model)) as running:
        yield running


@pytest.fixture
def server(shared: RunningServer, folder: Path) -> Iterator[RunningServer]:
    """A server that has nothing to do, and nothing in its temporary folder; nor has it after the test."""
    yield shared
    wait_until(lambda: shared.running == 0, SOON)
    wait_until(lambda: list((folder / "tmp").iterdir()) == [], SOON)


# ---- clients that leave


@contextlib.contextmanager
def waiting(server: RunningServer, **fields: object) -> Iterator[None]:
    """Ask for a picture, read nothing, and hang up at the end of the block."""
    request = httpx.Request("POST", server.url + GENERATIONS, json={"prompt": "a lighthouse", **fields})
    with socket.create_connection((request.url.host, request.url.port or 80), timeout=10) as connection:
        connection.sendall(written(request))
        yield


def written(request: httpx.Request) -> bytes:
    """Return a request as it goes over the wire."""
    lines = [f"{request.method} {request.url.path} HTTP/1.1", *(": ".join(each) for each in request.headers.items())]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode() + request.read()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_the_work_and_the_next_one_is_answered(server: RunningServer, stream: bool) -> None:
    before = server.worker_pid()
    with streaming(server, **LONG) if stream else waiting(server, **LONG):
        wait_until(lambda: server.running == 1)
        time.sleep(0.5)
    left = time.monotonic()
    wait_until(lambda: not psutil.pid_exists(before), SOON)
    assert made(generate(server)).shape == (64, 64, 3)
    assert time.monotonic() - left < 2 * SOON
    assert server.worker_pid() != before
    assert server.get("/v1/internal/health")["models"]["tiny"] == "loaded"


def test_a_client_that_leaves_before_its_stream_begins_ends_the_work(server: RunningServer) -> None:
    generate(server)
    before = server.worker_pid()
    os.kill(before, signal.SIGSTOP)  # so that there is no first event
    with waiting(server, stream=True, **LONG):
        time.sleep(1)
    time.sleep(0.2)
    os.kill(before, signal.SIGCONT)
    wait_until(lambda: not psutil.pid_exists(before), SOON)
    assert made(generate(server)).shape == (64, 64, 3)


def test_a_picture_that_is_nearly_done_costs_no_new_load(server: RunningServer) -> None:
    generate(server)
    before = server.worker_pid()
    with waiting(server):
        wait_until(lambda: server.running == 1)
    generate(server)
    assert server.worker_pid() == before


def test_who_waits_is_not_hurt_by_one_that_leaves(server: RunningServer) -> None:
    with ThreadPoolExecutor(2) as clients, Listener(server) as listener:
        with streaming(server, **LONG):
            wait_until(lambda: server.running == 1)
            waiters = [clients.submit(generate, server, n=2) for _ in range(2)]
            wait_until(lambda: server.running == 3)
        assert [len(each.result().json()["data"]) for each in waiters] == [2, 2]
        assert listener.of("unloaded", "tiny")[-1]["data"]["reason"] == "cancelled"
        assert listener.of("crashed", "tiny") == []


def test_one_that_leaves_the_queue_hurts_nobody(server: RunningServer) -> None:
    with ThreadPoolExecutor(1) as clients:
        first = clients.submit(generate, server, size="256x256")
        wait_until(lambda: server.running == 1)
        before = server.worker_pid()
        with waiting(server):
            wait_until(lambda: server.running == 2)
        wait_until(lambda: server.running == 1, SOON)
        assert first.result().status_code == 200
        assert server.worker_pid() == before


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("path", [GENERATIONS, EDITS])
def test_a_client_that_reads_nothing_holds_up_nobody(
    image_model: tuple[Path, Path], tmp_path: Path, count: int, path: str
) -> None:
    fields = {"prompt": "a tower", "n": count, "size": "256x256", "steps": 1, "stream": True, "partial_images": 1}
    with serving(tmp_path, tiny(image_model), LLAMASERVE_HEARTBEAT="60") as server:
        url = server.url + path
        files = {"image": photo()}
        edits = httpx.Request("POST", url, data={name: f"{value}" for name, value in fields.items()}, files=files)
        connection = reading_nothing(httpx.Request("POST", url, json=fields) if path == GENERATIONS else edits)
        wait_until(lambda: server.running == 1)
        assert generate(server).status_code == 200
        wait_until(lambda: server.running == 0, LIMIT)
        assert server.post("/v1/internal/model/unload", {"model_name": "tiny"}).status_code == 200
        assert loaded(server) == []
        assert list((tmp_path / "tmp").iterdir()) == []
        connection.settimeout(LIMIT)
        read = b""
        while not read.endswith(b"0\r\n\r\n"):
            read += connection.recv(65536)
        connection.close()
        assert read.count(b".completed") == count
        assert b'"error"' not in read


def reading_nothing(request: httpx.Request) -> socket.socket:
    """Ask for pictures, and have hardly any room for the answer."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)  # which makes the other side's buffer small
    connection.connect((request.url.host, request.url.port or 80))
    connection.sendall(written(request))
    return connection


def test_a_stream_that_ends_as_its_model_is_loaded_leaves_it(image_model: tuple[Path, Path], tmp_path: Path) -> None:
    with serving(tmp_path, tiny(image_model, ", keep_alive: -1")) as server, ThreadPoolExecutor(1) as clients:
        for _ in range(3):
            assert server.post("/v1/internal/model/unload", {"model_name": "tiny"}).status_code == 200
            with waiting(server, stream=True):
                wait_until(lambda: server.get("/v1/internal/health")["models"]["tiny"] == "loading")
                unloading = clients.submit(server.post, "/v1/internal/model/unload", {"model_name": "tiny"})
                time.sleep(0.05)
            assert unloading.result().status_code == 200
            assert generate(server).status_code == 200


# ---- models that are replaced


def test_who_waits_for_a_model_that_is_replaced_is_told(image_model: tuple[Path, Path], tmp_path: Path) -> None:
    load = {"model_name": "tiny", "args": {"threads": 1}}
    with serving(tmp_path, tiny(image_model)) as server, ThreadPoolExecutor(1) as clients:
        with streaming(server, **LONG):
            wait_until(lambda: server.running == 1)
            second = clients.submit(generate, server)
            wait_until(lambda: server.running == 2)
            assert server.post("/v1/internal/model/load", load).status_code == 200
        response = second.result()
        assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
        assert "was replaced" in response.json()["error"]["message"]
        assert int(response.headers["retry-after"]) > 0
        assert generate(server).status_code == 200


def test_who_waits_for_room_for_a_model_that_is_replaced_is_told_at_once(
    image_model: tuple[Path, Path], starter_model: Path, tmp_path: Path
) -> None:
    entries, models = [chat(starter_model), tiny(image_model)], tmp_path / "models.yaml"
    with serving(tmp_path, *entries, LLAMASERVE_MEMORY="420MB") as server, ThreadPoolExecutor(1) as clients:
        chatting = {**ENDLESS, "model": "starter", "max_tokens": 800, "stream": True}
        with httpx.stream("POST", server.url + "/v1/completions", json=chatting, timeout=LIMIT):
            waits = clients.submit(generate, server)
            wait_until(lambda: server.get("/v1/internal/health")["models"]["tiny"] == "loading")
            replace(models, models.read_text().replace(entries[1], tiny(image_model, ", threads: 1")))
            response = waits.result(5)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
            assert "was replaced" in response.json()["error"]["message"]
            assert loaded(server) == ["starter"]
        assert generate(server).status_code == 200


def test_other_files_are_not_taken_for_those_that_were_asked_for(
    image_model: tuple[Path, Path], tmp_path: Path
) -> None:
    for name in ("own", "other"):
        (tmp_path / name).mkdir()
    files = write_model(tmp_path / "own")
    with serving(tmp_path, tiny(files)) as server, ThreadPoolExecutor(1) as clients:
        with streaming(server, **LONG):
            wait_until(lambda: server.running == 1)
            second = clients.submit(generate, server)
            wait_until(lambda: server.running == 2)
            (other,) = write_model(tmp_path / "other", width=2 * HEAD)[:1]
            other.replace(files[0])
        assert second.result().status_code == 503
        assert generate(server).status_code == 200


def test_a_model_with_settings_of_its_own_can_be_loaded_again(image_model: tuple[Path, Path], tmp_path: Path) -> None:
    with serving(tmp_path, tiny(image_model, settings="steps: 1, size: 128x64")) as server:
        for args in ({}, {"threads": 1}):
            response = server.post("/v1/internal/model/load", {"model_name": "tiny", "args": args})
            assert response.status_code == 200, response.text
        assert made(generate(server)).shape == (64, 128, 3)


# ---- turns


def test_requests_take_turns_picture_by_picture(server: RunningServer) -> None:
    with ThreadPoolExecutor(2) as clients:
        many: Future[httpx.Response] = clients.submit(generate, server, n=10, size="128x128")
        wait_until(lambda: server.running == 1)
        start = time.monotonic()
        assert generate(server).status_code == 200
        assert not many.done()
        one = time.monotonic() - start
        assert len(many.result().json()["data"]) == 10
        assert one < time.monotonic() - start


def test_a_stream_that_waits_says_so(server: RunningServer) -> None:
    with (
        streaming(server, **LONG),
        httpx.stream("POST", server.url + GENERATIONS, json={"prompt": "a", "stream": True}, timeout=LIMIT) as second,
    ):
        comments = (line for line in second.iter_lines() if line.startswith(":"))
        assert next(comments) == ": queued"


def test_a_stream_that_is_under_way_says_how_far_it_is(server: RunningServer) -> None:
    with streaming(server, **LONG, n=2) as stream:
        comments = (line for line in stream.iter_lines() if line.startswith(":"))
        assert re.fullmatch(r": picture 1 of 2, (reading the prompt|step \d of 8)", next(comments))


def test_more_than_may_wait_are_refused(image_model: tuple[Path, Path], tmp_path: Path) -> None:
    with serving(tmp_path, tiny(image_model, ", queue: 1")) as server:
        with streaming(server, **LONG), ThreadPoolExecutor(1) as clients:
            wait_until(lambda: server.running == 1)
            second = clients.submit(generate, server)
            wait_until(lambda: server.running == 2)
            third = generate(server)
            assert (third.status_code, third.json()["error"]["code"]) == (429, "queue_full")
            assert int(third.headers["retry-after"]) > 0
        assert second.result().status_code == 200


def test_a_time_limit_ends_the_work(image_model: tuple[Path, Path], tmp_path: Path) -> None:
    with serving(tmp_path, tiny(image_model, ", time_limit: 2")) as server:
        response = generate(server, **LONG)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "time_limit_exceeded")
        assert generate(server).status_code == 200


def test_the_time_that_a_request_waits_counts(image_model: tuple[Path, Path], tmp_path: Path) -> None:
    with serving(tmp_path, tiny(image_model, ", time_limit: 2")) as server, ThreadPoolExecutor(1) as clients:
        first = clients.submit(generate, server, **LONG)
        wait_until(lambda: server.running == 1)
        second = generate(server)
        for response in (first.result(), second):
            assert (response.status_code, response.json()["error"]["code"]) == (504, "time_limit_exceeded")
        assert generate(server).status_code == 200


def test_a_model_that_is_not_kept_is_loaded_once_for_all_pictures_of_a_request(
    image_model: tuple[Path, Path], tmp_path: Path
) -> None:
    with serving(tmp_path, tiny(image_model, ", keep_alive: 0")) as server, Listener(server) as listener:
        wait_until(lambda: loaded(server) == [])
        assert len(generate(server, n=3).json()["data"]) == 3
        listener.wait("unloaded", "tiny")
        assert len(listener.of("loaded", "tiny")) == 1
        assert generate(server, keep_alive=60).status_code == 200
        time.sleep(0.3)
        assert loaded(server) == ["tiny"]


# ---- crashes and memory


def test_a_crash_fails_the_request_and_nothing_else(server: RunningServer) -> None:
    generate(server)
    with ThreadPoolExecutor(1) as clients:
        asked = clients.submit(generate, server, **LONG)
        wait_until(lambda: server.running == 1)
        os.kill(server.worker_pid(), signal.SIGKILL)
        response = asked.result()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_crashed")
    assert generate(server).status_code == 200


def test_a_crash_in_a_stream_is_told_in_it(server: RunningServer) -> None:
    generate(server)
    with streaming(server, **LONG) as stream:
        told = events(stream.iter_lines())
        assert next(told)["type"] == "image_generation.progress"
        os.kill(server.worker_pid(), signal.SIGKILL)
        rest = list(told)
    assert rest[-1] == "[DONE]"
    assert rest[-2]["error"]["code"] == "engine_crashed"
    again = server.post("/v1/internal/model/load", {"model_name": "tiny"})  # so that no crash counts
    assert again.status_code == 200


def test_pictures_leave_no_memory_taken(server: RunningServer) -> None:
    def resident() -> int:
        processes = [psutil.Process(pid) for pid in (server.process.pid, server.worker_pid())]
        return sum(process.memory_info().rss for process in processes)

    for number in range(20):
        generate(server, seed=number, output_format="webp" if number % 2 else "png")
    before = resident()
    for number in range(20):
        assert len(generate(server, seed=number, n=4).json()["data"]) == 4
    assert resident() - before < 8e6  # 0.1 MB a picture


def test_uploads_leave_nothing_behind(server: RunningServer, folder: Path) -> None:
    for _ in range(3):
        assert edit(server, files={"image": photo()}, steps=1).status_code == 200
    with waiting(server, **LONG):
        wait_until(lambda: server.running == 1)
    assert edit(server, files={"image": photo()}, steps=1).status_code == 200


@pytest.mark.skipif(not hasattr(psutil.Process, "rlimit"), reason="only Linux limits files of a running process")
def test_a_picture_that_can_be_kept_under_no_link_is_sent_and_it_is_told(server: RunningServer) -> None:
    generate(server)
    process = psutil.Process(server.process.pid)
    usual = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (100, usual[1]))  # bytes of a file, as if the disk were full
    try:
        whole = generate(server)
        linked = generate(server, response_format="url")
        with streaming(server, n=2, size="256x256", steps=2) as stream:
            completed = []
            for each in events(stream.iter_lines()):
                if each != "[DONE]" and each["type"] == "image_generation.completed":
                    completed.append(each)
                    process.rlimit(psutil.RLIMIT_FSIZE, usual)
    finally:
        process.rlimit(psutil.RLIMIT_FSIZE, usual)
    told = whole.headers[WARNING_HEADER]
    assert told.startswith("the picture can't be kept in the temporary folder: ")
    assert ("url" in whole.json()["data"][0], made(whole).shape) == (False, (64, 64, 3))
    assert (linked.status_code, linked.json()["error"]["code"]) == (503, "unavailable")
    assert [("url" in each, each.get("warning")) for each in completed] == [(False, told), (True, None)]


# ---- beside chats


def test_chats_are_answered_while_a_picture_is_made(server: RunningServer) -> None:
    say = {"model": "starter", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 16}
    assert server.post("/v1/chat/completions", say).status_code == 200
    with streaming(server, **LONG):
        wait_until(lambda: server.running == 1)
        for _ in range(3):
            assert server.post("/v1/chat/completions", say).json()["usage"]["completion_tokens"] > 0
        assert server.running == 1


def test_models_make_room_for_each_other(image_model: tuple[Path, Path], starter_model: Path, tmp_path: Path) -> None:
    entries = tiny(image_model), chat(starter_model)
    with serving(tmp_path, *entries, LLAMASERVE_MEMORY="420MB") as server, Listener(server) as listener:
        say = {"model": "starter", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        for _ in range(2):
            assert opened(file_of(generate(server).json()["data"][0])).size == (64, 64)
            assert loaded(server) == ["tiny"]
            assert server.post("/v1/chat/completions", say).status_code == 200
            assert loaded(server) == ["starter"]
        assert {event["data"]["reason"] for event in listener.of("unloaded")} == {"evicted"}


def test_a_picture_that_does_not_fit_is_refused_before_it_is_begun(
    image_model: tuple[Path, Path], tmp_path: Path
) -> None:
    with serving(tmp_path, tiny(image_model), LLAMASERVE_MEMORY="420MB") as server:
        response = generate(server, size="2048x2048")
        assert (response.status_code, response.json()["error"]["code"]) == (507, "insufficient_memory")
        assert generate(server).status_code == 200


def test_the_server_ends_while_a_picture_is_made(image_model: tuple[Path, Path], tmp_path: Path) -> None:
    with serving(tmp_path, tiny(image_model)) as server, streaming(server, **LONG) as stream:
        told = events(stream.iter_lines())
        next(told)
        start = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - start < 8
        rest = list(told)
        assert rest[-2]["error"]["code"] == "unavailable"
    assert list((tmp_path / "tmp").iterdir()) == []
