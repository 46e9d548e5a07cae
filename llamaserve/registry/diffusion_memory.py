"""How much memory a diffusion model takes while it makes a picture.

A picture is made in stages: the prompt is read, pictures to begin with or to look at are encoded, the steps are made,
and the result is decoded. Each stage has a buffer that is freed before the next one, so the largest of them counts. The
formulas follow how the stable-diffusion.cpp of stable-diffusion-cpp-python 0.4.7 lays them out, with direct
convolutions in the VAE; they were fitted to what it logs for models of the right shapes, at four sizes. Measured were
Stable Diffusion 1 and 2, XL, SDXS, FLUX.2 and Z-Image; other transformers are believed to be like FLUX.2.

This module does not know what else is in memory.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from llamaserve.images.prompts import breaks
from llamaserve.images.values import ImageGeneration, Size
from llamaserve.registry.diffusion_family import SDXL, Z_IMAGE
from llamaserve.registry.diffusion_file import DiffusionHeader

_MEBIBYTE: Final = 1024 * 1024
_FLOAT: Final = 4  # bytes
_HALF: Final = 2  # of a number that is prepared for a multiplication
_LATENT: Final = 8  # pixels of a side that become one number
_PATCH: Final = 256  # pixels that a transformer sees as one token
_HEAD: Final = 128  # numbers of an attention head in a transformer
_CHUNK: Final = 77  # tokens that CLIP reads at once
_CHUNK_TEXT: Final = 75  # of which so many are of the prompt
_TEMPLATE: Final = 24  # tokens that are put around a prompt
_SHORT_PROMPT: Final = 512  # bytes; a usual one has fewer
_PADDED: Final = 512  # tokens that FLUX.2 reads at least
_SMALL_DECODER: Final = 64  # channels of it
_UNTILED: Final = 1024 * 1024  # pixels up to which a picture is decoded as a whole
_TILE: Final = 512  # pixels of a side of a tile, at most
_LOOKED_AT: Final = 1024 * 1024  # pixels of a picture that is looked at, at most
_SEEN_STEP: Final = 32  # pixels, of whose multiples its sides are
_SEEN: Final = 400  # tokens that a language model sees such a picture as, at most
_FLASH: Final = 640 * 640  # pixels from which on flash attention pays for Stable Diffusion 1

_MARGIN: Final = 1.05  # by which buffers may be larger than the formulas have it
_PICTURE: Final = 40  # bytes of a pixel outside the buffers
_VOCABULARY: Final = 56 * _MEBIBYTE  # of a language model; measured, like
_REST: Final = 36 * _MEBIBYTE  # that of CLIP, graphs, threads, and code

_Shapes = dict[str, tuple[int, ...]]


class PictureWork(NamedTuple):
    """What of a picture decides how much memory it takes: its canvas, the bytes of the longer prompt and how often it
    is divided, the pictures that are looked at, whether one is begun with, the bytes of LoRAs, and whether it is shown
    on the way.
    """

    canvas: Size
    prompt: int = _SHORT_PROMPT
    breaks: int = 0
    references: tuple[Size, ...] = ()
    repaints: bool = False
    loras: int = 0
    partial: bool = False

    @classmethod
    def of(cls, job: ImageGeneration) -> PictureWork:
        """Return that of a picture that is asked for."""
        prompts = (job.prompt, job.negative_prompt)
        return cls(
            job.canvas,
            max(_SHORT_PROMPT, *(len(prompt.encode()) for prompt in prompts)),
            max(breaks(prompt) for prompt in prompts),
            tuple(Size(each.width, each.height) for each in job.references),
            job.init is not None,
            sum(lora.size for lora in job.loras),
            job.partial_images > 0,
        )

    @property
    def seen(self) -> list[Size]:
        """The sizes in which pictures are looked at, each about as large as the canvas, but not over a megapixel."""
        return [_resized(size, min(self.canvas.pixels, _LOOKED_AT)) for size in self.references]


def is_tiled(size: Size) -> bool:
    """Whether a picture is decoded in tiles, which takes three times as long and the same memory for any size."""
    return size.pixels > _UNTILED


def flash_attention(header: DiffusionHeader, usual: Size) -> bool:
    """Whether the diffusion model computes with flash attention, which takes much less memory for large pictures. For
    the odd heads of Stable Diffusion 1 ggml has no fast kernel: a step for 512x512 pixels takes twice as long.
    """
    return not header.family.odd_heads or usual.pixels >= _FLASH


def estimate_diffusion(header: DiffusionHeader, work: PictureWork, *, flash: bool) -> int:
    """Return the bytes by which loading a model and making a picture let its process grow."""
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    steps = _steps(header, shapes, work, flash=flash)
    if work.partial and _shows_decoded(header):
        steps += _decoding_small(work.canvas.pixels)  # in the middle of them
    stages = [
        _reading(header, shapes, work),
        steps,
        _decoding(header, shapes, work.canvas),
        *(_encoding(header, shapes, size) for size in work.seen),
    ]
    if work.repaints:
        stages.append(_encoding(header, shapes, work.canvas))
    vocabulary = _VOCABULARY if _language_model(shapes) else 0
    weights = header.weight_bytes + work.loras
    return int(weights + _MARGIN * max(stages) + work.canvas.pixels * _PICTURE + vocabulary + _REST)


def _resized(size: Size, pixels: int) -> Size:
    """Return a size of the same shape with so many pixels, or up to a step more on each side."""
    width = math.sqrt(pixels * size.width / size.height)
    return Size(*(_SEEN_STEP * math.ceil(side / _SEEN_STEP) for side in (width, pixels / width)))


def _shows_decoded(header: DiffusionHeader) -> bool:
    return "taesd" in header.parts or header.decodes_small


# ---- the prompt


def _reading(header: DiffusionHeader, shapes: _Shapes, work: PictureWork) -> float:
    """Return the bytes for reading the prompt. CLIP reads it in pieces; a language model as a whole, with a mask and
    scores for each pair of tokens. There are no more tokens than bytes.
    """
    model = _language_model(shapes)
    if model is None:
        return 4 * _MEBIBYTE
    width, inner, queries, keys = model
    tokens = _tokens(header, work)
    attention = (queries // _HEAD + 1) * tokens + 2 * width + 2 * queries + 3 * keys
    feed_forward = tokens + 2 * inner + 2 * width + queries
    outputs = 2 * width  # of layers that FLUX.2 takes beside the last
    prepared = inner * _HALF
    return tokens * (_FLOAT * (max(attention, feed_forward) + outputs) + prepared + 8 * tokens)


def _tokens(header: DiffusionHeader, work: PictureWork) -> int:
    padded = 0 if header.family.name == Z_IMAGE.name else _PADDED
    seen = _SEEN * len(work.references) if "llm_vision" in header.parts else 0
    return max(padded, work.prompt + _TEMPLATE) + seen


def _language_model(shapes: _Shapes) -> tuple[int, int, int, int] | None:
    """Return the width of a prompt's language model, that within its feed-forward network, and those of its queries and
    keys; None where there is none. Files of llama.cpp have other names for tensors.
    """
    for layer, names in _LANGUAGE_MODELS:
        found = [_matrix(shapes, f"text_encoders.llm.{layer}{name}.weight") for name in names]
        if all(found):
            queries, keys, gate = found
            return gate[1], gate[0], queries[0], keys[0]
    return None


_LANGUAGE_MODELS: Final = (
    ("model.layers.0.", ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj")),
    ("blk.0.", ("attn_q", "attn_k", "ffn_gate")),
)


# ---- the steps


def _steps(header: DiffusionHeader, shapes: _Shapes, work: PictureWork, *, flash: bool) -> float:
    if header.family.is_unet:
        return _unet(header, shapes, work, flash=flash)
    return _transformer(header, shapes, work)


def _unet(header: DiffusionHeader, shapes: _Shapes, work: PictureWork, *, flash: bool) -> float:
    """Return the bytes for a step of a U-Net: its convolutions, or attention on one of its levels without flash
    attention.
    """
    channels = _channels(shapes, "input_blocks.0.0.weight", "unet.conv_in.weight") or 320
    blocks = 2 if any("middle_block." in name or "mid_block." in name for name in shapes) else 1
    places = work.canvas.pixels // _LATENT**2
    text = _CHUNK * (work.breaks + 1 + math.ceil(work.prompt / _CHUNK_TEXT))
    convolutions = places * channels * (90 + 4 * blocks)
    prepared = _HALF * 4 * channels * places
    if flash:
        return convolutions + _FLOAT * 8 * channels * text + prepared
    widths = [shape[0] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight") and len(shape) == 2]
    levels = [
        _attention(header, width, width // channels, blocks, channels, places, text) for width in sorted({*widths})
    ]
    keys = 8 * text * sum(widths)
    return max(convolutions, keys + max(levels, default=0.0)) + prepared


def _attention(
    header: DiffusionHeader, width: int, smaller: int, blocks: int, channels: int, places: int, text: int
) -> float:
    """Return the bytes for attention on a level of so many channels, on which sides are so many times smaller."""
    smaller = max(1, smaller)
    heads = 8 if header.family.odd_heads else max(1, width // 64)
    there = places // smaller**2
    kept = (blocks + 1) * _FLOAT * channels * places if smaller > 1 else 0
    return _FLOAT * heads * there * max(there, text) + 8.2 * _FLOAT * width * there + kept


def _transformer(header: DiffusionHeader, shapes: _Shapes, work: PictureWork) -> float:
    """Return the bytes for a step of a transformer with flash attention: all tokens, of text and pictures, at once."""
    seen = sum(size.pixels for size in (work.canvas, *work.seen)) / _PATCH
    tokens = 32 * math.ceil((seen + _tokens(header, work)) / 32) + 32
    width = _width(shapes)
    factor = 11.6 if header.family.name == Z_IMAGE.name else 20.9
    return _FLOAT * width * tokens * factor + _HALF * 4 * width * tokens


def _width(shapes: _Shapes) -> int:
    """Return the width of a transformer: that of what its text becomes, or the largest there may be."""
    for name in ("txt_in.weight", "cap_embedder.1.weight", "context_embedder.weight", "img_in.weight"):
        if shape := _matrix(shapes, f"model.diffusion_model.{name}"):
            return shape[0]
    return 4096


# ---- pictures and latent ones


def _decoding(header: DiffusionHeader, shapes: _Shapes, size: Size) -> float:
    if not header.family.decodes:
        return 0.0
    pixels = min(size.pixels, _TILE**2) if is_tiled(size) else size.pixels
    if header.decodes_small:
        return _decoding_small(pixels)
    channels = (_channels(shapes, "decoder.conv_in.weight") or 512) // 4
    scaled = header.family.name == SDXL.name and "vae" not in header.parts  # as the library does it for F16's sake
    return max(pixels * (30 if scaled else 22) * channels, _over_all(pixels, channels)) + 16 * _MEBIBYTE


def _decoding_small(pixels: int) -> float:
    return pixels * (14 * _SMALL_DECODER + 2)


def _encoding(header: DiffusionHeader, shapes: _Shapes, size: Size) -> float:
    pixels = min(size.pixels, 2 * _TILE**2) if is_tiled(size) else size.pixels
    if header.decodes_small:
        return pixels * (12 * _SMALL_DECODER + 13)
    channels = _channels(shapes, "encoder.conv_in.weight") or 128
    return max(pixels * (12 * channels + 13), _over_all(pixels, channels)) + 16 * _MEBIBYTE


def _over_all(pixels: int, channels: int) -> float:
    """Return the bytes for a VAE's attention, in which every place of a latent picture looks at every other."""
    places = pixels / _LATENT**2
    return _FLOAT * places**2 + 96 * channels * places


def _channels(shapes: _Shapes, *endings: str) -> int:
    """Return how many channels the first convolution makes whose name ends so; 0 if there is none."""
    return next((shape[0] for name, shape in shapes.items() if name.endswith(endings) and len(shape) == 4), 0)


def _matrix(shapes: _Shapes, name: str) -> tuple[int, ...]:
    """Return the rows and columns of a matrix; nothing if there is none of this name."""
    shape = shapes.get(name, ())
    return shape if len(shape) == 2 and all(shape) else ()
