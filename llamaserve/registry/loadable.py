"""Refuses GGUF headers that are well formed and still make llama.cpp abort, hang or allocate without bound.

What llama.cpp refuses cleanly by itself (a wrong tensor shape, a key of the wrong type, an unknown architecture) is
left to it. Source: the loader of the llama.cpp in llama-cpp-python 0.3.36, read and tried with broken files.

This module knows nothing of names, sources or memory, and does not import llama.cpp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llamaserve.errors import GGUFError
from llamaserve.registry.gguf import GGUFArray, GGUFHeader, ValueType
from llamaserve.registry.layers import sliding_layers

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
_LEAST_CONTEXT = 4  # tokens: what an encoder wants around a text, and something between
_LEAST_BUCKETS = 4  # of distances in T5, for those before and behind

_NOT_ALONE = {
    "clip": "a vision or audio projector (mmproj), which only works beside its language model",
    "eagle3": "a draft model for speculative decoding, which only works beside its target model",
    "dflash": "a draft model for speculative decoding, which only works beside its target model",
    "gemma4-assistant": "a draft model for speculative decoding, which only works beside its target model",
    "wavtokenizer-dec": "an audio codec, not a language model",
    **dict.fromkeys(
        ("flux", "lumina2", "qwen_image", "sd1", "sd3", "sdxl", "wan"),
        "a diffusion model, which is for images: list it in models.yaml with `task: image`, and with its `parts`",
    ),
}
_NOT_A_MODEL = {"adapter": "a LoRA adapter", "mmproj": "a projector", "imatrix": "an importance matrix"}
# These architectures assert that there are experts, or divide by their number.
_ALWAYS_EXPERTS = frozenset(
    {
        "bailingmoe2",
        "glm4moe",
        "grovemoe",
        "lfm2moe",
        "llada-moe",
        "mellum",
        "qwen2moe",
        "qwen35moe",
        "qwen3moe",
        "qwen3next",
        "qwen3vlmoe",
        "qwen4exp",
        "rnd1",
        "smallthinker",
    }
)
# In these, a layer without key/value heads may have weights of that name: linear attention.
_MIXED_ATTENTION = frozenset({"kimi-linear", "kimi-k3", "bailingmoe3", "glm5-next", "minimax-01", "deci"})
# Encoders of which positions are not rotated into queries and keys.
_WITHOUT_ROPE = frozenset({"bert", "jina-bert-v2", "t5encoder"})
_NO_WEIGHTS = frozenset({"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"})  # intermediates and plain numbers
_ROPE_SCALING = frozenset({"none", "linear", "yarn", "longrope"})

# Key: smallest and largest value. The upper bounds are far above any model; past them llama.cpp's 32-bit sums wrap.
_RANGES = {
    "{arch}.block_count": (1, MAX_LAYERS),
    "{arch}.context_length": (1, 2**31 - 1),
    "{arch}.embedding_length": (1, 1 << 20),
    "{arch}.embedding_length_out": (0, 1 << 20),
    "{arch}.feed_forward_length": (0, 1 << 24),
    "{arch}.vocab_size": (0, 1 << 24),
    "{arch}.expert_count": (0, MAX_EXPERTS),
    "{arch}.attention.head_count": (0, 1 << 16),
    "{arch}.attention.head_count_kv": (0, 1 << 16),
    "{arch}.attention.key_length": (0, 1 << 16),
    "{arch}.attention.value_length": (0, 1 << 16),
    "{arch}.rope.dimension_count": (0, 1 << 16),
    "{arch}.classifier.pooling_type": (0, 4),
    # llama.cpp divides by these, or asserts that they are positive.
    "{arch}.full_attention_interval": (1, MAX_LAYERS),
    "{arch}.num_loops": (1, MAX_LAYERS),
    "{arch}.hrm.layers_per_stack": (1, MAX_LAYERS),
    "{arch}.hrm.h_cycles": (1, MAX_LAYERS),
    "{arch}.hrm.l_cycles": (1, MAX_LAYERS),
    "{arch}.experts_per_group": (1, MAX_EXPERTS),
}
# For these architectures llama.cpp divides by the key.
_DIVISORS = {
    "ssm.group_count": ("mamba2", "granitehybrid", "falcon-h1", "nemotron_h", "nemotron_h_moe"),
    "wkv.head_size": ("rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"),
}


@dataclass(frozen=True, slots=True)
class _Specials:
    """What llama.cpp assumes of a tokenizer unless the file says otherwise: token numbers, and which are added; those
    that are ``needed`` are put in whatever the file says.
    """

    bos: int | None = None
    eos: int | None = None
    sep: int | None = None
    unk: int | None = None
    adds: frozenset[str] = frozenset()
    needed: frozenset[str] = frozenset()


_SPECIALS = {
    "llama": _Specials(bos=1, eos=2, adds=frozenset({"bos"})),
    "bert": _Specials(bos=101, sep=102, unk=100, needed=frozenset({"bos", "sep", "unk"})),
    "gpt2": _Specials(bos=11, eos=11),
    "hybriddna": _Specials(bos=11, eos=11),
    "whitespace": _Specials(bos=11, eos=11),
    "t5": _Specials(eos=1, adds=frozenset({"eos"})),
    "gemma4": _Specials(adds=frozenset({"bos"})),
}
_PRE_ADDS_BOS = frozenset(
    {
        "llama3",
        "llama-v3",
        "llama-bpe",
        "falcon3",
        "falcon-h1",
        "pixtral",
        "midm-2.0",
        "lfm2",
        "jina-v5-nano",
        "tekken",
        "chameleon",
        "gemma4",
        "granite-embed-multi-311m",
    }
)
_PRE_WITHOUT_BOS = frozenset({"chatglm-bpe", "glm4", "glm5"})
_TOKEN_ID_KEYS = {"bos": "bos", "eos": "eos", "sep": "seperator", "unk": "unknown"}  # the file format's own spelling


def check_loadable(header: GGUFHeader) -> None:
    """Refuse a model that would make llama.cpp abort, hang or allocate without bound, at load or on the first request.

    Raises:
        GGUFError: The message says which value is at fault.
    """
    for check in (
        _check_kind,
        _check_ranges,
        _check_layers,
        _check_experts,
        _check_encoder,
        _check_windows,
        _check_floats,
        _check_outputs,
        _check_dense,
        _check_tensor_types,
        _check_tokenizer,
        _check_vocabulary,
        _check_special_tokens,
    ):
        check(header)


def other_kind(header: GGUFHeader) -> str | None:
    """Return what a file is that is no model to be served by itself, in words; None for a model."""
    return _NOT_ALONE.get(header.architecture) or _NOT_A_MODEL.get(header.text("general.type") or "")


def _damaged(header: GGUFHeader, what: str) -> GGUFError:
    return GGUFError(f"{header.path} cannot be loaded: {what}", hint="fetch another file of this model")


def _integer(header: GGUFHeader, key: str) -> int | None:
    """Return an integer; None when absent. An array is None, too: the caller reads it by ``_integers``."""
    name = key.replace("{arch}", header.architecture)
    value = header.metadata.get(name)
    if value is None or isinstance(value, GGUFArray):
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise _damaged(header, f"{name} is {value!r}, not an integer")
    return value


def _integers(header: GGUFHeader, key: str) -> list[int]:
    """Return an integer or a per-layer array of integers as a list; empty when absent."""
    name = key.replace("{arch}", header.architecture)
    array = header.metadata.get(name)
    if not isinstance(array, GGUFArray):
        value = _integer(header, key)
        return [] if value is None else [value]
    if array.type in (ValueType.STRING, ValueType.FLOAT32, ValueType.FLOAT64):
        raise _damaged(header, f"{name} is an array of {array.type.name.lower()}, not of integers")
    if array.count > MAX_LAYERS:
        raise _damaged(header, f"{name} has {array.count} elements; llama.cpp has room for {MAX_LAYERS} layers")
    return [int(value) for value in header.read_array(name)]


def _check_kind(header: GGUFHeader) -> None:
    kind = other_kind(header)
    if kind:
        raise GGUFError(f"{header.path} cannot be served: it is {kind}")
    if not header.tensors:
        raise GGUFError(f"{header.path} cannot be served: it holds no weights, only metadata")


def _check_ranges(header: GGUFHeader) -> None:
    for key, (smallest, largest) in _RANGES.items():
        for value in _integers(header, key):
            if not smallest <= value <= largest:
                name = key.replace("{arch}", header.architecture)
                raise _damaged(header, f"{name} is {value}; {smallest} to {largest} is possible")
    for key, architectures in _DIVISORS.items():
        if header.architecture in architectures and _integer(header, "{arch}." + key) == 0:
            raise _damaged(header, f"{header.architecture}.{key} is 0")


def _check_layers(header: GGUFHeader) -> None:
    layers = _integer(header, "{arch}.block_count")
    if layers is None:
        raise _damaged(header, f"{header.architecture}.block_count is missing")
    if (_integer(header, "{arch}.nextn_predict_layers") or 0) > layers:
        raise _damaged(header, f"more layers predict further tokens (nextn_predict_layers) than there are: {layers}")
    if header.architecture == "llama4" and layers < 4:  # every fourth layer is special; an input stays unused without
        raise _damaged(header, f"a llama4 of {layers} layers is too small; four are the least")
    if layers * (_integer(header, "{arch}.num_loops") or 1) > MAX_LAYERS:
        raise _damaged(header, f"{layers} layers, looped, are more than {MAX_LAYERS}")
    key = "{arch}.attention.head_count_kv"
    heads = _integers(header, key)
    if 0 in heads and len(heads) > 1 and header.architecture not in _MIXED_ATTENTION:
        names = {tensor.name for tensor in header.tensors}
        for layer, count in enumerate(heads):
            if count == 0 and f"blk.{layer}.attn_k.weight" in names:
                raise _damaged(header, f"layer {layer} has attention weights and no key/value heads (head_count_kv)")


def _check_experts(header: GGUFHeader) -> None:
    experts = _integer(header, "{arch}.expert_count") or 0
    used = max(_integers(header, "{arch}.expert_used_count"), default=0)
    groups = _integer(header, "{arch}.expert_group_count") or 0
    groups_used = _integer(header, "{arch}.expert_group_used_count") or 0
    if experts <= 1 and header.architecture in ("hunyuan_vl", "hunyuan-dense"):
        experts = used = 0  # as llama.cpp does for these
    if used > experts or (experts and not used):
        raise _damaged(header, f"{used} experts of {experts} are used (expert_used_count, expert_count)")
    if experts == 0 and header.architecture in _ALWAYS_EXPERTS:
        raise _damaged(header, f"the architecture {header.architecture} needs an expert_count above 0")
    if groups and groups >= experts:
        raise _damaged(header, f"{experts} experts are in {groups} groups (expert_group_count)")
    if groups > 1 and (experts % groups or not 0 < groups_used < groups):
        raise _damaged(header, f"{experts} experts are in {groups} groups of which {groups_used} are used")


def _check_encoder(header: GGUFHeader) -> None:
    """Refuse an encoder in which no text has room, or whose heads do not fit to each other or to the weights. Of
    decoders llama.cpp sees this by the shapes of their tensors.
    """
    if header.remembers:
        return
    if (header.context_length or _LEAST_CONTEXT) < _LEAST_CONTEXT:
        raise _damaged(header, f"{header.architecture}.context_length is {header.context_length}; no text has room")
    heads = next(iter(_integers(header, "{arch}.attention.head_count")), 0)
    shared = next(iter(_integers(header, "{arch}.attention.head_count_kv")), heads)
    if not heads or not shared or heads % shared:
        raise _damaged(header, f"{heads} heads share {shared} of keys and values (head_count, head_count_kv)")
    default = (header.embedding_length or 0) // heads
    lengths = {
        name: default if (value := _integer(header, f"{{arch}}.attention.{name}")) is None else value
        for name in ("key_length", "value_length")
    }
    key, value = lengths.values()
    for name in ("key_length_swa", "value_length_swa"):
        lengths[name] = _integer(header, f"{{arch}}.attention.{name}") or key
    if not key or len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise _damaged(header, f"its heads must have keys and values of one length; it has {told}")
    for tensor in header.tensors:
        if tensor.name.endswith(("attn_output.weight", "attn_o.weight")) and tensor.shape[0] != heads * value:
            raise _damaged(header, f"{heads} heads of {value} do not fit to the tensor {tensor.name!r} {tensor.shape}")
    _check_rope(header, key)
    if header.architecture == "jina-bert-v2":
        _check_jina(header)
    if header.architecture == "t5encoder":
        _check_t5(header)


def _check_rope(header: GGUFHeader, head: int) -> None:
    for name in ("dimension_count", "dimension_count_swa"):
        rotated = _integer(header, f"{{arch}}.rope.{name}")
        rotated = head if rotated is None else rotated
        if header.architecture not in _WITHOUT_ROPE and (rotated % 2 or not 0 < rotated <= head):
            raise _damaged(header, f"of heads with {head} dimensions {rotated} are rotated (rope.{name})")


def _check_jina(header: GGUFHeader) -> None:
    """The layer inside may be twice as wide as it is said to be, with a gate in it."""
    forward = _integer(header, "{arch}.feed_forward_length") or 0
    for tensor in header.tensors:
        if tensor.name.endswith("ffn_up.weight") and tensor.shape[-1] not in (forward, 2 * forward):
            raise _damaged(header, f"feed_forward_length is {forward}, and the tensor {tensor.name!r} {tensor.shape}")


def _check_t5(header: GGUFHeader) -> None:
    buckets = _integer(header, "{arch}.attention.relative_buckets_count")
    if buckets is not None and buckets < _LEAST_BUCKETS:
        raise _damaged(header, f"attention.relative_buckets_count is {buckets}; {_LEAST_BUCKETS} are the least")
    if not any(tensor.name == "enc.blk.0.attn_rel_b.weight" for tensor in header.tensors):
        raise _damaged(header, "the tensor 'enc.blk.0.attn_rel_b.weight' is missing")


def _check_windows(header: GGUFHeader) -> None:
    """Refuse an encoder whose layers all have a sliding window, or none: llama.cpp fills in the masks of both kinds."""
    if header.architecture not in ("modern-bert", "gemma-embedding"):
        return
    layers = _integer(header, "{arch}.block_count") or 0
    window, sliding = sliding_layers(header, layers)
    if (window or header.architecture == "gemma-embedding") and len(set(sliding)) < 2:
        raise _damaged(header, f"{sum(sliding)} of its {layers} layers have a sliding window; it must be some, not all")


def _check_floats(header: GGUFHeader) -> None:
    prefix = header.architecture + "."
    for key, value in header.metadata.items():
        if not key.startswith(prefix) or not isinstance(value, float):
            continue
        positive = key.endswith("epsilon") or "freq_base" in key
        if math.isnan(value) or (positive and not 0 <= value < math.inf):
            raise _damaged(header, f"{key} is {value}")
    scaling = header.metadata.get(prefix + "rope.scaling.type")
    if scaling is not None and scaling not in _ROPE_SCALING:
        raise _damaged(header, f"{prefix}rope.scaling.type is {scaling!r}, none of {', '.join(sorted(_ROPE_SCALING))}")


def _check_outputs(header: GGUFHeader) -> None:
    """Refuse outputs that are wider than the tensors that make them: reading them leaves the buffer."""
    if header.pooling_type not in (None, 0, 1, 2, 3, 4):
        raise _damaged(header, f"pooling_type is {header.pooling_type}, which llama.cpp does not know")
    labels = header.metadata.get(f"{header.architecture}.classifier.output_labels")
    widths = {
        "embedding_length_out": _integer(header, "{arch}.embedding_length_out") or 0,
        "classifier.output_labels": labels.count if isinstance(labels, GGUFArray) else 0,
    }
    inner = ("blk.", "token_embd.", "output.", "output_norm.")
    made = {dim for tensor in header.tensors if not tensor.name.startswith(inner) for dim in tensor.shape}
    for key, width in widths.items():
        is_another = width > (header.embedding_length or 0) if key.startswith("classifier") else width
        if is_another and width not in {*made, header.embedding_length}:
            raise _damaged(header, f"{header.architecture}.{key} asks for {width} outputs, which no tensor gives")


def _check_dense(header: GGUFHeader) -> None:
    """Refuse layers behind the last that do not fit to each other: what comes out must be as wide as vectors are."""
    before = width = header.embedding_length or 0
    for key in ("dense_2_feat_in", "dense_3_feat_out"):
        if (_integer(header, f"{{arch}}.{key}") or width) != width:
            raise _damaged(header, f"{header.architecture}.{key} must be {width}")
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    dense = [shapes[name] for name in ("dense_2.weight", "dense_3.weight") if name in shapes]
    for shape in dense:
        if shape[0] != before:
            raise _damaged(header, f"its dense layers do not fit to each other: one of {shape} comes after {before}")
        before = shape[-1]
    if dense and before != (_integer(header, "{arch}.embedding_length_out") or width):
        raise _damaged(header, f"its last dense layer gives {before} numbers, and its vectors have another length")


def _check_tensor_types(header: GGUFHeader) -> None:
    """Refuse weights in types that ggml's kernels cannot multiply by: they abort or read beyond their tables."""
    for tensor in header.tensors:
        must_be_f32 = tensor.name.endswith(("norm.weight", ".bias"))
        if (must_be_f32 and tensor.type_name != "F32") or (
            tensor.name.endswith(".weight")
            and tensor.type_name in _NO_WEIGHTS
            and not tensor.name.endswith("_tid2eid.weight")  # a table of expert numbers
        ):
            raise _damaged(header, f"llama.cpp cannot compute with the tensor {tensor.name!r} in {tensor.type_name}")


def _check_tokenizer(header: GGUFHeader) -> None:
    model = header.text("tokenizer.ggml.model")
    if model in ("none", "no_vocab", "test"):
        raise GGUFError(f"{header.path} cannot be served: it has no vocabulary (tokenizer.ggml.model is {model!r})")
    if header.vocabulary_size == 0:
        raise _damaged(header, "its vocabulary (tokenizer.ggml.tokens) is missing, empty or no list of texts")
    types = header.metadata.get("tokenizer.ggml.token_type")
    if model == "bert" and isinstance(types, GGUFArray) and types.type is ValueType.INT32:
        byte = 6  # LLAMA_TOKEN_TYPE_BYTE
        if byte in header.read_array("tokenizer.ggml.token_type"):
            raise _damaged(header, "its bert vocabulary has byte tokens (tokenizer.ggml.token_type), which cannot be")


def _check_vocabulary(header: GGUFHeader) -> None:
    """Refuse tokens that occur twice, and a sentencepiece vocabulary that cannot spell every text."""
    tokens = header.tokens()
    for number, token in enumerate(tokens):  # as llama.cpp reads them
        if b"\0" in token:
            tokens[number] = token = token[: token.index(b"\0")]
        if not token:
            tokens[number] = b"[EMPTY_%d]" % number
    known = set(tokens)
    if len(known) < len(tokens):
        seen: set[bytes] = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))  # type: ignore[func-returns-value]
        raise _damaged(header, f"the token {twice[:40].decode(errors='replace')!r} is in its vocabulary twice")
    if header.text("tokenizer.ggml.model") != "llama":
        return
    in_utf8 = [*range(0xC0), *range(0xC2, 0xF5)]
    missing = [byte for byte in in_utf8 if b"<0x%02X>" % byte not in known and bytes([byte]) not in known]
    if missing:
        raise _damaged(header, f"its vocabulary lacks tokens for {len(missing)} bytes, the first 0x{missing[0]:02X}")


def _check_special_tokens(header: GGUFHeader) -> None:
    """Refuse a tokenizer that adds a token it does not have."""
    model = header.text("tokenizer.ggml.model") or ""
    pre = header.text("tokenizer.ggml.pre") or ""
    specials = _SPECIALS.get(model)
    if specials is None:
        return
    for kind, name in _TOKEN_ID_KEYS.items():
        if kind in ("sep", "unk") and model != "bert":
            continue
        token = getattr(specials, kind)
        if kind == "bos" and model == "gpt2" and pre in _PRE_WITHOUT_BOS:
            token = None
        declared = _integer(header, f"tokenizer.ggml.{name}_token_id")
        if declared is not None and 0 <= declared < header.vocabulary_size:
            token = declared
        adds = kind in specials.adds or (kind == "bos" and model == "gpt2" and pre in _PRE_ADDS_BOS)
        told = header.metadata.get(f"tokenizer.ggml.add_{kind}_token")
        adds = told if isinstance(told, bool) and pre not in ("gemma4", "granite-embed-multi-311m") else adds
        adds = adds or kind in specials.needed
        if adds and (token is None or token >= header.vocabulary_size):
            raise _damaged(header, f"its tokenizer adds a {kind} token, which it does not have or name")
