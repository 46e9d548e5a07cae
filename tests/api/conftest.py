"""Servers with settings of their own, for what the shared one can't show."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from api_helpers import write_models_file
from running_server import RunningServer


@pytest.fixture(scope="session")
def small_server(starter_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One sequence at a time with a context of 96 tokens; streams that wait say so five times a second."""
    folder = tmp_path_factory.mktemp("small")
    path = write_models_file(folder, starter_model, "context: 96, parallel: 1")
    environment = {"LLAMASERVE_HEARTBEAT": "0.2"}
    with RunningServer("serve", "smollm2-135m", "--models-file", str(path), environment=environment) as running:
        yield running


@pytest.fixture(scope="session")
def narrow_server(starter_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One sequence at a time, and one more that may wait; streams that wait say so five times a second."""
    folder = tmp_path_factory.mktemp("narrow")
    path = write_models_file(folder, starter_model, "context: 2048, parallel: 1, queue: 1, time_limit: 60")
    environment = {"LLAMASERVE_HEARTBEAT": "0.2"}
    with RunningServer("serve", "smollm2-135m", "--models-file", str(path), environment=environment) as running:
        yield running


@pytest.fixture
def fresh_server(starter_model: Path, tmp_path: Path) -> Iterator[RunningServer]:
    """A server for one test alone, in settings of the exact level, whose weights are a copy in ``tmp_path``."""
    weights = tmp_path / "weights.gguf"
    weights.write_bytes(starter_model.read_bytes())
    path = write_models_file(tmp_path, weights, "context: 2048, parallel: 4")
    with RunningServer("serve", "smollm2-135m", "--models-file", str(path)) as running:
        yield running


@pytest.fixture(scope="session")
def empty_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server without any model."""
    path = tmp_path_factory.mktemp("empty") / "models.yaml"
    path.write_text("models: {}\n")
    with RunningServer("serve", "--models-file", str(path)) as running:
        yield running
