"""whisper.cpp behind checked calls: one loaded model that listens to 30 seconds at a time.

The only module that imports the binding. A context must not be used by two threads at once. What the binding does not
check is checked here: it takes any array for 32-bit floats, goes on with a file that it could not load, and keeps what
it was told for one call for the next. Knows nothing of requests, or of what becomes of a text.

whisper.cpp would go through a whole file by itself. It is called for one window at a time, so that others can have a
turn between windows, and no audio but the window's is in memory; what it would carry from one window to the next
(where to go on, the text before) is up to the caller. The text and its speed are the same.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import math
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from llamaserve.errors import EngineError, ModelLoadFailed
from llamaserve.speech.languages import NAMES
from llamaserve.speech.values import SAMPLE_RATE, TextToken, Transcription

Samples = npt.NDArray[np.float32]

WINDOW: Final = 30.0  # seconds that Whisper listens to at once
LOOKAHEAD: Final = 5.0  # seconds after the window that whisper.cpp wants to know of, to see that it is not the end
SHORTEST: Final = 0.1  # seconds; whisper.cpp listens to nothing shorter
CONTEXT: Final = 223  # tokens of earlier text that it takes

_LANGUAGES: Final = {51864: 1, 51865: 99, 51866: 100}  # by the number of tokens
_FRAMES: Final = 100  # a second, in which whisper.cpp counts
_RETRY: Final = 0.2  # by how much the temperature rises where a transcript seems to have failed
_COLD: Final = 1e-6  # a temperature that is as good as none; whisper.cpp divides by it
_ERROR: Final = 4  # the level of ggml's log messages that matter
_MISSING: Final = "speech needs two more packages: pip install 'llamaserve[speech]'"

# How a text is split before the longest tokens are looked for in its parts, as the tokenizer of GPT-2 does it.
_PARTS: Final = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


class Piece(NamedTuple):
    """A token of a segment: its probability, when Whisper believes that it begins (seconds; None where that is no
    better than a guess), and the probability of a time in its place, which Whisper writes where something ends.
    """

    token: TextToken
    probability: float
    hint: float | None
    pause: float


class Utterance(NamedTuple):
    """A segment as Whisper heard it, in seconds from the beginning of the window; text tokens only."""

    start: float
    end: float
    pieces: list[Piece]


class Window(NamedTuple):
    """What was heard in a window. ``seconds`` is how much of it is done; the next one begins there. ``context`` are all
    tokens, those of time too, as they can be given to the next window.
    """

    utterances: list[Utterance]
    seconds: float
    temperature: float
    context: list[int]


class Interrupted(Exception):
    """The caller has given up a window."""


class Whisper:
    """A loaded model. It must be closed."""

    def __init__(self, path: str, *, gpu: bool) -> None:
        """Load a file that has been checked. Raises ``ModelLoadFailed``."""
        self._native = _binding()
        params = self._native.whisper_context_default_params()
        params.use_gpu = gpu
        params.flash_attn = True
        _errors.clear()
        self._context = self._native.whisper_init_from_file_with_params(path, params)
        if _errors:  # what failed is an object with nothing in it, and every call with it ends the process
            raise ModelLoadFailed(f"whisper.cpp can't load {path}: {'; '.join(_errors)}")
        self._first_time = self._native.whisper_token_beg(self._context)
        self._end_of_text = self._native.whisper_token_eot(self._context)
        self._languages = _LANGUAGES[self._native.whisper_n_vocab(self._context)]

    def close(self) -> None:
        """Free the model. Further calls do nothing."""
        context, self._context = self._context, None
        if context is not None:
            self._native.whisper_free(context)

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text; without what has none."""
        found: list[int] = []
        for part in _PARTS.findall(text):
            data, place = part.encode("utf-8", "ignore"), 0
            while place < len(data):
                longest = self._longest.get(data[place : place + 2], 1)
                parts = (data[place : place + length] for length in range(longest, 0, -1))
                token = next((each for each in parts if each in self._tokens), None)
                if token is not None:
                    found.append(self._tokens[token])
                place += 1 if token is None else len(token)
        return found

    def language(self, samples: Samples, *, threads: int) -> str:
        """Return the code of the language that is most probably spoken."""
        if self._languages == 1:
            return "en"
        params = self._params(threads)
        params.detect_language = True  # and nothing else; other threads can go on meanwhile
        _check(self._run(params, samples[: int(WINDOW * SAMPLE_RATE)]))
        found = self._native.whisper_full_lang_id(self._context)
        return list(NAMES)[found] if found < self._languages else "en"  # it also looks at those that came later

    def transcribe(
        self,
        samples: Samples,
        transcription: Transcription,
        context: Sequence[int],
        *,
        language: str,
        threads: int,
        given_up: Callable[[], bool],
    ) -> Window:
        """Listen to the first 30 seconds of samples, or all that are left. ``given_up`` is asked again and again.

        Raises ``Interrupted`` once it says so, and ``EngineError``.
        """
        if language not in NAMES:
            raise EngineError(f"{language} is no language of Whisper")
        if not 0 <= transcription.temperature <= 1:  # whisper.cpp would give the last window's text
            raise EngineError(f"{transcription.temperature} is no temperature from 0 to 1")
        native, params = self._native, self._params(threads)
        params.language = language
        params.translate = transcription.translate
        params.temperature = temperature = transcription.temperature if transcription.temperature > _COLD else 0.0
        params.temperature_inc = _RETRY
        params.no_context = True
        params.prompt_tokens = list(context[-CONTEXT:])
        params.print_progress = True  # which means: to tell the callback
        watch = _Watch(given_up)
        params.progress_callback = watch.progress
        native.assign_encoder_begin_callback(params, watch.encoder_begins)
        native.assign_logits_filter_callback(params, watch.logits_filtered)
        native.assign_abort_callback(params, watch.ends)
        code = self._run(params, samples[: int((WINDOW + LOOKAHEAD) * SAMPLE_RATE)])
        if given_up():
            raise Interrupted
        if watch.broken:
            raise EngineError("what the model computes are no numbers; its weights are damaged")
        _check(code)
        return self._window(watch.percent, min(temperature + _RETRY * max(0, watch.attempts - 1), 1.0))

    def _params(self, threads: int) -> Any:
        native = self._native
        params = native.whisper_full_default_params(native.whisper_sampling_strategy.WHISPER_SAMPLING_GREEDY)
        params.n_threads = threads
        params.language = ""
        params.print_progress = params.print_timestamps = False
        return params

    def _run(self, params: Any, samples: Samples) -> int:
        samples = _checked(samples)
        _errors.clear()
        return int(self._native.whisper_full(self._context, params, samples, len(samples)))

    def _window(self, percent: int, temperature: float) -> Window:
        """Read what was heard; whisper.cpp says that so many percent of what it was given are done."""
        utterances: list[Utterance] = []
        context: list[int] = []
        for number in range(self._native.whisper_full_n_segments(self._context)):
            start = self._native.whisper_full_get_segment_t0(self._context, number)
            end = self._native.whisper_full_get_segment_t1(self._context, number)
            tokens = [
                self._native.whisper_full_get_token_data(self._context, number, place)
                for place in range(self._native.whisper_full_n_tokens(self._context, number))
            ]
            if context and context[-1] > self._first_time and tokens and tokens[0].id < self._first_time:
                context.append(self._first_time + start // 2)  # whisper.cpp leaves out where a segment begins
            context += [token.id for token in tokens]
            utterances.append(self._utterance(start / _FRAMES, end / _FRAMES, tokens))
        frames = self._native.whisper_n_len(self._context)
        done = self._frames_done(frames, percent, context)
        if context and context[-1] > self._first_time and done < min(frames, int(WINDOW * _FRAMES)):
            context.append(context[-1])  # and that another one begins there
        return Window(utterances, done / _FRAMES, temperature, context)

    def _frames_done(self, frames: int, percent: int, context: Sequence[int]) -> int:
        """Return where to go on: after the last segment that has an end, or after the whole window if nothing else is
        said in it. Whisper says that by a single token of time at the end, which looks like any other here, and where
        all attempts have failed there are tokens that whisper.cpp disregards. So what it makes of them decides, which
        it tells in percent.
        """
        whole = min(frames, int(WINDOW * _FRAMES))
        said = [2 * int(token - self._first_time) for token in reversed(context) if token > self._first_time]
        for possible in (*said[:1], whole, *said[1:]):
            if 100 * possible // frames == percent:
                return min(possible, whole)
        return min(percent * frames // 100, whole)

    def _utterance(self, start: float, end: float, tokens: Sequence[Any]) -> Utterance:
        pieces, last = [], start
        for token in tokens:
            if token.id >= self._end_of_text:
                continue
            believed = 2 * (token.tid - self._first_time) / _FRAMES
            hint = believed if token.pt > 0.01 and token.ptsum > 0.01 and last < believed <= end else None
            last = last if hint is None else hint
            data = self._native.whisper_token_to_bytes(self._context, token.id)
            pieces.append(Piece(TextToken(token.id, data, float(token.plog)), float(token.p), hint, token.ptsum))
        return Utterance(start, end, pieces)

    @functools.cached_property
    def _tokens(self) -> dict[bytes, int]:
        each = (self._native.whisper_token_to_bytes(self._context, token) for token in range(self._end_of_text))
        return {data: token for token, data in enumerate(each) if data}

    @functools.cached_property
    def _longest(self) -> dict[bytes, int]:
        """How long the longest token is that begins with the same two bytes."""
        found: dict[bytes, int] = {}
        for data in self._tokens:
            found[data[:2]] = max(len(data), found.get(data[:2], 0))
        return found


class _Watch:
    """What whisper.cpp says while it listens to a window; a second window is not begun."""

    def __init__(self, given_up: Callable[[], bool]) -> None:
        self._given_up = given_up
        self._begun = False
        self.attempts = 0  # at the text of the window, each at a higher temperature
        self.broken = False  # whether a logit is no number; with one of them all are
        self.percent = 0

    def ends(self) -> bool:
        return self.broken or self._given_up()

    def encoder_begins(self, _: object) -> bool:
        if self._begun or self._given_up():
            return False
        self._begun = True
        return True

    def logits_filtered(self, _context: object, tokens: int, first_logit: float) -> None:
        self.attempts += tokens == 0
        self.broken |= not math.isfinite(first_logit)

    def progress(self, percent: int) -> None:
        self.percent = percent


def _check(code: int) -> None:
    if code != 0:
        raise EngineError(f"whisper.cpp failed with code {code}: {'; '.join(_errors)}")


def compression(text: str) -> float:
    """Return how many times larger a text is than its compressed form."""
    data = text.encode()
    return len(data) / len(zlib.compress(data)) if data else 0.0


def is_gpu_build() -> bool:
    """Tell whether the library can compute on a GPU."""
    return any(name in _binding().whisper_print_system_info() for name in ("Metal :", "CUDA :", "Vulkan :", "SYCL :"))


def _checked(samples: Samples) -> Samples:
    """Return samples as the binding must have them, which checks nothing: anything else is read as noise, and with none
    at all it listens to the last ones again.
    """
    if samples.dtype != np.float32 or samples.ndim != 1 or not np.isfinite(samples).all():
        raise EngineError("the samples are not finite 32-bit floats in one row")
    if len(samples) < SHORTEST * SAMPLE_RATE:
        raise EngineError(f"{len(samples)} samples are less than the {SHORTEST} seconds that whisper.cpp listens to")
    return np.ascontiguousarray(samples)


@functools.cache
def _binding() -> Any:
    """Return the binding's module, without its package: that one imports what downloads models. Raises
    ``ModelLoadFailed``.
    """
    try:
        native = importlib.import_module("_pywhispercpp")
    except ImportError as error:
        raise ModelLoadFailed(f"{_MISSING} ({error})") from error
    native.whisper_log_set(_on_log)
    atexit.register(native.whisper_log_set, None)  # or the interpreter aborts at its end
    return native


_errors: deque[str] = deque(maxlen=3)  # the last that whisper.cpp has reported


def _on_log(level: int, text: str) -> None:
    if level == _ERROR:
        _errors.append(text.strip())


def samples_of(data: bytes | memoryview) -> Samples:
    """Return stored samples as the numbers from -1 to 1 that Whisper takes."""
    return np.frombuffer(data, dtype="<i2").astype(np.float32) / np.float32(32768)


def text_of(pieces: Sequence[Piece]) -> str:
    """Return the text of tokens; what is cut inside a character is shown as such."""
    return b"".join(piece.token.data for piece in pieces).decode("utf-8", "replace")


def words_of(pieces: Sequence[Piece], *, spaced: bool) -> Iterator[list[Piece]]:
    """Yield the tokens of each word. Where a language has no spaces between words, each character is one."""
    word: list[Piece] = []
    for piece in pieces:
        starts = piece.token.data.startswith(b" ") if spaced else _is_whole(word)
        if word and starts:
            yield word
            word = []
        word.append(piece)
    if word:
        yield word


def _is_whole(word: Sequence[Piece]) -> bool:
    try:
        b"".join(piece.token.data for piece in word).decode()
    except UnicodeDecodeError:
        return False
    return True
