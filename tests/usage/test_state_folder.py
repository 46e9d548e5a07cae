"""Where records are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamaserve.usage.state_folder import ledger_path, state_folder


def test_it_is_the_users_own_unless_another_is_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    assert state_folder(None).is_relative_to(tmp_path)
    assert state_folder(None).name == "llamaserve"
    assert state_folder(Path("~/here")) == tmp_path / "here"
    assert state_folder(Path("there")) == tmp_path / "there"
    assert ledger_path(Path("there")) == tmp_path / "there" / "usage.sqlite3"
    assert [*tmp_path.iterdir()] == []
