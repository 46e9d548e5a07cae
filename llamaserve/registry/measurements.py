"""What models really took when they were loaded here, and how much the estimate was off.

The estimate of a cache and of buffers is exact to a few percent for every setting; what can be wrong is the rest: the
vocabulary, weights that ggml keeps in another order, a driver. That error is the same whatever the settings, so it is
kept in bytes, not as a factor: after a load of the starter model with 512 cells the estimate for 16,384 is off by 1 %
either way. Knows estimates and the cache folder; nothing of processes.
"""

from __future__ import annotations

import functools
import importlib.metadata
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
        *("rope_freq_scale", "saved_prefixes", "spill", "mlock"),
    }
)


class _Record(msgspec.Struct, frozen=True):
    """By how many bytes loads of a file took more than was estimated, for each of its settings; the latest last."""

    size: int
    mtime_ns: int
    build: str
    excess: dict[str, Footprint]


def record(header: GGUFHeader, params: LoadParams, estimated: Footprint, measured: Footprint) -> None:
    """Take note of what a load has added to the memory in use, right after it; what use adds later is believed to be as
    estimated.
    """
    expected = estimated - _parts(header, params).later
    if not _is_sane(measured.host, expected.host) or not _is_sane(measured.device, expected.device):
        return
    known = _recall(header)
    excess = dict(known.excess) if known else {}
    key = _settings(params)
    excess.pop(key, None)
    excess[key] = measured - expected
    for oldest in list(excess)[:-MOST_SETTINGS]:
        del excess[oldest]
    size, mtime = _state(header)
    remember("memory", _name(header), _Record(size, mtime, _build(), excess))


def corrected(header: GGUFHeader, params: LoadParams, estimated: Footprint) -> Footprint:
    """Return an estimate with the error that an earlier load of the file has shown, one with the same settings if there
    was one; never less than what weights and cache take for certain.
    """
    known = _recall(header)
    if known is None or not known.excess:
        return estimated
    excess = known.excess.get(_settings(params))
    if excess is None:
        latest = next(reversed(known.excess.values()))
        excess = Footprint(latest.host, latest.device if estimated.device else 0)
    certain = _parts(header, params).certain
    better = estimated + excess
    return Footprint(
        _within(better.host, estimated.host, certain.host), _within(better.device, estimated.device, certain.device)
    )


def _within(better: int, estimated: int, certain: int) -> int:
    return max(min(certain, estimated), min(max(better, int(_LEAST * estimated)), int(_MOST * estimated)))


def _is_sane(measured: int, expected: int) -> bool:
    return _LEAST * expected <= measured <= _MOST * expected


def _parts(header: GGUFHeader, params: LoadParams) -> Estimate:
    return estimate(header, params, params.gpu_layers if isinstance(params.gpu_layers, int) else 0)


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
