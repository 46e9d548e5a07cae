"""Listing, loading and unloading models by command, over HTTP, with the oddities that text-generation-webui's clients
rely on.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from api_helpers import CHAT, COMPLETIONS, TINY, assert_alive, assert_error, streamed
from model_helpers import INFO, LIST, LOAD, LONG, UNLOAD, Listener, finish, loaded, names, text_of, write_registry
from running_server import RunningServer, wait_until

FIRST, SECOND, BAD, NOT_HERE = "smollm2-135m", "model-2", "bad", "not-here"
PROMPT = "/v1/internal/chat-prompt"
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


def not_loadable(weights: bytes) -> bytes:
    """Return a file that looks right and that llama.cpp refuses: a weight has another name."""
    changed = weights.replace(b"blk.7.attn_q.weight", b"blk.7.attn_x.weight")
    assert changed != weights
    return changed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("admin")


@pytest.fixture(scope="module")
def shared(starter_model: Path, folder: Path) -> Iterator[RunningServer]:
    """Two models of models.yaml, a bad one, one that is not here, and a folder with more."""
    (folder / "models" / "sub").mkdir(parents=True)
    for name in ("model-10.gguf", "sub/deep.gguf"):
        (folder / "models" / name).symlink_to(starter_model)
    (folder / "models" / "text.gguf").write_text("this is no model")
    (folder / "bad.gguf").write_bytes(not_loadable(starter_model.read_bytes()))
    models = {FIRST: starter_model, SECOND: starter_model, BAD: folder / "bad.gguf", NOT_HERE: folder / "nowhere.gguf"}
    path = write_registry(folder / "models.yaml", models, aliases=f"starter: {FIRST}")
    environment = {"LLAMASERVE_HEARTBEAT": "0.2", "LLAMASERVE_MEMORY": "1GB"}
    arguments = ("--models-file", str(path), "--models-dir", str(folder / "models"))
    with RunningServer("serve", FIRST, *arguments, environment=environment) as running:
        yield running


@pytest.fixture
def server(shared: RunningServer) -> RunningServer:
    """The server with the first model alone in memory, as its settings say."""
    if loaded(shared) != [FIRST]:
        assert shared.post(UNLOAD, {}).status_code == 200
    assert load(shared).json() == "OK"
    return shared


def load(server: RunningServer, name: str = FIRST, **fields: Any) -> httpx.Response:
    return server.post(LOAD, {"model_name": name, **fields})


def state(server: RunningServer) -> Any:
    """Return all that a failed load must leave as it was."""
    return server.get(INFO), loaded(server), server.worker_pid()


# ---- listing -----------------------------------------------------------------------------------------------------


def test_all_models_that_are_here_are_listed_in_natural_order(server: RunningServer) -> None:
    assert names(server) == [BAD, SECOND, "model-10.gguf", FIRST, "sub/deep.gguf"]


def test_models_lists_the_same_and_the_loaded_first(server: RunningServer) -> None:
    models = server.get("/v1/models")["data"]
    assert sorted(model["id"] for model in models) == sorted(names(server))
    assert models[0]["id"] == FIRST
    assert {model["id"]: model["status"]["value"] for model in models} == {
        name: "loaded" if name == FIRST else "unloaded" for name in names(server)
    }
    assert loaded(server) == [FIRST]


def test_the_sdk_uses_any_of_them(server: RunningServer) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        assert sorted(model.id for model in client.models.list()) == sorted(names(server))
        answer = client.completions.create(model=SECOND, **TINY)
        assert (answer.model, answer.choices[0].text) == (SECOND, " Paris.")
        deep = client.completions.create(model="sub/deep", **TINY)
        assert (deep.model, deep.choices[0].text) == ("sub/deep.gguf", " Paris.")
    assert loaded(server)[0] == FIRST  # the current one is still the one that was loaded by command
    assert server.get(INFO)["model_name"] == FIRST


# ---- loading -----------------------------------------------------------------------------------------------------


def test_a_load_answers_with_a_plain_ok(server: RunningServer) -> None:
    response = load(server, SECOND)
    assert (response.status_code, response.text) == (200, '"OK"')
    assert server.get(INFO)["model_name"] == SECOND
    assert server.post(COMPLETIONS, TINY).json()["model"] == SECOND


@pytest.mark.parametrize("name", ["starter", FIRST])
def test_loading_what_is_loaded_changes_nothing(server: RunningServer, name: str) -> None:
    before = state(server)
    assert load(server, name).json() == "OK"
    assert state(server) == before


def test_a_folder_means_its_first_model(server: RunningServer) -> None:
    assert load(server, "sub").json() == "OK"
    assert server.get(INFO)["model_name"] == "sub/deep.gguf"


def test_a_file_is_found_as_soon_as_it_is_in_the_folder(
    server: RunningServer, folder: Path, starter_model: Path
) -> None:
    new = folder / "models" / "new.gguf"
    new.symlink_to(starter_model)
    try:
        assert load(server, "new").json() == "OK"
        assert server.get(INFO)["model_name"] == "new.gguf"
    finally:
        new.unlink()
        load(server)
    wait_until(lambda: "new.gguf" not in names(server))


@pytest.mark.parametrize(
    "args",
    [
        {"ctx_size": 512, "threads": 1, "batch_size": 64, "cache_type": "q8_0", "flash_attn": True},
        {"n_ctx": 512, "n_threads": 1, "n_batch": 64, "type_k": 8, "type_v": 8, "flash_attn": True},
        {"context": 512, "threads": 1, "batch": 64, "cache_type": "q8_0", "flash_attention": "on"},
    ],
)
def test_every_vocabulary_of_arguments_is_taken(server: RunningServer, args: dict[str, Any]) -> None:
    assert load(server, args=args).json() == "OK"
    info = server.get(INFO)
    now = info["args"]
    assert (info["ctx_size"], now["context"], now["ctx_size"]) == (512, 512, 512)
    assert (now["threads"], now["batch"], now["batch_size"]) == (1, 64, 64)
    assert (now["key_type"], now["value_type"], now["cache_type"]) == ("q8_0", "q8_0", "q8_0")
    assert now["flash_attention"] == "on"
    assert_alive(server)
    assert_error(server.post(COMPLETIONS, {"prompt": "word " * 700}), 400, "context_length_exceeded", "prompt")


def test_arguments_hold_until_the_next_load(server: RunningServer) -> None:
    load(server, args={"ctx_size": 512})
    load(server, args={"threads": 1})
    info = server.get(INFO)
    assert (info["ctx_size"], info["args"]["threads"]) == (1024, 1)


def test_unknown_arguments_are_refused_with_all_their_names(server: RunningServer) -> None:
    before = state(server)
    response = load(server, args={"ctx_sise": 512, "threads": 1, "wings": 2})
    message = assert_error(response, 400, None, "args")
    assert "'ctx_sise' (did you mean ctx_size?)" in message
    assert "'wings'" in message
    assert response.json()["detail"] == message
    assert state(server) == before


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model_name": FIRST, "args": {"n_ctx": "many"}}, "args.n_ctx"),
        ({"model_name": FIRST, "args": {"n_ctx": 512, "ctx_size": 1024}}, "args.ctx_size"),
        ({"model_name": FIRST, "args": {"kv_cells": 128, "flash_attention": "on"}}, "args.kv_cells"),
        ({"model_name": FIRST, "args": [1]}, "args"),
        ({"model_name": FIRST, "settings": {"temperature": -1}}, "settings.temperature"),
        ({"model_name": FIRST, "settings": {"preset": "nope"}}, "preset"),
        ({"model_name": FIRST, "instruction_template": "nope"}, "instruction_template"),
        ({"model_name": FIRST, "keep_alive": "soon"}, "keep_alive"),
        ({"args": {}}, "model_name"),
        ({"model_name": None}, "model_name"),
        ({"model_name": 5}, "model_name"),
        ({"model_name": "x" * 1000}, "model_name"),
    ],
    ids=str,
)
def test_a_malformed_load_is_refused_and_changes_nothing(
    server: RunningServer, body: dict[str, Any], param: str
) -> None:
    before = state(server)
    assert_error(server.post(LOAD, body), 400, None, param)
    assert state(server) == before


@pytest.mark.parametrize(
    "name", ["nope", "", "../bad.gguf", "/etc/passwd", "text.gguf", "hf:o/r:Q4_0", "\0", "sub/../../bad.gguf", NOT_HERE]
)
def test_an_unknown_model_is_not_found(server: RunningServer, name: str) -> None:
    before = state(server)
    assert_error(load(server, name), 404, "model_not_found", "model_name")
    assert state(server) == before


def test_a_path_outside_the_folder_is_not_loaded(server: RunningServer, starter_model: Path) -> None:
    assert_error(load(server, str(starter_model)), 404, "model_not_found", "model_name")


def test_a_verbose_load_says_what_is_in_force(server: RunningServer) -> None:
    fields = {"args": {"n_ctx": 512, "tensorcores": True}, "settings": {"top_k": 5, "theme": "dark"}, "colour": "red"}
    response = load(server, SECOND, verbose=True, **fields)
    answer = response.json()
    assert (answer["status"], answer["model_name"]) == ("OK", SECOND)
    assert answer["effective"] == server.get(INFO)["args"]
    assert answer["effective"]["context"] == 512
    assert answer["settings"] == {"top_k": 5}
    assert answer["ignored"] == ["colour", "args.tensorcores", "settings.theme"]
    assert response.headers["x-llamaserve-ignored"] == "colour, args.tensorcores, settings.theme"
    assert load(server, SECOND, args=answer["effective"]).json() == "OK"  # it is taken back


# ---- defaults of requests ----------------------------------------------------------------------------------------


def test_settings_are_the_defaults_of_its_requests(server: RunningServer) -> None:
    load(server, settings={"max_new_tokens": 3, "temperature": 0, "custom_stopping_strings": '"Paris"'})
    body = {"prompt": "The capital of France is"}
    assert text_of(server.post(COMPLETIONS, body)) == " "
    assert text_of(server.post(COMPLETIONS, body | {"stop": [], "max_tokens": 2})) == " Paris."
    load(server)
    assert server.post(COMPLETIONS, TINY | {"max_tokens": 5}).json()["usage"]["completion_tokens"] == 5


def test_an_instruction_template_reaches_chats(server: RunningServer) -> None:
    own = server.post(PROMPT, HELLO).json()["prompt"]
    load(server, instruction_template="Alpaca")
    by_name = server.post(PROMPT, HELLO).json()["prompt"]
    assert by_name != own
    assert "### Instruction:" in by_name
    source = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    load(server, instruction_template="Alpaca", instruction_template_str=source)
    assert server.post(PROMPT, HELLO).json()["prompt"] == "[user] Hello\n[assistant]"
    assert server.post(CHAT, HELLO | {"max_tokens": 3}).status_code == 200
    load(server)
    assert server.post(PROMPT, HELLO).json()["prompt"] == own


def test_the_old_settings_of_a_template_reach_chats(server: RunningServer) -> None:
    load(server, settings={"instruction_template": "Alpaca", "custom_system_message": "Be brief."})
    prompt = server.post(PROMPT, HELLO).json()["prompt"]
    assert "### Instruction:" in prompt
    assert "Be brief." in prompt


def test_defaults_are_those_of_one_model(server: RunningServer) -> None:
    load(server, SECOND, settings={"max_tokens": 1})
    assert server.post(COMPLETIONS, {"prompt": "One"}).json()["usage"]["completion_tokens"] == 1
    named = {"prompt": "One", "model": FIRST, "logit_bias": {"0": -100, "2": -100}}
    assert server.post(COMPLETIONS, named | {"max_tokens": 4}).json()["usage"]["completion_tokens"] == 4


# ---- loads that fail ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"instruction_template_str": "{% for %}"}, "instruction_template_str"),
        ({"settings": {"instruction_template_str": "{{ a"}}, "settings.instruction_template_str"),
        ({"settings": {"chat_template_str": "{% endif %}"}}, "settings.chat_template_str"),
    ],
)
def test_a_template_that_cannot_be_compiled_is_refused_and_changes_nothing(
    server: RunningServer, fields: dict[str, Any], param: str
) -> None:
    before = state(server)
    assert_error(load(server, **fields), 400, "chat_template_error", param)
    assert state(server) == before


def test_a_bad_file_leaves_the_former_state(server: RunningServer) -> None:
    before = state(server)
    message = assert_error(load(server, BAD), 500, "model_load_failed")
    assert BAD in message
    assert state(server) == before
    assert_alive(server)


def test_a_model_too_large_for_the_memory_is_refused_with_the_numbers(server: RunningServer) -> None:
    before = state(server)
    response = load(server, SECOND, args={"n_ctx": 8192, "parallel": 64})
    message = assert_error(response, 507, "insufficient_memory")
    assert SECOND in message
    assert "and models may use 1.00 GB" in message
    assert "would fit with a context of" in message
    assert state(server) == before
    assert_alive(server)


def test_a_load_that_fails_after_others_had_to_leave_brings_them_back(starter_model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(not_loadable(starter_model.read_bytes()))
    path = write_registry(tmp_path / "models.yaml", {FIRST: starter_model, BAD: tmp_path / "bad.gguf"})
    environment = {"LLAMASERVE_HEARTBEAT": "0.2", "LLAMASERVE_MEMORY": "300MB"}  # one at a time
    with (
        RunningServer("serve", FIRST, "--models-file", str(path), environment=environment) as running,
        Listener(running) as listener,
    ):
        assert_error(load(running, BAD), 500, "model_load_failed")
        assert [event["data"]["reason"] for event in listener.of("unloaded", FIRST)] == ["evicted"]
        listener.wait("loaded", FIRST)
        info = running.get(INFO)
        assert (info["model_name"], info["status"]) == (FIRST, "loaded")
        assert_alive(running)


# ---- loading while others are busy -------------------------------------------------------------------------------


def test_a_stream_goes_on_while_another_model_is_loaded(server: RunningServer) -> None:
    with streamed(server, COMPLETIONS, LONG) as stream:
        next(stream)
        assert load(server, SECOND).json() == "OK"
        assert server.post(COMPLETIONS, TINY).json()["model"] == SECOND
        finish(stream)
    assert sorted(loaded(server)) == sorted([FIRST, SECOND])


def test_a_stream_goes_on_while_its_own_model_is_loaded_anew(server: RunningServer) -> None:
    old = server.worker_pid()
    with streamed(server, COMPLETIONS, LONG) as stream:
        next(stream)
        assert load(server, args={"n_ctx": 512}).json() == "OK"
        assert server.worker_pid() != old
        assert server.get(INFO)["ctx_size"] == 512
        assert_alive(server)
        finish(stream)


def test_its_status_is_told_while_it_is_loaded(server: RunningServer) -> None:
    with Listener(server) as listener:
        assert load(server, SECOND).json() == "OK"
        loaded_event = listener.wait("loaded", SECOND)
        assert loaded_event["data"]["pid"] == server.worker_pid()
        percents = [event["data"]["percent"] for event in listener.of("load_progress", SECOND)]
        assert percents == sorted(percents)
        assert percents[-1] == 100


# ---- unloading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"null", b"{}", b'{"model_name": null}', b'{"model_name": "starter"}'])
def test_after_an_unload_requests_must_name_a_model(server: RunningServer, content: bytes) -> None:
    response = httpx.post(server.url + UNLOAD, content=content, timeout=30)
    assert (response.status_code, response.text) == (200, '"OK"')
    assert server.get(INFO) == {"model_name": "None", "lora_names": [], "loader": None}
    assert loaded(server) == []
    for path, body in ((COMPLETIONS, TINY), (CHAT, HELLO), ("/v1/internal/encode", {"text": "x"})):
        assert_error(server.post(path, body), 503, "model_not_loaded")
    assert text_of(server.post(COMPLETIONS, {**TINY, "model": FIRST})) == " Paris."
    assert loaded(server) == [FIRST]
    assert server.get(INFO)["model_name"] == "None"  # to be named is not to be the current one
    assert load(server).json() == "OK"
    assert_alive(server)


def test_a_template_of_the_request_s_own_is_shown_without_a_model(server: RunningServer) -> None:
    server.post(UNLOAD, {})
    assert server.get(INFO)["model_name"] == "None"
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    own = {"instruction_template_str": source}
    assert server.post(PROMPT, HELLO | own).json()["prompt"] == "<user>Hello"
    for name, value in (("truncation", "auto"), ("truncation_length", 100)):
        response = server.post(PROMPT, HELLO | own | {name: value})  # nobody can count its tokens
        assert response.json()["prompt"] == "<user>Hello"
        assert response.headers["x-llamaserve-ignored"] == name
        assert_error(
            server.post(PROMPT, HELLO | own | {name: value, "strict": True}), 400, "unsupported_parameter", name
        )
    assert "Hello" in server.post(PROMPT, HELLO | {"mode": "chat"}).json()["prompt"]
    for fields in ({}, {"mode": "chat-instruct"}):
        assert_error(server.post(PROMPT, HELLO | fields), 503, "model_not_loaded")
    assert_error(server.post(PROMPT, HELLO | {"model": "nobody"}), 404, "model_not_found", "model")
    assert loaded(server) == []


def test_unloading_nothing_is_ok(server: RunningServer) -> None:
    for _ in range(2):
        assert server.post(UNLOAD, None).json() == "OK"
    assert_error(server.post(UNLOAD, {"model_name": "nope"}), 404, "model_not_found", "model_name")


def test_a_model_is_loaded_and_unloaded_by_the_other_name_of_the_field(server: RunningServer) -> None:
    assert server.post(LOAD, {"model": SECOND}).json() == "OK"
    assert server.get(INFO)["model_name"] == SECOND
    assert server.post(UNLOAD, {"model": SECOND}).json() == "OK"
    assert loaded(server) == [FIRST]
    for path in (LOAD, UNLOAD):
        assert_error(server.post(path, {"model": "nope"}), 404, "model_not_found", "model")
        assert_error(server.post(path, {"model": 5}), 400, None, "model")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"modle": SECOND}, "modle"),
        ({"modle": None}, "modle"),
        ({"name": SECOND}, "name"),
        ({"model_name": SECOND, "model": FIRST}, "model"),
        ({"model_name": SECOND, "force": True}, "force"),
    ],
    ids=str,
)
def test_an_unload_with_a_field_that_is_not_known_unloads_nothing(
    server: RunningServer, body: dict[str, Any], param: str
) -> None:
    load(server, SECOND)
    assert_error(server.post(UNLOAD, body), 400, None, param)
    assert loaded(server) == [SECOND, FIRST]


def test_one_model_is_unloaded_and_the_other_stays(server: RunningServer) -> None:
    load(server, SECOND)
    assert server.post(UNLOAD, {"model_name": FIRST}).json() == "OK"
    assert loaded(server) == [SECOND]
    assert server.get(INFO)["model_name"] == SECOND


def test_an_unload_waits_for_the_answers_under_way(server: RunningServer) -> None:
    with ThreadPoolExecutor(1) as threads, streamed(server, COMPLETIONS, LONG) as stream:
        next(stream)
        unloading = threads.submit(server.post, UNLOAD, {})
        finish(stream)
        assert unloading.result().json() == "OK"
    assert loaded(server) == []


# ---- how long they stay ------------------------------------------------------------------------------------------


def test_keep_alive_of_a_request_ends_with_the_model(server: RunningServer) -> None:
    pid = server.worker_pid()
    with Listener(server) as listener:
        assert server.post(COMPLETIONS, {**TINY, "keep_alive": 0}).status_code == 200
        assert listener.wait("unloaded", FIRST)["data"] == {"reason": "idle", "pid": pid}
    assert loaded(server) == []
    assert server.get(INFO)["model_name"] == FIRST  # after an idle unload its name is still reported
    assert_alive(server)  # and it answers
    assert loaded(server) == [FIRST]


def test_keep_alive_of_a_refused_request_does_not_count(server: RunningServer) -> None:
    pid = server.worker_pid()
    for path, fields in (
        (COMPLETIONS, {"prompt": "word " * 20_000}),
        (COMPLETIONS, {"prompt": "x", "grammar": "root ::= ("}),
        (CHAT, {**HELLO, "instruction_template_str": "{% for %}"}),
        (CHAT, {"messages": [{"role": "user", "content": "word " * 20_000}], "truncation": "auto"}),
    ):
        assert server.post(path, {**fields, "keep_alive": 0}).status_code == 400
    assert_alive(server)
    assert server.worker_pid() == pid


def test_keep_alive_of_a_load_holds_until_the_next_load(server: RunningServer) -> None:
    for fields in ({"keep_alive": "500ms"}, {"args": {"keep_alive": 0.5}}):
        assert load(server, SECOND, **fields).json() == "OK"
        assert server.get(INFO)["model_name"] == SECOND
        wait_until(lambda: loaded(server) == [FIRST])
        assert server.post(COMPLETIONS, TINY).json()["model"] == SECOND
        wait_until(lambda: loaded(server) == [FIRST])
    assert load(server, SECOND).json() == "OK"
    pid = server.worker_pid()
    assert load(server, SECOND, keep_alive="1h", args={"time_limit": 20}).json() == "OK"
    assert server.worker_pid() == pid  # neither is a reason to load it again
    assert load(server, SECOND, keep_alive=0).json() == "OK"
    wait_until(lambda: loaded(server) == [FIRST])


def test_a_request_within_the_time_keeps_it(server: RunningServer) -> None:
    with Listener(server) as listener:
        assert server.post(COMPLETIONS, {**TINY, "keep_alive": "300ms"}).status_code == 200
        assert server.post(COMPLETIONS, {**TINY, "keep_alive": -1}).status_code == 200
        load(server, SECOND, keep_alive="1s")
        listener.wait("unloaded", SECOND)
    assert loaded(server) == [FIRST]


def test_the_routes_are_where_clients_look(server: RunningServer) -> None:
    for path in (LIST, LIST + "/"):
        assert names(server) == httpx.get(server.url + path, timeout=10).json()["model_names"]
    assert httpx.get(server.url + LOAD, timeout=10).status_code == 405
