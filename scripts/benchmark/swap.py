"""Two models in turn where there is room for one: how long a request waits for its model when the other has to leave.

Both are the same file under two names. A bare load is that of a child which has everything imported and nothing to
wait for, until it is ready; what llama.cpp needs of it, for weights and context alone, is measured in the bare loop's
process. A swap is what a request waits for its first token more than others do whose model is loaded.
Runs on the CPU, with the memory that one and a half of the models need.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from benchmark import contenders, texts
from benchmark.answers import Answer, Request
from benchmark.contenders import HttpServer
from benchmark.lab import BARE, OURS, Lab, NotPossible
from benchmark.processes import command_line, cpu_seconds, tree
from benchmark.results import Results, Row, at_most
from llamaserve.engine.params import LoadParams
from llamaserve.worker.process import WorkerProcess
from llamaserve.worker.spare import Spares

_CONVERSATION = 2000  # tokens
_ONE, _OTHER = "one", "other"  # models
_UNSAVED = "llamaserve, prefixes not saved"
_ROOM = 1.5  # models
_PATIENCE = 15.0  # seconds for a spare child to come up
_QUIET = 0.3  # seconds in which a child that is up takes no processor time
_PROGRAM, _FORK_SERVER = "llamaserve.worker.host", "llamaserve.worker.fork_server_main"


@dataclass(frozen=True)
class _Swapping:
    """A server with two models and room for one."""

    name: str
    one: HttpServer
    other: HttpServer

    def children(self) -> list[int]:
        assert self.one.pid is not None
        commands = [(pid, command_line(pid)) for pid in tree(self.one.pid)]
        forks = [pid for pid, command in commands if _FORK_SERVER in command]  # the server comes before its forks
        return [pid for pid, command in commands if _PROGRAM in command] + forks[1:]

    def settle(self) -> bool:
        """Wait until there is a spare child beside the model's, and nothing is done any more; False when it does not
        come.
        """
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            children = self.children()
            before = [cpu_seconds(pid) for pid in children]
            time.sleep(_QUIET)
            if len(children) > 1 and children == self.children() and before == [cpu_seconds(pid) for pid in children]:
                return True
        return False


def run(lab: Lab) -> None:
    """Bare loads, starts of children, swaps, and swaps back to a conversation, with its prefix saved and without."""
    settings = lab.settings(gpu_layers="none")
    params = contenders.load_params(lab.model, settings)
    with tempfile.TemporaryDirectory(prefix="llamaserve-bench-") as folder:
        with _swapping(OURS, settings, Path(folder), "4GB") as server:
            for number in range(lab.plan.rounds):
                _load(lab, params)
                _swap(lab, server, number)
            for number in range(lab.plan.rounds):
                _come_back(lab, server, number)
        with _swapping(_UNSAVED, settings, Path(folder), "0") as server:
            for number in range(lab.plan.rounds):
                _come_back(lab, server, number)


def _load(lab: Lab, params: dict[str, Any]) -> None:
    with contenders.bare_loop() as loop:
        loop.load(params)
        lab.results.add("swap", BARE, "load", loop.load_seconds)
    start, load = asyncio.run(_start_and_load(msgspec.convert({**params, "spill": 0}, LoadParams)))
    lab.results.add("swap", OURS, "start", start)
    lab.results.add("swap", OURS, "load", load)


async def _start_and_load(params: LoadParams) -> tuple[float, float]:
    """Return the seconds until a child is up, and then until it has loaded a model."""
    spares = Spares()
    try:
        started = time.perf_counter()
        await spares.hardware()
        up = time.perf_counter()
        worker = await WorkerProcess.start("benchmark", params, lambda _: None, spares)
        loaded = time.perf_counter()
        await worker.aclose()
        return up - started, loaded - up
    finally:
        await spares.aclose()


@contextmanager
def _swapping(name: str, settings: dict[str, Any], folder: Path, saved: str) -> Iterator[_Swapping]:
    """Run a server; each of its models has a file of its own, as far as can be seen from its name."""
    file = Path(settings["source"].removeprefix("file:"))
    models = {}
    for model in (_ONE, _OTHER):
        link = folder / f"{model}.gguf"
        if not link.exists():
            link.symlink_to(file)
        models[model] = {**settings, "source": f"file:{link}"}
    environment = {
        "LLAMASERVE_MEMORY": str(int(_ROOM * contenders.memory_need(_ONE, models[_ONE]))),
        "LLAMASERVE_SAVED_PREFIXES": saved,
        "LLAMASERVE_CACHE": str(folder / "cache"),
    }
    others = {_OTHER: models[_OTHER]}
    with contenders.llamaserve(name, _ONE, models[_ONE], others, environment) as one:
        yield _Swapping(name, one, HttpServer(name, one.url, _OTHER, one.pid))


def _swap(lab: Lab, server: _Swapping, number: int) -> None:
    """Go to the other model and back, twice: with a spare child that is up, and right after a load, when it is not
    there yet.
    """
    request = Request(1, texts.story(f"swap/{number}"))
    if not server.settle():
        raise NotPossible("no spare child process was started")
    others = [Request(1, texts.story(f"swap/{number}/{other}")) for other in range(3)]
    _add(lab, server, "swap", request, others, server.other)
    _add(lab, server, "swap_at_once", request, others, server.one)


def _add(
    lab: Lab, server: _Swapping, figure: str, request: Request, others: Sequence[Request], target: HttpServer
) -> None:
    """Note how much longer a request waits than others whose prompts are not cached either."""
    (first,) = lab.ask("swap", target, [request])
    again = [lab.ask("swap", target, [other])[0].first for other in others]
    if len(children := server.children()) > 2:  # its model's and a spare
        raise NotPossible(f"both models were loaded, in {len(children)} processes")
    lab.results.add("swap", OURS, figure, first.first - min(again))


def _come_back(lab: Lab, server: _Swapping, number: int) -> None:
    """Have a long conversation with one model, a word with the other, and go on with the first."""
    text = texts.manual(f"swap/{server.name}/{number}", _CONVERSATION, lab.count)
    question, another = texts.questions(f"swap/{number}", 2)
    messages: list[dict[str, str]] = [{"role": "user", "content": f"{text}\n\n{question}"}]
    (answer,) = lab.ask("swap", server.one, [Request(16, messages=tuple(messages))])
    messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": another}]
    server.settle()
    lab.ask("swap", server.other, [Request(1, texts.story(f"swap/{number}"))])
    server.settle()
    (back,) = lab.ask("swap", server.one, [Request(4, messages=tuple(messages))])
    _note_return(lab.results, server.name, back)


def _note_return(results: Results, name: str, back: Answer) -> None:
    results.add("swap", name, "back", back.first)
    results.add("swap", name, "cached_share", back.cached_tokens / max(1, back.prompt_tokens))


def rows(results: Results) -> list[Row]:
    """Loads, swaps and returns."""
    swap, at_once = ("swap", OURS, "swap"), ("swap", OURS, "swap_at_once")
    talk = f"back to a conversation of {_CONVERSATION} tokens"
    return [
        results.row(("swap", BARE, "load"), "load of a model in llama.cpp alone", "s"),
        results.row(("swap", OURS, "load"), "load of a model in a child that is up", "s"),
        results.row(("swap", OURS, "start"), "start of a child process, without a model", "s"),
        results.row(swap, "swap of two models: a request waits longer", "s"),
        results.row(at_once, "swap right after another one: a request waits longer", "s"),
        results.ratio(swap, ("swap", OURS, "load"), "swap / load in a child that is up", target=at_most(1.3)),
        results.ratio(swap, ("swap", BARE, "load"), "swap / load in llama.cpp alone"),
        results.ratio(at_once, ("swap", OURS, "load"), "swap right after another one / load", target=at_most(1.3)),
        results.row(("swap", OURS, "back"), f"{talk}: first token", "s"),
        results.row(("swap", OURS, "cached_share"), f"{talk}: share reported as cached", "x"),
        results.ratio(
            ("swap", OURS, "back"),
            ("swap", _UNSAVED, "back"),
            f"{talk}: first token, prefix saved / not saved",
            target=at_most(0.25),
        ),
    ]
