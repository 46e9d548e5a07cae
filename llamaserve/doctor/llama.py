"""What llama.cpp says, asked in a child process with a time limit: it may crash or hang while it starts.

This is the asking side, and does not load it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TypeVar

import msgspec

from llamaserve.engine.events import Device

BUILD_LIMIT = 60.0  # seconds; a first start of CUDA may compile its kernels
VOCABULARY_LIMIT = 30.0
_LAST_WORDS = 3  # lines of standard error that explain an end


class Build(msgspec.Struct, frozen=True):
    """What llama.cpp was compiled for: whether for GPUs, its own words, and the GPUs that it can use."""

    gpu: bool
    system_info: str
    devices: list[Device]

    @property
    def features(self) -> frozenset[str]:
        """The processor's features that it uses, by llama.cpp's names, such as ``AVX2``."""
        settings = (part.rpartition(":")[2].partition("=") for part in self.system_info.split("|"))
        return frozenset(name.strip() for name, _, value in settings if value.strip() not in ("", "0"))

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that say something of themselves, such as ``CPU`` and ``CUDA``."""
        return tuple(part.rpartition(":")[0].strip() for part in self.system_info.split("|") if ":" in part)


class Question(msgspec.Struct, frozen=True):
    """A whole prompt, what a template writes behind an answer, and names of tokens that the vocabulary may have."""

    prompt: str
    ending: str
    controls: list[str]


class Vocabulary(msgspec.Struct, frozen=True):
    """How a model reads texts: whether a begin token is added to prompts, and with how many the prompt then ``begins``.

    The ``marker`` is the first token of the ending that ends answers; where there is none, the first control token.
    ``controls`` are those of the names that are control tokens.
    """

    adds_begin: bool
    begins: int
    marker: str | None
    marker_ends: bool
    controls: list[str]


class NoAnswer(Exception):
    """The child process ended or was too slow; the message is how. ``crash`` is the signal that ended it."""

    def __init__(self, how: str, crash: int | None = None) -> None:
        super().__init__(how)
        self.crash = crash


def read_build(module: str = "llamaserve.doctor.llama_child", limit: float = BUILD_LIMIT) -> Build:
    """Return what llama.cpp says of its build. Raises ``NoAnswer``."""
    return _ask(Build, module, ("build",), b"", limit)


def read_vocabulary(path: str, question: Question) -> Vocabulary:
    """Return how the model in a file reads texts. Raises ``NoAnswer``."""
    words = ("vocabulary", path)
    return _ask(Vocabulary, "llamaserve.doctor.llama_child", words, msgspec.json.encode(question), VOCABULARY_LIMIT)


_Answer = TypeVar("_Answer", Build, Vocabulary)


def _ask(kind: type[_Answer], module: str, words: tuple[str, ...], given: bytes, limit: float) -> _Answer:
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            (sys.executable, "-P", "-m", module, *words),
            input=given,
            capture_output=True,
            timeout=limit,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"gave no answer within {limit:g} s") from None
    except OSError as error:
        raise NoAnswer(f"could not be started: {error.strerror or error}") from error
    if done.returncode:
        raise NoAnswer(_how(done.returncode, done.stderr), -done.returncode if done.returncode < 0 else None)
    try:
        return msgspec.json.decode(done.stdout, type=kind)
    except msgspec.MsgspecError as error:
        raise NoAnswer(f"answered what can't be read: {error}") from error


def _how(status: int, words: bytes) -> str:
    lines = [line.strip()[:300] for line in words.decode("utf-8", "replace").splitlines() if line.strip()]
    last = "; ".join(lines[-_LAST_WORDS:] if status < 0 else lines[-1:])
    names = {each.value: each.name for each in signal.Signals}
    how = f"was ended by {names.get(-status, f'signal {-status}')}" if status < 0 else "failed"
    return f"{how}: {last}" if last else f"{how}, exit status {status}"
