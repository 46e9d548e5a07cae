"""Families of diffusion models: by which tensors each is told, and what its pictures are like."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from diffusion_tensors import CLIP, EDITORS, MODEL, STEERED, TRANSFORMERS, UNETS, VIDEOS, Known, named, prefixed, unet
from hypothesis import given, strategies as st

from llamaserve.images.values import PARTS, SCHEDULERS, Edits, Size
from llamaserve.registry import diffusion_family
from llamaserve.registry.diffusion_family import (
    CONTROLLED,
    QWEN,
    SD1,
    SD2,
    SDXL,
    SDXS,
    Family,
    family_of,
    makes_videos,
)
from llamaserve.registry.spec import LARGEST_SIDE, ImageDefaults

FAMILIES = [value for value in vars(diffusion_family).values() if isinstance(value, Family)]


# ---- which one it is


@pytest.mark.parametrize("known", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_a_transformer_is_told_by_its_tensors_in_any_order(known: Known) -> None:
    shapes = prefixed(known.shapes) | {f"{MODEL}final_layer.linear.weight": (4, 2), "vae.decoder.x": (1,)}
    assert family_of(shapes) == known.family
    assert family_of(dict(reversed(shapes.items()))) == known.family
    assert not makes_videos(shapes)


@pytest.mark.parametrize("known", UNETS.values(), ids=UNETS)
def test_a_u_net_is_told_by_its_blocks_and_its_encoder(known: Known) -> None:
    assert family_of(known.shapes) == known.family
    assert known.family.is_unet
    assert not makes_videos(known.shapes)


@pytest.mark.parametrize("known", EDITORS.values(), ids=EDITORS)
def test_a_u_net_that_sees_eight_channels_looks_at_pictures(known: Known) -> None:
    assert family_of(known.shapes) == replace(known.family, looks=True, edits="reference")


@pytest.mark.parametrize("shapes", STEERED.values(), ids=STEERED)
def test_a_transformer_that_is_steered_is_told_by_its_inputs(shapes: dict[str, tuple[int, ...]]) -> None:
    assert family_of(prefixed(shapes)) == CONTROLLED
    for name in ("Radiance", "Ovis", "FLUX.2", "klein"):  # which may have as many, and are looked for first
        known = TRANSFORMERS[name]
        assert family_of(prefixed(shapes | known.shapes)) == known.family
    for shape in ((), (128,), (4, 64), (128, 4)):
        family = family_of(prefixed(shapes | {"img_in.weight": shape}))
        assert family is not None
        assert family.steered == (shape == (128,))


@pytest.mark.parametrize(
    ("table", "width", "family"),
    [
        ("cond_stage_model.transformer.text_model.embeddings.token_embedding.weight", 768, SD1),
        ("cond_stage_model.model.token_embedding.weight", 1024, SD2),
        ("conditioner.embedders.0.model.token_embedding.weight", 1024, SD2),
        ("conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight", 768, SD1),
        ("te.text_model.embeddings.token_embedding.weight", 768, SD1),
        ("text_model.embeddings.token_embedding.weight", 1024, SD2),
    ],
)
def test_the_table_of_tokens_may_have_several_names(table: str, width: int, family: Family) -> None:
    shapes = {name: shape for name, shape in unet(768).items() if name != CLIP}
    assert family_of({**shapes, table: (4, width)}) == family
    assert family_of({**shapes, table: (4, width + 1)}) is None
    assert family_of({**shapes, table: ()}) is None
    assert family_of(shapes) is None


@pytest.mark.parametrize("second", ["conditioner.embedders.1.x", "cond_stage_model.1.x", "te.1.x"])
def test_a_u_net_with_two_encoders_is_one_of_sdxl(second: str) -> None:
    blocks = {f"{MODEL}input_blocks.0.0.weight": (4, 4, 3, 3)}
    assert family_of({**blocks, second: (1,)}) == SDXL
    assert family_of({second: (1,)}) is None


def test_the_names_of_diffusers_tell_too() -> None:
    shapes = {
        "unet.down_blocks.0.x": (1,),
        "unet.conv_in.weight": (4, 4, 3, 3),
        CLIP.replace("cond_stage_model.transformer", "te"): (4, 768),
    }
    assert family_of(shapes) == SDXS
    for more in ("unet.mid_block.resnets.1.x", "unet.up_blocks.2.attentions.1.x"):
        assert family_of(shapes | {more: (1,)}) == SD1
    edited = shapes | {"unet.conv_in.weight": (4, 8, 3, 3), "unet.up_blocks.2.attentions.1.x": (1,)}
    assert family_of(edited) == replace(SD1, looks=True, edits="reference")


def test_what_is_no_diffusion_model_has_no_family() -> None:
    others = (
        {},
        named("decoder.conv_in.weight", "encoder.conv_in.weight"),
        {"text_model.embeddings.token_embedding.weight": (49408, 1280)},
        {"model.embed_tokens.weight": (151_936, 768)},
        named("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"),
        named("double_blocks.0.img_attn.qkv.weight"),
        named(f"{MODEL}single_blocks.47.linear1.weight"),
    )
    assert [family_of(shapes) for shapes in others] == [None] * len(others)


@pytest.mark.parametrize("shapes", VIDEOS.values(), ids=VIDEOS)
def test_models_of_moving_pictures_are_told(shapes: dict[str, tuple[int, ...]]) -> None:
    assert makes_videos(prefixed(shapes))
    assert not makes_videos(shapes)


# ---- what its pictures are like


@given(st.sampled_from(FAMILIES), st.integers(1, LARGEST_SIDE), st.integers(1, LARGEST_SIDE))
def test_a_canvas_is_the_smallest_that_holds_a_picture(family: Family, width: int, height: int) -> None:
    for side, wanted in zip(family.canvas(Size(width, height)), (width, height), strict=True):
        assert side % family.multiple == 0
        assert side - family.multiple < max(wanted, 64) <= side


def test_what_a_family_says_could_stand_in_models_yaml() -> None:
    for family in FAMILIES:
        fields = ("steps", "cfg_scale", "guidance", "sampler", "edits")
        own = {name: getattr(family, name) for name in fields}
        said = ImageDefaults.model_validate(own | {"size": str(family.size)})
        assert {name: getattr(said, name) for name in fields} == own
        assert said.size == family.size == family.canvas(family.size)
        assert family.unaligned <= set(SCHEDULERS)
        assert {part for group in family.encoders for part in group} <= set(PARTS) - {"vae", "taesd", "llm_vision"}


def test_families_have_names_of_their_own_and_edit_by_looking_only_if_they_can() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES) == 18
    assert {family.edits for family in FAMILIES} == set(get_args(Edits))
    assert all(family.looks for family in FAMILIES if family.edits == "reference")
    assert [family.name for family in FAMILIES if family.is_unet] == [
        *("Stable Diffusion 1", "Stable Diffusion 2", "SDXS", "SDXS 0.9", "Stable Diffusion XL")
    ]
    assert [family.name for family in FAMILIES if family.steered] == ["FLUX.1 Control"]
    assert [family.name for family in FAMILIES if not family.decodes] == ["Chroma Radiance"]
    assert {(family.is_unet, family.sampler) for family in FAMILIES} == {(True, "euler_a"), (False, "euler")}


# ---- in which size pictures are looked at


def is_too_small(picture: Size) -> bool:
    """Whether stable-diffusion.cpp cuts more out of a scaled picture than there is, which ends its process. Written as
    in its code: in ``get_learned_condition`` of the language models' conditioner, and in ``clip_preprocess``.
    """
    factor, least, most = 28.0, 384 * 384, 560 * 560
    goal = [int(math.floor(side / factor + 0.5) * factor) for side in picture]
    if goal[0] * goal[1] > most:
        beta = math.sqrt(picture.pixels / most)
        goal = [max(28, math.floor(side / beta / factor) * 28) for side in picture]
    elif goal[0] * goal[1] < least:
        beta = math.sqrt(least / picture.pixels)
        goal = [math.ceil(side * beta / factor) * 28 for side in picture]
    sides = [np.float32(side) for side in picture]
    scale = max(np.float32(wanted) / side for wanted, side in zip(goal, sides, strict=True))
    return any(int(scale * side) < wanted for wanted, side in zip(goal, sides, strict=True))


def is_nothing(picture: Size, canvas: Size) -> bool:
    """Whether it scales a picture to less than a pixel, as ``prepare_image_generation_latents`` does it."""
    width = math.sqrt(min(1024 * 1024, canvas.pixels) * picture.width // picture.height)
    height = width * picture.height / picture.width
    return min(math.floor(side / 32 + 0.5) for side in (width, height)) < 1


SIDES = st.integers(16, 1024).flatmap(
    lambda short: st.tuples(st.just(short), st.integers(short, min(16 * short, 16_383, 1024 * 1024 // short)))
)


@given(SIDES, st.booleans())
def test_a_picture_is_looked_at_in_a_size_that_ends_nothing(sides: tuple[int, int], upright: bool) -> None:
    picture = Size(*sides) if upright else Size(*reversed(sides))
    seen = QWEN.seen(picture)
    assert not is_too_small(seen)
    assert not is_nothing(seen, QWEN.canvas(Size(1, 1)))
    assert QWEN.seen(seen) == seen
    less = [side - left for side, left in zip(picture, seen, strict=True)]
    assert min(less) >= 0
    assert sum(less) <= (8 if max(sides) < 15 * min(sides) else 32)
    assert (seen == picture) == (not is_too_small(picture) and not is_nothing(picture, Size(64, 64)))
    assert all(family.seen(picture) == picture for family in FAMILIES if family != QWEN)


@pytest.mark.parametrize(
    ("picture", "seen"),
    [
        ((577, 391), (576, 391)),
        ((718, 406), (718, 405)),
        ((795, 240), (795, 239)),
        ((896, 757), (896, 756)),
        ((253, 577), (253, 576)),
        ((2661, 293), (2654, 293)),
        ((262, 16), (256, 16)),
        ((512, 512), (512, 512)),
        ((1, 1), (1, 1)),
        ((1, 99), (1, 99)),
    ],
)
def test_pictures_of_some_sizes_are_cut_by_a_few_pixels(picture: tuple[int, int], seen: tuple[int, int]) -> None:
    assert QWEN.seen(Size(*picture)) == seen
