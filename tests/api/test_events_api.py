"""``GET /v1/internal/events``: what happens to models, as a client hears of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_helpers import COMPLETIONS, TINY, assert_alive, assert_error, streamed
from model_helpers import (
    INFO,
    LOAD,
    LONG,
    SMALL,
    UNLOAD,
    Listener,
    finish,
    loaded,
    names,
    replace,
    text_of,
    write_registry,
)
from running_server import RunningServer, wait_until

FIRST, SECOND, THIRD = "first", "second", "third"


@pytest.fixture
def models_file(starter_model: Path, tmp_path: Path) -> Path:
    """Two models, the starter twice."""
    return write_registry(tmp_path / "models.yaml", {FIRST: starter_model, SECOND: starter_model})


@pytest.fixture
def server(models_file: Path) -> Iterator[RunningServer]:
    """A server for one test alone, with the first of the models."""
    (models_file.parent / "models").mkdir()
    arguments = ("--models-file", str(models_file), "--models-dir", str(models_file.parent / "models"))
    with RunningServer("serve", FIRST, *arguments, environment={"LLAMASERVE_HEARTBEAT": "0.2"}) as running:
        yield running


def test_the_first_event_says_how_things_stand(server: RunningServer) -> None:
    with Listener(server) as listener:
        snapshot = listener.events[0]
        assert (snapshot["kind"], snapshot["model"]) == ("snapshot", None)
        assert snapshot["at"] > 1_700_000_000
        assert snapshot["data"] == {
            "current": FIRST,
            "models": [
                {"name": FIRST, "status": "loaded", "percent": 100},
                {"name": SECOND, "status": "unloaded", "percent": 0},
            ],
            "downloads": [],
        }
        wait_until(lambda: ": nothing new" in listener.comments)


def test_a_model_comes_and_goes(server: RunningServer) -> None:
    with Listener(server) as one, Listener(server) as other:
        assert server.post(COMPLETIONS, {**TINY, "model": SECOND}).status_code == 200
        pid = one.wait("loaded", SECOND)["data"]["pid"]
        assert server.post(LOAD, {"model_name": SECOND}).status_code == 200
        assert server.worker_pid() == pid
        assert server.post(UNLOAD, {"model_name": SECOND}).status_code == 200
        assert server.post(COMPLETIONS, {**TINY, "model": FIRST, "keep_alive": 0}).status_code == 200
        one.wait("unloaded", FIRST)
        course = ["loading", "load_progress", "loaded", "unloading", "unloaded"]
        assert one.kinds(SECOND) == course
        assert one.kinds(FIRST) == course[3:]
        assert {event["data"]["reason"] for event in one.of("unloaded", SECOND)} == {"requested"}
        assert {event["data"]["reason"] for event in one.of("unloaded", FIRST)} == {"idle"}
        percents = [event["data"]["percent"] for event in one.of("load_progress", SECOND)]
        assert percents == sorted(percents)
        assert (percents[0] >= 0, percents[-1]) == (True, 100)
        times = [event["at"] for event in one.events]
        assert times == sorted(times)
        other.wait("unloaded", FIRST)
        assert [event for event in other.events if event["model"]] == [event for event in one.events if event["model"]]


def test_a_crash_is_told_with_its_reason(server: RunningServer) -> None:
    with Listener(server) as listener:
        for number in (1, 2, 3):
            os.kill(server.worker_pid(), signal.SIGKILL)
            crashed = listener.wait("crashed", FIRST, number)
            assert crashed["data"]["error"]["code"] == "engine_crashed"
            assert "SIGKILL" in crashed["data"]["error"]["message"]
            assert crashed["data"]["quarantined"] == (number == 3)
            if number < 3:
                assert_alive(server)
        assert_error(server.post(COMPLETIONS, TINY), 503, "model_quarantined")
        assert server.post(LOAD, {"model_name": FIRST}).json() == "OK"  # by hand it is tried again
        assert_alive(server)


def test_a_load_that_fails_is_told_with_its_reason(server: RunningServer, models_file: Path) -> None:
    with Listener(server) as listener:
        bad = models_file.parent / "bad.gguf"
        bad.write_text("no model")
        write_registry(models_file, {FIRST: Path(str(bad)), SECOND: bad})
        listener.wait("registry_reloaded")
        assert_error(server.post(COMPLETIONS, {**TINY, "model": SECOND}), 500, "model_file_invalid")
        assert listener.wait("load_failed", SECOND)["data"]["error"]["code"] == "model_file_invalid"


@pytest.mark.parametrize("hangup", [False, True])
def test_an_edit_of_models_yaml_disturbs_no_stream(
    server: RunningServer, models_file: Path, starter_model: Path, hangup: bool
) -> None:
    with Listener(server) as listener, streamed(server, COMPLETIONS, LONG) as stream:
        next(stream)
        pid = server.worker_pid()
        models: dict[str, Path | str] = {
            FIRST: f"source: 'file:{starter_model}', context: 512",
            THIRD: starter_model,
        }
        write_registry(models_file, models, SMALL, aliases=f"other: {THIRD}")
        if hangup:
            server.process.send_signal(signal.SIGHUP)
        changed = listener.wait("registry_reloaded")["data"]["changed"]
        assert sorted(changed) == [FIRST, SECOND, THIRD]
        assert names(server) == [FIRST, THIRD]
        assert_error(server.post(COMPLETIONS, {**TINY, "model": SECOND}), 404, "model_not_found", "model")
        assert text_of(server.post(COMPLETIONS, {**TINY, "model": "other"})) == " Paris."
        assert text_of(server.post(COMPLETIONS, TINY)) == " Paris."  # by the new one
        assert server.get(INFO)["ctx_size"] == 512
        assert server.worker_pid() != pid
        finish(stream)
        assert listener.wait("unloaded", FIRST)["data"] == {"reason": "replaced", "pid": pid}
        assert listener.of("crashed") == []
    assert sorted(loaded(server)) == [FIRST, THIRD]


def test_a_change_that_matters_to_requests_only_needs_no_new_load(
    server: RunningServer, models_file: Path, starter_model: Path
) -> None:
    pid = server.worker_pid()
    with Listener(server) as listener:
        write_registry(models_file, {FIRST: f"source: 'file:{starter_model}', time_limit: 30", SECOND: starter_model})
        assert listener.wait("registry_reloaded")["data"] == {"changed": [FIRST]}
        assert_alive(server)
        assert server.worker_pid() == pid
        assert listener.of("loading") == []


def test_a_broken_edit_changes_nothing_and_says_so(
    server: RunningServer, models_file: Path, starter_model: Path
) -> None:
    good = models_file.read_text()
    with Listener(server) as listener, streamed(server, COMPLETIONS, LONG) as stream:
        next(stream)
        replace(models_file, good + "  wrong: [\n")
        error = listener.wait("registry_rejected")["data"]["error"]
        assert error["code"] == "registry_error"
        assert "models.yaml:" in error["message"]
        assert names(server) == [FIRST, SECOND]
        server.process.send_signal(signal.SIGHUP)  # the same mistake is not told twice
        replace(models_file, good.replace("models:", "models:\n  third: {source: nonsense}"))
        listener.wait("registry_rejected", count=2)
        assert "third" in listener.of("registry_rejected")[1]["data"]["error"]["message"]
        write_registry(models_file, {FIRST: starter_model, SECOND: starter_model, THIRD: starter_model})
        assert listener.wait("registry_reloaded")["data"] == {"changed": [THIRD]}
        assert names(server) == [FIRST, SECOND, THIRD]
        finish(stream)
    assert any("models.yaml is not reloaded" in line for line in server.lines)


def test_files_of_the_models_folder_come_and_go(server: RunningServer, models_file: Path, starter_model: Path) -> None:
    folder = models_file.parent / "models"
    with Listener(server) as listener:
        (folder / "new.gguf").symlink_to(starter_model)
        assert listener.wait("registry_reloaded")["data"] == {"changed": ["new.gguf"]}
        assert text_of(server.post(COMPLETIONS, {**TINY, "model": "new"})) == " Paris."
        (folder / "new.gguf").unlink()
        assert listener.wait("registry_reloaded", count=2)["data"] == {"changed": ["new.gguf"]}
        assert listener.wait("unloaded", "new.gguf")["data"]["reason"] == "replaced"
        assert_error(server.post(COMPLETIONS, {**TINY, "model": "new"}), 404, "model_not_found", "model")


def test_a_server_ends_with_listeners(models_file: Path) -> None:
    environment = {"LLAMASERVE_HEARTBEAT": "0.2"}
    with RunningServer("serve", "--models-file", str(models_file), environment=environment) as running:
        listener = Listener(running)
        with listener:
            wait_until(lambda: bool(listener.events))
            assert running.stop() in (0, 130)
