"""The commands for models, as a user types them: each in a process of its own, with a hub on this machine."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from gguf_splitter import split_gguf
from gguf_writer import tiny_llama, tiny_llama_tensors
from local_hub import COMMIT, Hub, running_hub, settings_for
from lora_files import random_lora, shapes_of
from rank_model import RankModel
from running_server import wait_until
from tiny_diffusion import write_model, write_safetensors
from whisper_writer import whisper_file

from llamaserve.registry.diffusion_file import read_diffusion
from llamaserve.registry.whisper_file import read_whisper

MODEL, NEWER = tiny_llama(), tiny_llama(general__name="newer")
MODELS = """\
defaults: {model: tiny}
models:
  tiny: {source: 'hf:o/r:Q4_0', size: 1.0 MB, licence: MIT, description: A tiny one}
  mine: {source: 'file:mine.gguf'}
aliases: {little: tiny}
"""


@dataclass
class Desk:
    """A folder with a models.yaml and a models folder, in which commands are typed."""

    folder: Path
    hub: Hub

    def __call__(self, *arguments: str, status: int = 0) -> str:
        """Run a command and return what it wrote; its exit status must be this one."""
        done = subprocess.run(
            [sys.executable, "-m", "llamaserve", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=self.folder,
            env=settings_for(self.hub, self.folder) | {"COLUMNS": "200"},
        )
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    def json(self, *arguments: str, status: int = 0) -> Any:
        return json.loads(self(*arguments, "--json", status=status))


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    (tmp_path / "models.yaml").write_text(MODELS)
    (tmp_path / "models/sub").mkdir(parents=True)
    (tmp_path / "models/sub/found.gguf").write_bytes(MODEL)
    (tmp_path / "models/broken.gguf").write_bytes(b"hello")
    with running_hub(Hub({"a-Q4_0.gguf": MODEL, "a-Q8_0.gguf": MODEL[:-8] + b"12345678"})) as hub:
        yield Desk(tmp_path, hub)


def test_pull_fetches_notes_and_keeps_to_what_was_noted(desk: Desk) -> None:
    answer = desk("pull", "little", "hf:o/r:Q8_0")
    assert "fetching tiny (1.0 MB) from hf:o/r:Q4_0" in answer
    assert f"little: {desk.folder}/hf/hub/models--o--r/snapshots/{COMMIT}/a-Q4_0.gguf" in answer
    locked = json.loads((desk.folder / "models.lock").read_text())["sources"]
    assert [*locked] == ["hf:o/r:Q4_0", "hf:o/r:Q8_0"]
    commit = desk.hub.publish(a_Q4_0_gguf=NEWER)
    assert COMMIT in desk("pull", "tiny")
    assert "fetching" not in desk("pull", "tiny")
    assert commit in desk("pull", "tiny", "--update")


def test_pull_of_a_model_in_the_folder_says_where_it_is(desk: Desk) -> None:
    assert desk("pull", "sub/found").strip() == f"sub/found: {desk.folder}/models/sub/found.gguf"


def test_models_lists_the_folder_too(desk: Desk) -> None:
    answer = desk("models")
    assert [line.split()[:2] for line in answer.splitlines()[1:3]] == [["tiny", "(default)"], ["mine", "no"]]
    assert "sub/found.gguf  yes" in answer
    assert "broken.gguf     broken" in answer
    assert "is not a GGUF file" in answer
    assert f"{desk.folder}/models; serve one with" in answer
    listed = desk.json("models")
    assert [(each["model"], each["here"], each["aliases"]) for each in listed["models"]] == [
        ("tiny", False, ["little"]),
        ("mine", False, []),
    ]
    assert [each["name"] for each in listed["found"]] == ["broken.gguf", "sub/found.gguf"]
    assert listed["folder"] == f"{desk.folder}/models"
    assert "there is no folder" in desk("models", "--models-dir", "none", status=1)


def test_show_tells_all_that_is_known(desk: Desk) -> None:
    assert "here        no; llamaserve pull tiny" in desk("show", "little")
    assert desk.json("show", "tiny")["header"] is None
    desk("pull", "tiny")
    answer = desk("show", "tiny")
    for row in ("also", "what it is", "licence", "architecture", "layers", "memory", "locked"):
        assert f"\n{row} " in answer
    assert "llama, tiny" in answer
    assert f"commit {COMMIT}" in answer
    facts = desk.json("show", "tiny")
    assert (facts["header"]["layers"], facts["header"]["key_value_heads"], facts["problem"]) == (2, 2, None)
    assert (facts["size"], facts["lock"]["revision"]) == (len(MODEL), COMMIT)
    assert "chat" in facts["template_abilities"]
    assert facts["memory"]["total"] > facts["memory"]["weights"] > 0
    assert "\nproblem  " in desk("show", "broken")
    assert "no model is called 'none'" in desk("show", "none", status=1)


def test_models_lists_what_was_fetched_by_its_source_alone(desk: Desk) -> None:
    desk("pull", "hf:o/r:Q8_0")
    assert "\nhf:o/r:Q8_0     yes" in desk("models")
    assert (
        desk.json("models")["models"][-1] | {"model": "hf:o/r:Q8_0", "here": True, "source": "hf:o/r:Q8_0"}
        == (desk.json("models")["models"][-1])
    )


def test_models_shows_the_task_that_a_file_says_it_is_for(desk: Desk, embedding_model: Path) -> None:
    RankModel().write(desk.folder / "ranker.gguf")
    (desk.folder / "cut.gguf").write_bytes(embedding_model.read_bytes()[:1000])
    (desk.folder / "models.yaml").write_text(
        "models:\n"
        f"  minilm: {{source: 'file:{embedding_model}'}}\n"
        f"  judge: {{source: 'file:{embedding_model}', task: moderation}}\n"
        "  ranker: {source: 'file:ranker.gguf'}\n"
        "  cut: {source: 'file:cut.gguf'}\n"
        "  none: {source: 'file:none.gguf'}\n"
    )
    tasks = {each["model"]: each["task"] for each in desk.json("models")["models"]}
    generating = dict.fromkeys(("cut", "none"), "generation")
    assert tasks == {"minilm": "embedding", "judge": "moderation", "ranker": "rerank"} | generating
    assert "embedding; " in desk("models")


def test_show_says_why_a_model_cannot_do_what_its_settings_say(desk: Desk, embedding_model: Path) -> None:
    (desk.folder / "mine.gguf").write_bytes(MODEL)
    (desk.folder / "models.yaml").write_text(
        "models:\n"
        f"  chatty: {{source: 'file:{embedding_model}', task: generation}}\n"
        "  scores: {source: 'file:mine.gguf', task: rerank}\n"
    )
    for name, problem in (("chatty", "it is an encoder"), ("scores", "no classification head")):
        facts = desk.json("show", name)
        assert problem in facts["problem"]
        assert facts["memory"] is None
        assert facts["header"]["architecture"] in ("bert", "llama")
        assert problem in desk("show", name)


def test_models_shows_names_with_brackets_as_they_are(desk: Desk) -> None:
    desk.hub.files["a%5B/b%5D.gguf"] = MODEL  # as it is in an address
    desk("pull", "hf:o/r/a[/b].gguf")
    assert "\nhf:o/r/a[/b].gguf" in desk("models")


def test_show_counts_adapters_and_says_what_is_wrong_with_one(desk: Desk) -> None:
    (desk.folder / "mine.gguf").write_bytes(MODEL)
    alone = desk.json("show", "mine")["memory"]
    style = random_lora(shapes_of(tiny_llama_tensors()), rank=8).write(desk.folder / "style.gguf")
    text = MODELS.replace("'file:mine.gguf'", "'file:mine.gguf', lora: [{source: 'file:style.gguf'}]")
    (desk.folder / "models.yaml").write_text(text)
    assert desk.json("show", "mine")["memory"]["weights"] >= alone["weights"] + style.stat().st_size
    style.write_bytes(MODEL)
    assert "is no LoRA adapter" in desk.json("show", "mine")["problem"]
    style.unlink()
    assert "file:style.gguf of mine is not on this machine" in desk("show", "mine")


def test_commands_that_are_proposed_see_the_same_models(desk: Desk) -> None:
    (desk.folder / "elsewhere").mkdir()
    (desk.folder / "models.yaml").rename(desk.folder / "elsewhere/my models.yaml")
    options = ("--models-file", "elsewhere/my models.yaml", "--models-dir", "models")
    again = "llamaserve pull tiny --models-file 'elsewhere/my models.yaml' --models-dir models"
    assert f"no; {again}" in desk("show", "tiny", *options)
    assert f"fix: {again}" in desk("verify", "tiny", *options, status=1)
    assert again in desk("serve", "tiny", *options, status=1)
    findings = desk.json("doctor", "tiny", *options, status=1)["findings"]
    assert any((finding["fix"] or "").endswith(again) for finding in findings)
    assert "fix: llamaserve pull hf:o/r:Q8_0" in desk("verify", "hf:o/r:Q8_0", *options, status=1)
    assert f"tiny is not on this machine; {again}" in desk("plan", "little", *options, status=1)
    assert "hf:o/r:Q8_0 is not on this machine; llamaserve pull hf:o/r:Q8_0" in desk(
        "plan", "hf:o/r:Q8_0", *options, status=1
    )
    assert f"llamaserve rm --yes sub/found {again.partition('tiny ')[2]}" in desk("rm", "sub/found", *options, status=1)
    assert "no; ${EDITOR:-nano} " in desk("show", "mine", *options)


def test_verify_finds_damage_and_names_the_remedy(desk: Desk) -> None:
    desk("pull", "tiny", "hf:o/r:Q8_0")
    answer = desk("verify", "tiny")
    assert "tiny: good" in answer
    blob = next((desk.folder / "hf").rglob("a-Q4_0.gguf")).resolve()
    blob.write_bytes(MODEL[:-1] + b"x")
    (desk.folder / "models/broken.gguf").unlink()
    answer = desk("verify", status=1)
    assert "the hub promised" in answer
    assert "  fix: llamaserve rm --yes tiny && llamaserve pull tiny" in answer
    assert "hf:o/r:Q8_0: good" in answer
    assert "sub/found.gguf: good" in answer
    report = desk.json("verify", status=1)
    assert report["verified"] == ["tiny", "hf:o/r:Q8_0", "sub/found.gguf"]
    assert {finding["model"] for finding in report["findings"]} == {"tiny"}
    desk("rm", "--yes", "tiny")
    desk("pull", "tiny")
    desk("verify")


def test_rm_deletes_what_is_ours_and_says_what_it_freed(desk: Desk) -> None:
    desk("pull", "tiny", "hf:o/r:Q8_0")
    assert "nothing is deleted without asking" in desk("rm", "tiny", status=1)
    assert next((desk.folder / "hf").rglob("a-Q4_0.gguf")).exists()
    answer = desk("rm", "little", "sub/found", "--yes")
    kilobytes = f"{len(MODEL) / 1000:.0f} kB"
    assert f"tiny: deleted 1 file, which freed {kilobytes}" in answer
    assert f"sub/found.gguf: deleted 1 file, which freed {kilobytes}" in answer
    assert not list((desk.folder / "hf").rglob("a-Q4_0.gguf"))
    assert next((desk.folder / "hf").rglob("a-Q8_0.gguf")).exists()
    assert "is not on this machine" in desk("rm", "tiny", "--yes", status=1)


def test_rm_tells_of_the_adapters_that_it_deletes_and_of_no_others(desk: Desk) -> None:
    (desk.folder / "models.yaml").write_text(
        "models:\n"
        "  tiny: {source: 'hf:o/r:Q4_0', lora: [{source: 'hf:o/r/own.gguf'}, {source: 'hf:o/r/both.gguf'},"
        " {source: 'file:models/mine.gguf'}]}\n"
        "  also: {source: 'hf:o/r/a-Q4_0.gguf'}\n"
        "  other: {source: 'hf:o/r:Q8_0', lora: [{source: 'hf:o/r/both.gguf@main'}]}\n"
    )
    (desk.folder / "models/mine.gguf").write_bytes(MODEL)
    desk.hub.files |= {name: MODEL + name.encode() for name in ("own.gguf", "both.gguf")}
    desk("pull", "tiny", "other")
    answer = desk("rm", "--yes", "tiny")
    assert "tiny: 2 files" in answer
    assert "(also the file of also)" in answer
    assert [line.rpartition("/")[2] for line in answer.splitlines() if line.startswith("  ")] == [
        "a-Q4_0.gguf",
        "own.gguf",
    ]
    assert "tiny: deleted 2 files" in answer
    assert {path.name for path in (desk.folder / "hf").rglob("*.gguf")} == {"a-Q8_0.gguf", "both.gguf"}
    assert (desk.folder / "models/mine.gguf").exists()


def test_rm_deletes_what_is_here_of_a_cut_download(desk: Desk) -> None:
    desk.hub.gate = threading.Event()
    environment = settings_for(desk.hub, desk.folder)
    command = [sys.executable, "-m", "llamaserve", "pull", "tiny"]
    with subprocess.Popen(command, cwd=desk.folder, env=environment) as pull:
        wait_until(lambda: bool(parts_in(desk)), 30)
        assert "by another process" in desk("rm", "--yes", "tiny", status=1)
        pull.kill()
    desk.hub.gate.set()
    (part,) = parts_in(desk)
    answer = desk("rm", "--yes", "tiny")
    assert str(part) in answer
    assert "tiny: deleted 1 file" in answer
    assert parts_in(desk) == []
    assert "is not on this machine" in desk("rm", "tiny", "--yes", status=1)


def parts_in(desk: Desk) -> list[Path]:
    return [*(desk.folder / "hf").rglob("*.llamaserve-part")]


def test_rm_refuses_a_file_of_ones_own_before_it_deletes_anything(desk: Desk) -> None:
    mine = desk.folder / "mine.gguf"
    mine.write_bytes(MODEL)
    desk("pull", "tiny")
    for name in ("mine", "./mine.gguf"):
        answer = desk("rm", "tiny", name, "--yes", status=1)
        assert f"rm {mine}\n" in answer
    anns = mine.rename(mine.with_name("ann's.gguf"))
    assert shlex.join(("rm", str(anns))) in desk("rm", "./ann's.gguf", "--yes", status=1)
    assert anns.exists()
    assert next((desk.folder / "hf").rglob("a-Q4_0.gguf")).exists()


@pytest.mark.parametrize(("reply", "deleted"), [(b"n\n", False), (b"y\n", True)])
def test_rm_asks_on_a_terminal(desk: Desk, reply: bytes, deleted: bool) -> None:
    ours, theirs = pty.openpty()
    try:
        os.write(ours, reply)
        done = subprocess.run(
            [sys.executable, "-m", "llamaserve", "rm", "sub/found.gguf"],
            stdin=theirs,
            capture_output=True,
            text=True,
            cwd=desk.folder,
            env=settings_for(desk.hub, desk.folder),
            timeout=60,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert "Delete?" in done.stderr
    assert (done.returncode == 0) is deleted
    assert (desk.folder / "models/sub/found.gguf").exists() is not deleted


def test_plan_has_what_was_fetched_by_its_source_alone(desk: Desk) -> None:
    (desk.folder / "models/broken.gguf").unlink()
    desk("pull", "hf:o/r:Q8_0")
    assert [each["name"] for each in desk.json("plan")["models"]] == ["hf:o/r:Q8_0", "sub/found.gguf"]


def test_a_model_in_parts_is_one_model_for_all_commands(desk: Desk) -> None:
    paths = split_gguf(desk.folder / "models/sub/found.gguf", desk.folder / "models/parts", "m", 3)
    name = "parts/m-00001-of-00003.gguf"
    assert desk.json("show", name)["files"] == [str(path) for path in paths]
    assert f"{name}: good" in desk("verify", name)
    paths[1].unlink()
    assert f"part 2 of 3 is missing: {paths[1]}" in desk("verify", name, status=1)
    assert f"part 2 of 3 is missing: {paths[1]}" in desk("models")
    assert f"part 2 of 3 is missing: {paths[1]}" in desk("plan", name, status=1)
    split_gguf(desk.folder / "models/sub/found.gguf", desk.folder / "models/parts", "m", 3)
    assert f"{name}: deleted 3 files" in desk("rm", "-y", name)


def test_a_whisper_file_is_a_model_for_all_commands(desk: Desk) -> None:
    path, cut = (desk.folder / "models" / name for name in ("sub/ggml-ear.bin", "cut.bin"))
    path.write_bytes(whisper_file(ftype=2002, n_vocab=51865).bytes())
    cut.write_bytes(path.read_bytes()[:-1])
    (desk.folder / "models/other.bin").write_bytes(b"something else that is called so")
    lines = {line.split()[0]: line.split()[1:] for line in desk("models").splitlines() if line.strip()}
    assert lines["sub/ggml-ear.bin"] == ["yes", "3", "MB", "transcription"]
    assert lines["cut.bin"][0] == "broken"
    found = [each["name"] for each in desk.json("models")["found"]]
    assert found == ["broken.gguf", "cut.bin", "sub/found.gguf", "sub/ggml-ear.bin"]
    answer = desk("show", "sub/ggml-ear")
    for label, value in {"task": "transcription", "architecture": "Whisper, 1+1 layers", "languages": "99"}.items():
        assert re.search(rf"^{label} +{re.escape(value)} *$", answer, re.MULTILINE)
    facts = desk.json("show", "sub/ggml-ear")
    assert (facts["header"], facts["problem"], facts["template_abilities"]) == (None, None, None)
    assert facts["speech"] == {
        "size": "1+1 layers",
        "parameters": read_whisper(path).parameter_count,
        "quantisation": "Q4_0",
        "languages": 99,
    }
    assert facts["memory"]["total"] == facts["memory"]["weights"] + facts["memory"]["compute"]
    broken = desk.json("show", "cut")
    assert (broken["speech"], broken["memory"]) == (None, None)
    assert "cut.bin is truncated" in broken["problem"]
    assert desk("verify", "sub/ggml-ear") == "sub/ggml-ear: good\n"
    assert f"is truncated: it ends after {cut.stat().st_size} bytes" in desk("verify", "cut", status=1)
    assert "cut.bin is truncated" in desk("serve", "cut", "--port", "0", status=1)
    assert "sub/ggml-ear.bin: deleted 1 file" in desk("rm", "--yes", "sub/ggml-ear")
    assert not path.exists()


def test_show_says_why_a_whisper_model_cannot_do_what_its_settings_say(desk: Desk) -> None:
    (desk.folder / "ear.bin").write_bytes(whisper_file(ftype=2002).bytes())
    (desk.folder / "models.yaml").write_text(
        "models:\n"
        "  english: {source: 'file:ear.bin'}\n"
        "  chatty: {source: 'file:ear.bin', task: generation}\n"
        "  styled: {source: 'file:ear.bin', lora: [{source: 'file:style.gguf'}]}\n"
    )
    assert "English only" in desk("show", "english")
    for name, problem in (("chatty", "nothing but transcribe speech: generation"), ("styled", "LoRA adapters are for")):
        facts = desk.json("show", name)
        assert problem in facts["problem"]
        assert facts["speech"]["languages"] == 1
        assert facts["memory"] is None
    tasks = {each["model"]: each["task"] for each in desk.json("models")["models"]}
    assert tasks == {"english": "transcription", "chatty": "generation", "styled": "transcription"}


IMAGES = """\
models:
  brush: {source: 'file:tiny-flux2.safetensors', parts: {taesd: 'file:tiny-taef2.safetensors'}, image: {size: 256x128}}
  chatty: {source: 'file:tiny-flux2.safetensors', task: generation}
  bare: {source: 'file:tiny-flux2.safetensors'}
  half: {source: 'file:tiny-flux2.safetensors', parts: {taesd: 'file:none.safetensors'}}
"""


def test_a_diffusion_model_in_several_files_is_a_model_for_all_commands(desk: Desk) -> None:
    paths = write_model(desk.folder)
    (desk.folder / "models.yaml").write_text(IMAGES)
    listed = {each["model"]: (each["task"], each["here"]) for each in desk.json("models")["models"]}
    assert listed == {
        "brush": ("image", True),
        "chatty": ("generation", True),
        "bare": ("image", True),
        "half": ("image", False),
    }
    answer = desk("show", "brush")
    for label, value in {
        "task": "image",
        "here": "yes",
        "taesd": "file:tiny-taef2.safetensors",
        "architecture": "FLUX.2 klein",
        "quantisation": "F16",
        "pictures": "256x128, 4 steps, guidance 1",
        "edits": "pictures",
    }.items():
        assert re.search(rf"^{label} +{re.escape(value)} *$", answer, re.MULTILINE)
    facts = desk.json("show", "brush")
    header = read_diffusion(paths[0], {"taesd": paths[1]})
    assert (facts["header"], facts["speech"], facts["problem"], facts["template_abilities"]) == (None, None, None, None)
    assert facts["image"] == {
        "family": "FLUX.2 klein",
        "parameters": header.parameter_count,
        "quantisation": "F16",
        "size": "256x128",
        "steps": 4,
        "cfg_scale": 1.0,
        "edits": True,
    }
    assert (facts["files"], facts["size"]) == ([str(path) for path in paths], header.file_size)
    assert facts["parts"] == {"taesd": "file:tiny-taef2.safetensors"}
    assert facts["memory"]["weights"] == header.weight_bytes
    assert facts["memory"]["total"] == facts["memory"]["weights"] + facts["memory"]["compute"]
    assert desk("verify", "brush") == "brush: good\n"
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    answer = desk("verify", "brush", status=1)
    assert "tiny-taef2.safetensors is no GGUF file, and tiny-taef2.safetensors is no good safetensors file" in answer


def test_show_says_why_a_diffusion_model_cannot_do_what_its_settings_say(desk: Desk) -> None:
    write_model(desk.folder, encoder=False)
    (desk.folder / "models.yaml").write_text(IMAGES)
    assert re.search("^edits +nothing: its files have no encoder for pictures *$", desk("show", "brush"), re.MULTILINE)
    chatty, bare, half = (desk.json("show", name) for name in ("chatty", "bare", "half"))
    assert (chatty["image"], chatty["memory"], chatty["task"]) == (None, None, "generation")
    assert "tiny-flux2.safetensors is not a GGUF file" in chatty["problem"]
    assert "is a FLUX.2 klein model, and its decoder is missing" in bare["problem"]
    assert half["problem"] == "the part taesd of half is not on this machine: file:none.safetensors"
    assert (half["here"], half["image"], half["memory"]) == (False, None, None)
    assert f"the part taesd file:none.safetensors is not on this machine: there is no file {desk.folder}/none" in desk(
        "verify", "half", status=1
    )


def test_show_says_how_to_get_the_first_file_that_is_absent(desk: Desk) -> None:
    write_model(desk.folder)
    (desk.folder / "models.yaml").write_text(
        "models:\n"
        "  far: {source: 'file:tiny-flux2.safetensors', parts: {taesd: 'hf:o/r/tiny-taef2.safetensors'}}\n"
        "  lost: {source: 'hf:o/r/flux2.safetensors', parts: {taesd: 'file:none.safetensors'}}\n"
        "  half: {source: 'file:tiny-flux2.safetensors', parts: {taesd: 'file:none.safetensors'}}\n"
    )
    edit = r"\$\{EDITOR:-nano\} .*models\.yaml"
    for name, fix in (("far", "llamaserve pull far"), ("lost", "llamaserve pull lost"), ("half", edit)):
        assert re.search(rf"^here +no; {fix} *$", desk("show", name), re.MULTILINE)


def test_parts_are_fetched_and_deleted_with_their_model(desk: Desk) -> None:
    model, decoder = write_model(desk.folder)
    desk.hub.files |= {path.name: path.read_bytes() for path in (model, decoder)}
    model.unlink()
    (desk.folder / "models.yaml").write_text(
        "models:\n"
        "  own: {source: 'hf:o/r/tiny-flux2.safetensors', parts: {taesd: 'file:tiny-taef2.safetensors'}}\n"
        "  brush: {source: 'hf:o/r/tiny-flux2.safetensors@main', parts: {taesd: 'hf:o/r/tiny-taef2.safetensors'}}\n"
    )
    assert "hf:o/r/tiny-flux2.safetensors" in desk("pull", "brush")
    locked = json.loads((desk.folder / "models.lock").read_text())["sources"]
    assert [*locked] == ["hf:o/r/tiny-flux2.safetensors@main", "hf:o/r/tiny-taef2.safetensors"]
    assert [each["here"] for each in desk.json("models")["models"]] == [True, True]
    assert desk("verify", "brush") == "brush: good\n"
    answer = desk("rm", "--yes", "brush")
    assert "brush: 2 files" in answer
    assert "(also the file of own)" in answer
    assert "brush: deleted 2 files" in answer
    assert not list((desk.folder / "hf").rglob("*.safetensors"))
    assert decoder.exists()


def test_a_whole_diffusion_model_of_the_folder_is_a_model_and_others_are_none(desk: Desk) -> None:
    encoders = {f"text_encoders.{name}.transformer.x": (2,) for name in ("clip_l", "clip_g")}
    whole = {"model.diffusion_model.joint_blocks.0.x": (2, 2), **encoders, "vae.decoder.x": (2, 3)}
    write_safetensors(desk.folder / "models/sub/sd3.safetensors", whole)
    write_safetensors(desk.folder / "models/vae.safetensors", {"decoder.x": (2, 3)})
    lines = {line.split()[0]: line.split()[1:] for line in desk("models").splitlines() if line.strip()}
    assert lines["sub/sd3.safetensors"][0] == "yes"
    assert lines["sub/sd3.safetensors"][-1] == "image"
    assert "vae.safetensors" not in lines
    assert desk.json("show", "sub/sd3")["image"] == {
        "family": "Stable Diffusion 3",
        "parameters": 14,
        "quantisation": "F16",
        "size": "1024x1024",
        "steps": 28,
        "cfg_scale": 4.5,
        "edits": False,
    }
    assert desk("verify", "sub/sd3") == "sub/sd3: good\n"
    assert "sub/sd3.safetensors: deleted 1 file" in desk("rm", "--yes", "sub/sd3")
    assert not (desk.folder / "models/sub/sd3.safetensors").exists()


def test_a_damaged_lock_is_told_with_its_line(desk: Desk) -> None:
    (desk.folder / "models.lock").write_text('{\n"version": 1,\n<<<<<<< HEAD\n')
    for command in ("pull tiny", "show tiny", "verify tiny", "verify", "models", "models --json", "plan"):
        assert f"{desk.folder}/models.lock:3: this is no JSON" in desk(*command.split(), status=1)
    assert "\ntiny (default)" in desk("models", status=1)  # what models.yaml has is listed all the same
