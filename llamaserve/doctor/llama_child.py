"""Asks llama.cpp, in a process of its own: ``python -m llamaserve.doctor.llama_child``.

``build`` says what it was compiled for and which GPUs it can use. ``vocabulary FILE`` reads a model's vocabulary, and
texts from standard input, and says how it reads them. The answers go to standard output as JSON, see ``llama.py``.

Importing llama.cpp may end the process: it may be compiled for another processor, or lack a library.
"""

from __future__ import annotations

import os
import sys

import msgspec

from llamaserve.doctor.llama import Build, Question, Vocabulary
from llamaserve.engine import llama
from llamaserve.errors import LlamaserveError


def build() -> Build:
    """Say what llama.cpp was compiled for."""
    return Build(llama.supports_gpu_offload(), llama.system_info(), llama.list_gpus())


def vocabulary(path: str, question: Question) -> Vocabulary:
    """Say how a model reads texts."""
    vocab = llama.read_vocabulary(path)
    begun = vocab.tokenize(question.prompt, add_bos=True, parse_special=True)
    first = next((place for place, token in enumerate(begun) if token != vocab.bos), len(begun))
    ending = vocab.tokenize(question.ending, add_bos=False, parse_special=True)
    ends = filter(vocab.is_end_of_generation, ending)
    marker = next(ends, next(filter(vocab.is_control, ending), None))
    return Vocabulary(
        adds_begin=vocab.add_bos,
        begins=first,
        marker=None if marker is None else vocab.piece(marker, special=True).decode("utf-8", "replace"),
        marker_ends=marker is not None and vocab.is_end_of_generation(marker),
        controls=[name for name in question.controls if vocab.control(name) is not None or _ends(vocab, name)],
    )


def _ends(vocab: llama.Vocab, name: str) -> bool:
    tokens = vocab.tokenize(name, add_bos=False, parse_special=True)
    return len(tokens) == 1 and vocab.is_end_of_generation(tokens[0])


def main(words: list[str]) -> int:
    """Answer one question, and return the exit status of the process."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        llama.start_backend()
        match words:
            case ["build"]:
                answer: Build | Vocabulary = build()
            case ["vocabulary", path]:
                answer = vocabulary(path, msgspec.json.decode(sys.stdin.buffer.read(), type=Question))
            case _:
                return 2
    except LlamaserveError as error:
        sys.stderr.write(error.message + "\n")
        return 1
    with os.fdopen(answers, "wb") as file:
        file.write(msgspec.json.encode(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
