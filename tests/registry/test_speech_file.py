"""Whisper models' files: what they say of themselves, how they are loaded, and what is refused before that."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import pytest
from gguf_writer import tiny_llama
from whisper_writer import whisper_file

from llamaserve.engine.params import Adapter, Footprint
from llamaserve.errors import ChecksumMismatch, GGUFError, InsufficientMemory, ModelFileMissing, ModelNotCapable
from llamaserve.registry import other_file, speech_file
from llamaserve.registry.load_plan import PROCESS, LoadPlan
from llamaserve.registry.spec import ModelSpec, Prefixes
from llamaserve.registry.speech_file import SpeechFile, plan_speech, speech_params
from llamaserve.registry.whisper_file import WhisperHeader, read_whisper
from llamaserve.registry.whisper_memory import estimate_whisper
from llamaserve.speech.values import TranscriberParams
from llamaserve.worker.protocol import Device

ROOMY = Footprint(1 << 40, 1 << 40)
CARD = Device("CUDA0", "a card", 1 << 34, 1 << 34)
ADAPTER = Adapter("style", "/style.gguf")
SHARED = Device("MTL0", "a part of the processor", 1 << 34, 1 << 34, "integrated")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speech") / "tiny.bin"
    path.write_bytes(whisper_file(ftype=2002, n_text_ctx=448).bytes())
    return path


@pytest.fixture(scope="module")
def header(path: Path) -> WhisperHeader:
    return read_whisper(path)


def spec(source: str = "file:tiny.bin", **fields: Any) -> ModelSpec:
    return ModelSpec(source=source, **fields)


def planned(header: WhisperHeader, budget: Footprint = ROOMY, *devices: Device, **fields: Any) -> LoadPlan:
    return plan_speech("ear", spec(**fields), header, budget, devices)


def on_gpu(plan: LoadPlan) -> bool:
    assert isinstance(plan.params, TranscriberParams)
    return plan.params.gpu


# ---- what it says of itself


def test_a_file_is_read_once_it_is_needed(path: Path) -> None:
    file = SpeechFile("ear", spec(), path.parent)
    assert file.is_here
    assert asyncio.run(file.read_contents()) is file.contents is file.known_contents
    assert file.contents.path == path
    assert file.load_params() == speech_params(spec(), file.contents, gpu=True)


def test_it_has_no_header_of_llama_cpp(path: Path) -> None:
    file = SpeechFile("ear", spec(), path.parent)
    assert file.known_header is None
    assert asyncio.run(file.peek()) is None
    with pytest.raises(ModelNotCapable, match=r"^ear transcribes speech .*; it is no model of texts$"):
        _ = file.header
    with pytest.raises(ModelNotCapable, match="no model of texts"):
        asyncio.run(file.read())


def test_a_file_that_cannot_be_read_is_not_tried_again_at_once(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = SpeechFile("ear", spec(), tmp_path)
    assert file.known_contents is None
    (tmp_path / "tiny.bin").write_bytes(path.read_bytes())
    assert file.known_contents is None
    now = other_file.time.monotonic()
    monkeypatch.setattr(other_file.time, "monotonic", lambda: now + other_file.FAILURE_KEPT)
    assert file.known_contents is not None


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (None, ModelFileMissing, "the weights of ear are not on this machine"),
        (b"", GGUFError, "tiny.bin is empty"),
        (tiny_llama(), GGUFError, "it is a GGUF file, which is llama.cpp's format"),
        (b"PK\x03\x04" + bytes(100), GGUFError, "this looks like a PyTorch or zip archive"),
        (whisper_file().bytes()[:-1], GGUFError, "tiny.bin is truncated"),
    ],
    ids=["none", "empty", "GGUF", "PyTorch", "cut"],
)
def test_no_other_file_is_loaded(data: bytes | None, error: type[Exception], message: str, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / "tiny.bin").write_bytes(data)
    file = SpeechFile("ear", spec(), tmp_path)
    for use in (lambda: file.contents, file.load_params, lambda: file.plan((), ROOMY, ())):
        with pytest.raises(error, match=message):
            use()
    assert file.known_contents is None


def test_a_file_that_becomes_another_is_read_anew_before_it_is_loaded(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tiny.bin"
    copy.write_bytes(path.read_bytes())
    file = SpeechFile("ear", spec(), tmp_path)
    assert file.contents.quantisation == "Q4_0"
    copy.write_bytes(whisper_file(n_text_layer=2).bytes())
    plan = file.plan((), ROOMY, ())
    assert (file.contents.quantisation, file.contents.text_layers) == ("F16", 2)
    assert plan.estimate.weights.host == file.contents.weight_bytes
    copy.write_bytes(b"")
    with pytest.raises(GGUFError, match="is empty"):
        file.plan((), ROOMY, ())


def test_a_promised_sum_is_kept(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAMASERVE_CACHE", str(tmp_path))
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    assert SpeechFile("ear", spec(sha256=right), path.parent).plan((), ROOMY, ())
    wrong = SpeechFile("ear", spec(sha256="f" * 64), path.parent)
    with pytest.raises(ChecksumMismatch):
        wrong.plan((), ROOMY, ())
    assert wrong.known_contents is not None  # to list it, that is not looked at


# ---- how it is loaded


def test_the_settings_say_how_it_is_loaded(header: WhisperHeader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech_file, "performance_cores", lambda: 6)
    path = str(header.path)
    own = TranscriberParams(path=path, threads=6, adaptive_threads=True, gpu=False)
    assert planned(header).params == planned(header, task="transcription").params == own
    fixed = TranscriberParams(path=path, threads=3, adaptive_threads=False, gpu=False)
    assert planned(header, threads=3).params == fixed


def test_what_a_plan_needs_is_what_it_takes_and_its_process(header: WhisperHeader) -> None:
    plan = planned(header)
    taken = estimate_whisper(header, gpu=False)
    assert plan.need == taken + PROCESS
    assert (plan.fixed, plan.spill) == (PROCESS, 0)
    assert plan.estimate.total == plan.estimate.certain + plan.estimate.compute == taken
    assert plan.estimate.weights == Footprint(header.weight_bytes)
    assert planned(header, plan.need) == plan
    with pytest.raises(InsufficientMemory) as refused:
        planned(header, plan.need - Footprint(1))
    needed = f"{plan.need.host / 1e6:.0f} MB"
    assert refused.value.message == f"ear needs {needed} of memory, and models may use {needed}"
    assert refused.value.hint == "choose a smaller model, or give models more with --memory"


@pytest.mark.parametrize("setting", ["auto", "all", 1, 99])
def test_it_is_on_a_gpu_if_it_fits_there(header: WhisperHeader, setting: str | int) -> None:
    plan = planned(header, ROOMY, CARD, gpu_layers=setting)
    assert on_gpu(plan)
    there, here = estimate_whisper(header, gpu=True), estimate_whisper(header, gpu=False)
    assert plan.need == Footprint(here.host, there.device) + PROCESS  # whisper.cpp may not know that GPU
    assert plan.need.device > plan.estimate.weights.device == header.weight_bytes
    assert on_gpu(planned(header, plan.need, CARD, gpu_layers=setting))
    without = planned(header, Footprint(1 << 40, plan.need.device - 1), CARD, gpu_layers=setting)
    assert not on_gpu(without)
    assert without.need == planned(header).need


@pytest.mark.parametrize("setting", ["none", 0])
def test_it_stays_off_a_gpu_where_the_settings_say_so(header: WhisperHeader, setting: str | int) -> None:
    plan = planned(header, ROOMY, CARD, gpu_layers=setting)
    assert not on_gpu(plan)
    assert plan.need.device == 0
    loaded = SpeechFile("ear", spec(gpu_layers=setting), header.path.parent).load_params()
    assert isinstance(loaded, TranscriberParams)
    assert not loaded.gpu


def test_without_a_gpu_none_is_used(header: WhisperHeader) -> None:
    assert not on_gpu(planned(header, gpu_layers="all"))


def test_a_gpu_that_uses_the_main_memory_is_planned_within_it(header: WhisperHeader) -> None:
    together, taken = planned(header, ROOMY, SHARED), estimate_whisper(header, gpu=True)
    assert on_gpu(together)
    assert together.need == Footprint(taken.host + taken.device, taken.device) + PROCESS
    assert on_gpu(planned(header, together.need, SHARED))
    for room in (together.need - Footprint(1), together.need - Footprint(0, 1)):
        fewer = planned(header, room, SHARED)
        assert not on_gpu(fewer)
        assert fewer.need.fits(room)


def test_where_neither_has_room_it_is_refused(header: WhisperHeader) -> None:
    for device in (CARD, SHARED):
        with pytest.raises(InsufficientMemory, match="ear needs"):
            planned(header, Footprint(1000, 1000), device)


# ---- what it can't do


@pytest.mark.parametrize("task", ["generation", "embedding", "rerank", "moderation"])
def test_a_task_of_another_model_is_refused(header: WhisperHeader, task: str) -> None:
    with pytest.raises(ModelNotCapable, match=rf"^ear can't be loaded: its file .* nothing but .* speech: {task}$"):
        planned(header, task=task)


@pytest.mark.parametrize("idle", [{"pooling": "mean"}, {"prefixes": Prefixes(query="q")}], ids=["pooling", "prefixes"])
def test_settings_for_embeddings_are_refused(header: WhisperHeader, idle: dict[str, Any]) -> None:
    with pytest.raises(ModelNotCapable, match=r"^ear can't be loaded: `pooling` and `prefixes` are"):
        planned(header, **idle)


def test_adapters_are_refused_wherever_they_come_from(header: WhisperHeader) -> None:
    with pytest.raises(ModelNotCapable, match="LoRA adapters are for models that generate text"):
        planned(header, lora=[{"source": "file:style.gguf"}])
    file = SpeechFile("ear", spec(), header.path.parent)
    assert file.checked(()) == ()
    for use in (lambda: file.checked([ADAPTER]), lambda: file.plan([ADAPTER], ROOMY, ())):
        with pytest.raises(ModelNotCapable, match="LoRA adapters are for models that generate text"):
            use()
