"""Throw damaged payloads and random bytes at the parser; only `PayloadError` may come out, and memory must stay flat.

    python benchmarks/fuzz_payload.py --seconds 1800

Most inputs are changed behind a right digest (and signature), since otherwise nothing but the digest would be tested.
The same seed gives the same inputs. Exits with 1, and leaves the input in a file, at the first one that breaks a promise.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import random
import resource
import sys
import time
from pathlib import Path

from fuzz_inputs import DAMAGED, MAKERS, make, valid_payloads

from cache2cache.errors import PayloadError
from cache2cache.serve.payload import SharerCache

MAX_BYTES = 1 << 20
MAX_GROWTH_MB = 64
"""Several times what three caches of MAX_BYTES take; one length that is believed costs more."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--failure", type=Path, default=Path("fuzz-failure.bin"), help="where a failing input is kept")
    args = parser.parse_args()
    faulthandler.enable()  # a crash of native code shows where

    dice, valid = random.Random(args.seed), valid_payloads()
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for data, key in valid:
        SharerCache.from_bytes(data, max_bytes=MAX_BYTES, key=key)
    memory, start, shown = peak_mb(), time.monotonic(), 0.0
    while (elapsed := time.monotonic() - start) < args.seconds:
        kind, data, key = make(dice, valid)
        if fault := fault_of(data, key, counts, kind) or grown(memory):
            args.failure.write_bytes(data)
            print(
                f"FAILED after {counts.total():,} inputs, seed {args.seed}, {kind}, {'signed' if key else 'unsigned'}"
            )
            print(f"{fault}; the input is in {args.failure}")
            return 1
        if elapsed - shown >= 60:
            shown = elapsed
            print(f"{elapsed:.0f} s, {counts.total():,} inputs, {peak_mb() - memory:.1f} MB more", flush=True)
    report(counts, args.seconds, args.seed, peak_mb() - memory)
    return 0


def fault_of(data: bytes, key: bytes | None, counts: collections.Counter[tuple[str, str]], kind: str) -> str | None:
    """Read one input and count the outcome; what is wrong if it breaks a promise."""
    try:
        cache = SharerCache.from_bytes(data, max_bytes=MAX_BYTES, key=key)
    except PayloadError as error:
        str(error)  # formatting must not fail either
        counts[kind, error.what] += 1
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # panics of native code are not Exceptions
        return f"{type(error).__name__}: {str(error)[:500]}"
    else:
        counts[kind, "read"] += 1
        if cache.kv.nbytes > MAX_BYTES or not cache.kv.isfinite().all():
            return "a cache came out that is too large or not finite"
        if kind in DAMAGED:
            return "an input that cannot have a right digest was read"
    return None


def grown(before: float) -> str | None:
    """Whether memory has grown beyond the bound."""
    more = peak_mb() - before
    return f"memory has grown by {more:.0f} MB" if more > MAX_GROWTH_MB else None


def peak_mb() -> float:
    """Most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**10 if sys.platform != "darwin" else 2**20)


def report(counts: collections.Counter[tuple[str, str]], seconds: float, seed: int, more_mb: float) -> None:
    """Print the counts as Markdown."""
    print(
        f"\n{counts.total():,} inputs in {seconds:.0f} s, seed {seed}: nothing but PayloadError, {more_mb:.1f} MB more memory\n"
    )
    print("| input | refused | read | most frequent reasons |\n|---|---:|---:|---|")
    for kind in dict.fromkeys(MAKERS):
        outcomes = collections.Counter({what: n for (made, what), n in counts.items() if made == kind})
        read = outcomes.pop("read", 0)
        reasons = "; ".join(f"{what} ({n:,})" for what, n in outcomes.most_common(3))
        print(f"| {kind} | {outcomes.total():,} | {read:,} | {reasons} |")


if __name__ == "__main__":
    sys.exit(main())
