"""On an accelerator the tiny pair says what it says on the CPU, also with the sharer on another device."""

import copy

import pytest
import torch

from cache2cache import C2C
from cache2cache.models.load import LanguageModel
from cache2cache.testing import random_fuser, tiny_pair

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def on(lm: LanguageModel, device: str) -> LanguageModel:
    return LanguageModel(copy.deepcopy(lm.model).to(device), lm.tokenizer, lm.card)


@pytest.mark.parametrize(("receiver_device", "sharer_device"), [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
def test_devices_do_not_change_the_answer(receiver_device, sharer_device):
    receiver, sharer = tiny_pair()
    conversations = [[{"role": "user", "content": text}] for text in ("hi", "what is a cache?", "hello world")]
    options = {"do_sample": False, "max_new_tokens": 10}
    expected = [
        a.ids for a in C2C(receiver, [sharer], [random_fuser(receiver, sharer)]).generate(conversations, **options)
    ]
    moved = C2C(on(receiver, receiver_device), [on(sharer, sharer_device)], [random_fuser(receiver, sharer)])
    assert [a.ids for a in moved.generate(conversations, **options)] == expected
