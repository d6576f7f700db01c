"""What a run leaves behind: rows, latencies and the report, as files that a machine reads.

Accuracies and shares are fractions between 0 and 1; intervals are 95 %; seconds, bytes and tokens are plain numbers.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RowRecord(_Part):
    """One line of rows.jsonl: one system's answer to one row."""

    task: str
    id: str
    subject: str
    system: str
    target: str
    asked: str = ""
    """`Item.asked`, by which the rows of two runs are known to be the same."""
    answer: str = ""
    extracted: str | None = None
    """What the task read out of the answer; None if it could not be read (a format failure)."""
    metrics: dict[str, float] = {}
    """By name, see `tasks.base.METRICS`: for multiple choice `likelihood` and `generate` (0 or 1)."""
    letter_logprobs: list[float] = []
    ended: bool = True
    message: str | None = None
    route: str | None = None
    receiver_read: int = 0
    sharer_read: int = 0
    receiver_wrote: int = 0
    sharer_wrote: int = 0
    cache_bytes: int = 0
    text_bytes: int = 0
    seconds: float = 0.0
    """Of the batch, divided by its rows."""
    error: str | None = None
    """Type and text of the exception, if the system raised one. Such a row counts as wrong."""


class LatencyRecord(_Part):
    """One line of latency.jsonl: one request alone, nothing reused."""

    task: str
    id: str
    system: str
    seconds: float
    stages: dict[str, float]
    """Seconds by stage: tokenise, align, sharer_prefill, receiver_prefill, fuse, decode, message, …"""


class Estimate(_Part):
    """A number with its interval."""

    value: float
    low: float
    high: float
    n: int


class SystemSummary(_Part):
    """One system on one task."""

    rows: int
    errors: int
    metrics: dict[str, Estimate]
    """Errors count as wrong. Binary metrics with Wilson's interval, others with a bootstrap interval of the mean."""
    format_failures: Estimate | None = None
    """Share of answers that nothing could be read out of; None where no text was asked for."""
    cut_off: Estimate | None = None
    """Share of answers that ran into the token limit."""
    calibration_error: float | None = None
    """Expected calibration error of the letter likelihoods, ten equal bins; None for other tasks."""
    agreement_with_sharer: Estimate | None = None
    """Share of rows with the sharer's likeliest letter; None for the sharer itself and for other tasks."""
    routed_to_sharer: float | None = None
    tokens: dict[str, float] = {}
    """Means per row: receiver_read, sharer_read, receiver_wrote, sharer_wrote."""
    cache_bytes: float = 0.0
    """Mean per row."""
    text_bytes: float = 0.0


class PairSummary(_Part):
    """System a against system b on the rows that both answered."""

    a: str
    b: str
    metric: str
    difference: Estimate
    """Mean of a − b, paired bootstrap."""
    p: float | None = None
    """McNemar's exact two-sided p; None for metrics that are not 0 or 1."""
    only_a: int | None = None
    """Rows that only a gets right."""
    only_b: int | None = None


class Transfer(_Part):
    """Whether what the sharer knows of this row crossed."""

    metric: str
    difference: Estimate
    """C2C with the right cache − with another row's; for nats the other way round, so that more is better."""
    shown: bool
    sentence: str


class TaskSummary(_Part):
    """Everything about one task."""

    title: str
    kind: str
    """`choice`, `generation` or `likelihood`."""
    licence: str
    source: str
    rows: int
    dropped: dict[str, int]
    """Rows left out, by reason."""
    primary: str
    """The metric that tables and figures show first."""
    lower_is_better: list[str] = []
    """Metrics of which less is better."""
    systems: dict[str, SystemSummary]
    pairs: list[PairSummary]
    gap_recovered: dict[str, Estimate]
    """By system: (system − receiver) / (sharer − receiver) in the primary metric; absent where sharer − receiver is
    not clearly different from zero."""
    transfer: list[Transfer]
    subjects: dict[str, dict[str, Estimate]]
    """Subject → system → primary metric."""


class LatencySummary(_Part):
    """One system's latency over all tasks, one request at a time."""

    n: int
    mean: float
    p50: float
    p90: float
    p99: float
    stages: dict[str, float]
    """Mean seconds by stage."""


class Report(_Part):
    """report.json."""

    format_version: int = 1
    run: dict[str, Any]
    """What was run: receiver, sharers, fusers, systems, controls, seed, limit, forms, router, commands, versions, machine,
    peak_memory_bytes of the last call, started, seconds of asking in all calls that were not killed."""
    tasks: dict[str, TaskSummary]
    latency: dict[str, LatencySummary]
