"""Whether a fuser really fits a pair: what its config cannot promise is tried out on the loaded models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cache2cache.errors import C2CError, ModelError
from cache2cache.fuser.base import Fuser
from cache2cache.fuser.compact import CompactFuser
from cache2cache.fuser.rotary import Rotary
from cache2cache.models import kv
from cache2cache.models.load import LanguageModel
from cache2cache.pipeline import C2C
from cache2cache.types import Geometry, Message

PROBE: list[Message] = [{"role": "user", "content": "Which planet is closest to the sun? Answer in one word."}]
"""The conversation that is fused to see what a fuser does."""

_POSITIONS = (1, 7, 1000)
"""Near ones try the fast pairs of a rotary embedding, the far one tries the slow pairs."""


@dataclass(frozen=True)
class Check:
    """One thing that was tried."""

    name: str
    passed: bool
    detail: str
    """What was found, or what is wrong."""
    warning: bool = False
    """Whether it passed, and may be wrong all the same."""


def verify(fuser: Fuser, receiver: LanguageModel, sharer: LanguageModel) -> list[Check]:
    """Try a fuser on a pair. Where one check fails, those that build on it are left out.

    Weights are not compared, since a fuser does not know its pair's: other names than the fuser's are a warning.
    """

    def same_pair() -> str:
        fuser.check_pair(receiver.card, sharer.card)
        unknown = [lm.card.id for lm, card in _sides(fuser, receiver, sharer) if card.tokenizer is None]
        return f"tokenizer of {', '.join(unknown)} not recorded" if unknown else "geometry and tokenizers match"

    checks = [_try("fits the pair", same_pair)]
    if others := [f"{lm.card.id} instead of {card.id}" for lm, card in _sides(fuser, receiver, sharer)
                  if lm.card.id != card.id]:  # fmt: skip
        detail = f"{', '.join(others)}: if these are not other names of the same weights, it fuses noise"
        checks.append(Check("has other names for its models", True, detail, warning=True))
    if isinstance(fuser, CompactFuser) and fuser.sizes.still_keys:
        for side, lm in (("receiver", receiver), ("sharer", sharer)):
            checks.append(_try(f"{side}'s keys can be rotated back", lambda lm=lm: check_rotation(lm)))
    if all(check.passed for check in checks):
        checks.append(_try("fuses a prompt", lambda: _fuse(fuser, receiver, sharer)))
    return checks


@torch.no_grad()
def check_rotation(lm: LanguageModel) -> str:
    """Prove that a model's keys can be rotated back to position 0; say how exactly.

    What a model computes of a prompt of one token does not depend on the token's position, except for the rotation of
    the keys. So the same token, read at two positions and rotated back, must give the same keys in every layer.

    Raises:
        ModelError: the keys or the values depend on the position in another way.
    """
    size = lm.card.geometry
    if size.rope_problem or not size.rope_of_layer:
        raise _not_rotary(lm, size.rope_problem or "no rotary parameters in its config")
    rotary, entries = Rotary(size), torch.arange(size.layers)
    limit = size.max_positions or max(_POSITIONS) + 1
    tolerance = 1e-3 if lm.dtype == torch.float32 else 2e-2
    keys, values = _read_alone(lm, 0)
    keys = rotary(keys, torch.zeros(len(keys[0]), 1), entries, back=True)
    worst = 0.0
    for position in sorted({min(position, limit - 1) for position in _POSITIONS}):
        there, values_there = _read_alone(lm, position)
        if (layer := _first_off(values_there, values, tolerance)) is not None:
            raise _not_rotary(lm, f"the values of layer {layer} depend on the position: learned positions?")
        back = rotary(there, torch.full((len(keys[0]), 1), position), entries, back=True)
        if (layer := _first_off(back, keys, tolerance)) is not None:
            raise _not_rotary(
                lm,
                f"layer {layer} at position {position} is off by {_off(back, keys)[layer]:.1%}: "
                "interleaved pairs, layers without rotation, frequencies that .to() made coarse, or other parameters?",
            )
        worst = max(worst, float(_off(back, keys).max()))
    return f"off by at most {worst:.1e} of a key's size"


def geometry_at_rest(lm: LanguageModel) -> Geometry:
    """A model's geometry; without rotary parameters if they do not rotate its keys back, so that keys are taken as they are.

    Of a skeleton, whose keys nobody can read, the config is believed.
    """
    if lm.device.type == "meta":
        return lm.card.geometry
    try:
        check_rotation(lm)
    except ModelError:
        return lm.card.geometry.model_copy(update={"rope_of_layer": ()})
    return lm.card.geometry


def _read_alone(lm: LanguageModel, position: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (L, B, H, 1, D), float32 on the CPU, of prompts of one token at the given position."""
    ids = torch.linspace(1, lm.model.config.get_text_config().vocab_size - 1, 4).long()[:, None].to(lm.device)
    cache = kv.new_cache()
    lm.model.get_decoder()(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.full_like(ids, position),
        past_key_values=cache,
        use_cache=True,
    )
    keys, values = kv.stack(cache).float().cpu()
    return keys, values


def _off(got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """(L,) largest difference of each layer, relative to its largest value."""
    return (got - expected).abs().flatten(1).amax(1) / expected.abs().flatten(1).amax(1).clamp(min=1e-6)


def _first_off(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> int | None:
    off = (_off(got, expected) > tolerance).nonzero()
    return int(off[0]) if len(off) else None


def _not_rotary(lm: LanguageModel, found: str) -> ModelError:
    return ModelError(
        f"the keys of {lm.card.id} cannot be rotated back to position 0",
        got=found,
        allowed="rotary embeddings in half-split pairs with fixed frequencies",
        hint='Use a fuser of kind "paper", or one with sizes.still_keys = false: they take keys as they are',
    )


def _fuse(fuser: Fuser, receiver: LanguageModel, sharer: LanguageModel) -> str:
    """Fuse the probe and compare with the receiver alone."""
    pair = C2C(receiver, [sharer], [fuser])
    fused, alone = pair.prefill(PROBE), pair.prefill(PROBE, sharers=[])
    with_, without = kv.stack(fused.cache).float(), kv.stack(alone.cache).float()
    if not with_.isfinite().all():
        raise ModelError("the fused cache is not finite", hint="Load the models in float32")
    change = float((with_ - without).norm() / without.norm())
    if not change:
        raise ModelError("the fused cache is the receiver's own", hint="All gates are closed, or it was never trained")
    moved = 0.5 * float((_next(pair, fused) - _next(pair, alone)).abs().sum())
    return f"moves the cache by {change:.1%} and the next token's probabilities by {moved:.1%}"


def _next(pair: C2C, prefill) -> torch.Tensor:
    """(V,) probabilities of the first token of the answer."""
    options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return pair.decode(prefill, **options)[0].raw.logits[0][0].float().softmax(-1)


def _sides(fuser: Fuser, receiver: LanguageModel, sharer: LanguageModel):
    return (receiver, fuser.config.receiver), (sharer, fuser.config.sharer)


def _try(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, True, check())
    except C2CError as error:
        return Check(name, False, str(error))
