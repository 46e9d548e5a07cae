"""The figures as Markdown, for the terminal and for docs/moderation.md."""

from __future__ import annotations

from collections.abc import Sequence

from moderation.data import BENIGN, DANGEROUS, Data
from moderation.evaluation import LEAST_ACCURACY, MOST_FALSE, Counts, Report
from moderation.training import FOLDS

_KINDS = {"harmful": "harmful", BENIGN: "harmless", DANGEROUS: "harmless that look dangerous"}


def as_markdown(report: Report, data: Data) -> str:
    """Return all tables."""
    head = (
        f"{len(data.sentences)} sentences in {len(data.styles)} styles: "
        + ", ".join(f"{report.cross_validation.all[kind]} {name}" for kind, name in _KINDS.items())
        + f"; {len(data.long_texts)} longer texts"
    )
    return "\n\n".join([head, _flagged(report), _categories(report), _longer(report)]) + "\n"


def goals(report: Report) -> str:
    """Return what is asked of the classifier, and whether it is met."""
    counts = report.cross_validation
    verdict = "met" if report.meets_goals else "MISSED"
    return (
        f"goals {verdict}: accuracy {counts.accuracy:.3f} (at least {LEAST_ACCURACY}), "
        f"flagged of what only looks dangerous {counts.share(DANGEROUS):.3f} (at most {MOST_FALSE})"
    )


def _flagged(report: Report) -> str:
    rows = [
        _row(f"{FOLDS}-fold cross-validation", report.cross_validation),
        _row("a style never seen", report.unseen_together),
        *(_row(f"never seen: {style}", counts) for style, counts in report.unseen.items()),
    ]
    heading = ["judged by", "accuracy", "flagged of harmful", "of harmless", "of what only looks dangerous"]
    return _table(heading, rows)


def _row(name: str, counts: Counts) -> list[str]:
    return [name, f"{counts.accuracy:.3f}", *(_percent(counts.share(kind)) for kind in ("harmful", BENIGN, DANGEROUS))]


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
        *([f"12 sentences, {kind}", flagged, everything] for kind, (flagged, everything) in report.mixed.items()),
    ]
    return _table(["longer texts", "flagged", "of"], [[str(cell) for cell in row] for row in rows])


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---", *("---:" for _ in heading[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
