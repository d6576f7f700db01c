"""What a sharer service counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64)


class NodeMetrics:
    """Counters of one service, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "c2c_share_requests", "Requests answered", ("route", "status"), registry=registry
        )  # fmt: skip
        self.request_seconds = Histogram(
            "c2c_share_request_seconds", "From request to answer", ("route",), buckets=_SECONDS, registry=registry
        )
        self.prefill_seconds = Histogram(
            "c2c_share_prefill_seconds", "Reading one batch", buckets=_SECONDS, registry=registry
        )
        self.encode_seconds = Histogram(
            "c2c_share_encode_seconds", "Writing the payloads of one request", buckets=_SECONDS, registry=registry
        )
        self.rows = Histogram("c2c_share_batch_rows", "Prompts of one batch", buckets=_ROWS, registry=registry)
        self.tokens = Counter("c2c_share_tokens", "Tokens read", registry=registry)
        self.sent = Counter("c2c_share_payload_bytes", "Bytes of payloads", registry=registry)
        self.waiting = Gauge("c2c_share_waiting", "Requests that are not read yet", registry=registry)
        self.running = Gauge("c2c_share_running", "Prompts that are read now", registry=registry)

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request is over."""
        self.requests.labels(route, str(status)).inc()
        self.request_seconds.labels(route).observe(seconds)

    def batch(self, rows: int, tokens: int, seconds: float) -> None:
        """A batch was read."""
        self.rows.observe(rows)
        self.tokens.inc(tokens)
        self.prefill_seconds.observe(seconds)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)
