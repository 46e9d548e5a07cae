"""When each word of a transcript is spoken, from the sound itself.

Whisper says roughly when a segment begins and ends, and for some words when they may begin. Between these it knows
nothing, and its segments reach over the pauses between them. So the voice is looked for: a pause is never inside a
word, and within a stretch of voice a word takes about as long as it has letters. Which words belong to which stretch
is the cheapest way of all to divide them: where a stretch is about as long as its words should take, where words begin
about when Whisper believes, and where pauses are before words before which it might have written a time. Knows sounds,
letters and moments; nothing of tokens or models.

The costs were weighed with prompts of a telephone system, joined at random gaps, without noise and with some. Of 400
known beginnings of sentences 3 were wrong by more than 0.3 seconds, and of 956 among single words and short phrases 89:
there Whisper leaves out some and makes some up.
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
_LEVEL: Final = 12  # frames, or a twentieth of a short sound, that exceed the loudness of voice
_NOISE: Final = 10  # percent of the frames that are below that of noise
_VOICE: Final = 0.1  # of the way between the two; what is louder is voice
_PAUSE: Final = 25  # frames; shorter ones are also inside words
_BLIP: Final = 8  # frames; a shorter sound between pauses is no word
_WORD: Final = 2.5  # letters; as much as so many takes each word beside its own
_SLOWEST: Final = 0.06  # seconds a letter; three quarters of it are usual
_LAST_WORD: Final = 0.15  # seconds that the last word before a pause takes longer
_UNPRONOUNCED: Final = 0.2  # seconds; how well a stretch fits is judged less strictly by so much
_UNHEARD: Final = 0.75  # cost at most of a stretch in which nothing is said
_UNHEARD_CUT: Final = 0.02  # likewise of one at the end, which the words may not have come to
_UNEXPECTED: Final = 0.025  # weight of how improbable a pause is before a word (natural logarithm), for each of its
_LONGEST: Final = 1.0  # seconds, up to so many;
_LEAST: Final = 1e-3  # and the least probability that is believed
_HINT: Final = 0.1  # weight of a hint for the beginning of a word, which is wrong if it is a second away
_LEAD: Final = 4.0  # weight of one for that of a segment, before which it does not begin and the last one has ended,
_NEAR: Final = 0.15  # if it is farther away than so many seconds


class Word(NamedTuple):
    """A word to be placed: its text, when Whisper believes that it begins (seconds, None where it has no idea), how
    probable a pause is before it, and whether a segment begins with it.
    """

    text: str
    hint: float | None = None
    pause: float = 1.0
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
    level, noise = np.sort(loudness)[-min(_LEVEL, 1 + whole // 20)], np.percentile(loudness, _NOISE)
    loud = np.flatnonzero(loudness >= noise + _VOICE * (level - noise))
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
        edges = np.minimum(part.end, part.start + (part.end - part.start) * inner / inner[-1])
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
    """Divide words among stretches of voice."""
    lengths = voice.runs[:, 1] - voice.runs[:, 0]
    seconds = float(np.maximum(lengths - _LAST_WORD, lengths / 3).sum())
    costs = _Costs(words, units, min(_SLOWEST, seconds / float(units[-1])))
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
        self._needed = np.maximum(0, self._width * pace) + _LAST_WORD
        self._possible = np.where(self._width < 0, np.inf, 0)
        unexpected = -np.log(np.maximum(_LEAST, [1.0, *(word.pause for word in words[1:]), 1.0]))
        self._paused = _UNEXPECTED * unexpected[:, None]
        self._hints = np.array([np.nan if word.hint is None or word.leads else word.hint for word in words])
        self._leads = [(number, word.hint or 0.0) for number, word in enumerate(words) if number and word.leads]

    def of(self, start: float, end: float, *, pause: float, unheard: float) -> _Floats:
        """Return the costs for one stretch that comes after a pause, and of which to have no words costs ``unheard`` at
        most.
        """
        cost = (self._needed - (end - start)) ** 2 / (self._needed + _UNPRONOUNCED)
        cost += self._paused * min(pause, _LONGEST)
        self._heed_hints(cost, start, end)
        self._heed_leads(cost, start, end)
        np.fill_diagonal(cost, min((end - start) ** 2 / _UNPRONOUNCED, unheard))
        return cost + self._possible

    def _heed_hints(self, cost: _Floats, start: float, end: float) -> None:
        """Add what hints cost for words that are within the stretch and not its first."""
        away = np.maximum(start - self._hints, self._hints - end) >= 1
        passed = np.concatenate(([0], np.cumsum(away)))
        cost += _HINT * np.maximum(0, passed[None, :] - np.append(passed[1:], passed[-1])[:, None])
        for number in np.flatnonzero(~away & ~np.isnan(self._hints)).tolist():
            inner, begins = self._begins(number, start, end)
            cost[inner] += _HINT * np.minimum(1, (begins - self._hints[number]) ** 2)

    def _heed_leads(self, cost: _Floats, start: float, end: float) -> None:
        """Add what it costs that a segment's first word does not begin when it should."""
        for number, hint in self._leads:
            inner, begins = self._begins(number, start, end)
            cost[inner] += _LEAD * np.maximum(0, np.abs(begins - hint) - _NEAR) ** 2
            cost[number, number + 1 :] += _LEAD * max(0.0, hint - start - _NEAR) ** 2
            cost[:number, number] += _LEAD * max(0.0, end - hint - _NEAR) ** 2

    def _begins(self, number: int, start: float, end: float) -> tuple[tuple[slice, slice], _Floats]:
        """Return where in the matrix a word is within a stretch and not its first, and when it begins then."""
        inner = (slice(0, number), slice(number + 1, None))
        passed = self._units[number] - self._units[:number, None]
        return inner, start + (end - start) * passed / self._width[inner]
