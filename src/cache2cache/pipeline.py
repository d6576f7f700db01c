"""The request path: two or more models read a conversation, their caches are fused, the receiver answers.

Decoding is `transformers.generate`'s: the fused cache is an ordinary cache handed to it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import DynamicCache

from cache2cache import inputs
from cache2cache.decoding import decoding_of
from cache2cache.errors import GenerationError, SharerError
from cache2cache.from_ids import from_ids
from cache2cache.fuser.base import Fuser
from cache2cache.fuser.several import FusionMode, Speaker, fused_kv
from cache2cache.inputs import Inputs, Row, SharerInputs
from cache2cache.loading import load_pair
from cache2cache.models import kv
from cache2cache.models.load import LanguageModel, Sharer, pad_id
from cache2cache.pair import Model, check, speaking, wrapped
from cache2cache.types import Conversation, Generation, Message, SharerPolicy, Timings, TokenCounts, clock

if TYPE_CHECKING:
    from cache2cache.chat import Chat
    from cache2cache.serve.remote import RemoteOptions


@dataclass
class Prefill:
    """A batch that has been read and fused; hand `cache`, `ids` and `mask` to any decoder."""

    inputs: Inputs
    cache: DynamicCache
    """The receiver's, fused: every prompt token but the last."""
    sharer_caches: list[DynamicCache]
    """One per sharer; empty where it did not speak, or keeps its cache elsewhere."""
    timings: Timings = field(default_factory=Timings)
    degraded: dict[int, str] = field(default_factory=dict)
    """Sharers that should have spoken and could not, and why. They do not speak in `inputs` either."""

    @property
    def ids(self) -> torch.Tensor:
        """(B, N) the receiver's prompt, padded on the left."""
        return self.inputs.ids

    @property
    def mask(self) -> torch.Tensor:
        """(B, N)"""
        return self.inputs.mask


class C2C:
    """A receiver and its sharers.

    Args:
        receiver: the model that answers, as a `LanguageModel` or a (model, tokenizer) pair.
        sharers: the models that it listens to, here or elsewhere (`RemoteSharer`).
        fusers: one per sharer.
        mode: how several sharers are combined, "parallel" or "sequential".
        template: how the receiver's prompts are rendered: a name, Jinja text, or None for its own chat template. Only
            without fusers: with them it is what they were trained with.
        on_sharer_failure: "fail", or answer without a remote sharer that cannot be heard: see `Generation.degraded`.

    Raises:
        FuserMismatchError: a fuser that was trained for another pair, or not one fuser per sharer.
        ModelError: a model without a per-token KV cache.
    """

    def __init__(
        self,
        receiver: Model,
        sharers: Sequence[Model | Sharer] = (),
        fusers: Sequence[Fuser] = (),
        mode: FusionMode = "parallel",
        template: str | None = None,
        on_sharer_failure: SharerPolicy = "fail",
    ):
        if names := [x for x in (receiver, *sharers, *fusers) if isinstance(x, str | Path)]:
            raise TypeError(f"C2C takes what is loaded, got the name {names[0]!r}: C2C.from_pretrained loads by name")
        self.receiver, *known = [wrapped(lm) for lm in (receiver, *sharers)]
        # Whoever wants more of a sharer than `Sharer` promises gets a ModelError from one that is elsewhere.
        self.sharers = cast("list[LanguageModel]", known)
        self.fusers = [fuser.to(self.receiver.device).eval() for fuser in fusers]
        self.mode: FusionMode = mode
        self.on_sharer_failure: SharerPolicy = on_sharer_failure
        self.template = self.fusers[0].config.receiver_template if self.fusers else template
        check(self)

    @classmethod
    def from_pretrained(
        cls,
        receiver: str | Path,
        sharers: str | Path | Sequence[str | Path] = (),
        fusers: str | Path | Fuser | Sequence[str | Path | Fuser] = (),
        *,
        device: str | torch.device = "cpu",
        sharer_device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        mode: FusionMode = "parallel",
        trust_remote_code: bool = False,
        remote: RemoteOptions | None = None,
        on_sharer_failure: SharerPolicy = "fail",
    ) -> C2C:
        """Load a pair.

        Args:
            receiver, sharers: catalogue names, hub ids or folders; `id@revision` pins a hub id. A sharer may also be the
                address of a `c2c share`, which must answer now. One may stand without a list.
            fusers: folders, hub ids, "demo", or loaded fusers; one per sharer, likewise.
            sharer_device: where the sharers run; the receiver's device by default.
            dtype: of all models that are loaded here; "auto" is what the weights are stored in.
            remote: how sharers elsewhere are asked.
            on_sharer_failure: see `C2C`.

        Raises:
            ModelError: a device that is not here; see also `models.load.load`.
            FuserFormatError, DownloadError: see `Fuser.from_pretrained`.
            FuserMismatchError: fusers that are not those of the pair.
            SharerError: a sharer elsewhere that does not answer.
        """
        parts = load_pair(
            receiver, sharers, fusers, device=device, sharer_device=sharer_device or device, remote=remote, dtype=dtype,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        return cls(*parts, mode, on_sharer_failure=on_sharer_failure)

    # --- the request path ---------------------------------------------------------------------------------------

    def generate(
        self,
        conversations: Conversation | Sequence[Conversation],
        *,
        sharers: Sequence[int] | Sequence[Sequence[int]] | None = None,
        **generate_kwargs: Any,
    ) -> Generation | list[Generation]:
        """Answer one conversation, or a batch of them.

        Args:
            conversations: a list of messages, or a list of such lists.
            sharers: indices of the sharers that speak, for all rows or one list per row. All by default; `[]` is
                the receiver alone.
            generate_kwargs: anything that `transformers.generate` takes.

        Returns:
            One `Generation` for one conversation, a list for a batch. With num_return_sequences = n the answers
            of each conversation follow one another, and it is always a list.
        """
        batch = is_batch(conversations)
        timings = Timings()
        prepared = self.prepare(conversations if batch else [conversations], sharers, timings)  # type: ignore[arg-type, list-item]
        answers = self.decode(self.read(prepared, timings=timings), **generate_kwargs)
        return answers if batch or len(answers) > 1 else answers[0]

    def prepare(
        self,
        conversations: Sequence[Conversation],
        sharers: Sequence[int] | Sequence[Sequence[int]] | None = None,
        timings: Timings | None = None,
    ) -> Inputs:
        """Render, tokenise, align and pad a batch."""
        return self.collate(self.rows(conversations, sharers, timings))

    def rows(
        self,
        conversations: Sequence[Conversation],
        sharers: Sequence[int] | Sequence[Sequence[int]] | None = None,
        timings: Timings | None = None,
    ) -> list[Row]:
        """Each conversation as every model will read it."""
        timings = timings or Timings()
        speakers = speaking(sharers, len(self.sharers), len(conversations))
        return [
            inputs.row(messages, self.receiver, self.sharers, self.fusers, who, timings, self.template)
            for messages, who in zip(conversations, speakers, strict=True)
        ]

    def collate(self, rows: Sequence[Row]) -> Inputs:
        """Rows as one batch, padded on the left."""
        return inputs.collate(rows, pad_id(self.receiver), [pad_id(lm) for lm in self.sharers])

    @torch.no_grad()
    def read(self, prepared: Inputs, *, resume: Prefill | None = None, timings: Timings | None = None) -> Prefill:
        """Prefill every model and fuse. With `resume`, whatever its caches hold already is not read again.

        Raises:
            SharerError: a remote sharer cannot be heard, and the policy is "fail".
        """
        timings = timings or Timings()
        cache = resume.cache if resume else kv.new_cache()
        sharer_caches = resume.sharer_caches if resume else [kv.new_cache() for _ in self.sharers]
        heard, degraded = list(sharer_caches), {}
        for i, (lm, fuser, part) in enumerate(zip(self.sharers, self.fusers, prepared.sharers, strict=True)):
            if part is not None:
                needed = _needed(fuser, part, kv.length(cache))
                try:
                    with clock(timings, "sharer_prefill", lm.device):
                        heard[i] = lm.prefill(part.ids, part.mask, heard[i], needed, fuser.config.layer_map)
                except SharerError as error:
                    if self.on_sharer_failure == "fail":
                        raise
                    degraded[i] = str(error)
        parts = (None if i in degraded else part for i, part in enumerate(prepared.sharers))
        prepared = replace(prepared, sharers=tuple(parts))
        ids, mask = prepared.ids.to(self.receiver.device), prepared.mask.to(self.receiver.device)
        for stop in _stops(prepared, kv.length(cache)):
            with clock(timings, "receiver_prefill", self.receiver.device):
                kv.prefill(self.receiver.model, ids[:, kv.length(cache) : stop], mask[:, :stop], cache)
            with clock(timings, "fuse", self.receiver.device):
                self.fuse(cache, mask, stop, prepared, heard)
        return Prefill(prepared, cache, sharer_caches, timings, degraded)

    def fuse(
        self,
        cache: DynamicCache,
        mask: torch.Tensor,
        stop: int,
        prepared: Inputs,
        sharer_caches: Sequence[DynamicCache],
    ) -> None:
        """Gather, project, weigh, gate and add: rewrite the receiver's cache in the columns that are due now."""
        heard = [
            (fuser, theirs, part)
            for fuser, theirs, part in zip(self.fusers, sharer_caches, prepared.sharers, strict=True)
            if part is not None and fuser.speaks()
        ]
        if not heard:
            return
        columns = torch.stack([part.due == stop for *_, part in heard]).any(0).any(0).nonzero().squeeze(-1)  # (P,)
        if not len(columns):
            return
        device = self.receiver.device
        at = columns.expand(len(mask), -1).to(device)  # (B, P)
        own = kv.gather(cache, at)
        speakers = [_speaker(fuser, theirs, part, columns, stop, device) for fuser, theirs, part in heard]
        fused = fused_kv(own, kv.position_ids(mask).gather(1, at), speakers, self.mode)
        kv.scatter(cache, at, torch.stack([speaker.mask for speaker in speakers]).any(0), fused)

    @torch.no_grad()
    def decode(self, prefill: Prefill, **generate_kwargs: Any) -> list[Generation]:
        """Let the receiver answer from a fused cache. What it writes extends the cache, unless a row has several answers or
        beams: a `Prefill` serves once.

        Raises:
            ContextLengthError, GenerationError: see `decoding_of`; also for a prefill that was decoded before.
        """
        if kv.length(prefill.cache) != prefill.ids.shape[1] - 1:
            raise GenerationError(
                "the cache does not hold the prompt but its last token",
                got=f"{kv.length(prefill.cache)} positions", allowed=prefill.ids.shape[1] - 1,
                hint="A prefill can be decoded once: read it again, or decode a copy of it",
            )  # fmt: skip
        model, tokenizer = self.receiver.model, self.receiver.tokenizer
        ids, mask = prefill.ids.to(model.device), prefill.mask.to(model.device)
        decoding = decoding_of(self.receiver, mask, generate_kwargs)
        cache = kv.repeated(prefill.cache, decoding.expand)
        with clock(prefill.timings, "decode", model.device):
            raw = model.generate(ids, attention_mask=mask, past_key_values=cache, **decoding.options)  # type: ignore[operator]
        sequences = raw if isinstance(raw, torch.Tensor) else raw.sequences
        answers = []
        for i, sequence in enumerate(sequences.tolist()):
            new = decoding.written(i, sequence)
            row = i * len(ids) // len(sequences)
            spoke = [part for part in prefill.inputs.sharers if part is not None and part.due[row].any()]
            read = [int(part.mask[row].sum()) for part in spoke]
            counts = TokenCounts(int(mask[row].sum()), tuple(read), len(new))
            text = str(tokenizer.decode(new, skip_special_tokens=True))
            answers.append(Generation(text, new, counts, prefill.timings, raw, prefill.degraded))
        return answers

    # --- other doors to the same path ---------------------------------------------------------------------------

    def prefill(
        self,
        conversations: Conversation | Sequence[Conversation] | None = None,
        *,
        sharers: Sequence[int] | Sequence[Sequence[int]] | None = None,
        receiver_ids: torch.Tensor | None = None,
        sharer_ids: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
        **ids_kwargs: Any,
    ) -> Prefill:
        """Read and fuse without answering: from conversations, or from token ids.

        Args:
            sharers: as for `generate`.
            receiver_ids: (B, N), instead of conversations.
            sharer_ids: (B, M) per sharer; the receiver's ids, with their mask, by default.
            ids_kwargs: `receiver_mask`, `sharer_masks`, `alignments`, `spans`: see `from_ids.from_ids`.
        """
        if (conversations is None) == (receiver_ids is None):
            raise TypeError("prefill() takes either conversations or receiver_ids")
        if receiver_ids is None:
            if ids_kwargs or sharer_ids is not None:
                raise TypeError(f"with conversations, {', '.join(['sharer_ids', *ids_kwargs])} cannot be given")
            timings = Timings()
            batch = conversations if is_batch(conversations) else [conversations]  # type: ignore[arg-type]
            return self.read(self.prepare(batch, sharers, timings), timings=timings)  # type: ignore[arg-type]
        if sharer_ids is None:
            sharer_ids = [receiver_ids] * len(self.sharers)
            ids_kwargs.setdefault("sharer_masks", [ids_kwargs.get("receiver_mask")] * len(self.sharers))
        elif isinstance(sharer_ids, torch.Tensor):
            sharer_ids = [sharer_ids]
        ids_kwargs["speakers"] = sharers
        return self.read(from_ids(receiver_ids, sharer_ids, self.receiver, self.sharers, self.fusers, **ids_kwargs))

    def stream(
        self, conversation: Conversation, *, sharers: Sequence[int] | None = None, **generate_kwargs: Any
    ) -> Generator[str, None, Generation]:
        """Answer one conversation, piece by piece; the generator's return value is the whole `Generation`."""
        from cache2cache.streaming import stream

        timings = Timings()
        prefill = self.read(self.prepare([conversation], sharers, timings), timings=timings)
        return (yield from stream(self, prefill, **generate_kwargs))

    def chat(self, system: str | None = None) -> Chat:
        """A conversation that keeps its fused cache between turns."""
        from cache2cache.chat import Chat

        return Chat(self, [] if system is None else [Message(role="system", content=system)])


def _stops(prepared: Inputs, read: int) -> list[int]:
    """Where the receiver pauses to be fused, after the columns read already; the prompt's last token stays unread."""
    last = prepared.ids.shape[1] - 1
    due = {int(c) for part in prepared.sharers if part is not None for c in part.due.unique()}
    return sorted({c for c in due if read < c < last} | ({last} if last > read else set()))


def _needed(fuser: Fuser, part: SharerInputs, read: int) -> torch.Tensor:
    """(B, M) bool, the sharer's positions that will be fused into the receiver's columns after those read already."""
    needed = torch.zeros_like(part.mask, dtype=torch.bool)
    rows, columns = (part.due > (read if fuser.speaks() else part.due.shape[1])).nonzero(as_tuple=True)
    needed[rows, part.alignment[rows, columns]] = True
    return needed


def _speaker(
    fuser: Fuser, cache: DynamicCache, part: SharerInputs, columns: torch.Tensor, stop: int, device
) -> Speaker:
    at = part.alignment[:, columns]  # (B, P)
    theirs = kv.gather(cache, at.to(kv.device(cache)), fuser.config.layer_map)
    positions = kv.position_ids(part.mask).gather(1, at)
    return Speaker(fuser, theirs.to(device), positions.to(device), (part.due[:, columns] == stop).to(device))


def is_batch(conversations: Any) -> bool:
    """Whether this is a list of conversations rather than one."""
    return isinstance(conversations, Sequence) and len(conversations) > 0 and isinstance(conversations[0], Sequence)
