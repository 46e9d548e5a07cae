"""A Whisper model as CTranslate2 has it: its dimensions and tokens, and which of its variables are which tensors of
whisper.cpp.

Its files may come from anywhere. A model that whisper.cpp would compute otherwise than it was trained is refused:
another activation, another vocabulary, further variables. This module does not read weights, and knows nothing of
whisper.cpp's files but its names for tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from llamaserve.registry.ctranslate2 import CTranslate2File
from llamaserve.registry.neighbours import decode, read_text, refuse

_LINES, _LIST, _TOKENIZER = "vocabulary.txt", "vocabulary.json", "tokenizer.json"
NEIGHBOURS: Final = (_LINES, _LIST, _TOKENIZER)  # beside the weights; one of them is enough

NOTICE: Final = """\
MIT License

Copyright (c) 2022 OpenAI

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""

MAX_LAYERS: Final = 128  # four times those of the largest
MAX_WIDTH: Final = 8192  # six times
MAX_ANSWER: Final = 4096  # tokens; nine times

_FLOATS: Final = ("F32", "F16", "BF16")
_SPECIFICATION, _REVISION = "WhisperSpec", 3
_WINDOW: Final = 1500  # positions of the 30 seconds that whisper.cpp looks at
_BANDS: Final = (80, 128)
_END, _START = "<|endoftext|>", "<|startoftranscript|>"
_TEXTS: Final = {51864: 50256, 51865: 50257, 51866: 50257}  # tokens in all: English, multilingual, large-v3; of text
_WRITTEN: Final = 50257  # tokens that a file for whisper.cpp has; it makes the others itself

_EMBEDDINGS, _PROJECTION = "decoder/embeddings/weight", "decoder/projection/weight"
_SETTINGS: Final = {  # what each has to be, and what it is if it is left out
    "decoder/activation": (3, 0),  # GELU; the rectifier
    "decoder/alibi": (0, 0),
    "decoder/pre_norm": (1, 1),
    "decoder/scale_embeddings": (0, 1),
    "decoder/start_from_zero_embedding": (0, 0),
}
_IGNORED: Final = frozenset(  # of alignment, which is not in the weights, and of what the settings forbid
    {
        "decoder/alignment_heads",
        "decoder/alignment_layer",
        "decoder/alibi_use_positive_positions",
        "decoder/scale_alibi",
    }
)
_HEADS: Final = ("encoder/num_heads", "decoder/num_heads")


class _Added(msgspec.Struct, frozen=True):
    """A token of tokenizer.json that the others are not merged to."""

    id: int
    content: str


class _Merged(msgspec.Struct, frozen=True):
    """The other tokens of tokenizer.json."""

    vocab: dict[str, int]


class _Tokenizer(msgspec.Struct, frozen=True):
    """tokenizer.json."""

    model: _Merged
    added_tokens: tuple[_Added, ...] = ()


class Tensor(NamedTuple):
    """A tensor of whisper.cpp: its name there, None if it has none, and the values have to be zero; its shape with the
    fastest dimension last; and the variable that is ``of`` such tensors one after another, of which it is number
    ``at``.
    """

    name: str | None
    variable: str
    shape: tuple[int, ...]
    at: int = 0
    of: int = 1


@dataclass(frozen=True)
class WhisperModel:
    """All that is known of a model without its weights. ``window`` is positions, ``answer`` is tokens, ``tokens`` are
    the bytes of those that whisper.cpp does not make itself.
    """

    vocabulary: int
    bands: int
    width: int
    window: int
    audio_heads: int
    audio_layers: int
    answer: int
    text_heads: int
    text_layers: int
    tokens: tuple[bytes, ...]

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors, in the order in which they are written."""
        width = self.width
        yield Tensor("encoder.positional_embedding", "encoder/position_encodings/encodings", (self.window, width))
        yield from _pair("encoder.conv1", "encoder/conv1", (width, self.bands, 3))
        yield from _pair("encoder.conv2", "encoder/conv2", (width, width, 3))
        for layer in range(self.audio_layers):
            yield from self._layer(f"encoder.blocks.{layer}", f"encoder/layer_{layer}", cross=False)
        yield from _norm("encoder.ln_post", "encoder/layer_norm", width)
        yield Tensor("decoder.positional_embedding", "decoder/position_encodings/encodings", (self.answer, width))
        yield Tensor("decoder.token_embedding.weight", _EMBEDDINGS, (self.vocabulary, width))
        for layer in range(self.text_layers):
            yield from self._layer(f"decoder.blocks.{layer}", f"decoder/layer_{layer}", cross=True)
        yield from _norm("decoder.ln", "decoder/layer_norm", width)

    def _layer(self, ours: str, theirs: str, *, cross: bool) -> Iterator[Tensor]:
        width = self.width
        square = (width, width)
        yield from _norm(f"{ours}.attn_ln", f"{theirs}/self_attention/layer_norm", width)
        yield from _joined(f"{ours}.attn", f"{theirs}/self_attention/linear_0", ("query", "key", "value"), width)
        yield from _pair(f"{ours}.attn.out", f"{theirs}/self_attention/linear_1", square)
        if cross:
            yield from _norm(f"{ours}.cross_attn_ln", f"{theirs}/attention/layer_norm", width)
            yield from _joined(f"{ours}.cross_attn", f"{theirs}/attention/linear_0", ("query",), width)
            yield from _joined(f"{ours}.cross_attn", f"{theirs}/attention/linear_1", ("key", "value"), width)
            yield from _pair(f"{ours}.cross_attn.out", f"{theirs}/attention/linear_2", square)
        yield from _norm(f"{ours}.mlp_ln", f"{theirs}/ffn/layer_norm", width)
        yield from _pair(f"{ours}.mlp.0", f"{theirs}/ffn/linear_0", (4 * width, width))
        yield from _pair(f"{ours}.mlp.2", f"{theirs}/ffn/linear_1", (width, 4 * width))


def _pair(ours: str, theirs: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Yield a weight and its bias, which has one value for each row."""
    yield Tensor(f"{ours}.weight", f"{theirs}/weight", shape)
    yield Tensor(f"{ours}.bias", f"{theirs}/bias", shape[:1])


def _norm(ours: str, theirs: str, width: int) -> Iterator[Tensor]:
    yield Tensor(f"{ours}.weight", f"{theirs}/gamma", (width,))
    yield Tensor(f"{ours}.bias", f"{theirs}/beta", (width,))


def _joined(ours: str, theirs: str, names: Sequence[str], width: int) -> Iterator[Tensor]:
    """Yield matrices that are one variable, and their biases. Whisper's keys have none."""
    for at, name in enumerate(names):
        bias = None if name == "key" else f"{ours}.{name}.bias"
        yield Tensor(f"{ours}.{name}.weight", f"{theirs}/weight", (width, width), at, len(names))
        yield Tensor(bias, f"{theirs}/bias", (width,), at, len(names))


def read_whisper(folder: Path, weights: CTranslate2File) -> WhisperModel:
    """Read a model's dimensions from its weights, and its tokens from the folder that they lie in.

    Raises ``SourceError``.
    """
    if (weights.specification, weights.revision) != (_SPECIFICATION, _REVISION):
        found = f"a {weights.specification[:40]!r} in revision {weights.revision}"
        refuse(weights.path.name, f"it is {found}, and only a {_SPECIFICATION!r} in revision {_REVISION} is converted")
    model = _model(folder, weights)
    _check_variables(model, weights)
    return model


def _model(folder: Path, weights: CTranslate2File) -> WhisperModel:
    file = weights.path.name
    vocabulary, width = _shape(weights, _EMBEDDINGS, 2)
    window, _ = _shape(weights, "encoder/position_encodings/encodings", 2)
    answer, _ = _shape(weights, "decoder/position_encodings/encodings", 2)
    _, bands, _ = _shape(weights, "encoder/conv1/weight", 3)
    if vocabulary not in _TEXTS:
        refuse(file, f"it has {vocabulary} tokens, and whisper.cpp knows models of {_either(_TEXTS)}")
    if bands not in _BANDS:
        refuse(file, f"it hears in {bands} bands, and Whisper in {_either(_BANDS)}")
    if window != _WINDOW:
        refuse(file, f"it looks at {window} positions, and whisper.cpp at {_WINDOW}")
    if not (1 <= width <= MAX_WIDTH and 1 <= answer <= MAX_ANSWER):
        refuse(file, f"it is {width} wide and answers with {answer} tokens; {MAX_WIDTH} and {MAX_ANSWER} are the most")
    audio_heads, text_heads = (_heads(weights, name, width) for name in _HEADS)
    audio_layers, text_layers = (_layers(weights, side) for side in ("encoder", "decoder"))
    tokens = _tokens(folder, vocabulary)
    return WhisperModel(
        vocabulary, bands, width, window, audio_heads, audio_layers, answer, text_heads, text_layers, tokens
    )


def _either(numbers: Sequence[int] | dict[int, int]) -> str:
    return " or ".join(str(number) for number in numbers)


def _shape(weights: CTranslate2File, name: str, rank: int) -> tuple[int, ...]:
    variable = weights.variables.get(name)
    if variable is None:
        refuse(weights.path.name, f"its variable {name} is missing")
    if len(variable.shape) != rank:
        refuse(weights.path.name, f"its variable {name} has the shape {list(variable.shape)}, and needs {rank} numbers")
    return variable.shape


def _heads(weights: CTranslate2File, name: str, width: int) -> int:
    heads = weights.integer(name)
    if heads is None or heads < 1 or width % heads:
        refuse(weights.path.name, f"its variable {name} is {heads}, and has to be a number that divides {width}")
    return heads


def _layers(weights: CTranslate2File, side: str) -> int:
    there = (f"{side}/layer_{layer}/self_attention/linear_0/weight" in weights.variables for layer in range(MAX_LAYERS))
    layers = next((layer for layer, found in enumerate(there) if not found), MAX_LAYERS)
    if layers == 0:
        refuse(weights.path.name, f"its {side} has no layers")
    return layers


def _check_variables(model: WhisperModel, weights: CTranslate2File) -> None:
    """Check that the file has all that the model needs, in its shapes, and nothing that would be lost."""
    file, variables = weights.path.name, weights.variables
    needed: dict[str, tuple[int, ...]] = {}
    for tensor in model.tensors():
        needed[tensor.variable] = (tensor.of * tensor.shape[0], *tensor.shape[1:])
    for name, shape in needed.items():
        found = _shape(weights, name, len(shape))
        if found != shape:
            refuse(file, f"its variable {name} has the shape {list(found)}, and {list(shape)} goes with the others")
        if variables[name].dtype not in _FLOATS:
            refuse(
                file, f"its variable {name} is {variables[name].dtype}, not F32, F16 or BF16: it was quantised before"
            )
    matrices = [name for name, shape in needed.items() if len(shape) > 1]
    if len({variables[name].start for name in matrices}) < len(matrices):
        refuse(file, "two of its matrices are one")  # a small file could become a huge one
    if variables.get(_PROJECTION) != variables[_EMBEDDINGS]:
        refuse(file, f"{_PROJECTION} is not {_EMBEDDINGS}, as it is in Whisper")
    _check_settings(weights)
    known = {*needed, *_SETTINGS, *_IGNORED, *_HEADS, _PROJECTION}
    for name in variables:
        if name not in known:
            refuse(file, f"no Whisper model has the variable {name[:100]!r}")


def _check_settings(weights: CTranslate2File) -> None:
    for name, (wanted, default) in _SETTINGS.items():
        value = weights.integer(name) if name in weights.variables else default
        if value != wanted:
            refuse(weights.path.name, f"its variable {name} is {value}, and {wanted} in Whisper")


# ---- tokens -----------------------------------------------------------------------------------------------------


def _tokens(folder: Path, vocabulary: int) -> tuple[bytes, ...]:
    """Return the bytes of the tokens that are written, by their numbers."""
    name, words = _vocabulary(folder)
    texts = _TEXTS[vocabulary]
    if len(words) > vocabulary:
        refuse(name, f"it has {len(words)} tokens, and the weights have {vocabulary}")
    if words[texts : texts + 2] != [_END, _START]:
        refuse(name, f"{_END} and {_START} are not its tokens {texts} and {texts + 1}, as in Whisper")
    table = _bytes_by_letter()
    try:
        spelled = [bytes(table[letter] for letter in word) for word in words[:texts]]
    except KeyError as error:
        refuse(name, f"{error.args[0]!r} stands for no byte in GPT-2's spelling")
    return (*spelled, _END.encode())[:_WRITTEN]


def _vocabulary(folder: Path) -> tuple[str, list[str]]:
    """Return the file that has the tokens, and how it spells them, by their numbers."""
    if (folder / _LINES).exists():
        return _LINES, read_text(folder, _LINES).removesuffix("\n").split("\n")
    if (folder / _LIST).exists():
        return _LIST, decode(folder, _LIST, list[str])
    if not (folder / _TOKENIZER).exists():
        refuse(_LINES, f"it is missing beside the weights, and so are {_LIST} and {_TOKENIZER}")
    tokenizer = decode(folder, _TOKENIZER, _Tokenizer)
    numbered = {number: token for token, number in tokenizer.model.vocab.items()}
    numbered |= {added.id: added.content for added in tokenizer.added_tokens}
    if sorted(numbered) != [*range(len(numbered))]:
        refuse(_TOKENIZER, "its tokens are not numbered one after another")
    return _TOKENIZER, [numbered[number] for number in range(len(numbered))]


def _bytes_by_letter() -> dict[str, int]:
    """Return which byte each letter stands for in GPT-2's spelling: the printable ones of Latin-1 for themselves, and
    those from number 256 on for the others in their order.
    """
    plain = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) not in " \xa0\xad"]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}
