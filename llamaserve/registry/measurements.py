"""What models really took when they were loaded here, and how much the estimate was off.

The estimate of a cache and of buffers is good for every setting; what can be wrong is the rest: the vocabulary, weights
that ggml keeps in another order, a driver. That error is the same whatever the settings, so it is kept in bytes, not as
a factor: for the starter model it was 0.3 to 1.4 MiB in twelve settings that took 119 to 476 MiB.

Only main memory is learned. What a GPU has in use is the sum of all programs', and its driver has taken its part of a
process before a model is loaded, so that a measurement there would make the next plan too small. Knows estimates and
the cache folder; nothing of processes.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from typing import Final

import msgspec

from llamaserve.engine.params import Footprint, LoadParams
from llamaserve.registry.cache import recall, remember
from llamaserve.registry.gguf import GGUFHeader
from llamaserve.registry.memory import Estimate, estimate

MOST_SETTINGS: Final = 32  # of a file, the latest
_LEAST, _MOST = 0.5, 2.0  # of the estimate: what is measured beyond that was something else
# What makes no difference to the memory that is planned for.
_IRRELEVANT = frozenset(
    {
        *("path", "context", "threads", "adaptive_threads", "batch_threads", "numa", "rope_freq_base"),
        *("rope_freq_scale", "saved_prefixes", "prefixes_identity", "spill", "mlock"),
    }
)


class _Record(msgspec.Struct, frozen=True):
    """By how many bytes of main memory loads of a file took more than was estimated, for each of its settings; the
    latest last.
    """

    size: int
    mtime_ns: int
    build: str
    excess: dict[str, int]


def record(header: GGUFHeader, params: LoadParams, estimated: Footprint, measured: Footprint) -> None:
    """Take note of what a load has added to the memory in use, right after it; what use adds later is believed to be as
    estimated.
    """
    layers = params.gpu_layers if isinstance(params.gpu_layers, int) else 0
    expected = estimated.host - estimate(header, params, layers).later.host
    if not _LEAST * expected <= measured.host <= _MOST * expected:
        return
    known = _recall(header)
    excess = dict(known.excess) if known else {}
    key = _settings(params)
    excess.pop(key, None)
    excess[key] = measured.host - expected
    for oldest in list(excess)[:-MOST_SETTINGS]:
        del excess[oldest]
    size, mtime = _state(header)
    remember("memory", _name(header), _Record(size, mtime, _build(), excess))


def correction(header: GGUFHeader) -> Callable[[LoadParams, Estimate], Footprint]:
    """Return what makes of an estimate for a file one with the error that an earlier load of it has shown, one with the
    same settings if there was one; never less than what weights and cache take for certain.
    """
    known = _recall(header)
    if known is None or not known.excess:
        return lambda _params, estimated: estimated.total
    excess, latest = known.excess, next(reversed(known.excess.values()))

    def correct(params: LoadParams, estimated: Estimate) -> Footprint:
        total = estimated.total
        better = total.host + excess.get(_settings(params), latest)
        bounded = min(max(better, int(_LEAST * total.host)), int(_MOST * total.host))
        return Footprint(max(estimated.certain.host, bounded), total.device)

    return correct


def _recall(header: GGUFHeader) -> _Record | None:
    """Return what is known of this file and this llama.cpp; nothing of another one that had the same name."""
    known = recall("memory", _name(header), _Record)
    if known is None or (known.size, known.mtime_ns, known.build) != (*_state(header), _build()):
        return None
    return known


def _name(header: GGUFHeader) -> str:
    return str(header.path.absolute())


def _state(header: GGUFHeader) -> tuple[int, int]:
    try:
        status = header.path.stat()
    except OSError:  # it is gone, and its record good for nothing
        return header.file_size, 0
    return header.file_size, status.st_mtime_ns


@functools.cache
def _build() -> str:
    try:
        return importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _settings(params: LoadParams) -> str:
    fields = (name for name in params.__struct_fields__ if name not in _IRRELEVANT)
    return " ".join(f"{name}={getattr(params, name)!r}" for name in fields)
