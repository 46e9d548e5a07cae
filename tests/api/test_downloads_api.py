"""Fetching models and deleting them over HTTP, from a hub on this machine."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_helpers import COMPLETIONS, TINY, assert_error
from gguf_writer import tiny_llama
from local_hub import Hub, running_hub, settings_for
from model_helpers import LOAD, SMALL, Listener, loaded, names, text_of, write_registry
from running_server import RunningServer, wait_until

DOWNLOAD = "/v1/internal/model/download"
DOWNLOADS = "/v1/internal/model/downloads"
CANCEL = "/v1/internal/model/download/cancel"
DELETE = "/v1/internal/model/delete"
MINE, HUBBED = "mine", "hubbed"


@pytest.fixture
def hub(starter_model: Path) -> Iterator[Hub]:
    """A hub with the starter model."""
    files = {"starter-Q4_1.gguf": starter_model.read_bytes(), "tiny-F32.gguf": tiny_llama()}
    with running_hub(Hub(files)) as running:
        yield running
        if running.gate is not None:
            running.gate.set()


@pytest.fixture
def server(hub: Hub, starter_model: Path, tmp_path: Path) -> Iterator[RunningServer]:
    """A server with a model whose file is somebody's own, one of the hub that is not here yet, and a models folder."""
    folder = tmp_path / "models"
    folder.mkdir()
    (tmp_path / "mine.gguf").write_bytes(tiny_llama())
    (folder / "link.gguf").symlink_to(starter_model)
    (folder / "tiny.gguf").write_bytes(tiny_llama())
    models: dict[str, Path | str] = {MINE: tmp_path / "mine.gguf", HUBBED: "source: 'hf:o/r:Q4_1'"}
    path = write_registry(tmp_path / "models.yaml", models, SMALL, aliases=f"hub: {HUBBED}")
    environment = {**settings_for(hub, tmp_path), "LLAMASERVE_HEARTBEAT": "0.2"}
    arguments = ("--models-file", str(path), "--models-dir", str(folder))
    with RunningServer("serve", *arguments, environment=environment) as running:
        yield running


def fetch(server: RunningServer, name: str, **fields: Any) -> dict[str, Any]:
    """Begin a download."""
    response = server.post(DOWNLOAD, {"model_name": name, **fields})
    assert response.status_code == 200, response.text
    download: dict[str, Any] = response.json()
    return download


def where(server: RunningServer, number: str) -> dict[str, Any]:
    """Return where a download stands."""
    (download,) = [each for each in server.get(DOWNLOADS)["downloads"] if each["id"] == number]
    assert isinstance(download, dict)
    return download


def test_a_model_is_fetched_and_then_answers(server: RunningServer, hub: Hub, tmp_path: Path) -> None:
    message = assert_error(server.post(COMPLETIONS, {**TINY, "model": HUBBED}), 404, "model_not_found", "model")
    assert DOWNLOAD in message
    hub.gate = threading.Event()
    with Listener(server) as listener:
        download = fetch(server, "hub")
        assert (download["model_name"], download["source"], download["state"]) == (HUBBED, "hf:o/r:Q4_1", "running")
        assert fetch(server, HUBBED)["id"] == download["id"]  # whoever asks for it, it is fetched once
        size = len(hub.files["starter-Q4_1.gguf"])
        wait_until(lambda: where(server, download["id"])["total"] == size)
        with Listener(server) as late:
            assert [each["id"] for each in late.events[0]["data"]["downloads"]] == [download["id"]]
        hub.gate.set()
        wait_until(lambda: where(server, download["id"])["state"] == "done", 30)
        done = where(server, download["id"])
        assert (done["done"], done["total"], done["percent"]) == (size, size, 100)
        assert (done["file"], "error" in done) == ("starter-Q4_1.gguf", False)
        assert done["started"] <= done["ended"]
        told = listener.wait("download_done", HUBBED)["data"]
        assert told == done
        percents = [event["data"]["percent"] for event in listener.of("download_progress", HUBBED)]
        assert [each for each in percents if each is not None] == sorted(each for each in percents if each is not None)
    wait_until(lambda: HUBBED in names(server))
    assert text_of(server.post(COMPLETIONS, {**TINY, "model": HUBBED})) == " Paris."
    assert "hf:o/r:Q4_1" in (tmp_path / "models.lock").read_text()


def test_a_reference_to_the_hub_is_fetched(server: RunningServer) -> None:
    download = fetch(server, "hf:o/r:F32")
    wait_until(lambda: where(server, download["id"])["state"] == "done", 30)
    assert where(server, download["id"])["file"] == "tiny-F32.gguf"
    wait_until(lambda: download["model_name"] in names(server))


def test_a_download_is_given_up(server: RunningServer, hub: Hub) -> None:
    hub.gate = threading.Event()
    with Listener(server) as listener:
        download = fetch(server, HUBBED)
        size = len(hub.files["starter-Q4_1.gguf"])
        wait_until(lambda: where(server, download["id"])["total"] == size)
        assert_error(server.post(DELETE, {"model_name": HUBBED}), 400, None, "model_name")
        assert server.post(CANCEL, {"id": download["id"]}).status_code == 200
        hub.gate.set()
        listener.wait("download_cancelled", HUBBED)
    assert where(server, download["id"])["state"] == "cancelled"
    assert HUBBED not in names(server)
    again = fetch(server, HUBBED)  # it goes on where it was
    wait_until(lambda: where(server, again["id"])["state"] == "done", 30)
    assert [each["id"] for each in server.get(DOWNLOADS)["downloads"]] == [again["id"], download["id"]]
    assert_error(server.post(CANCEL, {"id": "download-99"}), 400, None, "id")


def test_a_download_that_fails_says_why(server: RunningServer, hub: Hub) -> None:
    hub.corrupt = True
    with Listener(server) as listener:
        download = fetch(server, HUBBED)
        error = listener.wait("download_failed", HUBBED)["data"]["error"]
        assert error["code"] in ("model_checksum_mismatch", "model_source_error")
        assert where(server, download["id"])["error"] == error
    assert HUBBED not in names(server)


def test_only_models_of_the_list_and_of_the_hub_are_fetched(server: RunningServer, hub: Hub) -> None:
    files = ["file:/etc/passwd", "/etc/passwd", "../mine.gguf", "~/.ssh/id_rsa", "mine.gguf", "."]
    others = ["pypi:name==1.0/x.gguf", "hf:o", "http://example.com/x.gguf", "nope", "", "\0", "hf:o/r:" + "Q" * 600]
    for name in files + others:
        assert_error(server.post(DOWNLOAD, {"model_name": name}), 400, None, "model_name")
    assert server.get(DOWNLOADS) == {"downloads": []}
    assert hub.asked == []


def test_a_fetched_model_is_deleted_and_unloaded(server: RunningServer) -> None:
    download = fetch(server, HUBBED)
    wait_until(lambda: where(server, download["id"])["state"] == "done" and HUBBED in names(server), 30)
    assert server.post(LOAD, {"model_name": HUBBED}).json() == "OK"
    answer = server.post(DELETE, {"model_name": "hub"}).json()
    assert answer["status"] == "OK"
    assert answer["files"] == ["starter-Q4_1.gguf"]
    assert answer["freed"] > 90e6
    assert (loaded(server), HUBBED in names(server)) == ([], False)
    assert_error(server.post(COMPLETIONS, {**TINY, "model": HUBBED}), 404, "model_not_found", "model")
    assert_error(server.post(DELETE, {"model_name": HUBBED}), 404, "model_not_found", "model_name")


def test_what_is_being_fetched_under_another_name_is_not_unloaded_to_be_deleted(
    server: RunningServer, hub: Hub
) -> None:
    fetched(server, HUBBED)
    assert server.post(LOAD, {"model_name": HUBBED}).json() == "OK"
    size = len(hub.files["starter-Q4_1.gguf"]) + 1
    hub.publish(starter_Q4_1_gguf=hub.files["starter-Q4_1.gguf"] + b".")
    hub.gate = threading.Event()
    download = fetch(server, "hf:o/r/starter-Q4_1.gguf", update=True)
    wait_until(lambda: where(server, download["id"])["total"] == size)
    assert_error(server.post(DELETE, {"model_name": HUBBED}), 400, None, "model_name")
    assert loaded(server) == [HUBBED]
    hub.gate.set()
    wait_until(lambda: where(server, download["id"])["state"] == "done", 30)


def test_an_update_of_what_is_being_fetched_without_one_is_refused(server: RunningServer, hub: Hub) -> None:
    hub.gate = threading.Event()
    fetch(server, HUBBED)
    assert_error(server.post(DOWNLOAD, {"model_name": HUBBED, "update": True}), 400, None, "update")


def fetched(server: RunningServer, reference: str) -> None:
    """Fetch a model, and wait until it is offered."""
    before = names(server)
    download = fetch(server, reference)
    wait_until(lambda: where(server, download["id"])["state"] == "done" and names(server) != before, 30)


@pytest.mark.parametrize("by_name", [True, False])
def test_a_model_that_only_the_hub_lists_is_deleted_by_its_name_and_by_its_source(
    server: RunningServer, hub: Hub, by_name: bool
) -> None:
    before = names(server)
    hub.files["other-Q8_0.gguf"] = hub.files["starter-Q4_1.gguf"] + b"."
    fetched(server, "hf:o/r:Q8_0")
    (name,) = {*names(server)} - {*before}
    assert server.post(LOAD, {"model_name": name}).json() == "OK"
    answer = server.post(DELETE, {"model": name if by_name else "hf:o/r:Q8_0"}).json()
    assert answer["files"] == ["other-Q8_0.gguf"]
    assert (loaded(server), names(server)) == ([], before)
    assert_error(server.post(DELETE, {"model": name}), 400, None, "model")
    assert_error(server.post(DELETE, {"model": "hf:o/r:Q8_0"}), 404, "model_not_found", "model")


@pytest.mark.parametrize("deleted", ["one", "two", "three"])
def test_all_models_that_lie_in_a_file_are_unloaded_before_it_is_deleted(
    hub: Hub, starter_model: Path, tmp_path: Path, deleted: str
) -> None:
    (tmp_path / "mine.gguf").write_bytes(starter_model.read_bytes())
    models: dict[str, Path | str] = {
        "one": "source: 'hf:o/r:Q4_1'",
        "two": "source: 'hf:o/r:Q4_1', context: 512",
        "three": "source: 'hf:o/r/starter-Q4_1.gguf'",
        MINE: tmp_path / "mine.gguf",
    }
    path = write_registry(tmp_path / "models.yaml", models, SMALL)
    with RunningServer("serve", "--models-file", str(path), environment=settings_for(hub, tmp_path)) as server:
        fetched(server, "one")
        for name in models:
            assert server.post(LOAD, {"model_name": name}).json() == "OK"
        assert set(loaded(server)) == {*models}
        assert_error(server.post(DELETE, {"model_name": MINE}), 400, None, "model_name")
        assert set(loaded(server)) == {*models}
        assert server.post(DELETE, {"model_name": deleted}).status_code == 200
        assert (loaded(server), names(server)) == ([MINE], [MINE])


@pytest.mark.parametrize("path", [DOWNLOAD, DELETE])
def test_fields_that_are_not_known_are_refused(server: RunningServer, hub: Hub, path: str) -> None:
    for field, value in (("modle", HUBBED), ("updaet", True), ("model", MINE)):
        assert_error(server.post(path, {"model_name": HUBBED, field: value}), 400, None, field)
    assert_error(server.post(path, {"model": "nope"}), 400, None, "model")
    assert_error(server.post(CANCEL, {"id": "download-1", "model": HUBBED}), 400, None, "model")
    assert (server.get(DOWNLOADS), hub.asked) == ({"downloads": []}, [])


@pytest.mark.parametrize("waits_for", ["a lock", "the hub"])
def test_a_server_ends_soon_whatever_its_downloads_wait_for(
    server: RunningServer, hub: Hub, tmp_path: Path, waits_for: str
) -> None:
    hub.gate = threading.Event()
    with contextlib.ExitStack() as stack:
        if waits_for == "a lock":
            stack.enter_context(fetching_elsewhere(hub, tmp_path))
        download = fetch(server, "hf:o/r:Q4_1")
        wait_until(lambda: where(server, download["id"])["total"] is not None)
        begun = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - begun < (3 if waits_for == "a lock" else 6)


@contextlib.contextmanager
def fetching_elsewhere(hub: Hub, folder: Path) -> Iterator[None]:
    """Have another process hold the lock of the file that is fetched."""
    command = [sys.executable, "-m", "llamaserve", "pull", "hf:o/r:Q4_1"]
    with subprocess.Popen(command, env=settings_for(hub, folder), cwd=folder, stdout=subprocess.DEVNULL) as pull:
        wait_until(lambda: any((folder / "hf").rglob("*.llamaserve-part")), 30)
        try:
            yield
        finally:
            pull.kill()


def test_what_lies_in_the_models_folder_is_deleted(server: RunningServer, starter_model: Path, tmp_path: Path) -> None:
    assert names(server) == ["link.gguf", MINE, "tiny.gguf"]
    answer = server.post(DELETE, {"model_name": "tiny.gguf"}).json()
    assert (answer["files"], answer["freed"] > 0) == (["tiny.gguf"], True)
    assert text_of(server.post(COMPLETIONS, {**TINY, "model": "link"})) == " Paris."
    answer = server.post(DELETE, {"model_name": "link"}).json()
    assert (answer["files"], answer["freed"]) == (["link.gguf"], 0)
    assert starter_model.exists()  # a link is deleted, never what it leads to
    assert list((tmp_path / "models").iterdir()) == []
    assert (names(server), loaded(server)) == ([MINE], [])


def test_nothing_else_is_deleted(server: RunningServer, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*.gguf"))
    for name in (MINE, "mine.gguf", "../mine.gguf", "/etc/passwd", "file:/etc/passwd", "nope", "", ".", "models"):
        response = server.post(DELETE, {"model_name": name})
        assert response.status_code in (400, 404), name
        assert response.json()["error"]["type"] == "invalid_request_error"
    assert sorted(tmp_path.rglob("*.gguf")) == before
    assert MINE in names(server)
