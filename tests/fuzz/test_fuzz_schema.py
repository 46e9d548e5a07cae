"""Schemathesis, with all its checks, finds nothing: answers are what the document says, whatever is asked for."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from running_server import RunningServer

HERE = Path(__file__).resolve().parent
SEED = 1
PROGRAM = "from schemathesis.cli import schemathesis; schemathesis()"
COSTLY = r"/v1/(audio|images)/|/v1/internal/model/(load|unload|download|delete)"  # in a short run


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, text
    return int(found[1])


@pytest.mark.timeout(0)
def test_schemathesis_finds_nothing(fuzzed_server: RunningServer, minutes: float, tmp_path: Path) -> None:
    seconds = round(minutes * 60)
    options = ["--max-time", str(seconds), "--seed", str(SEED if minutes < 1 else random.randrange(2**31))]
    if minutes < 1:
        options += ["--max-examples", "3", "--exclude-path-regex", COSTLY]
    command = [sys.executable, "-c", PROGRAM, "--config-file", str(HERE / "schemathesis.toml"), "run"]
    done = subprocess.run(
        [*command, f"{fuzzed_server.url}/openapi.json", "--checks", "all", *options],
        env={**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(HERE), "NO_COLOR": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=seconds + 120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert _number(r"(\d+) generated", done.stdout) > 300
    assert _number(r"Tested: (\d+)", done.stdout) == _number(r"Selected: (\d+)/", done.stdout)
    assert not [line for line in fuzzed_server.lines if "Traceback" in line]
    assert fuzzed_server.post("/v1/completions", {"prompt": "x", "max_tokens": 1}).status_code == 200
