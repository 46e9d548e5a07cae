"""Making the pictures of an HTTP request, one after the other, until they are all made or its client has left.

At each model one picture is made at a time, and requests take turns, picture by picture. The library can't be stopped
in the middle of one. So when nobody waits for it any more, and it is not done very soon, the model's process is ended;
the next request loads the model again.

Knows the stream of engine events; what a request or an answer looks like is the endpoint's business.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Final

import msgspec

from llamaserve.api.generating import phase_of
from llamaserve.api.image_fields import ImageFields, VariationRequest
from llamaserve.api.image_order import Order, described, order
from llamaserve.api.image_uploads import UploadedPictures
from llamaserve.api.services import Services
from llamaserve.api.uploads import Upload
from llamaserve.errors import ModelNotCapable, TimeLimitExceeded, Unavailable
from llamaserve.images.values import GeneratedImage, ImageGeneration, ImageStep, PartialImage
from llamaserve.registry.admission import Place
from llamaserve.registry.diffusion_file import DiffusionHeader
from llamaserve.registry.diffusion_memory import PictureWork
from llamaserve.registry.image_file import ImageFile, ImageSettings, footprint, require_packages
from llamaserve.registry.served import ServedModel, Use
from llamaserve.worker.process import ImageStream, WorkerProcess

Made = ImageStep | PartialImage | GeneratedImage

GRACE: Final = 0.7  # seconds in which a picture that nobody waits for may still become ready


class Painting:
    """The pictures of one request at one model. It must be closed."""

    def __init__(self, services: Services, model: ServedModel, body: ImageFields, upload: Upload | None = None) -> None:
        """The upload has the files that the body names, and is closed when this is."""
        self._services = services
        self._model = model
        self._body = body
        self._uploaded = None if upload is None else UploadedPictures(services.pictures, upload)
        self._place: Place | None = None
        self._use: Use | None = None  # from the first picture to the last: it is not unloaded between them
        self._stream: ImageStream | None = None  # of the picture that is being made
        self._under_way: tuple[int, ImageStep | None] | None = None  # the same, by number
        self._waits = True  # for the model, or for its turn
        self._time_limit: float | None = None
        self._deadline: float | None = None  # moment
        self._order: Order | None = None  # known once it is open
        self._contents: DiffusionHeader | None = None  # of the files that it was ordered from, likewise

    async def open(self) -> Order:
        """Look at what is asked for, and then at the uploads. Raises whatever makes the request impossible."""
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
        self._contents = contents = await file.read_contents()
        self._order = await asyncio.to_thread(order, self._body, file, contents)  # which may read LoRAs
        self._body.ignored_header(self._order.idle)  # refuses what is strict, before there is work
        self._place = self._model.admission.enter(self._order.count)
        if self._uploaded is not None and isinstance(self._body, VariationRequest):
            usual = ImageSettings.of(file.spec, contents)
            self._order = await self._uploaded.added_to(self._order, self._body, usual, contents)
        return self._order

    async def pictures(self) -> AsyncIterator[tuple[int, ImageGeneration, Made]]:
        """Yield what becomes of the pictures, each with its number from 0 on and its settings. Raises
        ``TimeLimitExceeded`` once the model's time limit is over, and ``Unavailable`` when it has been replaced.
        """
        assert self._order is not None
        for number, job in enumerate(self._order.jobs()):
            self._under_way = number, None
            job = msgspec.structs.replace(job, settings=described(job, self._model.name))
            async with contextlib.aclosing(self._events(job, last=number + 1 == self._order.count)) as events:
                async for event in events:
                    if isinstance(event, ImageStep):
                        self._under_way = number, event
                    yield number, job, event
        self._leave(answered=True)
        self.close()

    async def _events(self, job: ImageGeneration, *, last: bool) -> AsyncGenerator[Made, None]:
        """Make a picture once it is its turn."""
        async with contextlib.AsyncExitStack() as stack:
            self._waits = True
            worker = await self._turn(stack)
            self._waits = False
            spec, contents, work = self._model.spec, await self._checked_contents(), PictureWork.of(job)
            room = self._model.more_room(lambda gpus: footprint(spec, contents, gpus, work), lasting=work.loras)
            await stack.enter_async_context(room)
            self._stream = stream = worker.generate_image(job)
            self._services.background(self._see_through(stream, stack.pop_all(), last=last))
        try:
            async for event in self._in_time(stream):
                yield event
        finally:
            self._end_current()

    async def _turn(self, stack: contextlib.AsyncExitStack) -> WorkerProcess:
        """Wait until the model is loaded, and no other picture is made at it. The ``stack`` gives the turn back."""
        if self._use is None:
            self._use = self._model.use()
            await self._use.worker()
            if self._use.model is not self._model:
                raise self._replaced()
            if (limit := self._model.spec.time_limit) is not None:
                self._time_limit, self._deadline = limit, asyncio.get_running_loop().time() + limit
        async with self._limit():
            await stack.enter_async_context(self._model.turn())
            return await self._use.again()  # another picture, for which nobody waited, may have ended the process

    async def _checked_contents(self) -> DiffusionHeader:
        """Return what the model's files say. Raises ``Unavailable`` when that has changed since it was ordered."""
        file = self._model.file
        if not isinstance(file, ImageFile) or (contents := await file.read_contents()) != self._contents:
            raise self._replaced()
        return contents

    def _replaced(self) -> Unavailable:
        return Unavailable(f"{self._model.name} was replaced while the request waited for it", retry_after=1)

    async def _in_time(self, stream: ImageStream) -> AsyncIterator[Made]:
        events = stream.events()
        while True:
            async with self._limit():
                event = await anext(events, None)
            if event is None:
                return
            yield event

    @contextlib.asynccontextmanager
    async def _limit(self) -> AsyncIterator[None]:
        """Have a ``with`` block end in time."""
        try:
            async with asyncio.timeout_at(self._deadline) as scope:
                yield
        except TimeoutError:
            if not scope.expired():
                raise
            raise TimeLimitExceeded(
                f"it took longer than the {self._time_limit:g} seconds that this model's `time_limit` leaves"
            ) from None

    async def _see_through(self, stream: ImageStream, held: contextlib.AsyncExitStack, *, last: bool) -> None:
        """Let others have their turn as soon as a picture is done, or its process has ended, however long the client
        takes to read it.
        """
        await stream.over.wait()
        answered = not stream.failed
        try:
            await held.aclose()
        finally:
            if last:
                self._leave(answered=answered)
            elif self._place is not None:
                self._place.shrink(1)

    def _leave(self, *, answered: bool = False) -> None:
        """Let others have the model and the place in its queue."""
        if self._use is not None:
            if answered:
                self._use.keep(self._body.keep_alive)
            self._use.leave()
        if self._place is not None:
            self._place.leave()

    def _end_current(self) -> None:
        """End the picture that is being made, unless it is done very soon."""
        stream, self._stream = self._stream, None
        if stream is not None:
            self._services.background(_give_up(self._model, stream))

    def close(self) -> None:
        """End it if it is still going on, and let others have its place. Further calls do nothing."""
        self._end_current()
        self._leave()
        if self._uploaded is not None:
            self._uploaded.close()

    @property
    def phase(self) -> str:
        """What the client waits for, in a few words."""
        if self._under_way is None or self._order is None:
            return "reading"
        number, step = self._under_way
        which = f"picture {number + 1} of {self._order.count}, " if self._order.count > 1 else ""
        if self._waits:
            return which + ("queued" if self._model.taken else phase_of(self._model, None, str))
        return which + (f"step {step.step} of {step.steps}" if step is not None else "reading the prompt")


async def _give_up(model: ServedModel, stream: ImageStream) -> None:
    """Wait a moment for a picture that nobody wants any more, or else end the process that makes it."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(GRACE):
            await stream.over.wait()
    if not stream.over.is_set():
        await model.unload("cancelled")
    stream.close()
