"""``llamaserve plan`` as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf_writer import tiny_llama, tiny_llama_tensors
from lora_files import random_lora, shapes_of
from rank_model import RankModel

MODELS = """\
models:
  a-model-with-a-name-that-leaves-little-room: {source: 'file:tiny.gguf'}
  with-a-style: {source: 'file:tiny.gguf', lora: [{source: 'file:style.gguf'}]}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "models.yaml").write_text(MODELS)
    (tmp_path / "tiny.gguf").write_bytes(tiny_llama())
    random_lora(shapes_of(tiny_llama_tensors()), rank=8).write(tmp_path / "style.gguf")
    return tmp_path


def plan(folder: Path, *arguments: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "llamaserve", "plan", "--memory", "2GB", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder,
        env={**os.environ, "LLAMASERVE_CACHE": str(folder / "cache"), "COLUMNS": "60"},
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def as_json(folder: Path, *arguments: str, status: int = 0) -> Any:
    return json.loads(plan(folder, *arguments, "--json", status=status))


def test_the_table_is_whole_however_narrow_the_output_is(folder: Path) -> None:
    lines = plan(folder).splitlines()
    assert "…" not in "".join(lines)
    heading = next(line for line in lines if line.startswith("model "))
    assert heading.split() == ["model", "weights", "cache", "compute", "vocabulary", "process", "together", "context"]
    row = next(line for line in lines if line.startswith("a-model-with-a-name-that-leaves-little-room "))
    assert row.split()[-1] == "128"
    assert len(row) == len(heading)


def test_adapters_are_part_of_the_plan(folder: Path) -> None:
    alone, styled = as_json(folder)["models"]
    size = (folder / "style.gguf").stat().st_size
    assert styled["weights"] >= alone["weights"] + size
    assert styled["need"]["host"] > alone["need"]["host"] + size


def test_an_adapter_that_is_missing_or_of_another_model_is_told(folder: Path) -> None:
    (folder / "style.gguf").unlink()
    answer = as_json(folder, "with-a-style", status=1)
    assert "the LoRA adapter file:style.gguf of with-a-style is not" in answer["models"][0]["error"]["message"]
    (folder / "style.gguf").write_bytes(tiny_llama())
    assert "is no LoRA adapter" in plan(folder, "with-a-style", status=1)


def test_an_error_names_its_model_once(folder: Path) -> None:
    assert "\nwith-a-style needs " in plan(folder, "with-a-style", "--memory", "1MB", status=1)
    (folder / "tiny.gguf").unlink()
    assert "\nwith-a-style is not on this machine" in plan(folder, "with-a-style", status=1)


def test_models_for_vectors_are_planned_without_a_cache_and_with_outputs_of_all_tokens(
    folder: Path, embedding_model: Path
) -> None:
    RankModel().write(folder / "ranker.gguf")
    (folder / "models.yaml").write_text(
        "models:\n"
        f"  minilm: {{source: 'file:{embedding_model}'}}\n"
        f"  short: {{source: 'file:{embedding_model}', context: 128}}\n"
        "  ranker: {source: 'file:ranker.gguf'}\n"
        "  decoder: {source: 'file:tiny.gguf', task: embedding}\n"
        f"  chatty: {{source: 'file:{embedding_model}', task: generation}}\n"
    )
    minilm, short, ranker, decoder, chatty = as_json(folder, status=1)["models"]
    assert (minilm["context"], short["context"], ranker["context"], decoder["context"]) == (512, 128, 96, 128)
    assert minilm["cache"] == short["cache"] == ranker["cache"] == 0
    assert decoder["cache"] > 0
    assert minilm["compute"] - short["compute"] > (512 - 128) * 30522 * 4
    assert chatty["error"]["code"] == "model_not_capable"
    assert "it is an encoder; it can't generate text" in chatty["error"]["message"]
    assert "\nchatty: it is an encoder; it can't generate text" in plan(folder, status=1)
    assert "minilm" in plan(folder, "minilm")
