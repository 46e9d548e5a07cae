"""The layers: imports point downward only, each native library is in its place, and the API process loads none."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import llamaserve

PACKAGE = Path(llamaserve.__file__).parent
# Each layer may import from those below it. Modules beside the layers serve all of them.
LAYERS = [
    *(
        "cli",
        "cli_keys",
        "cli_service",
        "cli_settings",
        "cli_doctor",
        "cli_models",
        "cli_plan",
        "cli_usage",
        "cli_plot",
    ),
    *("cli_output", "doctor", "serving", "service", "listening", "connections", "app", "api", "chat", "moderation"),
    *("keys", "usage", "registry"),
    *("worker", "engine", "speech", "images"),
]
SHARED = {"errors", "frames", "heap", "logs", "sandbox", "settings", "__init__"}


def modules() -> dict[str, Path]:
    """Return all modules by dotted name without the package's own."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        found[".".join(path.relative_to(PACKAGE).with_suffix("").parts)] = path
    return found


def imports(path: Path) -> set[str]:
    """Return the dotted names that a module imports, wherever in it, except for type checkers."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer(module: str) -> str:
    return module.split(".")[0]


def test_imports_point_downward() -> None:
    for module, path in modules().items():
        for name in imports(path):
            if not name.startswith("llamaserve."):
                continue
            target = layer(name.removeprefix("llamaserve."))
            if target in SHARED or target == "__version__" or layer(module) in ("__main__", layer(name[11:])):
                continue
            assert layer(module) in LAYERS, f"{module} imports {name}"
            assert LAYERS.index(layer(module)) < LAYERS.index(target), f"{module} imports {name}"


def test_shared_modules_stand_alone() -> None:
    """They may use the errors, and the sandbox frames."""
    for module in SHARED - {"__init__"}:
        used = {n for n in imports(modules()[module]) if n.startswith("llamaserve") and "errors" not in n}
        assert {n.split(".")[1] for n in used} <= ({"frames"} if module == "sandbox" else set())


def test_llama_cpp_is_imported_in_one_module() -> None:
    users = {module for module, path in modules().items() if any(n.startswith("llama_cpp") for n in imports(path))}
    assert users == {"engine.llama"}


def loading(library: str) -> set[str]:
    """Return the modules that import a library, or load it by its name."""
    named = re.compile(rf"import_module\(['\"]{library}\b")
    return {
        module
        for module, path in modules().items()
        if any(name.split(".")[0] == library for name in imports(path)) or named.search(path.read_text())
    }


def test_whisper_cpp_is_loaded_in_one_module_and_without_what_downloads_models() -> None:
    assert loading("_pywhispercpp") == {"speech.whisper"}
    assert loading("pywhispercpp") == set()


def test_ffmpeg_is_loaded_in_the_decoding_process_alone() -> None:
    decoding = {"speech.audio_main", "speech.audio_track"}
    assert loading("av") == decoding
    users = {
        module for module, path in modules().items() for name in decoding if f"llamaserve.{name}" in imported(path)
    }
    assert users == {"speech.audio_main"}


def test_stable_diffusion_cpp_is_loaded_in_one_module() -> None:
    assert loading("stable_diffusion_cpp") == {"images.diffusion"}


def test_pillow_decodes_in_the_reading_process_alone() -> None:
    assert loading("PIL") == {"images.encoding", "images.pictures_main"}
    users = {module for module, path in modules().items() if "llamaserve.images.pictures_main" in imported(path)}
    assert users == set()


def imported(path: Path) -> set[str]:
    """Return the modules that a module imports, and those it imports from."""
    return {each for name in imports(path) for each in (name, name.rpartition(".")[0])}


def test_the_engine_knows_nothing_of_the_web() -> None:
    for module, path in modules().items():
        if layer(module) == "engine":
            assert not {n.split(".")[0] for n in imports(path)} & {"fastapi", "starlette", "pydantic", "json", "yaml"}


def test_the_api_process_loads_neither_llama_cpp_nor_numpy_nor_jinja() -> None:
    heavy = ("llama_cpp", "_pywhispercpp", "av", "stable_diffusion_cpp", "PIL", "numpy", "jinja2", "huggingface_hub")
    heavy += ("llguidance", "gguf")
    check = f"import sys, llamaserve.cli, llamaserve.serving; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
