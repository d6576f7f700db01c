"""A training recipe: everything that decides what a run ends with. Where it runs is `Machine`'s."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cache2cache.fuser.gate import GateConfig
from cache2cache.types import Template

Alignment = Literal["native", "retokenise-first", "retokenise-longest", "same-ids"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FuserPart(_Part):
    """What to train."""

    kind: Literal["compact", "paper"] = "compact"
    layer_map: Literal["last-aligned", "depth-normalised"] | tuple[int, ...] = "last-aligned"
    """A rule, or the sharer layer of each receiver layer."""
    init: str | None = None
    """A trained fuser to go on from: a folder, `demo`, `general` or a hub id. Kind, sizes and layer map must be the recipe's; its
    statistics of the caches are kept. Its gates are gone on with if they are learned; otherwise `gate` says which are open."""
    alignment: Alignment = "native"
    receiver_template: Template | None = None
    sharer_template: Template | None = None
    """A template's name, Jinja text, or None for the model's own."""
    fuse_last: int | None = Field(default=None, gt=0)
    sizes: dict[str, Any] = {}
    gate: GateConfig = GateConfig(learned=False, initial_logit=1.0)

    @model_validator(mode="after")
    def _some_open(self) -> Self:
        if not self.gate.learned and self.gate.initial_logit <= 0:
            raise ValueError(
                "gates that are not learned stay as they begin, and these begin closed: set gate.initial_logit above 0"
            )
        return self


class Source(_Part):
    """One set of rows: multiple choice (question, choices, answer), short answers (question, answer), or chats (messages)."""

    path: str | None = None
    """A .jsonl, .jsonl.zst or .parquet file, relative to the data folder."""
    hub: str | None = None
    """A data set on the hub, `org/name`, whose rows have one of these forms."""
    subset: str | None = None
    """The hub's name for a part of a data set, its config."""
    split: str | None = None
    """Of a hub data set; train by default."""
    revision: str | None = None
    """Of a hub data set: branch, tag or commit."""
    task: str | None = None
    """An evaluation task: its training rows, as the evaluation asks them."""
    limit: int | None = Field(default=None, gt=0)
    """Take a random sample of this many; of a stream, the first ones."""
    neighbours: int = Field(default=1, gt=0)
    """Sample runs of this many rows that follow one another. If those share a passage, the models read it once."""
    learn: Literal["response", "receiver"] = "response"
    """response: make the row's response likely. receiver: keep what the receiver alone would say next at each of the response's
    tokens, its whole distribution, so that the fuser learns where it has nothing to add."""
    weight: float | None = Field(default=None, gt=0)
    """Share of the mixture, relative to the others'. With weights, rows of the sources are drawn in these proportions until
    one source is used up; all sources have one, or none."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if sum(x is not None for x in (self.path, self.hub, self.task)) != 1:
            raise ValueError("a source has exactly one of path, hub, task")
        if self.hub is None and any(x is not None for x in (self.subset, self.split, self.revision)):
            raise ValueError("only hub data sets have a subset, a split or a revision")
        if self.neighbours > 1 and self.limit is None:
            raise ValueError("neighbours needs a limit: without one all rows are taken")
        return self

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.path or self.task or "/".join(x for x in (self.hub, self.subset, self.split or "train") if x)


class DataPart(_Part):
    """Which rows to train on, and which to stay away from."""

    train: tuple[Source, ...] = Field(min_length=1)
    validation: tuple[Source, ...] = Field(min_length=1)
    seed: int | None = Field(default=None, ge=0, lt=2**32)
    """Of samples and mixtures; the run's seed by default. With their own, runs of several seeds share rows and prefills."""
    held_out: tuple[str, ...] = ()
    """Evaluation rows: files in the data folder, or names of tasks. Training rows with the same question, or a run of 13 words
    of one, are dropped and named."""
    turns: Literal["last", "every"] = "last"
    """Of a chat: train on its last answer, or on every assistant turn, each as an example of its own."""
    max_tokens: int | None = Field(default=None, gt=1)
    """Longest prompt and response together, on either side. Longer prompts lose words from the beginning of their longest
    message; a row whose response alone is too long is dropped and named."""
    response_tokens: int | None = Field(default=None, gt=0)
    """Learn only the first so many tokens of a response. What a sharer has thought ahead shows there; in a long response it
    is a small part of the loss."""
    stream: bool = False
    """Read rows as they come instead of holding them; needs `optim.max_steps` and computes every prefill when it is needed."""
    shuffle_buffer: int = Field(default=1000, gt=0)
    """Rows of a stream among which the next is drawn."""

    @model_validator(mode="after")
    def _all_weighted(self) -> Self:
        for sources in (self.train, self.validation):
            without = [source.name for source in sources if source.weight is None]
            if 0 < len(without) < len(sources):
                raise ValueError(f"all sources have a weight or none; without one: {', '.join(without)}")
        if kept := [source.name for source in self.validation if source.learn == "receiver"]:
            raise ValueError(
                f'validation measures responses, so no source of it has learn = "receiver": {", ".join(kept)}'
            )
        return self


class ObjectivePart(_Part):
    """What is minimised, in nats per response token."""

    fused: Literal["prompt", "everywhere"] = "prompt"
    """prompt: the whole response is read behind the fused prompt, as in use. everywhere: each of its tokens is read behind a
    cache that is fused up to the token before it, so one row teaches as many fusions as its response has tokens; validation
    rows are read in the same way."""
    response: float = Field(default=1.0, ge=0)
    """Weight of the response's cross-entropy."""
    receiver: float = Field(default=1.0, gt=0)
    """Weight of the divergence KL(receiver alone ‖ receiver) between their next-token distributions, on rows that learn it."""
    distill: float = Field(default=0.0, ge=0)
    """Weight of the divergence KL(sharer ‖ receiver) between their next-token distributions over shared tokens."""
    distill_top: int = Field(default=64, gt=1)
    """How many of the sharer's likeliest tokens are kept."""
    contrastive: float = Field(default=0.0, ge=0)
    """Weight of a hinge that wants the response less likely with another row's cache: max(0, margin − (mismatched − matched))."""
    margin: float = Field(default=1.0, gt=0)
    """Of the hinge, nats per token."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.response == self.distill == 0:
            raise ValueError("response and distill are both 0: nothing to learn from")
        if self.fused == "everywhere" and (self.distill or self.contrastive):
            raise ValueError('distill and contrastive follow the response behind a prompt: they need fused = "prompt"')
        return self


class OptimPart(_Part):
    """How to train."""

    learning_rate: float = Field(default=1e-3, gt=0)
    gate_learning_rate: float | None = Field(default=None, gt=0)
    """Of the gates' logits; `learning_rate` by default."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Off on gates, norms and biases."""
    epochs: float = Field(default=2, gt=0)
    max_steps: int | None = Field(default=None, gt=0)
    """Optimizer steps; instead of `epochs`."""
    batch_size: int = Field(default=16, gt=0)
    """Rows of one forward pass on one process."""
    accumulate: int = Field(default=1, gt=0)
    """Forward passes of one optimizer step."""
    bucket: bool = False
    """Batch rows of about the same length."""
    warmup_steps: int = Field(default=20, ge=0)
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    max_grad_norm: float = Field(default=1.0, gt=0)
    sharer_dropout: float = Field(default=0.0, ge=0, le=1)
    """Share of training rows that hear the mean sharer features in place of the sharer's cache. At 1 all rows do, those
    of the validation too: the fuser learns what its parameters alone can bring."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the fuser's products in training; its weights and the optimizer are float32."""
    compile: bool = False
    """Run the fuser through torch.compile, which needs a C++ compiler on a CPU."""
    gradient_checkpointing: bool = False
    """Compute the receiver's activations again in the backward pass instead of keeping them."""


class WatchPart(_Part):
    """What is measured on the way, and what is kept."""

    eval_steps: int = Field(default=50, gt=0)
    """Steps between two validations, each followed by a checkpoint."""
    patience: int = Field(default=4, gt=0)
    """Stop after this many validations without a better response likelihood."""
    log_steps: int = Field(default=10, gt=0)
    keep: int = Field(default=2, gt=0)
    """Checkpoints to keep, the newest ones; the best is kept besides."""
    report_to: tuple[str, ...] = ("tensorboard",)
    """Trackers, by transformers' names; none if empty."""

    @model_validator(mode="after")
    def _whole_windows(self) -> Self:
        if self.eval_steps % self.log_steps:
            raise ValueError("eval_steps must be a multiple of log_steps: a resumed run would log other averages")
        return self


class Recipe(_Part):
    """A whole run."""

    receiver: str
    sharer: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of both models; the fuser is trained in float32."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of initial weights, the order of rows, and noise; of the rows' sample too, unless `data.seed` is set."""
    fuser: FuserPart = FuserPart()
    data: DataPart
    objective: ObjectivePart = ObjectivePart()
    optim: OptimPart = OptimPart()
    watch: WatchPart = WatchPart()

    @property
    def rows_seed(self) -> int:
        """Which rows are drawn."""
        return self.seed if self.data.seed is None else self.data.seed

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.data.stream and self.optim.max_steps is None:
            raise ValueError("data.stream needs optim.max_steps, since nobody knows where a stream ends")
        if self.data.stream and self.optim.bucket:
            raise ValueError("optim.bucket needs the rows' lengths, which data.stream does not know")
        if self.data.response_tokens is not None and self.objective.distill:
            raise ValueError("objective.distill follows whole responses, and data.response_tokens cuts them off")
        if self.objective.fused == "everywhere" and self.fuser.alignment != "native":
            raise ValueError(
                'objective.fused = "everywhere" pairs the tokens of responses, which needs native alignment'
            )
        kept = any(source.learn == "receiver" for source in self.data.train)
        if kept and (self.objective.fused == "everywhere" or self.objective.distill or self.objective.contrastive):
            raise ValueError(
                'rows with learn = "receiver" need objective.fused = "prompt", and neither distill nor contrastive'
            )
        if self.objective.contrastive and self.optim.batch_size == 1:
            raise ValueError("objective.contrastive needs another row in the batch: an optim.batch_size above 1")
        if self.data.stream and any(source.neighbours > 1 for source in self.data.train):
            raise ValueError("neighbours samples rows, and data.stream takes them as they come")
        return self


@dataclass(frozen=True)
class Machine:
    """Where a run happens. None of it changes what the run ends with, beyond rounding."""

    data_dir: Path | None = None
    """Folder of data sets. By default paths are relative to the current folder, and rows of tasks come from the hub."""
    features: Path | None = None
    """Folder of prefills, which may be shared by all runs; None computes every prefill when it is needed."""
    device: str | None = None
    """Of receiver and fuser; an accelerator if there is one."""
    sharer_device: str | None = None
    """The same by default."""
    trust_remote_code: bool = False

    def file(self, path: str) -> Path:
        """Where a path of the recipe lies."""
        return (self.data_dir or Path()) / path
