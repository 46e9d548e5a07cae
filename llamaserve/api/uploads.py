"""Reading uploads: forms with files among their fields, within bounds of number, size, time and disk space.

A file of more than 64 KiB lies in the temporary folder while it is read, and so does what is made of it. Knows
forms; what a field means, or what is in the file, is the endpoint's business.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any, BinaryIO, Final, NamedTuple, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from llamaserve.api.accounting import account
from llamaserve.api.bodies import PATIENCE
from llamaserve.api.fields import names_of
from llamaserve.errors import InvalidRequest, LlamaserveError, RequestTimeout, Unavailable
from llamaserve.registry.admission import Admission, Place

M = TypeVar("M", bound=BaseModel)

Values = dict[str, Any]

KIND: Final = "multipart/form-data"
MAX_FIELD: Final = 64 * 1024  # bytes

_MAX_FIELDS: Final = 64
_SPACE: Final = 2 * 2**30  # bytes
_UTF8: Final = ("utf-8", "utf8")


class UploadAdmission(Admission):
    """What all requests have in the temporary folder, uploaded or decoded, in bytes; each key has its share of that."""

    def __init__(self, space: int = _SPACE) -> None:
        """So many bytes may be there; what comes at once may be more."""
        super().__init__(0, space)
        self._space = space

    def _refusal(self) -> str:
        return f"as much waits here as may ({self._space / 2**30:g} GiB, uploaded or decoded); try again later"


class _Parser(MultiPartParser):
    """Keeps little of files in memory."""

    spool_max_size = 64 * 1024


class Expected(NamedTuple):
    """What a form is to hold: what to call it, the field that it is in, and of how many files it may be."""

    name: str
    field: str
    files: int


class Upload:
    """A form that has been read, and the disk space that its files take. It must be closed."""

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

    def grow(self, size: int) -> None:
        """Take up so many bytes more, for what is made of the files. Raises ``QueueFull``."""
        self._place.grow(size)

    def close(self) -> None:
        """Let go of the files and their space. Further calls do nothing."""
        for file in self._files:
            file.close()
        self._place.leave()


async def receive(request: Request, admission: UploadAdmission, what: Expected) -> Upload:
    """Read a form with what is expected in it, of which each byte counts as it comes. Raises ``InvalidRequest`` when
    there is none, or it is malformed, ``QueueFull``, ``Unavailable`` when there is no disk space, ``RequestTimeout``
    when the rest does not come, FastAPI's error when it is too much, and ``ClientDisconnect``.
    """
    try:
        return await _received(request, admission, what)
    except RequestTimeout:
        raise
    except (LlamaserveError, HTTPException):
        await _read_on(request)
        raise


async def _received(request: Request, admission: UploadAdmission, what: Expected) -> Upload:
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != KIND.encode():
        raise InvalidRequest(f"{what.name} must be sent as {KIND}, with a field `{what.field}`", param=what.field)
    if options.get(b"charset", b"utf-8").decode("latin-1").lower() not in _UTF8:
        raise InvalidRequest("the text in a form must be UTF-8")
    place = admission.enter(0, account().owner)
    bounds = {"max_files": what.files, "max_fields": _MAX_FIELDS, "max_part_size": MAX_FIELD}
    try:
        with kept():
            async with contextlib.aclosing(_pieces(request, place)) as pieces:
                return Upload(await _Parser(request.headers, pieces, **bounds).parse(), place)
    except (MultiPartException, FormParserError) as error:
        place.leave()
        raise InvalidRequest(f"the form can't be read: {_in_words(str(error))}") from error
    except BaseException:
        place.leave()
        raise


async def _pieces(request: Request, place: Place | None = None) -> AsyncGenerator[bytes, None]:
    """Yield a body's pieces as they come, and count them."""
    pieces = request.stream()
    while True:
        try:
            async with asyncio.timeout(PATIENCE):
                piece = await anext(pieces, None)
        except TimeoutError:
            raise RequestTimeout(f"nothing more of the request has come for {PATIENCE:g} seconds") from None
        if piece is None:
            return
        if place is not None and piece:
            place.grow(len(piece))
        yield piece


def _in_words(message: str) -> str:
    if message.startswith("Part exceeded"):
        return f"a field has more than {MAX_FIELD // 1024} KiB, or the part with the file has no filename"
    return message[:1].lower() + message[1:].removesuffix(".")


async def _read_on(request: Request) -> None:
    """Read and drop what is left of a body, or a client that is still sending would not get to see the answer."""
    # All is read, it is too much, no more comes, or nobody waits:
    with contextlib.suppress(RuntimeError, HTTPException, RequestTimeout, ClientDisconnect):
        async for _ in _pieces(request):
            pass


def values_of(
    form: FormData, model: type[BaseModel], *, texts: Sequence[str] = (), files: Sequence[str] = ()
) -> Values:
    """Return the fields of a form, of which empty ones are not given. Lists are called with brackets or without; one of
    ``texts`` may be a single text with commas. Raises ``InvalidRequest`` for another field of the model that is there
    twice.
    """
    known = {called for name in model.model_fields for called in names_of(model, name)}
    values: Values = {}
    for name, value in form.multi_items():
        name = name.removesuffix("[]")
        if name in texts:
            values.setdefault(name, []).extend(filter(None, map(str.strip, str(value).split(","))))
        elif value == "":
            continue
        elif name in files:
            values.setdefault(name, []).append(value)
        elif name in values and name in known:
            raise InvalidRequest(f"{name} is given more than once", param=name)
        else:
            values[name] = value
    return {name: value for name, value in values.items() if value}


def validated(model: type[M], values: Values) -> M:
    """Return the request that the fields of a form make. Raises what FastAPI does when something in it is wrong."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in error.errors()]) from None


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Have it known to be the server's fault, for now, when something can't be written to the temporary folder."""
    try:
        yield
    except OSError as error:
        raise Unavailable(f"the upload can't be kept in the temporary folder: {error.strerror}") from error
