"""Turns texts into vectors with the server's own engine, so that the heads learn from what they will be given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llamaserve.engine.embedder import LoadedEmbedder
from llamaserve.engine.events import Embedded
from llamaserve.engine.llama import start_backend
from llamaserve.engine.params import Embedding, LoadParams

Vectors = npt.NDArray[np.float32]

_TOKENS = 512  # of a text at most
_PLAIN = Embedding(truncate="end")


def embed(texts: Sequence[str], model: Path) -> Vectors:
    """Return a unit vector for each text, in an array of shape (texts, width)."""
    start_backend()
    embedder = LoadedEmbedder(_params(model), lambda _fraction: True)
    try:
        embedder.submit(0, [embedder.encode(text, "input", _PLAIN) for text in texts], _PLAIN)
        while not embedder.idle:
            for event in embedder.step():
                assert isinstance(event, Embedded), event
                return np.frombuffer(event.vectors, np.float32).reshape(len(texts), -1)
        raise AssertionError("the embedder has nothing more to do and has reported nothing")
    finally:
        embedder.close()


def _params(model: Path) -> LoadParams:
    return LoadParams(
        path=str(model),
        context=_TOKENS,
        parallel=64,
        kv_cells=_TOKENS,
        kv_unified=True,
        batch=_TOKENS,
        threads=1,
        adaptive_threads=False,
        gpu_layers="none",
        flash_attention="auto",
        key_type="f16",
        value_type="f16",
        prefix_cache=False,
        spill=0,
        speculation=False,
        pooling="mean",
    )
