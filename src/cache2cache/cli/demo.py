"""`c2c demo`: real questions, four ways of answering, side by side."""

from __future__ import annotations

import time
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache2cache.cli.pair import DEMO_FUSER, DEMO_RECEIVER, DEMO_SHARER, load_pair

if TYPE_CHECKING:
    from rich.table import Table

    from cache2cache.evaluate.items import Answer, Item

SYSTEMS = {"receiver": "receiver", "sharer": "sharer", "t2t": "text-to-text", "c2c": "c2c"}
"""Name → heading."""

# Chosen on training rows, see docs/results.md.
RECEIVER_FORM, SHARER_FORM = "chat", "quiz"


def demo(
    limit: Annotated[int, typer.Option(min=1, max=16, help="How many of the 16 bundled questions to ask.")] = 8,
    message_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a text-to-text message.")] = 64,
) -> None:
    """Ask real benchmark questions of receiver alone, sharer alone, text-to-text and C2C, and compare."""
    from rich.console import Console
    from rich.live import Live

    from cache2cache.evaluate.build import Ingredients, build
    from cache2cache.evaluate.forms import named
    from cache2cache.evaluate.names import parse
    from cache2cache.evaluate.prefills import Prefills
    from cache2cache.evaluate.questions import read_questions
    from cache2cache.evaluate.tasks.choice import choice_item
    from cache2cache.models.pull import pull

    console = Console()
    for name in (DEMO_RECEIVER, DEMO_SHARER):
        pull(name)
    pair = load_pair(DEMO_RECEIVER, [DEMO_SHARER], [DEMO_FUSER])
    questions = read_questions(str(files("cache2cache") / "data" / "demo_questions.jsonl"))[:limit]
    items = [choice_item("demo", question) for question in questions]
    console.print(
        f"receiver [bold]{DEMO_RECEIVER}[/] ← sharer [bold]{DEMO_SHARER}[/], "
        f"{len(items)} test questions, greedy. – names no letter.\n"
    )
    receiver_forms, sharer_forms = {"choice": named(RECEIVER_FORM)}, {"choice": named(SHARER_FORM)}
    ways = build(
        Ingredients(pair, Prefills(), receiver_forms, [sharer_forms], message_tokens=message_tokens),
        parse(",".join(SYSTEMS)),
    )
    start = time.perf_counter()
    rows: list[tuple[Item, dict[str, Answer]]] = []
    with Live(console=console, refresh_per_second=4) as live:
        for item in items:
            answers: dict[str, Answer] = {}
            rows.append((item, answers))
            for name in SYSTEMS:
                ways.clear()  # every system reads everything itself, so that the seconds are its own
                (answers[name],) = ways.by_name[name].answer([item])
                live.update(_table(rows, console.width))
    console.print("\n", _totals(rows), sep="")
    seconds = time.perf_counter() - start
    console.print(
        f"{len(items)} asked in {seconds:.0f} s. So few show how it works, not how well: "
        "the README has accuracies with intervals.",
        style="dim",
        highlight=False,
    )


def _table(rows: list[tuple[Item, dict[str, Answer]]], width: int) -> Table:
    from rich.text import Text

    table = _plain_table()
    table.add_column("set", style="dim", no_wrap=True)
    table.add_column("question", no_wrap=True)
    table.add_column("right", justify="center", no_wrap=True)
    for heading in SYSTEMS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    room = max(16, min(70, width - 62))  # what the other columns leave
    for item, answers in rows:
        text = Text(item.topic.replace("\n", " "))
        text.truncate(room, overflow="ellipsis")
        cells = [_cell(item, answers[name]) if name in answers else "…" for name in SYSTEMS]
        table.add_row(_set(item), text, item.target, *cells)
    return table


def _plain_table(**options: Any) -> Table:
    from rich.table import Table

    return Table(box=None, pad_edge=False, **options)


def _set(item: Item) -> str:
    short = {"arc_easy": "ARC-E", "arc_challenge": "ARC-C", "openbookqa": "OBQA"}
    return short.get(item.subject, "MMLU-R")


def _letter(item: Item, answer: Answer) -> str | None:
    from cache2cache.evaluate.extract import extract_letter

    return extract_letter(answer.text, item.letters)


def _cell(item: Item, answer: Answer) -> str:
    letter = _letter(item, answer)
    mark = "[green]✓[/]" if letter == item.target else "[red]✗[/]"
    return f"{letter or '–'} {mark} {answer.seconds:4.1f}s"


def _totals(rows: list[tuple[Item, dict[str, Answer]]]) -> Table:
    table = _plain_table(title="totals", title_justify="left")
    for column in ("", "right", "no letter", "seconds each", "sharer wrote"):
        table.add_column(column, justify="left" if not column else "right")
    for name, heading in SYSTEMS.items():
        answers = [(item, found[name]) for item, found in rows]
        letters = [(_letter(item, answer), item.target) for item, answer in answers]
        written = sum(answer.cost.sharer_wrote for _, answer in answers)
        table.add_row(
            heading,
            f"{sum(got == want for got, want in letters)} of {len(rows)}",
            str(sum(got is None for got, _ in letters)),
            f"{sum(answer.seconds for _, answer in answers) / len(rows):.1f}",
            str(written),
        )
    return table
