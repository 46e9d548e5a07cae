"""Where a step's time goes, seen by a worker with clocks in it; and what a token takes of each process."""

from __future__ import annotations

import functools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from benchmark import contenders, texts
from benchmark.answers import Request
from benchmark.lab import PLAIN_SETTINGS, Lab
from benchmark.processes import StartFailed, cpu_seconds, tree
from benchmark.results import Results, Row, at_most
from benchmark.throughput import STREAMS
from llamaserve.engine.events import Embedded, Failed, Finished
from llamaserve.engine.params import Embedding, Generation, LoadParams, Sampling
from llamaserve.frames import FrameSocket
from llamaserve.worker.protocol import Embed, Generate, Load, LoadFailed, Ready, decode_events, encode_command

NATIVE = ("llama_decode",)  # everything else is Python's share
_TOKENS = 160
_HOST = Path(__file__).resolve().parent / "profiled_host.py"
_END_LIMIT = 20.0


def run(lab: Lab) -> None:
    """Look into the steps of one sequence and of eight, then at what a token takes of each process."""
    plain = PLAIN_SETTINGS if PLAIN_SETTINGS.keys() <= contenders.known_settings() else {}
    params = msgspec.convert(lab.load_params(**plain), LoadParams)
    for count in (1, STREAMS):
        for number in range(max(1, min(3, lab.plan.rounds))):
            prompts = texts.stories(f"profile/{number}", count)
            steps = _profiled(params, functools.partial(_generate, prompts=prompts))
            _note_steps(lab.results, count, [step for step in steps if step.get("rows") == count])
    for count in (1, STREAMS):
        _processor_time(lab, count)


def embedding_parts(params: LoadParams, requests: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the seconds of each part of what a worker does to embed these texts, one request after another."""
    total: dict[str, float] = {}
    for step in embedding_steps(params, requests):
        for part, spent in step.items():
            total[part] = total.get(part, 0.0) + spent
    del total["rows"]
    return total


def embedding_steps(params: LoadParams, requests: Sequence[Sequence[str]]) -> list[dict[str, float]]:
    """Return the parts of every step of that, and its tokens as ``rows``; what comes between two is in the former. The
    first step is for a text that comes before the others.
    """
    before = [requests[0][:1]]
    return _profiled(params, functools.partial(_embed, requests=[*before, *requests]))[1:]  # without the load


def _embed(link: FrameSocket, requests: Sequence[Sequence[str]]) -> None:
    for number, wanted in enumerate(requests, 1):
        link.write(encode_command(Embed(number, list(wanted), Embedding())))
        _read_until(link, Embedded, 1)


def _profiled(params: LoadParams, drive: Callable[[FrameSocket], None]) -> list[dict[str, float]]:
    """Return the parts of every step that it takes to do something with a loaded model."""
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryDirectory(prefix="llamaserve-bench-") as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, str(_HOST), str(theirs.fileno()), str(report)]
        environment = {"GOMP_SPINCOUNT": "1000", **os.environ}
        with subprocess.Popen(command, pass_fds=(theirs.fileno(),), env=environment, start_new_session=True) as process:
            theirs.close()
            try:
                link = FrameSocket(ours)
                link.write(encode_command(Load(params)))
                _read_until(link, Ready, 1)
                drive(link)
                link.close()
                process.wait(_END_LIMIT)
            finally:
                process.kill()
        if not report.exists():
            raise StartFailed("the profiled worker left no report")
        steps: list[dict[str, float]] = json.loads(report.read_text())
        return steps


def _generate(link: FrameSocket, prompts: Sequence[str]) -> None:
    sampling = Sampling(seed=1, temperature=0.0)
    generation = Generation(sampling=sampling, max_tokens=_TOKENS, stream=True)
    for number, prompt in enumerate(prompts, 1):
        link.write(encode_command(Generate(number, [prompt], generation)))
    _read_until(link, Finished, len(prompts))


def _read_until(link: FrameSocket, kind: type, count: int) -> None:
    while count > 0:
        frame = link.read()
        if frame is None:
            raise StartFailed("the profiled worker ended")
        for event in decode_events(frame):
            if isinstance(event, Failed | LoadFailed):
                raise StartFailed(f"the profiled worker failed: {event.error}")
            count -= isinstance(event, kind)


def _note_steps(results: Results, count: int, steps: Sequence[Mapping[str, float]]) -> None:
    """Keep the median step and each part's share of all decoding steps together. The first few steps warm caches up."""
    steps = [{part: spent for part, spent in step.items() if part != "rows"} for step in steps[4:]]
    if not steps:
        raise StartFailed("the profiled worker took no step of this size")
    whole = sum(sum(step.values()) for step in steps)
    parts = {part: sum(step.get(part, 0.0) for step in steps) for part in dict.fromkeys(p for s in steps for p in s)}
    name = f"{count} sequences"
    results.add("profile", name, "step", statistics.median(sum(step.values()) for step in steps))
    results.add("profile", name, "python", 1 - sum(parts.get(part, 0.0) for part in NATIVE) / whole)
    for part, spent in parts.items():
        results.add("profile", name, f"share of {part}", spent / whole)


def _processor_time(lab: Lab, count: int) -> None:
    """Note the microseconds of processor time per token of the API process, the worker and this client."""
    server = lab.ours()
    requests = [Request(lab.plan.tokens, prompt, banned=lab.ends()) for prompt in texts.stories("processor", count)]
    pids = tree(server.pid) if server.pid is not None else []
    before = {pid: cpu_seconds(pid) for pid in pids}
    client = time.process_time()
    streams = [server.client.start(request) for request in requests]
    try:
        server.client.pump(lambda: False, contenders.LIMIT)
        client = time.process_time() - client
        spent = {pid: cpu_seconds(pid) - start for pid, start in before.items()}
    finally:
        for stream in streams:
            server.client.stop(stream)
    tokens = max(1, sum(stream.answer().tokens for stream in streams))
    name = f"{count} streams"
    lab.results.add("profile", name, "client", 1e6 * client / tokens)
    if server.pid is not None:
        lab.results.add("profile", name, "api", 1e6 * spent.pop(server.pid) / tokens)
        lab.results.add("profile", name, "worker", 1e6 * sum(spent.values()) / tokens)


def rows(results: Results) -> list[Row]:
    """Python's share of a step, and processor time."""
    found = []
    for count, bound in ((1, 0.03), (STREAMS, 0.05)):
        what = f"step with {count} sequence{'s' * (count > 1)}"
        name = f"{count} sequences"
        found.append(results.row(("profile", name, "step"), f"{what}: median", "s"))
        target = at_most(bound)
        found.append(results.row(("profile", name, "python"), f"{what}: Python's share", "x", target=target))
    for count in (1, STREAMS):
        for figure, who in (("api", "API process"), ("client", "client")):
            what = f"{count} stream{'s' * (count > 1)}: processor time of the {who}"
            found.append(results.row(("profile", f"{count} streams", figure), what, "µs/token"))
    return found


def share_rows(results: Results) -> list[Row]:
    """Every part of a step, for the profile mode."""
    prefix = "share of "
    found = []
    for count in (1, STREAMS):
        name = f"{count} sequences"
        figures = [figure for _, who, figure in results.samples if who == name and figure.startswith(prefix)]
        shares = [results.row(("profile", name, figure), figure.removeprefix(prefix), "x") for figure in figures]
        shares.sort(key=lambda row: row.value or 0.0, reverse=True)
        found += [_titled(row, f"step with {count}: {row.what}") for row in shares]
    return found


def _titled(row: Row, what: str) -> Row:
    return Row(row.workload, what, row.value, row.unit, row.low, row.high)
