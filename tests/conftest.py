"""What all tests share: the starter model, cached outside the repository, and a server that runs it."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import hypothesis.configuration
import openai
import pytest
from running_server import RunningServer
from tiny_diffusion import image_entry, write_loras, write_model

from llamaserve.engine.params import LoadParams
from llamaserve.registry.fetching import fetch
from llamaserve.registry.sources import parse_source
from llamaserve.registry.spec import load_registry

hypothesis.settings.register_profile("no files", database=None, deadline=None)
hypothesis.settings.load_profile("no files")
_hypothesis_home = tempfile.TemporaryDirectory(prefix="llamaserve-hypothesis-")  # it keeps more than its database
hypothesis.configuration.set_hypothesis_home_dir(_hypothesis_home.name)

ROOT = Path(__file__).resolve().parent.parent


def pytest_sessionfinish() -> None:
    """Close what bindings open when they are imported and never close, which would be warned of after the last line."""
    for module in ("llama_cpp._utils", "stable_diffusion_cpp._utils"):
        for name in ("outnull_file", "errnull_file"):
            if (utils := sys.modules.get(module)) is not None:
                getattr(utils, name).close()
    _hypothesis_home.cleanup()


@pytest.fixture(scope="session")
def starter_model() -> Path:
    """The GGUF file of the starter model, as `llamaserve pull` fetches it."""
    registry = load_registry(ROOT / "models.yaml")
    _, spec = registry.resolve("starter")
    return fetch(parse_source(spec.source, ROOT), spec.sha256)


@pytest.fixture(scope="session")
def embedding_model() -> Path:
    """The GGUF file of the starter embedding model, all-MiniLM-L6-v2 in F16, as `llamaserve pull` makes it."""
    return _pulled("all-minilm-l6-v2")


@pytest.fixture(scope="session")
def speech_model() -> Path:
    """The ggml file of the English starter model for speech, Whisper tiny.en in F16, as `llamaserve pull` makes it."""
    return _pulled("whisper-tiny.en")


@pytest.fixture(scope="session")
def multilingual_speech_model() -> Path:
    """The ggml file of the other one, Whisper base in F16."""
    return _pulled("whisper-base")


def _pulled(name: str) -> Path:
    registry = load_registry(ROOT / "models.yaml")
    _, spec = registry.resolve(name)
    return fetch(parse_source(spec.source, ROOT), spec.sha256, newest=True)


@pytest.fixture(scope="session")
def speech_server(speech_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A real server with the English starter model for speech, loaded, under the names that programs call it."""
    models = tmp_path_factory.mktemp("speech") / "models.yaml"
    models.write_text(
        "defaults: {transcription_model: whisper-tiny.en}\n"
        f"models:\n  whisper-tiny.en: {{source: 'file:{speech_model}'}}\n"
        "aliases: {whisper-1: whisper-tiny.en, tiny.en: whisper-tiny.en}\n"
    )
    with RunningServer("serve", "whisper-tiny.en", "--models-file", str(models)) as running:
        yield running


@pytest.fixture(scope="session")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The files of a small diffusion model of random weights: the model with its text encoder, and its decoder."""
    if importlib.util.find_spec("stable_diffusion_cpp") is None:
        pytest.skip("stable-diffusion.cpp is not here; `make images` installs it")
    return write_model(tmp_path_factory.mktemp("diffusion"))


@pytest.fixture(scope="session")
def image_server(
    starter_model: Path, image_model: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A real server with the small diffusion model, loaded, and the starter model. It has a folder for LoRAs."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "loras").mkdir()
    models = folder / "models.yaml"
    models.write_text(
        "defaults: {image_model: tiny, context: 1024, parallel: 4}\nmodels:\n"
        f"  tiny: {image_entry(image_model, 'steps: 2, size: 64x64, loras: loras')}\n"
        f"  smollm2-135m: {{source: 'file:{starter_model}'}}\n"
        "aliases: {dall-e-2: tiny}\n"
    )
    write_loras(folder / "loras")
    with RunningServer("serve", "tiny", "--models-file", str(models)) as running:
        yield running


@pytest.fixture(scope="session")
def load_params(starter_model: Path) -> LoadParams:
    """Small settings of the exact level: flash attention off, so that batching does not change a logit."""
    return LoadParams(
        path=str(starter_model),
        context=1024,
        parallel=4,
        kv_cells=4096,
        kv_unified=False,
        batch=256,
        threads=2,
        adaptive_threads=False,
        gpu_layers="none",
        flash_attention="off",
        key_type="f16",
        value_type="f16",
        prefix_cache=True,
        spill=0,
        speculation=True,
    )


@pytest.fixture(scope="session")
def server(starter_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A real server with the starter model under its name and alias, in settings of the exact level."""
    models = tmp_path_factory.mktemp("server") / "models.yaml"
    models.write_text(
        f"defaults: {{context: 2048, parallel: 4, flash_attention: off}}\n"
        f"models:\n  smollm2-135m: {{source: 'file:{starter_model}'}}\n"
        f"aliases: {{starter: smollm2-135m, org/starter: smollm2-135m}}\n"
    )
    with RunningServer("serve", "smollm2-135m", "--models-file", str(models)) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    """The openai SDK, pointed at the server; it does not repeat failed requests."""
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as sdk:
        yield sdk
