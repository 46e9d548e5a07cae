"""stable-diffusion.cpp behind checked calls: one loaded model that makes one picture at a time.

The only module that imports the binding, of which it uses the C structs and functions alone. What the binding does not
do is done here: a file that can't be loaded is an error (the binding frees a null pointer then), what the library
allocates for a picture is freed, and callbacks live as long as the library may call them. A process has one model, and
uses it in one thread. The library writes little to standard output and standard error, which nobody should parse.

The library can't be stopped: a picture that nobody waits for any more ends with the process. Knows nothing of requests,
or of files of pictures.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from llamaserve.errors import EngineError, ModelLoadFailed
from llamaserve.images.values import SAMPLERS, SCHEDULERS, Course, DiffusionParams, ImageGeneration, LoraFile, Size

C = TypeVar("C", bound="_Call")

Pixels = npt.NDArray[np.uint8]  # height, width, 3; those of a mask height, width

_WARNING: Final = 2  # the level of log messages from which on they may say why something failed
_HEAD: Final = re.compile(r"^\[\w+ *\] *\S+:\d+ *- *")  # what is before a log message
_SAMPLING, _SAMPLED = "generating image: ", "sampling completed"  # what the log says before and after the steps
_ON_GPU: Final = re.compile(r"params memory size = .*VRAM (?!0\.00MB)")
_NOTHING, _PROJECTION, _SMALL_DECODER = 0, 1, 2  # preview_t
_AT_RUNTIME: Final = 2  # lora_apply_mode_t; else rounding errors would be left in the weights
_LORA_FAILED: Final = "load lora tensors from "  # begins a warning, after which the picture is made without it
_OVERLAP: Final = 0.5  # of the tiles in which a large picture is decoded


class Inputs(NamedTuple):
    """The pixels that a picture is made from: see ``ImageGeneration``."""

    init: Pixels | None = None
    mask: Pixels | None = None
    references: Sequence[Pixels] = ()


class Watch(NamedTuple):
    """Who is told how far a picture is: how many steps are done, of how many, and what it looks like by then."""

    step: Callable[[int, int], None]
    partial: Callable[[Pixels], None]


class Diffusion:
    """A loaded model. It must be closed."""

    def __init__(self, params: DiffusionParams, on_progress: Callable[[float], object]) -> None:
        """Load files that have been checked. ``on_progress`` hears how much of the weights is there, from 0 to 1.
        Raises ``ModelLoadFailed``.
        """
        self._library = library = _library()
        self._previews = _SMALL_DECODER if params.small_decoder else _PROJECTION
        native = library.binding.sd_ctx_params_t()
        library.initialise("sd_ctx_params_init", native)
        setattr(native, "model_path" if params.whole else "diffusion_model_path", os.fsencode(params.path))
        for part, path in params.parts.items():
            setattr(native, f"{part}_path", os.fsencode(path))
        native.tae_preview_only = "vae" in params.parts
        native.vae_decode_only = not params.encodes
        native.free_params_immediately = False
        native.lora_apply_mode = _AT_RUNTIME
        native.diffusion_flash_attn = params.flash_attention
        native.vae_conv_direct = True  # the same pixels in less than half the memory
        native.n_threads = params.threads
        with library.calling(_Loading(on_progress)) as call:
            self._context = library.binding.new_sd_ctx(ctypes.byref(native))
        if not self._context:  # a null pointer, which is an object here
            raise ModelLoadFailed(f"stable-diffusion.cpp can't load {params.path}: {call.complaint}")
        self.gpu = call.on_gpu

    def close(self) -> None:
        """Free the model. Further calls do nothing."""
        context, self._context = self._context, None
        if context:
            self._library.binding.free_sd_ctx(context)

    def generate(self, job: ImageGeneration, inputs: Inputs, watch: Watch) -> Pixels:
        """Make a picture in the size of the job's canvas. Raises ``EngineError``."""
        library = self._library
        preview = self._previews if job.partial_images else _NOTHING
        native, kept = self._native(job, inputs)
        with library.calling(_Sampling(library, watch, preview, job.partial_images)) as call:
            pictures = library.binding.generate_image(self._context, ctypes.byref(native))
        del kept
        if not pictures:
            raise EngineError(f"stable-diffusion.cpp could not make the picture: {call.complaint}")
        try:
            pixels = _copied(pictures[0])
        finally:
            library.free(pictures[0].data)
            library.free(pictures)
        if call.failure is not None:
            raise call.failure
        if pixels.shape != (job.canvas.height, job.canvas.width, 3):
            raise EngineError(f"stable-diffusion.cpp made a picture of the wrong shape: {pixels.shape}")
        if call.lora_failed:
            raise EngineError(f"a LoRA could not be loaded: {call.complaint}")
        if pixels.min() == pixels.max():
            raise EngineError(
                "the picture has come out in one colour: the model has computed numbers that are none. Other steps, "
                "another sampler or scheduler, or less weight on words or LoRAs may help"
            )
        return pixels

    def _native(self, job: ImageGeneration, inputs: Inputs) -> tuple[Any, list[Any]]:
        """Return the job as the library takes it, and what must live as long as that. Raises ``EngineError``."""
        binding = self._library.binding
        native = binding.sd_img_gen_params_t()
        self._library.initialise("sd_img_gen_params_init", native)
        native.prompt, native.negative_prompt = _text(job.prompt), _text(job.negative_prompt)
        native.width, native.height = job.canvas
        native.seed = job.seed
        sample = native.sample_params
        sample.sample_steps = job.steps
        sample.guidance.txt_cfg = job.cfg_scale
        sample.guidance.distilled_guidance = job.guidance
        sample.sample_method = len(SAMPLERS) if job.sampler is None else SAMPLERS.index(job.sampler)
        sample.scheduler = len(SCHEDULERS) if job.scheduler is None else SCHEDULERS.index(job.scheduler)
        native.vae_tiling_params.enabled = job.tiled
        native.vae_tiling_params.target_overlap = _OVERLAP
        kept: list[Any] = []
        if inputs.init is not None:
            native.init_image = self._image(inputs.init, job.canvas, kept)
            course = Course.of(job.steps, job.strength)
            sample.sample_steps, native.strength = course.total, _strength(course)
        if inputs.mask is not None:
            native.mask_image = self._image(inputs.mask, job.canvas, kept)
        if inputs.references:
            images = [self._image(each, Size(each.shape[1], each.shape[0]), kept) for each in inputs.references]
            references = (binding.sd_image_t * len(images))(*images)
            kept.append(references)
            native.ref_images, native.ref_images_count = references, len(images)
            native.auto_resize_ref_image = True
        loras = self._loras(job.loras)
        kept.append(loras)
        native.loras, native.lora_count = loras, len(loras)
        return native, kept

    def _image(self, pixels: Pixels, size: Size, kept: list[Any]) -> Any:
        if pixels.shape[:2] != (size.height, size.width) or pixels.dtype != np.uint8:
            raise EngineError(f"a picture of {size} is expected, and there are {pixels.shape} of {pixels.dtype}")
        pixels = np.ascontiguousarray(pixels)
        kept.append(pixels)
        data = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        channels = 1 if pixels.ndim == 2 else pixels.shape[2]
        return self._library.binding.sd_image_t(size.width, size.height, channels, data)

    def _loras(self, loras: Sequence[LoraFile]) -> Any:
        kind = self._library.binding.sd_lora_t
        return (kind * len(loras))(*[kind(False, each.scale, os.fsencode(each.path)) for each in loras])


def partial_steps(count: int, steps: int) -> set[int]:
    """Return after which of the steps to look at a picture so many times, at even intervals; fewer if there are not so
    many steps.
    """
    return {math.ceil(steps * number / (count + 1)) for number in range(1, count + 1)}


def _strength(course: Course) -> float:
    """Return the strength with which the library makes just these steps. From another one it would make fewer than are
    wanted, and with few of them begin with the first whatever it is; then nothing is left of the picture.
    """
    if course.made == course.total:
        return 1.0
    return (course.made - 0.5) / course.total  # of which it takes the whole part, and adds one


class _Call:
    """What the library says while it is called: log lines, and how far it is."""

    def __init__(self) -> None:
        self._complaints: deque[str] = deque(maxlen=4)
        self.on_gpu = False
        self.lora_failed = False
        self.failure: Exception | None = None  # the first one in a callback, through which it can't pass

    @property
    def complaint(self) -> str:
        """Why it has failed."""
        return "; ".join(self._complaints) or "it does not say why"

    def log(self, level: int, message: str) -> None:
        message = _HEAD.sub("", message).strip()
        if level >= _WARNING:
            self._complaints.append(message)
            self.lora_failed |= message.startswith(_LORA_FAILED)
        self.on_gpu |= _ON_GPU.search(message) is not None

    def progress(self, step: int, steps: int) -> None:
        """So many steps of something are done, or tensors loaded."""

    def preview(self, step: int, pixels: Pixels) -> None:
        """The picture looks like this after a step."""


class _Loading(_Call):
    def __init__(self, on_progress: Callable[[float], object]) -> None:
        super().__init__()
        self._on_progress = on_progress

    def progress(self, step: int, steps: int) -> None:
        self._on_progress(step / max(steps, 1))


class _Sampling(_Call):
    def __init__(self, library: _Library, watch: Watch, preview: int, count: int) -> None:
        super().__init__()
        self._library = library
        self._watch = watch
        self._preview = preview
        self._count = count
        self._chosen: set[int] = set()
        self._under_way = False
        self._show(0)

    def log(self, level: int, message: str) -> None:
        super().log(level, message)
        self._under_way = (self._under_way or _SAMPLING in message) and _SAMPLED not in message

    def progress(self, step: int, steps: int) -> None:
        if not self._under_way:  # these are tiles of a picture that is encoded or decoded
            return
        if not step:
            self._chosen = partial_steps(self._count, steps)
        self._show(step + 1)
        self._watch.step(step, steps)

    def preview(self, step: int, pixels: Pixels) -> None:
        if step in self._chosen:
            self._chosen.discard(step)
            self._watch.partial(pixels)

    def _show(self, step: int) -> None:
        """Have the library show the picture after a step only if that is wanted, since decoding takes time."""
        self._library.show(self._preview, step in self._chosen)


class _Library:
    """The binding, and the callbacks that it has."""

    def __init__(self) -> None:
        try:
            self.binding = binding = importlib.import_module("stable_diffusion_cpp.stable_diffusion_cpp")
        except (ImportError, OSError, RuntimeError) as error:  # of which the last two are the library's
            raise ModelLoadFailed(f"stable-diffusion.cpp can't be loaded: {error}") from error
        self._lib = binding._lib
        self._call = _Call()
        self._log = binding.sd_log_callback(self._on_log)
        self._progress = binding.sd_progress_callback(self._on_progress)
        self._preview = binding.sd_preview_callback(self._on_preview)
        binding.sd_set_log_callback(self._log, None)
        binding.sd_set_progress_callback(self._progress, None)
        libc = ctypes.CDLL(None)
        libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
        self._free = libc.free

    def initialise(self, function: str, native: Any) -> None:
        """Fill a struct with the library's defaults."""
        fill = getattr(self._lib, function)
        fill.argtypes, fill.restype = [ctypes.c_void_p], None
        fill(ctypes.byref(native))

    def free(self, pointer: Any) -> None:
        """Free what the library has allocated."""
        self._free(ctypes.cast(pointer, ctypes.c_void_p))

    def show(self, mode: int, after_next_step: bool) -> None:
        """Say how the library shows a picture on the way, which it looks up when it begins, and whether after the next
        step.
        """
        self.binding.sd_set_preview_callback(self._preview, mode, 1, after_next_step, False, None)

    @contextlib.contextmanager
    def calling(self, call: C) -> Iterator[C]:
        """Have a call hear what the library says within the block."""
        self._call = call
        try:
            yield call
        finally:
            self._call = _Call()

    def _on_log(self, level: int, text: bytes, _: object) -> None:
        with self._kept_failure():
            self._call.log(level, text.decode(errors="replace"))

    def _on_progress(self, step: int, steps: int, _seconds: float, _: object) -> None:
        with self._kept_failure():
            self._call.progress(step, steps)

    def _on_preview(self, step: int, count: int, frames: Any, _noisy: bool, _: object) -> None:
        with self._kept_failure():
            if count:
                self._call.preview(step, _copied(frames[0]))

    @contextlib.contextmanager
    def _kept_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised once the library has returned
            self._call.failure = self._call.failure or error


@functools.cache
def _library() -> _Library:
    return _Library()


def _copied(image: Any) -> Pixels:
    return np.ctypeslib.as_array(image.data, (image.height, image.width, image.channel)).copy()


def _text(text: str) -> bytes:
    """Return a text as the library takes it. Raises ``EngineError`` for one that it would cut short."""
    if "\0" in text:
        raise EngineError("there is a zero character in the prompt, which would end there")
    return text.encode()
