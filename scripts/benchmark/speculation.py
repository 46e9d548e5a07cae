"""Workloads about drafting tokens ahead: a code edit with speculation on and off, on files with dear and cheap rows.

How much drafts can gain depends on what a step with several tokens costs, so that is measured beside it.
"""

from __future__ import annotations

import difflib
import statistics
from contextlib import ExitStack
from pathlib import Path

from benchmark import contenders, texts
from benchmark.answers import Answer, Request, decode_rate, rate
from benchmark.contenders import HttpServer
from benchmark.lab import OURS, PLAIN, PLAIN_SETTINGS, Lab, NotPossible, loaded_bare_loop
from benchmark.processes import StartFailed
from benchmark.results import Results, Row, at_least

STARTER = "code"  # the workload on the model's own file; "code, F32" is the same on a copy of that type
COPIES = ("Q4_0", "F32")  # F32 takes more memory than any cache holds: reading it costs as much for 16 rows as for one
ROWS = (1, 2, 4, 8, 16)  # tokens of one step whose cost is measured
_REPEATS = 9
_DEPTH = 300  # tokens before the measured step
_COPY = 0.6  # likeness of an answer that is mostly the given text


def run_code(lab: Lab) -> None:
    """Repeat a code file with one name changed."""
    lab.settings(**PLAIN_SETTINGS)  # without the setting there is nothing to compare
    assert lab.plan.file is not None
    for kind in (None, *COPIES):
        workload = STARTER if kind is None else f"{STARTER}, {kind}"
        try:
            _measure_file(lab, workload, contenders.requantised(lab.plan.file, kind, lab.plan.cache))
        except (NotPossible, StartFailed) as error:
            lab.results.missing[workload] = str(error)


def _measure_file(lab: Lab, workload: str, file: Path) -> None:
    source = f"file:{file}"
    _step_costs(lab, workload, source=source)
    _edit_as_asked(lab, workload, source=source)
    with ExitStack() as stack:
        on = stack.enter_context(lab.server(OURS, source=source))
        off = stack.enter_context(lab.server(PLAIN, source=source, **PLAIN_SETTINGS))
        _edit_files(lab, workload, [on, off])


def _step_costs(lab: Lab, workload: str, **changes: str) -> None:
    text = texts.manual("steps", _DEPTH, lab.count)
    settings = {**lab.load_params(**changes), "outputs": max(ROWS)}
    with loaded_bare_loop(settings) as loop:
        costs = loop.step_costs(text, ROWS, _REPEATS)
    for count, seconds in costs.items():
        lab.results.add(workload, f"{count} rows", "seconds", statistics.median(seconds))


def _edit_as_asked(lab: Lab, workload: str, **changes: str) -> None:
    """Measure edits in which the answer is what was wanted: a tiny model seldom does as it is asked."""
    edits = [(edit.prompt, edit.wanted) for edit in texts.code_edits()[: lab.plan.rounds]]
    rates = contenders.obedient_rates(lab.load_params(**changes), edits, int(1.5 * lab.plan.tokens))
    for name, values in rates.items():
        for value in values:
            lab.results.add(workload, f"as asked, {name}", "rate", value)


def _edit_files(lab: Lab, workload: str, servers: list[HttpServer]) -> None:
    edits, ends = texts.code_edits(), lab.ends()
    for number, order in lab.rounds(servers):
        edit = edits[number % len(edits)]
        said = ({"role": "user", "content": edit.prompt},)
        request = Request(int(1.5 * lab.plan.tokens), messages=said, banned=ends)
        answers: dict[str, Answer] = {}
        for server in order:
            (answers[server.name],) = lab.ask(workload, server, [request])
            lab.results.add(workload, server.name, "rate", rate([answers[server.name]]))
            lab.results.add(workload, server.name, "decode_rate", decode_rate([answers[server.name]]))
        on, off = answers[OURS].text, answers[PLAIN].text
        lab.results.add(workload, "both", "same", float(on == off))
        lab.results.add(workload, "both", "copied", _likeness(off, edit.wanted))
        lab.results.add_detail(workload, {"file": edit.name, "same_until": _same_until(on, off), "length": len(off)})


def _likeness(text: str, wanted: str) -> float:
    """Return how much of the text is what was wanted, from 0 to 1."""
    goal = wanted[: len(text)]
    return difflib.SequenceMatcher(None, text, goal, autojunk=False).ratio()


def _same_until(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def code_rows(results: Results) -> list[Row]:
    """The code edit on each file, and what steps cost on it."""
    rows = _file_rows(results, STARTER, "the model's own file", 1.3)
    rows += _file_rows(results, f"{STARTER}, Q4_0", "its Q4_0 copy", None)
    return rows + _file_rows(results, f"{STARTER}, F32", "its F32 copy", 2.0)


def _file_rows(results: Results, workload: str, file: str, bound: float | None) -> list[Row]:
    def key(contender: str, figure: str) -> tuple[str, str, str]:
        return workload, contender, figure

    def cost(count: int) -> Row:
        what = f"{file}: cost of a step with {count} tokens / with 1"
        return results.ratio(key(f"{count} rows", "seconds"), key("1 rows", "seconds"), what)

    target = None if bound is None else at_least(bound)
    on_off = f"code edit, {file}: speculation on / off"
    rounds = len(results.get(workload, "both", "same"))
    return [
        *(cost(count) for count in ROWS[1:]),
        results.ratio(
            key("as asked, on", "rate"),
            key("as asked, off", "rate"),
            f"code edit done as asked, {file}, engine alone: speculation on / off",
            target=target,
        ),
        results.ratio(key(OURS, "decode_rate"), key(PLAIN, "decode_rate"), f"{on_off}, answer alone", target=target),
        _copies_row(results, workload, f"{on_off}, answer alone, where it is a copy"),
        results.ratio(key(OURS, "rate"), key(PLAIN, "rate"), f"{on_off}, prompt and answer"),
        results.row(
            key("both", "same"),
            f"code edit, {file}: same output on and off",
            f"of {rounds}",
            target=at_least(rounds) if rounds else None,
            of=sum,
        ),
        results.row(key("both", "copied"), f"code edit, {file}: likeness of the answer to what was wanted", "x"),
    ]


def _copies_row(results: Results, workload: str, what: str) -> Row:
    """Return the gain in the rounds in which the model did what it was asked, as larger models always do."""
    on, off = results.get(workload, OURS, "decode_rate"), results.get(workload, PLAIN, "decode_rate")
    likenesses = results.get(workload, "both", "copied")
    gains = [one / other for one, other, likeness in zip(on, off, likenesses, strict=False) if likeness >= _COPY]
    if not gains:
        return Row(
            workload, what, None, "x", note="no answer was like what was wanted" if likenesses else "not measured"
        )
    note = f"{len(gains)} of {len(likenesses)} rounds, likeness of at least {_COPY}"
    return Row(workload, what, statistics.median(gains), "x", min(gains), max(gains), note=note)


def worst_row(results: Results) -> Row:
    """Return the workload that speculation slows down most."""
    pairs: list[tuple[float, str]] = []
    for workload in dict.fromkeys(work for work, _, figure in results.samples if figure == "rate"):
        on, off = results.get(workload, OURS, "rate"), results.get(workload, PLAIN, "rate")
        if on and off:
            pairs.append((statistics.median(on) / statistics.median(off), workload))
    what = "speculation on / off: the workload that it serves worst"
    if not pairs:
        return Row(
            "speculation", what, None, "x", target=at_least(0.97), note=results.why_missing("speculation", PLAIN)
        )
    value, workload = min(pairs)
    every = ", ".join(f"{name} {ratio:.2f}" for ratio, name in sorted(pairs))
    return Row("speculation", f"{what}: {workload}", value, "x", target=at_least(0.97), note=every)
