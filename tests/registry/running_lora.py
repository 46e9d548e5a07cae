"""Run as a process of its own: has stable-diffusion.cpp make small pictures with LoRAs, each in a child process, which
may end without harm.

It reads from standard input how a model is loaded, as JSON in a line, and the path of a LoRA in each further line; it
may be empty. For each it prints the line's number, from 0 on, and a sum of the picture as it is after the first of two
steps, or how the process ended. The order is any: some are at work at once, since they mostly sleep.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from typing import NoReturn

import msgspec

from llamaserve.images.diffusion import Diffusion, Inputs, Pixels, Watch
from llamaserve.images.values import DiffusionParams, ImageGeneration, LoraFile

_ANSWERS = os.dup(1)  # while the library prints to standard output
_MOST = 8  # child processes at a time


def main() -> None:
    """Answer each line."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    model = Diffusion(msgspec.json.decode(sys.stdin.buffer.readline(), type=DiffusionParams), lambda _: None)
    children: dict[int, int] = {}
    for number, line in enumerate(sys.stdin.buffer):
        if (child := os.fork()) == 0:
            with contextlib.suppress(BaseException):
                _draw(model, number, line.decode().strip())
            os._exit(1)
        children[child] = number
        if len(children) == _MOST:
            _wait(children)
    while children:
        _wait(children)


def _wait(children: dict[int, int]) -> None:
    child, status = os.wait()
    number = children.pop(child)
    if status:
        _answer(number, f"ended with status {status}")


def _answer(number: int, text: str) -> None:
    os.write(_ANSWERS, f"{number} {text}\n".encode())


def _draw(model: Diffusion, number: int, path: str) -> None:
    def show(pixels: Pixels) -> NoReturn:
        _answer(number, hashlib.sha256(pixels.tobytes()).hexdigest())
        os._exit(0)

    job = ImageGeneration(
        prompt="a cat",
        width=64,
        height=64,
        canvas_width=64,
        canvas_height=64,
        seed=1,
        steps=2,
        cfg_scale=1.0,
        guidance=3.5,
        sampler="euler",
        partial_images=1,
        loras=(LoraFile(path, 1.0, 0),) if path else (),
    )
    model.generate(job, Inputs(), Watch(lambda *_: None, show))


if __name__ == "__main__":
    main()
