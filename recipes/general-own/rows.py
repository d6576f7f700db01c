"""Write what the receiver alone says to open instructions and to the heads of functions: DATA/own/<set>.jsonl.

    python recipes/general-own/rows.py DATA

A fuser that has only seen its own kinds of rows answers everything else in their style. Rows of which the receiver's own
distribution is kept teach it when not to. Answers are sampled from that distribution as it is (temperature 1, nothing cut
off), so that it is kept where the receiver goes; those that come out empty are left out, and how many is printed. The
functions are those of Python's standard library, so another version of Python gives other ones.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from transformers import set_seed

from cache2cache import C2C
from cache2cache.evaluate.tasks.files import rows_of

RECEIVER = "smollm2-135m"
TOKENS = 24
"""More than the recipe learns of a response."""
BATCH = 16
FUNCTIONS = 400
HEAD = range(120, 600)
"""Characters of a function's head and docstring."""
ASKED = ("{}", "Write the body of this function.\n\n{}", "```python\n{}```\n\nWhat comes next?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, metavar="DATA")
    parser.add_argument("--dtype", default="auto", help="of the receiver")
    args = parser.parse_args()
    receiver = C2C.from_pretrained(RECEIVER, dtype=args.dtype)
    (args.data_dir / "own").mkdir(exist_ok=True)
    for name, prompts in {"instruction_prompts": instructions(args.data_dir), "python_functions": functions()}.items():
        out = args.data_dir / "own" / f"{name}.jsonl"
        kept = write(receiver, prompts, out)
        print(f"{out}: {kept} of {len(prompts)} prompts")


def instructions(data_dir: Path) -> list[str]:
    """The first turns of the instruction prompts."""
    packed = data_dir / "instruction_prompts" / "test.jsonl.zst"
    return [row["turns"][0] for _, row in rows_of(packed if packed.is_file() else packed.with_suffix(""))]


def functions() -> list[str]:
    """Heads and docstrings of functions of Python's standard library, each asked for in one of three ways."""
    library = Path(sysconfig.get_paths()["stdlib"])
    heads = [head for path in sorted(library.glob("*.py")) for head in heads_of(path)]
    drawn = random.Random(0).sample(heads, FUNCTIONS)
    return [ASKED[index % len(ASKED)].format(head) for index, head in enumerate(drawn)]


def heads_of(path: Path) -> Iterator[str]:
    """The head and the docstring of each function of a module that has a docstring and a body after it."""
    source = path.read_text(encoding="utf-8")
    with warnings.catch_warnings(action="ignore"):  # old escapes in docstrings
        module = ast.parse(source)
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
            head = "".join(source.splitlines(keepends=True)[node.lineno - 1 : node.body[0].end_lineno])
            if len(head) in HEAD:
                yield head


def write(receiver: C2C, prompts: list[str], out: Path) -> int:
    """One row per prompt to which the receiver's sampled answer is not empty; how many."""
    set_seed(0)
    prompts = sorted(prompts, key=len)  # prompts of a batch are padded to the longest
    kept = 0
    with out.open("w", encoding="utf-8") as file:
        for start in range(0, len(prompts), BATCH):
            asked = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + BATCH]]
            answers = receiver.generate(
                asked, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=TOKENS
            )
            for messages, answer in zip(asked, answers, strict=True):
                if answer.text.strip():
                    row = {"messages": [*messages, {"role": "assistant", "content": answer.text}]}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    kept += 1
    return kept


if __name__ == "__main__":
    main()
