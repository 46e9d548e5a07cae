"""Measure llamaserve against the bare loop over llama.cpp's C API and against other servers, in one run on one machine.

    make bench                                            everything, five rounds: about forty minutes
    python scripts/bench.py --quick                       everything, one round
    python scripts/bench.py --only single,streams         some workloads
    python scripts/bench.py --profile                     where a step's time goes
    python scripts/bench.py --peer NAME=http://host:port/v1      another OpenAI server beside the others
    python scripts/bench.py --url http://host:port/v1     a server that is running, as far as its settings allow

Contenders take turns round by round, and what counts is the ratio of medians, since both sides are measured in the same
minute. docs/performance.md says what each row means.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from benchmark import (
    constrained,
    contention,
    crowd,
    embeddings,
    footprint,
    long_prompt,
    pictures,
    prefixes,
    profiling,
    report,
    speculation,
    speech,
    swap,
    throughput,
)
from benchmark.client import Unreachable
from benchmark.lab import Lab, NotPossible, Plan, open_lab
from benchmark.models import find_model
from benchmark.processes import StartFailed
from benchmark.results import Results, Row
from rich.console import Console

from llamaserve.errors import LlamaserveError
from llamaserve.registry.cache import cache_folder

_INTERRUPTED = 130  # exit status; what was measured until then is shown all the same


@dataclass(frozen=True)
class Workload:
    """Something to measure, and the rows of the table that come of it."""

    name: str
    what: str
    run: Callable[[Lab], None]
    rows: Callable[[Results], Sequence[Row]]


WORKLOADS = (
    Workload("memory", "memory over what llama.cpp needs", footprint.run, footprint.rows),
    Workload("single", "one stream", throughput.run_single, throughput.single_rows),
    Workload("streams", "8 streams at once", throughput.run_streams, throughput.streams_rows),
    Workload("choices", "4 answers to one prompt", throughput.run_choices, throughput.choices_rows),
    Workload("shared", "8 clients with one system prompt", prefixes.run_shared, prefixes.shared_rows),
    Workload("conversation", "a growing conversation", prefixes.run_conversation, prefixes.conversation_rows),
    Workload("long", "a long prompt beside a stream", long_prompt.run, long_prompt.rows),
    Workload("code", "a code edit, speculation on and off", speculation.run_code, speculation.code_rows),
    Workload("json", "4 streams whose output must have a form", constrained.run, constrained.rows),
    Workload("threads", "a busy process, numbers of threads", contention.run_threads, contention.threads_rows),
    Workload("change", "a busy process comes and goes", contention.run_change, contention.change_rows),
    Workload("crowd", "500 clients at once that read slowly", crowd.run, crowd.rows),
    Workload("swap", "two models in turn, room for one", swap.run, swap.rows),
    Workload("embeddings", "texts to vectors, in one request and by 64 clients", embeddings.run, embeddings.rows),
    Workload("speech", "speech to text, and chats beside it", speech.run, speech.rows),
    Workload("pictures", "pictures, and a chat beside them", pictures.run, pictures.rows),
    Workload("profile", "where a step's time goes", profiling.run, profiling.rows),
)


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(workload.name for workload in WORKLOADS)
    parser.add_argument("--model", help="a model of models.yaml, or a .gguf file; default: the starter model")
    parser.add_argument(
        "--embedding-model", default="all-minilm-l6-v2", help="likewise, for embeddings; default: %(default)s"
    )
    parser.add_argument("--speech-model", default="whisper-tiny.en", help="likewise, for speech; default: %(default)s")
    parser.add_argument("--image-model", help="likewise, for pictures; default: a small one of random weights")
    parser.add_argument("--url", help="base URL of a running server, with /v1")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=URL", help="another server to compare with"
    )
    parser.add_argument("--only", metavar="NAMES", help=f"workloads, with commas: {names}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round: does everything work?")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of one answer")
    parser.add_argument("--profile", action="store_true", help="only where a step's time goes, in every part")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to a file")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table for docs/performance.md")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a .png or .svg (needs matplotlib)")
    return parser


def chosen(options: argparse.Namespace) -> list[Workload]:
    """Return the workloads to run. Raises ``SystemExit`` for a name that there is not."""
    if options.profile:
        options.only = "profile"
    if options.only is None:
        return list(WORKLOADS)
    wanted = [name.strip() for name in options.only.split(",") if name.strip()]
    known = {workload.name: workload for workload in WORKLOADS}
    if unknown := [name for name in wanted if name not in known]:
        raise SystemExit(f"error: no workload {', '.join(unknown)}\ntry:   --only {','.join(known)}")
    return [workload for workload in WORKLOADS if workload.name in wanted]


def peers(values: Sequence[str]) -> dict[str, str]:
    """Return the servers of ``--peer NAME=URL`` by name."""
    found: dict[str, str] = {}
    for value in values:
        name, separator, url = value.partition("=")
        if not separator or not name or not url.startswith("http://"):
            raise SystemExit(f"error: --peer {value} is not NAME=http://host:port/v1")
        found[name] = url
    return found


def plan(options: argparse.Namespace, say: Callable[[str], None]) -> Plan:
    """Find the model that the command line names, and fetch it if need be."""
    common: dict[str, Any] = {
        "rounds": 1 if options.quick else max(1, options.rounds),
        "tokens": max(16, options.tokens),
        "url": options.url,
        "peers": peers(options.peer),
        "embedding_model": options.embedding_model,
        "speech_model": options.speech_model,
        "image_model": options.image_model,
        "cache": cache_folder() / "benchmark",
        "say": say,
    }
    if options.url:
        return Plan(model=options.model, file=None, options={}, **common)
    found = find_model(options.model)
    return Plan(model=found.name, file=found.file, options=found.options, **common)


def measure(lab: Lab, workloads: Sequence[Workload], say: Callable[[str], None]) -> bool:
    """Run the workloads; one that can't be run is reported, and the others go on. Return whether the user ended it."""
    ended = False
    for workload in workloads:
        if ended:
            lab.results.missing[workload.name] = "interrupted"
            continue
        start = time.monotonic()
        say(f"{workload.name}: {workload.what} ...")
        try:
            workload.run(lab)
        except (NotPossible, StartFailed, Unreachable, LlamaserveError, subprocess.CalledProcessError) as error:
            lab.results.missing[workload.name] = str(error)
            say(f"{workload.name}: {error}")
        except KeyboardInterrupt:
            ended = True
            lab.results.missing[workload.name] = "interrupted"
        lab.results.add_detail("seconds taken", {workload.name: round(time.monotonic() - start, 1)})
    return ended


def rows_of(workload: Workload, results: Results) -> Sequence[Row]:
    """Return a workload's rows; of one that could not be run at all, only those with a target, or one."""
    rows = workload.rows(results)
    if workload.name not in results.missing or any(row.value is not None for row in rows):
        return rows
    return [row for row in rows if row.target is not None] or rows[:1]


def main() -> None:
    """Measure, print, write."""
    signal.signal(signal.SIGTERM, _end)
    options = arguments().parse_args()
    errors, console = Console(stderr=True), Console()
    console.width = max(console.width, 130)

    def say(line: str) -> None:
        errors.print(line, highlight=False, markup=False, soft_wrap=True)

    workloads, results, interrupted = chosen(options), Results(), False
    try:
        what = plan(options, say)
        with open_lab(what, results) as lab:
            interrupted = measure(lab, workloads, say)
    except (LlamaserveError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(_INTERRUPTED) from None
    rows = [row for workload in workloads for row in rows_of(workload, results)]
    if options.profile:
        rows += profiling.share_rows(results)
    elif not options.url:
        rows.append(speculation.worst_row(results))
    report.print_table(rows, console)
    _write(options, what, results, rows, say)
    if interrupted:
        sys.exit(_INTERRUPTED)


def _write(
    options: argparse.Namespace, what: Plan, results: Results, rows: Sequence[Row], say: Callable[[str], None]
) -> None:
    command = " ".join(["python", "scripts/bench.py", *sys.argv[1:]])
    facts: dict[str, Any] = {"command": command, "model": what.model, "file": str(what.file), "url": what.url}
    facts |= {"rounds": what.rounds, "tokens": what.tokens, "settings": dict(what.options)}
    if options.json:
        report.write_json(options.json, results, rows, facts)
    if options.markdown:
        options.markdown.write_text(report.as_markdown(rows), encoding="utf-8")
    if options.plot:
        machine = report.machine()
        title = f"{what.model}, {machine['processor']}, {machine['cores']} cores, {what.rounds} rounds"
        try:
            report.write_plot(options.plot, results, rows, title)
        except ImportError as error:
            say(f"no plot: {error}; try: pip install matplotlib")


def _end(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
