"""Run as a process of its own: has stable-diffusion.cpp say of which version it takes models to be, as the server does.

It reads from standard input how each model is loaded, as JSON in a line, and prints the library's word for it, or what
it complains of. Loading ends there, before any memory is taken for the weights, and each is tried in a child process,
which may end without harm.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys

import msgspec

from llamaserve.errors import ModelLoadFailed
from llamaserve.images import diffusion
from llamaserve.images.values import DiffusionParams

_VERSION = re.compile(r"Version: (.+?) *$")


class _Answering(diffusion._Loading):
    """What the library says while it loads a model. The process ends once the version is known."""

    def log(self, level: int, message: str) -> None:
        super().log(level, message)
        if found := _VERSION.search(message.strip()):
            _answer(found[1])


def main() -> None:
    """Answer each line."""
    diffusion._Loading = _Answering  # type: ignore[misc]
    diffusion._library()
    for line in sys.stdin.buffer:
        params = msgspec.json.decode(line, type=DiffusionParams)
        if (child := os.fork()) == 0:
            with contextlib.suppress(BaseException):
                _load(params)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        if status:
            os.write(1, f"ended with status {status}\n".encode())


def _load(params: DiffusionParams) -> None:
    try:
        diffusion.Diffusion(params, lambda _: None)
    except ModelLoadFailed as error:
        _answer(error.message)


def _answer(text: str) -> None:
    os.write(1, text.replace("\n", " ").encode() + b"\n")
    os._exit(0)


if __name__ == "__main__":
    main()
