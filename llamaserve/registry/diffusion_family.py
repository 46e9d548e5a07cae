"""The families of diffusion models that stable-diffusion.cpp knows: how one is recognised by its tensors, what files it
needs, which sizes it can do, and how its pictures are made if nobody says otherwise.

Families are told apart as in ``ModelLoader::get_sd_version`` of the library in stable-diffusion-cpp-python 0.4.7, by
the tensors' names there. The settings are those that the models' makers recommend. Knows no files.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

from llamaserve.images.values import Edits, Part, Sampler, Scheduler, Size

_UNET: Final = 64  # pixels: 8 of a latent one, which is made smaller three times
_LATENT: Final = 8
_SMALLEST: Final = 64  # pixels of a side; of less, little can be made


@dataclass(frozen=True)
class Family:
    """What models of a family have in common. Sizes are multiples of ``multiple`` pixels, and ``side`` is the one of a
    square that it was trained for. ``steps``, ``cfg_scale`` and ``guidance`` are what its makers recommend.

    ``encoders`` are the parts that read the prompt, one of each group of which must be there. A picture is edited by
    making parts of it anew (``repaint``), or by looking at it as a ``reference``.
    """

    name: str
    encoders: tuple[tuple[Part, ...], ...]
    side: int
    multiple: int = _LATENT
    steps: int = 20
    cfg_scale: float = 1.0
    guidance: float = 3.5
    guided: bool = False  # whether it has learnt ``guidance``
    edits: Edits = "repaint"
    looks: bool = False  # whether it can look at other pictures
    reads_pictures: bool = False  # whether what reads the prompt looks at them, too
    decodes: bool = True  # whether it needs a VAE
    steered: bool = False  # whether it needs pictures that steer it, such as edges or depths
    small_decoder: bool = False  # whether its decoder is one of those that lose details
    odd_heads: bool = False  # whether its attention has eight heads, whose sizes suit no fast kernel
    unaligned: frozenset[Scheduler] = frozenset({"ays"})  # schedulers that do not know the family

    @property
    def is_unet(self) -> bool:
        """Whether its diffusion model is a U-Net; the others are transformers."""
        return self.multiple == _UNET

    def canvas(self, size: Size) -> Size:
        """Return the smallest size that its models can make and that holds this one."""
        return Size(*(-(-max(side, _SMALLEST) // self.multiple) * self.multiple for side in size))

    def seen(self, size: Size) -> Size:
        """Return in which size a picture is handed over to be looked at: this one, or one that is some pixels smaller,
        as stable-diffusion.cpp ends its process for some sizes. Nothing helps a picture that is much more than 16 times
        as long as it is wide.
        """
        if not self.reads_pictures:
            return size
        return next((each for each in _smaller(size) if _is_filled(each) and _has_a_step(each)), size)

    @property
    def sampler(self) -> Sampler:
        """The sampler that is used if nobody names one."""
        return "euler_a" if self.is_unet else "euler"

    @property
    def size(self) -> Size:
        """The size that it was trained for."""
        return Size(self.side, self.side)


# How pictures are looked at: what reads the prompt gets them in a size of its own, cut out of a scaled picture that may
# be a pixel too small for it, by the rounding of 32-bit numbers; the diffusion model gets them as large as the canvas.
_EYE: Final = 28  # pixels, of whose multiples the sides are that a prompt's reader sees
_LEAST_SEEN, _MOST_SEEN = 384 * 384, 560 * 560  # pixels that it sees
_STEP: Final = 32  # pixels, of whose multiples the sides are that the diffusion model sees
_SHIFT: Final = 64  # pixels by which both sides together may become smaller; 8 are enough but for the slimmest
_SINGLE: Final = struct.Struct("f")


def _smaller(size: Size) -> Iterator[Size]:
    """Yield this size, and then smaller and smaller ones, of a shape as like as can be."""
    wide = size.width > size.height
    for less in range(_SHIFT + 1):
        for shorter in range(less + 1):
            cut = (less - shorter, shorter) if wide else (shorter, less - shorter)
            if cut[0] < size.width and cut[1] < size.height:
                yield Size(size.width - cut[0], size.height - cut[1])


def _is_filled(size: Size) -> bool:
    """Whether a picture of this size, scaled as in ``clip_preprocess``, fills what is cut out of it."""
    wanted = _read(size)
    scale = max(_single(goal / side) for goal, side in zip(wanted, size, strict=True))
    return all(int(_single(scale * side)) >= goal for goal, side in zip(wanted, size, strict=True))


def _read(size: Size) -> Size:
    """Return in which size the reader of a prompt sees a picture."""
    read = Size(*(math.floor(side / _EYE + 0.5) * _EYE for side in size))
    if read.pixels > _MOST_SEEN:
        smaller = math.sqrt(size.pixels / _MOST_SEEN)
        return Size(*(max(1, math.floor(side / smaller / _EYE)) * _EYE for side in size))
    if read.pixels < _LEAST_SEEN:
        larger = math.sqrt(_LEAST_SEEN / size.pixels)
        return Size(*(math.ceil(side * larger / _EYE) * _EYE for side in size))
    return read


def _has_a_step(size: Size) -> bool:
    """Whether something is left of a picture of this size once it is scaled to the smallest canvas."""
    width = math.sqrt(_SMALLEST**2 * size.width // size.height)
    return min(width, width * size.height / size.width) >= _STEP / 2


def _single(number: float) -> float:
    """Return a number as 32 bits have it."""
    value: float = _SINGLE.unpack(_SINGLE.pack(number))[0]
    return value


_Encoders = tuple[tuple[Part, ...], ...]

_CLIP: Final[_Encoders] = (("clip_l",),)
_CLIPS: Final[_Encoders] = (("clip_l",), ("clip_g",))
_LLM: Final[_Encoders] = (("llm",),)

SD1: Final = Family("Stable Diffusion 1", _CLIP, 512, _UNET, cfg_scale=7.0, odd_heads=True, unaligned=frozenset())
SD2: Final = Family("Stable Diffusion 2", _CLIP, 512, _UNET, cfg_scale=7.0)
SDXS: Final = replace(SD1, name="SDXS", steps=1, cfg_scale=1.0, small_decoder=True)
SDXS2: Final = replace(SD2, name="SDXS 0.9", steps=1, cfg_scale=1.0, small_decoder=True)
SDXL: Final = Family("Stable Diffusion XL", _CLIPS, 1024, _UNET, cfg_scale=7.0, unaligned=frozenset())
SD3: Final = Family("Stable Diffusion 3", _CLIPS, 1024, steps=28, cfg_scale=4.5)
FLUX: Final = Family("FLUX.1", (("clip_l",), ("t5xxl",)), 1024, guided=True, looks=True)
SCHNELL: Final = replace(FLUX, name="FLUX.1 schnell", steps=4, guided=False)
CONTROLLED: Final = replace(FLUX, name="FLUX.1 Control", steered=True)
CHROMA: Final = Family("Chroma", (("t5xxl",),), 1024, steps=26, cfg_scale=4.0)
RADIANCE: Final = replace(CHROMA, name="Chroma Radiance", multiple=16, decodes=False)
OVIS: Final = Family("Ovis Image", _LLM, 1024, cfg_scale=5.0)
FLUX2: Final = Family("FLUX.2", _LLM, 1024, 16, steps=28, guidance=4.0, guided=True, looks=True, edits="reference")
KLEIN: Final = replace(FLUX2, name="FLUX.2 klein", steps=4, guided=False)
QWEN: Final = Family("Qwen Image", _LLM, 1024, cfg_scale=2.5, looks=True, reads_pictures=True, edits="reference")
Z_IMAGE: Final = Family("Z-Image", _LLM, 1024, steps=8)
ERNIE: Final = Family("ERNIE Image", _LLM, 1024, 16, steps=28, cfg_scale=4.0)
ANIMA: Final = Family("Anima", _LLM, 1024, steps=30, cfg_scale=4.0)

_MODEL: Final = "model.diffusion_model."
_VIDEO: Final = (  # what only models of moving pictures have
    f"{_MODEL}input_blocks.8.0.time_mixer.mix_factor",
    f"{_MODEL}blocks.0.cross_attn.norm_k.weight",
)
_BY_TENSOR: Final = (  # a part of a tensor's name that tells the family
    (f"{_MODEL}nerf_final_layer_conv.", RADIANCE),
    (f"{_MODEL}joint_blocks.", SD3),
    (f"{_MODEL}transformer_blocks.0.img_mod.1.weight", QWEN),
    ("llm_adapter.blocks.0.cross_attn.q_proj.weight", ANIMA),
    (f"{_MODEL}double_blocks.0.img_mlp.gate_proj.weight", OVIS),
    (f"{_MODEL}cap_embedder.0.weight", Z_IMAGE),
    (f"{_MODEL}layers.0.adaLN_sa_ln.weight", ERNIE),
)
_TOKENS: Final = (  # the table of tokens of the only, or first, encoder of a prompt
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    "cond_stage_model.model.token_embedding.weight",
    "text_model.embeddings.token_embedding.weight",
    "te.text_model.embeddings.token_embedding.weight",
    "conditioner.embedders.0.model.token_embedding.weight",
    "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
)
_SD1_WIDTH, _SD2_WIDTH = 768, 1024
_INPUTS: Final = (f"{_MODEL}input_blocks.0.0.weight", "unet.conv_in.weight")
_EDITING, _REPAINTING = 8, 9  # channels of what a U-Net sees that was trained to edit pictures, or parts of them
_CONTROLLED: Final = ((128,), (196,))  # numbers of what a FLUX.1 sees that is steered by other pictures

Shapes = Mapping[str, tuple[int, ...]]


def makes_videos(names: Container[str]) -> bool:
    """Whether these are the tensors of a model of moving pictures."""
    return any(name in names for name in _VIDEO)


def family_of(shapes: Shapes) -> Family | None:
    """Return the family of a model with these tensors, of which the last dimension is the fastest; None if there is
    none.
    """
    for part, family in _BY_TENSOR:
        if _has(shapes, part):
            return family
    if _has(shapes, f"{_MODEL}double_stream_modulation_img.lin.weight"):
        return FLUX2 if _has(shapes, "single_blocks.47.linear1.weight") else KLEIN
    return _flux(shapes) if _has(shapes, f"{_MODEL}double_blocks.") else _unet(shapes)


def _has(shapes: Shapes, part: str) -> bool:
    return any(part in name for name in shapes)


def _flux(shapes: Shapes) -> Family:
    if shapes.get(f"{_MODEL}img_in.weight", ())[-1:] in _CONTROLLED:
        return CONTROLLED
    if _has(shapes, "distilled_guidance_layer.in_proj.weight"):
        return CHROMA
    return FLUX if _has(shapes, "guidance_in.in_layer.weight") else SCHNELL


def _unet(shapes: Shapes) -> Family | None:
    unet = _has(shapes, f"{_MODEL}input_blocks.") or _has(shapes, "unet.down_blocks.")
    channels = next((shapes[name][1] for name in _INPUTS if len(shapes.get(name, ())) > 1), 0)
    if unet and any(_has(shapes, part) for part in ("conditioner.embedders.1", "cond_stage_model.1", "te.1")):
        return _looking(SDXL) if channels == _EDITING else SDXL
    width = next((shapes[name][-1] for name in _TOKENS if shapes.get(name)), 0)
    middle = _has(shapes, f"{_MODEL}middle_block.1.") or _has(shapes, "unet.mid_block.resnets.1.")
    last = _has(shapes, f"{_MODEL}output_blocks.7.1") or _has(shapes, "unet.up_blocks.2.attentions.1")
    if width == _SD1_WIDTH:
        if channels == _EDITING:
            return _looking(SD1)
        return SD1 if channels == _REPAINTING or middle or last else SDXS
    if width == _SD2_WIDTH:
        keys = shapes.get(f"{_MODEL}output_blocks.7.1.transformer_blocks.0.attn1.to_k.weight", ())
        small = channels != _REPAINTING and not middle and keys[-1:] == (_SD2_WIDTH,)
        return SDXS2 if small else SD2
    return None


def _looking(family: Family) -> Family:
    return replace(family, looks=True, edits="reference")
