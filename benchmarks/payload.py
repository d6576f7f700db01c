"""What a sharer's cache weighs as bytes, what fewer bits cost, what meddling comes to, and what text would take instead.

    python benchmarks/payload.py size tampering transfer --out payload.json
    python benchmarks/payload.py loss --data-dir DATA --rows loss-rows --out loss.json

`loss` asks every row once more for every precision; it keeps its rows in a folder and goes on with it. Seconds are this
machine's: compare ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import payload_report
import torch
from payload_loss import loss
from payload_service import read, wanted
from payload_tampering import KEY, tamper
from payload_transfer import transfers

from cache2cache import C2C
from cache2cache.cli.pair import quiet_transformers
from cache2cache.evaluate.questions import read_questions
from cache2cache.inputs import Row
from cache2cache.serve.payload import Precision
from cache2cache.types import Conversation

PARTS = ("size", "loss", "tampering", "transfer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", choices=PARTS, nargs="+")
    parser.add_argument("--receiver", default="smollm2-135m")
    parser.add_argument("--sharer", default="qwen2.5-coder-1.5b")
    parser.add_argument("--fuser", default="demo")
    parser.add_argument("--dtype", default="auto", help="of the models, and so of the cache that is the standard")
    parser.add_argument("--tasks", nargs="+", default=["arc-easy", "arc-challenge", "openbookqa", "mmlu-redux"])
    parser.add_argument("--data-dir", type=Path, help="folder of data sets, for loss; the hub by default")
    parser.add_argument("--rows", type=Path, help="folder of the answers, for loss")
    parser.add_argument("--limit", type=int, help="rows of each task")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--prefills", type=Path, help="folder that keeps prefills, for loss")
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--messages", type=int, nargs="+", default=[64, 256], help="tokens of a text, for transfer")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if "loss" in args.parts and args.rows is None:
        parser.error("loss needs --rows")

    quiet_transformers()
    pair = C2C.from_pretrained(args.receiver, [args.sharer], [args.fuser], dtype=args.dtype)
    asked = bundled()
    rows = pair.rows(asked)
    result: dict[str, Any] = {
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "cores": os.cpu_count(),
        "command": sys.argv[1:],
        "dtype": str(pair.receiver.dtype).removeprefix("torch."),
    }
    if "size" in args.parts:
        result["size"] = sizes(pair, rows)
    if "tampering" in args.parts:
        result["tampering"] = {
            name: [asdict(fared) for fared in tamper(pair, rows, key, args.flips, args.seed)]
            for name, key in (("with a shared key", KEY), ("without", None))
        }
    if "transfer" in args.parts:
        result["transfer"] = transfers(pair, asked[0], get_args(Precision), args.messages, args.repeat)
    if "loss" in args.parts:
        coarser: list[Precision] = ["int8", "int4"]
        if pair.sharers[0].dtype == torch.float32:
            coarser.insert(0, "bfloat16")
        result["loss"] = loss(
            pair, coarser, args.tasks, args.rows, data_dir=args.data_dir, limit=args.limit,
            batch_size=args.batch_size, prefills=args.prefills,
        )  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))
    print(payload_report.markdown(result))


def bundled() -> list[Conversation]:
    """The questions that come with the package."""
    questions = read_questions(str(files("cache2cache") / "data" / "demo_questions.jsonl"))
    return [question.messages() for question in questions]


def sizes(pair: C2C, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Bytes per position, of whole prompts and of what this fuser's fusion needs of them, in every precision."""
    (sharer,), found = pair.sharers, []
    for name in ("whole prompts", "what is fused"):
        caches = []
        for row in rows:
            (part,), (positions, layers) = row.sharers, wanted(pair, row)
            assert part is not None, "the sharer speaks"
            caches.append(
                read(sharer, part.ids, positions if name == "what is fused" else range(len(part.ids)), layers)
            )
        positions = sum(len(cache.positions) for cache in caches)
        for precision in get_args(Precision):
            for compress in (False, True):
                total = sum(len(cache.to_bytes(precision=precision, compress=compress)) for cache in caches)
                found.append(
                    {"what": name, "precision": precision, "zstd": compress, "prompts": len(caches)}
                    | {"positions": positions, "bytes": total, "per_position": total / positions}
                )
    return found


if __name__ == "__main__":
    main()
