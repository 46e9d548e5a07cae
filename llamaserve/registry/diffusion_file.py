"""Reads what the files of a diffusion model hold: which family it is of, what it can do, and how large its weights are.

A model is one file, or several: the diffusion model, and parts such as the text encoder. Files are safetensors or GGUF,
and are checked as far as their headers tell; what stable-diffusion.cpp refuses by itself (a tensor that is missing, or
of another shape) is left to it. Tensors get the beginnings of names that the library gives them, from which part they
come included; ``diffusion_names`` has the rest.

Knows no names of models, and nothing of how much memory is there.
"""

from __future__ import annotations

import math
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple

from llamaserve.errors import GGUFError, ModelFileMissing, ModelNotCapable, SourceError
from llamaserve.images.values import PARTS, Part
from llamaserve.registry.diffusion_checks import misfits
from llamaserve.registry.diffusion_family import SD3, Family, family_of, makes_videos
from llamaserve.registry.gguf import read_container
from llamaserve.registry.safetensors import read_safetensors
from llamaserve.registry.split import part_of

_MODEL: Final = "model.diffusion_model."
_WHOLE: Final = (_MODEL, "unet.")  # how names begin in a file that may hold more than that
_PREFIXES: Final[Mapping[Part, str]] = {
    "vae": "vae.",
    "taesd": "tae.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.",
    "t5xxl": "text_encoders.t5xxl.transformer.",
    "llm": "text_encoders.llm.",
    "llm_vision": "text_encoders.llm.visual.",
}
_OF_UNETS: Final[Mapping[Part, str]] = {
    "clip_l": "cond_stage_model.transformer.",
    "clip_g": "cond_stage_model.1.transformer.",
}
_ENCODERS: Final = ("cond_stage_model.", "conditioner.embedders.", "text_encoders.")  # what reads prompts
_DECODERS: Final = ("first_stage_model.", "vae.")
_BEGINNINGS: Final = (  # of names, and what the library makes of them; longer ones first
    ("diffusion_model.", _MODEL),
    ("text_encoder.2.", "cond_stage_model.1.transformer."),
    ("text_encoder.", "cond_stage_model.transformer."),
    ("te1.", "cond_stage_model.transformer."),
    ("te2.", "cond_stage_model.1.transformer."),
    ("te3.", "text_encoders.t5xxl.transformer."),
    ("te.", "cond_stage_model.transformer."),
)

# How the library keeps weights: plain numbers as F32, convolutions as F16, matrices mostly as they are in the file.
_FLOAT, _HALF = 4, 2  # bytes
_CONVERTED: Final = {"F8_E4M3": _HALF, "F8_E5M2": _HALF, "F64": _FLOAT, "I64": _FLOAT}
_TABLES: Final = ("token_embd.weight", "embed_tokens.weight", "token_embedding.weight", "shared.weight")
_TABLE_TYPES: Final = frozenset({"F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"})  # in which a table can be looked up
_NOT_LOADED: Final = ("text_encoders.llm.output.", "text_encoders.llm.lm_head.", "model_ema.", "first_stage_model.bn.")
_UNKNOWN: Final = frozenset({"Q1_0", "Q2_0", "Q8_1", "Q8_K", "I8", "I16", "F64"})  # types without a use to it
_WHOLE_NUMBERS: Final = frozenset({"I32", "I64"})  # types in which only positions are
_WEIGHTS: Final = ("weight", "bias", "scale", "gamma", "text_projection", "embed", "embedding")  # ends of their names


class Tensor(NamedTuple):
    """A tensor: its shape with the fastest dimension last, its type, and the bytes of it in the file."""

    shape: tuple[int, ...]
    type: str
    size: int


Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class DiffusionHeader:
    """What the files of a diffusion model say of themselves. ``whole`` tells that the first may hold more than the
    diffusion model. ``tensors`` are all, by names that begin as stable-diffusion.cpp has them.
    """

    path: Path
    parts: Mapping[Part, Path]
    whole: bool
    family: Family
    tensors: Tensors

    @property
    def paths(self) -> tuple[Path, ...]:
        """All its files."""
        return (self.path, *self.parts.values())

    @cached_property
    def file_size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.paths)

    @cached_property
    def parameter_count(self) -> int:
        """Number of weights, those of its parts included."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all weights that are loaded, in memory."""
        replaced = ("first_stage_model.", "vae.") if "taesd" in self.parts and "vae" not in self.parts else ()
        left_out = (*_NOT_LOADED, *replaced)
        loaded = (each for each in self.tensors.items() if not each[0].startswith(left_out))
        return sum(_size_in_memory(name, tensor) for name, tensor in loaded)

    @cached_property
    def quantisation(self) -> str:
        """The type of most weights of the diffusion model, such as ``Q8_0``."""
        counts: Counter[str] = Counter()
        for name, tensor in self.tensors.items():
            if not name.startswith((*_ENCODERS, *_DECODERS, "tae.")):
                counts[tensor.type] += math.prod(tensor.shape)
        return counts.most_common(1)[0][0]

    @cached_property
    def encodes(self) -> bool:
        """Whether it can turn a picture into a latent one, without which none can be edited."""
        small = "taesd" in self.parts and "vae" not in self.parts
        prefixes = ("tae.",) if small else ("first_stage_model.", "vae.")
        return any(name.startswith(prefixes) and ".encoder." in name for name in self.tensors)

    @property
    def decodes_small(self) -> bool:
        """Whether it turns latent pictures into real ones with a small decoder (TAESD), which loses some details."""
        return self.family.small_decoder or ("taesd" in self.parts and "vae" not in self.parts)


def read_diffusion(path: Path, parts: Mapping[Part, Path] | None = None) -> DiffusionHeader:
    """Read and check the headers of a model's files.

    Raises:
        ModelFileMissing: A file is missing.
        GGUFError: One can't be read, is of another format, cut short or damaged, holds no diffusion model that is
            known, or says what would end stable-diffusion.cpp.
        ModelNotCapable: A part that the model needs is in none of the files, or it makes videos.
    """
    parts = parts or {}
    first = {_renamed(name): tensor for name, tensor in read_weights(path).items()}
    whole = any(name.startswith(_WHOLE) for name in first)
    tensors = dict(first if whole else _prefixed(first, _MODEL))
    alone = family_of(_shapes(tensors))  # as the library looks at it before it adds the parts
    is_unet = alone is not None and alone.is_unet
    for part in PARTS:
        if part in parts:
            prefix = _OF_UNETS.get(part, _PREFIXES[part]) if is_unet else _PREFIXES[part]
            tensors |= _prefixed(read_weights(parts[part]), prefix)
    if makes_videos(tensors):
        raise ModelNotCapable(f"{path} makes videos; only pictures are made here")
    if (family := family_of(_shapes(tensors))) is None:
        raise _unknown(path, first)
    if family.steered:
        raise ModelNotCapable(f"{path} is a {family.name} model, which needs pictures to steer it; that is not offered")
    header = DiffusionHeader(path, dict(parts), whole, family, tensors)
    _check(header, inside=whole and any(name.startswith(_ENCODERS) for name in first))
    return header


def _check(header: DiffusionHeader, *, inside: bool) -> None:
    """Refuse what can't make pictures, or would end the library. ``inside`` tells that the first file holds text
    encoders.
    """
    what = f"{header.path} is a {header.family.name} model"
    for lacking in _lacking(header, inside):
        raise ModelNotCapable(f"{what}, and {lacking}")
    if header.family == SD3 and _has(header.tensors, "t5xxl"):
        raise _of_long_prompts(header)
    for misfit in (*misfits(header.family, _shapes(header.tensors)), *_whole_numbers(header.tensors)):
        raise GGUFError(f"{what} that stable-diffusion.cpp can't load: {misfit}")


def _whole_numbers(tensors: Tensors) -> Iterator[str]:
    for name, tensor in tensors.items():
        if tensor.type in _WHOLE_NUMBERS and name.endswith(_WEIGHTS):
            yield f"its tensor {name[:100]!r} is of the type {tensor.type}, in which it can't compute"


def _has(tensors: Tensors, part: Part) -> bool:
    """Whether a transformer's prompts are read by this encoder, whose names are those that the library looks for."""
    prefix, other = _PREFIXES[part].removesuffix("transformer."), _PREFIXES["llm_vision"]
    return any(prefix in name and other not in name for name in tensors)


def _of_long_prompts(header: DiffusionHeader) -> ModelNotCapable:
    """Return the error for a model with T5 beside CLIP. Each divides a long prompt into pieces of its own, and the
    library reads as many from one as from the other.
    """
    remedy = "leave `t5xxl` out of its `parts`" if "t5xxl" in header.parts else "fetch its file without T5"
    return ModelNotCapable(
        f"{header.path} is a {header.family.name} model with the text encoder t5xxl, with which stable-diffusion.cpp "
        "ends at the first long prompt; it does without",
        hint=f"{remedy}: clip_l and clip_g are enough",
    )


def _unknown(path: Path, first: Tensors) -> GGUFError:
    """Return the error for a file that is of no family."""
    if any(name.removeprefix(_MODEL).startswith("input_blocks.") for name in first):
        return GGUFError(
            f"{path} holds a U-Net without its text encoder, and stable-diffusion.cpp takes these in one file only",
            hint="fetch a file of this model that has all its parts",
        )
    return GGUFError(
        f"{path} holds no diffusion model that stable-diffusion.cpp knows",
        hint="name the file of a diffusion model as its source, and those of its parts under `parts`",
    )


def _renamed(name: str) -> str:
    """Return the name that the library gives a tensor whose name begins otherwise."""
    for beginning, other in _BEGINNINGS:
        if name.startswith(beginning):
            return other + name.removeprefix(beginning)
    return name


def _shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _lacking(header: DiffusionHeader, inside: bool) -> Iterator[str]:
    """Yield what is missing. A text encoder ``inside`` of the first file is enough for a U-Net."""
    for group in header.family.encoders:
        if header.family.is_unet:
            found = inside or any(part in header.parts for part in group)
        else:
            found = any(_has(header.tensors, part) for part in group)
        if not found:
            yield f"its text encoder is missing: name it under `parts`, as {' or '.join(group)}"
    if header.family.decodes and not (
        "taesd" in header.parts or any(name.startswith(_DECODERS) for name in header.tensors)
    ):
        yield "its decoder is missing: name it under `parts`, as vae or taesd"


def _prefixed(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    """Return tensors under the names that they have as part of a model."""
    return {name if name.startswith(prefix) else prefix + name: tensor for name, tensor in tensors.items()}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, whatever they are for. Raises as ``read_diffusion`` does for a damaged one."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise GGUFError(f"{path} is no regular file")
        with path.open("rb") as file:
            magic = file.read(4)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelFileMissing(f"{path} does not exist", hint="fetch it with `llamaserve pull <model>`") from error
    except (OSError, ValueError) as error:
        raise GGUFError(f"{path} cannot be read: {error}") from error
    tensors = dict(_from_gguf(path) if magic == b"GGUF" else _from_safetensors(path))
    if not tensors:
        raise GGUFError(f"{path} holds no weights")
    return tensors


def _from_gguf(path: Path) -> Iterator[tuple[str, Tensor]]:
    if (part := part_of(path.name)) is not None and part.count > 1:
        raise GGUFError(f"{path} is one of {part.count} files, which stable-diffusion.cpp can't put together")
    for tensor in read_container(path).tensors:
        if tensor.type_name in _UNKNOWN:
            raise GGUFError(f"{path} has weights of the type {tensor.type_name}, which stable-diffusion.cpp lacks")
        yield tensor.name, Tensor(tensor.shape[::-1], tensor.type_name, tensor.size)


def _from_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        tensors = read_safetensors(path).tensors
    except SourceError as error:
        raise GGUFError(f"{path} is no GGUF file, and {error.message}") from error
    for name, tensor in tensors.items():
        yield name, Tensor(tensor.shape, tensor.dtype, tensor.size)


def _size_in_memory(name: str, tensor: Tensor) -> int:
    """Return the bytes of a tensor once it is loaded."""
    elements = math.prod(tensor.shape)
    if len(tensor.shape) < 2 or (name.endswith(_TABLES) and tensor.type not in _TABLE_TYPES):
        return elements * _FLOAT
    if len(tensor.shape) > 2:
        return elements * _HALF
    return elements * _CONVERTED[tensor.type] if tensor.type in _CONVERTED else tensor.size
