"""The child process: loads one model, takes commands from the API process and reports events back.

The main thread owns llama.cpp's context and runs the engine; a second thread reads commands. Whatever only needs the
vocabulary (tokenising, checking a prompt) is answered in that second thread, without waiting for a step. The process
ends when the socket closes, so it never outlives the API process. Knows nothing of HTTP.

Run as ``python -m llamaserve.worker.host FD`` with a connected socket at that file descriptor.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable

from llamaserve.engine.engine import Engine, LoadedEngine
from llamaserve.engine.events import Failed
from llamaserve.engine.llama import start_backend, uses_gpu
from llamaserve.errors import LlamaserveError, to_value
from llamaserve.frames import FrameSocket
from llamaserve.worker.protocol import (
    Accepted,
    Cancel,
    Command,
    Detokenize,
    Event,
    Generate,
    Load,
    LoadFailed,
    Loading,
    Ready,
    Stop,
    Text,
    Tokenize,
    Tokens,
    decode_command,
    encode_events,
)

_PROGRESS_STEP = 0.01  # report loading a percent at a time

# What the reader thread hands to the engine's thread: a request whose prompts are encoded, or a command about requests.
_Job = tuple[Generate, list[list[int]]] | Cancel | Stop


class Host:
    """One model in this process."""

    def __init__(self, link: FrameSocket) -> None:
        self._link = link
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()

    def run(self) -> None:
        """Load the model, then serve commands until the socket closes."""
        frame = self._link.read()
        if frame is None:
            return
        command = decode_command(frame)
        if not isinstance(command, Load):
            raise TypeError(f"the first command is {type(command).__name__}, not Load")
        start_backend()
        try:
            engine = LoadedEngine(command.params, self._progress_reporter())
        except LlamaserveError as error:
            self._send([LoadFailed(to_value(error))])
            return
        self._send([Ready(gpu=uses_gpu(command.params))])
        threading.Thread(target=self._read_commands, args=(engine,), name="commands", daemon=True).start()
        self._run_engine(engine)

    def _send(self, events: list[Event]) -> None:
        self._link.write(encode_events(events))

    def _progress_reporter(self) -> _ProgressReporter:
        return _ProgressReporter(lambda fraction: self._send([Loading(fraction)]))

    def _run_engine(self, engine: Engine) -> None:
        while True:
            events: list[Event] = []
            while engine.idle or not self._jobs.empty():
                events += self._take(engine, self._jobs.get())
                if (changed := engine.occupancy()) is not None:
                    events.append(changed)
                if events and engine.idle:
                    self._send(events)
                    events = []
            events += engine.step()
            if (changed := engine.occupancy()) is not None:
                events.append(changed)
            if events:
                self._send(events)

    def _take(self, engine: Engine, job: _Job) -> list[Event]:
        match job:
            case (Generate(request, _, generation), prompts):
                engine.submit(request, prompts, generation)
            case Cancel(request):
                engine.cancel(request)
            case Stop(target):
                return list(engine.stop(target))
        return []

    def _read_commands(self, engine: Engine) -> None:
        """Answer or pass on commands until the API process is gone, which ends this one at once."""
        try:
            while (frame := self._link.read()) is not None:
                self._answer(engine, decode_command(frame))
        except ConnectionError:
            os._exit(0)  # the API process died in the middle of a frame
        finally:
            error = sys.exc_info()
            if error[0] is not None:
                sys.excepthook(*error)  # a bug: without this thread the process would be deaf, so it ends loudly
            os._exit(0 if error[0] is None else 1)

    def _answer(self, engine: Engine, command: Command) -> None:
        if isinstance(command, Cancel | Stop):
            self._jobs.put(command)
            return
        assert not isinstance(command, Load)
        try:
            match command:
                case Generate(request, prompts, generation):
                    engine.check(generation)
                    encoded = [engine.encode(prompt) for prompt in prompts]
                    self._send([Accepted(request, [len(tokens) for tokens in encoded])])
                    self._jobs.put((command, encoded))
                case Tokenize(request, text, add_bos, parse_special):
                    self._send(
                        [Tokens(request, engine.vocab.tokenize(text, add_bos=add_bos, parse_special=parse_special))]
                    )
                case Detokenize(request, tokens, special):
                    self._send([Text(request, engine.vocab.detokenize(tokens, special=special))])
        except LlamaserveError as error:
            self._send([Failed(command.request, to_value(error))])


class _ProgressReporter:
    """Passes on loading progress, a percent at a time."""

    def __init__(self, report: Callable[[float], None]) -> None:
        self._report = report
        self._last = -1.0

    def __call__(self, fraction: float) -> bool:
        """Return whether to go on loading: not once the API process is gone."""
        if fraction - self._last < _PROGRESS_STEP and fraction < 1:
            return True
        self._last = fraction
        try:
            self._report(fraction)
        except ConnectionError:
            return False
        return True


def main() -> None:
    """Serve over the inherited socket. Ctrl-C is the API process's business: it ends us by closing the socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    link = FrameSocket(socket.socket(fileno=int(sys.argv[1])))
    with contextlib.suppress(ConnectionError):  # the API process is gone, and with it all who could want an answer
        Host(link).run()


if __name__ == "__main__":
    main()
