"""Making the pictures of an HTTP request, one after the other, until they are all made or its client has left.

At each model one picture is made at a time, and requests take turns, picture by picture; nobody waits for a client that
reads slowly. The library can't be stopped in the middle of a picture. So when nobody wants it any more, and it is not
done very soon, the model's process is ended; the next request loads the model again.

Knows the stream of engine events; what a request or an answer looks like is the endpoint's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Final, NamedTuple

import msgspec

from llamaserve.api.accounting import account
from llamaserve.api.generating import WAITS_FOR_TURN, WORKING, phase_of
from llamaserve.api.image_fields import ImageFields, VariationRequest
from llamaserve.api.image_order import Order, described, order
from llamaserve.api.image_uploads import UploadedPictures
from llamaserve.api.services import Services
from llamaserve.api.uploads import Upload
from llamaserve.errors import LlamaserveError, ModelNotCapable, TimeLimitExceeded
from llamaserve.images.values import GeneratedImage, ImageGeneration, ImageStep, PartialImage
from llamaserve.registry.admission import Place
from llamaserve.registry.diffusion_file import DiffusionHeader
from llamaserve.registry.diffusion_memory import PictureWork
from llamaserve.registry.image_file import ImageFile, ImageSettings, footprint, require_packages
from llamaserve.registry.served import ServedModel, Use
from llamaserve.worker.process import ImageStream

logger = logging.getLogger(__name__)

GRACE: Final = 0.7  # seconds in which a picture that nobody waits for may still become ready
_UNREAD: Final = 4  # unfinished pictures that wait for a slow client; it misses the others


class Made(NamedTuple):
    """What has become of one of a request's pictures, by its number from 0 on and its settings."""

    number: int
    job: ImageGeneration
    event: ImageStep | PartialImage | GeneratedImage


class Painting:
    """The pictures of one request at one model. It must be closed."""

    def __init__(self, services: Services, model: ServedModel, body: ImageFields, upload: Upload | None = None) -> None:
        """The upload has the files that the body names, and is closed when this is."""
        self._services = services
        self._model = model
        self._body = body
        self._uploaded = None if upload is None else UploadedPictures(services.pictures, upload)
        self._account = account()
        self._closed = False
        self._place: Place | None = None
        self._order: Order | None = None  # known once it is open
        self._contents: DiffusionHeader | None = None  # of the files that it was ordered from, likewise
        self._making: asyncio.Task[None] | None = None
        self._made: asyncio.Queue[Made | Exception | None] = asyncio.Queue()  # None: all of them
        self._unread = 0  # unfinished pictures among them
        self._under_way: tuple[int, ImageStep | None] | None = None  # the picture that is being made
        self._waits = True  # for the model, or for its turn
        self._time_limit: float | None = None
        self._deadline: float | None = None  # moment

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
        self._place = self._model.admission.enter(self._order.count, self._account.owner)
        if self._uploaded is not None and isinstance(self._body, VariationRequest):
            usual = ImageSettings.of(file.spec, contents)
            self._order = await self._uploaded.added_to(self._order, self._body, usual, contents)
        return self._order

    async def pictures(self) -> AsyncIterator[Made]:
        """Yield what becomes of the pictures. Raises ``TimeLimitExceeded`` once the model's time limit is over, and
        ``Unavailable`` when it has been replaced.
        """
        self._making = self._services.background(self._make(self.order))
        while (made := await self._made.get()) is not None:
            if isinstance(made, Exception):
                raise made
            self._unread -= isinstance(made.event, PartialImage)
            yield made
        self.close()

    def close(self) -> None:
        """End it if it is still going on, and let others have its place. Further calls do nothing."""
        if self._making is not None and not self._closed:
            self._making.cancel()
        self._closed = True
        self._give_back()

    def _give_back(self) -> None:
        if self._place is not None:
            self._place.leave()
        if self._uploaded is not None:
            self._uploaded.close()

    @property
    def order(self) -> Order:
        """What is asked for; known once it is open."""
        assert self._order is not None
        return self._order

    async def _make(self, wanted: Order) -> None:
        """Make all pictures, and hold the model from the first to the last: it is not unloaded between them."""
        use = self._model.use(follows=False)  # other files would have to be asked for in other words
        try:
            await self._account.turn(self._model.name)
            await use.worker()
            if (limit := self._model.spec.time_limit) is not None:
                self._time_limit, self._deadline = limit, asyncio.get_running_loop().time() + limit
            for number, job in enumerate(wanted.jobs()):
                self._under_way = number, None
                await self._draw(number, msgspec.structs.replace(job, settings=described(job, self._model.name)), use)
            use.keep(self._body.keep_alive)
            self._made.put_nowait(None)
        except Exception as error:
            if self._closed and not isinstance(error, LlamaserveError):
                logger.exception("%s: a picture that nobody waits for could not be given up", self._model.name)
            self._made.put_nowait(error)
        finally:
            use.leave()
            self._give_back()

    async def _draw(self, number: int, job: ImageGeneration, use: Use) -> None:
        """Make a picture once it is its turn."""
        async with contextlib.AsyncExitStack() as stack:
            self._waits = True
            async with self._in_time():
                await stack.enter_async_context(self._model.turn(self._account.owner))
            before = asyncio.get_running_loop().time()
            worker = await use.again()  # another picture, for which nobody waited, may have ended the process
            if self._deadline is not None:
                self._deadline += asyncio.get_running_loop().time() - before
            spec, contents, work = self._model.spec, await self._checked_contents(), PictureWork.of(job)
            room = self._model.more_room(lambda gpus: footprint(spec, contents, gpus, work), lasting=work.loras)
            async with self._in_time():
                await stack.enter_async_context(room)
            self._check_time()
            self._waits = False
            stream = worker.generate_image(job)
            try:
                await self._follow(number, job, stream)
            finally:
                await _undisturbed(_finish(self._model, stream))
        if self._place is not None:
            self._place.shrink(1)

    async def _follow(self, number: int, job: ImageGeneration, stream: ImageStream) -> None:
        """Pass on what becomes of a picture."""
        events = stream.events()
        while True:
            async with self._in_time():
                event = await anext(events, None)
            match event:
                case None:
                    return
                case PartialImage() if self._unread == _UNREAD:
                    continue
                case PartialImage():
                    self._unread += 1
                case ImageStep():
                    self._under_way = number, event
            self._made.put_nowait(Made(number, job, event))

    async def _checked_contents(self) -> DiffusionHeader:
        """Return what the model's files say. Raises ``Unavailable`` when that has changed since it was ordered."""
        file = self._model.file
        if not isinstance(file, ImageFile) or (contents := await file.read_contents()) != self._contents:
            raise self._model.replaced()
        return contents

    @contextlib.asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """Have a ``with`` block end in time."""
        try:
            async with asyncio.timeout_at(self._deadline) as scope:
                yield
        except TimeoutError:
            if not scope.expired():
                raise
            raise self._late() from None

    def _check_time(self) -> None:
        if self._deadline is not None and asyncio.get_running_loop().time() >= self._deadline:
            raise self._late()

    def _late(self) -> TimeLimitExceeded:
        return TimeLimitExceeded(
            f"it took longer than the {self._time_limit:g} seconds that this model's `time_limit` leaves"
        )

    @property
    def phase(self) -> str:
        """What the client waits for, in a few words."""
        if self._account.waits:
            return WAITS_FOR_TURN
        if self._under_way is None or self._order is None:
            return phase_of(self._model, None, str)
        number, step = self._under_way
        which = f"picture {number + 1} of {self._order.count}, " if self._order.count > 1 else ""
        if self._waits:
            words = phase_of(self._model, None, str)
            return which + ("queued" if words == WORKING else words)
        return which + (f"step {step.step} of {step.steps}" if step is not None else "reading the prompt")


async def _finish(model: ServedModel, stream: ImageStream) -> None:
    """Wait a moment for a picture that nobody wants any more, or else end the process that makes it."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(GRACE):
            await stream.over.wait()
    if not stream.over.is_set():
        await model.unload("cancelled")
    stream.close()


async def _undisturbed(work: Coroutine[Any, Any, None]) -> None:
    """Have something done to its end, and only then be cancelled, however often that is asked for."""
    task, cancelled = asyncio.ensure_future(work), None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled
