"""Rows that are fused everywhere teach what as many rows would, each with the response so far in its prompt."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cache2cache import C2C
from cache2cache.errors import ContextLengthError
from cache2cache.fuser.gate import GateConfig
from cache2cache.inputs import Row, SharerRow
from cache2cache.testing import WORDS, random_fuser, tiny_model, tiny_pair, tiny_tokenizer
from cache2cache.train.batch import Collator, Example, Item, TrainRow
from cache2cache.train.config import ObjectivePart, Recipe
from cache2cache.train.contamination import Dropped
from cache2cache.train.rows import train_rows
from cache2cache.train.step import TrainingStep

OPEN = GateConfig(learned=False, initial_logit=1.0)
CHATS = [
    ("what is the color of the question?", "red and the letter B"),
    ("hi", "the answer"),
    ("and 12?", "bonjour, what? oui"),
]


def examples() -> list[Example]:
    return [Example([{"role": "user", "content": asked}], said, asked, "here") for asked, said in CHATS]


def pair_of(fuse_last: int | None, family: str = "llama") -> C2C:
    receiver, sharer = tiny_pair(family)
    return C2C(receiver, [sharer], [random_fuser(receiver, sharer, gate=OPEN, fuse_last=fuse_last)])


def made(pair: C2C, fused="prompt") -> list[TrainRow]:
    rows, dropped = train_rows(examples(), pair, fused=fused)
    assert not dropped
    return rows


def cut(whole: TrainRow, prompt: int, t: int, last: int | None) -> TrainRow:
    """The ordinary row whose prompt is the first `prompt` tokens and t of the response, and which learns the next token."""
    part, size = whole.row.sharers[0], prompt + t
    due = np.full(size, size - 1)
    due[-1] = 0
    if last is not None:
        due[: max(size - 1 - last, 0)] = 0
    row = Row(whole.row.ids[:size], (SharerRow(part.ids, part.alignment[:size], due),))
    return TrainRow(row, whole.response[t : t + 1], "")


def summed(pair: C2C, rows: list[TrainRow], fused: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats of all labels, and the gradient of one of the fuser's weights."""
    step = TrainingStep(pair, ObjectivePart(fused=fused)).train()
    weight = next(p for name, p in step.named_parameters() if name.endswith("leave.weight"))
    weight.grad = None
    loss = step(num_items_in_batch=1, **Collator(pair)([Item(row) for row in rows]))["loss"]
    loss.backward()
    return loss.detach(), weight.grad.clone()


@pytest.mark.parametrize("fuse_last", [3, None])
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2"])
def test_one_pass_is_as_many_rows_as_the_response_has_tokens(fuse_last, family):
    pair = pair_of(fuse_last, family)
    plain, whole = made(pair), made(pair, "everywhere")
    rows = [
        cut(row, len(ordinary.row.ids), t, fuse_last)
        for ordinary, row in zip(plain, whole, strict=True)
        for t in np.flatnonzero(row.response >= 0)
    ]
    assert len(rows) > 2 * len(whole)
    one, gradient = summed(pair, whole, "everywhere")
    many, gradients = summed(pair, rows, "prompt")
    torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-5)
    largest = float(gradients.abs().max())
    assert largest > 1e-4
    torch.testing.assert_close(gradient, gradients, rtol=1e-3, atol=1e-4 * largest)


def test_the_first_token_is_read_as_in_use():
    pair = pair_of(4)
    whole = [
        replace(row, response=np.where(np.arange(len(row.response)) == 0, row.response, -100))
        for row in made(pair, "everywhere")
    ]
    first = [replace(row, response=row.response[:1]) for row in made(pair)]
    torch.testing.assert_close(
        summed(pair, whole, "everywhere")[0], summed(pair, first, "prompt")[0], rtol=1e-5, atol=1e-5
    )


def test_what_is_heard_never_reaches_beyond_what_the_receiver_predicts():
    pair = pair_of(None)
    (sharer,) = pair.sharers
    for ordinary, row in zip(made(pair), made(pair, "everywhere"), strict=True):
        part, prompt = row.row.sharers[0], len(ordinary.row.ids)
        assert (np.diff(part.alignment) >= 0).all()
        for t in np.flatnonzero(row.response >= 0):
            ahead = sharer.tokenizer.decode(
                part.ids[len(ordinary.row.sharers[0].ids) : part.alignment[prompt - 2 + t] + 1]
            )
            written = pair.receiver.tokenizer.decode(ordinary.response[:t])
            assert ahead.strip() == written.strip()


def test_a_validation_reads_its_rows_in_the_same_way():
    pair = pair_of(3)
    rows = made(pair, "everywhere")
    step, batch = TrainingStep(pair, ObjectivePart(fused="everywhere")), Collator(pair)([Item(row) for row in rows])
    with torch.no_grad():
        found = step.eval()(**batch)
    torch.testing.assert_close(found["nats"].sum(), summed(pair, rows, "everywhere")[0], rtol=1e-4, atol=1e-4)
    assert (found["mismatched"] != found["nats"]).all()


def test_a_recipe_says_what_it_cannot_be_combined_with():
    plain = {
        "receiver": "r", "sharer": "s", "fuser": {"alignment": "same-ids"}, "objective": {"fused": "everywhere"},
        "data": {"train": [{"path": "a.jsonl"}], "validation": [{"path": "b.jsonl"}]},
    }  # fmt: skip
    with pytest.raises(ValueError, match="native alignment"):
        Recipe.model_validate(plain)
    with pytest.raises(ValueError, match='need fused = "prompt"'):
        ObjectivePart(fused="everywhere", contrastive=0.5)


LONG = "question answer assistant color system question answer assistant color system"


@pytest.mark.parametrize("limits", [{"max_tokens": 30}, {"max_tokens": 60}, {}])
def test_what_the_sharer_reads_of_a_response_counts(limits):
    """Of four of the receiver's words it reads all letters."""
    receiver = tiny_model("qwen3", tokenizer=tiny_tokenizer(merge=WORDS), name="tiny-receiver")
    sharer = tiny_model("llama", 1, name="tiny-sharer", max_position_embeddings=40)
    pair = C2C(receiver, [sharer], [random_fuser(receiver, sharer, gate=OPEN)])
    example = Example([{"role": "user", "content": "what"}], LONG, "", "a, line 1")
    if limits:
        assert [
            row.reason for row in train_rows([example], pair, response_tokens=4, fused="everywhere", **limits)[1]
        ] == ["too long"]
    else:
        with pytest.raises(
            ContextLengthError, match="a, line 1: .* context of tiny-sharer; got 4[0-9] tokens; allowed: 40"
        ):
            train_rows([example], pair, response_tokens=4, fused="everywhere")
    assert len(train_rows([example], pair, response_tokens=4)[0]) == 1, "of the prompt alone less is read"


def test_a_row_of_which_nothing_can_be_learned_is_named():
    """The receiver begins with a lone space, where the sharer is in the middle of its first word."""
    template = "{{ messages[0]['content'] }}{% if add_generation_prompt %}\nAnswer:{% endif %}"
    receiver = tiny_model("qwen3", name="tiny-receiver")
    sharer = tiny_model("llama", 1, tokenizer=tiny_tokenizer(merge=WORDS), name="tiny-sharer")
    fuser = random_fuser(receiver, sharer, gate=OPEN, receiver_template=template, sharer_template=template)
    example = Example([{"role": "user", "content": "hm"}], "the color", "", "a, line 1")
    pair = C2C(receiver, [sharer], [fuser])
    assert train_rows([example], pair, response_tokens=1, fused="everywhere") == (
        [],
        [Dropped("a, line 1", "no token to learn")],
    )
    assert len(train_rows([example], pair, response_tokens=2, fused="everywhere")[0]) == 1
