"""Finds out from what a chat template writes how its model writes tool calls.

A template shows the calls of earlier answers as the model has written them. So one that nobody has heard of is rendered
with one call and with several of them, and what stands around their names and arguments is compared. Knows nothing of
templates: it is given texts.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from llamaserve.chat.answer import THINKING_TAGS, AnswerReader
from llamaserve.chat.formats.json_calls import ID, JsonCalls
from llamaserve.chat.reading import Arguments, CallBegins, CallEnds, Part


@dataclass(frozen=True)
class ProbeCall:
    """A call with words that come up nowhere else."""

    id: str
    name: str
    key: str
    value: str

    @property
    def arguments(self) -> dict[str, str]:
        """The arguments, of which there is one."""
        return {self.key: self.value}

    def find(self, text: str, start: int) -> tuple[int, int, int, int] | None:
        """Return where the name and the JSON of the arguments begin and end, if they come in that order."""
        pattern = rf'\{{\s*"{self.key}"\s*:\s*"{self.value}"\s*\}}'
        arguments = re.compile(pattern).search(text, start)
        if arguments is None:
            return None
        name = text.rfind(self.name, start, arguments.start())
        return None if name < 0 else (name, name + len(self.name), *arguments.span())


@dataclass(frozen=True)
class Shown:
    """Conversations that end in an answer: ``plain`` in ``ANSWER``, the first of ``called`` in the first of ``CALLS``,
    the second in the first two of them, and so on; ``both`` in ``ANSWER`` and the first call, if the template shows it.

    ``eos`` is the text of the token that ends answers. ``followed``: results stand behind the calls.
    """

    plain: str
    called: Sequence[str]
    both: str = ""
    eos: str = ""
    followed: bool = False


CALLS = (
    ProbeCall("qprobe001", "probe_one", "probe_key", "probevalueone"),
    ProbeCall("qprobe002", "probe_two", "probe_item", "probevaluetwo"),
    ProbeCall("qprobe003", "probe_three", "probe_field", "probevaluethree"),
)
ANSWER = "quokkaanswer"  # the content of an answer

_ANY_ID = string.ascii_letters + string.digits  # whatever letters ids have, they must not be taken for what follows
_IDS = re.compile("|".join(call.id for call in CALLS))
_MARKER = re.compile(r"<[^\s<>]+>|\[/?[A-Z][A-Z_]+\]")

# What llama.cpp takes for the end of an answer in any vocabulary that has it. Answers with calls may have another one.
_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|call|>", "<|return|>", "<end_of_turn>", "</s>")


def derive(shown: Shown) -> JsonCalls | None:
    """Return how calls are written; None where it is not as JSON after a name, with the same texts around all calls, or
    where such calls could not be read, or not be told from text.
    """
    heading, answered, closing = shown.plain.rpartition(ANSWER)
    one = shown.called[0]
    start = _common_start(one, heading)
    if not answered or _MARKER.search(_without_thoughts(heading[start:])):
        return None  # an answer without calls has markup, too: it is no text
    texts = []
    for text in shown.called:
        ended = _without_ending(text[start:], None if shown.followed else closing, shown.eos)
        if ended is None or ID in ended:
            return None
        texts.append(_IDS.sub(ID, _without_text(ended, shown.both[start:])))
    found = _found(texts)
    return found if found is not None and _usable(found, shown.eos) else None


def _common_start(text: str, other: str) -> int:
    """Return where texts begin to differ; no marker is cut."""
    at = _first_difference(text, other)
    return next((marker.start() for marker in _MARKER.finditer(text) if marker.start() < at < marker.end()), at)


def _common_end(text: str, other: str) -> int:
    """Return where what texts end alike in begins in the first one; no marker is cut."""
    at = len(text) - _first_difference(text[::-1], other[::-1])
    return next((marker.end() for marker in _MARKER.finditer(text) if marker.start() < at < marker.end()), at)


def _first_difference(text: str, other: str) -> int:
    pairs = enumerate(zip(text, other, strict=False))
    return next((at for at, (one, two) in pairs if one != two), min(len(text), len(other)))


def _without_ending(text: str, closing: str | None, eos: str) -> str | None:
    """Return a text without what ends an answer, which ``closing`` is, if known. None when no end is found."""
    last = max(text.rfind(call.value) for call in CALLS)
    ends = [at for end in (eos, *_ENDS) if end and (at := text.find(end, last)) >= 0]
    if ends:
        return text[: min(ends)]
    if closing is None:
        return None
    return text[: _common_end(text, closing)]


def _without_text(text: str, both: str) -> str:
    """Return an answer without the marks around thoughts and a text that it does not have. ``both`` has a text."""
    text = _without_thoughts(text)
    mark, answered, _ = _without_thoughts(both).partition(ANSWER)
    if not answered or not _MARKER.search(mark) or not text.startswith(mark):
        return text
    text = text[len(mark) :]
    end = _MARKER.match(text)
    return text[end.end() :] if end is not None else text


def _without_thoughts(text: str) -> str:
    for tags in THINKING_TAGS:
        text = re.sub(rf"\A\s*{re.escape(tags.start)}\s*{re.escape(tags.end)}\s*", "", text)
        if tags.answer:
            text = re.sub(rf"\A\s*{re.escape(tags.answer)}", "", text)
    return text


@dataclass(frozen=True)
class _Pieces:
    """An answer cut at the names and the arguments of its calls: ``around`` has one text more than there are calls."""

    around: list[str]
    between: list[str]
    arguments: list[str]


def _found(texts: Sequence[str]) -> JsonCalls | None:
    """Return the texts around the calls in answers that have one, two, and so on, if they are the same in all."""
    found = None
    for number, text in enumerate(texts, 1):
        pieces = _pieces(text, CALLS[:number])
        if pieces is None:
            return None
        if number <= 2:
            found = _tidied(_split(pieces))
        if found is None or _written(found, pieces).strip() != text.strip():
            return None
    return found if found is not None and _plausible(found) else None


def _pieces(text: str, calls: Sequence[ProbeCall]) -> _Pieces | None:
    pieces, at = _Pieces([], [], []), 0
    for call in calls:
        place = call.find(text, at)
        if place is None:
            return None
        name, name_end, arguments, arguments_end = place
        pieces.around.append(text[at:name])
        pieces.between.append(text[name_end:arguments])
        pieces.arguments.append(text[arguments:arguments_end])
        at = arguments_end
    pieces.around.append(text[at:])
    return pieces


def _split(pieces: _Pieces) -> JsonCalls:
    """Split the texts around calls into those of each call and those of all together."""
    lead, *middle, tail = pieces.around
    if not middle:
        return JsonCalls("derived", before=lead, between=pieces.between[0], after=tail, lone=True)
    own = _common_end(lead, middle[0])
    begin, before = lead[:own], lead[own:]
    rest = middle[0][: len(middle[0]) - len(before)]
    same = _common_start(rest, tail)
    return JsonCalls(
        "derived",
        begin=begin,
        before=before,
        between=pieces.between[0],
        after=rest[:same],
        separator=rest[same:],
        end=tail[same:],
    )


def _tidied(found: JsonCalls) -> JsonCalls:
    """Leave out white space around all calls; what stood around each is between them then."""
    begin, before, after, end = found.begin.lstrip(), found.before, found.after, found.end.rstrip()
    ahead = "" if begin else before[: len(before) - len(before.lstrip())]
    behind = "" if end else after[len(after.rstrip()) :]
    return replace(
        found,
        begin=begin,
        before=before[len(ahead) :],
        after=after[: len(after) - len(behind)],
        separator="" if found.lone else behind + found.separator + ahead,
        end=end,
    )


def _written(found: JsonCalls, pieces: _Pieces) -> str:
    names = [call.name for call in CALLS[: len(pieces.arguments)]]
    return found.write(list(zip(names, pieces.arguments, strict=True)))


def _plausible(found: JsonCalls) -> bool:
    """Say whether a reader can tell where calls and their names begin and end."""
    texts = (found.begin, found.before, found.between, found.after, found.separator, found.end)
    return bool((found.begin + found.before).strip() and found.between.strip()) and not any(
        call.name in text for call in CALLS for text in texts
    )


def _usable(found: JsonCalls, eos: str) -> bool:
    """Say whether an answer with calls could come, and they are read as what they are."""
    texts = (found.begin, found.before, found.between, found.after, found.separator, found.end)
    if any(end in text for end in (eos, *_ENDS) if end for text in texts):
        return False
    if found.marker is not None and (found.marker,) != found.shown[:1]:
        return False
    first = found.begin + found.before + found.between
    if found.marker is None and any(mark in first for mark in (*found.shown, ID)):
        return False  # as long as an answer could be text, no token in it may be markup, and nothing may differ
    return all(_is_read_back(found, CALLS[:number]) for number in range(1, 2 if found.lone else len(CALLS) + 1))


def _is_read_back(found: JsonCalls, calls: Sequence[ProbeCall]) -> bool:
    """Say whether calls are read as they were written, in one piece and letter by letter."""
    wanted = [(call.name, json.dumps(call.arguments)) for call in calls]
    text = found.write(wanted).replace(ID, _ANY_ID)
    return _read(found, [text], whole=True) == _read(found, text, whole=False) == wanted


def _read(found: JsonCalls, pieces: Iterable[str], *, whole: bool) -> list[tuple[str, str]] | None:
    """Return the calls in an answer; None if there is anything else in it."""
    names = frozenset(call.name for call in CALLS)
    reader = AnswerReader(thinking=THINKING_TAGS, calls=found, names=names, whole=whole)
    parts: list[Part] = [part for piece in pieces for part in reader.push(piece)] + reader.finish()
    calls: list[tuple[str, str]] = []
    ended = True
    for part in parts:
        match part:
            case CallBegins() if ended:
                calls.append((part.name, ""))
                ended = False
            case Arguments() if not ended:
                name, arguments = calls[-1]
                calls[-1] = (name, arguments + part.text)
            case CallEnds():
                ended = True
            case _:
                return None
    return calls if ended else None
