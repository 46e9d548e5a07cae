"""Run the server with clients of every kind, have things go wrong, and check that nothing is lost, leaked or wrong.

    make chaos                                   about nine minutes
    make chaos ARGS="--minutes 60"               an hour
    python scripts/chaos.py --seed 7             the faults of an earlier run again, as far as time allows

docs/chaos.md says which faults there are and what is checked. The exit status is 1 if there was any violation. A run
that is interrupted tells what it has found until then.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmark.models import find_model
from faults import recording
from faults.course import Course, Plan
from faults.report import find_faketime, summary, write_report
from faults.server import Down, Refused, Server, Weights
from rich.console import Console

from llamaserve.errors import LlamaserveError

_INTERRUPTED = 130  # exit status


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.0, help="time for faults; default: %(default)s")
    parser.add_argument("--seed", type=int, help="decides which faults come; default: another one each time")
    parser.add_argument("--clients", type=int, default=8, help="that ask all the time; default: %(default)s")
    parser.add_argument("--short", action="store_true", help="about two minutes, as in `make test`")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything that was found, as JSON")
    parser.add_argument("--log", type=Path, metavar="FILE", help="keep what the server logs")
    parser.add_argument("--faketime", type=Path, metavar="FILE", help="libfaketime.so.1, if it is not where it belongs")
    return parser


def plan(options: argparse.Namespace) -> Plan:
    """Return what the command line asks for."""
    seed = random.SystemRandom().randrange(1_000_000) if options.seed is None else options.seed
    if options.short:
        return Plan(seed, seconds=12.0, warm_up=5.0, round=4.0, clients=min(options.clients, 4), storm=8)
    if options.minutes <= 0 or options.clients < 1:
        raise SystemExit("error: --minutes and --clients must be more than nothing")
    return Plan(seed, seconds=60 * options.minutes, clients=options.clients)


def main() -> None:
    """Run, report."""
    options = arguments().parse_args()
    what, console = plan(options), Console(stderr=True, soft_wrap=True, highlight=False, markup=False)

    def say(line: str) -> None:
        console.print(f"{time.strftime('%H:%M:%S')} {line}")

    try:
        speech = find_model("whisper-tiny.en").file if recording.can_be_heard() else None
        weights = Weights(find_model("starter").file, find_model("all-minilm-l6-v2").file, speech)
    except LlamaserveError as error:
        raise SystemExit(f"error: {error}") from None
    except subprocess.CalledProcessError as error:  # it has told why
        raise SystemExit(error.returncode) from None
    say(f"seed {what.seed}: {what.seconds / 60:.1f} minutes of faults with {what.clients} clients")
    interrupted = False
    with tempfile.TemporaryDirectory(prefix="llamaserve-chaos-") as folder:
        server = Server(Path(folder), weights, find_faketime(options.faketime))
        course = Course(server, what, say)
        try:
            asyncio.run(course.run())
        except (RuntimeError, Down, Refused) as error:
            course.journal.violate("run", "the run could not go on", str(error))
        except KeyboardInterrupt:
            interrupted = True
        finally:
            if options.log and server.folders.log.exists():
                options.log.write_bytes(server.folders.log.read_bytes())
    for line in summary(course, interrupted=interrupted):
        console.print(line)
    if options.out:
        write_report(options.out, course)
    sys.exit(1 if course.journal.failed else _INTERRUPTED if interrupted else 0)


def _interrupt(_signal: int, _frame: object) -> None:
    signal.raise_signal(signal.SIGINT)  # which asyncio takes as the wish to end, and cleans up


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(_INTERRUPTED) from None
