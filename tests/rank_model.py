"""A tiny cross-encoder with random weights: a BERT of two layers that scores pairs of texts, as GGUF file and in numpy.

Its scores mean nothing. They are the same each time, and differ from pair to pair as those of a trained one do. The
vocabulary has a few words and all letters. Knows nothing of what is under test.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf_writer import F32, File, Tensor

CONTEXT = 96
_WIDTH, _INNER, _LAYERS, _HEADS, _EPSILON = 64, 128, 2, 4, 1e-12
_PAD, _UNKNOWN, _CLS, _SEP, _MASK = range(5)
_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_WORDS = ("the", "is", "capital", "paris", "france", "berlin", "germany", "of", "what", "cat", "sea", "blue")
_VOCABULARY = (*_SPECIALS, *_WORDS, *_LETTERS, *".,!?'-", *(f"##{letter}" for letter in _LETTERS))
_RANK_POOLING = 4  # llama_pooling_type
_GELU_TABLE = 10.0  # beyond it the function is 0 or its argument

Array = npt.NDArray[np.float64]


class RankModel:
    """The model. ``labels`` are the numbers that it gives for a pair; the first is the score."""

    def __init__(self, labels: int = 1, seed: int = 1) -> None:
        self._labels = labels
        random = np.random.default_rng(seed)
        self._weights: dict[str, npt.NDArray[np.float32]] = {}
        for name, shape in self._shapes().items():
            values = random.standard_normal(shape)
            if name.endswith("norm.weight"):
                values = 1 + 0.1 * values
            elif len(shape) == 2 and "embd" not in name and "token_types" not in name:
                values *= 1.5 / np.sqrt(shape[1])
            elif len(shape) == 1:
                values *= 0.1
            self._weights[name] = values.astype(np.float32)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the tensors by name, the slowest dimension first."""
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (len(_VOCABULARY), _WIDTH),
            "position_embd.weight": (CONTEXT, _WIDTH),
            "token_types.weight": (2, _WIDTH),
            "token_embd_norm.weight": (_WIDTH,),
            "token_embd_norm.bias": (_WIDTH,),
            "cls.weight": (_WIDTH, _WIDTH),
            "cls.bias": (_WIDTH,),
            "cls.output.weight": (self._labels, _WIDTH),
            "cls.output.bias": (self._labels,),
        }
        for layer in range(_LAYERS):
            for name, rows, columns in (
                *((f"attn_{part}", _WIDTH, _WIDTH) for part in ("q", "k", "v", "output")),
                ("ffn_up", _INNER, _WIDTH),
                ("ffn_down", _WIDTH, _INNER),
            ):
                shapes[f"blk.{layer}.{name}.weight"] = (rows, columns)
                shapes[f"blk.{layer}.{name}.bias"] = (rows,)
            for name in ("attn_output_norm", "layer_output_norm"):
                shapes[f"blk.{layer}.{name}.weight"] = shapes[f"blk.{layer}.{name}.bias"] = (_WIDTH,)
        return shapes

    def write(self, path: Path) -> Path:
        """Write the model as a GGUF file."""
        metadata: dict[str, Any] = {
            "general.architecture": "bert",
            "general.name": "random reranker",
            "general.file_type": 0,
            "bert.context_length": CONTEXT,
            "bert.embedding_length": _WIDTH,
            "bert.block_count": _LAYERS,
            "bert.feed_forward_length": _INNER,
            "bert.attention.head_count": _HEADS,
            "bert.attention.layer_norm_epsilon": _EPSILON,
            "bert.attention.causal": False,
            "bert.pooling_type": _RANK_POOLING,
            "tokenizer.ggml.model": "bert",
            "tokenizer.ggml.tokens": [_spelling(token) for token in _VOCABULARY],
            "tokenizer.ggml.token_type": [3 if token in _SPECIALS else 1 for token in _VOCABULARY],
            "tokenizer.ggml.token_type_count": 2,
            "tokenizer.ggml.bos_token_id": _CLS,
            "tokenizer.ggml.eos_token_id": _SEP,
            "tokenizer.ggml.seperator_token_id": _SEP,
            "tokenizer.ggml.unknown_token_id": _UNKNOWN,
            "tokenizer.ggml.padding_token_id": _PAD,
            "tokenizer.ggml.mask_token_id": _MASK,
        }
        if self._labels > 1:
            metadata["bert.classifier.output_labels"] = [f"label {number}" for number in range(self._labels)]
        tensors = [
            Tensor(name, tuple(reversed(values.shape)), F32, values.astype("<f4").tobytes())
            for name, values in self._weights.items()
        ]
        path.write_bytes(File(metadata, tensors).bytes())
        return path

    def score(self, query: str, document: str) -> Array:
        """Return what the model gives for a pair, by its published definition: ``labels`` numbers."""
        tokens = pair(query, document)
        state = self._of("token_embd")[tokens] + self._of("position_embd")[: len(tokens)] + self._of("token_types")[0]
        state = self._norm(state, "token_embd_norm")
        for layer in range(_LAYERS):
            block = f"blk.{layer}."
            state = self._norm(state + self._attention(state, block), block + "attn_output_norm")
            inner = _gelu(self._linear(state, block + "ffn_up"))
            state = self._norm(state + self._linear(inner, block + "ffn_down"), block + "layer_output_norm")
        return self._linear(np.tanh(self._linear(state[0], "cls")), "cls.output")

    def _attention(self, state: Array, block: str) -> Array:
        query, key, value = (
            self._linear(state, f"{block}attn_{part}").reshape(len(state), _HEADS, -1).swapaxes(0, 1) for part in "qkv"
        )
        scores = query @ key.swapaxes(1, 2) / np.sqrt(_WIDTH / _HEADS)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = (weights / weights.sum(axis=-1, keepdims=True)) @ value
        return self._linear(mixed.swapaxes(0, 1).reshape(len(state), _WIDTH), f"{block}attn_output")

    def _of(self, name: str) -> Array:
        return self._weights[f"{name}.weight"].astype(np.float64)

    def _linear(self, state: Array, name: str) -> Array:
        result: Array = state @ self._of(name).T + self._weights[f"{name}.bias"]
        return result

    def _norm(self, state: Array, name: str) -> Array:
        centred = state - state.mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + _EPSILON)
        normed: Array = scaled * self._of(name) + self._weights[f"{name}.bias"]
        return normed


def _spelling(token: str) -> str:
    """Return a token as GGUF files have it: marked where a word begins, not where it goes on."""
    if token in _SPECIALS:
        return token
    return token.removeprefix("##") if token.startswith("##") else "\u2581" + token


def _gelu(values: Array) -> Array:
    """Return the activation as llama.cpp computes it on a CPU: from a table of 16-bit floats."""
    half = values.astype(np.float16).astype(np.float64)
    exact = 0.5 * half * (1 + np.tanh(np.sqrt(2 / np.pi) * half * (1 + 0.044715 * half * half)))
    table = exact.astype(np.float16).astype(np.float64)
    return np.where(values <= -_GELU_TABLE, 0.0, np.where(values >= _GELU_TABLE, values, table))


def pieces(text: str) -> list[int]:
    """Return the tokens of a text: words and punctuation, each in the longest pieces that there are."""
    tokens: list[int] = []
    for word in re.findall(r"\w+|[^\w\s]", text.lower()):
        found: list[int] = []
        start = 0
        while start < len(word):
            mark = "##" if start else ""
            ends = (end for end in range(len(word), start, -1) if mark + word[start:end] in _VOCABULARY)
            end = next(ends, 0)
            if not end:
                found = [_UNKNOWN]
                break
            found.append(_VOCABULARY.index(mark + word[start:end]))
            start = end
        tokens += found
    return tokens


def pair(query: str, document: str) -> list[int]:
    """Return the tokens that the model sees of a pair."""
    return [_CLS, *pieces(query), _SEP, *pieces(document), _SEP]
