"""A training step computes what the request path does, from stored caches and from none, and its loss is the objective."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cache2cache import C2C
from cache2cache.errors import DataError
from cache2cache.fuser.gate import GateConfig
from cache2cache.fuser.statistics import FeatureStatistics
from cache2cache.models import kv
from cache2cache.testing import WORDS, random_fuser, tiny_model, tiny_pair, tiny_tokenizer
from cache2cache.train import objective
from cache2cache.train.batch import Collator, Item, Teacher, TrainRow, as_inputs
from cache2cache.train.config import ObjectivePart
from cache2cache.train.dropout import SharerDropout
from cache2cache.train.step import TrainingStep

CHATS = [
    (["what is the color of the question?"], "red"),
    (["hi", "the answer", "and 12?"], "the letter B"),
    (["a" * 40], ""),
    (["bonjour, what?", "oui", "the answer"], "ok"),
]
"""Prompts of one and several messages and other lengths, responses of other lengths; the third is empty."""

OPEN = GateConfig(learned=False, initial_logit=1.0)
"""Gates that draw no noise, so that training and validation compute the same."""


def rows(pair: C2C, chats=CHATS) -> list[TrainRow]:
    found = []
    for turns, response in chats:
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
        ids = pair.receiver.tokenizer(response, add_special_tokens=False)["input_ids"]
        (row,) = pair.rows([messages])
        found.append(TrainRow(row, np.array([*ids, pair.receiver.tokenizer.eos_token_id]), response))
    return found


def stored(pair: C2C, row: TrainRow) -> Item:
    """With both caches, each computed alone, as a feature store holds them."""
    own = kv.prefill(pair.receiver.model, *whole(row.row.ids[: row.first_stop]))
    theirs = kv.prefill(pair.sharers[0].model, *whole(row.row.sharers[0].ids))
    layers = sorted(set(pair.fusers[0].config.layer_map))
    at = torch.as_tensor(row.heard_at)[None]
    return Item(row, kv.stack(own)[:, :, 0], kv.gather(theirs, at, layers)[:, :, 0])


def whole(ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    found = torch.as_tensor(ids)[None]
    return found, torch.ones_like(found)


def mean_of(pair: C2C) -> FeatureStatistics:
    (fuser,), (sharer,) = pair.fusers, pair.sharers
    geometry = sharer.card.geometry.only(sorted(set(fuser.config.layer_map)))
    shape = (2, geometry.layers, geometry.kv_heads, 9, geometry.head_dim)
    return FeatureStatistics.of(
        geometry, [torch.randn(shape, generator=torch.Generator().manual_seed(0))], [torch.arange(9)]
    )


def request_path_nats(pair: C2C, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B,) nats of the responses behind `C2C.read`, by a plain forward pass."""
    prefill = pair.read(as_inputs(batch))
    tail = torch.cat([batch["ids"][:, -1:], batch["response"][:, :-1]], dim=1)
    mask = torch.cat([batch["mask"], torch.ones_like(tail[:, 1:])], dim=1)
    with torch.no_grad():
        logits = pair.receiver.model(
            input_ids=tail,
            attention_mask=mask,
            position_ids=kv.position_ids(mask)[:, -tail.shape[1] :],
            past_key_values=prefill.cache,
        ).logits
    nats = torch.nn.functional.cross_entropy(logits.mT, batch["labels"], ignore_index=-100, reduction="none")
    return nats.sum(1)


def pair_of(alignment: str = "native", receiver: str = "qwen3", kind: str = "compact", **config) -> C2C:
    own, sharer = tiny_pair(receiver)
    if alignment == "same-ids":
        sharer = tiny_model("llama", 1, tokenizer=tiny_tokenizer(), name="tiny-sharer")
    return C2C(own, [sharer], [random_fuser(own, sharer, kind, alignment=alignment, gate=OPEN, **config)])


def validated(step: TrainingStep, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return step.eval()(**batch)


@pytest.fixture
def pair() -> C2C:
    return pair_of()


# --- the same numbers as in use -------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", ["native", "same-ids", "retokenise-first", "retokenise-longest"])
@pytest.mark.parametrize("receiver", ["qwen3", "gemma3"])
@pytest.mark.parametrize(("kind", "fuse_last"), [("compact", None), ("paper", 30)])
def test_logits_are_the_request_paths_bit_for_bit(alignment, receiver, kind, fuse_last, monkeypatch):
    """Of a batch in which prompts of several messages and lengths are padded."""
    pair = pair_of(alignment, receiver, kind, fuse_last=fuse_last)
    batch = Collator(pair)([Item(row) for row in rows(pair)])
    assert batch["due"].any()
    heard_logits = []
    monkeypatch.setattr(objective, "nats", lambda logits, labels: heard_logits.append(logits) or logits[:, 0])
    validated(TrainingStep(pair, ObjectivePart()), batch)
    prefill = pair.read(as_inputs(batch))
    tail = torch.cat([batch["ids"][:, -1:], batch["response"][:, :-1]], dim=1)
    mask = torch.cat([batch["mask"], torch.ones_like(tail[:, 1:])], dim=1)
    with torch.no_grad():
        expected = pair.receiver.model(
            input_ids=tail,
            attention_mask=mask,
            position_ids=kv.position_ids(mask)[:, -tail.shape[1] :],
            past_key_values=prefill.cache,
        ).logits
    assert torch.equal(heard_logits[0], expected[batch["labels"] != -100])


@pytest.mark.parametrize("alignment", ["native", "same-ids", "retokenise-first", "retokenise-longest"])
def test_stored_caches_and_other_batch_mates_give_the_same_nats(alignment):
    pair = pair_of(alignment)
    step, collate, all_rows = TrainingStep(pair, ObjectivePart()), Collator(pair), rows(pair)
    live = validated(step, collate([Item(row) for row in all_rows]))["nats"]
    torch.testing.assert_close(
        validated(step, collate([stored(pair, row) for row in all_rows]))["nats"], live, rtol=1e-4, atol=1e-4
    )
    for b, row in enumerate(all_rows):
        alone = validated(step, collate([stored(pair, row)]))["nats"]
        torch.testing.assert_close(alone[0], live[b], rtol=1e-4, atol=1e-4)


def test_layers_that_are_mapped_twice_or_out_of_order_find_their_place():
    pair = pair_of(receiver="qwen2", layer_map=(2, 0, 2, 1))
    batch = Collator(pair)([stored(pair, row) for row in rows(pair)])
    assert batch["theirs"].shape[1] == 3
    got = validated(TrainingStep(pair, ObjectivePart()), batch)["nats"]
    torch.testing.assert_close(got, request_path_nats(pair, batch), rtol=1e-4, atol=1e-4)


def test_closed_gates_leave_the_receiver_alone():
    own, sharer = tiny_pair()
    pair = C2C(own, [sharer], [random_fuser(own, sharer, open_gates=False)])
    batch = Collator(pair)([Item(row) for row in rows(pair)])
    alone = {**batch, "due": torch.zeros_like(batch["due"])}
    got = validated(TrainingStep(pair, ObjectivePart()), batch)
    torch.testing.assert_close(got["nats"], request_path_nats(pair, alone))


# --- what validation says --------------------------------------------------------------------------------------------


def test_validation_counts_each_row(pair):
    batch = Collator(pair)([Item(row) for row in rows(pair)])
    got = validated(TrainingStep(pair, ObjectivePart(response=0.3, contrastive=1.0)), batch)
    assert got["tokens"].tolist() == [len(row.response) for row in rows(pair)]
    torch.testing.assert_close(got["loss"], got["nats"].sum() / got["tokens"].sum())
    torch.testing.assert_close(got["nats"], request_path_nats(pair, batch), rtol=1e-5, atol=1e-5)
    assert got["first"].dtype == torch.bool and got["zeroed"].isnan().all()


def test_first_says_whether_the_first_token_is_the_likeliest(pair):
    likeliest = []
    for row in rows(pair):
        batch = Collator(pair)([Item(row)])
        prefill = pair.read(as_inputs(batch))
        with torch.no_grad():
            likeliest.append(pair.receiver.model(batch["ids"][:, -1:], past_key_values=prefill.cache).logits.argmax(-1))
    right = [
        replace(row, response=np.array([int(token), *row.response[1:]]) if b % 2 else row.response)
        for b, (row, token) in enumerate(zip(rows(pair), likeliest, strict=True))
    ]
    got = validated(TrainingStep(pair, ObjectivePart()), Collator(pair)([Item(row) for row in right]))
    assert got["first"].tolist() == [False, True, False, True]


def test_mismatched_is_the_next_row_aligned_from_the_right(pair):
    """Rows of one template and of prompts that are equally long, where it is the same as exchanging what the sharer reads."""
    chats = [(["the color 12"], "x"), (["what system"], "the answer"), (["letter user"], "hello")]
    all_rows = rows(pair, chats)
    assert len({len(row.row.ids) for row in all_rows}) < 3
    got = validated(TrainingStep(pair, ObjectivePart()), Collator(pair)([Item(row) for row in all_rows]))
    width = min(len(row.row.ids) for row in all_rows)
    for b, row in enumerate(all_rows):
        other = all_rows[(b + 1) % 3].row
        mine, theirs = row.row.sharers[0], other.sharers[0]
        size = min(len(row.row.ids), len(other.ids))
        alignment, due = np.zeros_like(mine.alignment), np.zeros_like(mine.due)
        alignment[-size:], due[-size:] = theirs.alignment[-size:], mine.due[-size:]
        crossed = replace(row.row, sharers=(replace(theirs, alignment=alignment, due=due),))
        expected = validated(TrainingStep(pair, ObjectivePart()), Collator(pair)([Item(replace(row, row=crossed))]))
        torch.testing.assert_close(got["mismatched"][b], expected["nats"][0], rtol=1e-4, atol=1e-4)
        assert not torch.isclose(got["mismatched"][b], got["nats"][b])
    assert width > 5


def test_a_row_alone_has_no_partner(pair):
    got = validated(TrainingStep(pair, ObjectivePart()), Collator(pair)([Item(rows(pair)[0])]))
    assert got["mismatched"].isnan().all() and got["nats"].isfinite().all()


def test_rows_with_the_same_prompt_do_not_mind_each_others_caches(pair):
    same = rows(pair, [CHATS[0], (CHATS[0][0], "blue")])
    got = validated(TrainingStep(pair, ObjectivePart()), Collator(pair)([Item(row) for row in same]))
    torch.testing.assert_close(got["mismatched"], got["nats"])


def test_zeroed_is_the_mean_at_every_position(pair):
    mean = mean_of(pair)
    batch = Collator(pair)([Item(row) for row in rows(pair)])
    zeroed = validated(TrainingStep(pair, ObjectivePart(), mean=mean), batch)["zeroed"]
    whole_mean = TrainingStep(pair, ObjectivePart(), mean=mean, dropout=SharerDropout(1.0, mean))
    got = validated(whole_mean, batch)
    assert torch.equal(got["nats"], zeroed) and torch.equal(got["zeroed"], zeroed)
    assert not torch.isclose(validated(TrainingStep(pair, ObjectivePart()), batch)["nats"], zeroed).any()


# --- the loss ---------------------------------------------------------------------------------------------------------


def taught(pair: C2C, size: int) -> Teacher:
    torch.manual_seed(size)
    ids = torch.stack([torch.randperm(pair.receiver.card.geometry.vocab_size)[:5] for _ in range(size)])
    logprobs = torch.randn(size, 5).log_softmax(1)
    logprobs[0] = -torch.inf
    return Teacher(ids, logprobs)


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"response": 0.5},
        {"response": 0.0, "distill": 2.0},
        {"contrastive": 0.7, "margin": 30.0},
        {"response": 0.2, "distill": 0.3, "contrastive": 0.4},
    ],
)
def test_the_loss_is_the_weighted_sum_of_its_terms(pair, parts):
    part = ObjectivePart(**parts)
    batch = Collator(pair)([replace(stored(pair, row), teacher=taught(pair, len(row.response))) for row in rows(pair)])
    step = TrainingStep(pair, part)
    said = validated(step, batch)
    labelled = batch["labels"] != -100
    logits = step._logits(batch, step._own(batch), step._heard(batch))
    kl = objective.divergence(logits, batch["teacher_ids"][labelled], batch["teacher_logprobs"][labelled]).sum()
    hinge = objective.hinge(said["nats"], said["mismatched"], said["tokens"], part.margin).sum()
    total = part.response * said["nats"].sum() + part.distill * kl + part.contrastive * hinge
    got = step.train()(**batch)
    assert set(got) == {"loss"}
    torch.testing.assert_close(got["loss"], total / labelled.sum(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(step(num_items_in_batch=7, **batch)["loss"], total / 7, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alignment", ["native", "retokenise-longest"])
@pytest.mark.parametrize("ahead", [False, True])
def test_rows_that_learn_the_receiver_lose_what_they_depart_from_it(alignment, ahead):
    """Against plain forward passes, in a batch with a row that does not and learns its response."""
    pair, learned = pair_of(alignment), 1
    all_rows = [replace(row, alone=i != learned) for i, row in enumerate(rows(pair))]
    batch = Collator(pair)([stored(pair, row) if ahead else Item(row) for row in all_rows])
    total = torch.tensor(0.0)
    for row in all_rows:
        single = Collator(pair)([Item(row)])
        if not row.alone:
            total += 0.7 * request_path_nats(pair, single)[0]
            continue
        ids = torch.cat([single["ids"], single["response"][:, :-1]], dim=1)
        fused = pair.read(as_inputs(single)).cache
        with torch.no_grad():
            size = len(row.response)
            alone = pair.receiver.model(input_ids=ids).logits[0, -size:].log_softmax(1)
            heard = pair.receiver.model(input_ids=ids[:, -size:], past_key_values=fused).logits[0].log_softmax(1)
        total += 3.0 * (alone.exp() * (alone - heard)).sum()
    got = TrainingStep(pair, ObjectivePart(response=0.7, receiver=3.0)).train()(**batch)["loss"]
    assert total > 1
    torch.testing.assert_close(got, total / (batch["labels"] != -100).sum(), rtol=1e-4, atol=1e-4)


def test_to_learn_the_receiver_is_to_fall_silent(pair):
    """Where the gates are closed there is nothing to lose; where they are open, only the fuser gets gradients."""
    alone = [Item(replace(row, alone=True)) for row in rows(pair)]
    found = gradients(TrainingStep(pair, ObjectivePart()), [Collator(pair)(alone)])
    assert any(gradient.abs().max() > 0 for gradient in found.values())
    assert all(p.grad is None for p in pair.receiver.model.parameters())
    closed = pair_of()
    with torch.no_grad():
        closed.fusers[0].gate.logit.fill_(-1.0)
    loss = TrainingStep(closed, ObjectivePart()).train()(**Collator(closed)(alone))["loss"]
    assert abs(float(loss)) < 1e-6


def gradients(step: TrainingStep, batches, count: int | None = None) -> dict[str, torch.Tensor]:
    step.fuser.zero_grad()
    for batch in batches:
        step.train()(num_items_in_batch=count, **batch)["loss"].backward()
    return {name: p.grad.clone() for name, p in step.fuser.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_parts_of_a_batch_add_up_to_the_whole(pair):
    step, collate = TrainingStep(pair, ObjectivePart()), Collator(pair)
    items = [stored(pair, row) for row in rows(pair)]
    count = sum(len(item.row.response) for item in items)
    parts = gradients(step, [collate(items[:1]), collate(items[1:])], count)
    assert_same(parts, gradients(step, [collate(items)]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("alignment", ["native", "retokenise-longest"])
def test_gradients_reach_what_was_fused_long_before_the_response(alignment):
    """Numerically: the loss changes along a direction as the gradient says."""
    pair = pair_of(alignment)
    batch = Collator(pair)([Item(row) for row in rows(pair)])
    step = TrainingStep(pair, ObjectivePart())
    found = gradients(step, [batch])
    weight = step.fuser.leave.weight
    direction = found["leave.weight"] / found["leave.weight"].norm()
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            weight += sign * 1e-3 * direction
            losses.append(float(step(**batch)["loss"]))
            weight -= sign * 1e-3 * direction
    slope = (losses[0] - losses[1]) / 2e-3
    assert slope == pytest.approx(float(found["leave.weight"].norm()), rel=0.05)


def test_only_the_fuser_is_trained_and_saved(pair):
    step = TrainingStep(pair, ObjectivePart(), mean=mean_of(pair))
    assert {name.partition(".")[0] for name in step.state_dict()} == {"fuser"}
    before = [p.clone() for lm in (pair.receiver, *pair.sharers) for p in lm.model.parameters()]
    gradients(step, [Collator(pair)([Item(row) for row in rows(pair)])])
    after = [p for lm in (pair.receiver, *pair.sharers) for p in lm.model.parameters()]
    assert all(p.grad is None for p in after)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("alignment", ["native", "retokenise-first"])
def test_gradient_checkpointing_changes_no_gradient(alignment):
    pair = pair_of(alignment)
    batch = Collator(pair)([Item(row) for row in rows(pair)])
    plain = gradients(TrainingStep(pair, ObjectivePart(contrastive=1.0)), [batch])
    again = gradients(TrainingStep(pair, ObjectivePart(contrastive=1.0), checkpointing=True), [batch])
    assert_same(plain, again, rtol=1e-3, atol=1e-4)


def test_bfloat16_is_for_the_fusers_products_in_training_only(pair):
    batch = Collator(pair)([Item(row) for row in rows(pair)])
    exact, rounded = TrainingStep(pair, ObjectivePart()), TrainingStep(pair, ObjectivePart(), precision="bfloat16")
    assert torch.equal(validated(exact, batch)["nats"], validated(rounded, batch)["nats"])
    losses = [step.train()(**batch)["loss"].item() for step in (exact, rounded)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)
    assert all(gradient.dtype == torch.float32 for gradient in gradients(rounded, [batch]).values())


def test_dropped_rows_hear_the_mean_in_training(pair):
    mean = mean_of(pair)
    batch = Collator(pair)([Item(row) for row in rows(pair)])
    dropped = TrainingStep(pair, ObjectivePart(), dropout=SharerDropout(0.999, mean))
    zeroed = validated(TrainingStep(pair, ObjectivePart(), mean=mean), batch)
    torch.manual_seed(0)
    torch.testing.assert_close(dropped.train()(**batch)["loss"], zeroed["zeroed"].sum() / zeroed["tokens"].sum())
    assert torch.equal(validated(dropped, batch)["nats"], zeroed["nats"]), "validation hears the sharer"


def test_a_batch_in_which_nothing_is_fused_is_refused(pair):
    batch = Collator(pair)([Item(row) for row in rows(pair)])
    step = TrainingStep(pair, ObjectivePart())
    with pytest.raises(DataError, match="no position of a batch is fused"):
        step.train()(**{**batch, "due": torch.zeros_like(batch["due"])})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_compiled_fuser_computes_the_same():
    own, sharer = tiny_pair()
    pair = C2C(own, [sharer], [random_fuser(own, sharer, gate=OPEN)])
    batches = [Collator(pair)([Item(row) for row in rows(pair)])]
    plain = gradients(TrainingStep(pair, ObjectivePart()), batches)
    step = TrainingStep(pair, ObjectivePart())
    step.compile_fuser()
    assert_same(plain, gradients(step, batches), rtol=1e-3, atol=1e-4)
    assert set(step.state_dict()) == set(TrainingStep(pair, ObjectivePart()).state_dict())


def test_words_are_merged_on_one_side_only():
    """What makes the tests above say something: the sides tokenise differently."""
    assert WORDS and len(tiny_tokenizer(merge=WORDS)(" answer")["input_ids"]) == 1
    assert len(tiny_tokenizer()(" answer")["input_ids"]) > 1
