"""How probable each of some words is as a guard model's answer, from the probabilities of the next tokens.

A tokenizer may write a word as one token or as several, with the white space before it or without. So a token counts
for the word that it is or begins. Where the first token does not decide, as "1" does not between "1" and "10", the
model is asked again behind it: such a beginning is a *stem*. Knows nothing of what the words mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp

from llamaserve.engine.events import TokenLogprob
from llamaserve.errors import EngineError

NextTokens = Mapping[str, float]  # what the next token may be, and how probable that is
TOP = 1000  # so many of the most probable tokens are enough: a guard's words are among its first ten
_SPACES = str.maketrans({"\u2581": " ", "\u0120": " ", "\u010a": "\n"})  # how vocabularies write white space


def next_tokens(tokens: Iterable[TokenLogprob]) -> dict[str, float]:
    """Return the probabilities of what the engine says could come next, by text. Tokens of one text are added up."""
    found: dict[str, float] = {}
    for token in tokens:
        text = token.data.decode("utf-8", "replace")
        found[text] = found.get(text, 0.0) + exp(token.logprob)
    return found


@dataclass(frozen=True)
class Words:
    """The words that can come next; case does not count. One may begin another within a word, as "1" does "10".

    ``stems`` are the beginnings behind which the model is asked as well, with the white space before them.
    """

    words: tuple[str, ...]
    stems: tuple[str, ...] = ()

    @property
    def asked_behind(self) -> tuple[str, ...]:
        """What has been written of a word each time that the model is asked: nothing, then the stems."""
        return ("", *self.stems)

    def shares(self, answers: Sequence[NextTokens]) -> dict[str, float]:
        """Return how probable each word is among all of them: the softmax over their logits. ``answers`` has the next
        tokens in the order of ``asked_behind``. Raises ``EngineError`` when they are none of the words.
        """
        reached = {stem.strip().casefold(): 0.0 for stem in self.stems} | {"": 1.0}
        found = dict.fromkeys(self.words, 0.0)
        asked = zip(self.asked_behind, answers, strict=True)
        for stem, tokens in sorted(asked, key=lambda each: len(each[0])):
            stem = stem.strip().casefold()
            for token, probability in tokens.items():
                written = _written(stem, token)
                probability *= reached[stem]
                if written in reached and written != stem:
                    reached[written] += probability
                    continue
                meant = self._meant(written)
                for word in meant:
                    found[word] += probability / len(meant)
        total = sum(found.values())
        if not total > 0.0:
            raise EngineError(f"the model answers with none of {', '.join(map(repr, self.words))}")
        return {word: min(value / total, 1.0) for word, value in found.items()}

    def _meant(self, written: str) -> list[str]:
        """Return the words that are written, or begun if none is."""
        if not written:
            return []
        whole = [word for word in self.words if _is_written(word.casefold(), written)]
        return whole or [word for word in self.words if word.casefold().startswith(written)]


def _written(stem: str, token: str) -> str:
    """Return what is written of a word with a token more. White space before a word is no part of it."""
    text = token.translate(_SPACES)
    return (stem + text if stem else text.lstrip()).casefold()


def _is_written(word: str, written: str) -> bool:
    """Whether the word is written in full, and ends there: "safely" is not "safe"."""
    return written.startswith(word) and not written[len(word) :][:1].isalnum()
