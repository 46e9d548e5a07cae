"""The child process: says that it is up, loads one model, takes commands from the API process and reports events back.

The main thread owns llama.cpp's context and runs the engine. A second thread reads commands. A third does whatever only
needs the vocabulary (tokenising, checking a prompt) or the files of adapters, without waiting for a step, and without
holding up a cancel. The process ends when the socket closes, so it never outlives the API process. Knows nothing of
HTTP.

Run as ``python -m llamaserve.worker.host FD`` with a connected socket at that file descriptor.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from llamaserve.engine.adapters import FileDigest
from llamaserve.engine.embedder import Embedder, Encoded, LoadedEmbedder
from llamaserve.engine.engine import Engine, LoadedEngine
from llamaserve.engine.events import Delta, Failed
from llamaserve.engine.image_generator import ImageGenerator, LoadedImageGenerator, Tell
from llamaserve.engine.llama import list_gpus, memory_in_use, start_backend, uses_gpu
from llamaserve.engine.rounds import Queues
from llamaserve.engine.transcriber import LoadedTranscriber, Transcriber
from llamaserve.engine.work import TextWork, Work
from llamaserve.errors import LlamaserveError, ModelNotCapable, to_value
from llamaserve.frames import FrameSocket
from llamaserve.images.values import DiffusionParams
from llamaserve.speech.values import TranscriberParams
from llamaserve.worker.protocol import (
    Accepted,
    Cancel,
    Detokenize,
    Done,
    Embed,
    Event,
    Generate,
    GenerateImage,
    Hello,
    LimitSpill,
    Load,
    LoadFailed,
    Loading,
    ModelParams,
    Rank,
    Ready,
    Saved,
    SavePrefixes,
    SetAdapters,
    Stop,
    Text,
    Tokenize,
    Tokens,
    Transcribe,
    decode_command,
    encode_events,
)

W = TypeVar("W", bound=Work)

_PROGRESS_STEP = 0.01  # report loading a percent at a time,
_PROGRESS_INTERVAL = 0.03  # and not more often than so many seconds: the API process wants a core for each, too

# Seconds between frames with nothing but text. Each wakes the API process and a client, on cores that the next step
# wants (a third of a millisecond, of 7 for a token of the starter model), and nobody sees text faster than this.
_FRAME = 0.012

# Some tokenisers recurse once a character where letters repeat: with the default 8 MB a text of 25,000 spaces ends the
# process. This is address space, not memory, and enough for ``MAX_TEXT``.
_VOCABULARY_STACK = 512 << 20


class _Texts(NamedTuple):
    """A request whose texts are to be embedded or scored, and are encoded."""

    command: Embed | Rank
    encoded: list[Encoded]


_NO_TEXTS = "this model does nothing with texts alone"

# What reaches the engine's thread: a request whose texts are encoded and whether it was stopped meanwhile, adapters
# whose files were read, or a command about requests.
_Job = (
    tuple[Generate, list[list[int]], bool]
    | _Texts
    | tuple[SetAdapters, dict[str, FileDigest]]
    | Transcribe
    | GenerateImage
    | Cancel
    | Stop
    | LimitSpill
    | SavePrefixes
)
_VocabularyJob = Generate | Embed | Rank | Tokenize | Detokenize | SetAdapters


class Host:
    """One model in this process."""

    def __init__(self, link: FrameSocket) -> None:
        self._link = link
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._vocabulary_jobs: queue.SimpleQueue[_VocabularyJob] = queue.SimpleQueue()
        self._unsent: list[Event] = []
        self._sent = -math.inf  # when the last frame with text was
        self._lock = threading.Lock()
        self._encoding: dict[int, Cancel | Stop | None] = {}  # requests being encoded, and what came for them meanwhile

    def run(self) -> None:
        """Say that a model can be loaded, load it, then serve commands until the socket closes."""
        start_backend()
        self._send([Hello(list_gpus())])
        frame = self._link.read()
        if frame is None:
            return
        command = decode_command(frame)
        if not isinstance(command, Load):
            raise TypeError(f"the first command is {type(command).__name__}, not Load")
        before = memory_in_use()
        try:
            engine, gpu = _loaded(command.params, self._progress_reporter(), lambda events: self._send(list(events)))
        except LlamaserveError as error:
            self._send([LoadFailed(to_value(error))])
            return
        self._send([Ready(gpu, memory_in_use() - before)])
        threading.Thread(target=_or_die, args=(self._read_commands, engine), name="commands", daemon=True).start()
        threading.stack_size(_VOCABULARY_STACK)
        if isinstance(engine, TextWork):
            threading.Thread(
                target=_or_die, args=(self._use_vocabulary, engine), name="vocabulary", daemon=True
            ).start()
        self._run_engine(engine)

    def _send(self, events: list[Event]) -> None:
        self._link.write(encode_events(events))

    def _progress_reporter(self) -> _ProgressReporter:
        return _ProgressReporter(lambda fraction: self._send([Loading(fraction)]))

    def _run_engine(self, engine: Work) -> None:
        while True:
            if engine.idle and self._jobs.empty() and engine.save_ahead():
                continue
            if engine.idle or not self._jobs.empty():
                self._report(engine, self._take(engine, self._jobs.get()))  # nobody's end waits for another's step
            else:
                self._report(engine, list(engine.step()))

    def _report(self, engine: Work, events: list[Event]) -> None:
        """Send what has happened in one frame. Text waits for the next step's if the last text is not a moment old."""
        events += engine.progress()
        if (changed := engine.occupancy()) is not None:
            events.append(changed)
        self._unsent += events
        now = time.monotonic()
        if now - self._sent < _FRAME and engine.steady and all(isinstance(event, Delta) for event in events):
            return
        if self._unsent:
            if any(isinstance(event, Delta) for event in self._unsent):
                self._sent = now
            self._send(self._unsent)
            self._unsent = []

    def _take(self, engine: Work, job: _Job) -> list[Event]:
        try:
            return self._carry_out(engine, job)
        except LlamaserveError as error:
            request = (job[0] if isinstance(job, tuple) else job).request
            assert request is not None
            return [Failed(request, to_value(error))]

    def _carry_out(self, engine: Work, job: _Job) -> list[Event]:
        match job:
            case (Generate(request, _, generation), prompts, stopped):
                _generator(engine).submit(request, prompts, generation)
                if stopped:
                    return list(engine.stop(request))
            case _Texts(command, encoded):
                embedding = command.embedding if isinstance(command, Embed) else None
                _embedder(engine).submit(command.request, encoded, embedding, command.share)
            case Transcribe(request, path, transcription, share):
                _transcriber(engine).submit(request, Path(path), transcription, share)
                with contextlib.suppress(OSError):  # then the API process does it in the end
                    Path(path).unlink()  # it stays open
            case GenerateImage(request, picture):
                _image_generator(engine).submit(request, picture)
            case Cancel(request):
                engine.cancel(request)
            case Stop(target):
                return list(engine.stop(target))
            case (SetAdapters(request, adapters), digests):
                _generator(engine).set_adapters(adapters, digests)
                return [Done(request)]
            case LimitSpill(request, size):
                if isinstance(engine, Engine):
                    engine.limit_spill(size)
                return [Done(request)]
            case SavePrefixes(request, path, size):
                return [Saved(request, *_generator(engine).save_prefixes(Path(path), size))]
        return []

    def _read_commands(self, engine: Work) -> None:
        """Pass commands on until the API process is gone, which ends this one at once."""
        with contextlib.suppress(ConnectionError):  # it died in the middle of a frame
            while (frame := self._link.read()) is not None:
                command = decode_command(frame)
                assert not isinstance(command, Load)
                if isinstance(command, Cancel | Stop):
                    self._end_requests(engine, command)
                    continue
                if isinstance(command, Transcribe | GenerateImage | LimitSpill | SavePrefixes):
                    self._jobs.put(command)
                    continue
                if not isinstance(engine, TextWork):
                    self._send([Failed(command.request, to_value(ModelNotCapable(_NO_TEXTS)))])
                    continue
                if isinstance(command, Generate | Embed | Rank):
                    with self._lock:
                        self._encoding[command.request] = None
                self._vocabulary_jobs.put(command)
        os._exit(0)

    def _end_requests(self, engine: Work, command: Cancel | Stop) -> None:
        """Let a cancel or stop reach its requests wherever they are; it does not wait for a long prompt's step."""
        with self._lock:
            for request in self._encoding if command.request is None else {command.request} & self._encoding.keys():
                if not isinstance(self._encoding[request], Cancel):
                    self._encoding[request] = command
            self._jobs.put(command)
        engine.interrupt(command.request)

    def _use_vocabulary(self, engine: TextWork) -> None:
        """Do what needs the vocabulary, a text of each request of each share in turn: thousands of long ones take
        seconds to encode, and nobody shall wait for another's.
        """
        under_way: Queues[tuple[int, Iterator[None]]] = Queues()
        while True:
            while not under_way or not self._vocabulary_jobs.empty():
                job = self._vocabulary_jobs.get()
                under_way.add((job.request, self._answer(engine, job)), _share_of(job))
            (request, work), share = under_way.take()
            try:
                for _ in work:
                    under_way.add((request, work), share)
                    break
            except LlamaserveError as error:
                with self._lock:
                    self._encoding.pop(request, None)
                self._send([Failed(request, to_value(error))])

    def _answer(self, engine: TextWork, job: _VocabularyJob) -> Iterator[None]:
        """Answer a request that needs the vocabulary, or hand it to the engine; yields where others may have a turn."""
        match job:
            case Generate():
                self._encode_prompts(_generator(engine), job)
            case Embed(_, inputs, embedding, _):
                embedder = _embedder(engine)
                embedder.check(embedding)
                texts = (embedder.encode(text, f"input[{n}]", embedding) for n, text in enumerate(inputs))
                yield from self._encode_texts(job, texts)
            case Rank(_, query, documents, truncate, _):
                pairs = _embedder(engine).encode_pairs(query, documents, truncate=truncate)
                yield from self._encode_texts(job, pairs)
            case Tokenize(request, text, add_bos, parse_special):
                tokens = engine.tokenize(text, add_bos=add_bos, parse_special=parse_special)
                self._send([Tokens(request, tokens)])
            case Detokenize(request, tokens, special):
                self._send([Text(request, engine.detokenize(tokens, special=special))])
            case SetAdapters(_, adapters):  # behind the requests that came before it and may still have been encoded
                self._jobs.put((job, _generator(engine).read_adapters(adapters)))

    def _encode_texts(self, command: Embed | Rank, texts: Iterator[Encoded]) -> Iterator[None]:
        """Encode a request's texts, unless it is cancelled meanwhile, and hand it to the engine."""
        encoded: list[Encoded] = []
        for text in texts:
            encoded.append(text)
            yield
            if isinstance(self._encoding[command.request], Cancel):
                break
        self._hand_over(command.request, lambda _: _Texts(command, encoded))

    def _encode_prompts(self, engine: Engine, command: Generate) -> None:
        """Encode a request's prompts, and hand it to the engine with what came for it meanwhile."""
        generation = command.generation
        engine.check(generation)
        whole = [engine.encode(prompt, generation) for prompt in command.prompts]
        prompts = [engine.cut(tokens, generation) for tokens in whole]
        lengths = [len(tokens) for tokens in prompts]
        accepted = Accepted(command.request, lengths, sum(map(len, whole)) - sum(lengths))
        self._hand_over(command.request, lambda stopped: (command, prompts, stopped), accepted)

    def _hand_over(self, request: int, job: Callable[[bool], _Job], accepted: Accepted | None = None) -> None:
        """Queue a request whose texts are encoded, unless it was cancelled meanwhile; ``job`` is told whether it was
        stopped.
        """
        with self._lock:
            ending = self._encoding.pop(request)
            if isinstance(ending, Cancel):
                return
            if accepted is not None:
                self._send([accepted])
            self._jobs.put(job(ending is not None))


def _loaded(params: ModelParams, on_progress: _ProgressReporter, tell: Tell) -> tuple[Work, bool]:
    """Load a model, and return its work and whether that is done on a GPU."""
    if isinstance(params, DiffusionParams):
        generator = LoadedImageGenerator(params, on_progress, tell)
        return generator, generator.gpu
    if isinstance(params, TranscriberParams):
        transcriber = LoadedTranscriber(params, on_progress)
        return transcriber, transcriber.gpu
    kind = LoadedEngine if params.pooling is None else LoadedEmbedder
    return kind(params, on_progress), uses_gpu(params)


def _share_of(job: _VocabularyJob) -> str:
    if isinstance(job, Generate):
        return job.generation.share
    return job.share if isinstance(job, Embed | Rank) else ""


def _transcriber(engine: Work) -> Transcriber:
    if not isinstance(engine, Transcriber):
        raise ModelNotCapable("this model does not write down speech")
    return engine


def _image_generator(engine: Work) -> ImageGenerator:
    if not isinstance(engine, ImageGenerator):
        raise ModelNotCapable("this model makes no pictures")
    return engine


def _generator(engine: Work) -> Engine:
    if not isinstance(engine, Engine):
        raise ModelNotCapable("this model does not generate text")
    return engine


def _embedder(engine: Work) -> Embedder:
    if not isinstance(engine, Embedder):
        raise ModelNotCapable("this model makes no embeddings")
    return engine


def _or_die(task: Callable[[W], None], engine: W) -> None:
    """Run a thread's work; a bug in it ends the process loudly, since without the thread it would be deaf."""
    try:
        task(engine)
    except ConnectionError:
        os._exit(0)  # the API process is gone
    finally:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(1)


class _ProgressReporter:
    """Passes on loading progress, a percent at a time at most, and not all too often."""

    def __init__(self, report: Callable[[float], None]) -> None:
        self._report = report
        self._last = -1.0
        self._next = -math.inf  # moment

    def __call__(self, fraction: float) -> bool:
        """Return whether to go on loading: not once the API process is gone."""
        now = time.monotonic()
        if fraction < 1 and (fraction - self._last < _PROGRESS_STEP or now < self._next):
            return True
        self._last, self._next = fraction, now + _PROGRESS_INTERVAL
        try:
            self._report(fraction)
        except ConnectionError:
            return False
        return True


def serve(link: socket.socket) -> None:
    """Serve over a connected socket."""
    with contextlib.suppress(ConnectionError):  # the API process is gone, and with it all who could want an answer
        Host(FrameSocket(link)).run()


def heed_no_signals() -> None:
    """Leave signals that come to all processes together, such as from a terminal or a service manager, to the API
    process: it ends us by closing the socket, once answers have come to their end.
    """
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)


def main() -> None:
    """Serve over the inherited socket."""
    heed_no_signals()
    serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
