"""No name in a request leads to a file: whatever it looks like, it is looked up among what there is.

Presets, characters, instruction templates, pictures and LoRA adapters of pictures have such tests beside their others.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from api_helpers import assert_alive, is_error
from audio_files import SPEECH
from model_helpers import loaded, write_registry
from running_server import RunningServer

HALF = "\ud800"  # of a surrogate pair
TRICKS = (
    "../outside.gguf",
    "../outside",
    "sub/../../outside.gguf",
    "%2e%2e%2foutside.gguf",
    "..\\outside.gguf",
    "{folder}/outside.gguf",
    "file:{folder}/outside.gguf",
    "file://{folder}/outside.gguf",
    "../models/inside.gguf",
    "../models.yaml",
    "/etc/passwd",
    "~/outside.gguf",
    ".",
    "..",
    "/",
    "\0",
    "smollm2\0.gguf",
    "smollm2\n",
    "smollm2\r\nx-injected: 1",
    HALF,
    "\a",
    "\u202esmollm2",
    "x" * 5000,
    "../" * 2000 + "outside.gguf",
    "%s%n{{0}}${{HOME}}",
    "hf:../../outside.gguf",
    "pypi:a==1/../outside.gguf",
    "http://127.0.0.1:9/outside.gguf",
)
DONE, REFUSED = (200,), (400, 404)
PARAMS = ("model", "model_name", "id", "prompt_name", "lora", "lora_names")


class Place(NamedTuple):
    """A field for a name: the endpoint, and the body with the name in it."""

    path: str
    body: Callable[[str], Any]
    statuses: tuple[int, ...] = REFUSED


def _message(name: str) -> dict[str, Any]:
    return {"model": name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}


PLACES = {
    "completion": Place("/v1/completions", lambda name: {"model": name, "prompt": "Hi", "max_tokens": 1}),
    "streamed completion": Place("/v1/completions", lambda name: {"model": name, "prompt": "Hi", "stream": True}),
    "chat": Place("/v1/chat/completions", _message),
    "chat prompt": Place("/v1/internal/chat-prompt", _message),
    "fim": Place("/v1/fim/completions", lambda name: {"model": name, "prompt": "a", "suffix": "b"}),
    "infill": Place("/infill", lambda name: {"model": name, "input_prefix": "a", "input_suffix": "b"}),
    "embeddings": Place("/v1/embeddings", lambda name: {"model": name, "input": "a"}),
    "rerank": Place("/v1/rerank", lambda name: {"model": name, "query": "a", "documents": ["b"]}),
    "moderations": Place("/v1/moderations", lambda name: {"model": name, "input": "a"}),
    "pictures": Place("/v1/images/generations", lambda name: {"model": name, "prompt": "a"}),
    "encode": Place("/v1/internal/encode", lambda name: {"model": name, "text": "a"}),
    "logits": Place("/v1/internal/logits", lambda name: {"model": name, "prompt": "a"}),
    "adapter": Place("/v1/completions", lambda name: {"prompt": "a", "lora": [{"id": name, "scale": 1}]}),
    "adapters": Place("/v1/internal/lora/load", lambda name: {"lora_names": [name]}),
    "load": Place("/v1/internal/model/load", lambda name: {"model_name": name}),
    "unload": Place("/v1/internal/model/unload", lambda name: {"model_name": name}),
    "delete": Place("/v1/internal/model/delete", lambda name: {"model_name": name}),
    "download": Place("/v1/internal/model/download", lambda name: {"model_name": name}),
    "cancel": Place("/v1/internal/model/download/cancel", lambda name: {"id": name}),
    "stop": Place("/v1/internal/stop-generation", lambda name: {"id": name}, DONE),  # as for a request that is over
    "embeddings' prompt": Place("/v1/embeddings", lambda name: {"model": "minilm", "input": "a", "prompt_name": name}),
}


class Offered(NamedTuple):
    """A server, and the folder beside whose models there is one that it does not offer."""

    server: RunningServer
    folder: Path

    @property
    def tricks(self) -> list[str]:
        """The names that lead to it, or elsewhere, if anything is done with them."""
        return [trick.format(folder=self.folder) for trick in TRICKS]


@pytest.fixture(scope="module")
def offered(starter_model: Path, embedding_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Offered]:
    folder = tmp_path_factory.mktemp("names")
    (folder / "models" / "sub").mkdir(parents=True)
    (folder / "models" / "inside.gguf").symlink_to(starter_model)
    (folder / "outside.gguf").symlink_to(starter_model)
    (folder / "outside").symlink_to(starter_model)
    path = write_registry(folder / "models.yaml", {"smollm2": starter_model, "minilm": embedding_model})
    options = ("--models-file", str(path), "--models-dir", str(folder / "models"))
    with RunningServer("serve", "smollm2", "minilm", *options, environment={"HOME": str(folder)}) as server:
        yield Offered(server, folder)


@pytest.mark.parametrize("place", PLACES)
def test_a_name_in_a_body_leads_nowhere(offered: Offered, place: str) -> None:
    path, body, statuses = PLACES[place]
    for trick in offered.tricks:
        content = json.dumps(body(trick)).encode()  # as ASCII, with half a surrogate escaped
        response = httpx.post(offered.server.url + path, content=content, timeout=60)
        check(response, trick, statuses)
        if statuses == REFUSED:
            error = response.json()["error"]
            assert error["param"].partition("[")[0] in PARAMS, (trick, error)
            assert "required" not in error["message"], (trick, error)  # it is the name that is no good
    assert_nothing_happened(offered)


def test_a_name_in_a_form_leads_nowhere(offered: Offered) -> None:
    url = offered.server.url + "/v1/audio/transcriptions"
    for trick in offered.tricks:
        if trick != HALF:  # which has no UTF-8
            files = {"file": SPEECH.read_bytes()}
            check(httpx.post(url, data={"model": trick}, files=files, timeout=60), trick)
    assert_nothing_happened(offered)


def test_a_name_in_a_path_leads_nowhere(offered: Offered) -> None:
    for trick in set(offered.tricks) - {"/"}:  # which is the list
        name = trick.encode("utf-8", "surrogatepass")
        for path in {urllib.parse.quote(name, safe=""), urllib.parse.quote(name)}:
            check(unchanged(offered.server, f"/v1/models/{path}"), trick)
    assert_nothing_happened(offered)


def unchanged(server: RunningServer, path: str) -> httpx.Response:
    """Get a path as it is; httpx would take dots out of it."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        return httpx.Response(response.status, headers=response.getheaders(), content=response.read())


def check(response: httpx.Response, trick: str, statuses: tuple[int, ...] = REFUSED) -> None:
    """Check how a request with a trick was answered."""
    assert response.status_code in statuses, (trick, response.text[:300])
    assert response.status_code in DONE or is_error(response), trick
    assert "root:" not in response.text, trick
    assert "x-injected" not in response.headers, trick


def assert_nothing_happened(offered: Offered) -> None:
    """Check that the same models are there as before."""
    server, folder = offered
    assert loaded(server) == ["smollm2", "minilm"]
    assert server.get("/v1/internal/model/downloads")["downloads"] == []
    for name in ("outside.gguf", "outside", "models/inside.gguf", "models.yaml"):
        assert (folder / name).exists()
    assert_alive(server)
