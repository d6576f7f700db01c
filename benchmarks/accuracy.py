"""Accuracy of a pair on multiple choice: receiver alone, sharer alone, C2C, and C2C with another row's sharer cache.

    python benchmarks/accuracy.py --data-dir DATA --limit 500 --out accuracy.json arc_easy/test.jsonl.zst …

Both prefills of every row are computed once and kept on disk, so that all systems and the control read the same ones.
A row is right if the right letter is the likeliest of the valid ones at the answer position (all systems), and, for
C2C, also if the greedy answer names it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from cache2cache import C2C
from cache2cache.evaluate.questions import Question, read_questions
from cache2cache.evaluate.systems import extract_letter
from cache2cache.inputs import Row, SharerRow, collate
from cache2cache.models import kv
from cache2cache.models.load import LanguageModel
from cache2cache.models.pull import home
from cache2cache.pipeline import Prefill, pad_id
from cache2cache.train.data import left_padded
from cache2cache.train.features import PrefillStore
from cache2cache.types import Timings

BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="relative to --data-dir")
    parser.add_argument("--data-dir", type=Path, default=Path())
    parser.add_argument("--receiver", default="smollm2-135m")
    parser.add_argument("--sharer", default="qwen2.5-coder-1.5b")
    parser.add_argument("--fuser", default="demo")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--features", type=Path, default=home() / "features")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    pair = C2C.from_pretrained(args.receiver, sharers=[args.sharer], fusers=[args.fuser], dtype=args.dtype)
    result = {"fuser": args.fuser, "seed": args.seed, "sets": {}}
    for name in args.files:
        questions = read_questions(args.data_dir / name, limit=args.limit, seed=args.seed)
        right = evaluate(pair, questions, args.features)
        result["sets"][name] = summary = summarise(right)
        print(name, json.dumps(summary), flush=True)
        if args.out:
            args.out.write_text(json.dumps(result, indent=1))


@torch.no_grad()
def evaluate(pair: C2C, questions: Sequence[Question], features: Path) -> dict[str, np.ndarray]:
    """Which rows each system gets right, (rows,) bool per system."""
    (sharer,) = pair.sharers
    rows = [row for q in questions for row in pair.rows([q.messages()])]
    receiver_store, sharer_store = (PrefillStore(features, lm.card, lm.dtype) for lm in (pair.receiver, sharer))
    receiver_store.compute(pair.receiver, [row.ids[:-1] for row in rows])
    sharer_store.compute(sharer, [row.sharers[0].ids for row in rows])
    partner = mismatched(rows)
    right = {name: np.zeros(len(rows), dtype=bool) for name in ("receiver", "sharer", "c2c", "mismatched", "generated")}
    # Rows of similar length together: little padding.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    for at in range(0, len(order), BATCH):
        batch = order[at : at + BATCH]
        asked = [questions[i] for i in batch]
        own = [receiver_store.load(rows[i].ids[:-1]) for i in batch]
        theirs = [sharer_store.load(rows[i].sharers[0].ids) for i in batch]
        others = [sharer_store.load(rows[partner[i]].sharers[0].ids) for i in batch]
        matched = [rows[i] for i in batch]
        crossed = [with_sharer_of(rows[i], rows[partner[i]]) for i in batch]
        silent = [Row(row.ids, (None,)) for row in matched]
        right["receiver"][batch] = letters_right(pair, read(pair, silent, own, None), asked)
        right["mismatched"][batch] = letters_right(pair, read(pair, crossed, own, others), asked)
        fused = read(pair, matched, own, theirs)
        right["c2c"][batch] = letters_right(pair, replace(fused, cache=kv.clone(fused.cache)), asked)
        answers = pair.decode(fused, do_sample=False, max_new_tokens=8)
        right["generated"][batch] = [
            extract_letter(a.text, q.letters) == q.letter for a, q in zip(answers, asked, strict=True)
        ]
        right["sharer"][batch] = sharer_right(sharer, [row.sharers[0].ids for row in matched], theirs, asked)
    return right


def read(pair: C2C, rows: Sequence[Row], own: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor] | None) -> Prefill:
    """What `pair.read` gives, from stored prefills."""
    prepared = collate(rows, pad_id(pair.receiver), [pad_id(lm) for lm in pair.sharers])
    cache = kv.from_tensors(list(zip(*left_padded(own), strict=True)))
    caches = [kv.new_cache()] if theirs is None else [kv.from_tensors(list(zip(*left_padded(theirs), strict=True)))]
    pair.fuse(cache, prepared.mask, prepared.ids.shape[1] - 1, prepared, caches)
    return Prefill(prepared, cache, caches, Timings())


def letters_right(pair: C2C, prefill: Prefill, questions: Sequence[Question]) -> list[bool]:
    logits = next_logits(pair.receiver, prefill.ids, prefill.mask, prefill.cache)
    return [best_letter(pair.receiver, logits[b], q, "") == q.letter for b, q in enumerate(questions)]


def sharer_right(
    sharer: LanguageModel, ids, caches: Sequence[torch.Tensor], questions: Sequence[Question]
) -> list[bool]:
    width = max(map(len, ids))
    padded = torch.zeros((len(ids), width), dtype=torch.long)
    mask = torch.zeros_like(padded)
    for b, row in enumerate(ids):
        padded[b, width - len(row) :], mask[b, width - len(row) :] = torch.as_tensor(row), 1
    cache = kv.from_tensors(list(zip(*left_padded([c[:, :, :, :-1] for c in caches]), strict=True)))
    logits = next_logits(sharer, padded, mask, cache)
    return [best_letter(sharer, logits[b], q, " ") == q.letter for b, q in enumerate(questions)]


def next_logits(lm: LanguageModel, ids: torch.Tensor, mask: torch.Tensor, cache) -> torch.Tensor:
    """(B, V) after the prompt's last token, which is all that the cache does not hold yet."""
    positions = kv.position_ids(mask)[:, -1:]
    out = lm.model(input_ids=ids[:, -1:], attention_mask=mask, position_ids=positions, past_key_values=cache)
    return out.logits[:, -1].float()


def best_letter(lm: LanguageModel, logits: torch.Tensor, question: Question, before: str) -> str:
    tokens = [lm.tokenizer(before + letter, add_special_tokens=False)["input_ids"] for letter in question.letters]
    assert all(len(t) == 1 for t in tokens), "each letter must be one token"
    return question.letters[int(logits[[t[0] for t in tokens]].argmax())]


def mismatched(rows: Sequence[Row]) -> list[int]:
    """For each row another row whose sharer prompt is about as long: its neighbour in order of length."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].sharers[0].ids), i))
    partner = [0] * len(rows)
    for a, b in zip(order, order[1:] + order[:1], strict=True):
        partner[a] = b
    return partner


def with_sharer_of(row: Row, other: Row) -> Row:
    """The row, listening to what the sharer read of the other one, aligned from the right."""
    mine, theirs = row.sharers[0], other.sharers[0]
    alignment = np.maximum(mine.alignment + len(theirs.ids) - len(mine.ids), 0)
    return Row(row.ids, (SharerRow(theirs.ids, alignment, mine.due),))


def summarise(right: dict[str, np.ndarray]) -> dict:
    """Accuracies in per cent with Wilson intervals, and paired differences with bootstrap intervals."""
    n = len(right["c2c"])
    out: dict = {"rows": n}
    for name, rows in right.items():
        interval = stats.binomtest(int(rows.sum()), n).proportion_ci(method="wilson")
        out[name] = [round(100 * x, 1) for x in (rows.mean(), interval.low, interval.high)]
    for other in ("mismatched", "sharer"):
        difference = 100 * (right["c2c"].astype(float) - right[other])
        interval = stats.bootstrap((difference,), np.mean, rng=np.random.default_rng(0)).confidence_interval
        out[f"c2c_minus_{other}"] = [round(float(x), 1) for x in (difference.mean(), interval.low, interval.high)]
    return out


if __name__ == "__main__":
    main()
