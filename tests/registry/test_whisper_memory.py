"""The memory estimate of Whisper models against what whisper.cpp really takes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from whisper_writer import whisper_file

from llamaserve.registry.whisper_file import WhisperHeader, read_whisper
from llamaserve.registry.whisper_memory import estimate_whisper

CHILD = Path(__file__).with_name("running_whisper.py")
MEGABYTE = 1_000_000


def header_of(folder: Path, **numbers: int) -> WhisperHeader:
    path = folder / "model.bin"
    path.write_bytes(whisper_file(n_text_ctx=448, **numbers).bytes())
    return read_whisper(path)


def sized(width: int, audio: int, text: int) -> dict[str, int]:
    heads = width // 64
    names = ("n_audio_state", "n_audio_head", "n_text_head", "n_audio_layer", "n_text_layer")
    return dict(zip(names, (width, heads, heads, audio, text), strict=True))


@pytest.mark.skipif(importlib.util.find_spec("_pywhispercpp") is None, reason="pywhispercpp is not installed")
@pytest.mark.parametrize(
    "numbers",
    [
        sized(384, 4, 4) | {"ftype": 1},
        sized(512, 6, 6) | {"ftype": 2007, "n_vocab": 51865},
        sized(768, 2, 8) | {"ftype": 2002, "n_vocab": 51866, "n_mels": 128},
    ],
    ids=["tiny.en in F16", "base in Q8_0", "wide in Q4_0"],
)
def test_the_estimate_is_what_a_model_takes_when_used_to_the_full(tmp_path: Path, numbers: dict[str, int]) -> None:
    header = header_of(tmp_path, **numbers)
    command = [sys.executable, str(CHILD), "measure", str(header.path)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, capture_output=True, check=True, env=environment)
    measured = json.loads(done.stdout)
    assert measured["loaded"] < measured["window"] < measured["used"]
    estimate = estimate_whisper(header, gpu=False)
    assert estimate.device == 0
    assert measured["used"] * 0.98 < estimate.host < measured["used"] * 1.1


def test_on_a_gpu_only_what_the_cpu_works_on_stays_in_main_memory(tmp_path: Path) -> None:
    header = header_of(tmp_path, ftype=2002)
    here, there = estimate_whisper(header, gpu=False), estimate_whisper(header, gpu=True)
    assert there.host < min(here.host, 100 * MEGABYTE)
    assert there.device > header.weight_bytes + 300 * MEGABYTE


def test_layers_width_and_quantisation_count(tmp_path: Path) -> None:
    small = header_of(tmp_path, ftype=2002)
    others = [{"n_text_layer": 2}, {"n_audio_layer": 2}, {"n_mels": 128}, {"ftype": 2007}, sized(128, 1, 1)]
    for numbers in others:
        larger = header_of(tmp_path, **{"ftype": 2002, **numbers})
        assert larger.weight_bytes > small.weight_bytes
        more = estimate_whisper(larger, gpu=False) - estimate_whisper(small, gpu=False)
        assert more.host >= larger.weight_bytes - small.weight_bytes
