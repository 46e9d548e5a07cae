"""Writes safetensors files, and a diffusion model of random weights that is small enough for tests.

It is built like FLUX.2 klein, since stable-diffusion.cpp takes all sizes of that family from the tensors: those of the
diffusion model, and of the Qwen3 that reads the prompt. Fixed are the 128 numbers of an attention head and of a place
in the latent image, the heads of Qwen3 (32, and 8 for keys and values), its vocabulary, and the 64 channels of the
small decoder. What it draws is noise that depends on every input.

It writes what it is told and checks nothing, and knows nothing of what reads it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

HEAD = 128  # numbers of an attention head, and of a place in the latent image
CHANNELS = 64  # of the small decoder and encoder
VOCABULARY = 151_936  # tokens
MLP = 3  # times the width

Shapes = dict[str, tuple[int, ...]]


def diffusion_shapes(width: int = HEAD, text_width: int = 32, prefix: str = "model.diffusion_model.") -> Shapes:
    """Return the tensors of the diffusion model: one double block and one single block."""
    shapes = {
        "img_in": (width, HEAD),
        "txt_in": (width, text_width),
        "time_in.in_layer": (width, 256),
        "time_in.out_layer": (width, width),
        "double_stream_modulation_img.lin": (6 * width, width),
        "double_stream_modulation_txt.lin": (6 * width, width),
        "single_stream_modulation.lin": (3 * width, width),
        "single_blocks.0.linear1": ((3 + 2 * MLP) * width, width),
        "single_blocks.0.linear2": (width, (1 + MLP) * width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "final_layer.linear": (HEAD, width),
    }
    norms = ["single_blocks.0.norm"]
    for stream in ("img", "txt"):
        block = f"double_blocks.0.{stream}_"
        shapes[f"{block}attn.qkv"] = (3 * width, width)
        shapes[f"{block}attn.proj"] = (width, width)
        shapes[f"{block}mlp.0"] = (2 * MLP * width, width)
        shapes[f"{block}mlp.2"] = (width, MLP * width)
        norms.append(f"{block}attn.norm")
    found: Shapes = {f"{prefix}{name}.weight": shape for name, shape in shapes.items()}
    return found | {f"{prefix}{norm}.{which}_norm.scale": (HEAD,) for norm in norms for which in ("query", "key")}


def text_shapes(width: int = 32, inner: int = 32, prefix: str = "text_encoders.llm.model.") -> Shapes:
    """Return the tensors of a Qwen3 of one layer."""
    queries, keys = 32 * HEAD, 8 * HEAD
    layer = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "self_attn.q_norm": (HEAD,),
        "self_attn.k_norm": (HEAD,),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    shapes = {"embed_tokens": (VOCABULARY, width), "norm": (width,)}
    shapes |= {f"layers.0.{name}": shape for name, shape in layer.items()}
    return {f"{prefix}{name}.weight": shape for name, shape in shapes.items()}


def decoder_shapes(*, encoder: bool = True) -> Shapes:
    """Return the tensors of the small decoder of FLUX.2's latent images, and of the encoder that makes them."""
    shapes: Shapes = {}

    def convolution(name: str, out: int, into: int, *, size: int = 3, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (out, into, size, size)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    def block(name: str, *, pools: bool = False) -> None:
        for step in (0, 2, 4):
            convolution(f"{name}.conv.{step}", CHANNELS, CHANNELS)
        if pools:
            convolution(f"{name}.pool.0", 4 * CHANNELS, CHANNELS, size=1, bias=False)
            shapes[f"{name}.pool.1.weight"] = shapes[f"{name}.pool.1.bias"] = (4 * CHANNELS,)
            convolution(f"{name}.pool.3", CHANNELS, 4 * CHANNELS, size=1, bias=False)

    sides: Mapping[str, tuple[tuple[int, int], tuple[int, int], range, range, tuple[int, ...]]] = {
        # name: first and last convolution (out, into), blocks that pool, all layers, layers that resample
        "decoder": ((CHANNELS, 32), (3, CHANNELS), range(2, 5), range(2, 18), (6, 11, 16)),
        "encoder": ((CHANNELS, 3), (32, CHANNELS), range(11, 14), range(1, 14), (2, 6, 10)),
    }
    activations = (5, 10, 15)  # layers of the decoder without weights: what follows them doubles the size
    for side, (first, last, pooling, layers, resampling) in sides.items():
        if side == "encoder" and not encoder:
            continue
        convolution(f"{side}.layers.0", *first)
        for number in layers:
            name = f"{side}.layers.{number}"
            if number in resampling:
                convolution(name, CHANNELS, CHANNELS, bias=False)
            elif side == "encoder" or number not in activations:
                block(name, pools=number in pooling)
        convolution(f"{side}.layers.{layers.stop}", *last)
    return shapes


def write_model(folder: Path, *, width: int = HEAD, encoder: bool = True, seed: int = 1) -> tuple[Path, Path]:
    """Write a whole model: a file with the diffusion model and the text encoder, and one with the small decoder."""
    model, decoder = folder / "tiny-flux2.safetensors", folder / "tiny-taef2.safetensors"
    write_safetensors(model, diffusion_shapes(width) | text_shapes(), seed)
    write_safetensors(decoder, decoder_shapes(encoder=encoder), seed + 1)
    return model, decoder


def image_entry(files: tuple[Path, Path], settings: str) -> str:
    """Return what models.yaml says of a model in two files, with settings of its pictures."""
    model, decoder = files
    return f"{{source: 'file:{model}', task: image, parts: {{taesd: 'file:{decoder}'}}, image: {{{settings}}}}}"


def write_loras(folder: Path, width: int = HEAD) -> None:
    """Write a LoRA that changes much, one of which a half is for another model, and a file that is none."""
    name, rank = "diffusion_model.double_blocks.0.img_mlp.2", 4
    shapes: Shapes = {
        f"{name}.lora_down.weight": (rank, MLP * width),
        f"{name}.lora_up.weight": (width, rank),
    }
    write_safetensors(folder / "style.safetensors", shapes, seed=3)
    other = {name.replace(".0.", ".1."): shape for name, shape in shapes.items()}
    write_safetensors(folder / "水墨 (half).safetensors", shapes | other, seed=3)
    (folder / "broken.safetensors").write_bytes(b"nothing of the kind")


def write_safetensors(path: Path, shapes: Shapes, seed: int = 1) -> None:
    """Write a file of random weights in F16."""
    place, header = 0, {}
    for name, shape in shapes.items():
        end = place + 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": (place, end)}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(_weights(shapes, seed))


def _weights(shapes: Shapes, seed: int) -> Iterator[bytes]:
    random = np.random.default_rng(seed)
    for name, shape in shapes.items():
        yield _weight(name, shape, random).astype("<f2").tobytes()


def _weight(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Return weights that keep what goes through them about as large as it was; the picture is grey in the mean."""
    last = name.startswith("decoder.layers.18.")
    if len(shape) == 1:
        return np.full(shape, (0.5 if last else 0.0) if name.endswith(".bias") else 1.0)
    spread = (0.1 if last else 1.0) / np.sqrt(np.prod(shape[1:]))
    return random.standard_normal(shape, np.float32) * spread
