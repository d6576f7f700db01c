"""Write rows of kinds that recipes/general is not trained on, to ask a fuser for the likelihood of their answers:
DATA/others/<set>.jsonl, named so that none is taken for a task.

    python recipes/general/others.py DATA
    c2c eval --fuser RUN/fuser --tasks DATA/others/natural_instructions.jsonl,… --systems receiver,c2c --controls mismatched …

Rows are drawn with seed 0, short ones of those sets that have long ones. A row with several answers has its first.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cache2cache.evaluate.tasks.files import rows_of

Row = dict[str, Any]
LONGEST = 700
"""Characters of question and answer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, metavar="DATA")
    parser.add_argument("--rows", type=int, default=200, help="of each set")
    args = parser.parse_args()
    (args.data_dir / "others").mkdir(exist_ok=True)
    for name, (path, read) in SETS.items():
        packed = args.data_dir / f"{path}.jsonl.zst"
        rows = [read(row) for _, row in rows_of(packed if packed.is_file() else packed.with_suffix(""))]
        short = [(asked, answer) for asked, answer in rows if answer.strip() and len(asked) + len(answer) < LONGEST]
        drawn = random.Random(0).sample(short, min(args.rows, len(short)))
        out = args.data_dir / "others" / f"{name}.jsonl"
        with out.open("w", encoding="utf-8") as file:
            for asked, answer in drawn:
                messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        print(f"{out}: {len(drawn)} of {len(rows)} rows")


def _first_turns(row: Row) -> tuple[str, str]:
    asked, answer = row["messages"][:2]
    return asked["content"], answer["content"]


SETS: dict[str, tuple[str, Callable[[Row], tuple[str, str]]]] = {
    "natural_instructions": ("ni_v1/train", _first_turns),
    "alpaca": ("alpaca_subset/train", _first_turns),
    "nq_open_answers": ("nq_open/dev", lambda row: (f"{row['question']}?", row["answers"][0])),
    "gsm8k_solutions": ("gsm8k/test", lambda row: (row["question"], row["answer"])),
    "humaneval_solutions": (
        "humaneval/test",
        lambda row: (f"Complete this function.\n\n{row['prompt']}", row["canonical_solution"]),
    ),
}


if __name__ == "__main__":
    main()
