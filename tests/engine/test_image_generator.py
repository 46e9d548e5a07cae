"""Pictures one after the other: what is told of them on the way, and what a picture is made from and cut to."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_diffusion import write_model

from llamaserve.engine import image_generator as module
from llamaserve.engine.events import EngineEvent, Failed, Occupancy
from llamaserve.engine.image_generator import ImageGenerator, LoadedImageGenerator
from llamaserve.errors import EngineError
from llamaserve.images.diffusion import Inputs, Pixels, Watch
from llamaserve.images.values import (
    DiffusionParams,
    GeneratedImage,
    ImageGeneration,
    ImageStep,
    PartialImage,
    PictureFile,
)

PIL = pytest.importorskip("PIL.Image")


class FakeDiffusion:
    """Draws a picture of a single colour, and remembers what it was given."""

    def __init__(self) -> None:
        self.jobs: list[tuple[ImageGeneration, Inputs]] = []
        self.fails = False
        self.closed = False

    def generate(self, job: ImageGeneration, inputs: Inputs, watch: Watch) -> Pixels:
        self.jobs.append((job, inputs))
        watch.step(0, 2)
        watch.step(1, 2)
        if job.partial_images:
            watch.partial(np.full((4, 4, 3), 50, np.uint8))
        watch.step(2, 2)
        if self.fails:
            raise EngineError("it is out of paint")
        return np.full((job.canvas_height, job.canvas_width, 3), job.seed % 256, np.uint8)

    def close(self) -> None:
        self.closed = True


class Desk:
    """A generator with a fake model, and what it tells."""

    def __init__(self) -> None:
        self.told: list[EngineEvent] = []
        self.diffusion = FakeDiffusion()
        self.generator = ImageGenerator(self.diffusion, self._tell)  # type: ignore[arg-type]

    def _tell(self, events: Sequence[EngineEvent]) -> None:
        self.told += events


@pytest.fixture
def desk() -> Desk:
    return Desk()


def job(width: int = 8, height: int = 8, canvas: tuple[int, int] | None = None, **fields: Any) -> ImageGeneration:
    usual: dict[str, Any] = {"prompt": "a", "seed": 7, "steps": 2, "cfg_scale": 1.0, "guidance": 1.0}
    canvas = canvas or (width, height)
    return ImageGeneration(
        width=width, height=height, canvas_width=canvas[0], canvas_height=canvas[1], **(usual | fields)
    )


def opened(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(PIL.open(io.BytesIO(data)).convert("RGB"))


def test_a_step_is_a_picture_of_which_is_told_on_the_way(desk: Desk) -> None:
    desk.generator.submit(3, job(partial_images=1))
    assert desk.generator.occupancy() == Occupancy(1, 0)
    (made,) = desk.generator.step()
    assert isinstance(made, GeneratedImage)
    assert (opened(made.data) == 7).all()
    shown = desk.told.pop(2)
    assert desk.told == [ImageStep(3, 0, 2), ImageStep(3, 1, 2), ImageStep(3, 2, 2)]
    assert isinstance(shown, PartialImage)
    assert (shown.request, shown.index) == (3, 0)
    assert opened(shown.data).shape == (8, 8, 3)
    assert desk.generator.idle
    assert desk.generator.occupancy() == Occupancy()
    assert desk.generator.occupancy() is None


def test_requests_are_worked_on_in_their_order(desk: Desk) -> None:
    for number in (1, 2, 3):
        desk.generator.submit(number, job(seed=number))
    assert desk.generator.occupancy() == Occupancy(1, 2)
    desk.generator.cancel(2)
    desk.generator.cancel(9)
    made = [event for _ in range(2) for event in desk.generator.step()]
    assert [event.request for event in made if isinstance(event, GeneratedImage)] == [1, 3]
    assert desk.generator.idle


def test_a_failure_ends_one_request(desk: Desk) -> None:
    desk.diffusion.fails = True
    desk.generator.submit(1, job())
    desk.generator.submit(2, job())
    (failed,) = desk.generator.step()
    assert isinstance(failed, Failed)
    assert (failed.request, failed.error.message) == (1, "it is out of paint")
    desk.diffusion.fails = False
    assert isinstance(desk.generator.step()[0], GeneratedImage)


def test_what_is_over_is_cut_off_on_all_sides_alike(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.arange(10 * 16 * 3, dtype=np.uint8).reshape(10, 16, 3)
    monkeypatch.setattr(desk.diffusion, "generate", lambda job, inputs, watch: whole)
    desk.generator.submit(1, job(11, 7, canvas=(16, 10)))
    (made,) = desk.generator.step()
    assert isinstance(made, GeneratedImage)
    assert (opened(made.data) == whole[1:8, 2:13]).all()


# ---- from other pictures


def written(path: Path, pixels: np.ndarray[Any, Any]) -> PictureFile:
    path.write_bytes(pixels.tobytes())
    return PictureFile(str(path), pixels.shape[1], pixels.shape[0])


def noise(width: int, height: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)


def test_a_picture_is_put_into_the_middle_of_its_canvas(desk: Desk, tmp_path: Path) -> None:
    init, mask = noise(11, 7), np.zeros((7, 11), np.uint8)
    mask[:, -1] = 255
    files = {"init": written(tmp_path / "init", init), "mask": written(tmp_path / "mask", mask)}
    reference = noise(5, 3)
    desk.generator.submit(
        1, job(11, 7, canvas=(16, 16), references=(written(tmp_path / "reference", reference),), **files)
    )
    desk.generator.step()
    ((_, inputs),) = desk.diffusion.jobs
    assert inputs.init is not None
    assert inputs.mask is not None
    assert (inputs.init[4:11, 2:13] == init).all()
    assert (inputs.init[0, 0] == init[0, 0]).all()
    assert (inputs.init[15, 15] == init[6, 10]).all()
    assert (inputs.mask[:, 12:] == 255).all()
    assert (inputs.mask[:, :12] == 0).all()
    assert (inputs.references[0] == reference).all()


def test_what_the_mask_keeps_is_kept_to_the_last_bit(desk: Desk, tmp_path: Path) -> None:
    init, mask = noise(8, 8), np.zeros((8, 8), np.uint8)
    mask[2], mask[4] = 255, 51
    files = {"init": written(tmp_path / "init", init), "mask": written(tmp_path / "mask", mask)}
    desk.generator.submit(1, job(seed=200, partial_images=1, **files))
    (made,) = desk.generator.step()
    assert isinstance(made, GeneratedImage)
    pixels = opened(made.data)
    assert (pixels[2] == 200).all()
    assert (pixels[[0, 1, 3, 5, 6, 7]] == init[[0, 1, 3, 5, 6, 7]]).all()
    assert (np.abs(pixels[4] - (init[4] + (200 - init[4].astype(float)) / 5)) <= 0.5).all()
    (shown,) = [event for event in desk.told if isinstance(event, PartialImage)]
    assert (opened(shown.data)[0] == init[0]).all()


def test_files_that_are_not_what_the_job_says_are_refused(desk: Desk, tmp_path: Path) -> None:
    good = written(tmp_path / "good", noise(8, 8))
    missing = PictureFile(str(tmp_path / "missing"), 8, 8)
    for wrong in (missing, PictureFile(good.path, 9, 8), PictureFile(good.path, 8, 7), PictureFile("\0", 8, 8)):
        with pytest.raises(EngineError, match="an uploaded picture"):
            desk.generator.submit(1, job(init=wrong))
    with pytest.raises(EngineError, match="has 8x8 pixels, more than 4x4"):
        desk.generator.submit(1, job(4, 4, init=good))
    assert desk.generator.idle


# ---- the real one


def test_the_real_one_gives_way_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("stable_diffusion_cpp")
    model, decoder = write_model(tmp_path)
    niceness: list[int] = []
    monkeypatch.setattr(module.os, "nice", niceness.append)
    told: list[EngineEvent] = []
    params = DiffusionParams(
        path=str(model),
        whole=True,
        parts={"taesd": str(decoder)},
        encodes=True,
        small_decoder=True,
        flash_attention=True,
        threads=1,
    )
    generator = LoadedImageGenerator(params, lambda fraction: None, told.extend)
    assert niceness == [module._NICENESS]
    assert not generator.gpu
    generator.submit(1, job(64, 64, settings="how it was made"))
    (made,) = generator.step()
    assert isinstance(made, GeneratedImage)
    assert PIL.open(io.BytesIO(made.data)).info["parameters"] == "how it was made"
    assert told == [ImageStep(1, step, 2) for step in range(3)]
    generator.close()
