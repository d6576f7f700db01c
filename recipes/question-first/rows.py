"""Write SQuAD's questions about short passages, which recipes/question-first trains on: DATA/question-first/*.jsonl.

    python recipes/question-first/rows.py DATA

Short passages, because every position of a prompt is fused and stored. One question of each passage. Articles that validation
rows are about have no training rows.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from cache2cache.evaluate.tasks import get
from cache2cache.evaluate.tasks.files import rows_of
from cache2cache.evaluate.tasks.load import find

VALIDATION = 80
"""More than the recipe takes, since rows that resemble those of evaluation are left out."""

_LONGEST = 450
"""Characters of a passage."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, metavar="DATA")
    data = parser.parse_args().data_dir
    out = data / "question-first"
    out.mkdir(exist_ok=True)
    squad = [row for _, row in rows_of(find(data, get("squad").sources["train"]))]
    for split, rows in drawn(squad).items():
        text = "".join(json.dumps(short_answer(row), ensure_ascii=False) + "\n" for row in rows)
        (out / f"{split}.jsonl").write_text(text, encoding="utf-8")
        print(f"{out / split}.jsonl: {len(rows)} of {len(squad)} questions")


def drawn(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows of each split, in an order that is random and always the same."""
    rows = list(rows)
    random.Random(0).shuffle(rows)
    asked = list({row["context"]: row for row in rows if len(row["context"]) <= _LONGEST}.values())
    validation, rest = asked[:VALIDATION], asked[VALIDATION:]
    articles = {row["title"] for row in validation}
    return {"validation": validation, "train": [row for row in rest if row["title"] not in articles]}


def short_answer(row: dict) -> dict:
    """A row as `c2c train` takes it."""
    return {key: row[key] for key in ("id", "question", "context", "answers")} | {"subject": row["title"]}


if __name__ == "__main__":
    main()
