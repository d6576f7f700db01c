"""Seconds of each stage, and C2C against the other ways of answering, for one pair.

    python benchmarks/latency.py --out latency.json

Every number is the median of several repetitions after a warm-up, in one run on one machine; cells of more than 2,048
prompt tokens and text-to-text are measured once. Compare ratios, not seconds.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import time
from importlib.resources import files
from pathlib import Path

import torch

from cache2cache import C2C
from cache2cache.evaluate.questions import read_questions
from cache2cache.evaluate.systems import MESSAGE_PROMPT, with_last
from cache2cache.types import Conversation, Timings

ANSWER_TOKENS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--receiver", default="smollm2-135m")
    parser.add_argument("--sharer", default="qwen2.5-coder-1.5b")
    parser.add_argument("--fuser", default="demo")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--messages", type=int, nargs="+", default=[64, 256], help="text-to-text message tokens")
    parser.add_argument("--end-to-end-length", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    pair = C2C.from_pretrained(args.receiver, sharers=[args.sharer], fusers=[args.fuser], device=args.device)
    result = {
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "stages": [stages(pair, n, b, args.repeat) for b in args.batches for n in args.lengths],
        "end_to_end": end_to_end(pair, args.end_to_end_length, args.messages, args.repeat),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))
    report(result)


def conversation(pair: C2C, tokens: int) -> Conversation:
    """A user turn of real questions whose prompt has about `tokens` receiver tokens."""
    rows = read_questions(str(files("cache2cache") / "data" / "demo_questions.jsonl"))
    text = "\n\n".join(row.messages()[0]["content"] for row in rows * 8)
    ids = pair.receiver.tokenizer(text)["input_ids"]
    frame = pair.prepare([[{"role": "user", "content": ""}]], []).ids.shape[1]
    return [{"role": "user", "content": pair.receiver.tokenizer.decode(ids[: tokens - frame])}]


def stages(pair: C2C, tokens: int, batch: int, repeat: int) -> dict:
    """Median seconds of each stage up to the first token."""
    batched = [conversation(pair, tokens)] * batch
    runs: list[Timings] = []
    times = repeat + 1 if tokens * batch <= 2048 else 1
    for _ in range(times):
        answers = pair.generate(batched, max_new_tokens=1, do_sample=False)
        runs.append(answers[0].timings)
    median = {stage: statistics.median(getattr(run, stage) for run in (runs[1:] or runs)) for stage in vars(runs[0])}
    prefills = median["sharer_prefill"] + median["receiver_prefill"]
    return {
        "tokens": answers[0].counts.receiver_prompt,
        "sharer_tokens": answers[0].counts.sharer_prompt[0],
        "batch": batch,
        **median,
        "fuse_over_prefills": median["fuse"] / prefills,
        "first_token_over_prefills": sum(median.values()) / prefills,
    }


def end_to_end(pair: C2C, tokens: int, messages: list[int], repeat: int) -> dict:
    """Median seconds from messages to an answer of ANSWER_TOKENS tokens, batch 1."""
    asked = conversation(pair, tokens)
    (sharer,), (fuser,) = pair.sharers, pair.fusers
    answering, writing = C2C(sharer, template=fuser.config.sharer_template), C2C(sharer)
    exactly = {"do_sample": False, "min_new_tokens": ANSWER_TOKENS, "max_new_tokens": ANSWER_TOKENS}

    def text_to_text(size: int) -> None:
        request = with_last(asked, MESSAGE_PROMPT.format(topic=asked[-1]["content"]))
        message = writing.generate(request, do_sample=False, min_new_tokens=size, max_new_tokens=size)
        pair.generate(with_last(asked, f"{message.text}\n\n{asked[-1]['content']}"), sharers=[], **exactly)

    ways = {
        "c2c": lambda: pair.generate(asked, **exactly),
        "receiver": lambda: pair.generate(asked, sharers=[], **exactly),
        "sharer": lambda: answering.generate(asked, **exactly),
    } | {f"text-to-text {size}": lambda size=size: text_to_text(size) for size in messages}
    seconds = {name: _median(way, 1 if name.startswith("text") else repeat) for name, way in ways.items()}
    return {"tokens": tokens, "seconds": seconds, "over_c2c": {k: v / seconds["c2c"] for k, v in seconds.items()}}


def _median(way, repeat: int) -> float:
    times = []
    for i in range(repeat + 1):
        start = time.perf_counter()
        way()
        if i or repeat == 1:
            times.append(time.perf_counter() - start)
        if repeat == 1:
            break
    return statistics.median(times)


def report(result: dict) -> None:
    """Print the result as Markdown."""
    print(
        "| batch | tokens | sharer prefill | receiver prefill | fuse | decode 1 | fuse / prefills | first token / prefills |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for row in result["stages"]:
        print(
            f"| {row['batch']} | {row['tokens']} | {row['sharer_prefill']:.2f} s | {row['receiver_prefill']:.2f} s "
            f"| {row['fuse'] * 1000:.0f} ms | {row['decode'] * 1000:.0f} ms "
            f"| {row['fuse_over_prefills']:.1%} | {row['first_token_over_prefills']:.2f} |"
        )
    print(
        f"\n| {result['end_to_end']['tokens']} tokens in, {ANSWER_TOKENS} out | seconds | times C2C |\n|---|---:|---:|"
    )
    for name, seconds in result["end_to_end"]["seconds"].items():
        print(f"| {name} | {seconds:.2f} | {result['end_to_end']['over_c2c'][name]:.2f} |")
    print(f"\npeak memory {result['peak_memory_gb']} GB")


if __name__ == "__main__":
    main()
