"""models.yaml and the models on this machine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from doctor_machine import Needing, about, bad, case_of, checked, described
from gguf_splitter import split_gguf
from gguf_writer import tiny_llama, tiny_llama_tensors
from local_hub import COMMIT
from lora_files import random_lora, shapes_of
from rank_model import RankModel
from tiny_diffusion import write_model, write_safetensors
from whisper_writer import whisper_file

from llamaserve.doctor import models as examined
from llamaserve.doctor.findings import Finding, Level
from llamaserve.doctor.llama import Build, NoAnswer
from llamaserve.doctor.models import models
from llamaserve.registry import hub
from llamaserve.registry.lock_file import LockedFile, LockEntry, LockFile
from llamaserve.settings import Settings

Write = Callable[[str], Path]
GOOD = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a models.yaml, for a user who works in another folder."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("LLAMASERVE_CACHE", str(tmp_path / "cache"))

    def write(text: str) -> Path:
        path = tmp_path / "my models.yaml"
        path.write_text(text)
        return path

    return write


def findings(path: Path, *named: str, folder: Path | None = None, memory: str = "1TB") -> list[Finding]:
    settings = Settings(models_file=path, models_dir=folder, memory=memory)
    case = case_of(described(path.parent / "root"), settings, *named)
    return checked(models(case, lambda: Build(False, "CPU : AVX = 1 |", [])))


def tiny(path: Path, template: str | None = GOOD) -> Path:
    path.write_bytes(tiny_llama(tokenizer__chat_template=template))
    return path


def test_mistakes_in_the_list_are_told_with_their_lines(listed: Write) -> None:
    path = listed("models:\n  a: {source: 'nonsense:x'}\n  b: {}\n")
    one, two = findings(path)
    assert one.message.startswith("my models.yaml:2: ")
    assert one.fix == f"${{EDITOR:-nano}} +2 '{path}'"
    assert two.level is Level.PROBLEM
    assert findings(path.with_name("none.yaml"))[0].level is Level.PROBLEM


def test_a_good_model_is_well(listed: Write, tmp_path: Path) -> None:
    data = tiny(tmp_path / "tiny.gguf").read_bytes()
    found = findings(
        listed(f"models: {{tiny: {{source: 'file:tiny.gguf', sha256: {hashlib.sha256(data).hexdigest()}}}}}")
    )
    assert not bad(found)
    said = [finding.message for finding in about(found, "tiny")]
    assert said[0].startswith("llama, F32, 0.0 GB: the file is whole")
    assert said[1] == "its checksum is that of models.yaml"
    assert "answers end with </s>" in said


def test_the_starter_model_is_well(starter_model: Path, listed: Write) -> None:
    assert not bad(findings(listed(f"models: {{starter: {{source: 'file:{starter_model}'}}}}"), "starter"))


def test_models_for_vectors_are_well_without_a_template(embedding_model: Path, listed: Write, tmp_path: Path) -> None:
    RankModel().write(tmp_path / "ranker.gguf")
    path = listed(
        f"models:\n  minilm: {{source: 'file:{embedding_model}'}}\n  ranker: {{source: 'file:ranker.gguf'}}\n"
    )
    found = findings(path)
    assert not bad(found)
    for name, context in (("minilm", 512), ("ranker", 96)):
        whole, fits = (finding.message for finding in about(found, name))
        assert whole.startswith("bert, ")
        assert f"with {context} tokens of context" in fits


def test_models_that_are_not_here(listed: Write) -> None:
    path = listed("models: {a: {source: 'file:none.gguf'}}\ndefaults: {model: a}")
    (note,) = bad(findings(path))
    assert (note.level, note.fix) == (Level.NOTE, f"${{EDITOR:-nano}} '{path}'")  # nothing could be fetched
    (problem,) = bad(findings(path, "a"))
    assert problem.message.startswith(f"it is not on this machine: there is no file {path.parent}/none.gguf")
    assert problem.fix == f"${{EDITOR:-nano}} '{path}'"
    (unknown,) = bad(findings(path, "b"))
    assert unknown.fix == f"llamaserve models --models-file '{path}'"
    (nowhere,) = bad(findings(path, "some/where.gguf"))
    assert "there is no file" in nowhere.message


def test_commands_see_the_same_models(listed: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "cache_root", lambda: tmp_path / "hub")
    path = listed("models: {a: {source: 'hf:o/r:Q4_0'}}\ndefaults: {model: a}")
    (tmp_path / "folder").mkdir()
    options = f"--models-file '{path}' --models-dir {tmp_path}/folder"
    (note,) = bad(findings(path, folder=tmp_path / "folder"))
    assert note.fix == f"llamaserve pull a {options}"
    (problem,) = bad(findings(path, "a", folder=tmp_path / "folder"))
    assert problem.fix == f"llamaserve pull a {options}"
    cached(tmp_path / "hub", b"GGUF nonsense")
    (problem,) = bad(findings(path, folder=tmp_path / "folder"))
    assert problem.fix == f"llamaserve rm --yes a {options} && llamaserve pull a {options}"
    assert "deletes the files before it fetches them again" in problem.message


def cached(folder: Path, data: bytes) -> None:
    """Put a file into huggingface_hub's cache."""
    snapshot = folder / "models--o--r/snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "r-Q4_0.gguf").write_bytes(data)
    (folder / "models--o--r/refs").mkdir()
    (folder / "models--o--r/refs/main").write_text(COMMIT)


def test_a_model_that_was_fetched_by_its_source_alone_counts(
    listed: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "cache_root", lambda: tmp_path / "hub")
    path = listed("models: {}")
    cached(tmp_path / "hub", tiny_llama(tokenizer__chat_template=None))
    lock = LockFile.beside(path)
    lock.put("hf:o/r:Q4_0", LockEntry((LockedFile("r-Q4_0.gguf", 1, "0" * 64),), COMMIT))
    (note,) = bad(findings(path))
    assert note.subject == "hf:o/r:Q4_0"
    assert note.fix is not None
    assert '"model": "r-Q4_0"' in note.fix  # a request has the name under which it is served
    lock.path.write_text(lock.path.read_text().replace("version", "vers\nion"))
    (problem, _) = bad(findings(path))
    assert (problem.level, problem.subject) == (Level.PROBLEM, "models.lock")
    assert problem.message.startswith(f"{lock.path}:2: ")
    assert problem.fix == f"${{EDITOR:-nano}} +2 {lock.path}"


def test_a_models_folder_that_is_missing_keeps_nothing_else_from_being_said(listed: Write, tmp_path: Path) -> None:
    tiny(tmp_path / "tiny.gguf")
    found = findings(listed("models: {tiny: {source: 'file:tiny.gguf'}}"), folder=tmp_path / "none")
    (problem,) = bad(found)
    assert problem.fix == f"mkdir -p {tmp_path}/none"
    assert about(found, "tiny")


@pytest.mark.parametrize(
    ("data", "message", "fix"),
    [
        (b"xxxxxxxxxxxx", "is not a GGUF file", "ls -l {0}/style.gguf"),
        (tiny_llama(), "is no LoRA adapter", "${{EDITOR:-nano}} '{0}/my models.yaml'"),
        (None, "is not on this machine", "${{EDITOR:-nano}} '{0}/my models.yaml'"),
    ],
)
def test_a_model_is_not_well_without_its_adapters(
    listed: Write, tmp_path: Path, data: bytes | None, message: str, fix: str
) -> None:
    tiny(tmp_path / "tiny.gguf")
    if data is not None:
        (tmp_path / "style.gguf").write_bytes(data)
    path = listed("models: {tiny: {source: 'file:tiny.gguf', lora: [{source: 'file:style.gguf'}]}}")
    (problem,) = bad(findings(path))
    assert message in problem.message
    assert (problem.level, problem.fix) == (Level.PROBLEM, fix.format(tmp_path))
    random_lora(shapes_of(tiny_llama_tensors())).write(tmp_path / "style.gguf")
    assert not bad(findings(path))


def test_a_file_that_is_cut_short(listed: Write, tmp_path: Path) -> None:
    path = tiny(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:-100])
    (problem,) = bad(findings(listed("models: {tiny: {source: 'file:tiny.gguf'}}")))
    assert problem.level is Level.PROBLEM
    assert problem.fix == f"ls -l {path}"


def test_another_file_than_promised(listed: Write, tmp_path: Path) -> None:
    tiny(tmp_path / "tiny.gguf")
    path = listed(f"models: {{tiny: {{source: 'file:tiny.gguf', sha256: {'a' * 64}}}}}")
    (problem,) = bad(findings(path))
    assert f"{'a' * 64} was promised" in problem.message
    assert problem.fix == f"${{EDITOR:-nano}} '{path}'"


def test_a_file_as_promised_is_not_fetched_again(
    listed: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "cache_root", lambda: tmp_path / "hub")
    path = listed("models: {a: {source: 'hf:o/r:Q4_0'}}")
    data = tiny_llama(llama__block_count=0)
    cached(tmp_path / "hub", data)
    (problem,) = bad(findings(path))
    assert problem.fix == "llamaserve rm --yes a {0} && llamaserve pull a {0}".format(f"--models-file '{path}'")
    entry = LockEntry((LockedFile("r-Q4_0.gguf", len(data), hashlib.sha256(data).hexdigest()),), COMMIT)
    LockFile.beside(path).put("hf:o/r:Q4_0", entry)
    (problem,) = bad(findings(path))
    assert "block_count is 0" in problem.message
    assert "the file is not damaged: it is as models.lock promises" in problem.message
    assert problem.fix == f"${{EDITOR:-nano}} '{path}'"
    monkeypatch.setattr(examined, "_READ_AT_ONCE", 1000)
    monkeypatch.setenv("LLAMASERVE_CACHE", str(tmp_path / "other cache"))
    (problem,) = bad(findings(path))
    assert problem.fix == f"llamaserve verify a --models-file '{path}'"


def test_a_part_that_is_missing_is_named(listed: Write, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    paths = split_gguf(tiny(tmp_path / "tiny.gguf"), folder, "m", 3)
    paths[1].unlink()
    (problem,) = bad(findings(listed("models: {}"), folder=folder))
    assert f"part 2 of 3 is missing: {paths[1]}" in problem.message
    assert problem.fix == f"ls -l {folder}"


def test_a_large_file_is_not_read_for_its_sum(listed: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examined, "_READ_AT_ONCE", 1000)
    tiny(tmp_path / "tiny.gguf")
    (note,) = bad(findings(listed(f"models: {{tiny: {{source: 'file:tiny.gguf', sha256: {'a' * 64}}}}}")))
    assert note.fix == f"llamaserve verify tiny --models-file '{tmp_path}/my models.yaml'"


def test_faults_of_a_template_are_found_with_the_models_own_vocabulary(listed: Write, tmp_path: Path) -> None:
    running_on = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}<unk>{% endfor %}"
        "{{ '[assistant]' if add_generation_prompt }}"
    )
    tiny(tmp_path / "tiny.gguf", running_on)
    (warning,) = bad(findings(listed("models: {tiny: {source: 'file:tiny.gguf'}}")))
    assert (
        warning.message
        == "its chat template ends answers with <unk>, which the tokenizer takes for no end: they run on"
    )
    tiny(tmp_path / "tiny.gguf", None)
    (note,) = bad(findings(listed("models: {tiny: {source: 'file:tiny.gguf'}}")))
    assert "no chat template" in note.message


def test_a_model_that_does_not_fit_into_memory(listed: Write, tmp_path: Path) -> None:
    tiny(tmp_path / "tiny.gguf")
    path = listed("models: {tiny: {source: 'file:tiny.gguf'}}")
    (warning,) = bad(findings(path, memory="1MB"))
    assert warning.level is Level.WARNING
    assert warning.fix == f"${{EDITOR:-nano}} '{path}'"


def test_a_wrong_setting_of_one_model_keeps_nothing_of_the_others_from_being_said(
    embedding_model: Path, listed: Write, tmp_path: Path
) -> None:
    tiny(tmp_path / "tiny.gguf")
    path = listed(
        "models:\n"
        f"  chatty: {{source: 'file:{embedding_model}', task: generation}}\n"
        "  scores: {source: 'file:tiny.gguf', task: rerank}\n"
        "  good: {source: 'file:tiny.gguf'}\n"
    )
    found = findings(path)
    wrong = [finding for finding in bad(found) if finding.level is Level.PROBLEM]
    assert [finding.subject for finding in wrong] == ["chatty", "scores"]
    assert "it is an encoder; it can't generate text" in wrong[0].message
    assert "it has no classification head" in wrong[1].message
    assert {finding.fix for finding in wrong} == {f"${{EDITOR:-nano}} '{path}'"}
    assert any("it takes " in finding.message for finding in about(found, "good"))


def test_models_of_the_folder_count_too(listed: Write, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    tiny(folder / "one.gguf")
    tiny(tmp_path / "listed.gguf")
    path = listed("models: {two: {source: 'file:listed.gguf'}}")
    found = findings(path, folder=folder)
    assert {finding.subject for finding in found} == {"models.yaml", "one.gguf", "two"}
    assert {finding.subject for finding in findings(path, "one.gguf", folder=folder)} == {"models.yaml", "one.gguf"}
    assert not bad(findings(path, str(folder / "one.gguf")))


def test_a_llama_cpp_that_does_not_start_keeps_nothing_else_from_being_said(listed: Write, tmp_path: Path) -> None:
    tiny(tmp_path / "tiny.gguf")
    path = listed("models: {tiny: {source: 'file:tiny.gguf'}}")

    def read() -> Build:
        raise NoAnswer("was ended by SIGILL", 4)

    case = case_of(described(tmp_path / "root"), Settings(models_file=path, memory="1TB"))
    assert not bad(checked(models(case, read)))


# ---- speech


EAR = whisper_file(ftype=2002, n_text_ctx=448).bytes()


def test_a_whisper_model_is_well(listed: Write, tmp_path: Path) -> None:
    (tmp_path / "ear.bin").write_bytes(EAR)
    path = listed(f"models: {{ear: {{source: 'file:ear.bin', sha256: {hashlib.sha256(EAR).hexdigest()}}}}}")
    for found in (findings(path), findings(path, "ear"), findings(path, str(tmp_path / "ear.bin"))):
        assert not bad(found)
    said = [finding.message for finding in about(findings(path), "ear")]
    assert said[0] == "Whisper, 1+1 layers, Q4_0, 0.0 GB: the file is whole and can be loaded"
    assert said[1] == "its checksum is that of models.yaml"
    assert said[2].startswith("it takes 0.2 GB of memory; ")
    assert len(said) == 3


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"lmgg", "is a ggml file of another kind"), (EAR[:-1], "is truncated"), (tiny_llama(), "it is a GGUF file")],
)
def test_a_whisper_file_that_cannot_be_loaded_is_a_problem(
    listed: Write, tmp_path: Path, data: bytes, message: str
) -> None:
    (tmp_path / "ear.bin").write_bytes(data)
    (problem,) = bad(findings(listed("models: {ear: {source: 'file:ear.bin'}}")))
    assert message in problem.message
    assert (problem.level, problem.fix) == (Level.PROBLEM, f"ls -l {tmp_path}/ear.bin")


def test_a_whisper_model_that_does_not_fit_or_cannot_do_what_its_settings_say(listed: Write, tmp_path: Path) -> None:
    (tmp_path / "ear.bin").write_bytes(EAR)
    tiny(tmp_path / "tiny.gguf")
    path = listed("models: {ear: {source: 'file:ear.bin'}}")
    (warning,) = bad(findings(path, memory="1MB"))
    assert (warning.level, warning.fix) == (Level.WARNING, f"${{EDITOR:-nano}} '{path}'")
    assert "ear needs " in warning.message
    path = listed(
        "models:\n"
        "  chatty: {source: 'file:ear.bin', task: generation}\n"
        "  styled: {source: 'file:ear.bin', lora: [{source: 'file:style.gguf'}]}\n"
        "  deaf: {source: 'file:tiny.gguf', task: transcription}\n"
    )
    wrong = bad(findings(path))
    assert [(each.level, each.subject) for each in wrong] == [
        (Level.PROBLEM, name) for name in ("chatty", "styled", "deaf")
    ]
    assert {each.fix for each in wrong} == {f"${{EDITOR:-nano}} '{path}'"}


def test_packages_for_speech_are_missed_where_a_model_needs_them(listed: Write, tmp_path: Path) -> None:
    (tmp_path / "ear.bin").write_bytes(EAR)
    (tmp_path / "folder").mkdir()
    tiny(tmp_path / "tiny.gguf")
    needed = "  ear: {source: 'file:ear.bin'}\n"
    plain = "models:\n  tiny: {source: 'file:tiny.gguf'}\n  far: {source: 'hf:o/r/far.bin'}\n"
    usual = "defaults: {transcription_model: far}\n"

    def said(text: str, *named: str, lacking: str = "nothing-of-this-name>=1") -> list[Finding]:
        settings = Settings(models_file=listed(text), models_dir=tmp_path / "folder", memory="1TB")
        case = case_of(described(tmp_path / "root"), settings, *named)
        prefix = Path("/opt/venv")
        wanting = Needing(prefix / "bin/python", prefix, Path("/usr"), None, ("llamaserve",), True, (), (lacking,))
        return about(models(replace(case, installation=wanting), lambda: Build(False, "CPU : AVX = 1 |", [])), "speech")

    assert said(plain) == []
    (note,) = said(usual + plain)
    (problem,) = said(plain + needed)
    assert said(usual + plain + needed) == said(plain, "far") == [problem]
    assert said(usual + plain + needed, "tiny") == []
    assert (note.level, problem.level) == (Level.NOTE, Level.PROBLEM)
    assert note.message == problem.message == "it can't be transcribed: nothing-of-this-name is not installed"
    assert note.fix == problem.fix == "/opt/venv/bin/python -m pip install 'nothing-of-this-name>=1'"
    (well,) = said(plain + needed, lacking="msgspec")
    assert well.level is Level.OK
    (tmp_path / "folder/ggml.bin").write_bytes(EAR)
    assert said(plain) == [problem]


# ---- images

BRUSH = "source: 'file:tiny-flux2.safetensors', parts: {taesd: 'file:tiny-taef2.safetensors'}"


def test_a_diffusion_model_in_several_files_is_well(listed: Write, tmp_path: Path) -> None:
    model, decoder = write_model(tmp_path)
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    path = listed(f"models: {{brush: {{{BRUSH}, sha256: {digest}}}}}")
    for found in (findings(path), findings(path, "brush")):
        assert not bad(found)
    said = [finding.message for finding in about(findings(path), "brush")]
    assert said[:2] == [
        "FLUX.2 klein, F16, 0.0 GB: the files are whole and can be loaded",
        "its checksum is that of models.yaml",
    ]
    assert said[2].startswith("it takes ")
    assert len(said) == 3
    decoder.unlink()
    assert not about(findings(path), "brush")  # so it is not here


def test_a_whole_diffusion_model_of_the_folder_is_well(listed: Write, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    encoders = {f"text_encoders.{name}.transformer.x": (2,) for name in ("clip_l", "clip_g")}
    whole = {"model.diffusion_model.joint_blocks.0.x": (2, 2), **encoders, "vae.decoder.x": (2, 3)}
    write_safetensors(tmp_path / "folder/sd3.safetensors", whole)
    write_safetensors(tmp_path / "folder/vae.safetensors", {"decoder.x": (2, 3)})
    found = findings(listed("models: {}"), folder=tmp_path / "folder")
    assert not bad(found)
    first, second = about(found, "sd3.safetensors")
    assert first.message == "Stable Diffusion 3, F16, 0.0 GB: the files are whole and can be loaded"
    assert second.message.startswith("it takes ")
    assert "vae.safetensors" not in {finding.subject for finding in found}


def test_each_part_that_is_missing_is_a_problem(listed: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "cache_root", lambda: tmp_path / "hub")
    write_model(tmp_path)
    parts = "parts: {taesd: 'file:none.safetensors', llm: 'hf:o/r/llm.safetensors'}"
    path = listed(f"models: {{brush: {{source: 'file:tiny-flux2.safetensors', {parts}}}}}")
    one, two = bad(findings(path, "brush"))
    assert one.message.startswith("the part taesd file:none.safetensors is not on this machine: there is no file")
    assert one.fix == f"${{EDITOR:-nano}} '{path}'"
    assert two.message == "the part llm hf:o/r/llm.safetensors is not on this machine"
    assert two.fix == f"llamaserve pull brush --models-file '{path}'"
    assert {each.level for each in (one, two)} == {Level.PROBLEM}


@pytest.mark.parametrize(("data", "message"), [(b"", "has 0 bytes"), (b"PK\x03\x04" + bytes(99), "is no GGUF file")])
@pytest.mark.parametrize("number", [0, 1], ids=["model", "part"])
def test_a_diffusion_model_that_cannot_be_loaded_is_a_problem(
    listed: Write, tmp_path: Path, number: int, data: bytes, message: str
) -> None:
    path = write_model(tmp_path)[number]
    path.write_bytes(data)
    (problem,) = bad(findings(listed(f"models: {{brush: {{{BRUSH}}}}}")))
    assert message in problem.message
    assert str(path) in problem.message
    assert (problem.level, problem.fix) == (Level.PROBLEM, f"ls -l {path}")


def test_good_files_that_make_no_diffusion_model_are_a_line_to_correct(listed: Write, tmp_path: Path) -> None:
    model, _ = write_model(tmp_path)
    path = listed("models: {brush: {source: 'file:tiny-flux2.safetensors'}}")
    (problem,) = bad(findings(path))
    assert "is a FLUX.2 klein model, and its decoder is missing: name it under `parts`" in problem.message
    assert (problem.level, problem.fix) == (Level.PROBLEM, f"${{EDITOR:-nano}} '{path}'")
    model.write_bytes(tiny_llama())
    path = listed(f"models: {{brush: {{{BRUSH}}}}}")
    (problem,) = bad(findings(path))
    assert "holds no diffusion model that stable-diffusion.cpp knows" in problem.message
    assert (problem.level, problem.fix) == (Level.PROBLEM, f"${{EDITOR:-nano}} '{path}'")


def test_a_diffusion_model_that_does_not_fit_or_cannot_do_what_its_settings_say(listed: Write, tmp_path: Path) -> None:
    write_model(tmp_path)
    tiny(tmp_path / "tiny.gguf")
    path = listed(f"models: {{brush: {{{BRUSH}}}}}")
    (warning,) = bad(findings(path, memory="1MB"))
    assert (warning.level, warning.fix) == (Level.WARNING, f"${{EDITOR:-nano}} '{path}'")
    assert "brush needs " in warning.message
    path = listed(
        "models:\n"
        f"  ears: {{{BRUSH}, pooling: mean}}\n"
        f"  styled: {{{BRUSH}, lora: [{{source: 'file:style.gguf'}}]}}\n"
        "  pixels: {source: 'file:tiny.gguf', task: generation, pooling: mean}\n"
    )
    wrong = bad(findings(path))
    assert [(each.level, each.subject) for each in wrong] == [
        (Level.PROBLEM, name) for name in ("ears", "styled", "pixels")
    ]
    assert {each.fix for each in wrong} == {f"${{EDITOR:-nano}} '{path}'"}


def test_packages_for_images_are_missed_where_a_model_needs_them(listed: Write, tmp_path: Path) -> None:
    write_model(tmp_path)
    tiny(tmp_path / "tiny.gguf")
    needed = f"  brush: {{{BRUSH}}}\n"
    plain = "models:\n  tiny: {source: 'file:tiny.gguf'}\n  far: {source: 'hf:o/r/far.safetensors'}\n"
    usual = "defaults: {image_model: far}\n"

    def said(text: str, *named: str, lacking: str = "nothing-of-this-name>=1") -> list[Finding]:
        case = case_of(described(tmp_path / "root"), Settings(models_file=listed(text), memory="1TB"), *named)
        prefix = Path("/opt/venv")
        wanting = Needing(prefix / "bin/python", prefix, Path("/usr"), None, ("llamaserve",), True, (), (lacking,))
        return about(models(replace(case, installation=wanting), lambda: Build(False, "CPU : AVX = 1 |", [])), "images")

    assert said(plain) == []
    (note,) = said(usual + plain)
    (problem,) = said(plain + needed)
    assert said(usual + plain + needed) == said(plain, "far") == [problem]
    assert said(usual + plain + needed, "tiny") == []
    assert (note.level, problem.level) == (Level.NOTE, Level.PROBLEM)
    assert note.message == problem.message == "they can't be made: nothing-of-this-name is not installed"
    assert note.fix == problem.fix == "/opt/venv/bin/python -m pip install 'nothing-of-this-name>=1'"
    (well,) = said(plain + needed, lacking="msgspec")
    assert (well.level, well.message) == (Level.OK, "the packages that make them are here, in fitting versions")
