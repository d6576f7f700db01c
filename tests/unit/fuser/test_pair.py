"""Which models a fuser accepts."""

import copy

import pytest

from cache2cache.errors import FuserMismatchError
from cache2cache.models.load import fingerprint
from cache2cache.types import ModelCard, Rope


def with_ropes(card: ModelCard, *ropes: Rope, of_layer: tuple[int, ...] | None = None) -> ModelCard:
    changed = {"ropes": ropes, "rope_of_layer": of_layer or card.geometry.rope_of_layer}
    return card.model_copy(update={"geometry": card.geometry.model_copy(update=changed)})


def test_its_own(fuser, receiver, sharer):
    fuser.check_pair(receiver.card, sharer.card)


def test_the_name_does_not_matter(fuser, receiver, sharer):
    fuser.check_pair(receiver.card.model_copy(update={"id": "elsewhere/same-model"}), sharer.card)


@pytest.mark.parametrize("field", ["layers", "kv_heads", "head_dim", "vocab_size"])
def test_another_size(field, fuser, receiver, sharer):
    size = sharer.card.geometry
    other = sharer.card.model_copy(update={"geometry": size.model_copy(update={field: getattr(size, field) + 1})})
    with pytest.raises(FuserMismatchError, match=f"sharer: {field} {getattr(size, field) + 1} instead of"):
        fuser.check_pair(receiver.card, other)


def test_another_tokenizer(fuser, receiver, sharer):
    with pytest.raises(FuserMismatchError, match="receiver: another tokenizer"):
        fuser.check_pair(receiver.card.model_copy(update={"tokenizer": "0123"}), sharer.card)


def test_a_tokenizer_whose_padding_was_changed(fuser, receiver, sharer):
    padded = copy.deepcopy(receiver.tokenizer)
    padded.pad_token = padded.eos_token
    card = receiver.card.model_copy(update={"tokenizer": fingerprint(padded)})
    with pytest.raises(FuserMismatchError, match=r"receiver: another tokenizer.*pad_token"):
        fuser.check_pair(card, sharer.card)
    with pytest.raises(FuserMismatchError) as caught:
        fuser.check_pair(card, sharer.card.model_copy(update={"geometry": receiver.card.geometry}))
    assert "pad_token" not in str(caught.value)


def test_other_rotation(fuser, receiver, sharer):
    (rope,) = receiver.card.geometry.ropes
    for changed in (
        rope.model_copy(update={"scaling": 1.2}),
        rope.model_copy(update={"inv_freq": rope.inv_freq[:-1]}),
        rope.model_copy(update={"inv_freq": tuple(2 * f for f in rope.inv_freq)}),
    ):
        with pytest.raises(FuserMismatchError, match="receiver: other rotary parameters"):
            fuser.check_pair(with_ropes(receiver.card, changed), sharer.card)
    with pytest.raises(FuserMismatchError, match="receiver: other rotary parameters"):
        fuser.check_pair(with_ropes(receiver.card, rope, rope, of_layer=(0, 1)), sharer.card)


def test_a_rotation_that_no_layer_uses_does_not_matter(fuser, receiver, sharer):
    (rope,) = receiver.card.geometry.ropes
    fuser.check_pair(with_ropes(receiver.card, rope, Rope(inv_freq=(1.0,))), sharer.card)
