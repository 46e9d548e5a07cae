"""The Dockerfile and compose.yaml, as far as they can be tried without Docker."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from running_server import RunningServer

from llamaserve import cli
from llamaserve.service.definition import STOP_LIMIT
from llamaserve.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
# Read elsewhere than in `Settings`: docs/settings.md
OTHER_SETTINGS = {"LLAMASERVE_CACHE"}
SETTINGS = {f"LLAMASERVE_{name.upper()}" for name in Settings.model_fields} | OTHER_SETTINGS
OF_COMPOSE = {"LLAMASERVE_MODEL"}  # what compose.yaml alone reads


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions with their arguments."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def arguments(word: str) -> list[str]:
    return [rest for each, rest in instructions() if each == word]


def environment() -> dict[str, str]:
    """Return the variables that the image sets."""
    return dict(pair.split("=", 1) for line in arguments("ENV") for pair in shlex.split(line))


def health_check() -> list[str]:
    (check,) = arguments("HEALTHCHECK")
    command: list[str] = json.loads(check.partition("CMD ")[2])
    return command


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
    return loaded


def ignored(path: str) -> bool:
    """Tell whether .dockerignore keeps a path out of the build; of the lines that fit, the last one decides."""
    found = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#") and fnmatch(path, line.removeprefix("!")):
            found = not line.startswith("!")
    return found


def test_what_is_copied_is_there_and_nothing_else_is_sent() -> None:
    copied = {source for line in arguments("COPY") if not line.startswith("--from") for source in line.split()[:-1]}
    assert copied >= {"pyproject.toml", "llamaserve"}
    for source in copied:
        assert (ROOT / source).exists()
        assert not ignored(source)
    for other in (".git", ".venv", "models", "tests", ".env", "service.env"):
        assert ignored(other)


def test_what_is_copied_is_all_that_the_package_is_built_from() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed |= {*wheel["packages"], *wheel["force-include"]}
    copied = {source.removeprefix("./") for line in arguments("COPY") for source in line.split()[:-1]}
    assert needed <= copied


def test_the_words_that_find_the_binding_do() -> None:
    (line,) = [line for line in arguments("RUN") if "tomllib" in line]
    code = re.search(r'python -c "(.*?)"\)', line)
    assert code is not None
    done = subprocess.run([sys.executable, "-c", code[1]], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"llama-cpp-python==[\d.]+\n", done.stdout)


@pytest.mark.parametrize("wheels", ["", "cpu"])
def test_ready_made_binaries_are_an_option_of_pip(wheels: str, tmp_path: Path) -> None:
    (line,) = [line for line in arguments("RUN") if "tomllib" in line]
    pip = tmp_path / "pip"
    pip.write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
    pip.chmod(0o755)
    words = {**os.environ, "WHEELS": wheels, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = line.replace("/opt/llamaserve/bin/pip", str(pip))
    done = subprocess.run(["sh", "-ec", command], cwd=ROOT, env=words, capture_output=True, text=True, check=True)
    install, cache, *options, binding = done.stdout.splitlines()
    assert (install, cache, binding.partition("==")[0]) == ("install", "--no-cache-dir", "llama-cpp-python")
    index = f"https://abetlen.github.io/llama-cpp-python/whl/{wheels}"
    assert options == (["--extra-index-url", index, "--only-binary", "llama-cpp-python"] if wheels else [])


def test_the_image_runs_as_a_user_of_its_own_and_takes_words_of_llamaserve() -> None:
    assert arguments("USER") == ["llamaserve"]
    assert arguments("ENTRYPOINT") == ['["llamaserve"]']
    (command,) = arguments("CMD")
    assert {each.callback.__name__ for each in cli.app.registered_commands if each.callback} >= {*json.loads(command)}
    assert arguments("EXPOSE") == [environment()["LLAMASERVE_PORT"]]
    made = next(line for line in arguments("RUN") if "useradd" in line)
    for folder in (*json.loads(arguments("VOLUME")[0]), environment()["LLAMASERVE_MODELS_DIR"]):
        assert f" {folder}" in made


def test_every_variable_is_a_setting(compose: dict[str, Any]) -> None:
    text = "\n".join((ROOT / name).read_text() for name in ("Dockerfile", "compose.yaml"))
    assert set(re.findall(r"LLAMASERVE_[A-Z_]+[A-Z]", text)) - OF_COMPOSE <= SETTINGS
    Settings(**{name.removeprefix("LLAMASERVE_").lower(): value for name, value in environment().items()})


def test_the_health_check_says_whether_the_server_answers(server: RunningServer) -> None:
    command = [sys.executable, *health_check()[1:]]
    assert health_check()[0] == "python"
    port = str(urlsplit(server.url).port)
    proxied = {"http_proxy": "http://192.0.2.1:1", "HTTP_PROXY": "http://192.0.2.1:1"}
    healthy = subprocess.run(command, env={"LLAMASERVE_PORT": port, **proxied}, capture_output=True, timeout=30)
    assert healthy.returncode == 0
    sick = subprocess.run(command, env={"LLAMASERVE_PORT": "1"}, capture_output=True, timeout=30)
    assert sick.returncode != 0


def test_the_server_of_compose_is_the_images(compose: dict[str, Any]) -> None:
    service = compose["services"]["llamaserve"]
    assert service["build"] == "."
    assert service["restart"] == "unless-stopped"
    assert service["stop_grace_period"] == f"{STOP_LIMIT}s"
    assert service["ports"] == [f"127.0.0.1:5000:{environment()['LLAMASERVE_PORT']}"]
    named = {volume.split(":")[0]: volume.split(":")[1] for volume in service["volumes"]}
    assert set(named) < set(compose["volumes"])
    assert {*named.values()} == {*json.loads(arguments("VOLUME")[0])}


def test_no_secret_is_in_compose(compose: dict[str, Any]) -> None:
    given = compose["services"]["llamaserve"]["environment"]
    assert "LLAMASERVE_API_KEY" in given  # without a value: it is taken from outside, or not there at all
    assert "HF_TOKEN" in given


def test_the_chat_page_reaches_the_server_by_a_name_that_it_answers_to(compose: dict[str, Any]) -> None:
    page = compose["services"]["open-webui"]
    settings = dict(each.split("=", 1) for each in page["environment"])
    host = urlsplit(settings["OPENAI_API_BASE_URL"])
    assert page["profiles"] == ["chat"]
    assert host.hostname in compose["services"]
    assert str(host.port) == environment()["LLAMASERVE_PORT"]
    (hosts,) = [each for each in compose["services"]["llamaserve"]["environment"] if "ALLOWED_HOSTS" in each]
    assert host.hostname in re.split(r"[-,}]", hosts)
    assert "127.0.0.1" in re.split(r"[-,}]", hosts)  # the health check's


def test_docker_itself_reads_them() -> None:
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
    ):
        pytest.skip("docker with compose is not here")
    done = subprocess.run(["docker", "compose", "config", "--quiet"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
