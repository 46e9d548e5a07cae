"""A long prompt arrives beside a stream that is running: how much does the stream feel of it?"""

from __future__ import annotations

import statistics

from benchmark import texts
from benchmark.answers import Answer, Request
from benchmark.client import Stream
from benchmark.contenders import HttpServer
from benchmark.lab import OURS, Lab, NotPossible
from benchmark.results import Results, Row, at_least, at_most

PROMPT = 4000  # tokens
_BEFORE = 1.5  # seconds that the stream runs alone
_ROOM = 4000  # tokens that the stream may take; we hang up before
_LIMIT = 180.0  # seconds


def run(lab: Lab) -> None:
    """Start a stream, send the long prompt, wait for its first token, hang up."""
    server, ends = lab.ours(), lab.ends()
    for number in range(lab.plan.rounds):
        prompt = Request(4, texts.manual(f"long/{number}", PROMPT, lab.count), banned=ends)
        drawn = {"temperature": 1, "seed": number}  # the most probable text would soon repeat itself, and be drafted
        story = Request(_ROOM, texts.story(f"long/{number}"), banned=ends, extra=drawn)
        _disturb(lab, server, story, prompt)


def _disturb(lab: Lab, server: HttpServer, story: Request, prompt: Request) -> None:
    client = server.client
    running = client.start(story)
    streams = [running]
    try:
        client.pump(lambda: _has_run(running), _LIMIT)
        beside = client.start(prompt)
        streams.append(beside)
        client.pump(lambda: beside.flowing or running.done, _LIMIT)
    finally:
        for stream in streams:
            client.stop(stream)
    _note(lab, server, running.answer(), beside.answer())


def _has_run(stream: Stream) -> bool:
    return stream.done or (len(stream.pieces) > 1 and stream.pieces[-1][0] - stream.pieces[1][0] >= _BEFORE)


def _note(lab: Lab, server: HttpServer, running: Answer, beside: Answer) -> None:
    if running.error or beside.error or not running.times:
        raise NotPossible(running.error or beside.error or "the stream did not begin")
    lab.complete(running)
    start, sent = running.times[0], beside.started
    end = beside.times[0] if beside.times else running.ended  # the stream may have come to its end first
    during = running.gaps(sent, end)
    before = running.tokens_between(start, sent)
    if not before or not during:
        raise NotPossible("the stream stood still beside the long prompt")
    # A server may send several tokens together, so a step is the time that one takes, not a gap.
    step, step_during, worst = (sent - start) / before, statistics.median(during), max(during)
    chunk = max(0.0, step_during - step)
    rate_during = running.tokens_between(sent, end) / (end - sent)
    figures = {"step": step, "step_during": step_during, "chunk": chunk, "worst": worst, "first": beside.first}
    figures |= {"worst_of_limit": worst / (4 * step + chunk), "rate_kept": rate_during * step}
    for figure, value in figures.items():
        lab.results.add("long", server.name, figure, value)
    lab.results.add_detail("long", {"times": [moment - sent for moment in running.times], "end": end - sent})


def rows(results: Results) -> list[Row]:
    """What the running stream felt."""

    def row(figure: str, what: str, unit: str) -> Row:
        return results.row(("long", OURS, figure), f"beside a {PROMPT}-token prompt: {what}", unit)

    limit = "worst gap / (4 steps before + one chunk)"
    return [
        row("first", "its first token after", "s"),
        row("step", "the stream's time per token before", "s"),
        row("step_during", "the stream's median gap during", "s"),
        row("chunk", "one chunk (the difference)", "s"),
        row("worst", "the stream's worst gap", "s"),
        results.row(
            ("long", OURS, "worst_of_limit"),
            f"beside a {PROMPT}-token prompt: {limit}",
            "x",
            target=at_most(1.0),
        ),
        results.row(
            ("long", OURS, "rate_kept"),
            f"beside a {PROMPT}-token prompt: rate during / before",
            "x",
            target=at_least(0.5),
        ),
    ]
