"""Train the default classifier of ``POST /v1/moderations``, and measure it.

    python scripts/train_moderation.py            measure, and write llamaserve/moderation/heads.json if that is good
    python scripts/train_moderation.py --check    measure only; exit status 1 if it is not good enough
    python scripts/train_moderation.py --quick    write without measuring

It learns from scripts/moderation/sentences/*.yaml; docs/moderation.md says how, and what the figures mean. A quarter
of an hour; the same sentences give the same file.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path

import msgspec
from benchmark.models import find_model
from moderation.data import FOLDER, read
from moderation.evaluation import LEAST_SENTENCES, Material, evaluate
from moderation.tables import as_markdown, goals
from rich.console import Console

from llamaserve.errors import LlamaserveError
from llamaserve.moderation.heads import FILE, SHA256_KEY, Heads
from llamaserve.registry.gguf import read_header

_MODEL = "all-minilm-l6-v2"


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure only")
    parser.add_argument("--quick", action="store_true", help="write the file without measuring")
    parser.add_argument(
        "--sentences", type=Path, default=FOLDER, metavar="FOLDER", help="the folder with the sentences"
    )
    parser.add_argument("--output", type=Path, default=FILE, metavar="FILE", help="where the heads are written")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables for docs/moderation.md")
    return parser


def encoded(heads: Heads) -> bytes:
    """Return the content of a file of heads, with a line for each list of weights."""
    return re.sub(rb'("(?:directions|vector|products|words)":)', rb"\n\1", msgspec.json.encode(heads)) + b"\n"


def main() -> None:
    """Read, embed, measure, write."""
    options = arguments().parse_args()
    errors, console = Console(stderr=True), Console()

    def say(line: str) -> None:
        errors.print(line, highlight=False, markup=False, soft_wrap=True)

    measures_nothing = options.quick and not options.check
    try:
        data = read(options.sentences)
        data.check(0 if measures_nothing else LEAST_SENTENCES)
        model = find_model(_MODEL)
        sha256 = read_header(model.file).text(SHA256_KEY) or ""
        say(f"embedding {len(data.sentences)} sentences with {model.name}")
        material = Material.of(data, model.name, sha256, model.file)
        if not measures_nothing:
            report = evaluate(material, say)
            tables = as_markdown(report, data)
            console.print(tables, highlight=False, markup=False, soft_wrap=True)
            say(goals(report))
            if options.markdown:
                options.markdown.write_text(tables, encoding="utf-8")
            if not report.meets_goals:
                raise SystemExit(1)
        if not options.check:
            options.output.write_bytes(encoded(material.heads()))
            say(f"written: {options.output}")
    except (LlamaserveError, ValueError, OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
