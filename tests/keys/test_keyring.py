"""Which secrets are keys, and what they allow."""

from __future__ import annotations

import statistics
import time

import pytest
from hypothesis import given, strategies as st

from llamaserve.errors import KeysError
from llamaserve.keys.keyring import (
    Key,
    Keyring,
    Limits,
    digest_of,
    given_keys,
    is_given_name,
    is_guessable,
    name_problem,
    new_secret,
)


def key(secret: str, name: str = "laptop", **more: bool) -> Key:
    return Key(name, digest_of(secret.encode()), **more)


def test_secrets_are_long_and_never_the_same() -> None:
    secrets = {new_secret() for _ in range(100)}
    assert len(secrets) == 100
    assert all(secret.startswith("sk-") and len(secret) == 46 and not is_guessable(secret) for secret in secrets)


@given(st.lists(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1), unique=True, max_size=8))
def test_a_key_is_found_by_its_secret_and_by_nothing_else(secrets: list[str]) -> None:
    keyring = Keyring([], [key(secret, f"key{number}") for number, secret in enumerate(secrets)])
    for number, secret in enumerate(secrets):
        found = keyring.find(secret.encode())
        assert found is not None
        assert found.name == f"key{number}"
        for other in (secret[:-1], secret + "x", secret.swapcase(), " " + secret):
            assert other in secrets or keyring.find(other.encode()) is None


def test_nothing_shows_a_secret() -> None:
    secret = new_secret()
    (known,) = given_keys([secret], [])
    assert secret not in repr(known)
    assert digest_of(secret.encode()).hex() not in repr(known)


@pytest.mark.parametrize("secret", ["", "two words", "tab\t", "naïve", "x" * 513, "line\n", "\0"])
def test_what_no_header_can_carry_is_no_key(secret: str) -> None:
    with pytest.raises(KeysError):
        given_keys([secret], [])


def test_keys_of_the_command_line_have_names() -> None:
    found = given_keys(["one", "two"], ["three", "four"])
    assert [(each.name, each.admin) for each in found] == [
        ("api-key", False),
        ("api-key-2", False),
        ("admin-key", True),
        ("admin-key-2", True),
    ]
    assert all(is_given_name(each.name) for each in found)
    assert not is_given_name("laptop")


def test_keys_of_the_command_line_are_the_admins_where_there_is_no_file_and_no_other() -> None:
    api, admin = given_keys(["api"], ["admin"])
    assert [each.admin for each in Keyring([api]).keys] == [True]
    assert [each.admin for each in Keyring([api], []).keys] == [False]
    assert [each.admin for each in Keyring([api], [key("guest")]).keys] == [False, False]
    assert [each.admin for each in Keyring([api, admin]).keys] == [False, True]
    assert [each.admin for each in Keyring([api], [key("boss", admin=True)]).keys] == [False, True]
    assert [each.admin for each in Keyring([], [key("guest")]).keys] == [False]


def test_one_secret_is_one_key() -> None:
    with pytest.raises(KeysError, match="api-key and laptop are the same key"):
        Keyring(given_keys(["same"], []), [key("same")])


@pytest.mark.parametrize("name", ["laptop", "a", "anna@phone.home", "Open-WebUI_2", "x" * 64])
def test_names(name: str) -> None:
    assert name_problem(name) is None


@pytest.mark.parametrize("name", ["", " ", "-x", ".x", "../x", "a b", "ä", "x" * 65, "a\n", "a/b", 'a"b', "a{b}"])
def test_names_that_would_be_trouble_elsewhere(name: str) -> None:
    assert name_problem(name) is not None


def test_limits_fall_back_on_the_defaults() -> None:
    own = Limits(concurrent=2, queue=0)
    assert own.over(Limits(concurrent=9, tokens_per_minute=5)) == Limits(concurrent=2, queue=0, tokens_per_minute=5)


def test_where_a_wrong_key_differs_does_not_show_in_the_time_that_it_takes() -> None:
    """Ratios of medians of many alternating rounds, since single ones say nothing on a busy machine."""
    right = "x" * 64
    keyring = Keyring(
        [], [key(right, f"key{number}") for number in range(1)] + [key(f"other{n}", f"o{n}") for n in "ab"]
    )
    kinds = {"right": right, "first differs": "y" + right[1:], "last differs": right[:-1] + "y"}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(400):
        for kind, secret in kinds.items():
            data = secret.encode()
            before = time.perf_counter_ns()
            for _ in range(20):
                keyring.find(data)
            times[kind].append(time.perf_counter_ns() - before)
    medians = [statistics.median(each) for each in times.values()]
    assert max(medians) / min(medians) < 1.25, dict(zip(kinds, medians, strict=True))
