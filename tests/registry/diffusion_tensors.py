"""The tensors by which diffusion models are told apart, few and small; and files with tensors of zeros.

It writes what it is told and checks nothing, and knows nothing of what reads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from tiny_bert import write_safetensors

from llamaserve.images.values import Part
from llamaserve.registry import diffusion_family as families
from llamaserve.registry.diffusion_family import Family

Shapes = Mapping[str, tuple[int, ...]]

MODEL: Final = "model.diffusion_model."
CLIP: Final = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
BYTES: Final = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1}

DECODER: Final[Shapes] = {"decoder.conv_in.weight": (4, 2)}
ENCODER: Final[Shapes] = {"encoder.conv_in.weight": (2, 4)}
PARTS: Final[Mapping[Part, Shapes]] = {  # without the prefixes that stable-diffusion.cpp gives them
    "vae": DECODER | ENCODER,
    "clip_l": {"text_model.embeddings.token_embedding.weight": (4, 768)},
    "clip_g": {"text_model.embeddings.token_embedding.weight": (4, 1280)},
    "t5xxl": {"shared.weight": (4, 8)},
    "llm": {"model.norm.weight": (4,)},
}
HEAD: Final = 128  # numbers of an attention head
HEADS: Final[Shapes] = {"double_blocks.0.txt_attn.norm.key_norm.scale": (HEAD,)}  # of all that are like FLUX


class Known(NamedTuple):
    """Tensors of a diffusion model without their prefix, its family, and what stable-diffusion.cpp calls it."""

    shapes: Shapes
    family: Family
    version: str


def named(*names: str) -> Shapes:
    """Return tensors that tell by their names alone."""
    return dict.fromkeys(names, (4, 2))


def blocks(kind: str, count: int, name: str) -> Shapes:
    """Return a tensor of each of so many blocks."""
    return named(*(f"{kind}_blocks.{number}.{name}" for number in range(count)))


DOUBLE: Final = HEADS | named("double_blocks.0.img_attn.qkv.weight")
TRANSFORMERS: Final[Mapping[str, Known]] = {
    "SD3": Known(named("joint_blocks.0.x_block.attn.qkv.weight"), families.SD3, "SD3.x"),
    "FLUX.1": Known(DOUBLE | named("guidance_in.in_layer.weight"), families.FLUX, "Flux"),
    "schnell": Known(DOUBLE, families.SCHNELL, "Flux"),
    "Fill": Known(
        DOUBLE | named("guidance_in.in_layer.weight") | {"img_in.weight": (4, 384)},
        families.FLUX,
        "Flux Fill",
    ),
    "Chroma": Known(
        DOUBLE | named("distilled_guidance_layer.in_proj.weight"),
        families.CHROMA,
        "Flux",
    ),
    "Radiance": Known(
        DOUBLE | named("distilled_guidance_layer.in_proj.weight", "nerf_final_layer_conv.conv.weight"),
        families.RADIANCE,
        "Chroma Radiance",
    ),
    "Ovis": Known(
        DOUBLE | named("double_blocks.0.img_mlp.gate_proj.weight"),
        families.OVIS,
        "Ovis Image",
    ),
    "FLUX.2": Known(
        DOUBLE | named("double_stream_modulation_img.lin.weight") | blocks("single", 48, "linear1.weight"),
        families.FLUX2,
        "Flux.2",
    ),
    "klein": Known(
        DOUBLE | named("double_stream_modulation_img.lin.weight") | blocks("single", 24, "linear1.weight"),
        families.KLEIN,
        "Flux.2 klein",
    ),
    "Qwen": Known(named("transformer_blocks.0.img_mod.1.weight"), families.QWEN, "Qwen Image"),
    "Z-Image": Known(named("cap_embedder.0.weight"), families.Z_IMAGE, "Z-Image"),
    "ERNIE": Known(named("layers.0.adaLN_sa_ln.weight"), families.ERNIE, "Ernie Image"),
    "Anima": Known(named("llm_adapter.blocks.0.cross_attn.q_proj.weight"), families.ANIMA, "Anima"),
}

STEERED: Final[Mapping[str, Shapes]] = {  # by what stable-diffusion.cpp calls them
    "Flux Control": TRANSFORMERS["FLUX.1"].shapes | {"img_in.weight": (4, 128)},
    "Flex.2": TRANSFORMERS["schnell"].shapes | {"img_in.weight": (4, 196)},
}
VIDEOS: Final[Mapping[str, Shapes]] = {  # by what stable-diffusion.cpp calls them
    "Wan 2.x": named("blocks.0.cross_attn.norm_k.weight"),
    "SVD": named("input_blocks.8.0.time_mixer.mix_factor"),
}


def unet(width: int, *, channels: int = 4, middle: bool = True, last: bool = True, keys: int = 8) -> Shapes:
    """Return the telling tensors of a U-Net and of the encoder of prompts with this width, all under their prefixes.
    ``keys`` is the width of what its last layers look at.
    """
    shapes = {f"{MODEL}input_blocks.0.0.weight": (4, channels, 3, 3), CLIP: (4, width)}
    if middle:
        shapes[f"{MODEL}middle_block.1.norm.weight"] = (4,)
    if last:
        shapes[f"{MODEL}output_blocks.7.1.transformer_blocks.0.attn1.to_k.weight"] = (4, keys)
    return shapes


SECOND: Final[Shapes] = {"conditioner.embedders.1.model.token_embedding.weight": (4, 1280)}  # encoder, of SDXL
UNETS: Final[Mapping[str, Known]] = {
    "SD1": Known(unet(768), families.SD1, "SD 1.x"),
    "SD1 inpaint": Known(unet(768, channels=9), families.SD1, "SD 1.x Inpaint"),
    "SD1 inpaint without a middle": Known(
        unet(768, channels=9, middle=False, last=False), families.SD1, "SD 1.x Inpaint"
    ),
    "SD1 tiny": Known(unet(768, middle=False), families.SD1, "SD 1.x Tiny UNet"),
    "SDXS": Known(unet(768, middle=False, last=False), families.SDXS, "SDXS (512-DS)"),
    "SD2": Known(unet(1024), families.SD2, "SD 2.x"),
    "SD2 of other keys": Known(unet(1024, keys=1024), families.SD2, "SD 2.x"),
    "SD2 inpaint": Known(unet(1024, channels=9), families.SD2, "SD 2.x Inpaint"),
    "SD2 inpaint without a middle": Known(
        unet(1024, channels=9, middle=False, keys=1024), families.SD2, "SD 2.x Inpaint"
    ),
    "SD2 of eight channels": Known(unet(1024, channels=8), families.SD2, "SD 2.x"),
    "SD2 tiny": Known(unet(1024, middle=False), families.SD2, "SD 2.x Tiny UNet"),
    "SDXS 0.9": Known(unet(1024, middle=False, keys=1024), families.SDXS2, "SDXS (09)"),
    "SDXL": Known(unet(768) | SECOND, families.SDXL, "SDXL"),
    "SDXL inpaint": Known(unet(768, channels=9) | SECOND, families.SDXL, "SDXL Inpaint"),
    "SDXL Vega": Known(unet(768, middle=False) | SECOND, families.SDXL, "SDXL (Vega)"),
}
EDITORS: Final[Mapping[str, Known]] = {  # that are trained to edit the pictures that they look at
    "InstructPix2Pix": Known(unet(768, channels=8), families.SD1, "Instruct-Pix2Pix"),
    "InstructPix2Pix without a middle": Known(
        unet(768, channels=8, middle=False, last=False), families.SD1, "Instruct-Pix2Pix"
    ),
    "SDXL InstructPix2Pix": Known(unet(768, channels=8) | SECOND, families.SDXL, "SDXL Instruct-Pix2Pix"),
}


def prefixed(shapes: Shapes, prefix: str = MODEL) -> Shapes:
    """Return tensors under names with a prefix."""
    return {prefix + name: shape for name, shape in shapes.items()}


CHECKPOINT: Final[Shapes] = {  # a FLUX.2 klein with all its parts
    **prefixed(TRANSFORMERS["klein"].shapes),
    **prefixed(PARTS["llm"], "text_encoders.llm."),
    **prefixed(DECODER, "first_stage_model."),
}


def write_zeros(path: Path, shapes: Shapes, dtype: str = "F16") -> Path:
    """Write a safetensors file, and return where it is."""
    zeros = {name: (dtype, shape, bytes(math.prod(shape) * BYTES[dtype])) for name, shape in shapes.items()}
    path.write_bytes(write_safetensors(zeros))
    return path


def write_parts(folder: Path, family: Family, *, left_out: str = "") -> dict[Part, Path]:
    """Write the files of all parts that a family needs, but for one that is left out."""
    parts = {part for group in family.encoders for part in group} | ({"vae"} if family.decodes else set())
    return {part: write_zeros(folder / f"{part}.safetensors", PARTS[part]) for part in sorted(parts - {left_out})}
