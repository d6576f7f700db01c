"""What a server counts, for Prometheus: what the engine says when it is asked, and what its clients see."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from cache2cache.serve.engine import Engine

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_STAGE = "seconds_"


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "c2c_requests", "Requests that were answered", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "c2c_request_seconds", "From a request to the end of its answer",
            ["route"], buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "c2c_first_token_seconds", "From a request to its answer's first token",
            ["route"], buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.abandoned = Counter(
            "c2c_abandoned",
            "Requests whose client left, or was too slow, before the answer's end",
            registry=self.registry,
        )
        self.registry.register(_EngineMetrics(engine))

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request is over."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)


class _EngineMetrics:
    """An engine's load, asked for when somebody looks."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def describe(self) -> Iterator[Metric]:
        """Nothing: names follow from what the engine counts."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        load = self._engine.load()
        yield GaugeMetricFamily("c2c_waiting", "Requests in the queue", value=load.waiting)
        yield GaugeMetricFamily("c2c_running", "Answers that are being written", value=load.running)
        yield GaugeMetricFamily("c2c_cache_bytes", "Of caches that are held", value=load.cache_bytes)
        stages = CounterMetricFamily("c2c_stage_seconds", "Spent in each stage", labels=["stage"])
        for name, value in load.counters.items():
            if name.startswith(_STAGE):
                stages.add_metric([name.removeprefix(_STAGE)], value)
            else:
                yield CounterMetricFamily(f"c2c_{name}", f"{name.replace('_', ' ')} since the start", value=value)
        yield stages
