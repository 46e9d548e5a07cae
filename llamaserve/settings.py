"""The server's own settings: command-line flags first, then ``LLAMASERVE_*`` environment variables, then defaults.

Settings of models are in models.yaml. This module reads the environment and nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

MEBIBYTE = 1024 * 1024


class Settings(BaseSettings):
    """How the server listens and behaves; every field is documented in docs/settings.md."""

    model_config = SettingsConfigDict(env_prefix="LLAMASERVE_", frozen=True, extra="ignore")

    host: str | None = Field(None, description="Address to listen on; by default 127.0.0.1 and ::1.")
    port: int = Field(5000, ge=0, le=65535, description="Port to listen on; 0 takes any free one.")
    models_file: Path | None = Field(
        None, description="models.yaml to use instead of ./models.yaml or the shipped one."
    )
    presets_dir: Path | None = Field(None, description="Folder with presets of sampling options, beside the shipped.")
    characters_dir: Path | None = Field(None, description="Folder with characters, beside the shipped.")
    instruction_templates_dir: Path | None = Field(
        None, description="Folder with instruction templates, beside the shipped."
    )
    reasoning_field: Literal["reasoning_content", "reasoning", "both"] = Field(
        "reasoning_content", description="The name under which thoughts are sent."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="How much to log.")
    heartbeat: float = Field(10.0, gt=0, description="Seconds between the comment lines that keep a stream alive.")
    max_body: int = Field(16 * MEBIBYTE, gt=0, description="Largest request body in bytes; over it the answer is 413.")
    cors_origins: list[str] = Field(
        ["*"], description="Origins of web pages that may call the API, never with credentials."
    )
