"""The file of a Whisper model: what it says of itself, and how it is loaded by the model's settings.

The same for whisper.cpp's files as ``model_file`` is for llama.cpp's. Knows nothing of processes, or of whether it is
loaded.
"""

from __future__ import annotations

from collections.abc import Sequence

from llamaserve.engine.params import Adapter, Footprint
from llamaserve.errors import InsufficientMemory, ModelNotCapable
from llamaserve.registry.budget import is_unified
from llamaserve.registry.hardware import performance_cores
from llamaserve.registry.load_plan import PROCESS, LoadPlan
from llamaserve.registry.memory import Estimate, claimed
from llamaserve.registry.other_file import OtherFile, refuse_adapters, refuse_text_settings
from llamaserve.registry.spec import ModelSpec
from llamaserve.registry.tasks import task_of
from llamaserve.registry.whisper_file import WhisperHeader, read_whisper
from llamaserve.registry.whisper_memory import estimate_whisper
from llamaserve.speech.values import TranscriberParams
from llamaserve.worker.protocol import Device


class SpeechFile(OtherFile[WhisperHeader]):
    """The file of a Whisper model with these settings; relative paths begin at ``base``."""

    task = "transcription"

    def _read_contents(self, *, check_sum: bool) -> WhisperHeader:
        return read_whisper(self._path(self.spec.sha256 if check_sum else None))

    def load_params(self) -> TranscriberParams:
        """Return how it is loaded, as far as the settings decide it."""
        return speech_params(self.spec, self.contents, gpu=self.spec.gpu_layers not in ("none", 0))

    def plan(self, adapters: Sequence[Adapter], budget: Footprint, devices: Sequence[Device]) -> LoadPlan:
        """Check the file, and decide how it is loaded. Raises ``ModelError`` for one that whisper.cpp must not see,
        ``ModelNotCapable`` and ``InsufficientMemory``.
        """
        self.checked(adapters)
        self._contents = self._read_contents(check_sum=True)  # anew, which takes no time
        return plan_speech(self._name, self.spec, self._contents, budget, devices)


def speech_params(spec: ModelSpec, header: WhisperHeader, *, gpu: bool) -> TranscriberParams:
    """Return how a Whisper model is loaded. Raises ``ModelNotCapable`` when it can't do what its settings say."""
    task = task_of(spec, None)
    if task != "transcription":
        raise ModelNotCapable(
            f"its file is one of whisper.cpp's, whose models do nothing but transcribe speech: {task}"
        )
    refuse_text_settings(spec)
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
    refuse_adapters(bool(spec.lora))
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
