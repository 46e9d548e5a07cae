"""Processes that are started end, and what they take is read right."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from benchmark.processes import busy_process, cpu_seconds, last_words, parse_smaps, running, tree

SMAPS = """\
7f0000000000-7f0005dcf000 r--s 00000000 fe:00 131 /models/tiny.gguf
Rss:               90112 kB
Pss:               45056 kB
7f0010000000-7f0010800000 rw-p 00000000 00:00 0
Rss:                4096 kB
Pss:                2048 kB
5600-5700 r-xp 00000000 fe:00 99                  /usr/bin/python3
Rss:                1024 kB
Pss:                1024 kB
"""


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_models_file_counts_in_full_and_the_rest_in_part() -> None:
    memory = parse_smaps(SMAPS, "/models/tiny.gguf")
    assert (memory.file, memory.rest, memory.total) == (88, 3, 91)


def test_a_process_has_ended_after_its_block_and_so_have_its_children() -> None:
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    with running([sys.executable, "-c", code]) as (process, _):
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert set(tree(process.pid)) == {process.pid, child}
    assert process.poll() is not None
    deadline = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < deadline:  # until whoever adopted it has seen its end
        time.sleep(0.01)
    assert not is_alive(child)


def test_last_words_explain_an_end() -> None:
    with running([sys.executable, "-c", "raise SystemExit('no such model')"], talks=False) as (process, errors):
        process.wait(10)
        assert last_words(errors) == "no such model"


def test_the_busy_process_takes_time_and_ends() -> None:
    with busy_process() as pid:
        deadline = time.monotonic() + 20
        while cpu_seconds(pid) < 0.05 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert cpu_seconds(pid) >= 0.05
    assert not is_alive(pid)


@pytest.mark.parametrize("options", [["--only", "nonsense"], ["--peer", "nonsense"]])
def test_nonsense_is_refused_before_anything_starts(options: list[str]) -> None:
    script = Path(__file__).resolve().parent.parent.parent / "scripts" / "bench.py"
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
