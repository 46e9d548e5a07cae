"""Reading uploads: forms with one file among their fields, within bounds of number, size and disk space.

A file of more than a megabyte lies in the temporary folder while it is read, and so does what is made of it. Knows
forms; what a field means, or what is in the file, is the endpoint's business.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import BinaryIO, Final

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from llamaserve.errors import InvalidRequest, LlamaserveError, Unavailable
from llamaserve.registry.admission import Admission, Place

KIND: Final = "multipart/form-data"
MAX_FIELD: Final = 64 * 1024  # bytes

_MAX_FIELDS: Final = 64
_SPACE: Final = 2 * 2**30  # bytes


class AudioAdmission(Admission):
    """The audio of all requests that lies in the temporary folder, uploaded or decoded, in bytes."""

    def __init__(self, space: int = _SPACE) -> None:
        """So many bytes may be there; the last one to come may bring more."""
        super().__init__(0, space)
        self._space = space

    def _refusal(self) -> str:
        return f"as much audio waits here as may ({self._space / 2**30:g} GiB, uploaded or decoded); try again later"


class Upload:
    """A form that has been read, and the disk space that its file takes. It must be closed."""

    def __init__(self, form: FormData, place: Place) -> None:
        self.form = form
        self._place = place

    @property
    def file(self) -> BinaryIO:
        """The content of its one file, which must be there."""
        (file,) = self._files
        return file

    @property
    def _files(self) -> list[BinaryIO]:
        return [value.file for _, value in self.form.multi_items() if isinstance(value, UploadFile)]

    def close(self) -> None:
        """Let go of the file and its space. Further calls do nothing."""
        for file in self._files:
            file.close()
        self._place.leave()


async def receive(request: Request, admission: AudioAdmission, largest: int) -> Upload:
    """Read a form; one that does not tell its length counts as the ``largest`` that may come. Raises ``InvalidRequest``
    when there is none, ``QueueFull``, ``Unavailable`` when there is no disk space, FastAPI's error when the form is
    malformed, and ``ClientDisconnect``.
    """
    try:
        return await _received(request, admission, largest)
    except (LlamaserveError, HTTPException):
        await _read_on(request)
        raise


async def _received(request: Request, admission: AudioAdmission, largest: int) -> Upload:
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != KIND.encode():
        raise InvalidRequest(f"the audio must be sent as {KIND}, with a field `file`", param="file")
    if options.get(b"charset", b"utf-8").lower() != b"utf-8":
        raise InvalidRequest("the text in a form must be UTF-8")
    length = request.headers.get("content-length", "")
    place = admission.enter(int(length) if length.isdecimal() else largest)
    try:
        with kept():
            form = await request.form(max_files=1, max_fields=_MAX_FIELDS, max_part_size=MAX_FIELD)
        return Upload(form, place)
    except BaseException:
        place.leave()
        raise


async def _read_on(request: Request) -> None:
    """Read and drop what is left of a body, or a client that is still sending would not get to see the answer."""
    with contextlib.suppress(
        RuntimeError, HTTPException, ClientDisconnect
    ):  # all is read, it is too much, or nobody waits
        async for _ in request.stream():
            pass


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Have it known to be the server's fault, for now, when something can't be written to the temporary folder."""
    try:
        yield
    except OSError as error:
        raise Unavailable(f"the upload can't be kept in the temporary folder: {error.strerror}") from error
