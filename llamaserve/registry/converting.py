"""The process that converts weights: BERT's to GGUF, Whisper's to whisper.cpp's format.

Run as ``python -m llamaserve.registry.converting`` with the words of a request; ``conversion`` is the other side, and
has the exit status. This module does not know how anything is converted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from llamaserve.errors import GGUFError, SourceError
from llamaserve.registry import converting_bert, converting_whisper
from llamaserve.registry.conversion import BERT, REFUSED, WHISPER, Request
from llamaserve.registry.whisper_file import read_whisper

_CONVERTERS: Final[Mapping[str, Callable[[Request], None]]] = {
    BERT.suffix: converting_bert.convert,
    WHISPER.suffix: converting_whisper.convert,
}


def convert(request: Request) -> None:
    """Convert weights to what the name of the new file ends with. Raises ``SourceError``."""
    _CONVERTERS[Path(request.target).suffix](request)


def check_loadable(path: Path) -> None:
    """Refuse a Whisper model of a size over which whisper.cpp ends its process. Raises ``SourceError``."""
    if path.suffix == WHISPER.suffix:
        try:
            read_whisper(path)
        except GGUFError as error:
            raise SourceError(f"the model cannot be converted to one that can be loaded: {error.message}") from error


def main() -> int:
    """Convert what the command line says, and return the exit status."""
    try:
        request = Request.read(sys.argv[1:])
        convert(request)
        check_loadable(Path(request.target))
    except SourceError as error:
        sys.stdout.buffer.write(error.message.encode("utf-8", "backslashreplace"))
        return REFUSED
    except OSError as error:
        sys.stdout.write(f"the converted model cannot be written: {error.strerror or error}")
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
