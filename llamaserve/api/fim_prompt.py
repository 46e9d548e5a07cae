"""The prompts with which a model fills gaps: the text in front of the gap, the text behind it, and the tokens that tell
them apart.

The layout is [begin token] prefix-token TEXT suffix-token TEXT middle-token. Snippets of other files come before that:
for a model that knows repositories, behind a repository-token with a name, and each behind a separator-token with its
file's name; else each behind a line with that. All texts are only texts: one that spells a token of the layout is no
such token. What does not fit loses its outer ends, snippets first; what is far from fitting is not even tokenised,
since that takes a worker's time from others. Knows nothing of requests and of what an answer looks like.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from llamaserve.api.generating import Job
from llamaserve.errors import InvalidRequest, NotSupported
from llamaserve.registry.gguf import FimTokens
from llamaserve.registry.served import ServedModel
from llamaserve.worker.protocol import Prompt

_UNKNOWN_LENGTH = 256  # tokens that an answer of no given length finds room for
_MARKS = 3
_LONGEST = 16  # characters a token: of a text no more than that for each token that there is room for is looked at
_MAX_TEXT = 1024 * 1024  # characters that a worker tokenises at once
_MAX_PIECES = 10_000  # of a text that spells tokens of the layout; a worker takes a second or two for them
_SPACES = "\u2581\u0120 "  # how vocabularies write the space before a word; a text may have it or not
# What nobody has told the names of.
_REPOSITORY = "project"
_FILE = "current"
_SNIPPET = "snippet"


class Tokenizer(Protocol):
    """What turns texts into tokens."""

    async def tokenize(self, text: str, *, add_bos: bool, parse_special: bool) -> list[int]:
        """Return the token ids of a text."""


@dataclass(frozen=True)
class Snippet:
    """A text from another file."""

    text: str
    filename: str | None = None


@dataclass(frozen=True)
class Gaps:
    """Gaps to fill, one behind each of the ``prefixes``, texts or token ids. The other fields are the same for all. The
    ``params`` are what a request calls the prefixes, the suffix and the snippets.
    """

    prefixes: Sequence[Prompt]
    suffix: str
    snippets: Sequence[Snippet] = ()
    params: tuple[str, str, str] = ("prompt", "suffix", "input_extra")


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a text, and how many more it has at least, which were not looked at."""

    ids: Sequence[int]
    more: int = 0


async def fim_tokens(model: ServedModel) -> FimTokens:
    """Return the tokens with which a model fills gaps. Raises ``NotSupported`` for one that has none."""
    header = await model.file.read()
    found = await asyncio.to_thread(lambda: header.fim_tokens)
    if found is None:
        raise NotSupported(
            f"{model.name} can't fill in the middle: its vocabulary has no tokens for prefix, suffix and middle"
        )
    return found


async def fim_prompts(job: Job, marks: FimTokens, gaps: Gaps) -> list[Prompt]:
    """Return the job's prompts as token ids, and tell it how many tokens were cut off at least."""
    layout = Layout(await job.worker(), marks, room=room(job), add_bos=job.generation.add_bos)
    prompts = await layout.prompts(gaps)
    job.truncated_tokens += layout.lost
    return [*prompts]


def room(job: Job) -> int:
    """Return how many tokens a prompt may have so that there is room for the answer, which gets at most half of the
    context reserved.
    """
    context = min(job.model.context, job.generation.context or job.model.context)
    wanted = job.generation.max_tokens
    return context - min(_UNKNOWN_LENGTH if wanted is None else wanted, context // 2)


def shares(room: int, prefix: int, suffix: int) -> tuple[int, int]:
    """Divide room among the tokens before and behind a gap, three to one; what one does not need the other may use."""
    room = max(0, room)
    behind = min(suffix, max(room // 4, room - prefix))
    return min(prefix, room - behind), behind


class Layout:
    """Puts prompts together that have room for so many tokens. ``lost`` counts what was cut off. What was not tokenised
    counts as one token for ``_LONGEST`` characters, so that it may have been more, but never was nothing.
    """

    def __init__(self, tokenizer: Tokenizer, marks: FimTokens, *, room: int, add_bos: bool) -> None:
        self._tokenizer = tokenizer
        self._marks = marks
        self._room = room
        self._add_bos = add_bos
        self._names = _pattern(marks.names)
        self._ids = {marks.prefix, marks.suffix, marks.middle, marks.repository, marks.separator}
        self.lost = 0

    async def prompts(self, gaps: Gaps) -> list[list[int]]:
        """Return the prompts' token ids."""
        begin = await self._tokenizer.tokenize("", add_bos=True, parse_special=False) if self._add_bos else []
        suffix = await self._head(gaps.suffix, self._room, gaps.params[1])
        before = await self._before(gaps)
        prompts = []
        for prefix in gaps.prefixes:
            if isinstance(prefix, str):
                tokens = await self._tail(prefix, self._room, gaps.params[0])
            else:  # it may have a begin token already
                tokens = _Tokens(prefix[len(begin) :] if prefix[: len(begin)] == begin else prefix)
            prompts.append(begin + before + self._gap(tokens, suffix, self._room - len(begin) - len(before)))
        return prompts

    def _gap(self, prefix: _Tokens, suffix: _Tokens, room: int) -> list[int]:
        ahead, behind = shares(room - _MARKS, len(prefix.ids), len(suffix.ids))
        self.lost += len(prefix.ids) - ahead + prefix.more + len(suffix.ids) - behind + suffix.more
        kept = prefix.ids[len(prefix.ids) - ahead :]
        return [self._marks.prefix, *kept, self._marks.suffix, *suffix.ids[:behind], self._marks.middle]

    async def _before(self, gaps: Gaps) -> list[int]:
        """Return the tokens of the snippets. They take at most half of the room, whatever the gap's surroundings need,
        so that they stay the same, and need not be evaluated again, while these grow.
        """
        if not gaps.snippets:
            return []
        opening, closing = await self._frame()
        room = self._room // 2 - len(opening) - len(closing)
        kept: list[list[int]] = []
        for number in reversed(range(len(gaps.snippets))):
            found, whole = await self._snippet(gaps.snippets[number], room, f"{gaps.params[2]}[{number}]")
            if found:
                kept.append(found)
            room = room - len(found) if whole else 0
        return [*opening, *(token for snippet in reversed(kept) for token in snippet), *closing] if kept else []

    async def _snippet(self, snippet: Snippet, room: int, param: str) -> tuple[list[int], bool]:
        """Return the tokens of a snippet, its name first, and whether these are all of them."""
        name = await self._tail(self._heading(snippet), room, f"{param}.filename")
        head = [*([] if self._separator is None else [self._separator]), *name.ids]
        room = 0 if name.more else max(0, room - len(head))
        text = await self._tail(_with_line_break(snippet.text), room, f"{param}.text")
        taken = min(len(text.ids), room)
        self.lost += len(text.ids) - taken + text.more + (0 if taken else len(head) + name.more)
        return [*head, *text.ids[len(text.ids) - taken :]] if taken else [], taken == len(text.ids) and not text.more

    @property
    def _separator(self) -> int | None:
        """What comes before the name of a file, with a model that knows repositories."""
        return None if self._marks.repository is None else self._marks.separator

    async def _frame(self) -> tuple[list[int], list[int]]:
        """Return what comes before and behind all snippets."""
        if self._marks.repository is None or self._separator is None:
            return [], []
        project = await self._plain(f"{_REPOSITORY}\n")
        return [self._marks.repository, *project], [self._separator, *await self._plain(f"{_FILE}\n")]

    def _heading(self, snippet: Snippet) -> str:
        """Return the text that comes before a snippet."""
        name = snippet.filename or _SNIPPET
        return f"\n--- {name} ---\n" if self._separator is None else f"{name}\n"

    async def _tail(self, text: str, room: int, param: str) -> _Tokens:
        """Return the last tokens of a user's text, or all if they have room."""
        start = max(0, len(text) - _looked_at(room))
        return _Tokens(await self._tokens(text[start:], param), _at_least(start))

    async def _head(self, text: str, room: int, param: str) -> _Tokens:
        """Return the first tokens of a user's text, or all if they have room."""
        end = min(len(text), _looked_at(room))
        return _Tokens(await self._tokens(text[:end], param), _at_least(len(text) - end))

    async def _tokens(self, text: str, param: str) -> list[int]:
        """Return the tokens of a user's text. One that is not a control token, or was added to the vocabulary by hand,
        is found in a text though control tokens are not; where it is one of the marks, its name is taken in pieces.
        """
        if not text:
            return []
        try:
            tokens = await self._plain(text)
            return tokens if self._ids.isdisjoint(tokens) else await self._without_marks(text)
        except InvalidRequest as error:
            error.param = param
            raise

    async def _without_marks(self, text: str) -> list[int]:
        """Return the tokens of the pieces of a text: those that the names of the marks are cut into, and where there is
        still a mark in one, its halves.
        """
        tokens: list[int] = []
        todo = list(self._pieces(text))[::-1]
        left = _MAX_PIECES
        while todo:
            piece = todo.pop()
            found = await self._plain(piece)
            left -= 1
            if self._ids.isdisjoint(found):
                tokens += found
            elif len(piece) == 1:
                raise InvalidRequest("the text has a character that is a token of this model's gaps")
            else:
                todo += [piece[len(piece) // 2 :], piece[: len(piece) // 2]]
            if todo and not left:
                raise InvalidRequest("the text spells tokens of this model's gaps too often")
        return tokens

    async def _plain(self, text: str) -> list[int]:
        return await self._tokenizer.tokenize(text, add_bos=False, parse_special=False)

    def _pieces(self, text: str) -> Iterator[str]:
        start = 0
        for match in self._names.finditer(text):
            yield text[start : match.start() + 1]
            start = match.start() + 1
        if start < len(text):
            yield text[start:]


def _pattern(names: Iterable[str]) -> re.Pattern[str]:
    """Return what finds the names of tokens in a text, where these are of more than one character. The space that a
    name may begin with stays outside.
    """
    words = sorted({name.lstrip(_SPACES) for name in names}, key=len, reverse=True)
    return re.compile("|".join(re.escape(word) for word in words if len(word) > 1) or r"(?!)")


def _looked_at(room: int) -> int:
    """Return how many characters of a text are looked at where there is room for so many tokens."""
    return min(_MAX_TEXT, _LONGEST * max(0, room))


def _at_least(characters: int) -> int:
    """Return how many tokens so many characters count as."""
    return -(-characters // _LONGEST)


def _with_line_break(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"
