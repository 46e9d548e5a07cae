"""LoRA adapters over HTTP: by command, at a model's settings, and in a request."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from api_helpers import COMPLETIONS, END_TOKENS, MODEL, assert_error
from lora_files import random_lora, shapes_of
from model_helpers import INFO, LOAD, SMALL, UNLOAD, text_of, write_registry
from running_server import RunningServer

from llamaserve.registry.gguf import read_header

LORA = "/v1/internal/lora"
SCALES = "/lora-adapters"
LISTED = "listed"  # a model whose settings name an adapter
BODY: dict[str, Any] = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 8, "logit_bias": END_TOKENS}


@pytest.fixture(scope="module")
def shared(starter_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The starter model twice, and a folder with adapters for it, for another model, and with other files."""
    folder = tmp_path_factory.mktemp("lora")
    loras = folder / "loras"
    loras.mkdir()
    shapes = shapes_of(read_header(starter_model).tensors, "attn_q.weight", "ffn_down.weight")
    for number, name in enumerate(("style-2", "style-10"), start=1):
        random_lora(shapes, seed=number, size=2.0).write(loras / f"{name}.gguf")
    random_lora({"blk.0.attn_q.weight": (64, 64)}).write(loras / "of-another.gguf")
    (loras / "text.gguf").write_text("this is no adapter")
    (loras / "model.gguf").symlink_to(starter_model)
    adapter = "{source: 'file:loras/style-2.gguf', scale: 0.5, name: calm}"
    models: dict[str, Path | str] = {
        MODEL: starter_model,
        LISTED: f"source: 'file:{starter_model}', lora: [{adapter}]",
    }
    path = write_registry(folder / "models.yaml", models, SMALL)
    environment = {"LLAMASERVE_LORAS_DIR": str(loras)}
    with RunningServer("serve", MODEL, "--models-file", str(path), environment=environment) as running:
        yield running


@pytest.fixture
def server(shared: RunningServer) -> RunningServer:
    """The server with the first model as the current one, without adapters."""
    assert shared.post(LOAD, {"model_name": MODEL}).status_code == 200
    assert shared.post(LORA + "/unload", None).json() == "OK"
    return shared


@pytest.fixture
def plain(server: RunningServer) -> str:
    """What the model says without an adapter."""
    return text_of(server.post(COMPLETIONS, BODY))


def give(server: RunningServer, *names: str, **fields: Any) -> None:
    response = server.post(LORA + "/load", {"lora_names": [*names], **fields})
    assert (response.status_code, response.text) == (200, '"OK"'), response.text


def said(server: RunningServer, **fields: Any) -> str:
    return text_of(server.post(COMPLETIONS, BODY | fields))


def test_adapters_of_the_folder_are_listed_in_natural_order(server: RunningServer) -> None:
    assert server.get(LORA + "/list") == {"lora_names": ["of-another", "style-2", "style-10"]}


def test_an_adapter_changes_answers_until_it_is_unloaded(server: RunningServer, plain: str) -> None:
    give(server, "style-2")
    info = server.get(INFO)
    assert info["lora_names"] == ["style-2"]
    assert info["lora"] == [{"name": "style-2", "scale": 1.0}]
    changed = said(server)
    assert changed != plain
    assert server.post(LORA + "/unload", None).json() == "OK"
    assert server.get(INFO)["lora_names"] == []
    assert said(server) == plain


def test_the_list_is_the_complete_wanted_set(server: RunningServer) -> None:
    give(server, "style-2")
    one = said(server)
    give(server, "style-10")
    assert server.get(INFO)["lora_names"] == ["style-10"]
    assert said(server) != one
    give(server, "style-10", "style-2", scales=[0, 1])
    assert server.get(INFO)["lora"] == [{"name": "style-10", "scale": 0}, {"name": "style-2", "scale": 1}]
    assert said(server) == one
    give(server)
    assert server.get(INFO)["lora_names"] == []


def test_a_request_says_which_adapters_it_wants(server: RunningServer, plain: str) -> None:
    give(server, "style-2", "style-10")
    both = said(server)
    assert said(server, lora=[]) == plain
    assert said(server, lora=[{"id": 0, "scale": 0}]) == plain
    one = said(server, lora=[{"id": 0, "scale": 1}])
    assert one == said(server, lora=[{"id": "style-2", "scale": 1}])
    other = said(server, lora=[{"id": 1, "scale": 1}])
    assert len({plain, both, one, other}) == 4
    assert said(server, lora=[{"id": 1, "scale": 1}, {"id": 0, "scale": 1}]) == both
    assert said(server) == both  # as the server says


def test_requests_with_different_adapters_at_once_answer_as_alone(server: RunningServer) -> None:
    give(server, "style-2", "style-10")
    wishes: list[Any] = [None, [], [{"id": 0, "scale": 1}], [{"id": 1, "scale": 1}], [{"id": 1, "scale": 0.5}]]
    alone = [said(server, lora=wish) for wish in wishes]
    with ThreadPoolExecutor(len(wishes) * 2) as threads:
        assert [*threads.map(lambda wish: said(server, lora=wish), wishes * 2)] == alone * 2


def test_the_sdk_sends_it_as_a_field_of_its_own(server: RunningServer, plain: str) -> None:
    give(server, "style-2")
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        answers = [
            client.completions.create(model=MODEL, **BODY, extra_body={"lora": lora}).choices[0].text
            for lora in ([], [{"id": "style-2", "scale": 1.0}])
        ]
    assert answers == [plain, said(server)]


def test_llama_servers_list_of_scales(server: RunningServer, plain: str) -> None:
    assert server.get(SCALES) == []
    give(server, "style-2", "style-10")
    both = said(server)
    listed = server.get(SCALES)
    assert [(each["id"], each["name"], each["scale"]) for each in listed] == [(0, "style-2", 1), (1, "style-10", 1)]
    assert server.post(SCALES, [{"id": 0, "scale": 1}]).json() == {"success": True}
    assert [each["scale"] for each in server.get(SCALES)] == [1, 0]
    assert said(server) == said(server, lora=[{"id": 0, "scale": 1}])
    assert server.post(SCALES, []).json() == {"success": True}
    assert said(server) == plain
    assert said(server, lora=[{"id": 0, "scale": 1}, {"id": 1, "scale": 1}]) == both  # a request may still have them
    message = assert_error(server.post(SCALES, [{"id": 2, "scale": 1}]), 400, None, "[0].id")
    assert "style-2, style-10" in message
    assert [each["scale"] for each in server.get(SCALES)] == [0, 0]


def test_adapters_of_models_yaml_work_from_the_start_and_can_be_scaled(server: RunningServer, plain: str) -> None:
    changed = said(server, model=LISTED)
    assert changed != plain
    assert server.post(LOAD, {"model_name": LISTED}).json() == "OK"
    assert server.get(LORA + "/list")["lora_names"][0] == "calm"
    assert server.get(INFO)["lora"] == [{"name": "calm", "scale": 0.5}]
    give(server, "calm")
    assert server.get(INFO)["lora"] == [{"name": "calm", "scale": 0.5}]
    give(server, "calm", scales=[1])
    assert said(server) != changed
    assert said(server, lora=[{"id": "calm", "scale": 0.5}]) == changed
    give(server, "calm")  # what models.yaml says
    assert server.get(INFO)["lora"] == [{"name": "calm", "scale": 0.5}]


def test_they_are_still_there_after_an_unload(server: RunningServer, plain: str) -> None:
    give(server, "style-2")
    changed = said(server)
    assert said(server, keep_alive=0) == changed
    assert said(server) == changed != plain


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_names": ["nope"]}, "lora_names"),
        ({"lora_names": ["../loras/style-2"]}, "lora_names"),
        ({"lora_names": ["text"]}, "lora_names"),
        ({"lora_names": ["model"]}, "lora_names"),
        ({"lora_names": ["of-another"]}, "lora_names"),
        ({"lora_names": ["style-2", "style-2"]}, "lora_names[1]"),
        ({"lora_names": ["style-2"], "scales": []}, "scales"),
        ({"lora_names": ["style-2"], "scales": [1000]}, "scales[0]"),
        ({"lora_names": "style-2"}, "lora_names"),
        ({"lora_names": [5]}, "lora_names[0]"),
        ({}, "lora_names"),
        ({"lora_names": [], "scale": [1]}, "scale"),
    ],
    ids=str,
)
def test_adapters_that_cannot_be_had_are_refused_and_nothing_changes(
    server: RunningServer, body: dict[str, Any], param: str
) -> None:
    give(server, "style-10")
    changed = said(server)
    assert_error(server.post(LORA + "/load", body), 400, None, param)
    assert server.get(INFO)["lora_names"] == ["style-10"]
    assert said(server) == changed


def test_an_unload_of_adapters_takes_all_and_says_so(server: RunningServer) -> None:
    give(server, "style-2")
    assert_error(server.post(LORA + "/unload", {"lora_names": ["style-10"]}), 400, None, "lora_names")
    assert server.get(INFO)["lora_names"] == ["style-2"]
    assert server.post(LORA + "/unload", {}).json() == "OK"
    assert server.get(INFO)["lora_names"] == []


def test_a_request_for_an_adapter_that_the_model_lacks_is_refused(server: RunningServer) -> None:
    give(server, "style-2")
    for lora, place in (([{"id": "style-10", "scale": 1}], "lora[0].id"), ([{"id": 1, "scale": 1}], "lora[0].id")):
        for extra in ({}, {"stream": True}):
            message = assert_error(server.post(COMPLETIONS, BODY | extra | {"lora": lora}), 400, None, place)
            assert "style-2" in message


def test_without_a_current_model(server: RunningServer) -> None:
    server.post(UNLOAD, {})
    assert server.get(LORA + "/list")["lora_names"] == ["of-another", "style-2", "style-10"]
    assert server.get(SCALES) == []
    assert server.post(LORA + "/unload", None).json() == "OK"
    assert_error(server.post(LORA + "/load", {"lora_names": []}), 503, "model_not_loaded")
    assert_error(server.post(SCALES, []), 503, "model_not_loaded")
