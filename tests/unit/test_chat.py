from __future__ import annotations

import pytest
import torch

from cache2cache.models import kv
from cache2cache.pipeline import C2C


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_earlier_turns_stay_fused_as_they_were(receiver, sharer, fuser, mode):
    chat = C2C(receiver, [sharer], [fuser], mode).chat()
    chat.send("hello", do_sample=False, max_new_tokens=4)
    first = chat._last
    size, before = first.ids.shape[1] - 1, kv.columns(first.cache, 0)
    chat.send("and now?", do_sample=False, max_new_tokens=4)
    after = kv.columns(chat._last.cache, 0)
    assert after.shape[4] > before.shape[4]
    torch.testing.assert_close(after[..., :size, :], before[..., :size, :], rtol=0, atol=0)


def test_new_turns_are_fused(receiver, sharer, fuser):
    chat = C2C(receiver, [sharer], [fuser]).chat()
    first = chat.send("hello", do_sample=False, max_new_tokens=1)
    chat.send("and now?", do_sample=False, max_new_tokens=1)
    ids = chat._last.ids
    alone = kv.prefill(receiver.model, ids, torch.ones_like(ids))
    new = slice(first.counts.receiver_prompt + 1, ids.shape[1] - 1)
    fused, unfused = (kv.columns(cache, 0)[1, -1, 0, 0, new] for cache in (chat._last.cache, alone))  # (P, D)
    assert len(fused) > 0
    assert ((fused - unfused).abs().max(-1).values > 0.01).all()
