"""Bodies of requests as they come: how large one may be, how much memory all may take, and how long nothing may come.

Knows nothing of what is in them.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from starlette.types import Message, Receive

from llamaserve.api.handlers import BodyRefused
from llamaserve.errors import BodyTooLarge, LlamaserveError, RequestTimeout
from llamaserve.registry.admission import Admission, Place

PATIENCE: Final = 60.0  # seconds in which a client must send something

_REST_PATIENCE: Final = 5.0  # seconds in which something must come of a body that is only read to be dropped
_SMALL: Final = 64 * 1024  # bytes that each body may take of memory, however little there is
_DRAIN_FACTOR: Final = 8  # read and drop up to this many times the limit, so that the client gets to see the answer


class BodyAdmission(Admission):
    """What the bodies of all requests that are not over take of memory, in bytes; small ones don't count."""

    def __init__(self, size: int) -> None:
        """So many bytes may be there."""
        super().__init__(0, size)
        self._size = size

    def _refusal(self) -> str:
        return f"the bodies of other requests take all memory that they may ({self._size / 2**20:g} MiB)"


class Body:
    """What an application receives as a body. Reading it raises ``BodyRefused`` if it is larger than ``limit`` bytes,
    has no room in the ``admission``, or nothing more of it comes; most of the rest is read and dropped then. It must be
    closed when its request is over.
    """

    def __init__(
        self, receive: Receive, limit: int, admission: BodyAdmission | None, *, length: int = 0, share: str = ""
    ) -> None:
        """Without an ``admission`` it is not kept in memory. The ``length`` is that which it says to have, if it does;
        the ``share`` is that of its key.
        """
        self.refusal: BodyRefused | None = None
        self._receive = receive
        self._limit = limit
        self._length = length
        self._admission = admission
        self._share = share
        self._place: Place | None = None
        self._size = 0
        self._whole = False

    async def __call__(self) -> Message:
        if self.refusal is not None:
            raise self.refusal
        if self._whole:  # what comes now is that the client leaves
            return await self._receive()
        try:
            async with asyncio.timeout(PATIENCE):
                message = await self._receive()
        except TimeoutError:
            silent = RequestTimeout(f"nothing more of the request has come for {PATIENCE:g} seconds")
            raise self._refused(silent) from None
        self._whole = not message.get("more_body")
        try:
            self._keep(len(message.get("body", b"")))
        except LlamaserveError as error:
            if not self._whole:
                await drain(self._receive, self._limit)
            raise self._refused(error) from None
        return message

    def _refused(self, error: LlamaserveError) -> BodyRefused:
        self.refusal = BodyRefused(error)
        return self.refusal

    def _keep(self, size: int) -> None:
        self._size += size
        if self._size > self._limit:
            raise too_large(self._limit)
        if self._admission is None or self._size <= _SMALL:
            return
        if self._place is None:  # all at once, or many that come together would all be let in, and none have enough
            self._place = self._admission.enter(self._length or self._size, self._share)
        elif not self._length:
            self._place.grow(size)

    def close(self) -> None:
        """Let others have its room."""
        if self._place is not None:
            self._place.leave()


def too_large(limit: int) -> BodyTooLarge:
    """Return what a client is told whose body is over the limit."""
    return BodyTooLarge(f"the request body is larger than {limit} bytes")


async def drain(receive: Receive, limit: int) -> None:
    """Read and drop what comes of a body with this limit: some clients don't see an answer that comes before they have
    sent all.
    """
    await drop(receive, limit * _DRAIN_FACTOR, PATIENCE)


async def drop(receive: Receive, size: int, seconds: float) -> None:
    """Read and drop a body: at most about so many bytes and for so many seconds, as long as something comes."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while size > 0:
                async with asyncio.timeout(_REST_PATIENCE):
                    message = await receive()
                size -= len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
