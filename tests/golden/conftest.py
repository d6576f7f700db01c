"""Recorded models, checkpoints and tensors; README.md in this folder says where they come from."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cache2cache.fuser.base import Fuser
from cache2cache.models.load import LanguageModel, load

DATA = Path(__file__).parent / "data"
DTYPES = {"qwen3+llama": torch.float32, "qwen3+qwen2": torch.float32, "qwen3+llama_bf16": torch.bfloat16}
SHARERS = {"qwen3+llama": "sharer_llama", "qwen3+qwen2": "sharer_qwen2", "qwen3+llama_bf16": "sharer_llama"}


@cache
def _tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(DATA / f"{name}.safetensors")


@cache
def _model(name: str, dtype: torch.dtype) -> LanguageModel:
    return load(DATA / "models" / name, dtype=dtype)


@pytest.fixture(scope="session")
def data() -> Path:
    return DATA


@pytest.fixture(scope="session")
def tensors() -> Callable[[str], dict[str, torch.Tensor]]:
    """Recorded tensors by file name, such as `prefill/qwen3+llama`."""
    return _tensors


@pytest.fixture
def fuser_of() -> Callable[[str], Fuser]:
    """A recorded checkpoint by its pair's name, in the dtype of the recording."""
    return lambda pair: Fuser.from_pretrained(DATA / "checkpoints" / f"{pair}_Fuser", dtype=DTYPES[pair])


@pytest.fixture(scope="session")
def receiver_of() -> Callable[[str], LanguageModel]:
    """The receiver of a pair."""
    return lambda pair: _model("receiver_qwen3", DTYPES[pair])


@pytest.fixture(scope="session")
def sharer_of() -> Callable[[str], LanguageModel]:
    """The sharer of a pair."""
    return lambda pair: _model(SHARERS[pair], DTYPES[pair])


@pytest.fixture(scope="session")
def close() -> Callable[[torch.Tensor, torch.Tensor, float], None]:
    """Assert that two tensors differ by no more than a fraction of the expected one's largest value."""

    def check(got: torch.Tensor, want: torch.Tensor, fraction: float) -> None:
        assert got.shape == want.shape
        off = float((got.detach().double() - want.double()).abs().max())
        assert off <= fraction * float(want.double().abs().max()), f"off by {off}"

    return check
