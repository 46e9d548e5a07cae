"""The worker process with clocks in it: ``python profiled_host.py FD REPORT`` is ``llamaserve.worker.host FD``.

From outside: functions are replaced by ones that time them, and the worker's own code has no timers. When the socket
closes, the report is written: for each step, the rows of its batch and the seconds of each part, without what a part
called that has a clock of its own.
"""

from __future__ import annotations

import functools
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from llamaserve.engine import constraint, embedder, engine, llama, packing, runner, sampling, scheduler
from llamaserve.worker import host

_PARTS = (
    ("plan", scheduler.Scheduler, ("plan",)),
    ("fill the batch", llama.Batch, ("add", "clear")),
    ("llama_decode", llama.lib, ("llama_decode",)),
    ("form of the answer", constraint.Form, ("__call__", "keep_best", "accept")),
    ("draw the token", sampling.Greedy, ("sample",)),
    ("draw the token", sampling.Sampler, ("sample",)),
    ("look at logits and sample", runner.LlamaRunner, ("_sample",)),
    ("run the batch", runner.LlamaRunner, ("evaluate",)),
    ("accept the token, make text", engine.Engine, ("_accept",)),
    ("step", engine.Engine, ("step",)),
    ("tokenise", embedder.Embedder, ("encode",)),
    ("pack", packing.Packer, ("plan",)),
    ("read the vectors", llama.Context, ("pooled",)),
    ("put parts together", embedder.Embedder, ("_take",)),
    ("forget the text", embedder.Embedder, ("_release",)),
    ("run the batch", embedder.Embedder, ("_evaluate",)),
    ("make the answer", embedder.Embedder, ("_finish",)),
    ("step", embedder.LoadedEmbedder, ("step",)),
    ("encode", host, ("encode_events",)),
    ("send", host.FrameSocket, ("write",)),
    ("occupancy", engine.Engine, ("occupancy",)),
    ("occupancy", embedder.Embedder, ("occupancy",)),
)


class Clocks:
    """The seconds of each part in the step under way, and of all steps before it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._now: dict[str, float] = {}
        self._threads = threading.local()

    def _inner(self) -> list[float]:
        """Return, of each part under way in this thread, the seconds of timed parts in it."""
        found: list[float] = self._threads.__dict__.setdefault("inner", [])
        return found

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with a clock around it."""
        clock = time.perf_counter

        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            inner = self._inner()
            inner.append(0.0)
            start = clock()
            try:
                return function(*arguments, **options)
            finally:
                spent = clock() - start
                self._now[name] = self._now.get(name, 0.0) + spent - inner.pop()
                if inner:
                    inner[-1] += spent

        return timed

    def next_step(self) -> None:
        """Begin a new step; what was sent since the last one belongs to the last one."""
        if self._now:
            self.steps.append(self._now)
        self._now = {}

    def note(self, name: str, value: float) -> None:
        """Keep a figure of the step under way."""
        self._now[name] = value


def install(clocks: Clocks, report: Path) -> None:
    """Put clocks around the parts that there are, and have the report written when the process ends."""
    for name, owner, methods in _PARTS:
        for method in methods:
            if hasattr(owner, method):
                setattr(owner, method, clocks.wrap(name, getattr(owner, method)))
    decode, leave = llama.lib.llama_decode, host.os._exit

    def counted(step: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def counted_step(self: Any) -> Any:
            clocks.next_step()
            return step(self)

        return counted_step

    def counted_decode(context: Any, batch: Any) -> Any:
        clocks.note("rows", batch.n_tokens)
        return decode(context, batch)

    def exit_with_report(code: int) -> NoReturn:
        clocks.next_step()
        report.write_text(json.dumps(clocks.steps))
        leave(code)
        raise SystemExit(code)

    for each in (engine.Engine, embedder.LoadedEmbedder):
        each.step = counted(each.step)
    llama.lib.llama_decode = counted_decode
    host.os._exit = exit_with_report


if __name__ == "__main__":
    install(Clocks(), Path(sys.argv[2]))
    host.main()
