"""A BERT model for sentence embeddings as it is published: what its configuration, vocabulary and pooling say, and
which tensors it has to have.

Its files may come from anywhere. A model that llama.cpp would compute otherwise than it was trained is refused: another
activation, another tokenizer, further layers after the pooling. This module does not read weights, and knows nothing
of GGUF but the names that llama.cpp has for BERT's tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from llamaserve.registry.neighbours import decode, read_text, refuse

_CONFIG, _TOKENIZER, _VOCABULARY = "config.json", "tokenizer_config.json", "vocab.txt"
_MODULES, _POOLING, _CARD = "modules.json", "1_Pooling/config.json", "README.md"
NEIGHBOURS: Final = (_CONFIG, _TOKENIZER, _VOCABULARY, _MODULES, _POOLING, _CARD)  # beside the weights

MAX_LAYERS: Final = 512  # of llama.cpp
IGNORED: Final = frozenset(  # tensors that embeddings are made without
    {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}
)
_SPECIALS: Final = ("cls", "sep", "unk", "pad", "mask")

Pooling = Literal["mean", "cls"]

_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


class _Config(msgspec.Struct, frozen=True):
    """config.json. What is left out is as in transformers."""

    model_type: Literal["bert"]
    architectures: tuple[Literal["BertModel"]]
    hidden_size: _Count
    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=MAX_LAYERS)]
    num_attention_heads: _Count
    intermediate_size: _Count
    max_position_embeddings: _Count
    vocab_size: _Count
    layer_norm_eps: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 1e-12
    type_vocab_size: _Count = 2
    hidden_act: Literal["gelu"] = "gelu"
    position_embedding_type: Literal["absolute"] = "absolute"
    is_decoder: bool | None = False


class _Added(msgspec.Struct, frozen=True):
    """A special token that is written out."""

    content: str


class _TokenizerConfig(msgspec.Struct, frozen=True):
    """tokenizer_config.json. What is left out is as in transformers."""

    tokenizer_class: Literal["BertTokenizer", "BertTokenizerFast"] = "BertTokenizer"
    do_lower_case: bool = True
    strip_accents: bool | None = None
    do_basic_tokenize: bool = True
    tokenize_chinese_chars: bool = True
    cls_token: str | _Added | None = None
    sep_token: str | _Added | None = None
    unk_token: str | _Added | None = None
    pad_token: str | _Added | None = None
    mask_token: str | _Added | None = None


class _Module(msgspec.Struct, frozen=True):
    """A step of modules.json."""

    type: str
    path: str


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a WordPiece vocabulary as their file spells them, the numbers of the special ones by kind
    (``cls``), and how a text is prepared: ``strip_accents`` None is as ``lowercase``.
    """

    tokens: tuple[str, ...]
    specials: dict[str, int]
    lowercase: bool
    strip_accents: bool | None


@dataclass(frozen=True)
class BertModel:
    """All that is known of a model without its weights. ``context`` is tokens."""

    layers: int
    width: int
    heads: int
    feed_forward: int
    context: int
    token_types: int
    norm_epsilon: float
    pooling: Pooling
    vocabulary: Vocabulary
    licence: str | None

    def tensors(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Yield each tensor's name in the model and in GGUF, and its shape with the fastest dimension last."""
        words, width = len(self.vocabulary.tokens), self.width
        for kind, ours, rows in (
            ("word", "token_embd", words),
            ("position", "position_embd", self.context),
            ("token_type", "token_types", self.token_types),
        ):
            yield f"embeddings.{kind}_embeddings.weight", f"{ours}.weight", (rows, width)
        yield from _pair("embeddings.LayerNorm", "token_embd_norm", (width,))
        for layer in range(self.layers):
            yield from self._layer(f"encoder.layer.{layer}", f"blk.{layer}")

    def _layer(self, theirs: str, ours: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        width, inner = self.width, self.feed_forward
        for name, short, shape in (
            ("attention.self.query", "attn_q", (width, width)),
            ("attention.self.key", "attn_k", (width, width)),
            ("attention.self.value", "attn_v", (width, width)),
            ("attention.output.dense", "attn_output", (width, width)),
            ("attention.output.LayerNorm", "attn_output_norm", (width,)),
            ("intermediate.dense", "ffn_up", (inner, width)),
            ("output.dense", "ffn_down", (width, inner)),
            ("output.LayerNorm", "layer_output_norm", (width,)),
        ):
            yield from _pair(f"{theirs}.{name}", f"{ours}.{short}", shape)


def _pair(theirs: str, ours: str, shape: tuple[int, ...]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield a weight and its bias, which has one value for each row."""
    yield f"{theirs}.weight", f"{ours}.weight", shape
    yield f"{theirs}.bias", f"{ours}.bias", shape[:1]


def read_bert(folder: Path) -> BertModel:
    """Read a model's neighbours from a folder, which has them by the names that they have beside the weights.

    Raises ``SourceError``.
    """
    config = decode(folder, _CONFIG, _Config)
    if config.is_decoder:
        refuse(_CONFIG, "is_decoder is true, and only models that see a text as a whole can be converted")
    if config.hidden_size % config.num_attention_heads:
        refuse(_CONFIG, f"{config.num_attention_heads} heads do not divide a width of {config.hidden_size}")
    vocabulary = _vocabulary(folder)
    if len(vocabulary.tokens) != config.vocab_size:
        refuse(_VOCABULARY, f"it has {len(vocabulary.tokens)} tokens, and {_CONFIG} says {config.vocab_size}")
    return BertModel(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        feed_forward=config.intermediate_size,
        context=config.max_position_embeddings,
        token_types=config.type_vocab_size,
        norm_epsilon=config.layer_norm_eps,
        pooling=_pooling(folder, config.hidden_size),
        vocabulary=vocabulary,
        licence=_licence(folder),
    )


# ---- the tokenizer ----------------------------------------------------------------------------------------------


def _vocabulary(folder: Path) -> Vocabulary:
    config = decode(folder, _TOKENIZER, _TokenizerConfig)
    if not (config.do_basic_tokenize and config.tokenize_chinese_chars):
        refuse(_TOKENIZER, "llama.cpp always splits words and Chinese characters, and it says not to")
    lines = read_text(folder, _VOCABULARY).removesuffix("\n").split("\n")
    numbers = {token: number for number, token in enumerate(lines)}
    if len(numbers) < len(lines):
        refuse(_VOCABULARY, "a token is in it twice")
    if "\r" in "".join(lines) or "\0" in "".join(lines):
        refuse(_VOCABULARY, "it holds carriage returns or zero bytes")
    specials = {}
    for kind in _SPECIALS:
        value = getattr(config, f"{kind}_token")
        token = value.content if isinstance(value, _Added) else value or f"[{kind.upper()}]"
        if token not in numbers:
            refuse(_VOCABULARY, f"it lacks the {kind} token {token[:40]!r}")
        specials[kind] = numbers[token]
    return Vocabulary(tuple(lines), specials, config.do_lower_case, config.strip_accents)


# ---- from tokens' vectors to the text's -------------------------------------------------------------------------


def _pooling(folder: Path, width: int) -> Pooling:
    """Return how a text's vector is made. What else follows would be lost, so only a normalisation may."""
    steps = [(module.type.rpartition(".")[2], module.path) for module in decode(folder, _MODULES, tuple[_Module, ...])]
    place = _POOLING.rpartition("/")[0]
    if steps[:2] != [("Transformer", ""), ("Pooling", place)] or [kind for kind, _ in steps[2:]] not in (
        [],
        ["Normalize"],
    ):
        listed = ", ".join(f"{kind} in {path!r}" for kind, path in steps)
        refuse(_MODULES, f"Transformer, Pooling in {place!r} and Normalize can follow each other, not {listed[:200]}")
    config = decode(folder, _POOLING, dict[str, object])
    if config.get("word_embedding_dimension", width) != width:
        refuse(_POOLING, f"its vectors are not {width} wide, as those of the model")
    modes = [mode for mode, chosen in config.items() if mode.startswith("pooling_mode") and chosen]
    if modes not in (["pooling_mode_mean_tokens"], ["pooling_mode_cls_token"]):
        refuse(_POOLING, f"the mean or the CLS token can be taken, not {', '.join(modes)[:200] or 'nothing'}")
    return "mean" if modes == ["pooling_mode_mean_tokens"] else "cls"


def _licence(folder: Path) -> str | None:
    """Return the licence that the model's card names at its head, in the hub's spelling; None without a card."""
    if not (folder / _CARD).exists():
        return None
    head = re.match(r"---\n(.*?)\n---", read_text(folder, _CARD), re.DOTALL)
    found = re.search(r"^license: *['\"]?([a-z0-9.-]{1,40})['\"]? *$", head[1], re.MULTILINE) if head else None
    return found[1] if found else None
