"""The names that stable-diffusion.cpp gives the layers of diffusion models that are named as diffusers has them.

The same as ``convert_diffusion_model_name`` of the library in stable-diffusion-cpp-python 0.4.7, its oddities included:
blocks of a higher number than it expects keep their names. Knows nothing of other parts of a model, or of LoRAs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Final

from llamaserve.registry import diffusion_family as families
from llamaserve.registry.diffusion_family import Family

Pairs = tuple[tuple[str, str], ...]

FLUX_1: Final = (  # and those that are built like it
    *(families.FLUX, families.SCHNELL, families.CONTROLLED),
    *(families.CHROMA, families.RADIANCE, families.OVIS),
)
_OLD: Final = frozenset(each.name for each in (families.SD1, families.SD2, families.SDXS, families.SDXS2))
_FLUX: Final = frozenset(each.name for each in (*FLUX_1, families.FLUX2, families.KLEIN))


def layer_name(name: str, family: Family) -> str:
    """Return the library's name of a layer of a diffusion model of this family, both without the model's prefix."""
    if family.name in _OLD:
        return _of_unet(name, sdxl=False)
    if family.name == families.SDXL.name:
        return _of_unet(name, sdxl=True)
    if family.name == families.SD3.name:
        return begun(name, _sd3())
    if family.name in _FLUX:
        return begun(name, _flux())
    if family.name == families.Z_IMAGE.name:
        return begun(name, _z_image())
    if family.name == families.ANIMA.name and not name.startswith("net."):
        return f"net.{name}"
    return name


def begun(name: str, beginnings: Iterable[tuple[str, str]]) -> str:
    """Return the name with the first of these beginnings replaced."""
    for old, new in beginnings:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def replaced(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """Return the name with each of these replaced once, one after the other."""
    for old, new in pairs:
        if old in name:
            name = name.replace(old, new, 1)
    return name


_UNET_ENDS: Final = {
    f"{old}.{kind}": f"{new}.{kind}"
    for old, new in (
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("conv_in", "input_blocks.0.0"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
        ("add_embedding.linear_1", "label_emb.0.0"),
        ("add_embedding.linear_2", "label_emb.0.2"),
    )
    for kind in ("weight", "bias")
}
_RESNETS: Final[Pairs] = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("time_emb_proj", "emb_layers.1"),
    ("conv_shortcut", "skip_connection"),
)
_OUTS: Final[Pairs] = (("to_out.weight", "to_out.0.weight"), ("to_out.bias", "to_out.0.bias"))


def _of_unet(name: str, *, sdxl: bool) -> str:
    if name in _UNET_ENDS and (sdxl or not name.startswith("add_embedding")):
        return _UNET_ENDS[name]
    if "resnets" in name:
        name = replaced(name, _RESNETS)
    name = replaced(name, _unet_blocks(sdxl))
    return replaced(name, _OUTS) if sdxl else name


@functools.cache
def _unet_blocks(sdxl: bool) -> Pairs:
    def pairs() -> Iterator[tuple[str, str]]:
        for i in range(3 if sdxl else 4):
            attends = i > 0 if sdxl else i < 3
            for j in range(2):
                yield f"down_blocks.{i}.resnets.{j}.", f"input_blocks.{3 * i + j + 1}.0."
                if attends:
                    yield f"down_blocks.{i}.attentions.{j}.", f"input_blocks.{3 * i + j + 1}.1."
            for j in range(4 if sdxl else 3):
                yield f"up_blocks.{i}.resnets.{j}.", f"output_blocks.{3 * i + j}.0."
                if i < 2 or not sdxl:
                    yield f"up_blocks.{i}.attentions.{j}.", f"output_blocks.{3 * i + j}.1."
            if i < 3:
                yield f"down_blocks.{i}.downsamplers.0.conv.", f"input_blocks.{3 * (i + 1)}.0.op."
                yield f"up_blocks.{i}.upsamplers.0.", f"output_blocks.{3 * i + 2}.{2 if i else 1}."
        if sdxl:
            yield "output_blocks.2.1.conv.", "output_blocks.2.2.conv."
        yield "mid_block.attentions.0.", "middle_block.1."
        for j in range(2):
            yield f"mid_block.resnets.{j}.", f"middle_block.{2 * j}."

    return tuple(pairs())


def _both(old: str, new: str, suffix: str = "") -> Pairs:
    """Return the names of a layer's weight and of its bias; ``suffix`` tells which part of a larger layer it is."""
    return tuple((f"{old}.{kind}", f"{new}.{kind}{suffix}") for kind in ("weight", "bias"))


def _split(old: str, names: Iterable[str], new: str) -> Iterator[tuple[str, str]]:
    """Yield the names of layers that are one in the library, one below the other."""
    for place, name in enumerate(names):
        yield from _both(f"{old}{name}", new, f".{place}" if place else "")


_QKV: Final = ("to_q", "to_k", "to_v")
_ADDED: Final = ("add_q_proj", "add_k_proj", "add_v_proj")


@functools.cache
def _sd3() -> Pairs:
    def pairs() -> Iterator[tuple[str, str]]:
        for embedder, new in (("timestep", "t"), ("text", "y")):
            for number, place in ((1, 0), (2, 2)):
                old = f"time_text_embed.{embedder}_embedder.linear_{number}"
                yield from _both(old, f"{new}_embedder.mlp.{place}")
        yield "pos_embed.pos_embed", "pos_embed"
        yield from _both("pos_embed.proj", "x_embedder.proj")
        for number in range(38):
            yield from block(f"transformer_blocks.{number}.", f"joint_blocks.{number}.")
        yield from _both("proj_out", "final_layer.linear")
        yield from _both("norm_out.linear", "final_layer.adaLN_modulation.1")

    def block(old: str, new: str) -> Iterator[tuple[str, str]]:
        for stream, context, qkv, out in (("x", "", _QKV, "to_out.0"), ("context", "_context", _ADDED, "to_add_out")):
            yield from _both(f"{old}norm1{context}.linear", f"{new}{stream}_block.adaLN_modulation.1")
            for attention in ("attn", "attn2"):
                inner = f"{new}{stream}_block.{attention}"
                yield from _split(f"{old}{attention}.", qkv, f"{inner}.qkv")
                yield from _both(f"{old}{attention}.{out}", f"{inner}.proj")
                for letter in "qk":
                    if attention == "attn" or not context:
                        added = "added_" if context else ""
                        yield f"{old}{attention}.norm_{added}{letter}.weight", f"{inner}.ln_{letter}.weight"
            for place, layer in ((1, "net.0.proj"), (2, "net.2")):
                yield from _both(f"{old}ff{context}.{layer}", f"{new}{stream}_block.mlp.fc{place}")

    return tuple(pairs())


@functools.cache
def _flux() -> Pairs:
    def pairs() -> Iterator[tuple[str, str]]:
        for embedder, new in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance")):
            for number, place in ((1, "in"), (2, "out")):
                yield from _both(f"time_text_embed.{embedder}_embedder.linear_{number}", f"{new}_in.{place}_layer")
        yield from _both("context_embedder", "txt_in")
        yield from _both("x_embedder", "img_in")
        for number in range(19):
            yield from double(f"transformer_blocks.{number}.", f"double_blocks.{number}.")
        for number in range(38):
            yield from single(f"single_transformer_blocks.{number}.", f"single_blocks.{number}.")
        yield from _both("proj_out", "final_layer.linear")
        yield from _both("norm_out.linear", "final_layer.adaLN_modulation.1")

    def double(old: str, new: str) -> Iterator[tuple[str, str]]:
        for stream, context, qkv, out in (("img", "", _QKV, "to_out.0"), ("txt", "_context", _ADDED, "to_add_out")):
            yield from _both(f"{old}norm1{context}.linear", f"{new}{stream}_mod.lin")
            yield from _split(f"{old}attn.", qkv, f"{new}{stream}_attn.qkv")
            yield from _both(f"{old}attn.{out}", f"{new}{stream}_attn.proj")
            yield from norms(f"{old}attn.norm_{'added_' if context else ''}", f"{new}{stream}_attn.norm.")
            for place, layer in ((0, "net.0.proj"), (2, "net.2")):
                yield from _both(f"{old}ff{context}.{layer}", f"{new}{stream}_mlp.{place}")

    def single(old: str, new: str) -> Iterator[tuple[str, str]]:
        yield from _both(f"{old}norm.linear", f"{new}modulation.lin")
        yield from _split(old, (*(f"attn.{each}" for each in _QKV), "proj_mlp"), f"{new}linear1")
        yield from norms(f"{old}attn.norm_", f"{new}norm.")
        yield from _both(f"{old}proj_out", f"{new}linear2")

    def norms(old: str, new: str) -> Iterator[tuple[str, str]]:
        yield f"{old}q.weight", f"{new}query_norm.scale"
        yield f"{old}k.weight", f"{new}key_norm.scale"

    return tuple(pairs())


@functools.cache
def _z_image() -> Pairs:
    def pairs() -> Iterator[tuple[str, str]]:
        yield "all_x_embedder.2-1.", "x_embedder."
        yield "all_final_layer.2-1.", "final_layer."
        for kind, count in (("noise_refiner", 2), ("context_refiner", 2), ("layers", 30)):
            for block in (f"{kind}.{number}.attention." for number in range(count)):
                yield f"{block}norm_q.", f"{block}q_norm."
                yield f"{block}norm_k.", f"{block}k_norm."
                yield f"{block}to_out.0.", f"{block}out."
                yield from _split(block, _QKV, f"{block}qkv")

    return tuple(pairs())
