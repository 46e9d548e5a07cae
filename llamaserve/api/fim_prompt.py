"""The prompts with which a model fills gaps: the text in front of the gap, the text behind it, and the tokens that tell
them apart.

The layout is [begin token] prefix-token TEXT suffix-token TEXT middle-token. Snippets of other files come before that:
for a model that knows repositories, behind a repository-token with a name, and each behind a separator-token with its
file's name; else each behind a line with that. All texts are only texts: one that spells a control token is no such
token. What does not fit loses its outer ends, snippets first. Knows nothing of requests and of what an answer looks
like.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from llamaserve.api.generating import Job
from llamaserve.errors import InvalidRequest, NotSupported
from llamaserve.registry.gguf import FimTokens
from llamaserve.registry.pool import ServedModel
from llamaserve.worker.protocol import Prompt

_UNKNOWN_LENGTH = 256  # tokens that an answer of no given length finds room for
_MARKS = 3
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


async def fim_tokens(model: ServedModel) -> FimTokens:
    """Return the tokens with which a model fills gaps. Raises ``NotSupported`` for one that has none."""
    header = model.header
    found = await asyncio.to_thread(lambda: header.fim_tokens)
    if found is None:
        raise NotSupported(
            f"{model.name} can't fill in the middle: its vocabulary has no tokens for prefix, suffix and middle"
        )
    return found


async def fim_prompts(job: Job, marks: FimTokens, gaps: Gaps) -> list[Prompt]:
    """Return the job's prompts as token ids, and tell it how many tokens were cut off."""
    layout = Layout(await job.model.worker(), marks, room=room(job), add_bos=job.generation.add_bos)
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
    """Puts prompts together that have room for so many tokens. ``lost`` counts what was cut off."""

    def __init__(self, tokenizer: Tokenizer, marks: FimTokens, *, room: int, add_bos: bool) -> None:
        self._tokenizer = tokenizer
        self._marks = marks
        self._room = room
        self._add_bos = add_bos
        self._names = re.compile("|".join(re.escape(name) for name in sorted(marks.names, key=len, reverse=True)))
        self._ids = {marks.prefix, marks.suffix, marks.middle, marks.repository, marks.separator}
        self.lost = 0

    async def prompts(self, gaps: Gaps) -> list[list[int]]:
        """Return the prompts' token ids."""
        begin = await self._tokenizer.tokenize("", add_bos=True, parse_special=False) if self._add_bos else []
        suffix = await self._tokens(gaps.suffix, gaps.params[1])
        before = await self._before(gaps)
        prompts = []
        for prefix in gaps.prefixes:
            tokens = await self._tokens(prefix, gaps.params[0]) if isinstance(prefix, str) else prefix
            if begin and tokens[: len(begin)] == begin:  # of a prompt that was made of tokens
                tokens = tokens[len(begin) :]
            prompts.append(begin + before + self._gap(tokens, suffix, self._room - len(begin) - len(before)))
        return prompts

    def _gap(self, prefix: Sequence[int], suffix: Sequence[int], room: int) -> list[int]:
        ahead, behind = shares(room - _MARKS, len(prefix), len(suffix))
        self.lost += len(prefix) - ahead + len(suffix) - behind
        kept = prefix[len(prefix) - ahead :]
        return [self._marks.prefix, *kept, self._marks.suffix, *suffix[:behind], self._marks.middle]

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
            param = f"{gaps.params[2]}[{number}]"
            head = await self._head(gaps.snippets[number], f"{param}.filename")
            text = await self._tokens(_with_line_break(gaps.snippets[number].text), f"{param}.text")
            taken = max(0, min(len(text), room - len(head)))
            self.lost += len(text) - taken + (0 if taken else len(head))
            if taken:
                kept.append(head + text[len(text) - taken :])
            room = room - len(head) - taken if taken == len(text) else 0
        return [*opening, *(token for snippet in reversed(kept) for token in snippet), *closing] if kept else []

    async def _frame(self) -> tuple[list[int], list[int]]:
        """Return what comes before and behind all snippets."""
        marks = self._marks
        if marks.repository is None or marks.separator is None:
            return [], []
        project = await self._plain(f"{_REPOSITORY}\n")
        return [marks.repository, *project], [marks.separator, *await self._plain(f"{_FILE}\n")]

    async def _head(self, snippet: Snippet, param: str) -> list[int]:
        """Return what comes before a snippet."""
        name = snippet.filename or _SNIPPET
        if self._marks.repository is None or self._marks.separator is None:
            return await self._tokens(f"\n--- {name} ---\n", param)
        return [self._marks.separator, *await self._tokens(f"{name}\n", param)]

    async def _tokens(self, text: str, param: str) -> list[int]:
        """Return the tokens of a user's text. One that was added to the vocabulary by hand is found in a text though
        control tokens are not; where it is one of the marks, its name is taken in two pieces.
        """
        try:
            tokens = await self._plain(text)
            if self._ids.isdisjoint(tokens):
                return tokens
            return [token for piece in self._pieces(text) for token in await self._plain(piece)]
        except InvalidRequest as error:
            error.param = param
            raise

    async def _plain(self, text: str) -> list[int]:
        return await self._tokenizer.tokenize(text, add_bos=False, parse_special=False)

    def _pieces(self, text: str) -> Iterator[str]:
        start = 0
        for match in self._names.finditer(text):
            yield text[start : match.start() + 1]
            start = match.start() + 1
        yield text[start:]


def _with_line_break(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"
