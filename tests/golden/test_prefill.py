"""Fused caches of every layer, logits and greedy tokens against the recorded ones, through the whole request path."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from cache2cache import C2C
from cache2cache.from_ids import from_ids
from cache2cache.models import kv
from cache2cache.types import Span

FLOAT32 = 1e-5
BF16_ROUNDING = 2**-7
"""One rounding of a number near the largest of its tensor."""
TO_8, TO_11 = [Span(0, 8)], [Span(0, 11)]
CASES = {
    # recorded file → spans, first position of the recorded logits
    "qwen3+llama": (None, 11),
    "qwen3+llama.parallel": (None, 11),
    "qwen3+qwen2": (None, 11),
    "qwen3+qwen2.parallel": (None, 11),
    "qwen3+llama.batch2": (None, 11),
    "qwen3+llama.two_inputs": (None, 11),
    "qwen3+llama.last_section_marked_1": (TO_11, 11),
    "qwen3+llama.mask0": ([Span(0, 11, fuse=False)], 11),
    "qwen3+llama.short_last4": (TO_8, 8),
    "qwen3+llama.segments": ([Span(0, 3, fuse=False), Span(3, 8)], 8),
    "qwen3+llama.segments2": ([Span(0, 4), Span(4, 7, fuse=False), Span(7, 11)], 11),
}


@pytest.fixture
def pair_of(fuser_of, receiver_of, sharer_of):
    """The loaded pair of a recording."""
    return lambda pair: C2C(receiver_of(pair), [sharer_of(pair)], [fuser_of(pair)])


def layers(recorded: dict[str, torch.Tensor], prefix: str) -> torch.Tensor:
    """(2, L, B, H, N, D)"""
    count = sum(name.startswith(f"{prefix}k.") for name in recorded)
    return torch.stack([torch.stack([recorded[f"{prefix}{x}.{i}"] for i in range(count)]) for x in "kv"])


def read_on(pair: C2C, prefill, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits from a position on, and the cache of the whole prompt."""
    cache = kv.clone(prefill.cache)
    kv.truncate(cache, start)
    logits = pair.receiver.model(
        prefill.ids[:, start:],
        attention_mask=prefill.mask,
        position_ids=kv.position_ids(prefill.mask)[:, start:],
        past_key_values=cache,
    ).logits
    return logits.detach(), kv.stack(cache)


@pytest.mark.parametrize("case", CASES)
def test_one_sharer(case, tensors, pair_of, close):
    recorded, pair = tensors(f"prefill/{case}"), pair_of(case.split(".")[0])
    spans, start = CASES[case]
    ids = recorded["input_ids"]
    prefill = pair.prefill(receiver_ids=ids, sharer_ids=recorded.get("sharer_input_ids"), spans=spans)
    logits, cache = read_on(pair, prefill, start)
    close(logits, recorded["logits"], FLOAT32)
    for got, want in zip(cache.flatten(0, 1), layers(recorded, "fused.").flatten(0, 1), strict=True):
        close(got, want, FLOAT32)
    if "generated" in recorded:
        answer(pair, prefill, recorded, "", close)


def answer(pair: C2C, prefill, recorded, prefix: str, close) -> None:
    """Greedy tokens must be the recorded ones, and the logits of each step."""
    want = recorded[f"{prefix}generated"][:, prefill.ids.shape[1] :]
    steps = {"return_dict_in_generate": True, "output_logits": True}
    answers = pair.decode(prefill, max_new_tokens=want.shape[1], do_sample=False, **steps)
    assert [a.ids for a in answers] == want.tolist()
    if f"{prefix}step_logits" in recorded:
        close(torch.stack(answers[0].raw.logits, dim=1), recorded[f"{prefix}step_logits"], FLOAT32)


def test_end_of_sequence(data, tensors, pair_of):
    """The published code writes padding in place of the end; ours keeps it, as transformers does, and stops there."""
    case = json.loads((data / "prefill/log.json").read_text())["eos"]
    pair = pair_of("qwen3+llama")
    prefill = pair.prefill(receiver_ids=tensors("prefill/qwen3+llama")["input_ids"])
    (got,) = pair.decode(prefill, max_new_tokens=16, do_sample=False, eos_token_id=case["eos_id"])
    assert [*got.ids[:-1], 0] == case["with_pad0"]
    assert got.ids[-1] == case["eos_id"]


@pytest.mark.parametrize("pair", ["qwen3+llama", "qwen3+qwen2", "qwen3+llama_bf16"])
def test_models_alone(pair, tensors, receiver_of, sharer_of, close):
    """The two prefills themselves, recorded with transformers 4.52.4."""
    recorded = tensors(f"prefill/{pair}")
    ids = recorded["input_ids"]
    for lm, name in ((receiver_of(pair), "receiver_alone"), (sharer_of(pair), "sharer_alone")):
        got = kv.stack(kv.prefill(lm.model, ids, torch.ones_like(ids)))
        tolerance = BF16_ROUNDING if pair == "qwen3+llama_bf16" else FLOAT32
        for a, b in zip(got.flatten(0, 1), layers(recorded, f"{name}.").flatten(0, 1), strict=True):
            close(a, b, tolerance)


@pytest.mark.parametrize("case", ["qwen3+llama_bf16", "qwen3+llama_bf16.parallel"])
def test_bf16(case, tensors, pair_of, close):
    recorded, pair = tensors(f"prefill/{case}"), pair_of("qwen3+llama_bf16")
    prefill = pair.prefill(receiver_ids=recorded["input_ids"])
    logits, cache = read_on(pair, prefill, 11)
    close(logits, recorded["logits"], BF16_ROUNDING)
    for got, want in zip(cache.flatten(0, 1), layers(recorded, "fused.").flatten(0, 1), strict=True):
        close(got, want, BF16_ROUNDING)
    if "generated" in recorded:
        (got,) = pair.decode(prefill, max_new_tokens=16, do_sample=False)
        assert got.ids == recorded["generated"][0, 12:].tolist()


@pytest.mark.parametrize("spoken", ["mask1", "mask2", "mask3", "mixed_1x5_2x3_3x3"])
def test_two_sharers(spoken, tensors, receiver_of, sharer_of, fuser_of, close):
    recorded, pairs = tensors("prefill/multi.parallel"), ("qwen3+llama", "qwen3+qwen2")
    c2c = C2C(receiver_of(pairs[0]), [sharer_of(pair) for pair in pairs], [fuser_of(pair) for pair in pairs])
    ids = recorded["input_ids"]
    # When each position is fused with each sharer, counted in positions read: bit 1 of the mask is sharer 1, …
    runs = {"mask1": [(1, 11)], "mask2": [(2, 11)], "mask3": [(3, 11)]}.get(spoken, [(1, 5), (2, 8), (3, 11)])
    due = torch.zeros(2, 12, dtype=torch.long)
    begin = 0
    for mask, end in runs:
        for sharer in (0, 1):
            if mask >> sharer & 1:
                due[sharer, begin:end] = end
        begin = end
    prepared = from_ids(ids, [ids, ids], c2c.receiver, c2c.sharers, c2c.fusers)
    parts = [replace(part, due=due[i : i + 1]) for i, part in enumerate(prepared.sharers)]
    prefill = c2c.read(replace(prepared, sharers=tuple(parts)))
    logits, cache = read_on(c2c, prefill, 11)
    close(logits, recorded[f"{spoken}.logits"], FLOAT32)
    for got, want in zip(cache.flatten(0, 1), layers(recorded, f"{spoken}.fused.").flatten(0, 1), strict=True):
        close(got, want, FLOAT32)
    answer(c2c, prefill, recorded, f"{spoken}.", close)


def test_left_padded_batch(tensors, pair_of, close):
    """The published code decodes padded batches wrongly; the recorded answers are those of each row alone."""
    recorded, pair = tensors("prefill/padding_inputs"), pair_of("qwen3+llama")
    mask = recorded["left_mask"]
    prefill = pair.prefill(receiver_ids=recorded["left"], receiver_mask=mask, sharer_masks=[mask])
    logits, cache = read_on(pair, prefill, 11)
    for row, name in enumerate(("long", "short")):
        close(logits[row, -1], recorded[f"alone.{name}.logits"], FLOAT32)
        want = layers(recorded, f"alone.{name}.fused.")[:, :, 0]
        got = cache[:, :, row, :, -want.shape[-2] :]
        for a, b in zip(got.flatten(0, 1), want.flatten(0, 1), strict=True):
            close(a, b, FLOAT32)
    answers = pair.decode(prefill, max_new_tokens=8, do_sample=False)
    assert [a.ids for a in answers] == [recorded[f"alone.{name}.generated"].tolist() for name in ("long", "short")]
