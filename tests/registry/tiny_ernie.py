"""Writes a diffusion model of random weights that is built like ERNIE Image, of one layer, as small as the library lets
it be: beside matrices it has a convolution, biases and norms, which LoRAs can change, too.

Its convolution makes one place of 2x2, other than that of the real one. Its decoder fits no latent picture of it, so it
can only show what is on the way. It writes what it is told and checks nothing, and knows nothing of what reads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tiny_diffusion import HEAD, Shapes, decoder_shapes, text_shapes, write_safetensors

PATCH: Final = 2  # pixels of a side


def ernie_shapes(width: int = HEAD, text_width: int = 32, inner: int = 96) -> Shapes:
    """Return the tensors of the diffusion model. The library must see those of ``x_embedder`` first, which tell it the
    width, and it sorts them by their names.
    """
    biased = {
        "time_embedding.linear_1": (width, width),
        "time_embedding.linear_2": (width, width),
        "adaLN_modulation.1": (6 * width, width),
        "final_norm.linear": (2 * width, width),
        "final_linear": (PATCH * PATCH * HEAD, width),
    }
    plain = {
        "text_proj": (width, text_width),
        **{f"layers.0.self_attention.{each}": (width, width) for each in ("to_q", "to_k", "to_v", "to_out.0")},
        **{f"layers.0.self_attention.{each}": (HEAD,) for each in ("norm_q", "norm_k")},
        **{f"layers.0.{each}": (width,) for each in ("adaLN_sa_ln", "adaLN_mlp_ln")},
        **{f"layers.0.mlp.{each}": (inner, width) for each in ("gate_proj", "up_proj")},
        "layers.0.mlp.linear_fc2": (width, inner),
    }
    shapes: Shapes = {f"{name}.weight": shape for name, shape in (biased | plain).items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in biased.items()}
    embedder: Shapes = {"x_embedder.proj.weight": (width, HEAD, PATCH, PATCH), "x_embedder.proj.bias": (width,)}
    return _prefixed(embedder, "diffusion_model.") | _prefixed(shapes, "model.diffusion_model.")


def _prefixed(shapes: Shapes, prefix: str) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def write_ernie(folder: Path) -> tuple[Path, Path]:
    """Write the model with its text encoder, and a decoder."""
    model, decoder = folder / "tiny-ernie.safetensors", folder / "tiny-tae.safetensors"
    encoder = {name: shape for name, shape in text_shapes().items() if "_norm." not in name or "layernorm" in name}
    decoding = {name: shape for name, shape in decoder_shapes(encoder=False).items() if ".pool." not in name}
    decoding["decoder.layers.0.weight"] = (64, 16, 3, 3)
    write_safetensors(model, ernie_shapes() | encoder, seed=5)
    write_safetensors(decoder, decoding, seed=6)
    return model, decoder
