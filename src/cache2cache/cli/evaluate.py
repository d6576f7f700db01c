"""`c2c eval`: all systems and controls on the same rows; `c2c eval compare`: two such runs side by side."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from cache2cache.cli import extras
from cache2cache.cli import pair as options

app = typer.Typer(help="Compare C2C with every other way of answering, and with controls.")

_TASKS = "Comma-separated names, see `c2c eval tasks`, or .jsonl files of your own rows. `mmlu-redux:1000` asks only 1,000 rows."
_SYSTEMS = "Comma-separated: receiver, sharer, t2t, t2t-fair, routing, c2c. `t2t:300` asks only 300 rows of each task."
_CONTROLS = "Comma-separated: mismatched, zeroed, random, self=FUSER, without-sharer=FUSER."
_FORM = "Prompt form: chat, chat-paper, completion, quiz."


def _need_extra() -> None:
    extras.need("c2c eval", "eval", ("scipy", "matplotlib", "sklearn", "torchmetrics", "math_verify"))


@app.callback(invoke_without_command=True)
def evaluate(
    ctx: typer.Context,
    tasks: Annotated[str | None, typer.Option("--tasks", "-t", help=_TASKS)] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the run; an interrupted one goes on.")
    ] = None,
    receiver: options.Receiver = options.DEMO_RECEIVER,
    sharer: Annotated[
        list[str] | None,
        typer.Option(
            "--sharer",
            "-s",
            help="A model it listens to, here, since it is asked alone, too; repeat for several.",
            show_default=options.DEMO_SHARER,
            rich_help_panel="Pair",
        ),
    ] = None,
    fuser: options.Fusers = None,
    mode: options.Mode = "parallel",
    systems: Annotated[str, typer.Option(help=_SYSTEMS, rich_help_panel="Systems")] = "receiver,sharer,c2c",
    controls: Annotated[str, typer.Option(help=_CONTROLS, rich_help_panel="Systems")] = "mismatched",
    receiver_form: Annotated[
        str | None, typer.Option(help=_FORM, show_default="the best on training rows", rich_help_panel="Systems")
    ] = None,
    sharer_form: Annotated[
        str | None, typer.Option(help=_FORM, show_default="the best on training rows", rich_help_panel="Systems")
    ] = None,
    answer_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of a multiple-choice answer.", rich_help_panel="Systems")
    ] = 16,
    message_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of a text-to-text message.", rich_help_panel="Systems")
    ] = 256,
    routed_share: Annotated[
        float, typer.Option(min=0, max=1, help="Fraction that routing sends to the sharer.", rich_help_panel="Systems")
    ] = 0.5,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Rows of each task.", show_default="all", rich_help_panel="Rows")
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=options.LARGEST_SEED, help="Of the sample, the noise and the router.", rich_help_panel="Rows"
        ),
    ] = 0,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder of data sets, <set>/<split>.jsonl[.zst].", show_default="the hub", rich_help_panel="Rows"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=2, rich_help_panel="Machine")] = 16,
    latency_rows: Annotated[
        int, typer.Option(min=0, help="Rows of each task that are also asked one at a time.", rich_help_panel="Rows")
    ] = 8,
    max_errors: Annotated[
        float,
        typer.Option(min=0, max=1, help="Stop when a system fails on more of a task's rows.", rich_help_panel="Rows"),
    ] = 0.05,
    prefills: Annotated[
        Path | None,
        typer.Option(
            help="Keep prefills in this folder, for later runs.", show_default="none kept", rich_help_panel="Machine"
        ),
    ] = None,
    device: options.Device = "cpu",
    sharer_device: options.SharerDevice = None,
    dtype: options.Dtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Ask the same rows of every system and control, and report accuracies, costs, and whether content crossed.

    Writes rows.jsonl, report.json, report.md and report.html into the folder that --out names. Without a pair the demo pair
    is evaluated.
    """
    if ctx.invoked_subcommand is not None:
        return
    if tasks is None or out is None:
        raise typer.BadParameter("--tasks and --out are needed")
    asked = tuple(name.strip() for name in tasks.split(",") if name.strip())
    if not asked:
        raise typer.BadParameter("no task is named: `c2c eval tasks` lists them", param_hint="--tasks")
    sharers, fusers = options.complete(receiver, sharer, fuser, no_sharer=False)
    options.quiet_transformers()
    for name in {device, sharer_device or device}:
        options.check_device(name)

    _need_extra()
    from rich.console import Console

    from cache2cache.evaluate.evaluation import evaluate as run
    from cache2cache.evaluate.report import print_table
    from cache2cache.evaluate.settings import Machine, Settings

    settings = Settings(
        receiver=receiver, sharers=tuple(sharers), fusers=tuple(fusers), mode=mode, dtype=dtype,
        tasks=asked, systems=systems, controls=controls,
        limit=limit, seed=seed, answer_tokens=answer_tokens, message_tokens=message_tokens, routed_share=routed_share,
        receiver_form=receiver_form, sharer_form=sharer_form, latency_rows=latency_rows,
    )  # fmt: skip
    machine = Machine(device, sharer_device, trust_remote_code, data_dir, prefills, batch_size, max_errors)
    report = run(settings, out, machine, command=shlex.join(["c2c", *sys.argv[1:]]))
    print_table(report, Console())
    typer.echo(f"report: {out / 'report.html'}, {out / 'report.md'}, {out / 'report.json'}")


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Folder of a run.")],
    b: Annotated[Path, typer.Argument(help="Folder of another.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="As Markdown.")] = False,
) -> None:
    """Two runs side by side, with paired differences on the rows that both asked."""
    _need_extra()
    from rich.console import Console

    from cache2cache.evaluate.report import compare as comparing

    found = comparing.compare(a, b)
    if markdown:
        typer.echo(comparing.comparison_markdown(found))
    else:
        comparing.print_comparison(found, Console())


@app.command()
def tasks() -> None:
    """The known tasks, with their licences."""
    from rich.console import Console
    from rich.table import Table

    from cache2cache.evaluate.tasks import TASKS

    table = Table(box=None, pad_edge=False)
    for column in ("task", "", "kind", "licence"):
        table.add_column(column)
    for task in TASKS.values():
        table.add_row(task.name, task.title, task.kind, task.licence)
    Console().print(table)
