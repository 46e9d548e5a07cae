"""Writes down speech, for many requests with one loaded Whisper model, a window of 30 seconds at a time.

``submit``, ``cancel`` and ``step`` belong to one thread, which calls ``step`` while it is not idle. Knows nothing of
processes or HTTP.

A step is one window of one request. The request that came first takes turns with the one of which the least is done:
the first has half of all steps, whatever comes behind it, and a short one waits for no more of a long one than it is
long itself. Where requests count for several shares of the model's time, the steps go round the shares, and this is so
in each of them.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

import numpy as np

from llamaserve.engine.events import EngineEvent, Failed, Occupancy, Progress
from llamaserve.engine.rounds import Round
from llamaserve.engine.threads import ThreadController
from llamaserve.engine.work import Work
from llamaserve.errors import EngineError, LlamaserveError, to_value
from llamaserve.speech.values import (
    SAMPLE_RATE,
    SAMPLE_SIZE,
    Heard,
    Segment,
    SpokenWord,
    Transcribed,
    TranscriberParams,
    Transcription,
)
from llamaserve.speech.whisper import (
    CONTEXT,
    LOOKAHEAD,
    SHORTEST,
    WINDOW,
    Interrupted,
    Piece,
    Samples,
    Utterance,
    Whisper,
    Window,
    compression,
    is_gpu_build,
    samples_of,
    text_of,
    words_of,
)
from llamaserve.speech.word_times import Voice, Word, find_voice, place

_UNSPACED: Final = frozenset(("zh", "ja", "th", "lo", "my", "yue", "bo", "km"))  # no spaces between their words
_SILENCE: Final = 2e-4  # of the largest possible amplitude; what is never louder is not listened to
_KEPT_PROMPT: Final = CONTEXT // 2  # tokens of the request's prompt that each window but the first has before it
_LAST: Final = 5.0  # seconds; so short a rest is confused by the text before it, and has none
_DOUBTFUL: Final = 0.5  # the highest temperature at which a text is good enough to be before the next
_STEP: Final = 0.2  # seconds of a window that are done at least, whatever is in it,
_LARGEST_STEP: Final = 1.0  # and twice as many after each that was no larger, up to so many
_BEFORE_VOICE: Final = 0.1  # seconds of pause that are left before a voice
_LONGEST_CUT: Final = 8.0  # seconds of voice at the end of a window that are listened to again

# Whisper writes what is no speech in brackets, or between stars. Speech is not written in square ones; the others count
# only where they are all that is there. Notes are around words that are sung.
_TAG: Final = re.compile(r"\s*(?:\[[^\[\]]{0,200}\]|♪+)")
_ASIDE: Final = re.compile(r"[\s♪]*(?:\([^()]*\)|\*[^*]*\*)[\s.♪]*")


class _Request:
    """An audio, and how far it is done."""

    def __init__(
        self, number: int, file: BinaryIO, transcription: Transcription, prompt: list[int], share: str
    ) -> None:
        self.number = number
        self.share = share
        self.transcription = transcription
        self.prompt = prompt[-CONTEXT:]
        self.truncated = len(prompt) - len(self.prompt)
        self.language = transcription.language
        self.context: list[int] = []  # tokens of the text up to now
        self.done = 0.0  # seconds
        self.step = _STEP  # seconds that are done next at least
        self._amid = False  # whether somebody is speaking just then
        self._file = file
        self._count = os.fstat(file.fileno()).st_size // SAMPLE_SIZE
        self.seconds = self._count / SAMPLE_RATE

    @property
    def over(self) -> bool:
        """Whether there is nothing left to listen to."""
        return self.seconds - self.done < SHORTEST

    def ahead(self) -> Samples:
        """Return the samples of the next window, and some after it."""
        first = int(self.done * SAMPLE_RATE)
        size = min(int((WINDOW + LOOKAHEAD) * SAMPLE_RATE), self._count - first) * SAMPLE_SIZE
        try:
            self._file.seek(first * SAMPLE_SIZE)
            data = self._file.read(size)
        except OSError as error:
            raise _unreadable(error) from error
        if len(data) < size:
            raise _unreadable("it has become shorter")
        return samples_of(data)

    def earlier(self) -> list[int]:
        """Return the tokens that the next window is to have before it."""
        if self.done == 0:
            return self.prompt
        if self.seconds - self.done <= _LAST and not self._amid:
            return []
        kept = self.prompt[-_KEPT_PROMPT:]
        return kept + self.context[-(CONTEXT - len(kept)) :]

    def go_on(self, seconds: float, samples: Samples, context: Sequence[int]) -> None:
        """Have the next window begin so many seconds after the last one, and after a text."""
        self.done += seconds
        self.step = min(2 * self.step, _LARGEST_STEP) if seconds <= self.step else _STEP
        self._amid = any(start < seconds < end for start, end in find_voice(samples).runs)
        self.context = [*self.context, *context][-CONTEXT:] if context else []

    def close(self) -> None:
        """Let go of the audio."""
        self._file.close()


class Transcriber(Work):
    """The requests to one Whisper model, from submission to their last event."""

    def __init__(self, whisper: Whisper, threads: int) -> None:
        self._whisper = whisper
        self.threads = threads
        self._requests: dict[int, _Request] = {}  # by number, in the order in which they came
        self._round = Round()
        self._first_went: dict[str, bool] = {}  # by share that has requests: whether the last step was its first one's
        self._former = False  # the latest of these
        self._given_up: set[int] = set()  # those that are not to go on in the middle of a step
        self._told: Occupancy | None = None

    @property
    def idle(self) -> bool:
        """See ``Work``."""
        return not self._requests

    def submit(self, request: int, path: Path, transcription: Transcription, share: str = "") -> None:
        """Begin to transcribe a file of samples (see ``values``). Raises ``EngineError`` when it can't be read."""
        prompt = self._whisper.tokenize(" " + transcription.prompt.strip()) if transcription.prompt.strip() else []
        self._requests[request] = _Request(request, _opened(path), transcription, prompt, share)
        self._round.join(share)

    def step(self) -> list[EngineEvent]:
        """See ``Work``."""
        request = self._next()
        try:
            return self._listen(request)
        except Interrupted:
            self.cancel(request.number)
            return []
        except LlamaserveError as error:
            self.cancel(request.number)
            return [Failed(request.number, to_value(error))]

    def cancel(self, request: int) -> None:
        """See ``Work``."""
        ended = self._requests.pop(request, None)
        if ended is not None:
            ended.close()
            if not self._of(ended.share):
                self._round.leave(ended.share)
                self._first_went.pop(ended.share, None)
        self._given_up.discard(request)

    def interrupt(self, request: int | None) -> None:
        """See ``Work``. That all shall end is no reason to throw away what is nearly there."""
        if request in self._requests:
            self._given_up.add(request)

    def occupancy(self) -> Occupancy | None:
        """See ``Work``."""
        running = min(1, len(self._requests))
        now = Occupancy(running, len(self._requests) - running)
        changed, self._told = now != self._told, now
        return now if changed else None

    def progress(self) -> list[Progress]:
        """See ``Work``."""
        begun = [each for each in self._requests.values() if each.done]
        new = [each for each in self._requests.values() if not each.done]
        return [Progress(each.number, 0, int(each.done), int(each.seconds)) for each in begun] + [
            Progress(each.number, place, 0, 0) for place, each in enumerate(new, len(begun) + 1)
        ]

    def _next(self) -> _Request:
        """Return the request whose turn it is."""
        share = self._round.turn()
        requests = self._of(share)
        self._former = self._first_went[share] = firsts_turn = not self._first_went.get(share, self._former)
        return requests[0] if firsts_turn else min(requests, key=lambda each: each.done)

    def _of(self, share: str) -> list[_Request]:
        """Return a share's requests in the order in which they came."""
        return [each for each in self._requests.values() if each.share == share]

    def _listen(self, request: _Request) -> list[EngineEvent]:
        """Listen to a request's next window."""
        segments: list[Segment] = []
        if not request.over:
            samples = request.ahead()
            if float(np.abs(samples[: int(WINDOW * SAMPLE_RATE)]).max()) > _SILENCE:
                segments = self._transcribe(request, samples)
            else:
                request.done += WINDOW
        if not request.over:
            return [Heard(request.number, segments, request.done)]
        if request.language is None:  # there was nothing to listen to
            request.language = self._whisper.language(np.zeros(SAMPLE_RATE, np.float32), threads=self.threads)
        self.cancel(request.number)
        return [
            Heard(request.number, segments, request.seconds),
            Transcribed(request.number, request.language, request.truncated),
        ]

    def _transcribe(self, request: _Request, samples: Samples) -> list[Segment]:
        if request.language is None:
            request.language = self._whisper.language(samples, threads=self.threads)
        window = self._whisper.transcribe(
            samples,
            request.transcription,
            request.earlier(),
            language=request.language,
            threads=self.threads,
            given_up=lambda: request.number in self._given_up,
        )
        voice = find_voice(samples[: int(window.seconds * SAMPLE_RATE)])
        if request.seconds - request.done - window.seconds < SHORTEST:
            voice = voice._replace(cut=False)  # it ends with the audio, and is heard as a whole
        spaced = request.transcription.translate or request.language not in _UNSPACED
        segments = _segments(window, voice, request.done, spaced=spaced)
        said = segments[-1].end - request.done if segments else 0.0
        start = max(_go_on(window.seconds, voice, said), request.step)
        request.go_on(start, samples, window.context if segments and window.temperature <= _DOUBTFUL else [])
        return segments


def _go_on(done: float, voice: Voice, said: float) -> float:
    """Return where the next window begins: where Whisper wants it, but before a voice that this would cut, if nothing
    of that is said yet.
    """
    start = float(voice.runs[-1][0]) - _BEFORE_VOICE
    return start if voice.cut and start >= max(said, done - _LONGEST_CUT, _STEP) else done


def _segments(window: Window, voice: Voice, begin: float, *, spaced: bool) -> list[Segment]:
    """Return what is said in a window that begins there."""
    groups = [group for each in window.utterances if (group := _spoken(each, spaced=spaced))]
    words = [word for group in groups for word in group]
    times = iter(place([word.timed for word in words], voice))
    ratio = compression("".join(word.text for word in words))
    return [_segment(group, [next(times) for _ in group], window, begin, ratio) for group in groups]


class _Written(NamedTuple):
    """A word as it is written, with the space before it, and its tokens."""

    text: str
    pieces: list[Piece]
    timed: Word


def _spoken(utterance: Utterance, *, spaced: bool) -> list[_Written]:
    """Return the words of a segment without what is no speech."""
    text = text_of(utterance.pieces)
    if _ASIDE.fullmatch(text):
        return []
    tags = [found.span() for found in _TAG.finditer(text)]
    words: list[_Written] = []
    length = count = 0  # of the characters and tokens up to there
    for pieces in words_of(utterance.pieces, spaced=spaced):
        written = text_of(pieces)
        kept = "".join(
            character
            for number, character in enumerate(written, length)
            if not any(start <= number < end for start, end in tags)
        )
        if kept.strip() and words:
            words.append(_Written(kept, pieces, Word(kept, pieces[0].hint, _pause(utterance.pieces[: count + 1]))))
        elif kept.strip():
            words.append(_Written(kept, pieces, Word(kept, utterance.start, leads=True)))
        length += len(written)
        count += len(pieces)
    return words


def _pause(pieces: Sequence[Piece]) -> float:
    """Return how probable a pause is before the last token: as probable as a time there, or before the signs that come
    before it.
    """
    *others, last = pieces
    signs = itertools.takewhile(lambda each: not any(map(str.isalnum, text_of([each]))), reversed(others))
    return max(each.pause for each in (last, *signs))


def _segment(
    words: Sequence[_Written], times: Sequence[tuple[float, float]], window: Window, begin: float, ratio: float
) -> Segment:
    spoken = tuple(
        SpokenWord(word.text.strip(), begin + start, begin + end, _mean([each.probability for each in word.pieces]))
        for word, (start, end) in zip(words, times, strict=True)
    )
    tokens = tuple(each.token for word in words for each in word.pieces)
    return Segment(
        text="".join(word.text for word in words),
        start=spoken[0].start,
        end=spoken[-1].end,
        seek=begin,
        temperature=window.temperature,
        logprob=_mean([token.logprob for token in tokens]),
        compression=ratio,
        words=spoken,
        tokens=tokens,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except (OSError, ValueError) as error:
        raise _unreadable(error) from error


def _unreadable(why: object) -> EngineError:
    return EngineError(f"the decoded audio can't be read: {why}")


class LoadedTranscriber(Transcriber):
    """A transcriber that owns its Whisper model."""

    def __init__(self, params: TranscriberParams, on_progress: Callable[[float], bool]) -> None:
        """Load the model. The library says nothing of how far it is, so ``on_progress`` hears of the end only. Raises
        ``ModelLoadFailed``.
        """
        super().__init__(Whisper(params.path, gpu=params.gpu), params.threads)
        self.gpu = params.gpu and is_gpu_build()
        self._controller = ThreadController(params.threads, long_steps=True) if params.adaptive_threads else None
        on_progress(1.0)

    def submit(self, request: int, path: Path, transcription: Transcription, share: str = "") -> None:
        """See ``Transcriber``."""
        idle = self.idle
        super().submit(request, path, transcription, share)
        if idle and self._controller is not None:
            self._controller.resume()
            self.threads = self._controller.threads

    def step(self) -> list[EngineEvent]:
        """See ``Transcriber``."""
        events = super().step()
        if self._controller is None:
            return events
        if self.idle:
            self._controller.pause()
        elif (threads := self._controller.update()) is not None:
            self.threads = threads
        return events

    def close(self) -> None:
        """Free the model."""
        self._whisper.close()
