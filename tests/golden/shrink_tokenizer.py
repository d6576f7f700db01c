"""Cut a byte-level BPE tokenizer down to what some texts need: `python shrink_tokenizer.py FOLDER TEXTS.json OUT`.

BPE applies, word by word, the lowest-ranked merge that is present, until none is. Merges that no word of the texts
ever reached cannot change how these texts are split, so they and their tokens are left out. Ids stay as they are.
TEXTS.json is a list of strings; words of the other texts are split correctly as well, only not in the same way.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel


def words(tokenizer: Tokenizer, specials: list[str], texts: list[str]) -> set[str]:
    """All pieces that the model of the tokenizer gets to see."""
    split = re.compile("|".join(map(re.escape, specials)))
    return {
        word
        for text in texts
        for part in split.split(text)
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(part)
    }


def merges_of(word: str, ranks: dict[tuple[str, str], int]) -> set[tuple[str, str]]:
    """The merges that BPE applies to a word."""
    pieces, used = list(word), set()
    while len(pieces) > 1:
        best = min(pairwise(pieces), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        used.add(best)
        merged, index = [], 0
        while index < len(pieces):
            step = 2 if tuple(pieces[index : index + 2]) == best else 1
            merged.append("".join(pieces[index : index + step]))
            index += step
        pieces = merged
    return used


def shrink(data: dict, tokenizer: Tokenizer, texts: list[str]) -> dict:
    """The content of tokenizer.json with only the merges and tokens that the texts need."""
    model, specials = data["model"], [token["content"] for token in data["added_tokens"]]
    ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    used = set().union(*(merges_of(word, ranks) for word in words(tokenizer, specials, texts)))
    kept = {*ByteLevel.alphabet(), *specials, *(left + right for left, right in used)}
    vocab = {token: index for token, index in model["vocab"].items() if token in kept}
    return data | {"model": model | {"vocab": vocab, "merges": [list(pair) for pair in sorted(used, key=ranks.get)]}}


def main(folder: Path, texts: Path, out: Path) -> None:
    file = folder / "tokenizer.json"
    small = shrink(json.loads(file.read_text()), Tokenizer.from_file(str(file)), json.loads(texts.read_text()))
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_text(json.dumps(small, ensure_ascii=False, separators=(",", ":")) + "\n")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / name, out / name)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
