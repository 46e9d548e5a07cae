"""The installer's decisions: where the llama.cpp binding comes from, and when there is nothing to do."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "install.py"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "STAMP", tmp_path / "stamp.json")
    return module


@pytest.mark.parametrize(
    ("environment", "system", "machine", "expected"),
    [
        ({}, "Darwin", "arm64", "-DGGML_METAL=on"),
        ({}, "Darwin", "x86_64", ""),
        ({}, "Linux", "aarch64", ""),
        ({"CMAKE_ARGS": "-DGGML_CUDA=on"}, "Linux", "x86_64", "-DGGML_CUDA=on"),
        ({"CMAKE_ARGS": "-DGGML_METAL=off"}, "Darwin", "arm64", "-DGGML_METAL=off"),
    ],
)
def test_metal_is_chosen_on_apple_silicon_only(
    install: ModuleType, environment: dict[str, str], system: str, machine: str, expected: str
) -> None:
    assert install.cmake_args(environment, system, machine) == expected


def test_wheels_come_ready_made_from_the_bindings_index(install: ModuleType) -> None:
    assert install.binding_options("cu124", "") == [
        "--extra-index-url",
        "https://abetlen.github.io/llama-cpp-python/whl/cu124",
        "--only-binary",
        "llama-cpp-python",
    ]


def test_own_cmake_arguments_never_reuse_a_cached_build(install: ModuleType) -> None:
    assert install.binding_options("", "-DGGML_CUDA=on") == ["--no-binary", "llama-cpp-python", "--no-cache-dir"]
    assert install.binding_options("", "") == []


def test_a_second_run_has_nothing_to_do(install: ModuleType) -> None:
    wanted = install.fingerprint(["fast"], "", "")
    assert not install.is_ready(wanted)
    install.STAMP.write_text(json.dumps(install.fingerprint(["fast", "dev"], "", "")))
    assert install.is_ready(wanted)
    assert install.is_ready(install.fingerprint(["dev"], "", ""))
    assert not install.is_ready(install.fingerprint(["fast"], "cpu", ""))
    assert not install.is_ready(install.fingerprint(["fast"], "", "-DGGML_CUDA=on"))
    install.STAMP.write_text("{broken")
    assert not install.is_ready(wanted)


def test_a_binding_that_was_made_another_way_is_replaced(install: ModuleType) -> None:
    assert not install.is_other_binding(install.fingerprint(["fast"], "", "-DGGML_CUDA=on"))  # nothing is there yet
    install.STAMP.write_text(json.dumps(install.fingerprint(["fast"], "", "")))
    assert install.is_other_binding(install.fingerprint(["fast"], "", "-DGGML_CUDA=on"))
    assert install.is_other_binding(install.fingerprint(["fast"], "cpu", ""))
    assert not install.is_other_binding(install.fingerprint(["fast", "dev"], "", ""))


def test_what_is_installed_stays_until_something_else_is_asked_for(install: ModuleType) -> None:
    assert install.wanted_binding({}, "Darwin", "arm64") == ("", "-DGGML_METAL=on")
    install.STAMP.write_text(json.dumps(install.fingerprint(["fast"], "cpu", "")))
    assert install.wanted_binding({}, "Linux", "x86_64") == ("cpu", "")
    assert install.wanted_binding({"WHEELS": ""}, "Linux", "x86_64") == ("cpu", "")
    assert install.wanted_binding({"WHEELS": "cu124"}, "Linux", "x86_64") == ("cu124", "")
    assert install.wanted_binding({"CMAKE_ARGS": ""}, "Linux", "x86_64") == ("", "")
    install.STAMP.write_text(json.dumps(install.fingerprint(["fast"], "", "-DGGML_CUDA=on")))
    assert install.wanted_binding({}, "Linux", "x86_64") == ("", "-DGGML_CUDA=on")


def test_half_an_environment_is_made_anew(install: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(install, "VENV", tmp_path / "venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    install.make_environment()
    python = tmp_path / "venv" / "bin" / "python"
    assert subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=True).stdout
    (tmp_path / "venv" / "kept").touch()
    install.make_environment()
    assert (tmp_path / "venv" / "kept").exists()


def test_a_missing_compiler_is_named_with_advice(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit, match="WHEELS=cpu"):
        install.check_compiler("")
    install.check_compiler("cpu")


def test_a_failing_command_is_an_error(install: ModuleType) -> None:
    with pytest.raises(SystemExit, match="exit status 3"):
        install.run_visibly(["sh", "-c", "exit 3"], {"PATH": "/usr/bin:/bin"})
