"""What is on this machine, by the names that commands take."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusion_tensors import CHECKPOINT, PARTS, TRANSFORMERS, write_zeros
from gguf_writer import tiny_llama, tiny_llama_tensors
from local_hub import Hub
from lora_files import random_lora, shapes_of

from llamaserve.registry.inventory import fetched, is_here, models_here
from llamaserve.registry.lock_file import LockFile
from llamaserve.registry.pulling import pull
from llamaserve.registry.spec import ModelSpec, Registry, load_registry


@pytest.fixture
def registry(tmp_path: Path, model_hub: Hub) -> Registry:
    """A models.yaml of which one model is here, with an adapter; and another that was fetched by its source alone."""
    style = random_lora(shapes_of(tiny_llama_tensors())).write(tmp_path / "style.gguf")
    model_hub.files["style.gguf"] = style.read_bytes()
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("a", "found", "shadowed", "little"):
        (folder / f"{name}.gguf").write_bytes(tiny_llama())
    path = tmp_path / "models.yaml"
    path.write_text(
        "defaults: {context: 64}\n"
        "models:\n"
        "  a: {source: 'file:models/a.gguf', lora: [{source: 'hf:o/r/style.gguf'}]}\n"
        "  shadowed.gguf: {source: 'file:none.gguf'}\n"
        "  absent: {source: 'hf:o/r:Q8_0'}\n"
        "aliases: {little.gguf: a}\n"
    )
    registry, lock = load_registry(path), LockFile.beside(path)
    for spec in (registry.models["a"], ModelSpec(source="hf:o/r:Q4_0")):
        pull(registry, spec, lock, lambda *_: None)
    return registry


def test_all_models_are_found_and_each_once(registry: Registry, tmp_path: Path) -> None:
    locked = LockFile.beside(registry.path).entries()
    assert "hf:o/r/style.gguf" in locked
    here = models_here(registry, tmp_path / "models", locked)
    assert [*here] == ["a", "hf:o/r:Q4_0", "found.gguf"]
    assert {spec.context for spec in here.values()} == {64}
    assert [*models_here(registry, None, ())] == ["a"]


def test_what_was_deleted_is_not_here(registry: Registry, tmp_path: Path) -> None:
    assert [*fetched(registry, ["hf:o/r:Q4_0", "hf:o/r:Q8_0", "pypi:a==1/a.gguf"])] == ["hf:o/r:Q4_0"]
    (tmp_path / "models/a.gguf").unlink()
    assert "a" not in models_here(registry, None, ())


def test_a_file_of_several_names_is_one_model(registry: Registry, tmp_path: Path, model_hub: Hub) -> None:
    (tmp_path / "models/sub").mkdir()
    text = registry.path.read_text().replace("file:models/a.gguf", "file:models/sub/../a.gguf")
    registry.path.write_text(text)
    lock = LockFile.beside(registry.path)
    pull(registry, ModelSpec(source="hf:o/r/tiny-Q4_0.gguf"), lock, lambda *_: None)
    pull(registry, ModelSpec(source="hf:o/r:Q8_0"), lock, lambda *_: None)
    pull(registry, ModelSpec(source="hf:o/r/tiny-Q8_0.gguf"), lock, lambda *_: None)
    here = models_here(load_registry(registry.path), tmp_path / "models", lock.entries())
    assert [*here] == ["a", "absent", "hf:o/r/tiny-Q4_0.gguf", "found.gguf"]


def test_an_adapter_that_models_yaml_has_no_more_is_no_model(registry: Registry) -> None:
    registry.path.write_text(registry.path.read_text().replace("hf:o/r/style.gguf", "file:style.gguf"))
    locked = LockFile.beside(registry.path).entries()
    assert "hf:o/r/style.gguf" in locked
    assert [*fetched(load_registry(registry.path), locked)] == ["hf:o/r:Q4_0"]


IN_PARTS = "source: 'file:flux2.safetensors', parts: {vae: 'file:vae.safetensors', llm: 'hf:o/r/llm.safetensors'}"


def test_a_diffusion_model_is_here_only_with_all_its_parts(tmp_path: Path, model_hub: Hub) -> None:
    model, vae = (tmp_path / f"{name}.safetensors" for name in ("flux2", "vae"))
    model_hub.files["llm.safetensors"] = write_zeros(tmp_path / "x", PARTS["llm"]).read_bytes()
    (tmp_path / "models.yaml").write_text(f"models:\n  a: {{{IN_PARTS}}}\n")
    registry = load_registry(tmp_path / "models.yaml")
    spec, lock = registry.models["a"], LockFile.beside(registry.path)
    write_zeros(model, TRANSFORMERS["klein"].shapes)
    write_zeros(vae, PARTS["vae"])
    assert not is_here(registry, spec)
    assert models_here(registry, None, ()) == {}
    pull(registry, spec, lock, lambda *_: None)
    assert is_here(registry, spec)
    assert models_here(registry, None, lock.entries()) == {"a": spec}
    for path in (vae, model):
        data = path.read_bytes()
        path.unlink()
        assert not is_here(registry, spec)
        path.write_bytes(data)
    assert is_here(registry, spec)


def test_parts_are_no_models_also_when_models_yaml_has_them_no_more(tmp_path: Path, model_hub: Hub) -> None:
    for name, shapes in {"llm": PARTS["llm"], "whole": CHECKPOINT}.items():
        model_hub.files[f"{name}.safetensors"] = write_zeros(tmp_path / "x", shapes).read_bytes()
    write_zeros(tmp_path / "flux2.safetensors", TRANSFORMERS["klein"].shapes)
    write_zeros(tmp_path / "vae.safetensors", PARTS["vae"])
    path = tmp_path / "models.yaml"
    path.write_text(f"models:\n  a: {{{IN_PARTS}}}\n")
    registry, lock = load_registry(path), LockFile.beside(path)
    for spec in (registry.models["a"], ModelSpec(source="hf:o/r/whole.safetensors")):
        pull(registry, spec, lock, lambda *_: None)
    assert "hf:o/r/llm.safetensors" in lock.entries()
    assert [*fetched(registry, lock.entries())] == ["hf:o/r/whole.safetensors"]
    path.write_text("models: {}")
    assert [*fetched(load_registry(path), lock.entries())] == ["hf:o/r/whole.safetensors"]


def test_a_diffusion_model_of_the_folder_is_here_and_one_that_models_yaml_has_is_no_other(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("found", "listed"):
        write_zeros(folder / f"{name}.safetensors", CHECKPOINT)
    write_zeros(folder / "vae.safetensors", PARTS["vae"])
    (tmp_path / "models.yaml").write_text("models: {mine: {source: 'file:models/listed.safetensors'}}")
    assert [*models_here(load_registry(tmp_path / "models.yaml"), folder, ())] == ["mine", "found.safetensors"]
