"""Write what the receiver alone answers to open instructions: DATA/own/instruction_prompts.jsonl.

    python recipes/general-own/rows.py DATA

A fuser that has only seen its own kinds of rows answers everything else in their style. Rows with the receiver's own words
teach it when not to. Answers are sampled from the receiver's distribution as it is (temperature 1, nothing cut off), so that
learning them is learning that distribution; those that come out empty are left out, and how many is printed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from transformers import set_seed

from cache2cache import C2C
from cache2cache.evaluate.tasks.files import rows_of

RECEIVER = "smollm2-135m"
TOKENS = 24
"""More than the recipe learns of a response."""
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, metavar="DATA")
    parser.add_argument("--dtype", default="auto", help="of the receiver")
    args = parser.parse_args()
    packed = args.data_dir / "instruction_prompts" / "test.jsonl.zst"
    rows = [row for _, row in rows_of(packed if packed.is_file() else packed.with_suffix(""))]
    rows.sort(key=lambda row: len(row["turns"][0]))  # prompts of a batch are padded to the longest
    receiver = C2C.from_pretrained(RECEIVER, dtype=args.dtype)
    set_seed(0)
    out = args.data_dir / "own" / "instruction_prompts.jsonl"
    out.parent.mkdir(exist_ok=True)
    kept = 0
    with out.open("w", encoding="utf-8") as file:
        for start in range(0, len(rows), BATCH):
            asked = [[{"role": "user", "content": row["turns"][0]}] for row in rows[start : start + BATCH]]
            answers = receiver.generate(
                asked, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=TOKENS
            )
            for messages, answer in zip(asked, answers, strict=True):
                if answer.text.strip():
                    row = {"messages": [*messages, {"role": "assistant", "content": answer.text}]}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    kept += 1
    print(f"{out}: {kept} of {len(rows)} prompts")


if __name__ == "__main__":
    main()
