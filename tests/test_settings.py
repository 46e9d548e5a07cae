"""Settings as the environment has them: lists, secrets and folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from llamaserve.settings import Settings


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home for the user that is nobody's."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_STATE_HOME", "LLAMASERVE_STATE_DIR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_records_lie_in_the_user_s_folder_or_where_it_is_said(home: Path) -> None:
    usual = Settings().state_folder
    assert usual.is_relative_to(home)
    assert usual.name == "llamaserve"
    assert Settings(state_dir=Path("~/here")).state_folder == home / "here"
    assert Settings(state_dir=Path("there")).state_folder == Path.cwd() / "there"
    settings = Settings(state_dir=home)
    assert (settings.ledger_path, settings.keys_path) == (home / "usage.sqlite3", home / "keys.yaml")
    assert Settings(keys_file=Path("~/k.yaml")).keys_path == home / "k.yaml"
    assert not any(home.iterdir())


@pytest.mark.parametrize(
    ("text", "words"),
    [("a", ["a"]), ("a, b", ["a", "b"]), ('["a", "b,c"]', ["a", "b,c"]), ("[]", []), ("", [""]), ("a,", ["a", ""])],
)
def test_lists_are_words_with_commas_or_json(monkeypatch: pytest.MonkeyPatch, text: str, words: list[str]) -> None:
    monkeypatch.setenv("LLAMASERVE_ALLOWED_HOSTS", text)
    monkeypatch.setenv("LLAMASERVE_API_KEY", text)
    settings = Settings()
    assert settings.allowed_hosts == words
    assert [secret.get_secret_value() for secret in settings.api_key] == words


@pytest.mark.parametrize("text", ["[1, 2]", '["a"', "[[]]"])
def test_what_is_no_list_of_words(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("LLAMASERVE_CORS_ORIGINS", text)
    with pytest.raises(ValidationError):
        Settings()


def test_keys_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMASERVE_API_KEY", "sk-nobody-shall-see-this")
    monkeypatch.setenv("LLAMASERVE_ADMIN_KEY", "sk-nobody-shall-see-this-either")
    assert "nobody" not in repr(Settings()) + str(Settings()) + str(Settings().model_dump())
