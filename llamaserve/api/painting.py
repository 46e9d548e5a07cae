"""Making the pictures of an HTTP request, one after the other, until they are all made or its client has left.

At each model one picture is made at a time, and requests take turns, picture by picture. The library can't be stopped
in the middle of one. So when nobody waits for it any more, and it is not done very soon, the model's process is ended;
the next request loads the model again.

Uploads lie in a folder of their own, which is gone when the request is over. Knows files and the stream of engine
events; what a request or an answer looks like is the endpoint's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import shlex
import shutil
import sys
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from llamaserve.api.generating import phase_of
from llamaserve.api.image_fields import ImageFields, Order, VariationRequest, described, order
from llamaserve.api.image_uploads import order_with_uploads
from llamaserve.api.services import Services
from llamaserve.api.uploads import Upload, kept
from llamaserve.errors import ModelNotCapable, NotSupported, TimeLimitExceeded
from llamaserve.images.values import GeneratedImage, ImageGeneration, ImageStep, PartialImage
from llamaserve.registry.admission import Place
from llamaserve.registry.diffusion_file import DiffusionHeader
from llamaserve.registry.diffusion_memory import PictureWork
from llamaserve.registry.image_file import ImageFile, footprint
from llamaserve.registry.served import ServedModel, Use
from llamaserve.worker.process import ImageStream

GRACE: Final = 0.7  # seconds in which a picture that nobody waits for may still become ready
_NEEDED: Final = ("stable_diffusion_cpp", "PIL")  # modules of the extra
_EXTRA: Final = 'extra == "images"'


class Painting:
    """The pictures of one request at one model. It must be closed."""

    def __init__(self, services: Services, model: ServedModel, body: ImageFields, upload: Upload | None = None) -> None:
        """The upload has the files that the body names, and is closed when this is."""
        self._services = services
        self._model = model
        self._body = body
        self._upload = upload
        self._folder: Path | None = None
        self._place: Place | None = None
        self._hold: Use | None = None  # so that the model is not unloaded between two pictures
        self._under_way: tuple[int, ImageStep | None] | None = None  # the picture being made, by number
        self._waits = False  # for its turn
        self._time_limit: float | None = None
        self._deadline: float | None = None  # moment
        self._current: _Current | None = None
        self.order: Order | None = None  # known once it is open

    async def open(self) -> Order:
        """Look at what is asked for, and at the uploads. Raises whatever makes the request impossible."""
        try:
            return await self._open()
        except BaseException:
            self.close()
            raise

    async def _open(self) -> Order:
        require_packages()
        await self._model.require("image")
        file = self._model.file
        if not isinstance(file, ImageFile):
            raise ModelNotCapable(f"{self._model.name}: its file is none of a diffusion model", param="model")
        contents = await file.read_contents()
        self.order = made = await self._order(file, contents)
        self._place = self._model.admission.enter(made.count)
        self._hold = self._model.use()
        return made

    async def pictures(self) -> AsyncIterator[tuple[int, ImageGeneration, ImageStep | PartialImage | GeneratedImage]]:
        """Yield what becomes of the pictures, each with its number from 0 on and its settings. Raises
        ``TimeLimitExceeded`` once the model's time limit is over.
        """
        assert self.order is not None
        for number, job in enumerate(self.order.jobs()):
            self._under_way = number, None
            job = msgspec.structs.replace(job, settings=described(job, self._model.name))
            async with contextlib.aclosing(self._events(job)) as events:
                async for event in events:
                    if isinstance(event, ImageStep):
                        self._under_way = number, event
                    yield number, job, event
        if self._hold is not None:
            self._hold.keep(self._body.keep_alive)
        self.close()

    async def _events(self, job: ImageGeneration) -> AsyncGenerator[ImageStep | PartialImage | GeneratedImage, None]:
        """Make a picture once it is its turn."""
        async with contextlib.AsyncExitStack() as stack:
            self._waits = True
            model, use = await self._turn(stack)
            self._waits = False
            worker = await use.worker()
            if self._deadline is None and (limit := model.spec.time_limit) is not None:
                self._time_limit, self._deadline = limit, asyncio.get_running_loop().time() + limit
            if isinstance(model.file, ImageFile):
                spec, contents = model.file.spec, await model.file.read_contents()
                work = PictureWork.of(job)
                await stack.enter_async_context(model.more_room(lambda gpus: footprint(spec, contents, gpus, work)))
            stream = worker.generate_image(job)
            self._current = _Current(model, stream, stack.pop_all())
        try:
            async for event in self._in_time(stream):
                yield event
        finally:
            self._end_current()

    async def _turn(self, stack: contextlib.AsyncExitStack) -> tuple[ServedModel, Use]:
        """Wait until no other picture is made at the model, and return it with a hold on it, loaded; the one that has
        replaced it meanwhile, if there is one. The ``stack`` gives both back.
        """
        while True:
            async with contextlib.AsyncExitStack() as turn:
                await turn.enter_async_context(self._model.turn())
                use = self._model.use()
                turn.callback(use.leave)
                await use.worker()
                if use.model is self._model:
                    await stack.enter_async_context(turn.pop_all())
                    return self._model, use
                assert use.model is not None
                self._model = use.model

    async def _in_time(self, stream: ImageStream) -> AsyncIterator[ImageStep | PartialImage | GeneratedImage]:
        events = stream.events()
        try:
            while True:
                async with asyncio.timeout_at(self._deadline):
                    event = await anext(events, None)
                if event is None:
                    return
                yield event
        except TimeoutError:
            raise TimeLimitExceeded(
                f"it took longer than the {self._time_limit:g} seconds that this model's `time_limit` leaves"
            ) from None

    def _end_current(self) -> None:
        """Let others have their turn once the picture that is being made is done, or its process has ended."""
        current, self._current = self._current, None
        if current is not None:
            self._services.background(_give_up(current))

    def close(self) -> None:
        """End it if it is still going on, and let others have its place. Further calls do nothing."""
        self._end_current()
        if self._hold is not None:
            self._hold.leave()
        if self._place is not None:
            self._place.leave()
        if self._upload is not None:
            self._upload.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def phase(self) -> str:
        """What the client waits for, in a few words."""
        if self._under_way is None:
            return "reading"
        number, step = self._under_way
        assert self.order is not None
        which = f"picture {number + 1} of {self.order.count}, " if self.order.count > 1 else ""
        if self._waits:
            return which + "queued" if self._model.taken else phase_of(self._model, None, str)
        return which + (f"step {step.step} of {step.steps}" if step is not None else "reading the prompt")

    async def _order(self, file: ImageFile, contents: DiffusionHeader) -> Order:
        if not isinstance(self._body, VariationRequest):
            return order(self._body, file, contents)
        with kept():
            self._folder = Path(tempfile.mkdtemp(prefix="llamaserve-images-"))
        return await order_with_uploads(self._services.pictures, self._folder, self._body, file, contents)


def require_packages() -> None:
    """Refuse what this installation can't do, and say which command would change that. Raises ``NotSupported``."""
    if all(importlib.util.find_spec(name) is not None for name in _NEEDED):
        return
    wanted = [text.partition(";") for text in importlib.metadata.requires("llamaserve") or ()]
    packages = [name.strip() for name, _, marker in wanted if _EXTRA in marker.replace("'", '"')]
    command = shlex.join([sys.executable, "-m", "pip", "install", *packages])
    raise NotSupported(
        f"pictures need stable-diffusion.cpp, which is not installed; this compiles it, in some minutes: {command}"
    )


class _Current(NamedTuple):
    """A picture that is being made, and what is held for it."""

    model: ServedModel
    stream: ImageStream
    held: contextlib.AsyncExitStack


async def _give_up(current: _Current) -> None:
    """Wait a moment for a picture that nobody wants any more, or else end the process that makes it; then give back
    what was held for it.
    """
    model, stream, held = current
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GRACE):
                await stream.over.wait()
        if not stream.over.is_set():
            await model.unload("cancelled")
    finally:
        stream.close()
        await held.aclose()
