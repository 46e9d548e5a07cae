"""What the settings make of the pool of models."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamaserve.registry.saved_prefixes import saved_prefixes_folder
from llamaserve.registry.spec import load_registry
from llamaserve.serving import make_pool
from llamaserve.settings import Settings


@pytest.mark.parametrize(("size", "stays"), [("0", False), ("1GB", True)])
def test_saved_prefixes_are_removed_when_none_are_to_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str, stays: bool
) -> None:
    monkeypatch.setenv("LLAMASERVE_CACHE", str(tmp_path / "cache"))
    saved_prefixes_folder().mkdir(parents=True)
    file = saved_prefixes_folder() / "former.prefixes"
    file.write_bytes(b"a conversation")
    (tmp_path / "models.yaml").write_text("models: {}\n")
    make_pool(Settings(saved_prefixes=size), load_registry(tmp_path / "models.yaml"), [])
    assert file.exists() is stays
