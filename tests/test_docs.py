"""The documentation is complete and true: every route, setting and command is in it, and every example runs."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import typer
from fastapi.routing import APIRoute
from local_hub import Hub, running_hub, settings_for
from lora_files import random_lora, shapes_of
from running_server import RunningServer, wait_until
from tiny_diffusion import image_entry

from llamaserve import cli
from llamaserve.api.audio import AudioRequest
from llamaserve.api.chat_options import ChatRequest
from llamaserve.api.fields import names_of
from llamaserve.api.image_fields import EditRequest
from llamaserve.api.options import GenerationOptions
from llamaserve.api.presets import Presets
from llamaserve.app import _RESOURCES, create_app
from llamaserve.chat.instruction_templates import InstructionTemplates
from llamaserve.engine.params import STAGES, Footprint
from llamaserve.errors import LlamaserveError, _tree
from llamaserve.images.values import PARTS, SAMPLERS, SCHEDULERS
from llamaserve.registry.gguf import read_header
from llamaserve.registry.pool import ModelPool
from llamaserve.registry.spec import Defaults, ImageDefaults, load_registry
from llamaserve.settings import Settings
from llamaserve.usage.database import Database

ROOT = Path(__file__).resolve().parent.parent
SPEECH = ROOT / "tests" / "speech" / "jfk.flac"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def blocks(language: str) -> list[tuple[str, str]]:
    """Return (page, code) of every fenced block in this language."""
    fence = re.compile(rf"```{language}\n(.*?)```", re.DOTALL)
    return [(page.name, code) for page in PAGES for code in fence.findall(page.read_text())]


def examples() -> tuple[list[tuple[str, str]], list[str]]:
    """Return the examples with curl: those that any server can answer, with their pages, and those that change one."""
    found = [block for block in blocks("bash") if "curl" in block[1]]
    changing = re.compile(r"/model/(load|unload|download|delete)|/lora|/events")
    return [each for each in found if not changing.search(each[1])], [
        each[1] for each in found if changing.search(each[1])
    ]


def run(
    code: str, server: RunningServer, *options: str, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    curl = " ".join(("curl -sS --fail-with-body", *options)) + " "
    code = code.replace("http://localhost:5000", server.url).replace("curl ", curl)
    return subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=60, cwd=folder)


def _draw(folder: Path) -> None:
    """Write the pictures that examples send."""
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (96, 64), "steelblue").save(folder / "room.png")
    mask = image.new("RGBA", (96, 64), "black")
    mask.paste((0, 0, 0, 0), (48, 0, 96, 64))
    mask.save(folder / "mask.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that examples send."""
    folder = tmp_path_factory.mktemp("files")
    shutil.copy(SPEECH, folder / "speech.flac")
    _draw(folder)
    return folder


@pytest.fixture(scope="module")
def whole_server(
    starter_model: Path,
    embedding_model: Path,
    speech_model: Path,
    multilingual_speech_model: Path,
    image_model: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RunningServer]:
    """A server with all starter models."""
    models = tmp_path_factory.mktemp("whole") / "models.yaml"
    minilm = "all-minilm-l6-v2"
    models.write_text(
        f"defaults: {{context: 2048, parallel: 4, embedding_model: {minilm}, moderation_model: {minilm}, "
        "image_model: sd-turbo}\n"
        f"models:\n  smollm2-135m: {{source: 'file:{starter_model}'}}\n"
        f"  {minilm}: {{source: 'file:{embedding_model}'}}\n"
        f"  whisper-tiny.en: {{source: 'file:{speech_model}'}}\n"
        f"  whisper-base: {{source: 'file:{multilingual_speech_model}'}}\n"
        f"  sd-turbo: {image_entry(image_model, 'steps: 1, size: 64x64')}\n"
        f"aliases: {{starter: smollm2-135m, text-embedding-3-small: {minilm}, text-embedding-ada-002: {minilm}, "
        "whisper-1: whisper-tiny.en, base: whisper-base, dall-e-2: sd-turbo}\n"
    )
    with RunningServer("serve", "smollm2-135m", "--models-file", str(models)) as running:
        yield running


@pytest.mark.parametrize(("page", "code"), examples()[0])
def test_every_curl_example_is_answered(page: str, code: str, whole_server: RunningServer, folder: Path) -> None:
    done = run(code, whole_server, folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    if "-N" in code:
        assert done.stdout.endswith("data: [DONE]\n\n")
    elif re.search(r"response_format=(text|srt|vtt)", code):
        assert "country" in done.stdout
    else:
        assert json.loads(done.stdout)


@pytest.fixture
def changing_server(starter_model: Path, tmp_path: Path) -> Iterator[RunningServer]:
    """A server with a hub and an adapter, whose models have the names that the examples use."""
    weights = tmp_path / "weights.gguf"
    weights.symlink_to(starter_model)
    (tmp_path / "loras").mkdir()
    random_lora(shapes_of(read_header(starter_model).tensors, "attn_q.weight")).write(tmp_path / "loras/style.gguf")
    models = tmp_path / "models.yaml"
    models.write_text("models:\n  smollm2-135m: {source: file:weights.gguf}\n  qwen3-0.6b: {source: 'hf:o/r:Q8_0'}\n")
    with running_hub(Hub({"m-Q8_0.gguf": starter_model.read_bytes()})) as hub:
        environment = settings_for(hub, tmp_path) | {"LLAMASERVE_LORAS_DIR": str(tmp_path / "loras")}
        with RunningServer("serve", "--models-file", str(models), environment=environment) as running:
            yield running


def downloads(server: RunningServer) -> list[dict[str, str]]:
    listed: list[dict[str, str]] = server.get("/v1/internal/model/downloads")["downloads"]
    return listed


def test_every_curl_example_that_changes_the_server_is_answered(changing_server: RunningServer) -> None:
    server = changing_server
    for code in examples()[1]:
        assert server.post("/v1/internal/model/load", {"model_name": "smollm2-135m"}).json() == "OK"
        assert server.post("/v1/internal/lora/load", {"lora_names": ["style"]}).json() == "OK"
        if "/events" in code:
            done = run(code, server, "--max-time 1")
            assert done.stdout.startswith('data: {"kind":"snapshot"')
            continue
        done = run(code, server)
        assert done.returncode == 0, code + done.stdout + done.stderr
        answer = json.loads(done.stdout)
        assert answer not in ([], {"lora_names": []}, {"downloads": []}), code
        wait_until(lambda: not any(each["state"] == "running" for each in downloads(server)), 30)


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_every_python_example_runs(page: str, code: str, whole_server: RunningServer, folder: Path) -> None:
    code = code.replace("http://localhost:5000", whole_server.url)
    program = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_route_is_documented() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    routes = [route for resource in _RESOURCES for route in resource.router.routes if isinstance(route, APIRoute)]
    offered = {f"{method} {re.sub(r'{.*}', '{id}', route.path)}" for route in routes for method in route.methods or ()}
    offered -= {f"HEAD {path.removeprefix('GET ')}" for path in offered}
    assert offered == set(re.findall(r"^## (\w+ \S+)$", text, re.MULTILINE))
    pool = ModelPool(load_registry(ROOT / "models.yaml"), budget=lambda _: Footprint())
    described = create_app(Settings(), pool).openapi()["paths"]
    assert {route.path.replace(":path", "") for route in routes} == set(described)


def _option_rows() -> dict[str, list[str]]:
    """Return the cells of every row of the tables of options, by the option's name."""
    text = (ROOT / "docs" / "options.md").read_text()
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    names = [row[0].strip(" `") for row in rows]
    assert len(set(names)) == len(names)
    return {name: [cell.strip() for cell in row] for name, row in zip(names, rows, strict=True)}


def test_every_option_is_in_the_table_with_its_names_and_default() -> None:
    rows = _option_rows()
    assert set(rows) == set(GenerationOptions.model_fields)
    for name, (_, others, default, effect, source) in rows.items():
        assert re.findall(r"`(.*?)`", others) == list(names_of(GenerationOptions, name))[1:], name
        value = GenerationOptions.model_fields[name].default
        written = default.strip("`")
        assert written == value or json.loads(written) == value, name
        assert len(effect) > 10
        assert source in {"OpenAI", "text-generation-webui", "llama-server", "vLLM", "llamaserve"}


def test_every_field_of_a_chat_is_documented_with_its_names() -> None:
    text = (ROOT / "docs" / "chat.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    for name in set(ChatRequest.model_fields) - set(GenerationOptions.model_fields):
        row = next((row for row in rows if f"`{name}`" in row), "")
        assert [other for other in names_of(ChatRequest, name) if f"`{other}`" not in row] == [], name


def test_every_field_of_a_transcription_is_documented() -> None:
    text = (ROOT / "docs" / "api.md").read_text().partition("## POST /v1/audio/transcriptions")[2].partition("\n## ")[0]
    assert {name for name in AudioRequest.model_fields if f"`{name}" not in text} == set()


def test_every_field_of_a_picture_is_documented() -> None:
    api = (ROOT / "docs" / "api.md").read_text()
    text = api.partition("## POST /v1/images/generations")[2].partition("## GET /v1/images/files")[0]
    assert {name for name in EditRequest.model_fields if f"`{name}" not in text} == set()
    how = (ROOT / "docs" / "images.md").read_text()
    assert {name for name in (*SAMPLERS, *SCHEDULERS) if f"`{name}`" not in how} == set()
    assert {name for name in (*PARTS, *ImageDefaults.model_fields) if f"`{name}`" not in how} == set()


def test_every_instruction_template_is_documented() -> None:
    text = (ROOT / "docs" / "chat.md").read_text().replace("\n", " ")
    assert [name for name in InstructionTemplates().names() if name not in text] == []


def test_the_order_of_the_stages_is_documented() -> None:
    text = (ROOT / "docs" / "options.md").read_text()
    order = text.partition("2. The stages")[2].partition("3. Mirostat")[0]
    assert tuple(name for name in re.findall(r"`(\w+)`", order) if name in STAGES) == (*STAGES,)


def test_every_preset_is_documented() -> None:
    text = (ROOT / "docs" / "options.md").read_text().partition("## Presets")[2]
    assert {name for name in Presets().names() if f"`{name}`" not in text} == set()


def test_every_error_code_is_documented() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    inner = {
        "internal_error",
        "model_error",
        "registry_error",
        "model_source_error",
        "keys_error",
    }  # bases, and the command line's
    codes = {error.code for error in _tree(LlamaserveError).values() if error.code} - inner
    assert {code for code in codes if f"`{code}`" not in text} == set()


def test_every_setting_is_documented() -> None:
    text = (ROOT / "docs" / "settings.md").read_text()
    assert {name for name in Settings.model_fields if f"LLAMASERVE_{name.upper()}" not in text} == set()


def test_every_model_setting_is_documented() -> None:
    pages = (ROOT / "docs" / "models.md").read_text(), (ROOT / "models.yaml").read_text()
    for text in pages:
        assert {name for name in Defaults.model_fields if name != "model" and name not in text} == set()


def test_every_column_of_the_ledger_is_documented_with_its_type(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "usage.md").read_text().partition("## With SQL")[2]
    Database(tmp_path / "usage.sqlite3").close()
    with closing(sqlite3.connect(tmp_path / "usage.sqlite3")) as connection:
        columns = connection.execute("SELECT name, type FROM pragma_table_info('requests') ORDER BY cid").fetchall()
    assert re.findall(r"^\| `(\w+)` \| ([A-Z]+) \|", text, re.MULTILINE) == columns


def test_every_command_is_documented() -> None:
    text = "".join(page.read_text() for page in PAGES)
    names = set(commands(cli.app))
    assert "service install" in names
    assert {name for name in names if f"llamaserve {name}" not in text} == set()


def commands(app: typer.Typer) -> Iterator[str]:
    """Yield the commands of a command line, those of groups with the group's name."""
    for command in app.registered_commands:
        if command.callback:
            yield command.name or command.callback.__name__
    for group in app.registered_groups:
        assert group.typer_instance is not None
        yield from (f"{group.name} {name}" for name in commands(group.typer_instance))


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
