"""What verify finds, and that each of its commands mends it or shows more of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from diffusion_tensors import CHECKPOINT, PARTS, TRANSFORMERS, write_zeros
from gguf_writer import tiny_llama, tiny_llama_tensors
from local_hub import COMMIT, Hub
from lora_files import random_lora, shapes_of
from whisper_writer import whisper_file

from llamaserve.registry.fetching import locate
from llamaserve.registry.lock_file import LockFile
from llamaserve.registry.pulling import pull
from llamaserve.registry.sources import HubSource
from llamaserve.registry.spec import ModelSpec, load_registry
from llamaserve.registry.verifying import Finding, verify_model

OPTIONS = ("--models-file", "my models.yaml")
EDITOR = "${EDITOR:-nano} "


class Desk:
    """A models.yaml in a folder; findings are those for a user who named it by an option."""

    def __init__(self, folder: Path, models: str) -> None:
        self.path = folder / "my models.yaml"
        self.path.write_text(f"models: {{{models}}}")
        self.registry = load_registry(self.path)
        self.lock = LockFile.beside(self.path)
        self.edit = f"{EDITOR}'{self.path}'"

    def pull(self, name: str) -> None:
        pull(self.registry, self.registry.models[name], self.lock, lambda *_: None)

    def verify(self, name: str) -> list[Finding]:
        found = verify_model(self.registry, name, self.registry.models[name], self.lock, OPTIONS)
        for finding in found:  # a shell must understand it, and find a program
            subprocess.run(["bash", "-n", "-c", finding.fix], check=True)
            assert finding.fix.startswith(("llamaserve ", EDITOR, "ls -l ", "chmod u+r "))
        return found


def lora(path: Path) -> bytes:
    return random_lora(shapes_of(tiny_llama_tensors())).write(path).read_bytes()


def test_commands_see_the_same_models(tmp_path: Path, model_hub: Hub) -> None:
    desk = Desk(tmp_path, "tiny: {source: 'hf:o/r:Q4_0'}")
    (finding,) = desk.verify("tiny")
    assert finding.fix == "llamaserve pull tiny --models-file 'my models.yaml'"
    desk.pull("tiny")
    path = locate(HubSource("o/r", quant="Q4_0"))
    assert path is not None
    path.resolve().write_bytes(path.read_bytes()[:-1] + b"x")
    again = "llamaserve rm --yes tiny {0} && llamaserve pull tiny {0}".format("--models-file 'my models.yaml'")
    assert {finding.fix for finding in desk.verify("tiny")} == {again}


def test_a_users_own_file_that_is_missing_is_a_line_to_correct(tmp_path: Path) -> None:
    desk = Desk(tmp_path, "a: {source: 'file:aa.gguf'}, b: {source: 'file:none/b.gguf'}, c: {source: 'file:folder'}")
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.gguf").write_bytes(tiny_llama())
    for name, told in (("a", f"In {tmp_path} there is a.gguf"), ("b", "There is no folder"), ("c", "is a folder")):
        (finding,) = desk.verify(name)
        assert told in finding.problem
        assert finding.fix == desk.edit


def test_a_users_own_file_that_is_damaged_is_shown(tmp_path: Path) -> None:
    desk = Desk(tmp_path, "cut: {source: 'file:cut.gguf'}, junk: {source: 'file:junk.gguf'}")
    (tmp_path / "cut.gguf").write_bytes(tiny_llama()[:-100])
    (tmp_path / "junk.gguf").write_bytes(b"hello")
    for name in ("cut", "junk"):
        (finding,) = desk.verify(name)
        assert finding.fix == f"ls -l {tmp_path}/{name}.gguf"


def test_a_users_own_file_of_another_sum_is_accepted_or_corrected(tmp_path: Path) -> None:
    desk = Desk(tmp_path, f"a: {{source: 'file:a.gguf'}}, b: {{source: 'file:a.gguf', sha256: {'f' * 64}}}")
    (tmp_path / "a.gguf").write_bytes(tiny_llama())
    (finding,) = desk.verify("b")
    assert finding.fix == desk.edit
    desk.pull("a")
    (tmp_path / "a.gguf").write_bytes(tiny_llama()[:-1] + b"x")
    (finding,) = desk.verify("a")
    assert finding.fix == "llamaserve pull a --update --models-file 'my models.yaml'"


def test_a_file_as_promised_that_cannot_be_loaded_is_not_fetched_again(tmp_path: Path, model_hub: Hub) -> None:
    model_hub.files["bad-Q8_0.gguf"] = tiny_llama(llama__block_count=0)
    desk = Desk(tmp_path, "bad: {source: 'hf:o/r/bad-Q8_0.gguf'}")
    desk.pull("bad")
    (finding,) = desk.verify("bad")
    assert "block_count is 0" in finding.problem
    assert "the file is not damaged: it is as models.lock promises" in finding.problem
    assert finding.fix == desk.edit
    spec = ModelSpec(source="hf:o/r/bad-Q8_0.gguf")  # by its source, models.yaml does not have it
    (finding,) = verify_model(desk.registry, spec.source, spec, desk.lock)
    assert finding.fix == "llamaserve models"


def test_a_file_that_nobody_promised_is_fetched_again_if_it_cannot_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMASERVE_CACHE", str(tmp_path / "cache"))
    desk = Desk(tmp_path, "w: {source: 'pypi:foo==1.0/foo/m.gguf'}")
    path = tmp_path / "cache/models/pypi/foo-1.0/foo/m.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(tiny_llama()[:-100])
    (finding,) = desk.verify("w")
    assert "is truncated" in finding.problem
    assert finding.fix.startswith("llamaserve rm --yes w ")


@pytest.mark.parametrize("promised_by", ["the hub", "models.lock"])
def test_a_wrong_sum_in_models_yaml_is_corrected_and_the_good_file_stays(
    tmp_path: Path, model_hub: Hub, promised_by: str
) -> None:
    desk = Desk(tmp_path, f"a: {{source: 'hf:o/r:Q4_0', sha256: {'f' * 64}}}")
    pull(desk.registry, ModelSpec(source="hf:o/r:Q4_0"), desk.lock, lambda *_: None)
    if promised_by == "the hub":
        desk.lock.path.unlink()
    (finding,) = desk.verify("a")
    assert f"not damaged: it is as {promised_by} promises" in finding.problem
    assert finding.fix == desk.edit


def test_an_update_for_a_users_own_adapter_is_said_to_be_one_of_the_model_too(tmp_path: Path, model_hub: Hub) -> None:
    desk = Desk(tmp_path, "a: {source: 'hf:o/r:Q4_0', lora: [{source: 'file:style.gguf'}]}")
    lora(tmp_path / "style.gguf")
    desk.pull("a")
    random_lora(shapes_of(tiny_llama_tensors()), rank=3).write(tmp_path / "style.gguf")
    (finding,) = desk.verify("a")
    assert finding.problem.endswith("(the command also fetches the newest version of hf:o/r:Q4_0)")
    assert finding.fix == "llamaserve pull a --update --models-file 'my models.yaml'"


def test_an_adapter_must_go_with_its_model(tmp_path: Path) -> None:
    desk = Desk(tmp_path, "a: {source: 'file:a.gguf', lora: [{source: 'file:style.gguf'}]}")
    (tmp_path / "a.gguf").write_bytes(tiny_llama())
    (finding,) = desk.verify("a")
    absent = f"the LoRA adapter file:style.gguf is not on this machine: there is no file {tmp_path}/style.gguf"
    assert (finding.problem.split(";")[0], finding.fix) == (absent, desk.edit)
    (tmp_path / "style.gguf").write_bytes(b"xxxxxxxxxxxx")
    (finding,) = desk.verify("a")
    assert ("is not a GGUF file" in finding.problem, finding.fix) == (True, f"ls -l {tmp_path}/style.gguf")
    (tmp_path / "style.gguf").write_bytes(tiny_llama())
    (finding,) = desk.verify("a")
    assert ("is no LoRA adapter" in finding.problem, finding.fix) == (True, desk.edit)
    lora(tmp_path / "style.gguf")
    assert desk.verify("a") == []


def test_a_damaged_adapter_is_fetched_again_and_the_model_stays(tmp_path: Path, model_hub: Hub) -> None:
    model_hub.files["style.gguf"] = lora(tmp_path / "x.gguf")
    desk = Desk(tmp_path, "a: {source: 'file:a.gguf', lora: [{source: 'hf:o/r/style.gguf'}]}")
    (tmp_path / "a.gguf").write_bytes(tiny_llama())
    (finding,) = desk.verify("a")
    assert finding.problem == "the LoRA adapter hf:o/r/style.gguf is not on this machine"
    assert finding.fix == "llamaserve pull a --models-file 'my models.yaml'"
    desk.pull("a")
    assert desk.verify("a") == []
    path = locate(HubSource("o/r", "style.gguf", revision=COMMIT))
    assert path is not None
    path.resolve().write_bytes(path.read_bytes()[:-1] + b"x")
    again = "llamaserve rm --yes hf:o/r/style.gguf {0} && llamaserve pull a {0}"
    assert {finding.fix for finding in desk.verify("a")} == {again.format("--models-file 'my models.yaml'")}


@pytest.mark.parametrize("what", ["part", "folder"])
def test_a_model_of_the_folder_has_no_line_to_correct(tmp_path: Path, what: str) -> None:
    desk = Desk(tmp_path, "")
    source = "file:m-00001-of-00002.gguf" if what == "part" else "file:sub/x.gguf"
    spec = ModelSpec(source=source)
    (finding,) = verify_model(desk.registry, "m", spec, desk.lock)
    assert finding.fix == f"ls -l {tmp_path}" + ("" if what == "part" else "/sub")


# ---- speech


EAR = whisper_file(ftype=2002).bytes()


def test_a_whisper_model_is_read_too(tmp_path: Path) -> None:
    desk = Desk(tmp_path, "a: {source: 'file:a.bin'}, cut: {source: 'file:cut.bin'}, other: {source: 'file:other.BIN'}")
    (tmp_path / "a.bin").write_bytes(EAR)
    (tmp_path / "cut.bin").write_bytes(EAR[:-100])
    (tmp_path / "other.BIN").write_bytes(tiny_llama())
    assert desk.verify("a") == []
    for name, file, told in (("cut", "cut.bin", "is truncated"), ("other", "other.BIN", "it is a GGUF file")):
        (finding,) = desk.verify(name)
        assert told in finding.problem
        assert finding.fix == f"ls -l {tmp_path}/{file}"


def test_a_damaged_whisper_model_is_fetched_again_and_one_as_promised_is_not(tmp_path: Path, model_hub: Hub) -> None:
    model_hub.files |= {"ggml-ear.bin": EAR, "ggml-bad.bin": whisper_file(n_text_layer=99).bytes()}
    desk = Desk(tmp_path, "ear: {source: 'hf:o/r/ggml-ear.bin'}, bad: {source: 'hf:o/r/ggml-bad.bin'}")
    desk.pull("ear")
    assert desk.verify("ear") == []
    path = locate(HubSource("o/r", "ggml-ear.bin"))
    assert path is not None
    path.resolve().write_bytes(EAR[:-1] + b"x")
    again = "llamaserve rm --yes ear {0} && llamaserve pull ear {0}".format("--models-file 'my models.yaml'")
    assert {finding.fix for finding in desk.verify("ear")} == {again}
    desk.pull("bad")
    (finding,) = desk.verify("bad")
    assert "n_text_layer is 99" in finding.problem
    assert "the file is not damaged: it is as models.lock promises" in finding.problem
    assert finding.fix == desk.edit


# ---- images


def image_files(folder: Path) -> None:
    write_zeros(folder / "flux2.safetensors", TRANSFORMERS["klein"].shapes)
    for part in ("llm", "vae"):
        write_zeros(folder / f"{part}.safetensors", PARTS[part])


OWN = "source: 'file:flux2.safetensors', parts: {vae: 'file:vae.safetensors', llm: 'file:llm.safetensors'}"
OF_HUB = "source: 'hf:o/r/flux2.safetensors', parts: {vae: 'hf:o/r/vae.safetensors', llm: 'file:llm.safetensors'}"


def test_a_diffusion_model_is_read_with_its_parts(tmp_path: Path) -> None:
    image_files(tmp_path)
    desk = Desk(tmp_path, f"a: {{{OWN}}}, whole: {{source: 'file:w.gguf', task: image}}")
    write_zeros(tmp_path / "w.gguf", CHECKPOINT)
    assert desk.verify("a") == desk.verify("whole") == []
    (tmp_path / "w.gguf").write_bytes(b"junk" * 10)
    (finding,) = desk.verify("whole")
    assert "w.gguf is no GGUF file, and" in finding.problem
    assert finding.fix == f"ls -l {tmp_path}/w.gguf"


def test_every_part_that_is_missing_is_told(tmp_path: Path) -> None:
    image_files(tmp_path)
    desk = Desk(tmp_path, f"a: {{{OWN}}}")
    for part in ("vae", "llm"):
        (tmp_path / f"{part}.safetensors").unlink()
    absent = "the part {0} file:{0}.safetensors is not on this machine: there is no file {1}/{0}.safetensors"
    found = desk.verify("a")
    assert [finding.problem.split(";")[0] for finding in found] == [
        absent.format(part, tmp_path) for part in ("vae", "llm")
    ]
    assert {finding.fix for finding in found} == {desk.edit}


def test_a_part_of_ones_own_of_another_sum_is_accepted(tmp_path: Path) -> None:
    image_files(tmp_path)
    desk = Desk(tmp_path, f"a: {{{OWN}}}")
    desk.pull("a")
    assert desk.verify("a") == []
    write_zeros(tmp_path / "vae.safetensors", PARTS["vae"] | {"x": (2, 2)})
    (finding,) = desk.verify("a")
    assert f"{tmp_path}/vae.safetensors has " in finding.problem
    assert finding.fix == "llamaserve pull a --update --models-file 'my models.yaml'"
    desk.lock.path.unlink()
    assert desk.verify("a") == []


def test_a_damaged_part_is_fetched_again_and_the_model_stays(tmp_path: Path, model_hub: Hub) -> None:
    image_files(tmp_path)
    model_hub.files |= {
        f"{name}.safetensors": (tmp_path / f"{name}.safetensors").read_bytes() for name in ("flux2", "vae")
    }
    desk = Desk(tmp_path, f"a: {{{OF_HUB}}}")
    (finding, other) = desk.verify("a")
    assert (finding.problem, other.problem) == (
        "it is not on this machine",
        "the part vae hf:o/r/vae.safetensors is not on this machine",
    )
    assert finding.fix == other.fix == "llamaserve pull a --models-file 'my models.yaml'"
    desk.pull("a")
    assert desk.verify("a") == []
    path = locate(HubSource("o/r", "vae.safetensors", revision=COMMIT))
    assert path is not None
    path.resolve().write_bytes(path.read_bytes()[:-1] + b"x")
    again = "llamaserve rm --yes hf:o/r/vae.safetensors {0} && llamaserve pull a {0}"
    found = desk.verify("a")
    assert {finding.fix for finding in found} == {again.format("--models-file 'my models.yaml'")}
    assert "and the hub promised" in found[0].problem


def test_a_diffusion_model_that_lacks_a_part_is_no_damaged_one(tmp_path: Path, model_hub: Hub) -> None:
    image_files(tmp_path)
    model_hub.files["flux2.safetensors"] = (tmp_path / "flux2.safetensors").read_bytes()
    desk = Desk(tmp_path, "a: {source: 'hf:o/r/flux2.safetensors', parts: {vae: 'file:vae.safetensors'}}")
    desk.pull("a")
    (finding,) = desk.verify("a")
    assert "is a FLUX.2 klein model, and its text encoder is missing: name it under `parts`, as llm" in finding.problem
    assert "damaged" not in finding.problem
    assert finding.fix == desk.edit


def test_of_several_files_the_one_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    image_files(tmp_path)
    desk = Desk(tmp_path, f"a: {{{OWN}}}")
    for name in ("flux2", "vae", "llm"):
        path = tmp_path / f"{name}.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[:-1])
        (finding,) = desk.verify("a")
        assert f"{path} is no GGUF file, and {name}.safetensors is no good safetensors file" in finding.problem
        assert finding.fix == f"ls -l {path}"
        path.write_bytes(data)


def test_a_part_that_the_hub_has_so_is_not_fetched_again(tmp_path: Path, model_hub: Hub) -> None:
    image_files(tmp_path)
    model_hub.files |= {"flux2.safetensors": (tmp_path / "flux2.safetensors").read_bytes(), "vae.safetensors": b"junk"}
    desk = Desk(tmp_path, f"a: {{{OF_HUB}}}")
    desk.pull("a")
    (finding,) = desk.verify("a")
    assert "vae.safetensors is no good safetensors file: it has 4 bytes" in finding.problem
    assert "the file is not damaged: it is as models.lock promises" in finding.problem
    assert finding.fix == desk.edit


def test_good_files_that_are_no_diffusion_model_are_a_line_to_correct(tmp_path: Path) -> None:
    image_files(tmp_path)
    desk = Desk(tmp_path, f"a: {{{OWN}}}")
    write_zeros(tmp_path / "flux2.safetensors", PARTS["clip_l"])
    (finding,) = desk.verify("a")
    assert "flux2.safetensors holds no diffusion model that stable-diffusion.cpp knows; name the" in finding.problem
    assert finding.fix == desk.edit
