"""Checks a LoRA against the diffusion model that it is to change; only the headers of both are read.

stable-diffusion.cpp checks none of this: it ends the process at a LoRA whose sizes are not those of the model, and
makes the picture without one of which it can use no tensor. So all that it would use must fit, as ``lora.hpp`` of the
library in stable-diffusion-cpp-python 0.4.7 uses it where LoRAs are applied at run time. Tensors whose names lead to
none of the model are ignored, as there. Knows nothing of requests, or of memory budgets.

A layer with weights of the shape (out, in), or (out, in, height, width) for a convolution, is changed in one of these
ways, and by ``alpha`` or ``scale``, which are one number each:

- LoRA: ``lora_up`` (out, rank) times ``lora_down`` (rank, in), of which the latter has the kernel of a convolution;
  or ``lora_mid`` between them has it (LoCon).
- LoHa: ``hada_w1_a`` (out, rank) times ``hada_w1_b`` (rank, in), each number of it times that of ``hada_w2``.
- LoKr: the Kronecker product of the matrices ``lokr_w1`` and ``lokr_w2``.
- ``diff``: numbers that are added, of the shape of what they change, which may also be a bias.

Layers that were trained one by one may be one in the library: then these are parts of it, one below the other.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from llamaserve.errors import GGUFError, SourceError
from llamaserve.registry.diffusion_file import DiffusionHeader, Tensor, Tensors
from llamaserve.registry.diffusion_layers import replaced
from llamaserve.registry.diffusion_names import DECODERS, ENCODERS, LORA, MODEL, library_name
from llamaserve.registry.safetensors import StoredTensor, read_safetensors

_FLOATS: Final = {"F16": 2, "BF16": 2, "F32": 4, "F64": 4, "F8_E4M3": 2, "F8_E5M2": 2}  # bytes of each once loaded
_ITEM_SIZES: Final = _FLOATS | {"I32": 4, "I64": 4}
_SKIPPED: Final = "U8"  # a type whose tensors the library leaves out
_MOST_TENSORS: Final = 32_768  # for which it has room
_MOST_DIMENSIONS: Final = 5
_TABLES: Final = (  # ends of the names of what it looks up, without regard to LoRAs
    *("embed_tokens.weight", "token_embedding.weight", "position_embedding.weight"),
    *("shared.weight", "relative_attention_bias.weight"),
)
_LOADED: Final = tuple(LORA + prefix for prefix in (MODEL, *ENCODERS, *DECODERS))  # nothing of another beginning is

_NUMBERS: Final = frozenset({"alpha", "scale"})
_PAIR: Final = frozenset({"lora_down", "lora_up"})
_DIFFERENCE: Final = frozenset({"diff"})
_HADAMARD: Final = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
_KRONECKER: Final = frozenset({"lokr_w1", "lokr_w2"})
_TUCKER: Final = _PAIR | {"lora_mid"}
_OTHERS: Final = frozenset({"hada_t1", "hada_t2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"})
_KINDS: Final = _NUMBERS | _TUCKER | _DIFFERENCE | _HADAMARD | _KRONECKER | _OTHERS
_MATRICES: Final = (2, 4)  # dimensions of those, and of convolutions
_PART_NUMBER: Final = re.compile(r"[1-9][0-9]?")  # of a layer whose first part has none
_CONVOLUTION: Final = re.compile(  # of a U-Net, which leaves out no pixels
    r"model\.diffusion_model\.(input_blocks|middle_block|output_blocks|out)\..*(?<!\.op)\.weight"
)
_BLOCK: Final = re.compile(  # layers that see a list of tokens, or one; a LoKr ends the process at others
    r"model\.diffusion_model\.((double_blocks|single_blocks|joint_blocks|transformer_blocks|layers)"
    r"|.+\.transformer_blocks)\.[0-9]"
)

_SECOND: Final = "cond_stage_model.1.transformer.text_model.encoder.layers"  # encoder of an SDXL model
_FUSED: Final = tuple(
    (f"self_attn.{letter}_proj.{kind}", f"self_attn.in_proj.{kind}{number}")
    for letter, number in (("q", ""), ("k", ".1"), ("v", ".2"))
    for kind in ("weight", "bias")
)

Shape = tuple[int, ...]


class _Misfit(Exception):
    """Why a LoRA can't be used."""


class _Tensor(NamedTuple):
    """A tensor of a LoRA, and its name in the file."""

    name: str
    type: str
    shape: Shape


class LoraFit(NamedTuple):
    """How many bytes a LoRA takes once stable-diffusion.cpp has loaded it, and how many of its tensors are of use."""

    size: int
    used: int
    tensors: int


_Part = dict[str, _Tensor]  # what changes a layer, or a part of it, such as lora_up and lora_down


def check_lora(path: Path, header: DiffusionHeader) -> LoraFit:
    """Check that a LoRA fits a model, and return what it is for it.

    Raises:
        GGUFError: The file can't be read, changes nothing of the model, or is one that the library fails at.
    """
    try:
        stored = read_safetensors(path).tensors
    except SourceError as error:
        raise GGUFError(error.message) from error
    try:
        model = _model(header)
        tensors = _named(stored, header, fused=f"{_SECOND}.0.self_attn.in_proj.weight" in model)
        layers = _layers(tensors, model)
        for name, parts in layers.items():
            _check_layer(name, model[name], parts)
        if not layers:
            raise _Misfit("no tensor of it belongs to one of the model; it may be for another kind of model")
    except (_Misfit, ValueError) as error:
        raise GGUFError(f"the LoRA {path.name} can't be used with this {header.family.name} model: {error}") from error
    loaded = (tensor for name, tensor in tensors.items() if name.startswith(_LOADED))
    size = sum(math.prod(tensor.shape) * _ITEM_SIZES[tensor.type] for tensor in loaded)
    return LoraFit(size, sum(len(part) for parts in layers.values() for part in parts.values()), len(stored))


def _model(header: DiffusionHeader) -> Tensors:
    """Return a model's tensors that can be changed, by the library's names."""
    tensors = ((library_name(name, header.family), tensor) for name, tensor in header.tensors.items())
    return {name: tensor for name, tensor in tensors if not name.endswith(_TABLES)}


def _named(stored: Mapping[str, StoredTensor], header: DiffusionHeader, *, fused: bool) -> dict[str, _Tensor]:
    """Return the tensors that the library reads, by its names; ``fused`` says how those of a second encoder are."""
    if len(stored) > _MOST_TENSORS:
        raise _Misfit(f"it has {len(stored)} tensors, and {_MOST_TENSORS} are the most")
    tensors: dict[str, _Tensor] = {}
    for own, tensor in stored.items():
        if tensor.dtype == _SKIPPED:
            continue
        if tensor.dtype not in _ITEM_SIZES:
            raise _Misfit(f"its tensor {_quoted(own)} is of the type {tensor.dtype}, which the library can't read")
        if len(tensor.shape) > _MOST_DIMENSIONS or 0 in tensor.shape:
            raise _Misfit(f"its tensor {_quoted(own)} is of the shape {tensor.shape}, which the library can't read")
        name = library_name(own if own.startswith(LORA) else LORA + own, header.family)
        if fused and _SECOND in name:
            name = replaced(name, _FUSED)
        if name in tensors:
            raise _Misfit(f"its tensors {_quoted(tensors[name].name)} and {_quoted(own)} are for the same")
        tensors[name] = _Tensor(own, tensor.dtype, tensor.shape)
    return tensors


def _layers(tensors: Mapping[str, _Tensor], model: Container[str]) -> dict[str, dict[int, _Part]]:
    """Return what is for the model's tensors, by their names, and by the number of a part."""
    layers: dict[str, dict[int, _Part]] = defaultdict(lambda: defaultdict(dict))
    for name, tensor in tensors.items():
        key, _, kind = name.removeprefix(LORA).rpartition(".")
        if kind not in _KINDS or not name.startswith(_LOADED):
            continue
        if key.startswith(DECODERS):
            raise _Misfit(f"its tensor {_quoted(tensor.name)} is for the decoder, which can't be changed")
        whole, _, number = key.rpartition(".")
        if key in model:
            layers[key][0][kind] = tensor
        elif whole in model and _PART_NUMBER.fullmatch(number):
            layers[whole][int(number)][kind] = tensor
    return {name: parts for name, parts in layers.items() if any(part.keys() - _NUMBERS for part in parts.values())}


def _check_layer(name: str, tensor: Tensor, parts: Mapping[int, _Part]) -> None:
    """Check what changes a tensor of the model."""
    shape = tensor.shape
    first = next(each for part in parts.values() for each in part.values())
    if sorted(parts) != [*range(len(parts))]:
        raise _Misfit(f"its tensor {_quoted(first.name)} is for a part of {name}, and what is for others is missing")
    if len({frozenset(part.keys() - _NUMBERS) for part in parts.values()}) > 1:
        raise _Misfit(f"its tensor {_quoted(first.name)} is for a part of {name}, and others are of another kind")
    sizes = [_change(name, tensor, parts[number]) for number in sorted(parts)]
    fit = all(size and size[1:] == shape[1:] for size in sizes) and sum(size[0] for size in sizes) == shape[0]
    if not fit or (len(sizes) > 1 and (len(shape) > 2 or (1,) in {size[:1] for size in sizes})):
        tensors = ", ".join(f"{_quoted(each.name)} {each.shape}" for part in parts.values() for each in part.values())
        raise _Misfit(f"{name} has the shape {shape}, which its tensors do not fit: {tensors[:500]}")


def _change(name: str, tensor: Tensor, part: _Part) -> Shape:
    """Return the shape of what is added to a tensor of the model, or to a part of it; an empty one if there is none."""
    for kind, own in part.items():
        if math.prod(own.shape) != 1 if kind in _NUMBERS else own.type not in _FLOATS:
            what = f"is of the type {own.type} and the shape {own.shape}"
            raise _Misfit(f"its tensor {_quoted(own.name)} {what}, which can't be used as {kind}")
    shape, kinds = tensor.shape, part.keys() - _NUMBERS
    adds = len(shape) != 2 or tensor.type in _FLOATS  # to the weights; the process ends if these are quantised
    if kinds == _DIFFERENCE and adds:
        return part["diff"].shape
    if kinds == _PAIR and len(shape) in _MATRICES:
        return _product(_filter(part["lora_up"], shape), _filter(part["lora_down"], shape))
    if kinds == _TUCKER and len(shape) == 4 and _CONVOLUTION.fullmatch(name):
        return _through(*(part[kind].shape for kind in ("lora_up", "lora_mid", "lora_down")))
    if kinds == _HADAMARD and len(shape) in _MATRICES and adds:
        one, other = (_product(part[f"hada_w{which}_a"].shape, part[f"hada_w{which}_b"].shape) for which in "12")
        return (one[0], *shape[1:]) if one == other and one[1:] == (math.prod(shape[1:]),) and one[0] > 1 else ()
    if kinds == _KRONECKER and len(shape) == 2 and _BLOCK.match(name):
        one, other = part["lokr_w1"].shape, part["lokr_w2"].shape
        return (one[0] * other[0], one[1] * other[1]) if len(one) == len(other) == 2 else ()
    own, used = next(iter(part.values())), " and ".join(sorted(kinds))
    raise _Misfit(
        f"its tensor {_quoted(own.name)} is for {name}, which is of the type {tensor.type} and the shape {shape}, and "
        f"can't be changed by {used}"
    )


def _product(up: Shape, down: Shape) -> Shape:
    """Return the shape of a product of matrices, or of convolutions of which the last has no kernel; an empty one for
    others.
    """
    fit = len(up) == len(down) >= 2 and up[1] == down[0] and set(up[2:]) <= {1}
    return (up[0], *down[1:]) if fit else ()


def _through(up: Shape, middle: Shape, down: Shape) -> Shape:
    """Return the shape of three convolutions in one, of which that in the middle has the kernel; or an empty one."""
    fit = len(up) == len(middle) == len(down) == 4 and middle[:2] == (up[1], down[0]) and up[2:] == down[2:] == (1, 1)
    return (up[0], down[1], *middle[2:]) if fit else ()


def _filter(tensor: _Tensor, shape: Shape) -> Shape:
    """Return the shape of a tensor for a layer; the library takes most matrices for convolutions without a kernel."""
    flat = len(shape) == 4 and len(tensor.shape) == 2 and 1 not in tensor.shape
    return (*tensor.shape, 1, 1) if flat else tensor.shape


def _quoted(name: str) -> str:
    return repr(name[:150])
