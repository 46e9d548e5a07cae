"""What the tests of pictures over HTTP share: requests, and pictures from and for them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import pytest
from api_helpers import LIMIT, events
from running_server import RunningServer

PIL = pytest.importorskip("PIL.Image")

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"
VARIATIONS = "/v1/images/variations"
LONG = {"prompt": "a slow one", "size": "512x512", "steps": 8}  # a picture that takes a minute and more


def generate(server: RunningServer, **fields: Any) -> httpx.Response:
    """Ask for pictures, and return the response whatever its status."""
    body = {"prompt": "a lighthouse", "seed": 1, **fields}
    return httpx.post(server.url + GENERATIONS, json=body, timeout=LIMIT)


def edit(server: RunningServer, *, path: str = EDITS, files: Any, **fields: Any) -> httpx.Response:
    """Send pictures, and return the response whatever its status."""
    data = {"prompt": "a lighthouse", "seed": "1"} if path == EDITS else {"seed": "1"}
    return httpx.post(server.url + path, files=files, data=data | fields, timeout=LIMIT)


def made(response: httpx.Response, number: int = 0) -> np.ndarray[Any, Any]:
    """Return the pixels of a picture in an answer."""
    assert response.status_code == 200, response.text
    return pixels(file_of(response.json()["data"][number]))


def file_of(picture: dict[str, Any]) -> bytes:
    """Return the file of a picture in an answer or an event."""
    return base64.b64decode(picture["b64_json"])


def opened(data: bytes) -> Any:
    """Return a picture as Pillow has it."""
    image = PIL.open(io.BytesIO(data))
    image.load()
    return image


def pixels(data: bytes) -> np.ndarray[Any, Any]:
    """Return the pixels of a picture: rows of RGB."""
    return np.asarray(opened(data).convert("RGB"))


def differ(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """Return by how much two pictures differ, of 255."""
    return float(np.abs(one.astype(int) - other).mean())


def png(image: Any) -> bytes:
    """Return a file of a picture."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def photo(width: int = 96, height: int = 64) -> bytes:
    """Return a picture in which no two places are alike."""
    rows, columns = np.mgrid[0:height, 0:width]
    colours = np.stack([columns * 255 // width, rows * 255 // height, (rows + columns) % 256], axis=-1)
    return png(PIL.fromarray(colours.astype(np.uint8)))


def right_half(width: int = 96, height: int = 64) -> bytes:
    """Return a mask that is transparent on the right."""
    image = PIL.new("RGBA", (width, height), "black")
    image.paste((0, 0, 0, 0), (width // 2, 0, width, height))
    return png(image)


@contextmanager
def streaming(server: RunningServer, **fields: Any) -> Iterator[httpx.Response]:
    """Ask for pictures in a stream; the client leaves at the end of the block."""
    body = {"prompt": "a lighthouse", "seed": 1, "stream": True, **fields}
    with httpx.stream("POST", server.url + GENERATIONS, json=body, timeout=LIMIT) as response:
        assert response.status_code == 200, response.read()
        yield response


def all_events(server: RunningServer, **fields: Any) -> list[Any]:
    """Return all events of a stream."""
    with streaming(server, **fields) as response:
        return list(events(response.iter_lines()))
