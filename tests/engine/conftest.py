"""The engine's tests: quiet threads, and one llama.cpp back end and model for all of them."""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before llama_cpp is imported: OpenMP reads it once

from collections.abc import Iterator

import pytest

from llamaserve.engine.llama import Model, Vocab, start_backend
from llamaserve.engine.params import LoadParams


@pytest.fixture(scope="session")
def backend() -> None:
    """llama.cpp, ready for use."""
    start_backend()


@pytest.fixture(scope="session")
def model(backend: None, load_params: LoadParams) -> Iterator[Model]:
    """The starter model's weights."""
    model = Model(load_params, lambda fraction: True)
    yield model
    model.close()


@pytest.fixture(scope="session")
def vocab(model: Model) -> Vocab:
    """The starter model's vocabulary."""
    return model.vocab
