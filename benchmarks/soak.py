"""A server at full queue for a while, with clients that leave, cancel and send nonsense, and a sharer that dies again and again.

    python benchmarks/soak.py --minutes 20
    python benchmarks/soak.py --minutes 20 --pair demo

Every answer that ends is compared with what the same request got alone, in float32; every refusal with what had to be
said; memory with what it was. Ends with 1 and a list if anything was lost, mixed, leaked or badly said. The same seed gives
the same requests, though not the same moments. What stands behind `--` is handed on to `c2c serve`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from openai import AsyncOpenAI
from services import C2C, Service, free_port
from soak_asking import Asking, Target
from soak_bad import bad_requests
from soak_book import Book, Outage
from soak_clients import Client
from soak_memory import Memory, Trend
from soak_questions import LONGEST, Pair, make_questions
from soak_watch import Watch, log_faults

from cache2cache.cli.pair import quiet_transformers

GRACE = 300
"""Seconds in which the last answers must come to their end; on a slow machine they take a while."""

MAX_BATCH, MAX_WAITING = 8, 16
CLIENTS = MAX_BATCH + MAX_WAITING + 12
"""More than can be answered and wait together, so that the queue is full."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--pair", choices=("tiny", "demo"), default="tiny", help="tiny is random and made on the spot")
    parser.add_argument("--questions", type=int, default=40, help="different ones")
    parser.add_argument("--deaths", type=int, help="of the sharer; one every two minutes, at least two, by default")
    parser.add_argument("--on-sharer-failure", choices=("fail", "receiver-alone"), default="fail")
    parser.add_argument(
        "--max-growth", type=float, default=64, help="MB that a process may grow by after its warm-up, or 3 %% of it"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("server", nargs="*", help="behind --: more options of c2c serve")
    args = parser.parse_args()
    deaths = max(2, round(args.minutes / 2)) if args.deaths is None else args.deaths

    quiet_transformers()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pair = Pair.make(args.pair, folder)
        questions = make_questions(pair, args.pair, args.questions, args.seed)
        print(f"{len(questions)} questions answered alone; starting", file=sys.stderr, flush=True)
        sharer = _sharer(pair, folder)
        with sharer, _server(pair, sharer.url, folder, args) as server:
            book, memory = Book(), Memory()
            asyncio.run(soak(server, sharer, questions, book, memory, args, deaths))
            for fault in log_faults(server.log):
                book.violation(f"the server's log: {fault}")
    judge_memory(memory.trends(), args.max_growth, book)
    report(book, memory.trends(), args)
    return 1 if book.violations else 0


def _sharer(pair: Pair, folder: Path) -> Service:
    port = free_port()
    return Service([*C2C, "share", pair.sharer, "--port", str(port), "--dtype", "float32"], port, folder / "sharer.log")


def _server(pair: Pair, sharer: str, folder: Path, args: argparse.Namespace) -> Service:
    port = free_port()
    command = [
        *(*C2C, "serve", "--port", str(port), "--dtype", "float32", "--max-batch", str(MAX_BATCH)),
        *("--max-waiting", str(MAX_WAITING), "--max-new-tokens", str(LONGEST), "--sharer-timeout", "60"),
        *("--grace", str(GRACE)),
        *("--receiver", pair.receiver, "--sharer", sharer, "--fuser", pair.fuser),
        *("--on-sharer-failure", args.on_sharer_failure, *args.server),
    ]
    return Service(command, port, folder / "server.log")


async def soak(
    server: Service,
    sharer: Service,
    questions: list,
    book: Book,
    memory: Memory,
    args: argparse.Namespace,
    deaths: int,
) -> None:
    """All of it, from the first request to the server's end."""
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        models = [model.id async for model in client.models.list()]
    degrades = args.on_sharer_failure == "receiver-alone"
    bad = bad_requests(models[0], LONGEST)
    target = Target(server.url, models[0], models[1], questions, bad, book, degrades)
    watch = Watch(server, sharer, book, memory)
    end, dice = book.now() + 60 * args.minutes, random.Random(args.seed)
    clients = [Client(target, dice.getrandbits(64)) for _ in range(CLIENTS)]
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(kill_again_and_again(sharer, deaths, end, dice, book))
        looking = tasks.create_task(watch.look())
        await asyncio.gather(*(client.run(end) for client in clients))
        await watch.until_idle()
        looking.cancel()
    await stop(server, target, dice)
    book.require("right", "no answer has come to its end")
    book.require("busy", "the queue was never full")
    if deaths:
        book.require("right, unheard" if degrades else "sharer failed", "nobody noticed that the sharer died")
    print(f"queue: {watch.described()}", file=sys.stderr)


async def kill_again_and_again(sharer: Service, deaths: int, end: float, dice: random.Random, book: Book) -> None:
    """Kill the sharer at about the same intervals, and start it again after some seconds."""
    begun = book.now()
    for number in range(deaths):
        at = begun + (end - begun) * (number + dice.uniform(0.3, 0.6)) / deaths
        await asyncio.sleep(max(0.0, at - book.now()))
        outage = Outage(book.now())
        book.outages.append(outage)
        sharer.kill()
        await asyncio.sleep(dice.uniform(0, 5))
        sharer.start()
        await asyncio.to_thread(sharer.wait)
        outage.ended = book.now()


async def stop(server: Service, target: Target, dice: random.Random) -> None:
    """SIGTERM while answers are written: they must come to their end, and the server to its own."""
    book = target.book
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        last = [Asking(target, client, dice, dice.randrange(len(target.questions)), heard=True) for _ in range(CLIENTS)]
        asked = [asyncio.create_task(asking.act("streamed")) for asking in last]
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        target.stopping = True
        status = await asyncio.to_thread(server.stop, GRACE + 30)
        for outcome in await asyncio.gather(*asked):
            book.counts["last", outcome] += 1
    if status != 0:
        book.violation(f"the server ended with {status} after SIGTERM")


def judge_memory(trends: dict[str, Trend], most: float, book: Book) -> None:
    """Growth is a violation, and so is not to have measured the server."""
    for name, trend in trends.items():
        # What one batch takes varies by some per cent of a large model, and a sharer that is killed soon has read few.
        if trend.growth > max(most, 0.03 * trend.first):
            book.violation(f"memory of the {name} has grown by {trend.growth:.0f} MB, {trend.slope:.1f} MB per minute")
    if "server" not in trends:
        book.violation("the soak was too short to measure the server's memory")


def report(book: Book, trends: dict[str, Trend], args: argparse.Namespace) -> None:
    """Print all as Markdown; write it to a file if asked to."""
    print(f"\n{book.table()}\n")
    print("| memory, MB | first third | last third | growth | peak | per minute |\n|---|---:|---:|---:|---:|---:|")
    for name, trend in trends.items():
        print(
            f"| {name} | {trend.first:.0f} | {trend.last:.0f} | {trend.growth:+.1f} | {trend.peak:.0f} "
            f"| {trend.slope:+.2f} |"
        )
    away = sum(outage.ended - outage.begun for outage in book.outages)
    print(f"\nthe sharer died {len(book.outages)} times and was away for {away:.0f} s in all")
    print(f"{len(book.violations)} violations\n{book.listing()}")
    if args.out:
        result = {
            "command": sys.argv[1:],
            "counts": [[*key, count] for key, count in sorted(book.counts.items())],
            "memory": {name: asdict(trend) | {"growth": trend.growth} for name, trend in trends.items()},
            "outages": [asdict(outage) for outage in book.outages],
            "violations": book.violations,
        }
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.exit(main())
