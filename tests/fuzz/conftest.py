"""A server with a model of each kind, of which a fuzzer may do with as it likes: nothing that it has is needed."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_hub import Hub, running_hub, settings_for
from lora_files import random_lora, shapes_of
from running_server import RunningServer
from tiny_diffusion import image_entry, write_model

from llamaserve.registry.gguf import read_header

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "api"))  # for what the tests of the API share

from fim_model import write_fim_model

SHORT = 0.75

MODELS = """\
defaults:
  {{context: 512, parallel: 4, queue: 64, time_limit: 8, embedding_model: all-minilm-l6-v2, {defaults}}}
models:
  smollm2-135m: {{source: 'file:{starter}'}}
  fim: {{source: 'file:{fim}'}}
  all-minilm-l6-v2: {{source: 'file:{embedding}'}}
  whisper-tiny.en: {{source: 'file:{speech}'}}
  qwen3-0.6b: {{source: 'hf:o/r:Q8_0'}}
{more}
aliases: {{starter: smollm2-135m, whisper-1: whisper-tiny.en, base: whisper-tiny.en}}
"""


@pytest.fixture(scope="session")
def minutes() -> float:
    """How long each fuzzer may take: less than one, unless FUZZ_MINUTES says otherwise."""
    return float(os.environ.get("FUZZ_MINUTES", "0")) or SHORT


@pytest.fixture(scope="session")
def fuzzed_server(
    starter_model: Path, embedding_model: Path, speech_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A real server with small models for all that it can do, links to which lie in a folder of their own."""
    folder = tmp_path_factory.mktemp("fuzzed")
    links = {"starter": starter_model, "embedding": embedding_model, "speech": speech_model}
    for name, path in links.items():
        (folder / f"{name}{path.suffix}").symlink_to(path)
    write_fim_model(starter_model, folder / "fim.gguf")
    (folder / "loras").mkdir()
    random_lora(shapes_of(read_header(starter_model).tensors, "attn_q.weight")).write(folder / "loras/style.gguf")
    defaults, more = "moderation_model: all-minilm-l6-v2, transcription_model: whisper-tiny.en", ""
    if importlib.util.find_spec("stable_diffusion_cpp") is not None:
        defaults += ", image_model: tiny"
        more = f"  tiny: {image_entry(write_model(folder), 'steps: 1, size: 64x64')}"
    files = {name: folder / f"{name}{path.suffix}" for name, path in links.items()}
    models = folder / "models.yaml"
    models.write_text(MODELS.format(**files, fim=folder / "fim.gguf", defaults=defaults, more=more))
    with running_hub(Hub({"m-Q8_0.gguf": starter_model.read_bytes()})) as hub:
        environment = settings_for(hub, folder) | {
            "LLAMASERVE_LORAS_DIR": str(folder / "loras"),
            "LLAMASERVE_MAX_BODY": "262144",
            "LLAMASERVE_HEARTBEAT": "1",
        }
        with RunningServer("serve", "smollm2-135m", "--models-file", str(models), environment=environment) as running:
            yield running
