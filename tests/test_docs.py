"""The documentation is complete and true: every route, setting and command is in it, and every example runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi.routing import APIRoute
from running_server import RunningServer

from llamaserve import cli
from llamaserve.api.chat_options import ChatRequest
from llamaserve.api.fields import names_of
from llamaserve.api.options import GenerationOptions
from llamaserve.api.presets import Presets
from llamaserve.app import create_app
from llamaserve.chat.instruction_templates import InstructionTemplates
from llamaserve.engine.params import STAGES
from llamaserve.errors import LlamaserveError, _tree
from llamaserve.registry.pool import ModelPool
from llamaserve.registry.spec import Defaults
from llamaserve.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def blocks(language: str) -> list[tuple[str, str]]:
    """Return (page, code) of every fenced block in this language."""
    fence = re.compile(rf"```{language}\n(.*?)```", re.DOTALL)
    return [(page.name, code) for page in PAGES for code in fence.findall(page.read_text())]


@pytest.mark.parametrize(("page", "code"), [block for block in blocks("bash") if "curl" in block[1]])
def test_every_curl_example_is_answered(page: str, code: str, server: RunningServer) -> None:
    code = code.replace("http://localhost:5000", server.url).replace("curl ", "curl -sS --fail-with-body ")
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    if "-N" in code:
        assert done.stdout.endswith("data: [DONE]\n\n")
    else:
        assert json.loads(done.stdout)


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_every_python_example_runs(page: str, code: str, server: RunningServer) -> None:
    code = code.replace("http://localhost:5000", server.url)
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_route_is_documented() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    app = create_app(Settings(), ModelPool([], {}))
    documented = set(re.findall(r"^## (\w+ \S+)$", text, re.MULTILINE))
    routes = {
        f"{method} {re.sub(r'{.*}', '{id}', path)}"
        for path, methods in app.openapi()["paths"].items()
        for method in map(str.upper, methods)
    }
    assert routes == documented
    assert not any(isinstance(route, APIRoute) and not route.include_in_schema for route in app.routes)


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
    inner = {"internal_error", "model_error", "registry_error", "model_source_error"}  # bases, and the command line's
    codes = {error.code for error in _tree(LlamaserveError).values() if error.code} - inner
    assert {code for code in codes if f"`{code}`" not in text} == set()


def test_every_setting_is_documented() -> None:
    text = (ROOT / "docs" / "settings.md").read_text()
    assert {name for name in Settings.model_fields if f"LLAMASERVE_{name.upper()}" not in text} == set()


def test_every_model_setting_is_documented() -> None:
    pages = (ROOT / "docs" / "models.md").read_text(), (ROOT / "models.yaml").read_text()
    for text in pages:
        assert {name for name in Defaults.model_fields if name != "model" and name not in text} == set()


def test_every_command_is_documented() -> None:
    text = "".join(page.read_text() for page in PAGES)
    names = {command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback}
    assert {name for name in names if f"llamaserve {name}" not in text} == set()


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
