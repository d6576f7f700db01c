"""What an evaluation is asked to do, and where it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from cache2cache.fuser.several import FusionMode


class Settings(BaseModel):
    """Everything that changes the numbers of an evaluation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    receiver: str
    sharers: tuple[str, ...] = Field(min_length=1)
    fusers: tuple[str, ...] = Field(min_length=1)
    """One per sharer."""
    mode: FusionMode = "parallel"
    dtype: str = "auto"
    tasks: tuple[str, ...] = Field(min_length=1)
    """Names, or files of your own rows; `mmlu-redux:1000` asks only so many rows of one."""
    systems: str = "receiver,sharer,c2c"
    controls: str = "mismatched"
    limit: int | None = Field(default=None, gt=0)
    """Rows of each task, drawn by the seed; all by default."""
    seed: int = 0
    answer_tokens: int = Field(default=16, gt=0)
    """Most tokens of an answer to a multiple-choice question; other tasks have limits of their own."""
    message_tokens: int = Field(default=256, gt=0)
    """Most tokens of a text-to-text message."""
    routed_share: float = Field(default=0.5, ge=0, le=1)
    receiver_form: str | None = None
    """Chosen on training rows by default, as is `sharer_form`."""
    sharer_form: str | None = None
    latency_rows: int = Field(default=8, ge=0)
    """Rows of each task that are also asked one at a time, with nothing reused, to measure latency."""


@dataclass(frozen=True)
class Machine:
    """Where an evaluation runs. None of it changes what is measured, beyond rounding and seconds."""

    device: str = "cpu"
    sharer_device: str | None = None
    trust_remote_code: bool = False
    data_dir: Path | None = None
    """Folder of data sets; the hub by default."""
    prefills: Path | None = None
    """Folder that keeps every prefill for later runs; by default none is kept."""
    batch_size: int = 16
    """Most rows that are asked together; halved where memory runs out."""
    max_errors: float = 0.05
    """Largest share of a task's rows on which a system may fail."""
