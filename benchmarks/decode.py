"""How fast one answer at a time is written by `c2c serve --engine vllm`, against plain vLLM with the receiver alone.

    python benchmarks/decode.py --out decode.json

All servers stand at once and are asked in turns, so that whatever else the machine does meets all of them; each round gives one
ratio. On a processor vLLM leaves a core to its scheduler, and two where a KV connector is in use, if there are as many: on few
cores the servers compute with different numbers of threads, so plain vLLM is asked in both ways.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from scipy.stats import t as student
from serve import answer_with, connect, different, pair_options, plain, served
from serve_load import Summary, closed_loop

_ALL_CORES = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
_MEMORY = "0.08"
"""Of the machine's, for each vLLM's cache: three of them stand side by side."""

FUSED = "behind fused caches"
SAME = "receiver alone, same server"
PLAIN = "plain vLLM"
PLAIN_ALL = "plain vLLM on all cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pair_options(parser)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--answers", type=int, default=6, help="of each in a round")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"an interval takes at least two rounds, got --rounds {args.rounds}")
    args.engine = "vllm"
    args.server = [f"--vllm-option={option}" for option in ("enforce_eager=true", f"gpu_memory_utilization={_MEMORY}")]
    args.plain_options = f"--enforce-eager --gpu-memory-utilization {_MEMORY}"

    with ExitStack() as servers:
        pair = servers.enter_context(served(args))
        usual = servers.enter_context(plain(args.receiver, args))
        os.environ.update(_ALL_CORES)
        all_cores = servers.enter_context(plain(args.receiver, args))
        asked = {FUSED: (pair, 0), SAME: (pair, 1), PLAIN: (usual, 0), PLAIN_ALL: (all_cores, 0)}
        rates = asyncio.run(measure(asked, args))
    result = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "command": sys.argv[1:],
        "rates": rates,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))
    report(rates)


async def measure(asked: dict[str, tuple[str, int]], args: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens per second after the first, one number per round.

    Args:
        asked: name → the server's address, and which of its models.
    """
    prompts, rates = different(), {name: [] for name in asked}
    for number in range(args.rounds + 1):
        for name, (url, model) in asked.items():
            rate = await decode_rate(url, model, prompts, args)
            if number:  # the first round warms up
                rates[name].append(rate)
        print(f"round {number} of {args.rounds}: done", file=sys.stderr, flush=True)
    return rates


async def decode_rate(url: str, model: int, prompts: Iterator[str], args: argparse.Namespace) -> float:
    """Of some answers of one server, one after the other."""
    async with connect(url) as client:
        ask = answer_with(client, (await client.models.list()).data[model].id, args.tokens)
        samples = await closed_loop(ask, prompts, concurrency=1, answers=args.answers, seconds=600)
    rate = Summary.of(samples).decode_rate
    assert rate is not None, "essays have more than one token"
    return rate


def report(rates: dict[str, list[float]]) -> None:
    """Print the rates, and their ratios with 95 % intervals (of their logarithms, Student's t), as Markdown."""
    print("| | tokens/s | " + " | ".join(f"÷ {name}" for name in rates) + " |")
    print("|---|" + "---:|" * (1 + len(rates)))
    for name, row in rates.items():
        cells = ["–" if other == name else ratio(row, rates[other]) for other in rates]
        print(f"| {name} | {np.mean(row):.1f} | " + " | ".join(cells) + " |")


def ratio(these: list[float], those: list[float]) -> str:
    """Of two servers in the same rounds, at least two."""
    logs = np.log(these) - np.log(those)
    around = student.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
    low, middle, high = np.exp([logs.mean() - around, logs.mean(), logs.mean() + around])
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


if __name__ == "__main__":
    main()
