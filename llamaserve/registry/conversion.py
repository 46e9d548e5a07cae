"""Published weights become a file for llama.cpp or whisper.cpp, in a process of its own; what is known of such a file.

The work is done by ``converting``, with libraries that the API process does without. It can be given up at any time.
Nobody publishes the sum of a converted file, since it may be another after an update of this program. So the cache
folder's records keep the one that it had when it was made, whatever becomes of the file, and the sum of the weights
that it was made from. A GGUF file says the latter itself; one for whisper.cpp has no place for it. This module does not
know where weights come from.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Final, NamedTuple, Self

import msgspec

from llamaserve import errors
from llamaserve.registry import bert, ctranslate2_whisper
from llamaserve.registry.cache import cache_folder, carry_on, recall, remember
from llamaserve.registry.gguf import read_header
from llamaserve.registry.sources import Quantisation
from llamaserve.sandbox import environment

AGAIN: Final = "Delete the file and fetch it again: llamaserve rm, llamaserve pull"
VERSION: Final = 1  # of what is written; one more whenever the same weights become another file
SHA256_KEY: Final = "llamaserve.converted.sha256"
VERSION_KEY: Final = "llamaserve.converted.version"
REFUSED: Final = 3  # exit status: the weights are at fault, and standard output says why

_POLL_SECONDS: Final = 0.2
_CONVERTED: Final = "converted"  # the kind of record of what conversions made


class Method(NamedTuple):
    """How weights of one format are converted: what they are called in the folder of a request, the neighbours that lie
    there by their own names, what the new file's name ends with, and the notice that has to go with it.
    """

    weights: str
    neighbours: tuple[str, ...]
    suffix: str
    notice: str | None = None


BERT: Final = Method("model.safetensors", bert.NEIGHBOURS, ".gguf")
WHISPER: Final = Method("model.bin", ctranslate2_whisper.NEIGHBOURS, ".bin", ctranslate2_whisper.NOTICE)


@dataclass(frozen=True)
class Request:
    """What to convert: the ``folder`` with the weights and their neighbours, where the new file shall be (``target``;
    its suffix says which method it is), the sum of the weights, and what else the file shall say of itself, if it can.
    """

    folder: str
    target: str
    quantisation: Quantisation
    sha256: str
    name: str
    url: str

    @classmethod
    def read(cls, words: Sequence[str]) -> Self:
        """Return the request that a command line stands for."""
        return cls(*words)  # type: ignore[arg-type]

    def words(self) -> tuple[str, ...]:
        """Return the request as a command line."""
        return astuple(self)


class Origin(NamedTuple):
    """What a file was made from, and by which version of the converter."""

    sha256: str
    version: int


def convert(request: Request, meanwhile: Callable[[], None] = carry_on) -> None:
    """Convert weights. ``meanwhile`` is called again and again, and may raise to give up.

    Raises ``SourceError``: these weights cannot be converted.
    """
    answer, log = (Path(request.folder) / f"conversion.{kind}" for kind in ("answer", "log"))
    command = [sys.executable, "-m", "llamaserve.registry.converting", *request.words()]
    with answer.open("wb") as output, log.open("wb") as errors_output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors_output, env=environment()
        )
        try:
            while process.poll() is None:
                meanwhile()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode == REFUSED:
        hint = "Name weights of a BERT model for sentence embeddings or of a Whisper model, or a file that is ready"
        raise errors.SourceError(answer.read_text("utf-8", "replace"), hint=hint)
    if process.returncode != 0:
        last = "\n".join(log.read_text("utf-8", "replace").splitlines()[-3:]) or "it said nothing"
        raise errors.SourceError(f"the conversion ended with status {process.returncode}:\n{last}")


class _Made(msgspec.Struct, frozen=True):
    """What is kept of a conversion: the sum that the file had when it was made, and what it was made from, which
    earlier versions left to the file.
    """

    sha256: str
    origin: Origin | None = None


def note(path: Path, sha256: str, weights: str) -> None:
    """Keep what is known of a file that was just converted: its sum, and that of the weights."""
    remember(_CONVERTED, _key(path), _Made(sha256, Origin(weights, VERSION)))


def made_sum(path: Path) -> str | None:
    """Return the sum that a converted file had when it was made; None where nobody knows."""
    made = recall(_CONVERTED, _key(path), _Made)
    return None if made is None else made.sha256


def _key(path: Path) -> str:
    """Return what the file is called in the records, wherever the cache folder is moved to."""
    return Path(os.path.relpath(path, cache_folder())).as_posix()


def origin(path: Path) -> Origin | None:
    """Return what a file was made from; None where nobody knows.

    Raises ``ChecksumMismatch``: it should say so itself, and does not.
    """
    if path.suffix != BERT.suffix:
        made = recall(_CONVERTED, _key(path), _Made)
        return None if made is None else made.origin
    try:
        header = read_header(path)
    except errors.GGUFError as error:
        raise errors.ChecksumMismatch(error.message, hint=AGAIN) from error
    sha256, version = header.text(SHA256_KEY), header.integer(VERSION_KEY)
    if sha256 is None or version is None:
        raise errors.ChecksumMismatch(f"{path} does not say which weights it was converted from", hint=AGAIN)
    return Origin(sha256, version)


def check_origin(path: Path, sha256: str) -> None:
    """Check that a file was made from weights with this sum, as far as that is known.

    Raises ``ChecksumMismatch``: it was not, or does not say so as it should.
    """
    made_from = origin(path)
    if made_from is not None and made_from.sha256 != sha256.lower():
        raise errors.ChecksumMismatch(
            f"{path} was converted from weights with the SHA-256 {made_from.sha256}, and {sha256.lower()} was promised",
            hint=f"{AGAIN}; if the sum stays, check the source, then correct sha256 in models.yaml",
        )


def is_outdated(path: Path) -> bool:
    """Whether a file would become another one if it were converted now. Raises ``ChecksumMismatch`` as
    ``check_origin`` does.
    """
    made_from = origin(path)
    return made_from is not None and made_from.version != VERSION
