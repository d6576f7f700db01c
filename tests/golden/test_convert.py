"""Recorded checkpoints, converted to our format and back: identical tensors, equal JSON."""

from __future__ import annotations

import json

import pytest
import torch

from cache2cache.fuser.export import save_published
from cache2cache.fuser.store import load_fuser


@pytest.mark.parametrize("pair", ["qwen3+llama", "qwen3+qwen2", "qwen3+llama_bf16"])
def test_there_and_back(pair, data, tmp_path):
    original = data / "checkpoints" / f"{pair}_Fuser"
    ours = load_fuser(original, dtype=None).save_pretrained(tmp_path / "ours")
    back = save_published(load_fuser(ours, dtype=None), tmp_path / "back")
    names = sorted(path.relative_to(original) for path in original.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(back) for path in back.rglob("*") if path.is_file())
    for name in names:
        if name.suffix == ".json":
            assert json.loads((back / name).read_text()) == json.loads((original / name).read_text())
            continue
        got, want = (torch.load(folder / name, weights_only=True) for folder in (back, original))
        assert got.keys() == want.keys()
        for key, x in want.items():
            assert got[key].dtype == x.dtype
            assert torch.equal(got[key], x), key
