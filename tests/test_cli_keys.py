"""``llamaserve keys`` as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llamaserve.keys.key_file import read_keys
from llamaserve.keys.keyring import Keyring


def keys(state: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LLAMASERVE_STATE_DIR": str(state), "COLUMNS": "200"}
    program = [sys.executable, "-m", "llamaserve", "keys", *words]
    return subprocess.run(program, capture_output=True, text=True, timeout=60, env=environment)


def test_a_key_is_made_listed_and_revoked(tmp_path: Path) -> None:
    made = keys(tmp_path, "create", "laptop", "--admin", "--tokens-per-minute", "500")
    assert made.returncode == 0
    secret = made.stdout.strip()
    (key,) = read_keys(tmp_path / "keys.yaml").listed()
    assert Keyring([], [key]).find(secret.encode()) is not None
    listed = keys(tmp_path, "list")
    assert secret not in listed.stdout
    assert "laptop" in listed.stdout
    assert "500" in listed.stdout
    (row,) = json.loads(keys(tmp_path, "list", "--json").stdout)["keys"].values()
    assert row["kind"] == "admin"
    assert row["tokens_per_minute"] == 500
    revoked = keys(tmp_path, "revoke", "laptop")
    assert revoked.returncode == 0
    assert "nobody gets in" in revoked.stderr
    assert read_keys(tmp_path / "keys.yaml").keys == {}


def test_a_list_without_keys_says_how_to_begin(tmp_path: Path) -> None:
    assert "llamaserve keys create" in keys(tmp_path, "list").stderr


@pytest.mark.parametrize(
    "words",
    [
        ("create", "two words"),
        ("create", "api-key"),
        ("create", "laptop", "--concurrent", "0"),
        ("create", "laptop", "--queue", "-1"),
        ("revoke", "nobody"),
    ],
)
def test_mistakes_end_with_what_to_type(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = keys(tmp_path, *words)
    assert done.returncode == 1
    assert "error:" in done.stderr
    assert "try:" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "keys.yaml").exists()


def test_a_file_elsewhere(tmp_path: Path) -> None:
    file = tmp_path / "elsewhere" / "ours.yaml"
    assert keys(tmp_path, "create", "laptop", "--keys-file", str(file)).returncode == 0
    assert [*read_keys(file).keys] == ["laptop"]
