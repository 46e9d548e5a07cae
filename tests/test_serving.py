"""What the settings make of the pool of models, and who is let in."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx
import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from running_server import RunningServer

from llamaserve.registry.saved_prefixes import saved_prefixes_folder
from llamaserve.registry.spec import load_registry
from llamaserve.service.health import healthy_at
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


@pytest.fixture
def no_models(tmp_path: Path) -> Path:
    path = tmp_path / "models.yaml"
    path.write_text("models: {}\n")
    return path


def refusal(*flags: str, environment: dict[str, str] | None = None) -> str:
    """Return what a server says that refuses to start."""
    with pytest.raises(RuntimeError) as caught, RunningServer("serve", *flags, environment=environment):
        pass
    assert "Traceback" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_nobody_else_gets_in_without_a_key(no_models: Path, host: str) -> None:
    said = refusal("--models-file", str(no_models), "--host", host)
    assert "the server has no key: everybody could use it" in said
    assert "llamaserve keys create" in said


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.0.2", "::1"])
def test_this_machine_needs_no_key(no_models: Path, host: str) -> None:
    with RunningServer("serve", "--models-file", str(no_models), "--host", host) as running:
        assert running.get("/health") == {"status": "ok"}


@pytest.mark.parametrize("flags", [("--insecure",), ("--api-key", "sk-for-all-the-world")])
def test_other_machines_get_in_with_a_key_or_if_everybody_may(no_models: Path, flags: tuple[str, ...]) -> None:
    with RunningServer("serve", "--models-file", str(no_models), "--host", "0.0.0.0", *flags) as running:
        status = httpx.get(running.url + "/v1/models").status_code
        assert status == (200 if "--insecure" in flags else 401)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("API_KEY", "", "the api-key is empty"),
        ("API_KEY", "good,", "the api-key-2 is empty"),
        ("ADMIN_KEY", "two words", "visible ASCII"),
        ("API_KEY", '["one", "one"]', "the same key"),
        ("API_KEY", '["one', "no JSON list"),
        ("KEYS_FILE", "/nowhere/keys.yaml", "there is no file"),
        ("ALLOWED_HOSTS", "https://a.example", "is no host name"),
        ("CORS_ORIGINS", "https://a.example/", "is no origin"),
        ("SSL_KEYFILE", "/nowhere/key.pem", "no certificate"),
        ("SSL_CERTFILE", "/nowhere/cert.pem", "No such file"),
    ],
)
def test_settings_that_would_let_in_others_than_was_meant(no_models: Path, name: str, value: str, words: str) -> None:
    said = refusal("--models-file", str(no_models), environment={f"LLAMASERVE_{name}": value})
    assert words in said
    assert "try:" in said


def test_short_keys_are_warned_of(no_models: Path) -> None:
    with RunningServer("serve", "--models-file", str(no_models), "--api-key", "secret") as running:
        assert any("could be guessed" in line for line in running.lines)
        assert not any("secret" in line for line in running.lines)


@pytest.mark.parametrize("apart", [False, True])
def test_tls(no_models: Path, tmp_path: Path, apart: bool) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    for blob in issued.cert_chain_pems:
        blob.write_to_path(certificate, append=True)
    issued.private_key_pem.write_to_path(key if apart else certificate, append=not apart)
    flags = ("--ssl-certfile", str(certificate), *(("--ssl-keyfile", str(key)) if apart else ()))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with RunningServer("serve", "--models-file", str(no_models), *flags) as running:
        assert running.url.startswith("https://127.0.0.1:")
        assert httpx.get(running.url + "/v1/models", verify=context).json()["data"] == []
        with pytest.raises(httpx.HTTPError):
            httpx.get(running.url.replace("https", "http") + "/v1/models")
        port = int(running.url.rpartition(":")[2])
        assert healthy_at("127.0.0.1", port) == running.url
    assert healthy_at("127.0.0.1", port) is None


def test_a_key_with_a_password_is_refused_rather_than_asked_for(no_models: Path, tmp_path: Path) -> None:
    pem = tmp_path / "cert.pem"
    issued = trustme.CA().issue_cert("127.0.0.1")
    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
    sealed = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"a password"),
    )
    pem.write_bytes(issued.cert_chain_pems[0].bytes() + sealed)
    assert "TLS can't be spoken" in refusal("--models-file", str(no_models), "--ssl-certfile", str(pem))
