"""What a pair must be before it reads anything, and who speaks in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cache2cache.errors import FuserMismatchError
from cache2cache.fuser.several import FusionMode
from cache2cache.models.load import LanguageModel, Sharer
from cache2cache.types import SharerPolicy

if TYPE_CHECKING:
    from cache2cache.pipeline import C2C

Model = LanguageModel | tuple[PreTrainedModel, PreTrainedTokenizerBase]


def wrapped(lm: Model | Sharer) -> Any:
    """A model as the pair holds it.

    Raises:
        TypeError: a model without its tokenizer, or something else.
        ModelError: see `LanguageModel.wrap`.
    """
    if isinstance(lm, PreTrainedModel):
        raise TypeError(f"C2C takes (model, tokenizer), got {type(lm).__name__} without its tokenizer")
    if isinstance(lm, tuple) and not (len(lm) == 2 and isinstance(lm[0], PreTrainedModel)):
        raise TypeError(f"C2C takes (model, tokenizer), got ({', '.join(type(x).__name__ for x in lm)})")
    return LanguageModel.wrap(*lm) if isinstance(lm, tuple) else lm


def check(pair: C2C) -> None:
    """Raise FuserMismatchError unless the parts belong together."""
    if len(pair.sharers) != len(pair.fusers):
        raise FuserMismatchError("one fuser per sharer is needed", got=f"{len(pair.fusers)} for {len(pair.sharers)}")
    for name, allowed in (("mode", get_args(FusionMode)), ("on_sharer_failure", get_args(SharerPolicy))):
        if getattr(pair, name) not in allowed:
            raise FuserMismatchError(f"unknown {name}", got=getattr(pair, name), allowed=", ".join(allowed))
    for sharer, fuser in zip(pair.sharers, pair.fusers, strict=True):
        fuser.check_pair(pair.receiver.card, sharer.card)
    at_once = {fuser.config.alignment: fuser.config.alignment in ("native", "same-ids") for fuser in pair.fusers}
    if pair.mode == "parallel" and len(set(at_once.values())) > 1:
        raise FuserMismatchError(
            "in parallel, sharers must be fused at the same places: some are message by message, others at the end",
            got=", ".join(at_once), allowed="one way for all sharers", hint='Give mode="sequential"',
        )  # fmt: skip
    templates = {fuser.config.receiver_template for fuser in pair.fusers}
    if len(templates) > 1:
        raise FuserMismatchError("the fusers were trained with different receiver templates", got=templates)


def speaking(sharers: Sequence[int] | Sequence[Sequence[int]] | None, count: int, rows: int) -> list[list[int]]:
    """Who of so many sharers speaks in each row.

    Raises:
        FuserMismatchError: what is neither indices for all rows nor one list of them per row.
    """
    everyone = range(count)
    if sharers is None:
        return [list(everyone)] * rows
    given = list(sharers) if isinstance(sharers, Sequence) else [None]
    same = all(isinstance(i, int) for i in given)
    per_row = [given] * rows if same else given
    if len(per_row) != rows or not all(
        isinstance(who, Sequence) and all(isinstance(i, int) and i in everyone for i in who) for who in per_row
    ):
        raise FuserMismatchError(
            "sharers must be indices, in one list for all conversations or in one list per conversation",
            got=sharers, allowed=f"indices {list(everyone)}, {rows} lists",
        )  # fmt: skip
    return [sorted(set(who)) for who in per_row]  # type: ignore[arg-type]
