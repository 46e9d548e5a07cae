"""Ends an answer's thinking after so many tokens, whatever the model wants.

What stands between two markers is thinking. The markers are looked for in the bytes of the tokens, since they may be
control tokens, ordinary ones or several. When too much has come, the tokens of the end marker are the next ones, and
whatever else follows the text is told of them. Knows nothing of how tokens are picked, and nothing of logits.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from enum import Enum, auto
from typing import Protocol

from llamaserve.engine.candidates import Candidates, Floats
from llamaserve.engine.llama import Vocab
from llamaserve.engine.params import Thinking
from llamaserve.errors import InvalidRequest

_MAX_MARKER = 256  # characters
_MAX_MESSAGE = 4096
_CHARACTER = 4  # bytes at most


class Picker(Protocol):
    """What picks the next token otherwise."""

    @property
    def complete(self) -> bool:
        """Whether the answer has its form, and nothing more may come."""

    def sample(self, logits: Floats) -> int:
        """Pick a token from the logits, shape (vocabulary,)."""

    def force(self, token: int) -> None:
        """Take note of a token that comes next without having been picked. Raises ``CanNotGoOn`` where it can't."""

    def candidates(self, logits: Floats) -> Candidates:
        """Return the tokens that could be picked."""

    def prepare(self) -> None:
        """Do what can be done for the next token before its logits are there."""

    def possible(self, tokens: Sequence[int]) -> int:
        """Return how many of some guessed tokens may come next, one after the other."""

    def close(self) -> None:
        """Free what is not Python's."""


class _State(Enum):
    BEFORE = auto()  # nothing but white space and the beginning of the start marker has come
    INSIDE = auto()
    OVER = auto()  # or there was none


def check(thinking: Thinking, vocab: Vocab) -> None:
    """Refuse what can't work."""
    for marker, looked_for in ((thinking.start, not thinking.begun), (thinking.end, True)):
        if len(marker) > _MAX_MARKER or (looked_for and not marker.strip()):
            raise InvalidRequest(f"what begins and ends thinking must be a text of at most {_MAX_MARKER} characters")
    if len(thinking.message) > _MAX_MESSAGE:
        raise InvalidRequest(
            f"the message that ends thinking has {len(thinking.message)} characters; at most {_MAX_MESSAGE} are taken"
        )
    if thinking.budget < 0:
        raise InvalidRequest(f"a budget of {thinking.budget} tokens to think is less than none")
    for text in (thinking.start, thinking.message + thinking.end):
        vocab.tokenize(text, add_bos=False, parse_special=True)


class LimitedThinking:
    """Picks as another does, apart from the tokens that end the thinking.

    White space around the markers is not looked for. An end marker that has begun when the budget is used up may be
    completed, and so is a character: a form would not let the end come within one.
    """

    def __init__(self, picker: Picker, thinking: Thinking, vocab: Vocab) -> None:
        self._picker = picker
        self._vocab = vocab
        self._start = thinking.start.strip().encode()
        self._end = thinking.end.strip().encode()
        self._left = thinking.budget
        self._ending = vocab.tokenize(thinking.message + thinking.end, add_bos=False, parse_special=True)
        self._forced: deque[int] = deque()
        self._text = b""  # as much of the last bytes as a marker may have begun in
        self._state = _State.BEFORE
        if thinking.begun:
            self._begin()

    @property
    def complete(self) -> bool:
        """See ``Picker``."""
        return self._picker.complete

    def sample(self, logits: Floats) -> int:
        """See ``Picker``. Raises ``CanNotGoOn`` where the answer's form does not let the thinking end, too."""
        if self._forced:
            token = self._forced.popleft()
            self._picker.force(token)
            return token
        token = self._picker.sample(logits)
        if self._state is not _State.OVER:
            self._read(self._vocab.piece(token, special=True))
        return token

    def candidates(self, logits: Floats) -> Candidates:
        """See ``Picker``."""
        return self._picker.candidates(logits)

    def prepare(self) -> None:
        """See ``Picker``."""
        if not self._forced:
            self._picker.prepare()

    def possible(self, tokens: Sequence[int]) -> int:
        """See ``Picker``."""
        return self._picker.possible(tokens)

    def close(self) -> None:
        """See ``Picker``."""
        self._picker.close()

    def _read(self, piece: bytes) -> None:
        """Take note of the bytes of the next token."""
        self._text += piece
        if self._state is _State.INSIDE:
            self._left -= 1
            self._look_for_end()
        else:
            self._look_for_start()

    def _look_for_start(self) -> None:
        text = self._text = self._text.lstrip()
        if text.startswith(self._start):
            self._text = text[len(self._start) :]
            self._begin()
        elif not self._start.startswith(text):
            self._state = _State.OVER

    def _begin(self) -> None:
        self._state = _State.INSIDE
        self._look_for_end()

    def _look_for_end(self) -> None:
        if self._end in self._text:
            self._state = _State.OVER
        elif self._left > 0 or self._may_be_completed():
            self._text = self._text[-max(len(self._end), _CHARACTER) :]
        else:
            self._state = _State.OVER
            self._forced.extend(self._ending)

    def _may_be_completed(self) -> bool:
        """Say whether the text ends within the end marker or a character, if not for too many tokens already."""
        most = len(self._end)
        return (self._end_has_begun() and self._left > -most) or (
            _ends_within_character(self._text) and self._left > -most - _CHARACTER
        )

    def _end_has_begun(self) -> bool:
        return any(self._text.endswith(self._end[:length]) for length in range(1, len(self._end)))


def _ends_within_character(text: bytes) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(text)
    return bool(decoder.getstate()[0])
