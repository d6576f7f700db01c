"""Tiny random models, tokenizers and fusers for tests: on the CPU, without a network, in milliseconds.

The same arguments give the same weights on every call. What the models say is noise, but it depends on every
token that they read, so a test can compare one way of computing it with another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from cache2cache.fuser.base import Fuser, FuserConfig
from cache2cache.fuser.gate import GateConfig
from cache2cache.fuser.layer_map import last_aligned
from cache2cache.models.load import LanguageModel

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The chat template of the tiny tokenizers."""

WORDS = ("the", "and", "question", "answer", "system", "user", "assistant", "what", "letter", "color", "12", "==")
"""Words that become one token when a tokenizer is asked to merge them, with and without a space before."""

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|bos|>")

_COMMON = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512}
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "head_dim": 8}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        **_GROUPED,
        "model_type": "llama",
        "num_hidden_layers": 3,
        "rope_parameters": {
            **_ROPE,
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen2": {
        **_GROUPED,
        "model_type": "qwen2",
        "num_hidden_layers": 4,
        "rope_parameters": {**_ROPE, "rope_theta": 1e6},
    },
    "qwen3": {**_GROUPED, "model_type": "qwen3", "num_hidden_layers": 2, "head_dim": 16, "rope_parameters": _ROPE},
    "gemma3": {
        **_GROUPED,
        "model_type": "gemma3_text",
        "num_hidden_layers": 4,
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": _ROPE,
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
    },
    "phi3": {
        **_COMMON,
        "model_type": "phi3",
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "original_max_position_embeddings": 512,
        "rope_parameters": _ROPE,
    },
    "mistral": {
        **_GROUPED,
        "model_type": "mistral",
        "num_hidden_layers": 3,
        "sliding_window": 16,
        "rope_parameters": _ROPE,
    },
    "gpt_neox": {
        **_COMMON,
        "model_type": "gpt_neox",
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.25},
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
}
"""Family → what its tiny config says. They differ on purpose: in layers, heads, head size, rotary parameters
(scaled, per layer type, partial, none) and window. Gemma 3 and Mistral have windows of 16 positions."""

# Initial weights of this size make a random model's tokens depend on what it read, which 0.02 would not.
_INITIALIZER_RANGE = 0.25


def tiny_tokenizer(
    *, merge: Sequence[str] = (), template: str | None = CHATML, bos: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that can spell any text.

    Args:
        merge: words that are one token each, such as `WORDS`; without any, every byte is a token.
        template: chat template; None leaves the tokenizer without one.
        bos: whether it has a beginning-of-sequence token and puts it before a text, as Llama's does.
    """
    to_byte_characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    for word in (spaced for plain in merge for spaced in (f" {plain}", plain)):
        spelled = to_byte_characters.pre_tokenize_str(word)[0][0]
        for end in range(1, len(spelled)):
            if spelled[: end + 1] not in vocab:
                vocab[spelled[: end + 1]] = len(vocab)
                merges.append((spelled[:end], spelled[end]))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = to_byte_characters
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", backend.token_to_id("<|bos|>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template,
        bos_token="<|bos|>" if bos else None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def tiny_model(
    family: str,
    seed: int = 0,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    name: str | None = None,
    **config: Any,
) -> LanguageModel:
    """A random model of one of the `FAMILIES`, in float32.

    Args:
        seed: other seeds, other weights.
        tokenizer: byte-level with a ChatML template by default.
        name: the card's id; `tiny-<family>` by default.
        config: overrides of the family's config, such as `num_hidden_layers=5`.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; allowed: {', '.join(FAMILIES)}")
    tokenizer = tokenizer or tiny_tokenizer()
    settings: dict[str, Any] = {
        **FAMILIES[family],
        "vocab_size": len(tokenizer),
        "initializer_range": _INITIALIZER_RANGE,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **config,
    }
    with _seeded(seed):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    return LanguageModel.wrap(model, tokenizer, name=name or f"tiny-{family}")


def tiny_pair(receiver: str = "qwen3", sharer: str = "llama", seed: int = 0) -> tuple[LanguageModel, LanguageModel]:
    """Receiver and sharer whose sizes and tokenizers differ: the sharer's merges words and has a BOS."""
    return (
        tiny_model(receiver, seed, name="tiny-receiver"),
        tiny_model(sharer, seed + 1, tokenizer=tiny_tokenizer(merge=WORDS, bos=True), name="tiny-sharer"),
    )


TINY_SIZES: dict[str, dict[str, Any]] = {
    "compact": {"width": 16, "inner": 24, "blocks": 1},
    "paper": {"hidden_dim": 16, "intermediate_dim": 24, "num_layers": 3},
}
"""Sizes of the random fusers."""


def random_fuser(
    receiver: LanguageModel,
    sharer: LanguageModel,
    kind: str = "compact",
    seed: int = 0,
    *,
    open_gates: bool = True,
    **config: Any,
) -> Fuser:
    """A fuser whose every weight is random, so that, unlike a fresh one, it changes what the receiver says.

    Args:
        open_gates: all gates open, or all closed.
        config: overrides of the `FuserConfig`, such as `fuse_last=4`.
    """
    settings: dict[str, Any] = {
        "kind": kind,
        "receiver": receiver.card,
        "sharer": sharer.card,
        "layer_map": last_aligned(receiver.card.geometry.layers, sharer.card.geometry.layers),
        "sizes": TINY_SIZES[kind],
        "gate": GateConfig(initial_logit=2.0 if open_gates else -2.0),
        **config,
    }
    with _seeded(seed):
        fuser = Fuser.from_config(FuserConfig(**settings))
        for name, tensor in [*fuser.named_parameters(), *fuser.named_buffers()]:
            if name.endswith("_std"):
                tensor.data.uniform_(0.5, 1.5)
            elif name.endswith("_mean"):
                tensor.data.normal_(0, 0.5)
            elif name.partition(".")[0] != "gate":
                # Noise on top of the initial values keeps those that begin at one, the norms', around one.
                tensor.data.add_(torch.randn_like(tensor) * 0.3)
    return fuser.eval()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers from a seed, without disturbing the caller's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
