"""Published weights become a GGUF file, in a process of its own; and what such a file says of where it came from.

The work is done by ``converting``, with libraries that the API process does without. It can be given up at any time.
A converted file says the sum of the weights that it was made from, since its publisher does not know its own: it may be
another after an update of this program. This module does not know where weights come from, and whether a file is still
as it was made.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Final, NamedTuple, Self

from llamaserve import errors
from llamaserve.registry.cache import carry_on
from llamaserve.registry.gguf import read_header
from llamaserve.registry.sources import Quantisation
from llamaserve.sandbox import environment

AGAIN: Final = "Delete the file and fetch it again: llamaserve rm, llamaserve pull"
VERSION: Final = 1  # of what is written; one more whenever the same weights become another file
SHA256_KEY: Final = "llamaserve.converted.sha256"
VERSION_KEY: Final = "llamaserve.converted.version"
WEIGHTS: Final = "model.safetensors"  # in the folder of a request; its neighbours have their own names
REFUSED: Final = 3  # exit status: the weights are at fault, and standard output says why

_POLL_SECONDS: Final = 0.2


@dataclass(frozen=True)
class Request:
    """What to convert: the ``folder`` with the weights and their neighbours, where the GGUF file shall be (``target``),
    the sum of the weights, and what else the file shall say of itself.
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
        hint = "Name weights of a BERT model for sentence embeddings, or a GGUF file"
        raise errors.SourceError(answer.read_text("utf-8", "replace"), hint=hint)
    if process.returncode != 0:
        last = "\n".join(log.read_text("utf-8", "replace").splitlines()[-3:]) or "it said nothing"
        raise errors.SourceError(f"the conversion ended with status {process.returncode}:\n{last}")


def origin(path: Path) -> Origin | None:
    """Return what a file was made from; None for one that does not say. Raises ``GGUFError``."""
    header = read_header(path)
    sha256, version = header.text(SHA256_KEY), header.integer(VERSION_KEY)
    return None if sha256 is None or version is None else Origin(sha256, version)


def check_origin(path: Path, sha256: str) -> None:
    """Check that a file was made from weights with this sum.

    Raises ``ChecksumMismatch``: it was not, or cannot be read as a GGUF file.
    """
    made_from = _known_origin(path)
    if made_from.sha256 != sha256.lower():
        raise errors.ChecksumMismatch(
            f"{path} was converted from weights with the SHA-256 {made_from.sha256}, and {sha256.lower()} was promised",
            hint=f"{AGAIN}; if the sum stays, check the source, then correct sha256 in models.yaml",
        )


def is_outdated(path: Path) -> bool:
    """Whether a file would become another one if it were converted now. Raises ``ChecksumMismatch`` as
    ``check_origin`` does.
    """
    return _known_origin(path).version != VERSION


def _known_origin(path: Path) -> Origin:
    try:
        made_from = origin(path)
    except errors.GGUFError as error:
        raise errors.ChecksumMismatch(error.message, hint=AGAIN) from error
    if made_from is None:
        raise errors.ChecksumMismatch(f"{path} does not say which weights it was converted from", hint=AGAIN)
    return made_from
