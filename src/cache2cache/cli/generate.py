"""`c2c generate`: one prompt, one answer."""

from __future__ import annotations

import json as jsonlib
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from cache2cache.cli import answer as show
from cache2cache.cli import pair as options

if TYPE_CHECKING:
    from cache2cache.types import Message


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="What the user says; `-`, or nothing with a pipe, reads it from stdin.")
    ] = None,
    receiver: options.Receiver = options.DEMO_RECEIVER,
    sharer: options.Sharers = None,
    fuser: options.Fusers = None,
    no_sharer: options.NoSharer = False,
    mode: options.Mode = "parallel",
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Write the answer as it comes.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Text, token ids, counts and timings as JSON.")] = False,
    timings: options.ShowTimings = True,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    num_beams: Annotated[int, typer.Option(min=1, help="Beam search.", rich_help_panel="Decoding")] = 1,
    device: options.Device = "cpu",
    sharer_device: options.SharerDevice = None,
    dtype: options.Dtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    sharer_token_file: options.SharerTokenFile = None,
    sharer_key_file: options.SharerKeyFile = None,
    sharer_precision: options.SharerPrecision = None,
    sharer_timeout: options.SharerTimeout = None,
    on_sharer_failure: options.OnSharerFailure = "fail",
) -> None:
    """Answer a prompt from a fused cache.

    Without options the demo pair answers. The answer goes to stdout, everything else to stderr.
    """
    if stream and json:
        raise typer.BadParameter("--stream and --json cannot go together")
    if stream and num_beams > 1:
        raise typer.BadParameter("beam search cannot be streamed: leave out --stream or --num-beams")
    kwargs = options.generate_kwargs(max_new_tokens, temperature, top_p, num_beams)
    messages: list[Message] = [{"role": "user", "content": read_prompt(prompt)}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    pair = options.load_pair(
        receiver,
        sharer,
        fuser,
        no_sharer=no_sharer,
        mode=mode,
        device=device,
        sharer_device=sharer_device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        elsewhere=options.Elsewhere(
            sharer_token_file, sharer_key_file, sharer_precision, sharer_timeout, on_sharer_failure
        ),
    )
    options.set_seed(seed)
    if stream:
        result = show.write(pair.stream(messages, **kwargs))
    else:
        (result,) = pair.decode(pair.prefill(messages), **kwargs)
        typer.echo(jsonlib.dumps(show.as_json(pair, result), ensure_ascii=False) if json else result.text)
    show.warn_if_degraded(pair, result)
    if timings and not json:
        show.print_summary(pair, result)


def read_prompt(prompt: str | None) -> str:
    """The argument, or all of stdin without its last line break."""
    if prompt is None and sys.stdin.isatty():
        raise typer.BadParameter("no prompt: give it as an argument or through a pipe")
    text = sys.stdin.read().removesuffix("\n") if prompt is None or prompt == "-" else prompt
    if not text.strip():
        raise typer.BadParameter("the prompt is empty")
    return text
