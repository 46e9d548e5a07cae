"""How much memory a Whisper model takes once it is loaded and used to the full.

``estimate_whisper`` follows how the whisper.cpp of pywhispercpp 1.5.1 lays out weights, caches and buffers with flash
attention. Everything comes from the file's header. What grows with the length of the audio beyond one window of 30 s is
not part of it. This module does not know what else is in memory.
"""

from __future__ import annotations

from typing import Final

from llamaserve.engine.params import Footprint
from llamaserve.registry.whisper_file import AUDIO_CONTEXT, WhisperHeader

_MEBIBYTE: Final = 1024 * 1024
_FLOAT: Final = 4  # bytes
_CELLS: Final = 256  # whisper.cpp rounds a cache up to so many
_CELL: Final = 4  # bytes of a number in a cache: one of a key and one of a value, both F16
_FRAMES: Final = 2 * AUDIO_CONTEXT  # of the spectrogram in a window, which is padded with as many
_SAMPLES: Final = 480_000  # of a window
_DECODERS: Final = 5  # for temperatures above 0, or beams
_SPARE: Final = 2  # decoders' caches that whisper.cpp adds to those of several
_GRAPHS: Final = 4 * 1_590_000  # bytes: 4096 tensors in each of four graphs; resident whatever a model's size

# Measured, as the rest of what a process grows by with models of 4 to 24 layers: vocabulary, threads, code.
_REST: Final = 24 * _MEBIBYTE
_DEVICE_CONTEXT: Final = 320 * _MEBIBYTE  # a GPU's driver and kernels: CUDA's, which has the largest


def estimate_whisper(header: WhisperHeader, gpu: bool) -> Footprint:
    """Return what loading a model and ordinary use add to its process's resident memory, and to that of a GPU.

    Use includes the decoders that are tried at higher temperatures, and a prompt as long as can be, which is how every
    window but the first of a longer recording is decoded. After a short recording that is understood at once, less is
    resident, by up to half for the smallest models.
    """
    logits = _prompt(header) * header.vocabulary_size * _FLOAT
    host = Footprint(_GRAPHS + logits + _sampling(header) + _audio(header) + _REST)
    network = header.weight_bytes + _caches(header) + _encoding(header)
    if gpu:
        return host + Footprint(0, network + _decoding(header, header.text_context) + _DEVICE_CONTEXT)
    return host + Footprint(network + _decoding(header, _prompt(header)) + _scratch(header))


def _prompt(header: WhisperHeader) -> int:
    """Return the most tokens before an answer: half a context of what was said before, and what the task is."""
    return header.text_context // 2 + 4


def _caches(header: WhisperHeader) -> int:
    """Return the bytes of keys and values of the decoders, of their view of the audio, and of one encoder layer."""
    text = _padded(header.text_context) * (_DECODERS + _SPARE) * header.text_layers
    audio = _padded(AUDIO_CONTEXT) * (header.text_layers + 1)
    return (text + audio) * header.width * _CELL


def _padded(cells: int) -> int:
    return -(-cells // _CELLS) * _CELLS


def _encoding(header: WhisperHeader) -> int:
    """Return the bytes of the buffers for convolutions, encoder and cross-attention, which whisper.cpp has apart."""
    spectrogram = header.mel_bands * _FRAMES * (_FLOAT + 3 * 2)  # and three frames side by side in F16
    convolutions = 2 * _FRAMES * header.width * _FLOAT  # its result before and after the activation
    encoder = (4 + 3) * AUDIO_CONTEXT * header.width * _FLOAT  # the feed-forward network's, and what goes around it
    cross = AUDIO_CONTEXT * header.width * _FLOAT
    return spectrogram + convolutions + encoder + cross


def _decoding(header: WhisperHeader, tokens: int) -> int:
    """Return the bytes of the decoder's buffer that so many tokens use."""
    return tokens * (header.vocabulary_size + 2 * header.width) * _FLOAT


def _scratch(header: WhisperHeader) -> int:
    """Return the bytes in which a CPU prepares the largest input of a multiplication, as F16 or Q8."""
    return AUDIO_CONTEXT * 4 * header.width * 2


def _sampling(header: WhisperHeader) -> int:
    """Return the bytes of the decoders' logits, probabilities and their logarithms, and of their sorted ones."""
    return _DECODERS * header.vocabulary_size * (3 * _FLOAT + 16)


def _audio(header: WhisperHeader) -> int:
    """Return the bytes of a window's spectrogram with its padding, of the part that is encoded, and of its loudness."""
    return 3 * _FRAMES * header.mel_bands * _FLOAT + _SAMPLES * _FLOAT
