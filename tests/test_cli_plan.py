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
from rich.console import Console
from tiny_diffusion import write_model
from whisper_writer import whisper_file

from llamaserve import cli_plan
from llamaserve.engine.events import Device
from llamaserve.engine.params import Footprint
from llamaserve.errors import InsufficientMemory
from llamaserve.registry.diffusion_file import read_diffusion
from llamaserve.registry.load_plan import PROCESS
from llamaserve.registry.remedies import Remedies
from llamaserve.registry.spec import ModelSpec, Parts, load_registry

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


def test_models_for_speech_are_planned_without_a_context(folder: Path) -> None:
    (folder / "ear.bin").write_bytes(whisper_file(ftype=2002, n_text_ctx=448).bytes())
    (folder / "cut.bin").write_bytes(whisper_file().bytes()[:-1])
    (folder / "models.yaml").write_text(
        "models:\n"
        "  ear: {source: 'file:ear.bin'}\n"
        "  told: {source: 'file:ear.bin', task: transcription}\n"
        "  chatty: {source: 'file:ear.bin', task: generation}\n"
        "  styled: {source: 'file:ear.bin', lora: [{source: 'file:style.gguf'}]}\n"
        "  deaf: {source: 'file:tiny.gguf', task: transcription}\n"
        "  cut: {source: 'file:cut.bin'}\n"
    )
    answer = as_json(folder, status=1)
    ear, told, *others = answer["models"]
    assert ear == told | {"name": "ear"}
    assert (ear["context"], ear["gpu_layers"], ear["cache"]) == (None, None, 0)
    assert ear["need"] == {"host": ear["weights"] + ear["compute"] + ear["process"], "gpu": 0}
    assert answer["together"] == ["ear", "told"]
    messages = {each["name"]: each["error"]["message"] for each in others}
    assert "do nothing but transcribe speech: generation" in messages["chatty"]
    assert messages["styled"] == "LoRA adapters are for models that generate text"
    assert "none of whisper.cpp's (.bin), which alone transcribe speech" in messages["deaf"]
    assert "cut.bin is truncated" in messages["cut"]
    (row,) = (line.split() for line in plan(folder, "ear").splitlines() if line.startswith("ear "))
    assert (row[-1], len(row)) == ("-", 14)
    assert "\near needs " in plan(folder, "ear", "--memory", "50MB", status=1)


def test_models_for_images_are_planned_with_all_their_parts(folder: Path) -> None:
    model, decoder = write_model(folder)
    header = read_diffusion(model, {"taesd": decoder})
    parts = f"parts: {{taesd: 'file:{decoder.name}'}}"
    (folder / "models.yaml").write_text(
        "models:\n"
        f"  brush: {{source: 'file:{model.name}', {parts}}}\n"
        f"  small: {{source: 'file:{model.name}', {parts}, image: {{size: 64x64}}}}\n"
        f"  told: {{source: 'file:{model.name}', {parts}, task: image}}\n"
        f"  ears: {{source: 'file:{model.name}', {parts}, task: image, pooling: mean}}\n"
        f"  styled: {{source: 'file:{model.name}', {parts}, lora: [{{source: 'file:style.gguf'}}]}}\n"
        f"  bare: {{source: 'file:{model.name}'}}\n"
        "  blind: {source: 'file:tiny.gguf', task: image}\n"
        f"  half: {{source: 'file:{model.name}', parts: {{taesd: 'file:none.safetensors'}}}}\n"
    )
    names = ("brush", "small", "told", "ears", "styled", "bare", "blind", "half")
    answer = as_json(folder, *names, "--memory", "1TB", status=1)
    brush, small, told, *others = answer["models"]
    assert brush == told | {"name": "brush"}
    assert (brush["context"], brush["gpu_layers"], brush["cache"]) == (None, None, 0)
    assert brush["weights"] == small["weights"] == header.weight_bytes
    assert small["compute"] < brush["compute"]
    assert brush["need"] == {"host": brush["weights"] + brush["compute"] + brush["process"], "gpu": 0}
    assert answer["together"] == ["brush", "small", "told"]
    messages = {each["name"]: each["error"]["message"] for each in others}
    assert messages["ears"].startswith("ears can't be loaded: `pooling` and `prefixes` are for models that make")
    assert messages["styled"] == "LoRA adapters are for models that generate text"
    assert "is a FLUX.2 klein model, and its decoder is missing" in messages["bare"]
    assert "tiny.gguf holds no diffusion model that stable-diffusion.cpp knows" in messages["blind"]
    absent = f"the part taesd file:none.safetensors of half is not on this machine: there is no file {folder}/none."
    assert messages["half"].startswith(absent)
    lines = plan(folder, "brush", "bare", status=1).splitlines()
    (row,) = (line.split() for line in lines if line.startswith("brush "))
    assert (row[-1], len(row)) == ("-", 14)
    assert any(line.startswith("bare: ") for line in lines)
    assert "\nbrush needs " in plan(folder, "brush", "--memory", "50MB", status=1)


def test_a_part_that_is_missing_is_told_with_the_command_that_gets_it(folder: Path) -> None:
    model, _ = write_model(folder)
    (folder / "my models.yaml").write_text(
        f"models:\n  far: {{source: 'file:{model.name}', parts: {{taesd: 'hf:o/none/x.safetensors'}}}}\n"
        f"  half: {{source: 'file:{model.name}', parts: {{taesd: 'file:none.safetensors'}}}}\n"
    )
    answer = " ".join(plan(folder, "far", "half", "--models-file", "my models.yaml", status=1).split())
    assert "the part taesd hf:o/none/x.safetensors of far is not on this machine" in answer
    assert "llamaserve pull far --models-file 'my models.yaml'" in answer
    assert "the part taesd file:none.safetensors of half is not on this machine: there is no file" in answer
    assert "${EDITOR:-nano} '" in answer


def test_a_model_for_images_needs_room_in_both_memories_where_there_is_a_gpu(folder: Path) -> None:
    model, decoder = write_model(folder)
    registry, gpu = load_registry(folder / "models.yaml"), Device("CUDA0", "a card", 1 << 34, 1 << 34)
    spec = ModelSpec(source=f"file:{model.name}", parts=Parts(taesd=f"file:{decoder.name}"))
    planned = cli_plan._plan(Remedies(registry, "brush"), spec, Footprint(1 << 40, 1 << 40), [gpu])
    assert planned.plan is not None
    assert planned.plan.need == Footprint(planned.plan.need.device) + Footprint(0, planned.plan.need.device) + PROCESS
    small = cli_plan._plan(Remedies(registry, "brush"), spec, Footprint(1 << 40, 1 << 20), [gpu])
    assert isinstance(small.error, InsufficientMemory)


def test_a_model_for_speech_is_on_a_gpu_without_layers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "ear.bin").write_bytes(whisper_file(ftype=2002).bytes())
    registry = load_registry(folder / "models.yaml")
    remedies, gpu = Remedies(registry, "ear"), Device("CUDA0", "a card", 1 << 34, 1 << 34)
    spec = ModelSpec(source="file:ear.bin")
    planned = cli_plan._plan(remedies, spec, Footprint(1 << 40, 1 << 40), [gpu])
    assert planned.plan is not None
    assert planned.plan.need.device > 0
    Console(width=200).print(cli_plan._table([planned], [gpu]))
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split()[-5:] == ["the", "GPU", "GPU", "layers", "context"]
    assert row.split()[-4:] == [*cli_plan._size(planned.plan.need.device).split(), "-", "-"]
