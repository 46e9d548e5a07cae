"""keys.yaml: the named keys of a server, as sums, with what each one allows.

::

    defaults: {concurrent: 4}
    keys:
      laptop: {sha256: 5f2b…, created: 2026-11-27, admin: true}
      phone: {sha256: 09c1…, created: 2026-11-27, tokens_per_minute: 20000}

It is written by ``llamaserve keys``, may be edited, and is read again when it changes. Knows nothing of HTTP.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llamaserve.errors import KeysError
from llamaserve.keys.keyring import Key, Limits, digest_of, is_given_name, name_problem, new_secret

_LARGEST: Final = 1024 * 1024  # bytes
_MOST_KEYS: Final = 1000
_HEADER: Final = (
    "# The keys of llamaserve: of each only its SHA-256. `llamaserve keys` writes this file, and keeps no comments.\n"
)


class KeyEntry(Limits):
    """A key in the file."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created: datetime.date | None = None
    admin: Annotated[bool, Field(strict=True)] = False

    def key(self, name: str, defaults: Limits) -> Key:
        """Return the key that this describes."""
        limits = self.limits(defaults)
        if limits.queue is not None and limits.concurrent is None:
            raise KeysError(
                f"keys.{name}: queue is how many may wait for their turn beyond concurrent, which is not given"
            )
        return Key(name, bytes.fromhex(self.sha256), self.admin, limits)

    def limits(self, defaults: Limits) -> Limits:
        """Return what the key may use."""
        return Limits(**{limit: getattr(self, limit) for limit in Limits.model_fields}).over(defaults)


class KeyFile(BaseModel):
    """All that the file says. ``defaults`` hold for each key, those of the command line included."""

    model_config = ConfigDict(extra="forbid")

    defaults: Limits = Limits()
    keys: Annotated[dict[str, KeyEntry], Field(max_length=_MOST_KEYS)] = {}

    def listed(self) -> list[Key]:
        """Return the keys."""
        return [entry.key(name, self.defaults) for name, entry in self.keys.items()]


def read_keys(path: Path) -> KeyFile:
    """Return what a file says. Raises ``KeysError`` when it can't be read, or says anything that is not understood:
    then it is not known who may use the server.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
    except (OSError, ValueError) as error:
        raise KeysError(f"{path} can't be read: {error}") from error
    if len(data) > _LARGEST:
        raise KeysError(f"{path} is larger than {_LARGEST} bytes")
    try:
        content = yaml.safe_load(data)
        found = KeyFile.model_validate({} if content is None else content)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise KeysError(f"{path}: {where or 'the file'}: {problem['msg']}") from None
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, AttributeError, TypeError) as error:  # of tags
        raise KeysError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    for name in found.keys:
        if (why := _name_problem(name)) is not None:
            raise KeysError(f"{path}: keys.{name[:80]}: {why}")
    return found


def _name_problem(name: str) -> str | None:
    if is_given_name(name):
        return f"{name} is what keys of the command line are called"
    return name_problem(name)


def create_key(path: Path, name: str, limits: Limits, *, admin: bool) -> str:
    """Add a key to the file, which is made if there is none, and return its secret, which is nowhere else. Raises
    ``KeysError``.
    """
    if (why := _name_problem(name)) is not None:
        raise KeysError(why)
    secret = new_secret()
    today = datetime.datetime.now(datetime.UTC).date()
    entry = KeyEntry(sha256=digest_of(secret.encode()).hex(), created=today, admin=admin, **limits.model_dump())
    with _changing(path) as found:
        if name in found.keys:
            raise KeysError(f"there is a key {name} already", hint=f"llamaserve keys revoke {name}")
        if len(found.keys) == _MOST_KEYS:
            raise KeysError(f"{path} has {_MOST_KEYS} keys, which is as many as it may")
        found.keys[name] = entry
    return secret


def revoke_key(path: Path, name: str) -> int:
    """Take a key out of the file, and return how many are left. Raises ``KeysError``."""
    with _changing(path) as found:
        if found.keys.pop(name, None) is None:
            raise KeysError(f"there is no key {name[:80]}", hint="llamaserve keys list")
    return len(found.keys)


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[KeyFile]:
    """Have what the file says within a ``with`` block, and write it back after it; nobody else changes it meanwhile."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            found = read_keys(path) if path.exists() else KeyFile()
            yield found
            _write(path, _HEADER + _text(found))
        finally:
            os.close(folder)
    except OSError as error:
        raise KeysError(f"{path} can't be written: {error}") from error


def _write(path: Path, text: str) -> None:
    """Replace the file as a whole; only its owner may read it."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def _text(content: KeyFile) -> str:
    plain: dict[str, Any] = content.model_dump(exclude_defaults=True)
    return yaml.safe_dump(plain or {"keys": {}}, sort_keys=False, default_flow_style=None, width=10_000)
