"""stable-diffusion.cpp behind its checked calls, with a small model of random weights."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_diffusion import decoder_shapes, write_model, write_safetensors

from llamaserve.errors import EngineError, ModelLoadFailed
from llamaserve.images import diffusion as module
from llamaserve.images.diffusion import Diffusion, Inputs, Pixels, Watch, partial_steps
from llamaserve.images.values import SAMPLERS, SCHEDULERS, Course, DiffusionParams, ImageGeneration

NOTHING = Inputs()


def params(files: tuple[Path, Path], **changes: Any) -> DiffusionParams:
    model, decoder = files
    fields: dict[str, Any] = {
        "path": str(model),
        "whole": True,
        "parts": {"taesd": str(decoder)},
        "encodes": True,
        "small_decoder": True,
        "flash_attention": True,
        "threads": 2,
    }
    return DiffusionParams(**(fields | changes))


@pytest.fixture(scope="module")
def diffusion(image_model: tuple[Path, Path]) -> Iterator[Diffusion]:
    loaded = Diffusion(params(image_model), lambda fraction: None)
    yield loaded
    loaded.close()
    loaded.close()


def job(width: int = 64, height: int = 64, **fields: Any) -> ImageGeneration:
    usual: dict[str, Any] = {"prompt": "a lighthouse", "seed": 1, "steps": 2, "cfg_scale": 1.0, "guidance": 3.5}
    return ImageGeneration(width=width, height=height, canvas_width=width, canvas_height=height, **(usual | fields))


class Notes:
    """What is told on the way."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []
        self.partial: list[tuple[int, Pixels]] = []
        self.watch = Watch(lambda step, steps: self.steps.append((step, steps)), self._show)

    def _show(self, pixels: Pixels) -> None:
        self.partial.append((len(self.steps), pixels))


def draw(diffusion: Diffusion, inputs: Inputs = NOTHING, notes: Notes | None = None, **fields: Any) -> Pixels:
    return diffusion.generate(job(**fields), inputs, (notes or Notes()).watch)


def noise(width: int = 64, height: int = 64) -> Pixels:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)


def differ(one: Pixels, other: Pixels) -> float:
    return float(np.abs(one.astype(int) - other).mean())


# ---- pictures


@pytest.mark.parametrize(("width", "height"), [(64, 64), (112, 80), (64, 128)])
def test_a_picture_has_the_size_of_its_canvas(diffusion: Diffusion, width: int, height: int) -> None:
    assert draw(diffusion, width=width, height=height).shape == (height, width, 3)


def test_the_same_job_gives_the_same_picture_whatever_came_between(diffusion: Diffusion) -> None:
    first = draw(diffusion)
    draw(diffusion, Inputs(init=noise(), references=[noise()]), seed=9, steps=3, sampler="dpm++2m", partial_images=2)
    assert (draw(diffusion) == first).all()


def test_all_samplers_and_schedulers_are_those_that_they_are_called(diffusion: Diffusion) -> None:
    native = module._library()
    for function, names in (("sd_sample_method_name", SAMPLERS), ("sd_scheduler_name", SCHEDULERS)):
        name = getattr(native._lib, function)
        name.restype = ctypes.c_char_p
        assert [name(number).decode() for number in range(len(names))] == list(names)
    pictures = [draw(diffusion, sampler=sampler, steps=3) for sampler in ("euler", "euler_a", "dpm++2m", "lcm")]
    assert all(differ(pictures[0], other) > 0.001 for other in pictures[1:])
    assert (draw(diffusion, steps=3) == pictures[0]).all()


def test_what_a_picture_is_made_from_counts(diffusion: Diffusion) -> None:
    plain, init = draw(diffusion), noise()
    right = np.zeros((64, 64), np.uint8)
    right[:, 32:] = 255
    for inputs in (Inputs(references=[init]), Inputs(init=init), Inputs(init=init, mask=right)):
        assert differ(plain, draw(diffusion, inputs, strength=0.9)) > 0.01
    one, two = Inputs(references=[init]), Inputs(references=[init, noise(48, 96)])
    assert differ(draw(diffusion, one), draw(diffusion, two)) > 0.001


def test_pixels_of_another_shape_never_reach_the_library(diffusion: Diffusion) -> None:
    for inputs in (
        Inputs(init=noise(32, 64)),
        Inputs(init=noise(), mask=np.zeros((64, 32), np.uint8)),
        Inputs(init=noise().astype(np.float32)),  # type: ignore[arg-type]
    ):
        with pytest.raises(EngineError, match="a picture of 64x64 is expected"):
            draw(diffusion, inputs)
    with pytest.raises(EngineError, match="zero character"):
        draw(diffusion, prompt="a\0b")


@pytest.mark.parametrize("strength", [0.0, 5e-324, 1e-308, 1e-9])
def test_the_least_strength_leaves_one_step_of_the_most(strength: float) -> None:
    assert Course.of(30, strength) == (1000, 1)


@pytest.mark.parametrize("steps", [1, 2, 4, 20, 150])
def test_strength_says_how_much_is_left_of_a_picture(diffusion: Diffusion, steps: int) -> None:
    courses = [Course.of(steps, strength) for strength in (0.0, 0.01, 0.3, 0.75, 0.99, 1.0)]
    assert all(1 <= made <= steps < total <= 1000 for total, made in courses[:-1])
    assert [total for total, _ in courses] == sorted((total for total, _ in courses), reverse=True)
    assert all(made == steps for _, made in courses[2:])
    assert courses[-1] == (steps, steps)
    if steps <= 4:
        notes, plain = Notes(), draw(diffusion, steps=steps)
        pictures = [
            draw(diffusion, Inputs(init=noise()), notes, steps=steps, strength=strength)
            for strength in (0.2, 0.75, 1.0)
        ]
        assert [differ(plain, each) > 0.01 for each in pictures] == [True, True, False]
        assert [each for each in notes.steps if each[0] == each[1]] == [(steps, steps)] * 3


# ---- on the way


def test_each_step_is_told_and_nothing_else(diffusion: Diffusion) -> None:
    notes = Notes()
    draw(diffusion, Inputs(init=noise(), references=[noise()]), notes, steps=4, strength=1.0, tiled=True)
    assert notes.steps == [(step, 4) for step in range(5)]
    assert notes.partial == []


@pytest.mark.parametrize(
    ("count", "steps", "after"), [(1, 1, [1]), (3, 1, [1]), (1, 2, [1]), (2, 6, [2, 4]), (3, 2, [1, 2])]
)
def test_pictures_are_shown_at_even_intervals(diffusion: Diffusion, count: int, steps: int, after: list[int]) -> None:
    assert sorted(partial_steps(count, steps)) == after
    notes = Notes()
    final = draw(diffusion, notes=notes, steps=steps, partial_images=count)
    assert [told for told, _ in notes.partial] == after  # so many steps are told by then, 0 among them
    assert {pixels.shape for _, pixels in notes.partial} == {final.shape}
    assert np.ptp(notes.partial[0][1]) > 0


def test_without_a_small_decoder_pictures_are_guessed(image_model: tuple[Path, Path]) -> None:
    guessing = Diffusion(params(image_model, small_decoder=False), lambda fraction: None)
    notes = Notes()
    draw(guessing, notes=notes, steps=3, partial_images=1, width=128)
    guessing.close()
    ((_, pixels),) = notes.partial
    assert pixels.shape == (8, 16, 3)


def test_samplers_that_look_twice_show_once(diffusion: Diffusion) -> None:
    notes = Notes()
    draw(diffusion, notes=notes, sampler="heun", steps=4, partial_images=3)
    assert len(notes.partial) == 3


# ---- loading


def test_loading_is_told(image_model: tuple[Path, Path]) -> None:
    told: list[float] = []
    loaded = Diffusion(params(image_model), told.append)
    assert told[-1] == 1
    assert told == sorted(told)
    assert not loaded.gpu
    loaded.close()


def test_a_file_that_cannot_be_loaded_is_an_error_that_says_why(image_model: tuple[Path, Path], tmp_path: Path) -> None:
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"nothing of the kind")
    model, decoder = image_model
    lacking = tmp_path / "lacking.safetensors"
    write_safetensors(lacking, {name: shape for name, shape in decoder_shapes().items() if "layers.18" not in name})
    for wrong in (
        params((junk, decoder)),
        params((tmp_path / "nothing", decoder)),
        params((model, junk)),
        params((model, lacking)),
        params((decoder, decoder)),
        params(image_model, parts={}),
    ):
        with pytest.raises(ModelLoadFailed, match=r"can't load .*: .+"):
            Diffusion(wrong, lambda fraction: None)
    good = Diffusion(params(image_model), lambda fraction: None)
    assert draw(good).shape == (64, 64, 3)
    good.close()


def test_a_decoder_without_an_encoder_is_enough_to_draw(tmp_path: Path, image_model: tuple[Path, Path]) -> None:
    files = write_model(tmp_path, encoder=False)
    loaded = Diffusion(params(files, encodes=False), lambda fraction: None)
    assert draw(loaded).shape == (64, 64, 3)
    loaded.close()


def test_without_the_library_it_is_said_what_is_missing(
    image_model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    module._library.cache_clear()
    monkeypatch.setattr(module.importlib, "import_module", missing)
    with pytest.raises(ModelLoadFailed, match=r"stable-diffusion\.cpp can't be loaded: No module named"):
        Diffusion(params(image_model), lambda fraction: None)
    monkeypatch.undo()
    module._library.cache_clear()


def test_what_the_library_allocates_is_freed(diffusion: Diffusion) -> None:
    class Usage(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "a", "b", "c", "mapped", "d", "e", "used", "f", "g")]

    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        pytest.skip("this C library does not tell what is in use")
    mallinfo.restype = Usage

    def in_use() -> int:
        gc.collect()
        return int(mallinfo().used + mallinfo().mapped)

    for _ in range(2):
        draw(diffusion, width=128, height=128, steps=1, partial_images=1)
    before = in_use()
    for _ in range(4):
        draw(diffusion, width=128, height=128, steps=1, partial_images=1)
    assert in_use() - before < 128 * 128 * 3  # less than a single picture
