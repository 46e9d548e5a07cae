"""What a diffusion model takes, against what stable-diffusion.cpp logged of buffers for models of the right shapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from llamaserve.images.values import ImageGeneration, LoraFile, PictureFile, Size
from llamaserve.registry import diffusion_memory as module
from llamaserve.registry.diffusion_family import KLEIN, SD1, SD2, SDXL, SDXS, Z_IMAGE, Family
from llamaserve.registry.diffusion_file import DiffusionHeader, Tensor
from llamaserve.registry.diffusion_memory import PictureWork, estimate_diffusion, flash_attention, is_tiled

MODEL = "model.diffusion_model."
SIDES = (256, 512, 768, 1024)
_TWO = {320: 5, 640: 5, 1280: 5}  # layers of attention for each width, those in the middle apart

Shapes = dict[str, tuple[int, ...]]


def unet(widths: dict[int, int], *, middle: bool = True, depth: int = 1) -> Shapes:
    """Return the tensors of a U-Net that decide on its memory."""
    shapes: Shapes = {f"{MODEL}input_blocks.0.0.weight": (320, 4, 3, 3)}
    if middle:
        shapes[f"{MODEL}middle_block.0.in_layers.2.weight"] = (1280, 1280, 3, 3)
        shapes[f"{MODEL}middle_block.1.transformer_blocks.0.attn2.to_k.weight"] = (1280, 768)
    for width, count in widths.items():
        for number in range(count * depth):
            shapes[f"{MODEL}output_blocks.{width}.{number}.attn2.to_k.weight"] = (width, 768)
    return shapes


def vae(channels: int = 128) -> Shapes:
    return {
        "first_stage_model.decoder.conv_in.weight": (4 * channels, 4, 3, 3),
        "first_stage_model.encoder.conv_in.weight": (channels, 3, 3, 3),
    }


def language_model() -> Shapes:
    """Return the tensors of Qwen3-4B that decide on its memory."""
    layer = "text_encoders.llm.model.layers.0."
    return {
        f"{layer}self_attn.q_proj.weight": (4096, 2560),
        f"{layer}self_attn.k_proj.weight": (1024, 2560),
        f"{layer}mlp.gate_proj.weight": (9728, 2560),
    }


def header(family: Family, shapes: Shapes, parts: Sequence[str] = ()) -> DiffusionHeader:
    tensors = {name: Tensor(shape, "F16", 0) for name, shape in shapes.items()}
    return DiffusionHeader(Path("x"), dict.fromkeys(parts, Path("y")), True, family, tensors)  # type: ignore[arg-type]


# Family, shapes, with flash attention or without, and the MiB that were logged for squares of these sides.
LOGGED = {
    "SD1.5": (SD1, unet(_TWO), False, (49.6, 559.9, 2690, 8361)),
    "SD1.5, flash": (SD1, unet(_TWO), True, (30.9, 123.1, 276.6, 491.6)),
    "SD2.1": (SD2, unet(_TWO), False, (37.7, 368.0, 1718, 5289)),
    "SD2.1, flash": (SD2, unet(_TWO), True, (31.0, 123.1, 276.7, 491.7)),
    "SDXS, flash": (SDXS, unet({}, middle=False), True, (29.7, 118.1, 265.4, 471.6)),
    "SDXL, flash": (SDXL, unet({640: 10, 1280: 60}), True, (31.3, 123.5, 277.0, 492.0)),
    "FLUX.2 klein": (KLEIN, {f"{MODEL}txt_in.weight": (3072, 7680)}, True, (165.9, 329.0, 597.9, 1066)),
    "Z-Image": (Z_IMAGE, {f"{MODEL}cap_embedder.1.weight": (3840, 2560)}, True, (47.0, 173.3, 388.6, 690.1)),
}


@pytest.mark.parametrize("name", list(LOGGED))
def test_steps_take_what_was_logged_and_little_more(name: str) -> None:
    family, shapes, flash, logged = LOGGED[name]
    found = header(family, shapes)
    for side, taken in zip(SIDES, logged, strict=True):
        work = PictureWork(Size(side, side), prompt=74)
        mebibytes = module._steps(found, shapes, work, flash=flash) / 2**20
        assert taken <= mebibytes <= 1.4 * taken + 20, side  # what multiplications prepare is not logged


def test_a_vae_takes_what_was_logged() -> None:
    found = header(SD1, vae())
    small = header(KLEIN, {}, ["taesd"])
    for side in SIDES:
        size, pixels = Size(side, side), side**2
        assert (
            0 <= module._decoding(found, vae(), size) - {256: 176, 512: 704, 768: 1584, 1024: 2816}[side] * 2**20 < 17e6
        )
        assert (
            0 <= module._encoding(found, vae(), size) - {256: 97, 512: 388, 768: 872, 1024: 1549}[side] * 2**20 < 17e6
        )
        assert module._decoding(small, {}, size) == 898 * pixels
        assert module._encoding(small, {}, size) == 781 * pixels
    scaled = module._decoding(header(SDXL, vae()), vae(), Size(512, 512))
    assert scaled > module._decoding(header(SDXL, vae(), ["vae"]), vae(), Size(512, 512))


@pytest.mark.parametrize(("tokens", "logged"), [(512, 75.0), (843, 160 - 18), (1675, 493 - 35), (3342, 1684 - 69)])
def test_a_language_model_takes_the_square_of_the_prompt(tokens: int, logged: float) -> None:
    found = header(Z_IMAGE, language_model())
    work = PictureWork(Size(64, 64), prompt=tokens - module._TEMPLATE)
    mebibytes = module._reading(found, language_model(), work) / 2**20
    assert logged <= mebibytes <= 1.25 * logged + 30
    padded = module._reading(header(KLEIN, language_model()), language_model(), PictureWork(Size(64, 64), prompt=10))
    assert padded == module._reading(found, language_model(), PictureWork(Size(64, 64), prompt=512 - module._TEMPLATE))


def test_the_largest_stage_counts_and_all_that_is_asked_for() -> None:
    found = header(KLEIN, language_model() | vae() | {f"{MODEL}txt_in.weight": (3072, 7680)}, ["vae", "llm"])

    def taken(width: int = 512, **fields: object) -> int:
        work = PictureWork(Size(width, 512), **fields)  # type: ignore[arg-type]
        return estimate_diffusion(found, work, flash=True)

    assert taken() < taken(1024) < taken(2048)
    assert taken() < taken(references=(Size(1024, 1024),) * 3)
    assert taken() == taken(repaints=True)  # encoding takes less than decoding does
    assert taken() < taken(prompt=4000)
    assert taken(loras=1000) == taken() + 1000


def test_pictures_that_are_looked_at_count_as_what_they_are_scaled_to() -> None:
    def seen(canvas: int, *sizes: tuple[int, int]) -> list[Size]:
        return PictureWork(Size(canvas, canvas), references=tuple(Size(*size) for size in sizes)).seen

    assert seen(256, (16, 16), (1000, 1000), (256, 256)) == [Size(256, 256)] * 3
    assert seen(2048, (2048, 2048), (64, 64)) == [Size(1024, 1024)] * 2
    assert seen(512, (1024, 256)) == [Size(1024, 256)]
    ((width, height),) = seen(512, (577, 391))
    assert 512 * 512 <= width * height < 1.1 * 512 * 512
    found = header(KLEIN, language_model() | vae(), ["vae", "llm"])
    edit = header(KLEIN, language_model() | vae(), ["vae", "llm", "llm_vision"])
    work = PictureWork(Size(512, 512), references=(Size(64, 64),) * 8)
    assert estimate_diffusion(found, work, flash=True) < estimate_diffusion(edit, work, flash=True)


def test_pictures_on_the_way_are_decoded_beside_the_steps() -> None:
    def taken(*parts: str, partial: bool) -> int:
        found = header(KLEIN, language_model() | vae() | {f"{MODEL}txt_in.weight": (3072, 7680)}, ["llm", *parts])
        return estimate_diffusion(found, PictureWork(Size(1024, 1024), partial=partial), flash=True)

    assert taken("vae", partial=True) == taken("vae", partial=False)  # guessed from latent ones
    assert taken("taesd", partial=True) > taken("taesd", partial=False) + 1024 * 1024 * 14 * 64


def test_the_work_of_a_picture_is_that_of_all_it_is_made_from() -> None:
    file = PictureFile("/a", 96, 64)
    job = ImageGeneration(
        prompt="a BREAK b",
        negative_prompt="é" * 500,
        width=100,
        height=70,
        canvas_width=112,
        canvas_height=80,
        seed=1,
        steps=1,
        cfg_scale=2.0,
        guidance=1.0,
        init=file,
        references=(file, file),
        loras=(LoraFile("/a", 1.0, 10), LoraFile("/b", 0.5, 20)),
        partial_images=2,
    )
    seen = (Size(96, 64),) * 2
    assert PictureWork.of(job) == PictureWork(Size(112, 80), 1000, 1, seen, repaints=True, loras=30, partial=True)


def test_flash_attention_is_left_out_where_it_is_slower() -> None:
    assert not flash_attention(header(SD1, {}), Size(512, 512))
    assert flash_attention(header(SD1, {}), Size(768, 768))
    assert flash_attention(header(SD2, {}), Size(512, 512))


def test_only_large_pictures_are_decoded_in_tiles() -> None:
    assert not is_tiled(Size(1024, 1024))
    assert is_tiled(Size(1040, 1024))
    found = header(SD1, vae())
    tiled = module._decoding(found, vae(), Size(2048, 2048))
    assert tiled == module._decoding(found, vae(), Size(512, 512))


@given(
    st.dictionaries(
        st.sampled_from(
            [
                *(f"{MODEL}input_blocks.0.0.weight", "x.attn2.to_k.weight", f"{MODEL}txt_in.weight"),
                *("vae.decoder.conv_in.weight", "vae.encoder.conv_in.weight", *language_model()),
            ]
        ),
        st.lists(st.integers(0, 5000), max_size=5).map(tuple),
    ),
    st.sampled_from([SD1, SD2, SDXL, SDXS, KLEIN, Z_IMAGE]),
    st.booleans(),
)
def test_odd_shapes_give_some_number(shapes: Shapes, family: Family, flash: bool) -> None:
    work = PictureWork(Size(64, 64), references=(Size(64, 64),), repaints=True)
    assert estimate_diffusion(header(family, shapes), work, flash=flash) > 0
