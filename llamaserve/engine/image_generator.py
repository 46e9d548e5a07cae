"""Generates pictures, for many requests with one loaded diffusion model, one after the other.

``submit``, ``cancel`` and ``step`` belong to one thread, which calls ``step`` while it is not idle. A step is a whole
picture, of which is told on the way. It can't be interrupted: who does not want to wait for its end ends the process.
Knows nothing of processes or HTTP.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np

from llamaserve.engine.events import EngineEvent, Failed, Occupancy
from llamaserve.engine.work import Work
from llamaserve.errors import EngineError, LlamaserveError, to_value
from llamaserve.heap import give_back
from llamaserve.images.diffusion import Diffusion, Inputs, Pixels, Watch
from llamaserve.images.encoding import encode, enlarged
from llamaserve.images.values import (
    DiffusionParams,
    GeneratedImage,
    ImageGeneration,
    ImageStep,
    PartialImage,
    PictureFile,
    Size,
)

Tell = Callable[[Sequence[EngineEvent]], None]

# Pictures take seconds to hours, and whoever chats beside that waits for every token. What has a low priority takes
# little from others, and hardly longer itself where nobody else computes.
_NICENESS: Final = 15


class _Request(NamedTuple):
    number: int
    job: ImageGeneration
    inputs: Inputs


class ImageGenerator(Work):
    """The requests to one diffusion model, from submission to their last event."""

    def __init__(self, diffusion: Diffusion, tell: Tell) -> None:
        """``tell`` is called with what is to be told in the middle of a step."""
        self._diffusion = diffusion
        self._tell = tell
        self._requests: dict[int, _Request] = {}  # by number, in the order in which they came
        self._told: Occupancy | None = None

    @property
    def idle(self) -> bool:
        """See ``Work``."""
        return not self._requests

    def submit(self, request: int, job: ImageGeneration) -> None:
        """Begin to make a picture; the files that the job names are read now. Raises ``EngineError`` if they can't be,
        or are not as long as a picture of that size.
        """
        init = None if job.init is None else _on_canvas(_pixels(job.init, 3), job.canvas)
        mask = None if job.mask is None else _on_canvas(_pixels(job.mask, 1), job.canvas)
        inputs = Inputs(init, mask, [_pixels(each, 3) for each in job.references])
        self._requests[request] = _Request(request, job, inputs)

    def step(self) -> list[EngineEvent]:
        """See ``Work``."""
        request = next(iter(self._requests.values()))
        try:
            return [GeneratedImage(request.number, self._picture(request))]
        except LlamaserveError as error:
            return [Failed(request.number, to_value(error))]
        finally:
            del self._requests[request.number]
            give_back()

    def cancel(self, request: int) -> None:
        """See ``Work``."""
        self._requests.pop(request, None)

    def interrupt(self, request: int | None) -> None:
        """See ``Work``. The library can't be."""

    def occupancy(self) -> Occupancy | None:
        """See ``Work``."""
        running = min(1, len(self._requests))
        now = Occupancy(running, len(self._requests) - running)
        changed, self._told = now != self._told, now
        return now if changed else None

    def _picture(self, request: _Request) -> bytes:
        """Return a request's picture as a file, and tell how far it is on the way."""
        job, shown = request.job, 0

        def step(done: int, steps: int) -> None:
            self._tell([ImageStep(request.number, done, steps)])

        def partial(pixels: Pixels) -> None:
            nonlocal shown
            self._tell([PartialImage(request.number, shown, _file(job, request.inputs, enlarged(pixels, job.canvas)))])
            shown += 1

        pixels = self._diffusion.generate(job, request.inputs, Watch(step, partial))
        return _file(job, request.inputs, pixels)


def _file(job: ImageGeneration, inputs: Inputs, pixels: Pixels) -> bytes:
    """Return a picture of the canvas' size as the file that is wanted."""
    if inputs.init is not None and inputs.mask is not None:
        pixels = _blended(inputs.init, pixels, inputs.mask)
    left, top = (job.canvas.width - job.width) // 2, (job.canvas.height - job.height) // 2
    cut = np.ascontiguousarray(pixels[top : top + job.height, left : left + job.width])
    return encode(cut, job.format, quality=job.quality, settings=job.settings)


def _blended(old: Pixels, new: Pixels, mask: Pixels) -> Pixels:
    """Return the old picture with the new one where the mask is 255: what is not to be changed is as it was, to the
    last bit, and not as the model has it after encoding and decoding it.
    """
    share = mask[:, :, None].astype(np.float32) / 255
    return np.rint(old + (new.astype(np.float32) - old) * share).astype(np.uint8)


def _on_canvas(pixels: Pixels, canvas: Size) -> Pixels:
    """Return a picture or mask of the canvas' size: what is missing around it is as its edge is."""
    height, width = pixels.shape[:2]
    top, left = (canvas.height - height) // 2, (canvas.width - width) // 2
    if top < 0 or left < 0:
        raise EngineError(f"an uploaded picture has {width}x{height} pixels, more than {canvas}")
    around = ((top, canvas.height - height - top), (left, canvas.width - width - left), (0, 0))
    return np.pad(pixels, around[: pixels.ndim], "edge")


def _pixels(file: PictureFile, channels: int) -> Pixels:
    """Read a file of pixels. Raises ``EngineError``."""
    shape = (file.height, file.width) if channels == 1 else (file.height, file.width, channels)
    try:
        pixels = np.fromfile(file.path, np.uint8)
    except (OSError, ValueError) as error:
        raise EngineError(f"an uploaded picture can't be read: {error}") from error
    if pixels.size != np.prod(shape):
        raise EngineError(f"an uploaded picture has {pixels.size} bytes; {shape} are expected")
    return pixels.reshape(shape)


class LoadedImageGenerator(ImageGenerator):
    """An image generator that owns its model."""

    def __init__(self, params: DiffusionParams, on_progress: Callable[[float], object], tell: Tell) -> None:
        """Load the model, and have this thread, and those that it starts, give way to others'. Raises
        ``ModelLoadFailed``.
        """
        os.nice(_NICENESS)  # which threads inherit: the library starts its own as it loads some models
        diffusion = Diffusion(params, on_progress)
        super().__init__(diffusion, tell)
        self.gpu = diffusion.gpu
        give_back()

    def close(self) -> None:
        """Free the model."""
        self._diffusion.close()
