"""Tells whether stable-diffusion.cpp can take the tensors of a diffusion model, as far as it believes what they say.

From some names and shapes the library derives how many layers there are and how wide, and never asks whether that can
be: its process ends, or hangs, as the model is loaded or at the first prompt. What it compares by itself is left to it:
whether all other tensors are there, in the shapes that follow. The numbers are those of the library in
stable-diffusion-cpp-python 0.4.7. Knows no files.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from llamaserve.registry.diffusion_family import (
    ANIMA,
    CHROMA,
    ERNIE,
    FLUX,
    FLUX2,
    KLEIN,
    OVIS,
    QWEN,
    RADIANCE,
    SCHNELL,
    Z_IMAGE,
    Family,
    Shapes,
)
from llamaserve.registry.diffusion_names import library_name

_MODEL: Final = "model.diffusion_model."
_LLM: Final = "text_encoders.llm"
_EYES: Final = "visual."  # what of a language model looks at pictures, and has sizes that are fixed
_DECODERS: Final = ("first_stage_model.decoder.conv_in.weight", "vae.decoder.conv_in.weight")

_NUMBERED: Final = re.compile(r"((?:double_|single_|joint_)?blocks|layers|blk)\.\s*\+?0*([0-9]+)")
_MOST: Final = 64  # layers, and blocks of other kinds than these, of which graphs have no room for more
_MOST_OF: Final = {"double_blocks": 32, "joint_blocks": 40}
_MOST_OF_CHROMA: Final = {"double_blocks": 19, "single_blocks": 38}  # for which there are tables of a fixed size

_HEAD: Final = 128  # numbers of an attention head
_WIDEST: Final = 1 << 15  # numbers that a layer could make of a token
_LATENT: Final = 128  # channels of FLUX.2's latent pictures
_T5: Final = 4096  # numbers that T5 makes of a token
_LIKE_FLUX: Final = (FLUX, SCHNELL, CHROMA, RADIANCE, OVIS, FLUX2, KLEIN)
_HEADS: Final = ("blocks.0.norm.key_norm.scale", "blocks.0.txt_attn.norm.key_norm.scale")
_HEADS_OF_DIFFUSERS: Final = ("blocks.0.attn.norm_k.weight", "blocks.0.attn.norm_added_k.weight")

_MISTRALS: Final = (FLUX2, ERNIE)  # families whose language model is a Mistral; that of others is a Qwen
_TOKENS_OF_MISTRAL, _TOKENS_OF_QWEN = 131_072, 151_669  # that the library's tokenisers know
_OF_LLAMA_CPP: Final = (("token_embd.", "embed_tokens."), ("blk.", "layers."), ("ffn_gate.", "mlp.gate_proj."))
_OUTPUTS: Final = {FLUX2.name: (10, 20, 30), KLEIN.name: (9, 18, 27)}  # layers whose results stand side by side
_TAKEN: Final = {QWEN.name: 3584, Z_IMAGE.name: 2560, ANIMA.name: 1024}  # numbers of a token, where that is fixed
_TAKING: Final = {ERNIE.name: "text_proj.weight"} | dict.fromkeys((OVIS.name, FLUX2.name, KLEIN.name), "txt_in.weight")

_Shape = tuple[int, ...]
_Rules = Mapping[str, Callable[[_Shape], bool]]  # for tensors whose names end so


def misfits(family: Family, shapes: Shapes) -> Iterator[str]:
    """Yield what the library can't take in a model of this family: the rest of a sentence about it."""
    yield from _misnamed(family, shapes)
    yield from _miscounted(family, shapes)
    model = {name: shape for name, shape in shapes.items() if name.startswith(_MODEL)}
    if family in _LIKE_FLUX:
        yield from _unfit(model, _like_flux(family, shapes))
        if not any(name.endswith((*_HEADS, *_HEADS_OF_DIFFUSERS)) for name in model):
            yield "it has no double_blocks.0.txt_attn.norm.key_norm.scale, which tells how wide its heads are"
    if family == ERNIE:
        yield from _unfit(model, _ERNIE)
    if family.encoders == (("llm",),):
        yield from _language_model(family, shapes)
    yield from _unfit({name: shapes[name] for name in _DECODERS if name in shapes}, {"": _is_of_a_decoder})


def _misnamed(family: Family, shapes: Shapes) -> Iterator[str]:
    for name in shapes:
        try:
            library_name(name, family)
        except ValueError as error:
            yield f"it has a tensor of which {error}"


# ---- how many there are


def _miscounted(family: Family, shapes: Shapes) -> Iterator[str]:
    """Yield where numbers of blocks are missing, or there are too many."""
    counted: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    most = _MOST_OF | (_MOST_OF_CHROMA if family in (CHROMA, RADIANCE) else {})
    for name in shapes:
        for found in _NUMBERED.finditer(name):
            if len(found[2]) > 2 or int(found[2]) >= most.get(found[1], _MOST):
                yield f"it has the tensor {name[:100]!r}, and {most.get(found[1], _MOST)} {found[1]} are the most"
                return
        first = _NUMBERED.search(name)
        if first and not family.is_unet and (name.startswith(_MODEL) or _LLM in name):
            counted[name[: first.start()], first[1]].add(int(first[2]))
    for (beginning, kind), numbers in counted.items():
        for missing in sorted({*range(max(numbers))} - numbers)[:1]:
            yield f"it has tensors of {beginning}{kind}.{max(numbers)}, but none of {beginning}{kind}.{missing}"


# ---- how wide they are


def _unfit(shapes: Shapes, rules: _Rules) -> Iterator[str]:
    for name, shape in shapes.items():
        for ending, fits in rules.items():
            if name.endswith(ending) and not fits(shape):
                yield f"its tensor {name[:100]!r} has the impossible shape {_written(shape)}"


def _written(shape: _Shape) -> str:
    return "x".join(map(str, shape)) or "of a single number"


def _is_matrix(shape: _Shape) -> bool:
    return len(shape) == 2 and all(0 < side <= _WIDEST for side in shape)


def _is_of_heads(shape: _Shape) -> bool:
    return _is_matrix(shape) and shape[0] % _HEAD == 0


def _is_a_head(shape: _Shape) -> bool:
    return shape[-1:] == (_HEAD,)


def _is_of_a_decoder(shape: _Shape) -> bool:
    return len(shape) < 4 or math.prod(shape[:-3]) <= _WIDEST // 4


def _like_flux(family: Family, shapes: Shapes) -> _Rules:
    """Return the rules for FLUX and all that are built like it."""
    patch = {RADIANCE: 16, FLUX2: 1, KLEIN: 1}.get(family, 2)
    if any("__32x32__" in name for name in shapes):
        patch = 32
    inputs = _is_of_heads
    if family in (FLUX, SCHNELL, CHROMA, RADIANCE):
        inputs = _is_after_t5
    return {
        "txt_in.weight": inputs,
        "context_embedder.weight": inputs,
        "img_in_patch.weight": lambda shape: shape[-1:] in ((patch,), (patch // 2,)),
        **dict.fromkeys((*_HEADS, *_HEADS_OF_DIFFUSERS), _is_a_head),
    }


def _is_after_t5(shape: _Shape) -> bool:
    return _is_of_heads(shape) and shape[1] == _T5


_ERNIE: Final[_Rules] = {
    "x_embedder.proj.weight": lambda shape: _is_of_heads(shape[:2]) and shape[1:] == (_LATENT, 1, 1),
    "text_proj.weight": _is_matrix,
    "layers.0.self_attention.norm_q.weight": _is_a_head,
    "layers.0.mlp.gate_proj.weight": _is_matrix,
    "final_linear.weight": lambda shape: _is_matrix(shape) and shape[0] == _LATENT,
}


# ---- what reads the prompt


def _language_model(family: Family, shapes: Shapes) -> Iterator[str]:
    """Yield what is wrong with the language model that reads the prompt."""
    reading = {_of_llama_cpp(name): shape for name, shape in shapes.items() if _LLM in name and _EYES not in name}
    yield from _unfit(
        {name: shape for name, shape in reading.items() if "layers.0.mlp.gate_proj.weight" in name}, {"": _is_matrix}
    )
    tokens = _TOKENS_OF_MISTRAL if family in _MISTRALS else _TOKENS_OF_QWEN
    for name, shape in reading.items():
        if "embed_tokens.weight" not in name:
            continue
        if len(shape) != 2 or not (0 < shape[1] <= _WIDEST):
            yield from _unfit({name: shape}, {"": _is_matrix})
        elif not tokens <= shape[0]:
            yield f"its tensor {name[:100]!r} knows {shape[0]} tokens, and prompts are written in {tokens}"
        else:
            yield from _mismatched(family, shapes, reading, shape[1])


def _mismatched(family: Family, shapes: Shapes, reading: Shapes, width: int) -> Iterator[str]:
    """Yield why the language model of this width is not the one that a diffusion model was trained with."""
    taking = shapes.get(_MODEL + _TAKING.get(family.name, ""), ())
    taken = _TAKEN.get(family.name, taking[-1] if taking else None)
    numbers = [int(found[2]) for name in reading if (found := _NUMBERED.search(name)) and len(found[2]) <= 2]
    outputs = [each for each in _OUTPUTS.get(family.name, ()) if each <= max(numbers, default=0) + 1]
    given = width * max(1, len(outputs))
    if taken not in (None, given):
        yield f"its text encoder makes {given} numbers of a token, but it takes {taken}: it goes with another one"


def _of_llama_cpp(name: str) -> str:
    """Return the name that the library gives a tensor of a language model, which llama.cpp's files call otherwise."""
    for other, own in _OF_LLAMA_CPP:
        name = name.replace(other, own, 1)
    return name
