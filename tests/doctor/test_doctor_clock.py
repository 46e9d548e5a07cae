"""The clock and the hub."""

from __future__ import annotations

import email.utils
import ssl
import time
import urllib.error
from pathlib import Path

import pytest
from doctor_machine import about, bad, case_of, checked, described, one

from llamaserve.doctor.clock import ask_date, clock
from llamaserve.doctor.findings import Finding, Level

NOW = time.mktime((2026, 5, 1, 12, 0, 0, 0, 0, -1))
SET = "sudo timedatectl set-ntp true"


def findings(
    tmp_path: Path, answer: str | OSError | None = None, now: float = NOW, **environment: str
) -> list[Finding]:
    asked: list[str] = []

    def ask(url: str) -> str | None:
        asked.append(url)
        if isinstance(answer, OSError):
            raise answer
        return answer

    environment.setdefault("HF_HOME", str(tmp_path))
    return checked(clock(case_of(described(tmp_path, **environment)), ask, now))


def date(seconds: float) -> str:
    return email.utils.formatdate(seconds, usegmt=True)


def test_a_clock_that_is_right_is_well(tmp_path: Path) -> None:
    found = findings(tmp_path, date(NOW - 5))
    assert not bad(found)
    assert "https://huggingface.co answers; no token is set" in one(found, "hub").message
    assert one(found, "clock").message.startswith("2026-05-01 12:00, time zone ")


@pytest.mark.parametrize(("away", "way"), [(4000, "4000 s ahead"), (-90000, "90000 s behind")])
def test_a_clock_that_is_wrong(away: float, way: str, tmp_path: Path) -> None:
    finding = about(findings(tmp_path, date(NOW - away)), "clock")[1]
    assert finding.level is Level.WARNING
    assert way in finding.message
    assert finding.fix == SET


def test_a_year_that_cannot_be(tmp_path: Path) -> None:
    found = findings(tmp_path, OSError("offline"), now=86400.0)
    assert about(found, "clock")[0].level is Level.PROBLEM


@pytest.mark.parametrize("answer", [None, "", "yesterday", "Mon, 99 Foo 2026 99:99:99 GMT"])
def test_dates_that_say_nothing_are_left_alone(answer: str | None, tmp_path: Path) -> None:
    assert not bad(findings(tmp_path, answer))


def test_offline_is_a_note(tmp_path: Path) -> None:
    finding = one(findings(tmp_path, urllib.error.URLError(TimeoutError())), "hub")
    assert finding.level is Level.NOTE
    assert "no answer within 2 s" in finding.message
    assert finding.fix == "curl -sSIL https://huggingface.co"


def test_certificates_that_are_refused(tmp_path: Path) -> None:
    def refusal(why: str) -> urllib.error.URLError:
        error = ssl.SSLCertVerificationError(1, "certificate verify failed")
        error.verify_message = why
        return urllib.error.URLError(error)

    assert one(findings(tmp_path, refusal("certificate is not yet valid")), "hub").fix == SET
    fix = one(findings(tmp_path, refusal("self-signed certificate in certificate chain")), "hub").fix
    assert fix is not None
    assert fix.startswith("export SSL_CERT_FILE=")


def test_the_endpoint_and_the_token_are_told_without_their_secrets(tmp_path: Path) -> None:
    told = findings(tmp_path, date(NOW), HF_ENDPOINT="https://ann:topsecret@mirror.example", HF_TOKEN="hf_topsecret")
    finding = one(told, "hub")
    assert finding.message == "https://mirror.example answers; HF_TOKEN is set"
    assert not any("topsecret" in f"{each}" for each in told)
    (tmp_path / "token").write_text("hf_topsecret")
    assert "a token is stored" in one(findings(tmp_path, date(NOW)), "hub").message


@pytest.mark.parametrize(
    "endpoint",
    [
        "https://user:s3cret@127.0.0.1:1",
        "https://s3cret@127.0.0.1:1/hub?token=s3cret#s3cret",
        "https://user:s3cret@127.0.0.1:port",
        "https://user:s3cret/x@127.0.0.1",
        "https://user:1/s3cret@127.0.0.1",
        "https://user:s3cret@[::1",
        "s3cret",
    ],
)
def test_no_secret_of_the_endpoint_is_told_whatever_fails(endpoint: str, tmp_path: Path) -> None:
    machine = described(tmp_path, HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path))
    found = checked(clock(case_of(machine), ask_date, NOW))
    assert bad(found)
    assert "s3cret" not in repr(found)


def test_the_endpoint_is_asked_without_its_password(tmp_path: Path) -> None:
    asked: list[str] = []
    machine = described(tmp_path, HF_ENDPOINT="https://user:s3cret@mirror.example:8443/hf", HF_HOME=str(tmp_path))
    checked(clock(case_of(machine), asked.append, NOW))
    assert asked == ["https://mirror.example:8443/hf"]


def test_settings_that_keep_the_hub_away(tmp_path: Path) -> None:
    assert one(findings(tmp_path, HF_HUB_OFFLINE="1"), "hub").fix == "unset HF_HUB_OFFLINE"
    assert one(findings(tmp_path, HF_ENDPOINT="file:///etc/passwd"), "hub").fix == "unset HF_ENDPOINT"
    assert one(findings(tmp_path, HF_ENDPOINT="nonsense"), "hub").level is Level.PROBLEM


def test_a_clock_that_is_not_kept_right(tmp_path: Path) -> None:
    machine = described(tmp_path, programs={"timedatectl show --property=NTPSynchronized --value": "no"})
    found = checked(clock(case_of(machine), lambda url: date(NOW), NOW))
    assert about(found, "clock")[1].level is Level.NOTE


def test_a_server_that_is_not_there_raises_os_error() -> None:
    with pytest.raises(OSError):
        ask_date("http://127.0.0.1:1")
