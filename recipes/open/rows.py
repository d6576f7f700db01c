"""Write short questions without options, which recipes/open trains on and is asked: DATA/open/*.jsonl.

    python recipes/open/rows.py DATA

Multiple choice is asked without its choices, and the right one's text is the answer. Questions that speak of their choices or of
a figure, and answers that are long or speak of other choices, are left out; how many is printed. NQ-open is taken as it is.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

from cache2cache.evaluate.tasks.files import rows_of

CHOICE = {
    "arc_easy": ("train", "dev", "test"),
    "arc_challenge": ("train",),
    "openbookqa": ("train",),
    "commonsenseqa": ("train",),
    "mmlu_redux": ("test",),
}
SHORT = {"nq_open": ("efficientqa_dev", "efficientqa_test", "dev")}

_LONGEST = 60
"""Characters of an answer."""
_QUESTION = re.compile(
    r"\b(following|these|statements?|best (describes|explains|represents)|above|below|choices?|options?"
    r"|graph|diagram|table|figure|chart|shown)\b",
    re.IGNORECASE,
)
_ANSWER = re.compile(r"\b(above|these|both|none of)\b", re.IGNORECASE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, metavar="DATA")
    data = parser.parse_args().data_dir
    (data / "open").mkdir(exist_ok=True)
    for sets, asked in ((CHOICE, without_choices), (SHORT, as_questions)):
        for name, splits in sets.items():
            for split in splits:
                packed = data / name / f"{split}.jsonl.zst"
                rows = [row for _, row in rows_of(packed if packed.is_file() else packed.with_suffix(""))]
                kept = list(asked(rows))
                text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
                out = data / "open" / f"{name}_{split}.jsonl"
                out.write_text(text, encoding="utf-8")
                print(f"{out}: {len(kept)} of {len(rows)} questions")


def without_choices(rows: list[dict]) -> Iterator[dict]:
    """Multiple choice as questions with a short answer. Rows that MMLU-Redux marks as wrong are left out, too."""
    for row in rows:
        answer = row["choices"][row["answer"]].strip()
        fits = not _QUESTION.search(row["question"]) and not _ANSWER.search(answer) and len(answer) <= _LONGEST
        if fits and row.get("error_type", "ok") == "ok":
            yield {"id": str(row["id"]), "subject": row["subject"], "question": row["question"], "answer": answer}


def as_questions(rows: list[dict]) -> Iterator[dict]:
    """Search queries as questions: they have no question mark."""
    for row in rows:
        yield {"id": row["id"], "question": f"{row['question']}?", "answers": row["answers"]}


if __name__ == "__main__":
    main()
