"""Histograms are read as Prometheus writes them."""

from __future__ import annotations

import math

from benchmark.histogram import histogram, percentile, since
from prometheus_client import CollectorRegistry, Histogram, generate_latest


def test_a_histogram_is_read_as_it_is_written() -> None:
    registry = CollectorRegistry()
    lag = Histogram("lag", "How late", buckets=(0.01, 0.1), registry=registry)
    Histogram("lag_of_others", "More", buckets=(0.01,), registry=registry).observe(0.5)
    lag.observe(0.005)
    before = histogram(generate_latest(registry).decode(), "lag")
    for value in (0.005, 0.05, 3.0):
        lag.observe(value)
    after = histogram(generate_latest(registry).decode(), "lag")
    assert after == {0.01: 2, 0.1: 3, math.inf: 4}
    assert since(after, before) == {0.01: 1, 0.1: 2, math.inf: 3}


def test_a_percentile_is_the_bound_of_its_bucket() -> None:
    counts = {0.01: 98.0, 0.05: 99.0, 0.1: 100.0, math.inf: 100.0}
    assert [percentile(counts, share) for share in (0.98, 0.99, 1.0)] == [0.01, 0.05, 0.1]
    assert math.isnan(percentile({}, 0.99))
