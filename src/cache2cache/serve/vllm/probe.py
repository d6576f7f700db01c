"""Whether vLLM computes with a receiver's cache what transformers does: asked once, before anybody else asks."""

# pyright: reportMissingImports=false
# vLLM is not installed where types are checked.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cache2cache.errors import ModelError
from cache2cache.models import kv
from cache2cache.models.load import LanguageModel
from cache2cache.serve.payload import ids_digest
from cache2cache.serve.vllm.loading import CACHE_FIELD
from cache2cache.serve.vllm.store import Store, salt

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

_TEXT = "Caches speak: two and two make four, and what was read in one place is gone on with in another one."
_TOP = 5
_TOLERANCE = {torch.float32: 0.02, torch.bfloat16: 0.5, torch.float16: 0.1}
"""Of a log-probability. What is laid out or rotated in another way is wrong by much more."""


async def check(llm: AsyncLLM, lm: LanguageModel, store: Store) -> None:
    """Let vLLM go on behind a cache that transformers has computed, and compare the likeliest next tokens.

    Raises:
        ModelError: they differ.
    """
    from vllm import SamplingParams
    from vllm.inputs import tokens_input

    ids = lm.tokenizer(_TEXT, return_tensors="pt", add_special_tokens=False)["input_ids"].to(lm.device)  # (1, N)
    with torch.no_grad():
        expected = lm.model(ids).logits[0, -1].float().log_softmax(-1)
    name = store.put(kv.prefill(lm.model, ids[:, :-1], torch.ones_like(ids[:, :-1])), 0, 0, ids_digest(ids[0].cpu()))
    params = SamplingParams(
        max_tokens=1, temperature=0, logprobs=_TOP, detokenize=False,
        extra_args={"kv_transfer_params": {CACHE_FIELD: name}},
    )  # fmt: skip
    prompt = tokens_input(ids[0].tolist(), cache_salt=salt(name))
    found: dict[int, float] = {}
    async for output in llm.generate(prompt, params, "probe"):
        for step in output.outputs[0].logprobs or ():
            found = {token: one.logprob for token, one in step.items()}
    off = max((abs(p - float(expected[token])) for token, p in found.items()), default=float("inf"))
    if not off <= _TOLERANCE[lm.dtype]:
        raise ModelError(
            f"vLLM computes something else than transformers behind a cache of {lm.card.id}",
            got=f"log-probabilities that differ by {off:.3g}", allowed=_TOLERANCE[lm.dtype],
            hint="Serve it with --engine transformers",
        )  # fmt: skip
