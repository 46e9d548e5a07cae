"""Walks at random through what a constraint allows, byte by byte, and says what text came of it."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from llamaserve.engine.grammar import compiled
from llamaserve.engine.params import Constraint

_END = 256
_LONG = 400  # bytes after which a walk tries to come to an end
_TOO_LONG = 6_000
_USUAL = [*b"abcxyz019 .,:;-_/\\'\"<>{}[]()|=\n\t", *"é日😀".encode()]


class _Bytes:
    eos_token_id = _END
    bos_token_id = None
    tokens = (*(bytes([value]) for value in range(_END)), b"<end>")
    special_token_ids = (_END,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


TOKENIZER = LLTokenizer(TokenizerWrapper(_Bytes()))


def accepts(constraint: Constraint, text: str) -> bool:
    """Say whether a text as a whole meets a constraint."""
    matcher = compiled(constraint, TOKENIZER)
    read = matcher.try_consume_tokens(list(text.encode()))
    return read == len(text.encode()) and matcher.is_accepting()


def walk(constraint: Constraint, chance: random.Random, hints: Sequence[str], begin: str = "") -> str | None:
    """Return a random text that begins in a way and meets a constraint; None if it did not come to an end. The
    ``hints`` are tried often.
    """
    matcher = compiled(constraint, TOKENIZER).deep_copy()
    words = [list(hint.encode()) for hint in hints]
    passed = list(begin.encode())
    assert not passed or matcher.consume_tokens(passed)
    while len(passed) < _TOO_LONG:
        if matcher.is_accepting() and (matcher.is_stopped() or chance.random() < 0.3):
            return bytes(passed).decode()
        step = _step(matcher, chance, words, in_a_hurry=len(passed) > _LONG)
        assert matcher.consume_tokens(step), matcher.get_error()
        passed += step
    return None


def _step(matcher: LLMatcher, chance: random.Random, words: list[list[int]], *, in_a_hurry: bool) -> list[int]:
    if words and chance.random() < (0.9 if in_a_hurry else 0.3):
        tried = chance.sample(words, len(words)) if in_a_hurry else [chance.choice(words)]
        for word in tried:
            if matcher.validate_tokens(word) == len(word):
                return word
    mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little")[:_END])
    assert len(allowed), matcher.get_error()
    usual = [value for value in _USUAL if value in set(allowed.tolist())]
    return [chance.choice(usual) if usual and chance.random() < 0.9 else int(chance.choice(allowed.tolist()))]
