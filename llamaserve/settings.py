"""The server's own settings: command-line flags first, then ``LLAMASERVE_*`` environment variables, then defaults.

Settings of models are in models.yaml. This module reads the environment and nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

MEBIBYTE = 1024 * 1024


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,6})?)\s*(?:(%)|([kmgt]?i?)b?)", re.IGNORECASE)


def parse_size(text: str) -> Callable[[int], int]:
    """Return how many bytes a text means, given how many there are: ``6GB``, ``512MiB``, ``2000000000`` or ``75%``.

    Raises ``ValueError`` for anything else.
    """
    found = _SIZE.fullmatch(text.strip())
    number, percent, unit = found.groups() if found else ("", None, "?")
    if found is None or (unit or "").lower() not in _UNITS or (percent and float(number) > 100):
        raise ValueError("should be a size such as 6GB, 512MiB or 75%")
    if percent:
        return lambda total: int(total * float(number) / 100)
    return lambda _: int(float(number) * _UNITS[(unit or "").lower()])


def _size(text: str) -> str:
    parse_size(text)
    return text


Size = Annotated[str, AfterValidator(_size)]


def _words(value: Any) -> Any:
    """Take a JSON list, or words with commas between them, as environment variables have them."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.startswith("["):
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"is no JSON list: {error}") from None
    return [word.strip() for word in text.split(",")]


Words = Annotated[list[str], NoDecode, BeforeValidator(_words)]
Secrets = Annotated[list[SecretStr], NoDecode, BeforeValidator(_words)]


class Settings(BaseSettings):
    """How the server listens and behaves; every field is documented in docs/settings.md."""

    model_config = SettingsConfigDict(env_prefix="LLAMASERVE_", frozen=True, extra="ignore")

    host: str | None = Field(None, description="Address to listen on; by default 127.0.0.1 and ::1.")
    port: int = Field(5000, ge=0, le=65535, description="Port to listen on; 0 takes any free one.")
    models_file: Path | None = Field(
        None, description="models.yaml to use instead of ./models.yaml or the shipped one."
    )
    models_dir: Path | None = Field(
        None, description="Folder whose model files are served, too; ./models if it exists."
    )
    loras_dir: Path | None = Field(None, description="Folder with LoRA adapters; ./loras if it exists.")
    memory: Size | None = Field(
        None, description="Main memory that models may take: 6GB, 512MiB, 75%; by default 80 % of what is free."
    )
    gpu_memory: Size | None = Field(
        None, description="GPU memory that models may take; by default 90 % of what is free."
    )
    saved_prefixes: Size = Field(
        "4GB",
        description="Disk space for what unloaded models have evaluated, so that they need not do it again; 0: none.",
    )
    state_dir: Path | None = Field(
        None, description="Folder in which the server keeps its records: usage and keys; by default the user's own."
    )
    usage_retention: int = Field(
        400, ge=0, le=1_000_000, description="Days for which the usage of requests is kept; 0: it is not recorded."
    )
    presets_dir: Path | None = Field(None, description="Folder with presets of sampling options, beside the shipped.")
    characters_dir: Path | None = Field(None, description="Folder with characters, beside the shipped.")
    instruction_templates_dir: Path | None = Field(
        None, description="Folder with instruction templates, beside the shipped."
    )
    reasoning_field: Literal["reasoning_content", "reasoning", "both"] = Field(
        "reasoning_content", description="The name under which thoughts are sent."
    )
    api_key: Secrets = Field([], description="Keys that let somebody use the server.")
    admin_key: Secrets = Field([], description="Keys that let somebody change the server, too.")
    keys_file: Path | None = Field(None, description="File with named keys; keys.yaml in the state folder, if there.")
    insecure: bool = Field(default=False, description="Listen beyond this machine without any key.")
    allowed_hosts: Words = Field(
        [], description="Names by which clients may call this machine, beside its own; *.example.com for all below it."
    )
    ssl_certfile: Path | None = Field(None, description="Certificate chain, as PEM; with it the server speaks TLS.")
    ssl_keyfile: Path | None = Field(None, description="Private key of the certificate, as PEM, if not in that file.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="How much to log.")
    log_format: Literal["human", "json"] = Field("human", description="Lines for people, or JSON for programs.")
    tracing: bool = Field(default=False, description="Send a span of each request by OpenTelemetry's protocol.")
    log_prompts: bool = Field(default=False, description="Log what requests say, which may be confidential.")
    shutdown_limit: float = Field(
        5.0,
        ge=0,
        le=3600,
        description="Seconds for answers to be finished once the server is told to end; then they end as they are.",
    )
    heartbeat: float = Field(10.0, gt=0, description="Seconds between the comment lines that keep a stream alive.")
    max_body: int = Field(16 * MEBIBYTE, gt=0, description="Largest request body in bytes; over it the answer is 413.")
    max_upload: int = Field(
        100 * MEBIBYTE, gt=0, description="Largest request body with files in it, such as an audio, in bytes."
    )
    max_audio: float = Field(
        4 * 3600,
        gt=0,
        le=24 * 3600,
        description="Longest audio that is transcribed, in seconds; a longer one is refused.",
    )
    cors_origins: Words | None = Field(
        None,
        description="Origins of web pages that may call the API; by default all if a key is needed, else local ones.",
    )

    @property
    def state_folder(self) -> Path:
        """Where the server keeps its records."""
        if self.state_dir is not None:
            return self.state_dir.expanduser().absolute()
        return platformdirs.user_state_path("llamaserve")

    @property
    def ledger_path(self) -> Path:
        """The database in which usage is recorded, which need not be there."""
        return self.state_folder / "usage.sqlite3"

    @property
    def keys_path(self) -> Path:
        """The file with named keys, which need not be there."""
        return (self.keys_file or self.state_folder / "keys.yaml").expanduser().absolute()

    @property
    def options(self) -> tuple[str, ...]:
        """The words that make another command see the same models."""
        given = (("--models-file", self.models_file), ("--models-dir", self.models_dir))
        return tuple(word for option, path in given if path is not None for word in (option, str(path)))
