"""A long prompt arrives beside a stream that is running: how much does the stream feel of it?"""

from __future__ import annotations

from benchmark import texts
from benchmark.answers import Answer, Request
from benchmark.client import Stream
from benchmark.contenders import HttpServer
from benchmark.lab import OURS, Lab, NotPossible
from benchmark.results import Results, Row, at_least, at_most

PROMPT = 4000  # tokens
_ALONE = 1.5  # seconds that the stream runs alone, before and after
_ROOM = 4000  # tokens that the stream may take; we hang up before
_LIMIT = 180.0  # seconds
_LEAST_GAPS = 10
_CHUNK = 2.0  # steps: in a gap longer than this a chunk of the prompt was evaluated


def run(lab: Lab) -> None:
    """Start a stream, send the long prompt, wait for its answer, let the stream run on alone, hang up."""
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
        client.pump(lambda: _has_run(running, 1), _LIMIT)
        beside = client.start(prompt)
        streams.append(beside)
        client.pump(lambda: beside.done or running.done, _LIMIT)
        answered = len(running.pieces)
        client.pump(lambda: _has_run(running, answered), _LIMIT)
    finally:
        for stream in streams:
            client.stop(stream)
    _note(lab, server, running.answer(), beside.answer())


def _has_run(stream: Stream, since: int) -> bool:
    """Whether a stream has run alone for long enough since it had so many pieces."""
    return stream.done or (len(stream.pieces) > since and stream.pieces[-1][0] - stream.pieces[since][0] >= _ALONE)


def _note(lab: Lab, server: HttpServer, running: Answer, beside: Answer) -> None:
    if running.error or beside.error or not running.times:
        raise NotPossible(running.error or beside.error or "the stream did not begin")
    lab.complete(running)
    start, sent = running.times[0], beside.started
    end = beside.times[0] if beside.times else running.ended  # the stream may have come to its end first
    during = running.gaps(sent, end)
    before, after = running.tokens_between(start, sent), running.tokens_between(beside.ended, running.times[-1])
    if not before or not after or len(during) < _LEAST_GAPS:
        raise NotPossible("the stream stood still beside the long prompt, or ended")
    # A server may send several tokens together, so a step is the time that one takes, not a gap. The stream's own text
    # grows meanwhile and makes its steps slower: undisturbed they would take the mean of before and after.
    step = ((sent - start) / before + (running.times[-1] - beside.ended) / after) / 2
    held_up = [gap for gap in during if gap > _CHUNK * step] or [max(during)]
    chunk = sorted(held_up)[round(0.9 * (len(held_up) - 1))] - step
    rate_during = running.tokens_between(sent, end) / (end - sent)
    figures = {"before": (sent - start) / before, "step": step, "chunk": chunk, "worst": max(during)}
    figures |= {"first": beside.first, "worst_of_limit": max(during) / (4 * step + chunk)}
    figures |= {"rate_kept": rate_during * step, "rate_of_before": rate_during * (sent - start) / before}
    for figure, value in figures.items():
        lab.results.add("long", server.name, figure, value)
    lab.results.add_detail("long", {"times": [moment - sent for moment in running.times], "end": end - sent})


def rows(results: Results) -> list[Row]:
    """What the running stream felt."""

    def row(figure: str, what: str, unit: str) -> Row:
        return results.row(("long", OURS, figure), f"beside a {PROMPT}-token prompt: {what}", unit)

    limit = "worst gap / (4 steps + one chunk)"
    return [
        row("first", "its first token after", "s"),
        row("before", "the stream's time per token before", "s"),
        row("step", "the stream's time per token undisturbed, mean of before and after", "s"),
        row("chunk", "one chunk (of the gaps with one in them, one in ten is longer; less a step)", "s"),
        row("worst", "the stream's worst gap", "s"),
        results.row(
            ("long", OURS, "worst_of_limit"),
            f"beside a {PROMPT}-token prompt: {limit}",
            "x",
            target=at_most(1.0),
        ),
        results.row(
            ("long", OURS, "rate_kept"),
            f"beside a {PROMPT}-token prompt: rate during / undisturbed",
            "x",
            target=at_least(0.5),
        ),
        row("rate_of_before", "rate during / before", "x"),
    ]
