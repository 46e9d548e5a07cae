"""Workloads beside a program that takes a whole core: how much speed is left, and how soon it changes with the machine.

Thread numbers are compared without speculation, whose gain depends on the text.
"""

from __future__ import annotations

import contextlib
import time
from contextlib import AbstractContextManager, ExitStack

from benchmark import texts
from benchmark.answers import Request, change_over, rate, rates_over_time, settled_rate
from benchmark.client import Stream
from benchmark.contenders import HttpServer, known_settings
from benchmark.lab import PLAIN_SETTINGS, Lab, NotPossible
from benchmark.processes import busy_process
from benchmark.results import Results, Row, at_least, at_most
from benchmark.throughput import STREAMS

_SETTING = "threads: "
AUTO = f"{_SETTING}auto"
_LIMIT = 8.0  # seconds for one busy measurement: some settings come nearly to a standstill
_PEER_LIMIT = 5.0  # seconds likewise for other servers
_QUIET, _BUSY, _AFTER = 2.5, 3.0, 3.0  # seconds of the change-over's phases
_ROOM = 4000  # tokens that its stream may take; we hang up before


def run_threads(lab: Lab) -> None:
    """One stream and eight, on a quiet machine and beside a busy process, with each number of threads; and one stream
    of the other servers.
    """
    ends, peers = lab.ends(), lab.peers()
    with ExitStack() as stack:
        servers = [stack.enter_context(each) for each in _servers(lab)]
        for number, order in lab.rounds(servers):
            for server in order:
                _measure(lab, server, f"quiet/{number}", "quiet", ends)
            with busy_process():
                for server in order:
                    _measure(lab, server, f"busy/{number}", "busy", ends)
                for peer in peers:
                    _measure_peer(lab, peer, f"busy/{number}")


def _servers(lab: Lab) -> list[AbstractContextManager[HttpServer]]:
    plain = PLAIN_SETTINGS if PLAIN_SETTINGS.keys() <= known_settings() else {}
    best = lab.load_params()["threads"]
    numbers = sorted({1, max(1, best // 2), best})
    fixed = [lab.server(f"{_SETTING}{threads}", threads=threads, **plain) for threads in numbers]
    return [lab.server(AUTO, threads="auto", **plain), *fixed]


def _measure(lab: Lab, server: HttpServer, seed: str, when: str, ends: tuple[int, ...]) -> None:
    for workload, streams, tokens in (("single", 1, lab.plan.tokens), ("streams", STREAMS, lab.plan.tokens // 4)):
        prompts = texts.stories(f"{workload}/{seed}", streams)
        requests = [Request(tokens, prompt, banned=ends) for prompt in prompts]
        answers = lab.ask("threads", server, requests, _LIMIT)
        lab.results.add("threads", server.name, f"{workload}_{when}", rate(answers) if answers[0].times else 0.0)
        cut_off = sum(answer.finish is None for answer in answers)
        lab.results.add("threads", server.name, f"{workload}_{when}_cut_off", cut_off)


def _measure_peer(lab: Lab, peer: HttpServer, seed: str) -> None:
    """Another server answers one stream; what it has not finished in time is cut off."""
    if f"threads/{peer.name}" in lab.results.missing:
        return
    with contextlib.suppress(NotPossible):
        (answer,) = lab.ask("threads", peer, [Request(lab.plan.tokens, texts.story(seed))], _PEER_LIMIT)
        spent = answer.ended - answer.started if answer.finish else _PEER_LIMIT
        lab.results.add("threads", peer.name, "single_busy", answer.tokens / spent)
        lab.results.add("threads", peer.name, "single_busy_cut_off", float(answer.finish is None))


def run_change(lab: Lab) -> None:
    """A stream that lives through the start and the end of a busy process."""
    ends = lab.ends()
    plain = PLAIN_SETTINGS if PLAIN_SETTINGS.keys() <= known_settings() else {}
    with lab.server(AUTO, threads="auto", **plain) as server:
        for number in range(lab.plan.rounds):
            _live_through(lab, server, Request(_ROOM, texts.story(f"change/{number}"), banned=ends))


def _live_through(lab: Lab, server: HttpServer, request: Request) -> None:
    stream = server.client.start(request)
    try:
        server.client.pump(lambda: _seconds(stream) >= _QUIET, 30)
        with busy_process():
            began = _wait(server, stream, _BUSY)
        ended = _wait(server, stream, _AFTER)
    finally:
        server.client.stop(stream)
    _note(lab, stream, began, ended)


def _seconds(stream: Stream) -> float:
    return stream.pieces[-1][0] - stream.started if stream.pieces else 0.0


def _wait(server: HttpServer, stream: Stream, seconds: float) -> float:
    """Read for so long, and return the moment at which that began."""
    began = time.perf_counter()
    server.client.pump(lambda: stream.done or time.perf_counter() >= began + seconds, seconds + 1)
    return began


def _note(lab: Lab, stream: Stream, began: float, ended: float) -> None:
    answer = stream.answer()
    lab.complete(answer)
    if answer.error or len(answer.times) < 2:
        lab.results.missing["change"] = answer.error or "the stream stood still"
        raise NotPossible(lab.results.missing["change"])
    last = ended + _AFTER
    figures = {
        "before": settled_rate(answer, answer.times[0], began),
        "busy": settled_rate(answer, began, ended),
        "after": settled_rate(answer, ended, last),
        "to_busy": change_over(answer, began, ended),
        "to_quiet": change_over(answer, ended, last),
    }
    for figure, value in figures.items():
        lab.results.add("change", AUTO, figure, value)
    windows = [[at - answer.times[0], value] for at, value in rates_over_time(answer, answer.times[0], last)]
    places = [began - answer.times[0], ended - answer.times[0]]
    lab.results.add_detail("change", {"rates": windows, "busy_from_to": places})


def threads_rows(results: Results) -> list[Row]:
    """Each setting's rates, and the automatic one against the best fixed one."""
    names = list(dict.fromkeys(name for work, name, _ in results.samples if work == "threads")) or [AUTO]
    settings = [name for name in names if name.startswith(_SETTING)]
    rows = []
    for workload, title in (("single", "one stream"), ("streams", "8 streams")):
        for when in ("quiet", "busy"):
            figure = f"{workload}_{when}"
            shown = names if figure == "single_busy" else settings
            rows += [results.row(("threads", name, figure), f"{title}, {when}: {name}", "tokens/s") for name in shown]
            rows.append(_against_best(results, settings, figure, f"{title}, {when}: auto / best fixed"))
        bound = at_least(0.55) if workload == "single" else None
        quiet, busy = ("threads", AUTO, f"{workload}_quiet"), ("threads", AUTO, f"{workload}_busy")
        rows.append(results.ratio(busy, quiet, f"{title}: auto, busy / quiet", target=bound))
    return rows


def _against_best(results: Results, names: list[str], figure: str, what: str) -> Row:
    fixed = [name for name in names if name != AUTO and results.get("threads", name, figure)]
    target = at_least(0.97) if figure == "single_quiet" else None
    if not fixed:
        return Row("threads", what, None, "x", target=target, note=results.why_missing("threads", AUTO))
    best = max(fixed, key=lambda name: results.row(("threads", name, figure), "").value or 0.0)
    return results.ratio(("threads", AUTO, figure), ("threads", best, figure), f"{what} ({best})", target=target)


def change_rows(results: Results) -> list[Row]:
    """How soon a stream has its new speed."""
    return [
        results.row(("change", AUTO, "to_busy"), "change-over when a busy process starts", "s", target=at_most(1.0)),
        results.row(("change", AUTO, "to_quiet"), "change-over when it ends", "s", target=at_most(1.0)),
        results.ratio(("change", AUTO, "busy"), ("change", AUTO, "before"), "change-over: rate beside it / before"),
        results.ratio(("change", AUTO, "after"), ("change", AUTO, "before"), "change-over: rate after it / before"),
    ]
