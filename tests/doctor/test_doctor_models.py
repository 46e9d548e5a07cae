"""models.yaml and the models on this machine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from doctor_machine import about, bad, case_of, checked, described
from gguf_writer import tiny_llama

from llamaserve.doctor import models as examined
from llamaserve.doctor.findings import Finding, Level
from llamaserve.doctor.llama import Build, NoAnswer
from llamaserve.doctor.models import models
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
    assert one.fix == f"\"${{EDITOR:-nano}}\" +2 '{path}'"
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


def test_models_that_are_not_here(listed: Write) -> None:
    path = listed("models: {a: {source: 'file:none.gguf'}}\ndefaults: {model: a}")
    (note,) = bad(findings(path))
    assert (note.level, note.fix) == (Level.NOTE, "llamaserve pull a")
    (problem,) = bad(findings(path, "a"))
    assert problem.message == "it is not on this machine"
    (unknown,) = bad(findings(path, "b"))
    assert unknown.fix == "llamaserve models"
    (nowhere,) = bad(findings(path, "some/where.gguf"))
    assert "there is no file" in nowhere.message


def test_a_file_that_is_cut_short(listed: Write, tmp_path: Path) -> None:
    path = tiny(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:-100])
    (problem,) = bad(findings(listed("models: {tiny: {source: 'file:tiny.gguf'}}")))
    assert problem.level is Level.PROBLEM
    assert problem.fix == f"ls -l {path}"


def test_another_file_than_promised(listed: Write, tmp_path: Path) -> None:
    path = tiny(tmp_path / "tiny.gguf")
    (problem,) = bad(findings(listed(f"models: {{tiny: {{source: 'file:tiny.gguf', sha256: {'a' * 64}}}}}")))
    assert problem.fix == f"sha256sum {path}"


def test_a_large_file_is_not_read_for_its_sum(listed: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examined, "_READ_AT_ONCE", 1000)
    tiny(tmp_path / "tiny.gguf")
    (note,) = bad(findings(listed(f"models: {{tiny: {{source: 'file:tiny.gguf', sha256: {'a' * 64}}}}}")))
    assert note.fix == "llamaserve verify tiny"


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
    assert warning.fix == f"\"${{EDITOR:-nano}}\" '{path}'"


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
