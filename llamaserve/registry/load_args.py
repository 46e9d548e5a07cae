"""What clients say of how a model shall be loaded, as the options of models.yaml.

The ``args`` of ``POST /v1/internal/model/load`` come in the words of text-generation-webui, older and newer, in those
of llama-cpp-python, which both pass on, and in our own. Each word is a key of a table here. A 0 that means "automatic"
leaves the context and rope to models.yaml; everything else is then decided at the load, whatever models.yaml says.
Source: seed-api.md 6.10, read as facts.

Pure translation: this module loads nothing, and knows neither files nor memory.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, Final, NoReturn

import msgspec
from pydantic import TypeAdapter, ValidationError

from llamaserve.errors import InvalidRequest, UnsupportedParameter
from llamaserve.images.values import DiffusionParams
from llamaserve.registry.spec import ModelSpec, RunOptions
from llamaserve.speech.values import TranscriberParams
from llamaserve.worker.protocol import ModelParams

_PLACE = "args"
_LOADER = "llama.cpp"
_SHOWN = 32  # unknown keys of one message
_MEBIBYTE = 1024 * 1024
_MAX_TEXT = 4096
_MAX_DEVICES = 16
_MAX_FACTOR = 10_000
_NOTHING: Final = object()  # read from a value that changes nothing

_Reader = Callable[[object], object]  # raises ValueError for what can't be


@dataclass(frozen=True)
class _Yielding:
    """Read from a value that gives way to another key for the same field: one that leaves it to us, or is of no use
    beside it. Clients send all their words, with such values for those that nobody has touched.
    """

    value: object


@dataclass(frozen=True)
class LoadArgs:
    """Translated arguments: by field of ``RunOptions`` the value, and the key that it is from. ``ignored`` are the keys
    that change nothing, with the values that they have, in the order given.
    """

    overrides: dict[str, object]
    ignored: tuple[str, ...] = ()
    keys: dict[str, str] = field(default_factory=dict)


def translate(args: Mapping[str, object]) -> LoadArgs:
    """Return what arguments mean. Null is as good as not given.

    Raises:
        InvalidRequest: keys are unknown, a value is of a wrong type or out of bounds, or two keys contradict each
            other; ``param`` is the place, such as ``args.n_ctx``.
        UnsupportedParameter: a key asks for something that is not offered here.
    """
    _refuse_unknown(args)
    overrides: dict[str, object] = {}
    keys: dict[str, str] = {}
    ignored: list[str] = []
    given = {key: _read(key, _KEYS[key][1], value) for key, value in args.items() if value is not None}
    for key in sorted(given, key=lambda key: isinstance(given[key], _Yielding)):
        (fields, _), found = _KEYS[key], given[key]
        yields, value = (True, found.value) if isinstance(found, _Yielding) else (False, found)
        if value is _NOTHING or not fields:
            ignored.append(key)
            continue
        for name in fields:
            checked = _within_bounds(key, name, value, args[key])
            if name in overrides and not _same(overrides[name], checked):
                if not yields:
                    _refuse_contradiction(keys[name], key, args)
                ignored.append(key)
                continue
            overrides.setdefault(name, checked)
            keys.setdefault(name, key)
    return LoadArgs(overrides, tuple(key for key in given if key in ignored), keys)


def apply(
    spec: ModelSpec, overrides: Mapping[str, object], keys: Mapping[str, str] = MappingProxyType({})
) -> ModelSpec:
    """Return how the model is run with these overrides. ``keys`` are what the client called the fields.

    Raises:
        InvalidRequest: they do not go together with each other, or with what models.yaml says of the model.
    """
    try:
        return ModelSpec.model_validate(spec.model_dump() | dict(overrides))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        what, name = _in_words(problem["msg"]), str(next(iter(problem["loc"]), ""))
        if name in overrides:
            place = f"{_PLACE}.{keys.get(name, name)}"
            raise InvalidRequest(f"{place}: {what}", param=place) from error
        words = f"{_PLACE}: the model's own {name} does not go with these: {what}; give {name}, too"
        raise InvalidRequest(words, param=_PLACE) from error


def effective(params: ModelParams) -> dict[str, object]:
    """Return what is in force: every option by our name for it, then what newer clients of text-generation-webui look
    for under another one. ``translate`` takes all of it.
    """
    if isinstance(params, DiffusionParams):
        return {"threads": params.threads}
    if isinstance(params, TranscriberParams):
        return {"threads": params.threads, "gpu_layers": "all" if params.gpu else "none"}
    values: dict[str, object] = {
        name: value
        for name, value in msgspec.to_builtins(params).items()
        if name in RunOptions.model_fields and (name != "kv_cells" or params.kv_unified)
    }
    values["spill"] = "auto" if params.spill is None else params.spill // _MEBIBYTE
    values["micro_batch"] = params.micro_batch or params.batch
    values["batch_threads"] = params.batch_threads or params.threads
    values["tensor_split"] = list(params.tensor_split)
    values |= {
        "loader": _LOADER,
        "ctx_size": params.context,
        "batch_size": params.batch,
        "ubatch_size": values["micro_batch"],
        "threads_batch": values["batch_threads"],
        "no_mmap": params.mmap is False,
        "no_kv_offload": not params.gpu_cache,
        "streaming_llm": params.full_window,
    }
    if params.key_type == params.value_type:
        values["cache_type"] = "fp16" if params.key_type == "f16" else params.key_type
    return values


# Readers: a value as a client has it becomes one of ours


def _read(key: str, read: _Reader, value: object) -> object:
    place = f"{_PLACE}.{key}"
    try:
        return read(value)
    except ValueError as error:
        raise InvalidRequest(f"{place}: {error}", param=place) from error
    except UnsupportedParameter as error:
        raise UnsupportedParameter(f"{place}: {error.message}", param=place) from error


def _truth(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError(f"should be true or false, not {_shown(value)}")


def _untruth(value: object) -> bool:
    return not _truth(value)


def _number(value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1 << 62:  # NaN is not either
        return value
    raise ValueError(f"should be a number, not {_shown(value)}")


def _integer(value: object) -> int:
    number = _number(value)
    if number != int(number):
        raise ValueError(f"should be a whole number, not {_shown(value)}")
    return int(number)


def _text(value: object) -> str:
    if isinstance(value, str) and len(value) <= _MAX_TEXT:
        return value
    raise ValueError(f"should be a text of at most {_MAX_TEXT} characters, not {_shown(value)}")


def _zero_is(automatic: object, read: _Reader = _integer) -> _Reader:
    """Return a reader that takes 0 for an automatic value."""

    def reader(value: object) -> object:
        found = read(value)
        return _Yielding(automatic) if found == 0 and not isinstance(found, str | bool) else found

    return reader


def _auto_or(read: _Reader) -> _Reader:
    return lambda value: value if value == "auto" else read(value)


def _layers(below_zero: object) -> _Reader:
    """Return a reader of a number of layers, for which -1 means this."""

    def reader(value: object) -> object:
        if value in ("auto", "all", "none"):
            return value
        return {0: "none", -1: below_zero}.get(number := _integer(value), number)

    return reader


def _cpu_only(value: object) -> object:
    return "none" if _truth(value) else _NOTHING


def _cache_type(value: object) -> object:
    return {"fp16": "f16", "fp32": "f32"}.get(text := _text(value), text)


_GGML_TYPES = {0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 20: "iq4_nl", 30: "bf16"}


def _ggml_type(value: object) -> object:
    """Take ggml's number of a type, too."""
    if isinstance(value, str):
        return _cache_type(value)
    number = _integer(value)
    if number not in _GGML_TYPES:
        raise ValueError(f"no type of a cache has the number {number}; there are {_list(map(str, _GGML_TYPES))}")
    return _GGML_TYPES[number]


def _one_of(*names: str) -> _Reader:
    """Return a reader of a name, or of its number."""

    def reader(value: object) -> object:
        if isinstance(value, str):
            return value
        number = _integer(value)
        if not 0 <= number < len(names):
            raise ValueError(f"should be {_list(names)} or a number from 0 to {len(names) - 1}, not {number}")
        return names[number]

    return reader


_numa_strategy = _one_of("off", "distribute", "isolate", "numactl")
_split_name = _one_of("none", "layer", "row", "tensor")


def _numa(value: object) -> object:
    """Take a truth value as llama-cpp-python does: true distributes."""
    return {True: "distribute", False: "off"}[value] if isinstance(value, bool) else _numa_strategy(value)


def _flash_attention(value: object) -> object:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else _text(value)


def _split_mode(value: object) -> object:
    name = _split_name(value)
    if name == "tensor":
        raise UnsupportedParameter("tensors are not split here; layer, row and none are offered")
    return name


def _row_split(value: object) -> object:
    return "row" if _truth(value) else _NOTHING


def _tensor_split(value: object) -> tuple[float, ...]:
    """Take numbers between commas for the list."""
    shares: Sequence[object]
    if isinstance(value, str):
        parts = [part.strip() for part in _text(value).split(",")]
        if parts == [""]:
            return ()
        if not all(re.fullmatch(r"\d{1,9}(\.\d{1,9})?", part, re.ASCII) for part in parts):
            raise ValueError(f"should be numbers between commas, such as 60,40, not {_shown(value)}")
        shares = [float(part) for part in parts]
    elif isinstance(value, list | tuple):
        shares = value
    else:
        raise ValueError(f"should be a list of numbers, or such as 60,40, not {_shown(value)}")
    if len(shares) > _MAX_DEVICES:
        raise ValueError(f"has shares of {len(shares)} devices; there may be {_MAX_DEVICES}")
    return tuple(_number(share) for share in shares)


def _factor(value: object) -> float:
    number = _number(value)
    if not 1 <= number <= _MAX_FACTOR:
        raise ValueError(f"should be from 1 to {_MAX_FACTOR}, not {_shown(value)}")
    return number


def _alpha(value: object) -> object:
    """Take NTK scaling for the base that it gives a model whose own is 10,000, as text-generation-webui has it."""
    factor = _factor(value)
    return _Yielding(10_000 * factor ** (64 / 63)) if factor > 1 else _NOTHING


def _compression(value: object) -> object:
    factor = _factor(value)
    return 1 / factor if factor > 1 else _NOTHING


_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?) *([kmgt]?)(i?)b?", re.ASCII | re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def _capacity(value: object) -> int:
    """Take bytes, or a text such as 2GiB or 2GB, for MiB."""
    if isinstance(value, str):
        found = _SIZE.fullmatch(value.strip()) if len(value) <= _MAX_TEXT else None
        if found is None:
            raise ValueError(f"should be bytes or a text such as 2GiB or 500MiB, not {_shown(value)}")
        size = float(found[1]) * float(1024 if found[3] else 1000) ** _POWERS[found[2].lower()]
    else:
        size = _number(value)
    if size < 0:
        raise ValueError(f"should not be negative: {_shown(value)}")
    return math.ceil(size / _MEBIBYTE)


def _idle(read: _Reader) -> _Reader:
    """Return a reader of what has no effect here, whatever it says; but it must be well formed."""

    def reader(value: object) -> object:
        read(value)
        return _NOTHING

    return reader


def _number_or_text(value: object) -> object:
    return _text(value) if isinstance(value, str) else _number(value)


def _only(read: _Reader, neutral: tuple[object, ...], why: str) -> _Reader:
    """Return a reader of what is not offered: the neutral values ask for nothing, others are refused."""

    def reader(value: object) -> object:
        found = read(value)
        word = found.strip().lower() if isinstance(found, str) else found
        if word not in neutral:
            raise UnsupportedParameter(why)
        return _NOTHING

    return reader


def _flags(value: object) -> object:
    return "" if value in ([], {}) else _text(value)


_EMPTY = ("", "none")
_NO_DRAFTS = "there are no draft models; guesses come from the text itself (speculation)"


def _key(*fields: str, read: _Reader) -> tuple[tuple[str, ...], _Reader]:
    return fields, read


# Every key: the fields of RunOptions that it sets, and how its values are read.
_KEYS: Final[Mapping[str, tuple[tuple[str, ...], _Reader]]] = MappingProxyType(
    {
        **dict.fromkeys(("context", "ctx_size", "n_ctx", "max_seq_len"), _key("context", read=_zero_is(_NOTHING))),
        **dict.fromkeys(("parallel", "n_seq_max"), _key("parallel", read=_integer)),
        "kv_cells": _key("kv_cells", read=_zero_is(None)),
        **dict.fromkeys(("batch", "batch_size", "n_batch"), _key("batch", read=_integer)),
        **dict.fromkeys(("micro_batch", "ubatch_size", "n_ubatch"), _key("micro_batch", read=_zero_is(None))),
        **dict.fromkeys(("threads", "n_threads"), _key("threads", read=_auto_or(_zero_is("auto")))),
        **dict.fromkeys(
            ("batch_threads", "threads_batch", "n_threads_batch"), _key("batch_threads", read=_zero_is(None))
        ),
        "gpu_layers": _key("gpu_layers", read=_layers(_Yielding("auto"))),
        "n_gpu_layers": _key("gpu_layers", read=_layers("all")),
        "cpu": _key("gpu_layers", read=_cpu_only),
        **dict.fromkeys(("flash_attention", "flash_attn"), _key("flash_attention", read=_flash_attention)),
        "cache_type": _key("key_type", "value_type", read=_cache_type),
        **dict.fromkeys(("key_type", "cache_type_k"), _key("key_type", read=_cache_type)),
        **dict.fromkeys(("value_type", "cache_type_v"), _key("value_type", read=_cache_type)),
        "type_k": _key("key_type", read=_ggml_type),
        "type_v": _key("value_type", read=_ggml_type),
        "prefix_cache": _key("prefix_cache", read=_truth),
        "spill": _key("spill", read=_auto_or(_integer)),
        "cache_capacity": _key("spill", read=_capacity),
        "speculation": _key("speculation", read=_truth),
        "queue": _key("queue", read=_integer),
        "time_limit": _key("time_limit", read=_zero_is(None, _number)),
        "keep_alive": _key("keep_alive", read=_number_or_text),
        **dict.fromkeys(("mmap", "use_mmap"), _key("mmap", read=_truth)),
        "no_mmap": _key("mmap", read=_untruth),
        **dict.fromkeys(("mlock", "use_mlock"), _key("mlock", read=_truth)),
        "numa": _key("numa", read=_numa),
        **dict.fromkeys(("gpu_cache", "offload_kqv"), _key("gpu_cache", read=_truth)),
        **dict.fromkeys(("no_kv_offload", "no_offload_kqv"), _key("gpu_cache", read=_untruth)),
        "tensor_split": _key("tensor_split", read=_tensor_split),
        "split_mode": _key("split_mode", read=_split_mode),
        "row_split": _key("split_mode", read=_row_split),
        "rope_freq_base": _key("rope_freq_base", read=_zero_is(_NOTHING, _number)),
        "alpha_value": _key("rope_freq_base", read=_alpha),
        "rope_freq_scale": _key("rope_freq_scale", read=_zero_is(_NOTHING, _number)),
        "compress_pos_emb": _key("rope_freq_scale", read=_compression),
        **dict.fromkeys(("full_window", "streaming_llm", "swa_full"), _key("full_window", read=_truth)),
        # Without effect: seeds are the requests', and log-probabilities and free memory are seen to in any case.
        **dict.fromkeys(("llama_cpp_seed", "seed"), _key(read=_idle(_integer))),
        **dict.fromkeys(("logits_all", "tensorcores"), _key(read=_idle(_truth))),
        "attention_sink_size": _key(read=_idle(_integer)),
        "fit_target": _key(read=_idle(_number_or_text)),
        # What is not offered, and the details of it, which do nothing alone.
        "loader": _key(read=_only(_text, (_LOADER, "llamacpp"), f"{_LOADER} is the only loader")),
        "mmproj": _key(read=_only(_text, _EMPTY, "images and sounds are not offered")),
        **dict.fromkeys(("model_draft", "draft_model"), _key(read=_only(_text, _EMPTY, _NO_DRAFTS))),
        "spec_type": _key(read=_only(_text, _EMPTY, _NO_DRAFTS)),
        "cpu_moe": _key(read=_only(_truth, (False,), "experts are not kept apart; gpu_layers keeps whole layers")),
        "ik": _key(read=_only(_truth, (False,), f"{_LOADER} is used, not a fork of it")),
        "no_mul_mat_q": _key(read=_only(_truth, (False,), f"{_LOADER} can't be told this any more")),
        "extra_flags": _key(read=_only(_flags, _EMPTY, f"flags for {_LOADER}'s own server have no use here")),
        **dict.fromkeys(
            ("draft_max", "draft_min", "draft_p_min", "gpu_layers_draft", "ctx_size_draft", "device_draft"),
            _key(read=_idle(_number_or_text)),
        ),
        **dict.fromkeys(
            ("spec_ngram_size_n", "spec_ngram_size_m", "spec_ngram_min_hits"), _key(read=_idle(_number_or_text))
        ),
    }
)


def _refuse_unknown(args: Mapping[str, object]) -> None:
    unknown = [key for key in args if key not in _KEYS]
    if not unknown:
        return
    words = [f"{_shown(key)}{_did_you_mean(key)}" for key in unknown[:_SHOWN]]
    if len(unknown) > _SHOWN:
        words.append(f"and {len(unknown) - _SHOWN} more")
    raise InvalidRequest(f"{_PLACE}: nothing is known of {_list(words)}", param=_PLACE)


def _refuse_contradiction(first: str, second: str, args: Mapping[str, object]) -> NoReturn:
    said = " and ".join(f"{key} ({_shown(args[key])})" for key in (first, second))
    raise InvalidRequest(f"{_PLACE}: {said} contradict each other; give one of them", param=f"{_PLACE}.{second}")


def _same(first: object, second: object) -> bool:
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second)
    return first == second


@functools.cache
def _checker(name: str) -> TypeAdapter[Any]:
    """Return what checks the values of one field of ``RunOptions`` alone."""
    info = RunOptions.model_fields[name]
    kind: Any = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
    return TypeAdapter(kind)


def _within_bounds(key: str, name: str, value: object, given: object) -> object:
    """Return the value as the field has it."""
    place = f"{_PLACE}.{key}"
    try:
        checked: object = _checker(name).validate_python(value)
    except ValidationError as error:
        what = _in_words(error.errors(include_url=False)[0]["msg"])
        shown = "" if ", not " in what else f", not {_shown(given)}"
        raise InvalidRequest(f"{place}: {what}{shown}", param=place) from error
    return checked


def _in_words(message: str) -> str:
    return message.removeprefix("Value error, ").replace("Input should", "should")


def _shown(value: object) -> str:
    if isinstance(value, list | tuple | dict):  # may be large
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    try:
        text = repr(value[:80] if isinstance(value, str) else value)
    except ValueError:  # Python does not write out an integer of thousands of digits
        return "this number"
    return text if len(text) <= 80 else text[:77] + "..."


def _did_you_mean(key: str) -> str:
    near = difflib.get_close_matches(key.lower(), _KEYS, n=2, cutoff=0.7) if len(key) <= 40 else []
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _list(words: Iterable[str]) -> str:
    return ", ".join(words)
