"""Options that name a pair and say how it answers, shared by the commands that load one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cache2cache.cli.extras import need
from cache2cache.types import SharerPolicy

if TYPE_CHECKING:
    from cache2cache.pipeline import C2C
    from cache2cache.serve.remote import RemoteOptions

SHARER_TOKEN, SHARER_KEY = "C2C_SHARER_TOKEN", "C2C_SHARER_KEY"
"""Environment variables, instead of the files."""

DEMO_RECEIVER = "smollm2-135m"
DEMO_SHARER = "qwen2.5-coder-1.5b"
DEMO_FUSER = "demo"

_MODEL = "a catalogue name, a hub id (id@revision pins it) or a folder"

Receiver = Annotated[
    str, typer.Option("--receiver", "-r", help=f"The model that answers: {_MODEL}.", rich_help_panel="Pair")
]
Sharers = Annotated[
    list[str] | None,
    typer.Option(
        "--sharer",
        "-s",
        help="A model it listens to, or http://… of a c2c share; repeat for several.",
        show_default=DEMO_SHARER,
        rich_help_panel="Pair",
    ),
]
Fusers = Annotated[
    list[str] | None,
    typer.Option(
        "--fuser",
        "-f",
        help="One per sharer, in the same order: a folder or a hub id.",
        show_default=f"{DEMO_FUSER}, for the default pair",
        rich_help_panel="Pair",
    ),
]
NoSharer = Annotated[bool, typer.Option("--no-sharer", help="The receiver alone.", rich_help_panel="Pair")]
Mode = Annotated[
    Literal["parallel", "sequential"], typer.Option(help="How several sharers are combined.", rich_help_panel="Pair")
]
SharerTokenFile = Annotated[
    Path | None,
    typer.Option(
        help="Bearer token of sharers elsewhere.",
        show_default=f"${SHARER_TOKEN}, or none",
        rich_help_panel="Sharers elsewhere",
    ),
]
SharerKeyFile = Annotated[
    Path | None,
    typer.Option(
        help="Key that sharers elsewhere must sign with.",
        show_default=f"${SHARER_KEY}, or unsigned",
        rich_help_panel="Sharers elsewhere",
    ),
]
SharerPrecision = Annotated[
    Literal["float32", "bfloat16", "int8", "int4"] | None,
    typer.Option(
        help="That caches travel in.", show_default="as the sharer computes them", rich_help_panel="Sharers elsewhere"
    ),
]
SharerTimeout = Annotated[
    float | None,
    typer.Option(min=0.1, help="Seconds to wait for a sharer.", show_default="30", rich_help_panel="Sharers elsewhere"),
]
OnSharerFailure = Annotated[
    Literal["fail", "receiver-alone"],
    typer.Option(
        help="When a sharer elsewhere fails: fail as well, or answer without it and say so.",
        rich_help_panel="Sharers elsewhere",
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, …", rich_help_panel="Machine")]
SharerDevice = Annotated[
    str | None, typer.Option(help="Where the sharers run.", show_default="the same", rich_help_panel="Machine")
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Of all models; auto is what the weights are stored in.", rich_help_panel="Machine"),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with a hub model.", rich_help_panel="Machine")
]

MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, help="Longest answer.", show_default="256", rich_help_panel="Decoding")
]
Temperature = Annotated[
    float | None,
    typer.Option(
        min=0, help="Sample with this temperature; 0 is greedy.", show_default="greedy", rich_help_panel="Decoding"
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Sample from the likeliest tokens of this mass.", rich_help_panel="Decoding"),
]
LARGEST_SEED = 2**32 - 1
"""NumPy's."""
Seed = Annotated[int | None, typer.Option(min=0, max=LARGEST_SEED, help="Of the sampling.", rich_help_panel="Decoding")]
ShowTimings = Annotated[bool, typer.Option(help="Show tokens and seconds of each stage on stderr.")]


@dataclass(frozen=True)
class Elsewhere:
    """What the options say about sharers elsewhere."""

    token_file: Path | None = None
    key_file: Path | None = None
    precision: Literal["float32", "bfloat16", "int8", "int4"] | None = None
    timeout: float | None = None
    on_failure: SharerPolicy = "fail"

    def remote(self, sharers: Sequence[str]) -> RemoteOptions | None:
        """How they are asked; None if all sharers are here.

        Raises:
            typer.BadParameter: options for sharers elsewhere, and there is none.
            RequestError: a secret that cannot be used.
        """
        if not any(map(_elsewhere, sharers)):
            if self != Elsewhere():
                raise typer.BadParameter(
                    "--sharer-token-file, --sharer-key-file, --sharer-precision, --sharer-timeout and "
                    "--on-sharer-failure need a --sharer http://…"
                )
            return None
        need("a sharer elsewhere", "serve", ["httpx2", "starlette"])
        from cache2cache.serve.keys import secret
        from cache2cache.serve.remote import RemoteOptions

        token, key = secret(SHARER_TOKEN, self.token_file), secret(SHARER_KEY, self.key_file)
        options = RemoteOptions(token, None if key is None else key.encode(), self.precision)
        return options if self.timeout is None else replace(options, timeout=self.timeout)


def load_pair(
    receiver: str,
    sharers: list[str] | None,
    fusers: list[str] | None,
    *,
    no_sharer: bool = False,
    mode: Literal["parallel", "sequential"] = "parallel",
    device: str = "cpu",
    sharer_device: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    elsewhere: Elsewhere = Elsewhere(),
) -> C2C:
    """Load what the options name, after everything that can be checked without loading.

    Raises:
        typer.BadParameter: options that contradict each other.
    """
    sharers, fusers = complete(receiver, sharers, fusers, no_sharer)
    remote = elsewhere.remote(sharers)
    with Busy(f"loading {receiver}{' ← ' if sharers else ''}{', '.join(sharers)}"):
        quiet_transformers()
        for name in {device, sharer_device or device}:
            check_device(name)
        from cache2cache.pipeline import C2C

        return C2C.from_pretrained(
            receiver,
            sharers,
            fusers,
            device=device,
            sharer_device=sharer_device,
            dtype=dtype,
            mode=mode,
            trust_remote_code=trust_remote_code,
            remote=remote,
            on_sharer_failure=elsewhere.on_failure,
        )


def complete(
    receiver: str, sharers: list[str] | None, fusers: list[str] | None, no_sharer: bool
) -> tuple[list[str], list[str]]:
    """Sharers and fusers with their defaults filled in."""
    if no_sharer:
        if sharers or fusers:
            raise typer.BadParameter("--no-sharer goes with neither --sharer nor --fuser")
        return [], []
    sharers = sharers or [DEMO_SHARER]
    # What a sharer elsewhere is, it says itself; the demo's fuser then refuses any but the demo's.
    demo_sharer = len(sharers) == 1 and (sharers[0] == DEMO_SHARER or _elsewhere(sharers[0]))
    if not fusers and receiver == DEMO_RECEIVER and demo_sharer:
        fusers = [DEMO_FUSER]
    if len(fusers or ()) != len(sharers):
        raise typer.BadParameter(
            f"{receiver} ← {', '.join(sharers)} needs one --fuser per sharer, got {len(fusers or ())}"
        )
    return sharers, fusers or []


def _elsewhere(sharer: str) -> bool:
    return sharer.startswith(("http://", "https://"))


def check_device(name: str) -> None:
    """As `models.load.check_device`, for which torch is imported only now."""
    from cache2cache.models import load

    load.check_device(name)


def generate_kwargs(
    max_new_tokens: int | None, temperature: float | None, top_p: float | None, num_beams: int = 1
) -> dict[str, Any]:
    """What `transformers.generate` is asked for: greedy unless asked to sample, whatever the model's config says.

    Raises:
        typer.BadParameter: options that contradict each other.
    """
    if temperature == 0 and top_p is not None:
        raise typer.BadParameter("--temperature 0 is greedy, so --top-p would do nothing: leave one of them out")
    sample = bool(temperature) or top_p is not None
    from cache2cache.decoding import PLAIN

    kwargs: dict[str, Any] = {**PLAIN, "do_sample": sample, "num_beams": num_beams}
    if max_new_tokens is not None:
        kwargs["max_new_tokens"] = max_new_tokens
    if sample:
        # top_k is a silent 50 in transformers; here only what was asked for counts.
        kwargs |= {"temperature": temperature or 1.0, "top_p": 1.0 if top_p is None else top_p, "top_k": 0}
    return kwargs


def set_seed(seed: int | None) -> None:
    """Of the sampling. After loading, which may draw random numbers."""
    if seed is not None:
        import transformers

        transformers.set_seed(seed)


def quiet_transformers() -> None:
    """Keep its progress bars and advice off the terminal; its errors still come through."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


class Busy:
    """A spinner on stderr while something takes a while; nothing at all when nobody watches."""

    def __init__(self, what: str):
        self._what = what
        self._status: Any = None

    def __enter__(self) -> None:
        if sys.stderr.isatty():
            from rich.console import Console

            self._status = Console(stderr=True).status(self._what)
            self._status.start()

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()
