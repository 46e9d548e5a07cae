"""The installer's decisions: where the llama.cpp binding comes from, and when there is nothing to do."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
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
    assert install.run_visibly(["sh", "-c", "exit 3"], {"PATH": "/usr/bin:/bin"}) == 3
    with pytest.raises(SystemExit, match="exit status 3"):
        install.run_or_stop(["sh", "-c", "exit 3"], {"PATH": "/usr/bin:/bin"})


@pytest.fixture
def commands(install: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What an installation runs instead of pip. What has a word of ``FAILING``, which a test may set, fails."""
    run: list[str] = []

    def pretend(command: Sequence[str], environment: Mapping[str, str]) -> int:
        run.append(" ".join(command))
        return int(environment.get("FAILING", "nothing") in run[-1])

    for name in ("CMAKE_ARGS", "WHEELS", "FAILING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(install, "VENV", tmp_path / "venv")
    monkeypatch.setattr(install, "make_environment", lambda: None)
    monkeypatch.setattr(install, "check_compiler", lambda wheels: None)
    monkeypatch.setattr(install, "run_visibly", pretend)
    return run


def test_speech_is_installed_last_and_from_wheels(install: ModuleType, commands: list[str]) -> None:
    install.main(["fast", "speech", "dev"])
    everything, speech = commands
    assert everything.endswith(f" install --editable {install.ROOT}[dev,fast]")
    assert " install --only-binary :all: av>=" in speech
    assert " pywhispercpp>=" in speech
    install.main(["fast", "speech"])
    assert len(commands) == 2  # nothing is left to do
    install.STAMP.unlink()
    install.main(["fast"])
    assert len(commands) == 3


def test_all_else_is_installed_where_speech_cannot_be(
    install: ModuleType, commands: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAILING", "pywhispercpp")
    install.main(["fast", "speech"])
    said = capsys.readouterr().err
    assert "what speech needs could not be installed" in said
    assert "all else is installed\nThe next `make run` tries again." in said
    assert f"try:   {install.VENV}/bin/python -m pip install 'av>=" in said
    assert install.is_ready(install.fingerprint(["fast"], "", ""))
    install.main(["fast"])
    assert len(commands) == 2


def test_what_speech_needs_is_tried_again_without_all_else(
    install: ModuleType, commands: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAILING", "pywhispercpp")
    install.main(["fast", "speech", "dev"])
    install.main(["fast", "speech"])
    assert capsys.readouterr().err.count("could not be installed") == 2
    monkeypatch.delenv("FAILING")
    install.main(["fast", "speech"])
    assert capsys.readouterr().err.endswith("\ninstalled\n")
    assert [command.count("--editable") for command in commands] == [1, 0, 0, 0]
    assert commands[2] == commands[3]
    assert " --retries 0 " in commands[3]  # nobody waits for it
    install.main(["fast", "speech", "dev"])
    assert len(commands) == 4  # nothing is left to do, and what else is there is not forgotten


def test_images_are_compiled_where_they_are_asked_for(
    install: ModuleType, commands: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install.main(["fast", "speech", "images"])
    everything, speech, images = commands
    assert everything.endswith("[fast]")
    assert " install pillow>=" in images
    assert " stable-diffusion-cpp-python==" in images
    assert " av>=" in speech
    install.main(["fast", "speech"])
    install.main(["fast", "images"])
    assert len(commands) == 3  # nothing is left to do
    there = install.VENV / "lib/python3.11/site-packages/stable_diffusion_cpp_python-0.4.7.dist-info"
    there.mkdir(parents=True)
    install.STAMP.write_text(json.dumps(json.loads(install.STAMP.read_text()) | {"project": "an older one"}))
    install.main(["fast", "speech"])
    assert [command.split(" install ")[1].split(" ")[0] for command in commands[3:]] == [
        "--editable",
        "--only-binary",
        "pillow>=11",
    ]
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=on")
    install.main(["fast", "speech"])
    assert " uninstall --yes llama-cpp-python stable-diffusion-cpp-python" in commands[6]
    assert " --no-binary stable-diffusion-cpp-python --no-cache-dir pillow>=" in commands[9]


def test_images_that_came_otherwise_are_kept_up_to_date(install: ModuleType, commands: list[str]) -> None:
    install.main(["fast"])
    assert len(commands) == 1
    there = install.VENV / "lib/python3.12/site-packages/stable_diffusion_cpp_python-0.4.6.dist-info"
    there.mkdir(parents=True)
    install.main(["fast"])
    install.main(["fast"])
    assert len(commands) == 2
    assert " stable-diffusion-cpp-python==" in commands[1]


def test_images_are_compiled_even_where_speech_cannot_be_installed(
    install: ModuleType, commands: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAILING", "pywhispercpp")
    install.main(["fast", "speech", "images"])
    assert " stable-diffusion-cpp-python==" in commands[2]
    assert not capsys.readouterr().err.endswith("\ninstalled\n")
    assert install.is_ready(install.fingerprint(["fast", "images"], "", ""))


def test_arguments_for_the_compiler_count_where_llama_cpp_comes_ready_made(
    install: ModuleType, commands: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []
    monkeypatch.setattr(install, "add_images", lambda pip, packages, arguments: given.append(arguments))
    monkeypatch.setenv("WHEELS", "cu124")
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=on")
    install.main(["fast", "images"])
    assert given == ["-DSD_CUDA=on"]


def test_images_that_cannot_be_compiled_are_an_error(
    install: ModuleType, commands: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILING", "stable-diffusion")
    with pytest.raises(SystemExit, match="exit status 1"):
        install.main(["fast", "images"])
    assert install.is_ready(install.fingerprint(["fast"], "", ""))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", ""),
        ("-DGGML_METAL=on", "-DSD_METAL=on"),
        ("-DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=89", "-DSD_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=89"),
        ("-DGGML_VULKAN=1 -DGGML_NATIVE=OFF", "-DSD_VULKAN=1 -DGGML_NATIVE=OFF"),
        ("-DGGML_HIP=ON", "-DSD_HIPBLAS=ON"),
        ("-D GGML_CUDA=on -DGGML_MUSA=on", "-DSD_CUDA=on -DSD_MUSA=on"),
    ],
)
def test_both_libraries_are_compiled_for_the_same_gpu(install: ModuleType, arguments: str, expected: str) -> None:
    assert install.image_arguments(arguments) == expected


def test_what_all_else_needs_is_not_tried_twice(
    install: ModuleType, commands: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILING", "--editable")
    with pytest.raises(SystemExit, match="exit status 1"):
        install.main(["fast", "speech"])
    assert len(commands) == 1
    assert not install.STAMP.exists()


def test_pip_compiles_nothing_for_speech(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "unknown-thing-1.0.tar.gz").write_bytes(b"sources that nothing should look at")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert not install.add_speech([sys.executable, "-m", "pip", "--quiet"], ["unknown-thing>=1"])
    said = capfd.readouterr().err
    assert "No matching distribution found for unknown-thing>=1" in said
    assert said.endswith(f"try:   {sys.executable} -m pip install 'unknown-thing>=1'\n")


def test_pip_does_not_wait_for_a_network_that_is_not_there(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    assert not install.add_speech([sys.executable, "-m", "pip", *install.IMPATIENT], ["unknown-thing>=1"])
    said = capfd.readouterr()
    assert "Retrying" not in said.out + said.err
    assert "tries again" in said.err
