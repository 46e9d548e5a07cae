"""The file in which prefixes outlive their engine.

It holds the states of blocks of tokens, one after the other, then a catalogue that says which tokens each block has,
which one it follows and where its state is. At its beginning stands where the catalogue is, which is written last of
all. So a new file takes the place of the former one when it is complete, and one that is extended, by more states and
another catalogue, is as it was until then. Nothing waits for the disk, which takes as long as all the rest (70 ms for
46 MB): after a power failure a file may be incomplete. When a file is opened, only its catalogue is read; a state is
read when a request wants its tokens. Whatever is not as it was written is found by its checksum, and then passes for
something that was never saved. Knows tokens and bytes; what the bytes mean is llama.cpp's business.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from llamaserve.engine.sequence import AdapterKey
from llamaserve.errors import EngineError

NOTHING = -1  # what the first block of a prefix follows

_MAGIC = b"llamaserve prefixes, version 1\n\0"
_HEAD = struct.Struct("<32sQQI")  # then offset, bytes and checksum of the catalogue ...
_CHECKSUM = struct.Struct("<I")  # ... and the checksum of all that
_STATES = _HEAD.size + _CHECKSUM.size  # where they begin
_MAX_CATALOGUE = 16 << 20  # bytes: some millions of tokens
_MAX_TOKEN = 2**31 - 1
_MOST_A_TOKEN, _MOST_A_BLOCK = 5, 64  # bytes that they take in the catalogue


class _Entry(msgspec.Struct, frozen=True, array_like=True):
    """A block: which other one it follows, by its place in the catalogue, and where its state is in the file."""

    parent: int
    adapters: int  # place of its set among the catalogue's
    tokens: list[int]
    offset: int
    size: int
    checksum: int


class _Catalogue(msgspec.Struct, frozen=True, array_like=True):
    """What a file holds. ``identity`` says of which model and settings, ``block`` how many tokens the blocks have that
    others follow; 0 where each prefix is one block.
    """

    identity: str
    block: int
    adapters: list[AdapterKey]
    entries: list[_Entry]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Catalogue).decode


class _Unusable(Exception):
    """Why a file is of no use."""


# ---- writing -----------------------------------------------------------------------------------------------------


class PrefixWriter:
    """Writes a file of at most ``room`` bytes. As a context it leaves nothing behind that is not complete."""

    def __init__(self, path: Path, identity: str, *, block: int, room: int, extends: PrefixFile | None = None) -> None:
        """``block`` is how many tokens a block has that others follow, 0 where each prefix is one block. The file that
        it ``extends`` is left as it is, and a new one written, if it is not at its place any more or was changed.
        Raises ``EngineError`` when there can be no file; so does whatever else writes.
        """
        self.path = path
        self.tokens = 0  # in the blocks so far
        self.full = False  # whether there was no room for a block
        self._identity = identity
        self._block = block
        self._adapters: list[AdapterKey] = []
        self._entries: list[_Entry] = []
        self._children: dict[tuple[int, int], list[int]] = {}  # by parent and adapters
        self._finished = False
        # Processes in several containers may have the same folder and the same number.
        self._part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
        self._disk_is_full = False  # or nearly so
        descriptor = extends.reopen(path) if extends else None
        self.extends = None if descriptor is None else extends
        self._descriptor = self._create() if descriptor is None else descriptor
        self._start = self._offset = self.extends.size if self.extends else _STATES
        listed = len(identity.encode()) + _MOST_A_BLOCK
        if not self.extends:
            room = self._left_by_others(room)
        self._room = room - self._start - listed
        self._catalogue_room = _MAX_CATALOGUE - listed

    def find(self, parent: int, adapters: AdapterKey, tokens: list[int]) -> int | None:
        """Return the block that begins with these tokens after another one, if it is written already."""
        if adapters not in self._adapters:
            return None
        siblings = self._children.get((parent, self._adapters.index(adapters)), [])
        length = len(tokens) if self._block else None  # a whole prefix serves as such only
        return next((place for place in siblings if self._entries[place].tokens[:length] == tokens), None)

    def holds(self, state: bytearray | StoredState) -> bool:
        """Whether a state is in the file already, before it is extended."""
        return isinstance(state, StoredState) and state.file is self.extends

    def add(self, parent: int, adapters: AdapterKey, tokens: list[int], state: bytearray | StoredState) -> int | None:
        """Write a block that follows another one (or ``NOTHING``), and return its number; None when there is no room
        for it. A ``StoredState`` must be one that the file ``holds``.
        """
        listed = len(tokens) * _MOST_A_TOKEN + _MOST_A_BLOCK
        if adapters not in self._adapters:
            listed += sum(len(name.encode()) + _MOST_A_BLOCK for name, _ in adapters)
        size = listed + (len(state) if isinstance(state, bytearray) else 0)
        if size > self._room or listed > self._catalogue_room:
            self.full = True
            return None
        self._room -= size
        self._catalogue_room -= listed
        if adapters not in self._adapters:
            self._adapters.append(adapters)
        key = self._adapters.index(adapters)
        if isinstance(state, bytearray):
            entry = _Entry(parent, key, tokens, self._offset, len(state), zlib.crc32(state))
            self._write(state)
        else:
            entry = _Entry(parent, key, tokens, state.offset, state.size, state.checksum)
        self._entries.append(entry)
        self._children.setdefault((parent, key), []).append(len(self._entries) - 1)
        self.tokens += len(tokens)
        return len(self._entries) - 1

    def finish(self) -> int:
        """Make the file valid, and return its bytes. Without a block there is none, and the former one is removed: not
        when that was for want of room. Nor does a new one take the former one's place if the disk has cut it short; 0
        then, too.
        """
        if self.full and (not self._entries or (self._disk_is_full and self.path.exists())):
            return 0
        listed = _Catalogue(self._identity, self._block, self._adapters, self._entries)
        if self.extends and self.extends.lists(listed):
            return self._offset
        try:
            if not self._entries:
                self.path.unlink(missing_ok=True)
                return 0
            catalogue = _encode(listed)
            head = _HEAD.pack(_MAGIC, self._offset, len(catalogue), zlib.crc32(catalogue))
            self._write(catalogue)
            os.pwrite(self._descriptor, head + _CHECKSUM.pack(zlib.crc32(head)), 0)
            if not self.extends:
                self._part.replace(self.path)
        except OSError as error:
            raise self._failed(error) from error
        self._finished = True
        return self._offset

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # what is left over does no harm
            if not self._finished and self.extends:
                os.ftruncate(self._descriptor, self._start)
            elif not self._finished:
                self._part.unlink()
        os.close(self._descriptor)

    def _write(self, data: bytes | bytearray) -> None:
        try:
            with memoryview(data) as view:
                written = 0
                while written < len(view):
                    written += os.pwrite(self._descriptor, view[written:], self._offset + written)
        except OSError as error:
            raise self._failed(error) from error
        self._offset += written

    def _create(self) -> int:
        """Open a new file that nobody else may read: conversations are in it."""
        try:
            self._part.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise self._failed(error) from error
        with contextlib.suppress(OSError):  # so that all can see that somebody is at it; where that can be seen
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor

    def _left_by_others(self, room: int) -> int:
        """Return how much a new file may take of some room: half of what the disk has free, since the former file is
        still there and others write, too.
        """
        status = os.fstatvfs(self._descriptor)
        half = status.f_bavail * status.f_frsize // 2
        self._disk_is_full = half < room
        return min(room, half)

    def _failed(self, error: OSError) -> EngineError:
        return EngineError(f"prefixes can't be saved in {self.path}: {error.strerror or error}")


# ---- reading -----------------------------------------------------------------------------------------------------


class StoredState:
    """The state of a block, in a file."""

    __slots__ = ("checksum", "file", "offset", "size")

    def __init__(self, file: PrefixFile, offset: int, size: int, checksum: int) -> None:
        self.file = file
        self.offset = offset
        self.size = size  # bytes
        self.checksum = checksum

    def read(self) -> bytearray | None:
        """Return the bytes; None, with a line in the log, when they are not those that were written."""
        try:
            state = self.file.read(self.offset, self.size)
        except (OSError, MemoryError) as error:
            self.file.report(f"bytes from {self.offset} on can't be read ({error})")
            return None
        if zlib.crc32(state) != self.checksum:
            self.file.report(f"bytes from {self.offset} to {self.offset + self.size} are damaged")
            return None
        return state


class StoredBlock(msgspec.Struct, frozen=True):
    """A block in a file. ``parent`` is the place of the one that it follows, which is before it, or ``NOTHING``."""

    parent: int
    adapters: AdapterKey
    tokens: list[int]
    state: StoredState


class PrefixFile:
    """A file that was found good, as far as can be told without reading the states."""

    def __init__(self, path: Path, descriptor: int, catalogue: _Catalogue) -> None:
        self.path = path
        self.size = os.fstat(descriptor).st_size
        self._descriptor = descriptor
        self._catalogue = catalogue

    @classmethod
    def open(cls, path: Path, identity: str, *, block: int) -> PrefixFile | None:
        """Open the file of a model and its settings, which counts as a use of it. One that is of no use is removed,
        with a line in the log; None then, and when there is no file.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            _log(f"saved prefixes can't be read: {error}")
            return None
        try:
            catalogue = _read_catalogue(descriptor, identity, block)
        except (_Unusable, OSError) as error:
            os.close(descriptor)
            _log(f"saved prefixes are discarded, since {error}: {path}")
            with contextlib.suppress(OSError):  # the next save will replace it
                path.unlink()
            return None
        with contextlib.suppress(OSError):  # the file of another user, perhaps
            os.utime(descriptor)
        return cls(path, descriptor, catalogue)

    def lists(self, catalogue: _Catalogue) -> bool:
        """Return whether the file's own catalogue says the same."""
        return self._catalogue == catalogue

    def read(self, offset: int, size: int) -> bytearray:
        """Return bytes of the file: fewer when it has become shorter."""
        return _read(self._descriptor, offset, size)

    def blocks(self) -> Iterator[StoredBlock]:
        """Yield the blocks in the order in which they were written: those of the prefixes used last come first."""
        for entry in self._catalogue.entries:
            state = StoredState(self, entry.offset, entry.size, entry.checksum)
            yield StoredBlock(entry.parent, self._catalogue.adapters[entry.adapters], entry.tokens, state)

    def reopen(self, path: Path) -> int | None:
        """Open the file to be extended by nobody else, and return the descriptor; None if it is not at this place any
        more, or another process has extended it.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        except OSError:
            return None
        with contextlib.suppress(OSError):  # it is being extended, or can't be locked where it is
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = os.fstat(descriptor)
            if status.st_size == self.size and os.path.samestat(status, os.fstat(self._descriptor)):
                return descriptor
        os.close(descriptor)
        return None

    def report(self, problem: str) -> None:
        """Log that a part of the file is of no use."""
        _log(f"a saved prefix is evaluated again, since {problem}: {self.path}")

    def close(self) -> None:
        """Close the file: no state can be read any more."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    __del__ = close


def _read_catalogue(descriptor: int, identity: str, block: int) -> _Catalogue:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise _Unusable("it is no regular file")
    head = bytes(_read(descriptor, 0, _STATES))
    if not head.startswith(_MAGIC):
        raise _Unusable("it has another format")
    if head[_HEAD.size :] != _CHECKSUM.pack(zlib.crc32(head[: _HEAD.size])):
        raise _Unusable("its head is damaged")
    _, offset, size, checksum = _HEAD.unpack_from(head)
    if offset < _STATES or offset + size > status.st_size:
        raise _Unusable("it is incomplete")
    if size > _MAX_CATALOGUE:
        raise _Unusable(f"its catalogue has {size} bytes")
    data = _read(descriptor, offset, size)
    if zlib.crc32(data) != checksum:
        raise _Unusable("its catalogue is damaged")
    try:
        catalogue = _decode(data)
    except msgspec.MsgspecError as error:
        raise _Unusable(f"its catalogue can't be read ({error})") from error
    if (catalogue.identity, catalogue.block) != (identity, block):
        raise _Unusable("it is of another model, or other settings")
    _check(catalogue, offset)
    return catalogue


def _check(catalogue: _Catalogue, end: int) -> None:
    """Refuse a catalogue that no writer of ours makes; ``end`` is where the states end in the file."""
    entries = catalogue.entries
    for place, entry in enumerate(entries):
        if not NOTHING <= entry.parent < place or not 0 <= entry.adapters < len(catalogue.adapters):
            raise _Unusable(f"block {place} follows none that is there")
        if entry.parent != NOTHING:
            parent = entries[entry.parent]
            if len(parent.tokens) != catalogue.block or parent.adapters != entry.adapters:
                raise _Unusable(f"block {place} can't follow block {entry.parent}")
        if not entry.tokens or (catalogue.block and len(entry.tokens) > catalogue.block):
            raise _Unusable(f"block {place} has {len(entry.tokens)} tokens")
        if not all(0 <= token <= _MAX_TOKEN for token in entry.tokens):
            raise _Unusable(f"block {place} has what is no token")
        if entry.size < 1 or entry.offset < _STATES or entry.offset + entry.size > end:
            raise _Unusable(f"block {place} has no place in it")


def _read(descriptor: int, offset: int, size: int) -> bytearray:
    """Return bytes of a file, fewer at its end; a single read gives no more than 2 GiB."""
    data = bytearray(size)
    view, have = memoryview(data), 0
    while have < size and (count := os.preadv(descriptor, [view[have:]], offset + have)):
        have += count
    view.release()
    del data[have:]
    return data


def _log(line: str) -> None:
    """Write a line to standard error, which the API process puts into its log."""
    sys.stderr.write(line + "\n")
