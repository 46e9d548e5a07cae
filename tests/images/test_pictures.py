"""Uploaded pictures are read in processes of their own: as they are meant to be seen, in the size that is wanted."""

from __future__ import annotations

import asyncio
import io
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from msgspec import msgpack
from PIL import Image

from llamaserve.errors import InvalidRequest, Unavailable
from llamaserve.images import pictures_main
from llamaserve.images.pictures import Look, PictureAnswer, PictureJob, PictureReader, Render
from llamaserve.images.values import Size

T = TypeVar("T")


def file_of(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def ramp(width: int = 80, height: int = 40) -> Any:
    """A picture that is black on the left and white on the right."""
    return Image.fromarray(np.tile(np.linspace(0, 255, width).astype(np.uint8), (height, 1))).convert("RGB")


def answered(job: PictureJob) -> PictureAnswer:
    """Return the answer of a reading process, given in this one."""
    payload, spent = pictures_main.answer(msgpack.encode(job))
    assert not spent
    return msgpack.decode(payload, type=PictureAnswer)


def size_of(tmp_path: Path, data: bytes) -> Size:
    (tmp_path / "a").write_bytes(data)
    answer = answered(Look(str(tmp_path / "a")))
    assert answer.size is not None, answer.error
    return answer.size


def pixels_of(tmp_path: Path, data: bytes, size: Size, *, mask: bool = False) -> np.ndarray[Any, Any]:
    (tmp_path / "a").write_bytes(data)
    answer = answered(Render(str(tmp_path / "a"), str(tmp_path / "b"), size, mask))
    assert answer.size == size, answer.error
    pixels = np.fromfile(tmp_path / "b", np.uint8)
    return pixels.reshape((size.height, size.width) if mask else (size.height, size.width, 3))


@pytest.mark.parametrize("kind", pictures_main.FORMATS)
def test_all_formats_are_read(tmp_path: Path, kind: str) -> None:
    data = file_of(ramp(), kind)
    assert size_of(tmp_path, data) == (80, 40)
    pixels = pixels_of(tmp_path, data, Size(80, 40))
    assert pixels[20, 2].max() < 40
    assert pixels[20, 77].min() > 215


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_all_kinds_of_colours_are_read(tmp_path: Path, mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    image = ramp().convert("L").convert("I;16") if mode == "I;16" else ramp().convert(mode)
    assert pixels_of(tmp_path, file_of(image, kind), Size(80, 40)).shape == (40, 80, 3)


def test_grey_of_16_bits_is_as_light_as_of_8(tmp_path: Path) -> None:
    columns = np.linspace(0, 65535, 80).astype(np.uint16)
    data = file_of(Image.fromarray(np.tile(columns, (40, 1))))
    assert np.abs(pixels_of(tmp_path, data, Size(80, 40))[20, :, 0].astype(int) - columns // 256).max() <= 1
    mask = pixels_of(tmp_path, data, Size(80, 40), mask=True)[20]
    assert np.abs(mask.astype(int) - columns // 256).max() <= 1


def test_what_is_transparent_becomes_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (40, 40), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (20, 0, 40, 40))
    pixels = pixels_of(tmp_path, file_of(image), Size(40, 40))
    assert tuple(pixels[5, 5]) == (255, 0, 0)
    assert tuple(pixels[5, 35]) == (255, 255, 255)


@pytest.mark.parametrize("turn", range(1, 9))
def test_photos_are_turned_as_the_camera_says(tmp_path: Path, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    data = file_of(ramp(), "JPEG", exif=exif)
    upright = turn > 4
    assert size_of(tmp_path, data) == ((40, 80) if upright else (80, 40))
    pixels = pixels_of(tmp_path, data, Size(40, 80) if upright else Size(80, 40)).astype(int)
    across = pixels[:, -1].mean() - pixels[:, 0].mean(), pixels[-1].mean() - pixels[0].mean()
    assert abs(across[upright]) > 200 > 20 > abs(across[not upright])
    assert (across[upright] > 0) == (turn in (1, 4, 5, 6))


@pytest.mark.parametrize("size", [Size(40, 20), Size(40, 40), Size(200, 40), Size(17, 90)])
def test_another_size_is_filled_from_the_middle(tmp_path: Path, size: Size) -> None:
    pixels = pixels_of(tmp_path, file_of(ramp()), size)
    middle = pixels[size.height // 2, size.width // 2]
    assert abs(int(middle[0]) - 128) < 16
    assert pixels[:, 0].mean() < 128 < pixels[:, -1].mean()


def test_a_mask_is_what_is_transparent_or_else_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (40, 40), "white")
    image.putpixel((3, 4), (255, 255, 255, 0))
    image.putpixel((5, 6), (255, 255, 255, 128))
    mask = pixels_of(tmp_path, file_of(image), Size(40, 40), mask=True)
    assert mask[4, 3] == 255
    assert mask[6, 5] == 127
    assert mask.astype(int).sum() == 255 + 127
    grey = pixels_of(tmp_path, file_of(ramp().convert("L")), Size(80, 40), mask=True)
    assert (grey[0, 0], grey[0, -1]) == (0, 255)


@settings(max_examples=150)
@given(st.data())
def test_a_damaged_file_is_refused_or_read_and_nothing_else(tmp_path_factory: Any, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    kind = data.draw(st.sampled_from(pictures_main.FORMATS))
    content = bytearray(file_of(ramp(32, 32), kind))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=6)):
        content[place] = data.draw(st.integers(0, 255))
    (folder / "a").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    looked = answered(Look(str(folder / "a")))
    assert (looked.size is None) != (looked.error is None)
    rendered = answered(Render(str(folder / "a"), str(folder / "b"), Size(16, 16)))
    assert (rendered.size is None) != (rendered.error is None)
    for error in (looked.error, rendered.error):
        assert error is None or (error.name == "InvalidRequest" and len(error.message) < 400)


# ---- in processes


def reading(use: Callable[[PictureReader], Awaitable[T]], **options: Any) -> T:
    async def run() -> T:
        async with PictureReader(**options) as reader:
            return await use(reader)

    return asyncio.run(run())


def test_a_reading_process_is_used_again(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(file_of(ramp()))

    async def use(reader: PictureReader) -> None:
        assert await reader.look(tmp_path / "a") == (80, 40)
        (first,) = reader.pids
        with pytest.raises(InvalidRequest):
            await reader.look(tmp_path / "nothing")
        file = await reader.render(tmp_path / "a", tmp_path / "b", Size(8, 8), mask=True)
        assert (file.path, file.width, file.height) == (str(tmp_path / "b"), 8, 8)
        assert reader.pids == {first}

    reading(use)
    assert (tmp_path / "b").stat().st_size == 8 * 8


def test_a_target_that_cannot_be_written_is_the_servers_fault(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(file_of(ramp()))

    async def use(reader: PictureReader) -> None:
        with pytest.raises(Unavailable, match="temporary folder"):
            await reader.render(tmp_path / "a", tmp_path / "no folder" / "b", Size(8, 8))

    reading(use)


@pytest.mark.parametrize(
    ("how", "words"), [(signal.SIGSEGV, "it crashed the picture reader"), (signal.SIGKILL, "memory to decode")]
)
def test_a_process_that_ends_is_a_refusal(tmp_path: Path, how: signal.Signals, words: str) -> None:
    (tmp_path / "a").write_bytes(file_of(ramp()))

    async def use(reader: PictureReader) -> None:
        await reader.look(tmp_path / "a")
        (pid,) = reader.pids
        os.kill(pid, signal.SIGSTOP)
        asked = asyncio.create_task(reader.look(tmp_path / "a"))
        await asyncio.sleep(0.1)
        os.kill(pid, how)
        os.kill(pid, signal.SIGCONT)
        with pytest.raises(InvalidRequest, match=words):
            await asked
        assert await reader.look(tmp_path / "a") == (80, 40)

    reading(use)


def test_a_picture_that_takes_too_long_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(file_of(ramp(4000, 4000)))

    async def use(reader: PictureReader) -> None:
        with pytest.raises(InvalidRequest, match=r"the picture took longer than 0\.03 s to decode"):
            await reader.render(tmp_path / "a", tmp_path / "b", Size(4000, 4000))

    reading(use, time_limit=0.03)
