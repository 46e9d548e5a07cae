"""keys.yaml: what is written can be read, what is not understood is refused, and changes count while a server runs."""

from __future__ import annotations

import asyncio
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from llamaserve.errors import KeysError
from llamaserve.keys import watched
from llamaserve.keys.key_file import create_key, read_keys, revoke_key
from llamaserve.keys.keyring import Keyring, Limits, given_keys
from llamaserve.keys.watched import WatchedKeys

SUM = "0" * 64


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "keys.yaml"


def test_a_key_that_is_made_is_in_the_file_as_a_sum_only(path: Path) -> None:
    secret = create_key(path, "laptop", Limits(tokens_per_minute=500), admin=True)
    text = path.read_text()
    assert secret not in text
    assert secret.removeprefix("sk-") not in text
    (key,) = read_keys(path).listed()
    assert (key.name, key.admin, key.limits) == ("laptop", True, Limits(tokens_per_minute=500))
    assert Keyring([], [key]).find(secret.encode()) == key


def test_only_its_owner_may_read_the_file(path: Path) -> None:
    create_key(path, "laptop", Limits(), admin=False)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [each.name for each in path.parent.iterdir()] == ["keys.yaml"]


def test_keys_come_and_go_and_the_rest_stays(path: Path) -> None:
    path.parent.mkdir()
    path.write_text(f"defaults: {{concurrent: 3}}\nkeys:\n  tablet: {{sha256: '{SUM}', queue: 1}}\n")
    create_key(path, "laptop", Limits(), admin=False)
    assert revoke_key(path, "tablet") == 1
    (key,) = read_keys(path).listed()
    assert (key.name, key.limits) == ("laptop", Limits(concurrent=3))
    assert revoke_key(path, "laptop") == 0
    assert read_keys(path).listed() == []


def test_a_name_is_taken_once(path: Path) -> None:
    create_key(path, "laptop", Limits(), admin=False)
    before = path.read_bytes()
    for name in ("laptop", "api-key", "admin-key-2", "a b", ""):
        with pytest.raises(KeysError):
            create_key(path, name, Limits(), admin=False)
    with pytest.raises(KeysError):
        revoke_key(path, "phone")
    assert path.read_bytes() == before


def test_keys_that_are_made_at_once_are_all_there(path: Path) -> None:
    threads = [
        threading.Thread(target=create_key, args=(path, f"key{number}", Limits()), kwargs={"admin": False})
        for number in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_keys(path).keys) == 12


@pytest.mark.parametrize(
    "text",
    [
        "keys: [laptop]",
        "[]",
        "false",
        "keys:\n  laptop: {}",
        "keys:\n  laptop: {key: open-sesame}",
        f"keys:\n  laptop: {{sha256: '{SUM[1:]}'}}",
        f"keys:\n  laptop: {{sha256: '{'G' * 64}'}}",
        f"keys:\n  laptop: {{sha256: '{SUM}', admin: 1}}",
        f"keys:\n  laptop: {{sha256: '{SUM}', concurrent: 0}}",
        f"keys:\n  laptop: {{sha256: '{SUM}', concurrent: '4'}}",
        f"keys:\n  laptop: {{sha256: '{SUM}', tokens: 4}}",
        f"keys:\n  api-key: {{sha256: '{SUM}'}}",
        f"keys:\n  'a b': {{sha256: '{SUM}'}}",
        f"key:\n  laptop: {{sha256: '{SUM}'}}",
        "keys: {",
        "keys: !!python/object/apply:os.system [ls]",
        "\x00",
        "keys: {a: !!bool x}",
        "keys: {a: !!int ''}",
        "keys: {a: !!timestamp x}",
        "keys:\n" + "[" * 5000,
    ],
)
def test_a_file_that_is_not_understood_lets_nobody_in(path: Path, text: str) -> None:
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(KeysError) as caught:
        WatchedKeys([], path)
    assert str(path) in caught.value.message


def test_a_file_that_is_too_large_is_refused(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("#" * 2_000_000)
    with pytest.raises(KeysError, match="larger"):
        read_keys(path)


def test_a_folder_that_can_not_be_looked_into_is_not_one_without_keys(tmp_path: Path) -> None:
    with pytest.raises(KeysError):
        WatchedKeys([], tmp_path / ("x" * 300) / "keys.yaml")


def test_no_file_and_no_keys_is_no_need_for_one(path: Path) -> None:
    assert not WatchedKeys([], path).needed
    assert WatchedKeys(given_keys(["one"], []), path).needed
    path.parent.mkdir()
    path.write_text("keys: {}\n")
    assert WatchedKeys([], path).needed


def test_defaults_are_for_keys_of_the_command_line_too(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("defaults: {concurrent: 3}\n")
    (key,) = WatchedKeys(given_keys(["one"], []), path).keyring.keys
    assert key.limits == Limits(concurrent=3)


async def watching(keys: WatchedKeys, change: Callable[[], object], until: Callable[[], bool]) -> None:
    task = asyncio.create_task(keys.watch())
    try:
        change()
        async with asyncio.timeout(10):
            while not until():  # noqa: ASYNC110 - it looks at a file now and then
                await asyncio.sleep(0.01)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_changes_count_while_the_server_runs(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watched, "_INTERVAL", 0.01)
    keys = WatchedKeys([], path)
    made: list[str] = []

    def create() -> None:
        made.append(create_key(path, "laptop", Limits(), admin=False))

    asyncio.run(watching(keys, create, lambda: keys.needed))
    assert keys.keyring.find(made[0].encode()) is not None
    asyncio.run(watching(keys, lambda: path.write_text("keys: 3"), lambda: "go on holding" in caplog.text))
    assert keys.keyring.find(made[0].encode()) is not None
    asyncio.run(watching(keys, path.unlink, lambda: "is gone" in caplog.text))
    assert keys.keyring.find(made[0].encode()) is not None
    other = create_key(path, "phone", Limits(), admin=False)
    asyncio.run(watching(keys, lambda: None, lambda: keys.keyring.find(other.encode()) is not None))
    assert keys.keyring.find(made[0].encode()) is None
    asyncio.run(watching(keys, lambda: revoke_key(path, "phone"), lambda: not keys.keyring.keys))
    assert keys.needed


def test_no_key_gets_rights_when_another_is_revoked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "_INTERVAL", 0.01)
    create_key(path, "boss", Limits(), admin=True)
    keys = WatchedKeys(given_keys(["guest"], []), path)
    asyncio.run(watching(keys, lambda: revoke_key(path, "boss"), lambda: len(keys.keyring.keys) == 1))
    assert [key.admin for key in keys.keyring.keys] == [False]


@pytest.mark.parametrize("text", ["keys: {a: !!bool x}", "keys: {a: !!int ''}", "keys: 3", "\x00"])
def test_after_a_bad_file_a_good_one_counts(path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(watched, "_INTERVAL", 0.01)
    create_key(path, "laptop", Limits(), admin=False)
    keys = WatchedKeys([], path)

    def break_and_mend() -> None:
        path.write_text(text)
        keys._look()
        assert len(keys.keyring.keys) == 1
        path.write_text("keys: {}\n")

    asyncio.run(watching(keys, break_and_mend, lambda: not keys.keyring.keys))


def test_what_is_written_is_plain_yaml(path: Path) -> None:
    create_key(path, "laptop", Limits(queue=0), admin=False)
    entry = yaml.safe_load(path.read_text())["keys"]["laptop"]
    assert set(entry) == {"sha256", "created", "queue"}
