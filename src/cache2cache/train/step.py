"""One training step: the request path with gradients, from a batch of rows to what is minimised."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import DynamicCache

from cache2cache.errors import DataError
from cache2cache.fuser.several import Speaker, fused_kv
from cache2cache.fuser.statistics import FeatureStatistics
from cache2cache.models import kv
from cache2cache.models.attention import few_queries
from cache2cache.models.head import logits_at
from cache2cache.models.recompute import recomputed
from cache2cache.pipeline import C2C
from cache2cache.train import objective
from cache2cache.train.batch import first_stop, grid, grid_width
from cache2cache.train.config import ObjectivePart
from cache2cache.train.dropout import SharerDropout
from cache2cache.train.everywhere import seen
from cache2cache.train.heard import Heard

Batch = dict[str, torch.Tensor]
"""See `batch.Collator`."""


class TrainingStep(nn.Module):
    """What Trainer trains: one fuser inside a frozen pair. Only the fuser is a submodule, so only it is saved.

    Args:
        pair: one receiver, one sharer, one fuser.
        parts: the weights of the objective's terms.
        precision: of the fuser's products while training; its weights and validation are float32 in any case.
        dropout: lets training rows hear the mean sharer features.
        mean: statistics of the sharer's mapped layers, which validation needs for `zeroed`.
        checkpointing: compute the receiver's activations again in the backward pass instead of keeping them.
    """

    def __init__(
        self,
        pair: C2C,
        parts: ObjectivePart,
        *,
        precision: Literal["float32", "bfloat16"] = "float32",
        dropout: SharerDropout | None = None,
        mean: FeatureStatistics | None = None,
        checkpointing: bool = False,
    ):
        super().__init__()
        (self.fuser,) = pair.fusers
        self._pair = [pair]  # in a list, so that the frozen models do not become submodules
        self._parts, self._precision, self._dropout, self._mean = parts, precision, dropout, mean
        self._checkpointing = checkpointing
        self._mapped = sorted(set(self.fuser.config.layer_map))
        self._place = [self._mapped.index(layer) for layer in self.fuser.config.layer_map]

    def forward(self, num_items_in_batch: torch.Tensor | int | None = None, **batch: Any) -> Batch:
        """The loss of a batch; while validating, also what it is made of.

        Args:
            num_items_in_batch: response tokens of the whole optimizer step, over its forward passes and processes. Sums are
                divided by it, so that gradients do not depend on how the step was cut up; by this batch's own by default.
            batch: from `batch.Collator`. Caches that it lacks are computed; what is no tensor is left aside.

        Returns:
            `loss`: while training, response · nats + distill · divergence + contrastive · hinge, each per response token
            (`train.objective`); a batch of one row has no other row's cache to hear, so its hinge is zero. Rows that learn what
            the receiver says alone have receiver · departure instead. While validating, nats per response token, and per row
            (B,): `nats` of its response, `mismatched` and `zeroed` the same with another cache (NaN in a batch of one row, and
            without `mean`), `tokens` of the response, and `first`: whether its first token is the likeliest.

        Raises:
            DataError: while training, a batch in which no position is fused.
        """
        device = self._pair[0].receiver.device
        batch = {name: x.to(device) for name, x in batch.items() if isinstance(x, torch.Tensor)}
        own, heard = self._own(batch), self._heard(batch)
        if not self.training:
            return self._validate(batch, own, heard)
        if not heard.due.any():
            raise DataError(
                "no position of a batch is fused, so nothing can be learned from it", hint="Raise fuse_last"
            )
        labelled, parts = batch["labels"] != -100, self._parts
        logits = self._logits(batch, own, heard)
        nats = objective.nats(logits, batch["response"][labelled])
        kept = batch["alone"][:, None].expand_as(labelled)[labelled]
        loss = parts.response * nats[~kept].sum()
        if kept.any():
            departure = objective.departure(logits[kept], self._alone(batch, own, heard))
            loss = loss + parts.receiver * departure.sum()
        if parts.distill:
            teacher = batch["teacher_ids"][labelled], batch["teacher_logprobs"][labelled]
            loss = loss + parts.distill * objective.divergence(logits, *teacher).sum()
        if parts.contrastive and len(labelled) > 1:
            other = objective.nats(self._logits(batch, own, heard.mismatched()), batch["response"][labelled])
            matched, mismatched = _per_row(nats, labelled), _per_row(other, labelled)
            hinge = objective.hinge(matched, mismatched, labelled.sum(1), parts.margin)
            loss = loss + parts.contrastive * hinge.sum()
        return {"loss": loss / (labelled.sum() if num_items_in_batch is None else num_items_in_batch)}

    def compile_fuser(self) -> None:
        """Run the fuser's projection through torch.compile from now on."""
        self.fuser.project = torch.compile(self.fuser.project)  # type: ignore[method-assign]

    def _validate(self, batch: Batch, own: DynamicCache, heard: Heard) -> Batch:
        labelled = batch["labels"] != -100
        answers = batch["response"][labelled]
        logits = self._logits(batch, own, heard)
        nats = _per_row(objective.nats(logits, answers), labelled)
        unknown = torch.full_like(nats, torch.nan)
        first = labelled.sum(1).cumsum(0) - labelled.sum(1)  # where each row's labels begin

        def with_other(other: Heard) -> torch.Tensor:
            return _per_row(objective.nats(self._logits(batch, own, other), answers), labelled)

        return {
            "loss": nats.sum() / labelled.sum(),
            "nats": nats,
            "tokens": labelled.sum(1),
            "mismatched": with_other(heard.mismatched()) if len(nats) > 1 else unknown,
            "zeroed": unknown if self._mean is None else with_other(heard.zeroed(self._mean)),
            "first": logits[first].argmax(-1) == answers[first],
        }

    def _own(self, batch: Batch) -> DynamicCache:
        """The receiver's cache up to where it is first fused."""
        if "own" in batch:
            return kv.from_tensors(list(zip(*batch["own"], strict=True)))
        stop = first_stop(batch["due"])
        return kv.prefill(self._pair[0].receiver.model, batch["ids"][:, :stop], batch["mask"][:, :stop])

    def _heard(self, batch: Batch) -> Heard:
        positions = batch["their_positions"]
        theirs = batch["theirs"] if "theirs" in batch else self._sharer_reads(batch)
        if self._dropout is not None:
            theirs = self._dropout(theirs, positions, training=self.training)
        return Heard(theirs, positions, batch["due"])

    def _sharer_reads(self, batch: Batch) -> torch.Tensor:
        """(2, U, B, H_s, W, D_s), computed now."""
        (sharer,) = self._pair[0].sharers
        cache = kv.prefill(sharer.model, batch["sharer_ids"].to(sharer.device), batch["sharer_mask"].to(sharer.device))
        at = grid(batch["alignment"], grid_width(batch["due"])).to(sharer.device)
        return kv.gather(cache, at, self._mapped).to(batch["ids"].device)

    def _logits(self, batch: Batch, own: DynamicCache, heard: Heard) -> torch.Tensor:
        """(K, V) at the labelled positions, row after row."""
        read = self._behind_prompts if self._parts.fused == "prompt" else self._everywhere
        return read(batch, own, heard)

    def _behind_prompts(self, batch: Batch, own: DynamicCache, heard: Heard) -> torch.Tensor:
        """The receiver reads up to where something is due, is fused there, and reads on in the fused cache; from the first
        fusion on with gradients.
        """
        model, ids, mask = self._pair[0].receiver.model, batch["ids"], batch["mask"]
        cache, last = kv.clone(own), ids.shape[1] - 1
        tail = torch.cat([ids[:, -1:], batch["response"][:, :-1]], dim=1)
        whole = torch.cat([mask, mask.new_ones((len(mask), tail.shape[1] - 1))], dim=1)
        for stop in sorted({*heard.due[heard.due > 0].unique().tolist(), last}):
            between = ids[:, kv.length(cache) : stop]
            with self._reading(between.shape[1]):
                kv.extend(model, between, mask[:, :stop], cache)
            self._fuse(cache, mask, stop, heard)
        with self._reading(tail.shape[1]):
            return logits_at(model, tail, whole, cache, batch["labels"] != -100)

    @torch.no_grad()
    def _alone(self, batch: Batch, own: DynamicCache, heard: Heard) -> torch.Tensor:
        """As `_logits`, without a sharer, of the rows that learn what the receiver says alone."""
        rows = batch["alone"].nonzero().squeeze(1)
        some = {name: batch[name][rows] for name in ("ids", "mask", "response", "labels")}
        cache = kv.clone(own)
        kv.select_rows(cache, rows.tolist())
        return self._behind_prompts(some, cache, replace(heard, due=torch.zeros_like(some["ids"])))

    def _everywhere(self, batch: Batch, own: DynamicCache, heard: Heard) -> torch.Tensor:
        """The receiver reads each response token behind a cache that is fused up to the token before it."""
        model, ids, mask = self._pair[0].receiver.model, batch["ids"], batch["mask"]
        cache, stop, queries, width = kv.clone(own), ids.shape[1] - 1, batch["labels"].shape[1], 0
        if (heard.due == stop).any():
            start, fused = self._fused(cache, mask, stop, heard)
            kv.replace_columns(cache, stop, fused)
            width = stop - start
        sees = seen(mask, heard.due, width, queries, self.fuser.config.fuse_last)
        added = torch.where(sees, 0.0, torch.finfo(model.dtype).min).to(model.dtype)[:, None]
        positions = kv.position_ids(mask)[:, -queries:]
        with self._reading(queries):
            return logits_at(model, ids[:, -queries:], added, cache, batch["labels"] != -100, positions)

    def _reading(self, queries: int) -> AbstractContextManager[None]:
        """How the receiver reads: while validating as in use, while training so that the backward pass is cheap."""
        model = self._pair[0].receiver.model
        if not self.training:
            return nullcontext()
        return recomputed(model) if self._checkpointing else few_queries(model, queries)

    def _fuse(self, cache: DynamicCache, mask: torch.Tensor, stop: int, heard: Heard) -> None:
        """Rewrite the columns that are due now. They are the last ones that were read."""
        if (heard.due == stop).any() and self.fuser.speaks():
            kv.replace_columns(cache, *self._fused(cache, mask, stop, heard))

    def _fused(self, cache: DynamicCache, mask: torch.Tensor, stop: int, heard: Heard) -> tuple[int, torch.Tensor]:
        """The first of the columns that are due now, and what becomes of them and all behind, (2, L, B, H, stop − first, D)."""
        due = heard.due == stop
        start = int(due.any(0).nonzero()[0])
        width = heard.theirs.shape[4]
        left = heard.due.shape[1] - 1 - width
        theirs = heard.theirs[:, :, :, :, start - left : stop - left][:, self._place]
        speaker = Speaker(self.fuser, theirs, heard.positions[:, start - left : stop - left], due[:, start:stop])
        own_positions = kv.position_ids(mask)[:, start:stop]
        with self._fuser_precision(mask.device.type):
            return start, fused_kv(kv.columns(cache, start), own_positions, [speaker])

    def _fuser_precision(self, device_type: str) -> Any:
        enabled = self.training and self._precision == "bfloat16"
        return torch.autocast(device_type, dtype=torch.bfloat16, enabled=enabled)


def _per_row(nats: torch.Tensor, labelled: torch.Tensor) -> torch.Tensor:
    """(K,) of the labelled positions → (B,) sums."""
    return nats.new_zeros(len(labelled)).index_add(0, labelled.nonzero()[:, 0], nats)
