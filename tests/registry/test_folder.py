"""The models folder: which files are models, what they are called, and what is wrong with the others."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from diffusion_tensors import CHECKPOINT, DECODER, PARTS, TRANSFORMERS, UNETS, VIDEOS, Shapes, prefixed, write_zeros
from gguf_splitter import split_gguf
from gguf_writer import File, Tensor, tiny_llama
from hypothesis import given, strategies as st
from whisper_writer import whisper_file

from llamaserve import errors
from llamaserve.registry import folder as folder_module
from llamaserve.registry.folder import (
    FoundModel,
    find,
    is_something_else,
    named,
    natural,
    resolve,
    scan,
    stamp,
    without_ending,
)
from llamaserve.registry.gguf import read_header
from llamaserve.registry.spec import load_registry

MODEL = tiny_llama()
SPEECH = whisper_file(ftype=2002).bytes()


def fill(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def names(folder: Path) -> list[str]:
    return [model.name for model in scan(folder)]


def only(folder: Path) -> FoundModel:
    (model,) = scan(folder)
    return model


def test_models_are_named_by_their_place_in_natural_order(tmp_path: Path) -> None:
    files = ("a10.gguf", "a2.gguf", "B/c.gguf", "b/d.GGUF", "A1.gguf", "b/e/f.gguf")
    fill(tmp_path, dict.fromkeys((*files, "notes.txt", "a.gguf.part", ".hidden.gguf", ".cache/x.gguf"), MODEL))
    assert names(tmp_path) == ["A1.gguf", "a2.gguf", "a10.gguf", "B/c.gguf", "b/d.GGUF", "b/e/f.gguf"]
    model = scan(tmp_path)[3]
    assert (model.path, model.size, model.error) == (tmp_path / "B/c.gguf", len(MODEL), None)
    assert model.source == f"file:{tmp_path}/B/c.gguf"


@given(st.lists(st.text("ab019-", max_size=6)))
def test_the_natural_order_is_an_order(texts: list[str]) -> None:
    backwards = list(reversed(texts))
    assert sorted(texts, key=natural) == sorted(backwards, key=natural)
    assert natural("file2") < natural("file10") < natural("file10b")
    assert natural("²") > natural("2")


def test_what_is_no_model_is_left_out(tmp_path: Path) -> None:
    fill(
        tmp_path,
        {
            "adapter.gguf": File({"general.architecture": "llama", "general.type": "adapter"}).bytes(),
            "statistics.gguf": File({"general.type": "imatrix"}).bytes(),
            "eyes.gguf": File({"general.architecture": "clip"}).bytes(),
            "model.gguf": MODEL,
            "pytorch_model.bin": b"PK\x03\x04" + bytes(100),
            "empty.bin": b"",
            "ggml-silero.bin": SPEECH[:4] + bytes(100),
            "gguf.bin": MODEL,
        },
    )
    assert names(tmp_path) == ["model.gguf"]
    assert is_something_else(tmp_path / "pytorch_model.bin")


def test_whisper_files_are_models_too(tmp_path: Path) -> None:
    fill(tmp_path, {"ggml-tiny.bin": SPEECH, "b/ggml-base.en.BIN": SPEECH, "cut.bin": SPEECH[:-1]})
    found = {model.name: model.error for model in scan(tmp_path)}
    assert found == {
        "b/ggml-base.en.BIN": None,
        "cut.bin": f"{tmp_path}/cut.bin is truncated: it ends after {len(SPEECH) - 1} bytes, inside the tensor "
        "'decoder.ln.bias'; at least 1 bytes are missing",
        "ggml-tiny.bin": None,
    }
    assert not any(is_something_else(tmp_path / name) for name in found)
    model = named(tmp_path, "ggml-tiny")
    assert model is not None
    assert (model.name, model.size, model.source) == ("ggml-tiny.bin", len(SPEECH), f"file:{tmp_path}/ggml-tiny.bin")


def test_whole_diffusion_models_are_models_too(tmp_path: Path) -> None:
    fill(tmp_path, {"b/flux2.SafeTensors": MODEL, "sd/v1.safetensors": MODEL})
    write_zeros(tmp_path / "b/flux2.SafeTensors", CHECKPOINT)
    write_zeros(tmp_path / "sd/v1.safetensors", UNETS["SD1"].shapes | prefixed(DECODER, "first_stage_model."))
    assert {model.name: model.error for model in scan(tmp_path)} == {
        "b/flux2.SafeTensors": None,
        "sd/v1.safetensors": None,
    }
    assert not any(is_something_else(model.path) for model in scan(tmp_path))
    model = named(tmp_path, "sd/v1")
    assert model is not None
    path = tmp_path / "sd/v1.safetensors"
    assert (model.path, model.size, model.source) == (path, path.stat().st_size, f"file:{path}")
    assert find(tmp_path, "sd") == model
    assert without_ending("sd/v1.safetensors") == "sd/v1"


def test_other_safetensors_files_are_left_out(tmp_path: Path) -> None:
    others: dict[str, Shapes] = {
        "vae": PARTS["vae"],
        "clip_l": PARTS["clip_l"],
        "llm": PARTS["llm"],
        "lora": {"lora_unet_input_blocks_1_1_proj_in.lora_down.weight": (2, 2)},
        "without parts": TRANSFORMERS["klein"].shapes,
        "without a decoder": {name: shape for name, shape in CHECKPOINT.items() if "first_stage" not in name},
        "without an encoder": {name: shape for name, shape in CHECKPOINT.items() if "text" not in name},
        "video": CHECKPOINT | prefixed(VIDEOS["Wan 2.x"]),
    }
    for name, shapes in others.items():
        write_zeros(tmp_path / f"{name}.safetensors", shapes)
    whole = write_zeros(tmp_path / "whole.safetensors", CHECKPOINT).read_bytes()
    fill(tmp_path, {"cut.safetensors": whole[:-1], "empty.safetensors": b"", "gguf.safetensors": MODEL})
    found = {model.name: model.error or "" for model in scan(tmp_path)}
    assert [*found] == ["cut.safetensors", "empty.safetensors", "whole.safetensors"]
    assert f"its tensors end at byte {len(whole)}, and the file has {len(whole) - 1}" in found["cut.safetensors"]
    assert "empty.safetensors is no good safetensors file: it has 0 bytes" in found["empty.safetensors"]
    assert found["whole.safetensors"] == ""
    assert all(is_something_else(tmp_path / f"{name}.safetensors") for name in others)
    assert not is_something_else(tmp_path / "cut.safetensors")


def test_a_gguf_file_of_a_diffusion_model_is_left_out_or_is_to_be_listed(tmp_path: Path) -> None:
    telling = [Tensor(name, shape[::-1]) for name, shape in CHECKPOINT.items()]
    unfinished = [Tensor(name, shape[::-1]) for name, shape in TRANSFORMERS["klein"].shapes.items()]
    fill(
        tmp_path,
        {
            "named.gguf": File({"general.architecture": "flux"}, telling).bytes(),
            "nameless.gguf": File({}, telling).bytes(),
            "unfinished.gguf": File({}, unfinished).bytes(),
            "part.gguf": File({"general.architecture": "flux"}, unfinished).bytes(),
        },
    )
    found = {model.name: model.error or "" for model in scan(tmp_path)}
    assert found.keys() == {"named.gguf", "nameless.gguf", "unfinished.gguf"}
    advice = "it is a diffusion model; list it in models.yaml with `task: image`"
    assert found["named.gguf"] == found["nameless.gguf"] == advice
    assert "general.architecture" in found["unfinished.gguf"]


def test_a_diffusion_model_that_changes_is_looked_at_again(tmp_path: Path) -> None:
    path = write_zeros(tmp_path / "m.safetensors", PARTS["vae"])
    before = stamp(tmp_path)
    assert names(tmp_path) == []
    write_zeros(path, CHECKPOINT)
    assert names(tmp_path) == ["m.safetensors"]
    assert stamp(tmp_path) != before
    path.unlink()
    assert stamp(tmp_path) == ()


def test_of_two_files_of_one_name_the_gguf_file_is_meant(tmp_path: Path) -> None:
    fill(tmp_path, {"m.bin": SPEECH, "m.gguf": MODEL})
    write_zeros(tmp_path / "m.safetensors", CHECKPOINT)
    for name, meant in (("m", "m.gguf"), ("m.bin", "m.bin"), ("m.safetensors", "m.safetensors")):
        model = named(tmp_path, name)
        assert model is not None
        assert model.name == meant


def test_a_broken_file_is_listed_with_what_is_wrong(tmp_path: Path) -> None:
    fill(tmp_path, {"cut.gguf": MODEL[:-1000], "text.gguf": b"hello", "empty.gguf": b""})
    found = {model.name: model.error or "" for model in scan(tmp_path)}
    assert "truncated" in found["cut.gguf"]
    assert "not a GGUF file" in found["text.gguf"]
    assert "is empty" in found["empty.gguf"]


@pytest.mark.parametrize("name", ["a b.gguf", "_a.gguf", "a..b.gguf", "ä.gguf", "x/+/y.gguf"])
def test_a_name_that_no_request_can_have_is_told(tmp_path: Path, name: str) -> None:
    fill(tmp_path, {name: MODEL})
    model = only(tmp_path)
    assert model.name == name
    assert "cannot be named in a request: a name starts with" in str(model.error)


def test_a_name_that_is_no_text_is_told_and_can_be_shown(tmp_path: Path) -> None:
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.gguf"))).write_bytes(MODEL)
    model = only(tmp_path)
    assert model.name == "\ufffd.gguf"
    assert str(model.error).encode()


def test_of_a_model_in_parts_the_first_is_listed(tmp_path: Path) -> None:
    fill(tmp_path, {"whole.gguf": MODEL})
    paths = split_gguf(tmp_path / "whole.gguf", tmp_path / "s", "m", 3)
    assert names(tmp_path) == ["s/m-00001-of-00003.gguf", "whole.gguf"]
    model = scan(tmp_path)[0]
    assert (model.size, model.error) == (sum(path.stat().st_size for path in paths), None)
    paths[2].unlink()
    assert scan(tmp_path)[0].error == f"part 3 of 3 is missing: {paths[2]}"
    paths[0].unlink()
    assert "is part 2 of 3 of a model" in str(scan(tmp_path)[0].error)
    assert names(tmp_path) == ["s/m-00002-of-00003.gguf", "whole.gguf"]


def test_links_to_files_are_followed_and_those_to_folders_are_not(tmp_path: Path) -> None:
    fill(tmp_path, {"outside/real.gguf": MODEL})
    models = tmp_path / "models"
    models.mkdir()
    (models / "link.gguf").symlink_to(tmp_path / "outside/real.gguf")
    (models / "broken.gguf").symlink_to(tmp_path / "nowhere.gguf")
    (models / "loop").symlink_to(models)
    (models / "outside").symlink_to(tmp_path / "outside")
    os.mkfifo(models / "pipe.gguf")
    assert names(models) == ["link.gguf"]


def test_a_folder_that_lies_too_deep_is_skipped_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    deep = "/".join("a" * (folder_module.MAX_DEPTH + 1))
    fill(tmp_path, {f"{deep[:-2]}/m.gguf": MODEL, f"{deep}/n.gguf": MODEL})
    with caplog.at_level(logging.WARNING):
        assert names(tmp_path) == [f"{deep[:-2]}/m.gguf"]
    assert "lies too deep" in caplog.text


def test_a_folder_of_too_many_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "MAX_ENTRIES", 5)
    fill(tmp_path, {f"{number}.txt": b"" for number in range(6)})
    with pytest.raises(errors.RegistryError, match="holds more than 5 files"):
        scan(tmp_path)


def test_a_folder_that_does_not_exist_is_told(tmp_path: Path) -> None:
    with pytest.raises(errors.RegistryError, match=f"there is no folder {tmp_path}/none"):
        scan(tmp_path / "none")


def test_a_file_is_read_again_only_when_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(folder_module, "read_header", lambda path: read.append(path.name) or read_header(path))
    fill(tmp_path, {"a.gguf": MODEL, "b.gguf": b"broken"})
    for _ in range(3):
        scan(tmp_path)
    assert read == ["a.gguf", "b.gguf"]
    before = stamp(tmp_path)
    fill(tmp_path, {"b.gguf": MODEL})
    assert [model.error for model in scan(tmp_path)] == [None, None]
    assert read == ["a.gguf", "b.gguf", "b.gguf"]
    assert stamp(tmp_path) != before


def test_a_whisper_file_that_comes_or_goes_is_noticed(tmp_path: Path) -> None:
    before = stamp(tmp_path)
    fill(tmp_path, {"m.bin": SPEECH})
    assert stamp(tmp_path) != before
    (tmp_path / "m.bin").unlink()
    assert stamp(tmp_path) == before == ()


def test_a_name_is_found_with_and_without_its_ending_and_a_folder_is_its_first_model(tmp_path: Path) -> None:
    fill(tmp_path, dict.fromkeys(("q/m10.gguf", "q/m9.gguf", "q/deep/a.gguf", "top.gguf"), MODEL))

    def found(name: str) -> str | None:
        model = find(tmp_path, name)
        return model and model.name

    assert found("top") == found("top.gguf") == "top.gguf"
    assert found("q") == found("q/") == "q/m9.gguf"
    assert found("q/deep") == found("q/deep/a") == "q/deep/a.gguf"
    for name in ("", "/", "no", "m9.gguf", "../" + tmp_path.name + "/top.gguf", str(tmp_path / "top.gguf"), "q/../top"):
        assert found(name) is None
    assert named(tmp_path, "q") is None


def test_a_reference_means_the_list_first_then_the_folder_then_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "models"
    fill(models, dict.fromkeys(("listed.gguf", "q/m.gguf"), MODEL))
    fill(tmp_path, {"other/o.gguf": MODEL})
    (tmp_path / "models.yaml").write_text(
        "defaults: {context: 100}\nmodels:\n  listed: {source: 'file:other/o.gguf', context: 200}\n"
    )
    registry = load_registry(tmp_path / "models.yaml")
    monkeypatch.chdir(tmp_path)
    assert resolve(registry, models, "listed")[1].context == 200
    name, spec = resolve(registry, models, "q/m")
    assert (name, spec.source, spec.context) == ("q/m.gguf", f"file:{models}/q/m.gguf", 100)
    assert resolve(registry, models, "other/o.gguf")[0] == "o"
    assert resolve(registry, None, "other/o.gguf")[0] == "o"
    with pytest.raises(errors.ModelFileMissing):
        resolve(registry, None, "q/m.gguf")
