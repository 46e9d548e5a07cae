"""Histograms as Prometheus writes them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

_LINE = r'^{name}_bucket\{{le="([^"]+)"\}} (\S+)$'

Counts = Mapping[float, float]  # how many were at most this


def histogram(text: str, name: str) -> Counts:
    """Return a histogram without labels of a page of metrics."""
    found = re.findall(_LINE.format(name=re.escape(name)), text, re.MULTILINE)
    return {float(bound): float(count) for bound, count in found}


def since(later: Counts, earlier: Counts) -> Counts:
    """Return what has come to a histogram."""
    return {bound: count - earlier.get(bound, 0.0) for bound, count in later.items()}


def percentile(counts: Counts, share: float) -> float:
    """Return the bound of the first bucket that has this share of all; NaN where there is nothing."""
    total = max(counts.values(), default=0.0)
    if not total:
        return math.nan
    return next(bound for bound, count in sorted(counts.items()) if count >= share * total)
