"""An answer that is streamed is the answer, whatever its tokenizer makes of spaces, bytes and special tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from cache2cache import C2C
from cache2cache.errors import GenerationError
from cache2cache.testing import tiny_model
from cache2cache.types import Message

CONVERSATION: list[Message] = [{"role": "user", "content": "hi"}]


class Dictated(LogitsProcessor):
    """Lets a model write these tokens."""

    def __init__(self, ids: list[int]):
        self._left = iter(ids)

    def __call__(self, input_ids, scores):  # type: ignore[override]
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([next(self._left)]), 0.0)


@pytest.fixture(scope="module")
def alone(spaced_tokenizer) -> C2C:
    return C2C(tiny_model("llama", tokenizer=spaced_tokenizer))


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("▁aa <0x0A> ▁ ▁ ▁aa ▁bb <0x0A> ▁ ▁ ▁bb", "aa\n   aa bb\n   bb"),
        ("▁aa <0xF0> <0x9F> <0x9A> <0x80> ▁bb", "aa🚀 bb"),
        ("<s> ▁aa <s> ▁bb </s>", "aa bb"),
        ("▁aa <0xF0> <0x9F>", "aa\ufffd\ufffd"),
    ],
)
def test_all_pieces_are_the_answer(alone: C2C, written: str, text: str):
    ids: list[int] = alone.receiver.tokenizer.convert_tokens_to_ids(written.split())  # type: ignore[assignment]

    def options():
        dictated = LogitsProcessorList([Dictated(ids)])
        return {
            "do_sample": False, "max_new_tokens": len(ids), "logits_processor": dictated, "stopping_criteria": None,
        }  # fmt: skip

    assert alone.generate(CONVERSATION, **options()).text == text  # type: ignore[union-attr]
    assert "".join(alone.stream(CONVERSATION, **options())) == text


def test_several_answers_cannot_be_streamed(alone: C2C):
    with pytest.raises(GenerationError, match="only one answer can be streamed; got 2"):
        list(alone.stream(CONVERSATION, do_sample=True, num_return_sequences=2, max_new_tokens=3))
