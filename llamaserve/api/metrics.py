"""What the server has done and is doing, as metrics for Prometheus. docs/metrics.md says what each name means.

Counters and histograms are kept as requests and models come and go; what can be looked at is looked at when somebody
asks. Knows nothing of what is in a request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from llamaserve.registry.model_events import ModelEvent
from llamaserve.registry.pool import ModelPool
from llamaserve.registry.served import ServedModel
from llamaserve.usage.ledger import Ledger
from llamaserve.usage.record import UsageRecord
from llamaserve.worker.supervisor import Status

_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_STEPS: Final = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 5)
_LAGS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
_TICK: Final = 0.05  # seconds between two looks at how late the event loop is


class Metrics:
    """The server's metrics."""

    def __init__(self, pool: ModelPool, ledger: Ledger | None) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call] # a line for each other one, which nobody needs
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_Models(pool))
        registry.register(_LedgerState(ledger))
        self.requests = Counter(
            "llamaserve_requests", "Requests that use a model", ["endpoint", "model", "outcome"], registry=registry
        )
        self.seconds = Histogram(
            "llamaserve_request_seconds",
            "How long answered requests took",
            ["endpoint", "model"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_token = Histogram(
            "llamaserve_time_to_first_token_seconds",
            "How long it took until streamed answers began",
            ["model"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.inter_token = Histogram(
            "llamaserve_inter_token_seconds",
            "Time for each further token of streamed answers",
            ["model"],
            buckets=_STEPS,
            registry=registry,
        )
        self.used = {
            name: Counter(f"llamaserve_{name}", words, ["model"], registry=registry) for name, words in _USED.items()
        }
        self.loads = Counter("llamaserve_model_loads", "Loads of models", ["model", "outcome"], registry=registry)
        self.load_seconds = Histogram(
            "llamaserve_model_load_seconds", "How long loads took", ["model"], buckets=_SECONDS, registry=registry
        )
        self.unloads = Counter("llamaserve_model_unloads", "Unloads of models", ["model", "reason"], registry=registry)
        self.crashes = Counter("llamaserve_model_crashes", "Ends of models' processes", ["model"], registry=registry)
        self.refused = Counter(
            "llamaserve_refused_requests", "Requests refused before they were read", ["reason"], registry=registry
        )
        self.open = Gauge("llamaserve_requests_open", "Requests that use a model, and are not over", registry=registry)
        self.waiting = Gauge(
            "llamaserve_requests_waiting", "Requests that wait for others of their key to be over", registry=registry
        )
        self.lag = Histogram(
            "llamaserve_event_loop_lag_seconds", "How late the event loop was", buckets=_LAGS, registry=registry
        )

    def request(self, record: UsageRecord) -> None:
        """Count a request that is over."""
        model = record.model or ""
        self.requests.labels(record.endpoint, model, record.outcome).inc()
        if record.outcome == "answered":
            self.seconds.labels(record.endpoint, model).observe(record.seconds)
            if record.first_token is not None:
                self.first_token.labels(model).observe(record.first_token)
        for name, counter in self.used.items():
            if amount := getattr(record, name):
                counter.labels(model).inc(amount)

    def model_event(self, event: ModelEvent) -> None:
        """Count what happens to models."""
        name = event.model or ""
        match event.kind:
            case "loaded":
                self.loads.labels(name, "loaded").inc()
                self.load_seconds.labels(name).observe(event.data["seconds"])
            case "load_failed":
                self.loads.labels(name, "failed").inc()
            case "unloaded":
                self.unloads.labels(name, event.data["reason"]).inc()
            case "crashed":
                self.crashes.labels(name).inc()

    async def watch_the_loop(self) -> None:
        """Look how late the event loop is, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _TICK
            await asyncio.sleep(_TICK)
            self.lag.observe(max(0.0, loop.time() - due))


_USED: Final[Mapping[str, str]] = {
    "prompt_tokens": "Tokens of prompts, cached ones included",
    "cached_tokens": "Tokens of prompts whose evaluation was reused",
    "completion_tokens": "Tokens of answers",
    "audio_seconds": "Seconds of audio that were listened to",
    "images": "Pictures that were made",
}


class _Models:
    """Looks at the models when it is asked."""

    def __init__(self, pool: ModelPool) -> None:
        self._pool = pool

    def collect(self) -> Iterator[Metric]:
        """Yield what there is to say of each model."""
        models = self._pool.models
        yield _gauge("models", "Models that are offered, by state", "state", self._states(models))
        loaded = [(model, model.live_worker) for model in models]
        for name, words, attribute in _OF_WORKERS:
            family = (CounterMetricFamily if attribute in _COUNTERS else GaugeMetricFamily)(
                f"llamaserve_{name}", words, labels=["model"]
            )
            for model, worker in loaded:
                if worker is not None:
                    family.add_metric([model.name], getattr(worker.occupancy, attribute))
            yield family
        cells = {model.name: model.cells for model, worker in loaded if worker is not None and model.cells}
        yield _gauge("kv_cells", "Cells of the key-value cache", "model", cells)
        queued = {model.name: model.queued for model in models if model.queued}
        yield _gauge("pictures_queued", "Pictures that wait for their turn", "model", queued)
        memory = GaugeMetricFamily(
            "llamaserve_model_memory_bytes", "Memory that models take by plan", labels=["model", "kind"]
        )
        for model, worker in loaded:
            if worker is not None and model.plan is not None:
                memory.add_metric([model.name, "host"], model.plan.need.host)
                memory.add_metric([model.name, "gpu"], model.plan.need.device)
        yield memory
        budget = self._pool.budget
        yield _gauge("memory_budget_bytes", "Memory that models may take", "kind", _kinds(budget.host, budget.device))
        claimed = self._pool.claimed
        words = "Memory that models take together"
        yield _gauge("memory_claimed_bytes", words, "kind", _kinds(claimed.host, claimed.device))

    @staticmethod
    def _states(models: Iterable[ServedModel]) -> dict[str, float]:
        states = dict.fromkeys((status.value for status in Status), 0.0)
        for model in models:
            states[model.status.value] += 1
        return states


_OF_WORKERS: Final = (
    ("sequences_running", "Sequences that are evaluated", "running"),
    ("sequences_waiting", "Sequences that wait", "waiting"),
    ("kv_cells_used", "Cells of the key-value cache in use, idle prefixes included", "cells"),
    ("drafted_tokens", "Guessed tokens that were evaluated", "drafted"),
    ("accepted_draft_tokens", "Guessed tokens that were right", "accepted"),
    ("preemptions", "Sequences that had to wait again since cells ran short", "preempted"),
)
_COUNTERS: Final = frozenset({"drafted", "accepted", "preempted"})


class _LedgerState:
    """Looks at the ledger when it is asked."""

    def __init__(self, ledger: Ledger | None) -> None:
        self._ledger = ledger

    def collect(self) -> Iterator[Metric]:
        """Yield how the ledger is."""
        if self._ledger is not None:
            pending = GaugeMetricFamily("llamaserve_usage_pending", "Rows of the ledger that can't be written yet")
            pending.add_metric([], self._ledger.pending)
            yield pending
            lost = CounterMetricFamily("llamaserve_usage_lost", "Rows of the ledger that never will be")
            lost.add_metric([], self._ledger.lost)
            yield lost


def _gauge(name: str, words: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(f"llamaserve_{name}", words, labels=[label])
    for value, amount in values.items():
        family.add_metric([value], amount)
    return family


def _kinds(host: int, device: int) -> dict[str, float]:
    return {"host": host, "gpu": device}
