"""The figures as Markdown, for the terminal and for docs/moderation.md."""

from __future__ import annotations

from collections.abc import Sequence

from moderation.data import BENIGN, DANGEROUS, PEOPLE, Data
from moderation.evaluation import ALL, LEAST_ACCURACY, MOST_FALSE, Counts, Report, total
from moderation.training import FOLDS

_KINDS = {
    "harmful": "harmful",
    BENIGN: "harmless",
    PEOPLE: "harmless that say who somebody is",
    DANGEROUS: "harmless that look dangerous",
}


def as_markdown(report: Report, data: Data) -> str:
    """Return all tables."""
    head = (
        f"{len(data.sentences)} sentences in {len(data.styles)} styles: "
        + ", ".join(f"{report.divisions[0][ALL].all[kind]} {name}" for kind, name in _KINDS.items())
        + f"; {len(data.long_texts)} longer texts"
    )
    return "\n\n".join([head, _divisions(report), _flagged(report), _categories(report), _longer(report)]) + "\n"


def goals(report: Report) -> str:
    """Return what is asked of the classifier, and whether it is met."""
    verdict = "met" if report.meets_goals else "MISSED"
    return (
        f"goals {verdict}: in each division an accuracy of {LEAST_ACCURACY} on the sentences that are not hard, and of "
        f"what only looks dangerous at most {_percent(MOST_FALSE)} flagged, of those and of all"
    )


def _divisions(report: Report) -> str:
    rows = []
    for part in report.parts:
        counts = report.of(part)
        accuracies = [each.accuracy for each in counts]
        false = [each.share(DANGEROUS) for each in counts]
        size = sum(counts[0].all.values())
        ends = f"{_percent(min(false))} to {_percent(max(false))}"
        rows.append([f"{part}, {size}", f"{min(accuracies):.3f} to {max(accuracies):.3f}", ends])
    heading = [f"sentences, {len(report.divisions)} divisions", "accuracy", "flagged of what only looks dangerous"]
    return _table(heading, rows)


def _flagged(report: Report) -> str:
    rows = [_row(f"{FOLDS}-fold cross-validation, {part}", total(report.of(part))) for part in report.parts]
    rows += [_row(f"alike sentences in one fold, {part}", report.grouped[part]) for part in report.parts]
    if report.unseen:
        rows.append(_row("a style never seen", total([*report.unseen.values()])))
    rows += [_row(f"never seen: {style}", counts) for style, counts in report.unseen.items()]
    heading = [
        "judged by",
        "accuracy",
        "flagged of harmful",
        "of harmless",
        "of who somebody is",
        "of what only looks dangerous",
    ]
    return _table(heading, rows)


def _row(name: str, counts: Counts) -> list[str]:
    return [name, f"{counts.accuracy:.3f}", *(_percent(counts.share(kind)) for kind in _KINDS)]


def _categories(report: Report) -> str:
    rows = [
        [f"`{name}`", str(each.sentences), f"{each.precision:.2f}", f"{each.recall:.2f}"]
        for name, each in report.categories.items()
    ]
    return _table(["category", "sentences", "precision", "recall"], rows)


def _longer(report: Report) -> str:
    counts = report.long_texts
    rows = [
        ["written, harmless", counts.flagged[BENIGN], counts.all[BENIGN]],
        ["written, with something harmful", counts.flagged["harmful"], counts.all["harmful"]],
        *([kind, flagged, everything] for kind, (flagged, everything) in report.mixed.items()),
    ]
    return _table(["longer texts", "flagged", "of"], [[str(cell) for cell in row] for row in rows])


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share == share else ""


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---", *("---:" for _ in heading[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
