"""`retokenise` against what the reference recorded. Provenance: README.md.

Pairs whose two tokenizers are in data/ run everywhere; the others take theirs from the model cache.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from cache2cache.text import retokenise, retokenise_text

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "aligner.json").read_text(encoding="utf-8"))
FORMS = {
    "gen_prompt": {},
    "no_gen": {"add_generation_prompt": False},
    "strip_last_suffix": {"add_generation_prompt": False, "end_with_content": True},
}


def small(name: str) -> Path:
    return DATA / "tokenizers" / name


def param(golden: dict, *values, name: str):
    bundled = small(golden["receiver"]).exists() and small(golden["sharer"]).exists()
    marks = () if bundled else (pytest.mark.real,)
    return pytest.param(golden, *values, id=f"{golden['receiver']}<-{golden['sharer']}-{name}", marks=marks)


@cache
def tokenizer(name: str):
    if small(name).exists():
        return AutoTokenizer.from_pretrained(small(name))
    from cache2cache.models.pull import resolve

    loaded = AutoTokenizer.from_pretrained(resolve(name).location)
    loaded.chat_template = loaded.chat_template or GOLDEN["gemma_like_template"]
    return loaded


def recorded(golden: dict, key: str) -> np.ndarray:
    mask = np.zeros(len(golden["receiver_ids"]), dtype=bool)
    mask[golden[key]] = True
    return mask


def assert_same(got, golden: dict) -> None:
    assert got.receiver_ids.tolist() == golden["receiver_ids"]
    assert got.sharer_ids.tolist() == golden["sharer_ids"]
    assert (got.receiver_padding == recorded(golden, "receiver_padding")).all()
    assert (got.sharer_padding == recorded(golden, "sharer_padding")).all()


@pytest.mark.parametrize(
    ("pair", "strategy"), [param(pair, way, name=way) for pair in GOLDEN["pairs"] for way in pair["texts"]]
)
def test_texts(pair: dict, strategy: str):
    receiver, sharer = tokenizer(pair["receiver"]), tokenizer(pair["sharer"])
    for text, golden in zip(GOLDEN["texts"], pair["texts"][strategy], strict=True):
        ids = receiver(text, add_special_tokens=False)["input_ids"]
        assert ids == golden["receiver_ids"][-len(ids) or len(golden["receiver_ids"]) :], "another tokenizer"
        assert retokenise_text(golden["receiver_ids"], receiver, sharer, strategy) == golden["sharer_ids"], text


@pytest.mark.parametrize(
    ("pair", "strategy", "chat"),
    [
        param(pair, way, chat, name=f"{way}-{chat}")
        for pair in GOLDEN["pairs"]
        for way, chats in pair["chats"].items()
        for chat in chats
    ],
)
def test_chats(pair: dict, strategy: str, chat: str):
    for form, golden in pair["chats"][strategy][chat].items():
        got = retokenise(
            GOLDEN["chats"][chat], tokenizer(pair["receiver"]), tokenizer(pair["sharer"]), strategy, **FORMS[form]
        )
        if "error" in golden:  # the reference failed where only one template trims; we do not
            assert [section.message for section in got.sections] == [False, True, False]
            continue
        assert_same(got, golden)
        assert [[part.start, part.stop, part.message] for part in got.sections] == golden["sections"]


@pytest.mark.parametrize("row", [param(row, name=f"row{index}") for index, row in enumerate(GOLDEN["training_rows"])])
def test_training_rows(row: dict):
    got = retokenise(
        row["messages"], tokenizer(row["receiver"]), tokenizer(row["sharer"]), "longest", add_generation_prompt=False
    )
    assert_same(got, row)
    # The reference fuses the contents of all messages but the response.
    fused = got.message_mask
    response = [part for part in got.sections if part.message][-1]
    fused[response.start :] = False
    assert (fused == recorded(row, "fused")).all()
