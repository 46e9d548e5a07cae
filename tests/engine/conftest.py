"""The engine's tests: quiet threads, and one llama.cpp back end and model for all of them."""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before llama_cpp is imported: OpenMP reads it once

from collections.abc import Iterator

import msgspec
import pytest
from loud_model import write_loud_model

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


@pytest.fixture(scope="session")
def loud_params(load_params: LoadParams, tmp_path_factory: pytest.TempPathFactory) -> LoadParams:
    """Settings for the tiny model: a unified cache of 256 cells."""
    path = tmp_path_factory.mktemp("models") / "loud.gguf"
    write_loud_model(path)
    return msgspec.structs.replace(
        load_params,
        path=str(path),
        context=100,
        kv_cells=256,
        kv_unified=True,
        batch=24,
        threads=1,
        key_type="f32",  # in 16 bits a millionth can be a rounding to the other side, and a logit move by a thousandth
        value_type="f32",
    )


@pytest.fixture(scope="session")
def loud(backend: None, loud_params: LoadParams) -> Iterator[Model]:
    """The tiny model's weights."""
    model = Model(loud_params, lambda fraction: True)
    yield model
    model.close()
