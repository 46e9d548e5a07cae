"""Workloads that ask how fast tokens come: one stream, eight at once, and several answers to one prompt.

Compared with the bare loop over the same file, and with other servers. Each round asks everybody for the same, and no
two rounds for the same, so that no cache helps.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmark import texts
from benchmark.answers import Answer, Request, decode_rate, rate
from benchmark.contenders import Contender
from benchmark.lab import BARE, OURS, PEER, PLAIN, QUEUEING, Lab, NotPossible
from benchmark.results import Results, Row, at_least, at_most

STREAMS = 8
CHOICES = 4
_CHOICES_PROMPT = 400  # tokens, so that evaluating the prompt for every choice would show
_PATIENCE = 60.0  # seconds for a peer's answers


def run_single(lab: Lab) -> None:
    """One stream."""
    _alternate(lab, "single", 1, lab.plan.tokens, [*_all_ours(lab), *lab.peers()])


def run_streams(lab: Lab) -> None:
    """Eight streams that begin at the same moment."""
    _alternate(lab, "streams", STREAMS, lab.plan.tokens // 2, [*_all_ours(lab), *lab.peers(queueing=True)])


def _all_ours(lab: Lab) -> list[Contender]:
    return lab.present(lab.ours, lab.plain, lab.bare)


def _alternate(lab: Lab, workload: str, streams: int, tokens: int, contenders: Sequence[Contender]) -> None:
    for contender in contenders:
        _ask(lab, workload, contender, [Request(8, texts.story(f"{workload}/warm"))])
    for number, order in lab.rounds(contenders):
        requests = [Request(tokens, prompt) for prompt in texts.stories(f"{workload}/{number}", streams)]
        for contender in order:
            answers = _ask(lab, workload, contender, requests)
            if answers is not None:
                _note(lab.results, workload, contender.name, answers)


def _ask(lab: Lab, workload: str, contender: Contender, requests: Sequence[Request]) -> list[Answer] | None:
    if f"{workload}/{contender.name}" in lab.results.missing:
        return None
    try:
        return lab.ask(workload, contender, requests, _PATIENCE)
    except NotPossible:
        return None


def _note(results: Results, workload: str, name: str, answers: Sequence[Answer]) -> None:
    results.add(workload, name, "rate", rate(answers))
    results.add(workload, name, "decode_rate", decode_rate(answers))
    results.add(workload, name, "first", max(answer.first for answer in answers))
    results.add(workload, name, "tokens", sum(answer.tokens for answer in answers))
    results.add(workload, name, "interrupted", sum(answer.finish is None for answer in answers))


def run_choices(lab: Lab) -> None:
    """Four answers to one prompt, which should be evaluated once, and one answer to another prompt beside it."""
    contenders = _all_ours(lab)
    for number, order in lab.rounds(contenders):
        for contender in order:
            for choices in (CHOICES, 1):
                seed = f"choices/{number}/{choices}"
                prompt = f"{texts.manual(seed, _CHOICES_PROMPT, lab.count)}\n\n{texts.story(seed)}"
                answers = _ask(lab, "choices", contender, [Request(lab.plan.tokens // 2, prompt, n=choices)])
                if answers is None:
                    continue
                lab.results.add("choices", contender.name, f"first_{choices}", answers[0].first)
                if choices > 1:
                    _note(lab.results, "choices", contender.name, answers)


def _speed_rows(results: Results, workload: str, title: str, bound: float) -> list[Row]:
    rows = [results.row((workload, name, "rate"), f"{title}: {name}", "tokens/s") for name in (OURS, PLAIN, BARE)]
    for name in (PLAIN, OURS):
        for figure, how in (("rate", "prompt and answer"), ("decode_rate", "answer alone")):
            what = f"{title}: {name} / {BARE}, {how}"
            rows.append(results.ratio((workload, name, figure), (workload, BARE, figure), what, target=at_least(bound)))
    return rows


def single_rows(results: Results) -> list[Row]:
    """One stream, against the bare loop and other servers."""
    rows = _speed_rows(results, "single", "one stream", 0.95)
    for peer in _peers(results, "single", (PEER,)):
        rows.append(results.row(("single", peer, "rate"), f"one stream: {peer}", "tokens/s"))
        what = f"one stream: {OURS} / {peer}"
        rows.append(results.ratio(("single", OURS, "rate"), ("single", peer, "rate"), what, target=at_least(1.0)))
    return rows


def streams_rows(results: Results) -> list[Row]:
    """Eight streams, against the bare loop and other servers."""
    rows = _speed_rows(results, "streams", "8 streams", 0.92)
    for peer in _peers(results, "streams", (PEER, QUEUEING)):
        target = at_least(2.5) if peer in (PEER, QUEUEING) else at_least(1.0)
        rows.append(results.row(("streams", peer, "rate"), f"8 streams: {peer}", "tokens/s"))
        what = f"8 streams: {OURS} / {peer}"
        rows.append(results.ratio(("streams", OURS, "rate"), ("streams", peer, "rate"), what, target=target))
        what = f"8 streams: answers of {peer} that were interrupted"
        rows.append(results.row(("streams", peer, "interrupted"), what, "of 8"))
    what = f"8 streams: answers of {OURS} that were interrupted"
    rows.append(results.row(("streams", OURS, "interrupted"), what, "of 8", target=at_most(0), of=max))
    return rows


def _peers(results: Results, workload: str, usual: Sequence[str]) -> list[str]:
    measured = dict.fromkeys(name for work, name, _ in results.samples if work == workload)
    return [*usual, *(name for name in measured if name not in (OURS, PLAIN, BARE, *usual))]


def choices_rows(results: Results) -> list[Row]:
    """Several answers to one prompt."""
    first = f"first_{CHOICES}"
    what = f"n={CHOICES}: time to the first token / that with n=1"
    rows = [results.ratio(("choices", OURS, first), ("choices", OURS, "first_1"), what)]
    for name in (PLAIN, OURS):
        what = f"n={CHOICES}: {name} / {BARE}"
        rows.append(results.ratio(("choices", name, "rate"), ("choices", BARE, "rate"), what))
    return rows
