"""The file of a Whisper model: what it says of itself, and how it is loaded by the model's settings.

The same for whisper.cpp's files as ``model_file`` is for llama.cpp's. Knows nothing of processes, or of whether it is
loaded.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from llamaserve.engine.params import Adapter, Footprint
from llamaserve.errors import InsufficientMemory, ModelError, ModelNotCapable
from llamaserve.registry.budget import is_unified
from llamaserve.registry.gguf import GGUFHeader
from llamaserve.registry.hardware import performance_cores
from llamaserve.registry.load_plan import PROCESS, LoadPlan
from llamaserve.registry.memory import Estimate, claimed
from llamaserve.registry.model_file import FAILURE_KEPT, ModelFile
from llamaserve.registry.spec import ModelSpec, Prefixes
from llamaserve.registry.tasks import WORK, task_of
from llamaserve.registry.whisper_file import WhisperHeader, read_whisper
from llamaserve.registry.whisper_memory import estimate_whisper
from llamaserve.speech.values import TranscriberParams
from llamaserve.worker.protocol import Device

logger = logging.getLogger(__name__)


class SpeechFile(ModelFile):
    """The file of a Whisper model with these settings; relative paths begin at ``base``."""

    def __init__(self, name: str, spec: ModelSpec, base: Path) -> None:
        super().__init__(name, spec, base)
        self._speech: WhisperHeader | None = None

    @property
    def header(self) -> GGUFHeader:
        """None of llama.cpp's. Raises ``ModelNotCapable``."""
        raise ModelNotCapable(f"{self._name} {WORK['transcription']}; it is no model of texts")

    @property
    def known_header(self) -> GGUFHeader | None:
        """None, since it is no file of llama.cpp's."""
        return None

    async def peek(self) -> GGUFHeader | None:
        """See ``known_header``."""
        return None

    @property
    def speech(self) -> WhisperHeader:
        """What the file says of itself; read once it is needed. Raises ``ModelError``."""
        if self._speech is None:
            self._speech = read_whisper(self._path(self.spec.sha256))
        return self._speech

    @property
    def known_speech(self) -> WhisperHeader | None:
        """The same, or None when the file is missing or bad. A promised sum is not looked at."""
        if self._speech is not None or time.monotonic() < self._unreadable_until:
            return self._speech
        try:
            self._speech = read_whisper(self._path())
        except ModelError as error:
            logger.info("%s: %s", self._name, error.message)
            self._unreadable_until = time.monotonic() + FAILURE_KEPT
        return self._speech

    async def read_speech(self) -> WhisperHeader:
        """Return what the file says of itself, read in a thread if it is not known yet. Raises ``ModelError``."""
        return self._speech if self._speech is not None else await asyncio.to_thread(lambda: self.speech)

    def checked(self, adapters: Sequence[Adapter]) -> tuple[Adapter, ...]:
        """Return no adapters. Raises ``ModelNotCapable`` when there are some."""
        _refuse_adapters(bool(adapters))
        return ()

    def load_params(self) -> TranscriberParams:
        """Return how it is loaded, as far as the settings decide it."""
        return speech_params(self.spec, self.speech, gpu=self.spec.gpu_layers not in ("none", 0))

    def plan(self, adapters: Sequence[Adapter], budget: Footprint, devices: Sequence[Device]) -> LoadPlan:
        """Check the file, and decide how it is loaded. Raises ``ModelError`` for one that whisper.cpp must not see,
        ``ModelNotCapable`` and ``InsufficientMemory``.
        """
        self.checked(adapters)
        self._speech = read_whisper(self._path(self.spec.sha256))  # anew, which takes no time
        return plan_speech(self._name, self.spec, self._speech, budget, devices)


def speech_params(spec: ModelSpec, header: WhisperHeader, *, gpu: bool) -> TranscriberParams:
    """Return how a Whisper model is loaded. Raises ``ModelNotCapable`` when it can't do what its settings say."""
    task = task_of(spec, None)
    if task != "transcription":
        raise ModelNotCapable(
            f"its file is one of whisper.cpp's, whose models do nothing but transcribe speech: {task}"
        )
    if spec.pooling != "auto" or spec.prefixes != Prefixes():
        raise ModelNotCapable("`pooling` and `prefixes` are for models that make embeddings: leave them out")
    return TranscriberParams(
        path=str(header.path),
        threads=performance_cores() if spec.threads == "auto" else spec.threads,
        adaptive_threads=spec.threads == "auto",
        gpu=gpu,
    )


def plan_speech(
    name: str, spec: ModelSpec, header: WhisperHeader, budget: Footprint, devices: Sequence[Device]
) -> LoadPlan:
    """Decide how a Whisper model is loaded, on a GPU if it fits there, and return what that takes. Raises
    ``ModelNotCapable``, and ``InsufficientMemory`` when that is more than the whole budget.
    """
    _refuse_adapters(bool(spec.lora))
    wanted = spec.gpu_layers not in ("none", 0) and bool(devices)
    for gpu in (True, False) if wanted else (False,):
        taken = _taken(header, gpu=gpu, unified=is_unified(devices))
        need = claimed(taken, unified=is_unified(devices)) + PROCESS
        if need.fits(budget):
            break
    else:
        raise InsufficientMemory(
            f"{name} needs {need.host / 1e6:.0f} MB of memory, and models may use {budget.host / 1e6:.0f} MB",
            hint="choose a smaller model, or give models more with --memory",
        )
    try:
        params = speech_params(spec, header, gpu=gpu)
    except ModelNotCapable as error:
        raise ModelNotCapable(f"{name} can't be loaded: {error.message}") from error
    weights = Footprint(0, header.weight_bytes) if gpu else Footprint(header.weight_bytes)
    return LoadPlan(params, Estimate(weights, Footprint(), taken - weights, 0, Footprint()), need, PROCESS, 0)


def _taken(header: WhisperHeader, *, gpu: bool, unified: bool) -> Footprint:
    """Return what it takes. These are GPUs that llama.cpp can use, and only the child learns whether whisper.cpp's
    library can, too: so both must have room for it, but where they use the main memory.
    """
    there = estimate_whisper(header, gpu)
    return there if unified else Footprint(estimate_whisper(header, False).host, there.device)


def _refuse_adapters(given: bool) -> None:
    if given:
        raise ModelNotCapable("LoRA adapters are for models that generate text")
