"""The layers of a model as its header describes them: how wide they are, and what each remembers.

The sizes that llama.cpp computes with are mostly those of the tensors, so those are read where a key could be absent.
Source: the models of the llama.cpp in llama-cpp-python 0.3.36. Knows nothing of settings, memory or how anything is
computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llamaserve.registry.gguf import GGUFArray, GGUFHeader, TensorInfo

# Which layers look back over a window only, where the file does not list them: all but every so manieth, and whether
# that is the first of each group. A window that the file does not name, or none.
_WINDOWS = {
    "afmoe": (4, False, None),
    "cohere2": (4, False, None),
    "cohere2moe": (4, True, None),
    "exaone-moe": (4, False, 128),
    "exaone4": (4, False, None),
    "gemma2": (2, False, 4096),
    "gemma3": (6, False, None),
    "gemma3n": (5, False, None),
    "gemma4": (0, False, None),
    "gemma-embedding": (6, False, None),
    "gpt-oss": (2, False, None),
    "granite-swa": (0, False, None),
    "laguna": (4, True, None),
    "llama4": (4, False, 8192),
    "lfm2": (0, False, None),
    "lfm2moe": (0, False, None),
    "maple": (0, False, None),
    "mellum": (4, False, None),
    "mimo2": (0, False, None),
    "modern-bert": (3, True, None),
    "muse-glimmer": (4, False, None),
    "olmo2": (4, False, None),
    "plamo3": (8, False, None),
    "smallthinker": (4, True, None),
    "spark2-5": (0, False, None),
    "step35": (0, False, None),
}
_BOTH = frozenset({"falcon-h1"})  # attention and a state in each layer
_RECURRENT = ("ssm_", "shortconv.", "time_mix_")  # how the tensors of layers with a state are called
_GEMMA3N_OWN_CACHE = 20  # of its layers, the first so many; the others use theirs


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer. Sizes are numbers a token: of the queries of all its ``heads``, and of the ``key`` and ``value`` that
    the cache keeps (0 for what it does not). ``sliding`` layers keep a window of them only. ``latent`` is the rank to
    which DeepSeek's attention compresses keys and values, and ``decompressed`` what becomes of them.

    The feed-forward part has ``forward`` units, or ``experts`` of ``expert_forward`` of which ``used`` work for a
    token, or both. They are ``gated`` by a matrix of their own, or by half of a ``packed`` one. ``state`` is the
    numbers that a recurrent layer keeps for each sequence, ``inner`` the width of its scan, ``mixed`` that of its
    convolution and ``projected`` what goes into both.
    """

    width: int
    heads: int = 0
    query: int = 0
    key: int = 0
    value: int = 0
    indexer: int = 0
    sliding: bool = False
    latent: int = 0
    decompressed: int = 0
    forward: int = 0
    gated: bool = True
    packed: bool = False
    experts: int = 0
    used: int = 0
    expert_forward: int = 0
    state: int = 0
    scan_state: int = 0
    inner: int = 0
    mixed: int = 0
    projected: int = 0


@dataclass(frozen=True)
class ModelLayers:
    """All layers that a model computes with. ``blocks`` is how many the file has: those that predict further tokens are
    not loaded. ``window`` is the tokens that sliding layers see.
    """

    layers: tuple[Layer, ...]
    blocks: int
    width: int
    vocabulary: int
    window: int


def read_layers(header: GGUFHeader) -> ModelLayers:
    """Return the layers of a model. Raises ``GGUFError`` when its file is no longer the one of the header."""
    blocks = header.block_count or 0
    count = max(0, blocks - (header.integer("{arch}.nextn_predict_layers") or 0)) or blocks
    tensors = _by_layer(header.tensors)
    window, sliding = sliding_layers(header, blocks)
    caching = _layers_with_cache(header, count)
    heads = _numbers(header, "attention.head_count", blocks) or [0] * blocks
    shared = _numbers(header, "attention.head_count_kv", blocks) or heads
    reader = _Reader(header)
    layers = tuple(
        reader.layer(tensors.get(number, {}), heads[number], shared[number], sliding[number], number < caching)
        for number in range(count)
    )
    embedding = next((tensor for tensor in header.tensors if tensor.name == "token_embd.weight"), None)
    vocabulary = header.vocabulary_size or (embedding.shape[1] if embedding and len(embedding.shape) > 1 else 0)
    return ModelLayers(layers, blocks, header.embedding_length or 0, vocabulary, window)


def layer_of(name: str) -> int | None:
    """Return which layer a tensor belongs to; None for those of no layer."""
    parts = name.removeprefix("enc.").split(".", 2)
    return int(parts[1]) if len(parts) == 3 and parts[0] == "blk" and parts[1].isdecimal() else None


def _by_layer(tensors: Iterable[TensorInfo]) -> dict[int, dict[str, TensorInfo]]:
    layers: dict[int, dict[str, TensorInfo]] = {}
    for tensor in tensors:
        number = layer_of(tensor.name)
        if number is not None:
            layers.setdefault(number, {})[tensor.name.removeprefix("enc.").split(".", 2)[2]] = tensor
    return layers


def _numbers(header: GGUFHeader, key: str, count: int) -> list[int]:
    """Return a key's value for each layer: the same for all, or one each; empty when it is absent or unusable."""
    name = f"{header.architecture}.{key}"
    value = header.metadata.get(name)
    if isinstance(value, GGUFArray):
        read = [int(each) for each in header.read_array(name, count) if isinstance(each, int)]
        return read + read[-1:] * (count - len(read)) if read else []
    return [] if isinstance(value, bool) or not isinstance(value, int) else [value] * count


def sliding_layers(header: GGUFHeader, blocks: int) -> tuple[int, list[bool]]:
    """Return the tokens of the sliding window, and which layers have one."""
    period, dense_first, default = _WINDOWS.get(header.architecture, (1, False, 0))
    window = header.integer("{arch}.attention.sliding_window")
    window = default if window is None else window
    if not window or header.architecture not in _WINDOWS:
        return 0, [False] * blocks
    key = f"{header.architecture}.attention.sliding_window_pattern"
    if isinstance(header.metadata.get(key), GGUFArray):
        listed = [bool(each) for each in header.read_array(key, blocks)]
        return window, (listed + [False] * blocks)[:blocks]
    named = header.integer(key)
    period = period if named is None else named
    dense = 0 if dense_first else period - 1
    return window, [period == 0 or number % period != dense for number in range(blocks)]


def _layers_with_cache(header: GGUFHeader, count: int) -> int:
    """Return how many layers have a cache of their own; the others use one of these."""
    if header.architecture == "gemma3n":
        return min(count, _GEMMA3N_OWN_CACHE)
    return count - (header.integer("{arch}.attention.shared_kv_layers") or 0)


class _Reader:
    """Reads the layers of one header."""

    def __init__(self, header: GGUFHeader) -> None:
        self._header = header
        self._width = header.embedding_length or 0
        self._used = max(_numbers(header, "expert_used_count", 1), default=0)

    def layer(
        self, tensors: Mapping[str, TensorInfo], heads: int, kv_heads: int, sliding: bool, caching: bool
    ) -> Layer:
        """Return a layer."""
        recurrent = any(name.startswith(_RECURRENT) for name in tensors)
        attends = not recurrent or self._header.architecture in _BOTH
        sizes = self._feed_forward(tensors)
        if recurrent:
            sizes |= self._recurrent(tensors, heads)
        if attends and any(name.startswith(("attn_q", "attn_k")) for name in tensors):
            sizes |= self._attention(tensors, heads, kv_heads if caching else 0, sliding)
        gated, packed = _gated(tensors), _packed(tensors)
        return Layer(width=self._width, sliding=sliding and attends, gated=gated, packed=packed, **sizes)

    def _key(self, name: str) -> int | None:
        return self._header.integer("{arch}." + name)

    def _attention(self, tensors: Mapping[str, TensorInfo], heads: int, kv_heads: int, sliding: bool) -> dict[str, int]:
        head = self._width // heads if heads else 0
        key, value = self._key("attention.key_length") or head, self._key("attention.value_length") or head
        if sliding:
            key = self._key("attention.key_length_swa") or key
            value = self._key("attention.value_length_swa") or value
        sizes = {"heads": heads, "query": heads * key, "key": kv_heads * key, "value": kv_heads * value}
        if self._key("attention.key_length_mla"):  # values are a part of the keys
            decompressed = heads * (self._key("attention.value_length_mla") or value)
            sizes |= {"value": 0, "latent": self._key("attention.kv_lora_rank") or 0, "decompressed": decompressed}
        if "indexer.attn_k.weight" in tensors:
            sizes["indexer"] = self._key("attention.indexer.key_length") or 0
        return sizes

    def _feed_forward(self, tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
        sizes = {}
        down, downs = tensors.get("ffn_down.weight") or tensors.get("ffn_down_shexp.weight"), None
        if down is not None:
            sizes["forward"] = down.shape[0]
        downs = tensors.get("ffn_down_exps.weight")
        if downs is not None and len(downs.shape) == 3:
            sizes |= {"expert_forward": downs.shape[0], "experts": downs.shape[2], "used": self._used}
        return sizes

    def _recurrent(self, tensors: Mapping[str, TensorInfo], heads: int) -> dict[str, int]:
        """Return what llama.cpp keeps for each sequence (its ``n_embd_r`` and ``n_embd_s``), and the widths."""
        width, kernel = self._width, self._key("ssm.conv_kernel") or 0
        if wkv := self._key("wkv.head_size"):
            return {"state": width * ((self._key("token_shift_count") or 2) + wkv), "inner": 2 * width}
        if kept := self._key("shortconv.l_cache"):
            return {"state": width * (kept - 1), "projected": 3 * width, "mixed": width}
        if head := self._key("kda.head_dim"):
            scan = heads * head * head
            convolved = 3 * max(0, (kernel or 4) - 1) * heads * head
            return {"state": scan + convolved, "scan_state": scan, "inner": heads * head, "mixed": 3 * heads * head}
        inner, size = self._key("ssm.inner_size") or 0, self._key("ssm.state_size") or 0
        mixed = inner + 2 * (self._key("ssm.group_count") or 0) * size
        projection = tensors.get("ssm_in.weight")
        return {
            "state": max(0, kernel - 1) * mixed + size * inner,
            "scan_state": size * inner,
            "inner": inner,
            "mixed": mixed,
            "projected": projection.shape[1] if projection is not None else 2 * inner + mixed,
        }


def _gated(tensors: Mapping[str, TensorInfo]) -> bool:
    return not tensors or any(name.startswith("ffn_gate") and "inp" not in name for name in tensors)


def _packed(tensors: Mapping[str, TensorInfo]) -> bool:
    up, down = tensors.get("ffn_up.weight"), tensors.get("ffn_down.weight")
    return up is not None and down is not None and len(up.shape) > 1 and up.shape[1] == 2 * down.shape[0]
