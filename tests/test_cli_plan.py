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
