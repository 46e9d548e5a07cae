"""LoRA adapters: which GGUF files of a folder are some, and whether one goes with a model.

llama.cpp checks part of this and ends the process over the rest: a value of another type, a third dimension, a type of
weights that it can't multiply by. And some weights it takes and never uses, so that the adapter would work in part
only; such a file is refused, too, and so is one with weights that are no numbers. This module loads nothing.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

from llamaserve.errors import GGUFError, InvalidRequest, ModelError, ModelFileMissing
from llamaserve.registry.cache import State, is_file, state_of
from llamaserve.registry.folder import natural
from llamaserve.registry.gguf import GGUFHeader, TensorInfo, ValueType, read_header

_SUFFIX = ".gguf"
_KIND = "adapter"  # general.type
_ALPHA = "adapter.lora.alpha"
_ACTIVATED = "adapter.alora.invocation_tokens"
_EMBEDDING = "token_embd.weight"
_OUTPUT = "output.weight"
_TYPES = ("F32", "F16", "BF16", "Q8_0")  # in which adapters are written
_MOST_ALPHA = 100.0  # for each of the rank: 0.5 to 4 are usual, and with much more the numbers leave their range
# Weights that llama.cpp does not multiply by in the way that heeds adapters: of attention that is compressed (MLA), of
# recurrent layers, convolutions, and what RWKV mixes by.
_UNHEEDED = re.compile(
    r"(?:.*\.)?(?:attn_[kv]_b|ssm_[fg]_[ab]|ssm_beta|ssm_conv1d(?:_[qkv])?|shortconv\.conv|time_mix_(?:decay_)?[wavg][12])"
    r"\.weight"
)
# Bytes of weights that are looked at together: whole ones, or whole blocks, of all types. Other threads wait meanwhile.
_PIECE = 34 << 13
# Where the highest byte of each weight is, of Q8_0 of each block's scale: the first, and how far it is to the next.
_HIGHEST = {"F32": (3, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (1, 34)}
# Highest bytes that are fine: not those of infinities and of what is no number, nor, of the types that have the room,
# those of numbers from 2⁶³ on, of which a model makes infinite ones.
_FINE_IN_16 = bytes(byte for byte in range(256) if byte & 0x7C < 0x7C)
_FINE_IN_32 = bytes(byte for byte in range(256) if byte & 0x7F < 0x5F)
_REMEMBERED = 1024  # files
_SHOWN = 100  # characters of a name

_Shape = tuple[int, ...]  # always four dimensions


# ---- a folder of adapters ----------------------------------------------------------------------------------------


def list_adapters(folder: Path) -> list[str]:
    """Return the names of the adapters in a folder, those of their files without ``.gguf``, with ``a2`` before ``a10``.
    Folders within it are not looked into; without the folder there are none.
    """
    return [name for name, path in _files(folder).items() if _is_adapter(path)]


def adapter_file(folder: Path, name: str) -> Path:
    """Return the file of an adapter in a folder. Names come from anywhere: they are only compared with those that are
    there. Raises ``InvalidRequest`` when none of the adapters is called so.
    """
    path = _files(folder).get(name)
    if path is None or not _is_adapter(path):
        shown = name if len(name) <= _SHOWN else name[:_SHOWN] + "…"
        raise InvalidRequest(f"there is no LoRA adapter {shown!r} in {folder}", param="lora_names")
    return path


def _files(folder: Path) -> dict[str, Path]:
    """Return the GGUF files that lie in a folder itself, by name."""
    try:
        paths = sorted(folder.iterdir(), key=lambda path: natural(path.name))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise ModelFileMissing(f"the folder {folder} can't be read: {error.strerror or error}") from error
    files: dict[str, Path] = {}
    for path in paths:
        gguf = path.name.lower().endswith(_SUFFIX) and path.name.isprintable() and not path.name.startswith(".")
        if gguf and is_file(path):
            files.setdefault(path.name[: -len(_SUFFIX)], path)
    return files


def _is_adapter(path: Path) -> bool:
    try:
        status = path.stat()
        return _says_adapter(path, status.st_size, status.st_mtime_ns)
    except (OSError, ModelError):  # gone, or too broken to say what it is
        return False


@lru_cache(_REMEMBERED)
def _says_adapter(path: Path, size: int, changed: int) -> bool:  # noqa: ARG001  (of another size, it is another file)
    return read_header(path).text("general.type") == _KIND


# ---- an adapter and a model --------------------------------------------------------------------------------------


def check_adapter(adapter: GGUFHeader, model: GGUFHeader) -> None:
    """Refuse a file that is no LoRA adapter, or none for this model, or that would make llama.cpp end the process.

    Raises:
        GGUFError: The message says what is at fault.
    """
    _check_kind(adapter, model)
    bases = {tensor.name: tensor for tensor in model.tensors}
    for name, (down, up) in _pairs(adapter).items():
        for half in (down, up):
            if half.type_name not in _TYPES:
                _refuse(adapter, f"its {half.name!r} has the type {half.type_name}; {', '.join(_TYPES)} are possible")
        base = bases.get(name)
        if base is None:
            _refuse(adapter, f"{model.path.name} has no tensor {name!r}: the adapter was made for another model")
        if _dimensions(base)[1] == 1:
            _refuse(adapter, f"it changes {name!r}, which is no matrix: llama.cpp would leave that out")
        if _UNHEEDED.fullmatch(name):
            _refuse(adapter, f"it changes {name!r}, which llama.cpp would leave out")
        if name == _EMBEDDING:
            _check_embedding(adapter, down, up, base, tied=_OUTPUT not in bases)
        else:
            _check_shapes(adapter, down, up, base)
        _check_strength(adapter, up)
    _check_weights(adapter)


def _check_kind(adapter: GGUFHeader, model: GGUFHeader) -> None:
    if adapter.text("general.type") != _KIND:
        raise GGUFError(f"{adapter.path} is no LoRA adapter: its general.type is not {_KIND!r}")
    if adapter.text("adapter.type") != "lora":
        _refuse(adapter, "its adapter.type is not 'lora', and no other is known")
    if adapter.architecture != model.architecture:
        other = f"for the architecture {adapter.architecture!r}" if adapter.architecture else "for no architecture"
        _refuse(adapter, f"it is {other}, and {model.path.name} is a {model.architecture}")
    if adapter.split_count > 1:
        _refuse(adapter, "it is in several files")
    if _ACTIVATED in adapter.metadata:
        _refuse(adapter, "it shall only work after certain tokens (activated LoRA), which is not supported")
    alpha = adapter.metadata.get(_ALPHA)
    if alpha is not None and adapter.types.get(_ALPHA) is not ValueType.FLOAT32:
        _refuse(adapter, f"its {_ALPHA} is no 32-bit float")
    if isinstance(alpha, float) and not math.isfinite(alpha):
        _refuse(adapter, f"its {_ALPHA} is {alpha}")


def _pairs(adapter: GGUFHeader) -> dict[str, tuple[TensorInfo, TensorInfo]]:
    """Return the two factors of each change, by the name of the tensor that they change."""
    halves: dict[str, dict[str, TensorInfo]] = {}
    for tensor in adapter.tensors:
        name, dot, half = tensor.name.rpartition(".")
        if not dot or half not in ("lora_a", "lora_b"):
            _refuse(
                adapter, f"its {tensor.name!r} is not half of a change of low rank, and llama.cpp would leave it out"
            )
        halves.setdefault(name, {})[half] = tensor
    if not halves:
        _refuse(adapter, "it changes nothing: it has no tensors")
    for name, found in halves.items():
        for half in ("lora_a", "lora_b"):
            if half not in found:
                _refuse(adapter, f"its '{name}.{half}' is missing")
    return {name: (found["lora_a"], found["lora_b"]) for name, found in halves.items()}


def _check_shapes(adapter: GGUFHeader, down: TensorInfo, up: TensorInfo, base: TensorInfo) -> None:
    """``down`` maps the inputs to as many numbers as the rank is, and ``up`` those to the outputs. Experts, the third
    dimension, each have their own.
    """
    inputs, outputs, *experts = _dimensions(base)
    rank = _dimensions(down)[1]
    if _dimensions(down) != (inputs, rank, *experts) or _dimensions(up) != (rank, outputs, *experts):
        _refuse_shapes(adapter, down, up, base)


def _check_embedding(adapter: GGUFHeader, down: TensorInfo, up: TensorInfo, base: TensorInfo, *, tied: bool) -> None:
    """Here ``down`` has a row for each token."""
    if tied:
        _refuse(adapter, f"it changes {base.name!r}, which is this model's output, too; llama.cpp can't do that")
    width, tokens, *_ = _dimensions(base)
    rank = _dimensions(down)[0]
    if _dimensions(down) != (rank, tokens, 1, 1) or _dimensions(up) != (rank, width, 1, 1):
        _refuse_shapes(adapter, down, up, base)


def _check_strength(adapter: GGUFHeader, up: TensorInfo) -> None:
    """A change is multiplied by alpha / rank, beside the scale of a request."""
    alpha, rank = adapter.metadata.get(_ALPHA), up.shape[0]
    if isinstance(alpha, float) and abs(alpha) > _MOST_ALPHA * rank:
        _refuse(adapter, f"its {_ALPHA} is {alpha:g}; for the rank {rank} at most {_MOST_ALPHA * rank:g} are possible")


def _check_weights(adapter: GGUFHeader) -> None:
    """Refuse weights that are no numbers: the last layer's norm would make zeros of them, and any answer the same."""
    try:
        bad = _bad_weights(adapter.path, state_of(adapter.path.stat()), adapter.data_offset, adapter.tensors)
    except OSError as error:
        _refuse(adapter, f"it can't be read: {error.strerror or error}")
    if bad is not None:
        _refuse(adapter, f"its {bad!r} has weights that are no numbers, or beyond measure")


@lru_cache(_REMEMBERED)
def _bad_weights(
    path: Path,
    state: State,  # noqa: ARG001  (in another state, it is another file)
    data_offset: int,
    tensors: tuple[TensorInfo, ...],
) -> str | None:
    """Return the name of a tensor with such weights, if there is one."""
    with path.open("rb") as file:
        for tensor in tensors:
            first, step = _HIGHEST[tensor.type_name]
            fine = _FINE_IN_32 if tensor.type_name in ("F32", "BF16") else _FINE_IN_16
            file.seek(data_offset + tensor.offset)
            for done in range(0, tensor.size, _PIECE):
                data = file.read(min(_PIECE, tensor.size - done))
                if data[first::step].translate(None, fine):
                    return tensor.name
    return None


def _dimensions(tensor: TensorInfo) -> _Shape:
    return (*tensor.shape, *(1 for _ in range(4 - len(tensor.shape))))


def _refuse_shapes(adapter: GGUFHeader, down: TensorInfo, up: TensorInfo, base: TensorInfo) -> NoReturn:
    shapes = f"{list(down.shape)} and {list(up.shape)}"
    _refuse(adapter, f"the shapes {shapes} of its {base.name!r} do not go with the model's {list(base.shape)}")


def _refuse(adapter: GGUFHeader, why: str) -> NoReturn:
    raise GGUFError(f"the LoRA adapter {adapter.path} can't be used: {why}")
