"""When each word of a transcript is spoken, from the sound itself.

Whisper says roughly when a segment begins and ends, and for some words when they may begin. Between these it knows
nothing, and its segments reach over the pauses between them. So the voice is looked for: a pause is never inside a
word, and within a stretch of voice a word takes about as long as it has letters. Which words belong to which stretch
is the cheapest way of all to divide them: where a stretch is about as long as its words should take, and where words
begin about when whisper believes. Knows sounds, letters and moments; nothing of tokens or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]
_Floats = npt.NDArray[np.float64]

RATE: Final = 16_000  # samples a second
_FRAME: Final = 160  # samples that are looked at together: 10 ms
_FRAMES: Final = RATE // _FRAME  # a second
_VOICE: Final = 0.15  # of the loudness that a twentieth of the frames exceed; what is louder is voice
_PAUSE: Final = 20  # frames; shorter ones are also inside words
_BLIP: Final = 8  # frames; a shorter sound between pauses is no word
_WORD: Final = 1.0  # units that each word takes beside its letters
_UNPRONOUNCED: Final = 0.35  # seconds; how well a stretch fits is judged less strictly by so much
_ROUNDS: Final = 2
_LONG_PAUSE: Final = 1.5  # seconds; a longer one in the middle of a segment
_PAUSED: Final = 0.1  # costs so much for each second more
_UNHEARD: Final = 0.25  # cost at most of a stretch in which nothing is said
_UNHEARD_CUT: Final = 0.02  # likewise of one at the end, which the words may not have come to
_HINT: Final = 0.1  # weight of a hint for the beginning of a word, which is wrong if it is a second away
_LEAD: Final = 4.0  # weight of one for that of a segment, before which it does not begin and the last one has ended,
_NEAR: Final = 0.15  # if it is farther away than so many seconds


class Word(NamedTuple):
    """A word to be placed: its text, when whisper believes that it begins (seconds, None where it has no idea), and
    whether that is the beginning of a segment.
    """

    text: str
    hint: float | None = None
    leads: bool = False


class Voice(NamedTuple):
    """Where in a sound there is voice: rows of beginning and end, in seconds. It may be ``cut`` at the end."""

    runs: _Floats
    cut: bool


def find_voice(samples: Samples) -> Voice:
    """Find what is loud enough to be voice, of samples from -1 to 1; the whole where nothing is."""
    whole = len(samples) // _FRAME
    loudness = np.abs(samples[: whole * _FRAME]).reshape(whole, _FRAME).mean(axis=1)
    loudness = np.convolve(loudness, np.ones(3) / 3, "same") if whole > 2 else loudness
    if whole == 0 or not loudness.any():
        return Voice(np.array([[0.0, max(1, len(samples)) / RATE]]), cut=False)
    loud = np.flatnonzero(loudness >= _VOICE * np.percentile(loudness, 95))
    cuts = np.flatnonzero(np.diff(loud) > _PAUSE)
    starts = loud[np.concatenate(([0], cuts + 1))]
    ends = loud[np.concatenate((cuts, [len(loud) - 1]))] + 1
    runs = np.stack((starts, ends), axis=1)
    words = runs[runs[:, 1] - runs[:, 0] >= _BLIP]
    runs = words if len(words) else runs
    return Voice(runs / _FRAMES, cut=bool(runs[-1][1] >= whole - 1))


def place(words: Sequence[Word], voice: Voice) -> list[tuple[float, float]]:
    """Return when each word begins and ends, in seconds. Times never fall."""
    if not words:
        return []
    units = np.concatenate(([0.0], np.cumsum([_units(word.text) for word in words])))
    times: list[tuple[float, float]] = []
    for part in _division(voice, units, words):
        inner = units[part.first : part.last + 1] - units[part.first]
        edges = part.start + (part.end - part.start) * inner / inner[-1]
        times += zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    return times


def _units(text: str) -> float:
    """Return about how long a word takes, in letters."""
    return _WORD + sum(1.0 if ord(each) < 0x2E80 else 3.0 for each in text if each.isalnum())


class _Part(NamedTuple):
    """The words from ``first`` to ``last``, this one not included, that are spoken in a stretch of voice."""

    start: float
    end: float
    first: int
    last: int


def _division(voice: Voice, units: _Floats, words: Sequence[Word]) -> list[_Part]:
    """Divide words among stretches of voice. How fast they are spoken is known only then, so it is done again with the
    pace of those stretches that have words.
    """
    seconds = float((voice.runs[:, 1] - voice.runs[:, 0]).sum())
    for _ in range(_ROUNDS):
        parts = _cheapest(voice, _Costs(words, units, seconds / float(units[-1])))
        seconds = sum(part.end - part.start for part in parts)
    return parts


def _cheapest(voice: Voice, costs: _Costs) -> list[_Part]:
    best = np.full(costs.count + 1, np.inf)  # cost of having placed so many words in the stretches so far
    best[0] = 0.0
    origins = []
    before = 0.0
    for number, (start, end) in enumerate(voice.runs):
        cut = voice.cut and number == len(voice.runs) - 1
        cost = best[:, None] + costs.of(start, end, pause=start - before, unheard=_UNHEARD_CUT if cut else _UNHEARD)
        origins.append(cost.argmin(axis=0))
        best, before = cost.min(axis=0), end
    parts, last = [], costs.count
    for (start, end), origin in zip(voice.runs[::-1], origins[::-1], strict=True):
        first = int(origin[last])
        if first < last:
            parts.append(_Part(float(start), float(end), first, last))
        last = first
    return parts[::-1]


class _Costs:
    """What it costs to have words in a stretch of voice, as a matrix: those from *row* to *column*, not included."""

    def __init__(self, words: Sequence[Word], units: _Floats, pace: float) -> None:
        self.count = len(words)
        self._units = units
        self._width = units[None, :] - units[:, None]
        self._pace = pace
        self._follow = np.array(
            [number > 0 and not word.leads for number, word in enumerate([*words, Word("", 0.0, True)])]
        )
        hinted = [number for number, word in enumerate(words) if word.hint is not None and not word.leads]
        self._hints = [(number, words[number].hint or 0.0) for number in hinted]
        self._leads = [(number, word.hint or 0.0) for number, word in enumerate(words) if number and word.leads]

    def of(self, start: float, end: float, *, pause: float, unheard: float) -> _Floats:
        """Return the costs for one stretch that comes after a pause, and of which to have no words costs ``unheard`` at
        most.
        """
        needed = self._width * self._pace
        cost = (needed - (end - start)) ** 2 / (needed + _UNPRONOUNCED)
        cost[self._follow] += _PAUSED * max(0.0, pause - _LONG_PAUSE)
        np.fill_diagonal(cost, min((end - start) ** 2 / _UNPRONOUNCED, unheard))
        for number, hint in self._hints:
            inner, begins = self._begins(number, start, end)
            cost[inner] += _HINT * np.minimum(1.0, (begins - hint) ** 2)
        for number, hint in self._leads:
            inner, begins = self._begins(number, start, end)
            cost[inner] += _LEAD * np.maximum(0, np.abs(begins - hint) - _NEAR) ** 2
            cost[number, number + 1 :] += _LEAD * max(0.0, hint - start - _NEAR) ** 2
            cost[:number, number] += _LEAD * max(0.0, end - hint - _NEAR) ** 2
        cost[self._width < 0] = np.inf
        return cost

    def _begins(self, number: int, start: float, end: float) -> tuple[tuple[slice, slice], _Floats]:
        """Return where in the matrix a word is within a stretch and not its first, and when it begins then."""
        inner = (slice(0, number), slice(number + 1, None))
        passed = self._units[number] - self._units[:number, None]
        return inner, start + (end - start) * passed / self._width[inner]
