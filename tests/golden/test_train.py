"""Four recorded training steps of the published trainer, in a plain loop: losses, gradients, weights at the end."""

from __future__ import annotations

import json

import pytest
import torch

from cache2cache.fuser.published import published_names
from cache2cache.fuser.several import Speaker, fused_kv
from cache2cache.models import kv

PAIR = "qwen3+llama"
BORDER = 28
"""Length of the first section, which is fused; the published collator pads inside of it."""
FLOAT32 = 1e-5
GRADIENT = 5e-5
GATE_GRADIENT = 5e-4
"""A gate's gradient is one number, a sum over all positions in which much cancels. What is left depends on the processor."""


@pytest.fixture
def trained(tensors, fuser_of, receiver_of, sharer_of, monkeypatch):
    """The loss of a fuser on rows of the recorded batch."""
    fuser, receiver, sharer = fuser_of(PAIR), receiver_of(PAIR).model, sharer_of(PAIR).model
    fuser.trunk.dropout.p = fuser.weigh_block.dropout.p = fuser.blocks[0].dropout.p = 0.0

    def loss(ids, mask, labels, border, draws=None):
        if draws is not None:
            monkeypatch.setattr(fuser.gate, "sample", lambda noise: type(fuser.gate).sample(fuser.gate, draws))
        positions = kv.position_ids(mask)
        cache = kv.prefill(receiver, ids[:, :border], mask[:, :border])
        theirs = kv.prefill(sharer, ids[:, :border], mask[:, :border])
        at = torch.arange(border).expand(len(ids), -1)
        speaker = Speaker(fuser, kv.gather(theirs, at, fuser.config.layer_map), positions[:, :border], at >= 0)
        kv.scatter(cache, at, at >= 0, fused_kv(kv.gather(cache, at), positions[:, :border], [speaker]))
        logits = receiver(
            ids[:, border:], attention_mask=mask, position_ids=positions[:, border:], past_key_values=cache
        ).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, border + 1 :].flatten())

    return fuser, loss


def test_losses_in_use(tensors, trained, close):
    recorded, (_, loss) = tensors("train/train_step"), trained
    mask = recorded["attention_mask"].long()
    got = loss(recorded["input_ids"], mask, recorded["labels"], BORDER)
    close(got[None], recorded["eval_loss"], FLOAT32)
    for item in ("item0", "item1"):
        ids, labels = recorded[f"{item}.input_ids"], recorded[f"{item}.labels"]
        border = int((labels[0] == -100).sum()) - 1  # the instruction, less its last token
        close(loss(ids, torch.ones_like(ids), labels, border)[None], recorded[f"eval_loss_{item}"], FLOAT32)


def test_four_steps(data, tensors, trained, close):
    recorded, (fuser, loss) = tensors("train/train_step"), trained
    log = json.loads((data / "train/train_step.json").read_text())
    mask = recorded["attention_mask"].long()
    fuser.train()
    optimizer = torch.optim.AdamW(fuser.parameters(), weight_decay=0.01)
    for step in range(4):
        assert fuser.gate.temperature.item() == pytest.approx(log["temperature"][step], rel=1e-7)
        # Recorded layer by layer, key and value in turn; ours draws for all keys and then for all values.
        draws = torch.stack([recorded[f"step{step + 1}.u.{2 * layer + kind}"] for kind in (0, 1) for layer in range(4)])
        value = loss(recorded["input_ids"], mask, recorded["labels"], BORDER, draws)
        assert value.item() == pytest.approx(log["losses"][step], rel=FLOAT32)
        optimizer.zero_grad()
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(fuser.parameters(), 1.0)
        assert norm.item() == pytest.approx(log["grad_norms"][step], rel=GRADIENT)
        if step == 0:  # recorded after clipping
            tolerances = {name: GATE_GRADIENT if "gate" in name else GRADIENT for name, _ in fuser.named_parameters()}
            compare(fuser, recorded, "step1.grad", range(4), lambda p: p.grad, tolerances, close)
        optimizer.param_groups[0]["lr"] = log["lr"][step]
        optimizer.step()
        fuser.gate.anneal(step + 1)
    tolerances = {name: FLOAT32 for name, _ in fuser.named_parameters()}
    compare(fuser, recorded, "after4", (0, 2), lambda p: p.detach(), tolerances, close)


def compare(fuser, recorded, prefix, layers, what, tolerances, close) -> None:
    """Compare stacked parameters, or their gradients, with the recorded ones of each layer."""
    for name, parameter in fuser.named_parameters():
        for kind, published in enumerate(published_names(name)):
            for layer in layers:
                got, want = what(parameter)[kind, layer], recorded[f"{prefix}.{layer}.{published}"]
                close((got.T if name.endswith("weight") else got).reshape(want.shape), want, tolerances[name])
