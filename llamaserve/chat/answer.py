"""Reads an answer: what the model thought, what it says, and which tools it calls. Knows nothing of any model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llamaserve.chat.formats.format import CallFormat
from llamaserve.chat.reading import Content, Incoming, Part, Reading, Reasoning


@dataclass(frozen=True)
class ThinkingTags:
    """What stands before and after the thoughts of a model, and what it may then write before its answer proper."""

    start: str
    end: str
    answer: str = ""


# As text-generation-webui knows them, and those of Magistral, Command A and Kimi-VL.
THINKING_TAGS = (
    ThinkingTags("<think>", "</think>"),
    ThinkingTags("<seed:think>", "</seed:think>"),
    ThinkingTags("<|channel>thought", "<channel|>"),
    ThinkingTags("<|think|>", "<|end|>", "<|content|>"),
    ThinkingTags("[THINK]", "[/THINK]"),
    ThinkingTags("<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>"),
    ThinkingTags("◁think▷", "◁/think▷"),
)


_LONE = THINKING_TAGS[0]  # of which the end counts alone
_BROKEN = "\ufffd"  # stands for a character that was cut


class AnswerReader:
    """Takes an answer in pieces, and returns what can be said of it so far.

    ``thinking`` are the tags that an answer may begin with, and ``begun`` the one of them that the prompt has opened,
    or, if the answer goes on in the middle of thoughts, has ``resumed``.
    ``raw_thoughts`` leaves thoughts in the text as they are. ``calls`` is how calls of tools of these ``names`` are
    written, if there are any; ``forced``: the answer is nothing else. ``speakers`` are names with which a reply may
    begin that are not part of it. The text is ``trimmed`` of spaces before it. ``read`` takes the place of all that,
    for a format of whole answers.

    The parts are the same however the answer was cut into pieces, except that the pieces of a text are. An answer that
    is ``whole`` is read when all of it is there: then an end of thoughts counts whose beginning is missing.
    """

    def __init__(
        self,
        *,
        thinking: Sequence[ThinkingTags] = (),
        begun: ThinkingTags | None = None,
        resumed: bool = False,
        raw_thoughts: bool = False,
        calls: CallFormat | None = None,
        names: frozenset[str] = frozenset(),
        forced: bool = False,
        speakers: tuple[str, ...] = (),
        trimmed: bool = False,
        whole: bool = False,
        read: Callable[[Incoming], Reading[None]] | None = None,
    ) -> None:
        self._text = Incoming()
        self._thinking = {tags.start: tags for tags in thinking}
        self._begun = begun
        self._resumed = resumed
        self._raw_thoughts = raw_thoughts
        self._calls = calls
        self._names = names
        self._forced = forced
        self._speakers = speakers
        self._trimmed = trimmed
        self._whole = whole
        self._parts = self._read() if read is None else read(self._text)

    def push(self, text: str) -> list[Part]:
        """Take a piece of the answer."""
        self._text.push(text)
        return self._step()

    def finish(self, text: str = "", *, cut: bool = False) -> list[Part]:
        """Take the last piece, and return what is left. ``cut``: the answer was not at its end, and what there is of
        markup is no text.
        """
        if cut and self._calls is not None:
            text = text.rstrip(_BROKEN)
        self._text.push(text)
        self._text.end(cut=cut)
        return self._step()

    def _step(self) -> list[Part]:
        parts: list[Part] = []
        for part in self._parts:
            if part is None:
                break
            parts.append(part)
        return parts

    def _read(self) -> Reading[None]:
        if self._begun is not None:
            if self._raw_thoughts:
                yield Content(self._begun.start)
            yield from self._think(self._begun)
        elif not (yield from self._text.attempt(self._think_first())) and self._whole:
            yield from self._text.attempt(self._think_from_the_start())
        yield from self._begin()
        if self._calls is None:
            yield from self._text.up_to((), Content)
        elif self._calls.marker is None or self._forced:
            yield from self._call_or_text(self._calls)
        else:
            yield from self._text_and_calls(self._calls, self._calls.marker)

    def _think_first(self) -> Reading[bool]:
        """Read the thoughts, if the answer begins with some."""
        yield from self._text.skip_space()
        start = yield from self._text.take(*self._thinking)
        if start is None:
            return False
        if self._raw_thoughts:
            yield Content(start)
        yield from self._think(self._thinking[start])
        return True

    def _think_from_the_start(self) -> Reading[bool]:
        """Read the thoughts before an end of thoughts without a beginning."""
        thoughts, end, _ = (yield from self._text.whole()).partition(_LONE.end)
        if not end or _LONE.start in thoughts or self._raw_thoughts:
            return False
        yield from self._think(_LONE)
        return True

    def _think(self, tags: ThinkingTags) -> Reading[None]:
        """Read thoughts to their end, and pass the white space around them."""
        if self._raw_thoughts:
            yield from self._text.up_to((tags.end,), Content)
            if (yield from self._text.take(tags.end)):
                yield Content(tags.end)
            return
        if not self._resumed:
            yield from self._text.skip_space()
        yield from self._text.up_to((tags.end,), Reasoning, trim=True)
        yield from self._text.skip_space()
        yield from self._text.take(tags.end)
        yield from self._text.skip_space()
        if tags.answer and (yield from self._text.take(tags.answer)):
            yield from self._text.skip_space()

    def _begin(self) -> Reading[None]:
        """Pass what is before a reply."""
        if self._speakers:
            yield from self._text.skip_space()
            if (yield from self._text.take(*self._speakers)):
                yield from self._text.skip_space()
        while self._trimmed and (yield from self._text.take(" ")):
            pass

    def _call_or_text(self, calls: CallFormat) -> Reading[None]:
        """Read an answer that is calls, or has none."""
        read = yield from self._text.attempt(self._spaced_calls(calls))
        if self._text.cut:
            return
        if read:
            yield from self._text.attempt(self._space_at_end())
        yield from self._text.up_to((), Content)

    def _text_and_calls(self, calls: CallFormat, marker: str) -> Reading[None]:
        while (yield from self._text.up_to((marker,), Content, trim=True)) is not None:
            read = yield from self._text.attempt(self._spaced_calls(calls))
            if self._text.cut:
                return
            if read:
                yield from self._text.attempt(self._space_at_end())
            else:
                space = yield from self._text.skip_space()
                yield from self._text.take(marker)
                yield Content(space + marker)

    def _spaced_calls(self, calls: CallFormat) -> Reading[bool]:
        yield from self._text.skip_space()
        return (yield from calls.read(self._text, self._names))

    def _space_at_end(self) -> Reading[bool]:
        yield from self._text.skip_space()
        return (yield from self._text.at_end())
