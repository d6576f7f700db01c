"""`c2c demo`: real questions, four ways of answering, side by side."""

from __future__ import annotations

import time
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache2cache.cli.pair import DEMO_FUSER, DEMO_RECEIVER, DEMO_SHARER, load_pair

if TYPE_CHECKING:
    from rich.table import Table

    from cache2cache.evaluate.questions import Question
    from cache2cache.evaluate.systems import Answer

SYSTEMS = ("receiver", "sharer", "text-to-text", "c2c")


def demo(
    limit: Annotated[int, typer.Option(min=1, max=16, help="How many of the 16 bundled questions to ask.")] = 8,
    message_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a text-to-text message.")] = 64,
) -> None:
    """Ask real benchmark questions of receiver alone, sharer alone, text-to-text and C2C, and compare."""
    from rich.console import Console
    from rich.live import Live

    from cache2cache.evaluate.questions import read_questions
    from cache2cache.evaluate.systems import systems
    from cache2cache.models.pull import pull

    console = Console()
    for name in (DEMO_RECEIVER, DEMO_SHARER):
        pull(name)
    pair = load_pair(DEMO_RECEIVER, [DEMO_SHARER], [DEMO_FUSER])
    questions = read_questions(str(files("cache2cache") / "data" / "demo_questions.jsonl"))[:limit]
    console.print(
        f"receiver [bold]{DEMO_RECEIVER}[/] ← sharer [bold]{DEMO_SHARER}[/], "
        f"{len(questions)} test questions, greedy. – names no letter.\n"
    )
    stems = {q.messages()[0]["content"]: q.question for q in questions}
    ways = systems(
        pair,
        message_tokens=message_tokens,
        topic=lambda conversation: stems[conversation[-1]["content"]],
        max_new_tokens=8,
        stop_strings=["\n"],  # a sharer that completes text would go on with the next question
    )
    start = time.perf_counter()
    rows: list[tuple[Question, dict[str, Answer]]] = []
    with Live(console=console, refresh_per_second=4) as live:
        for question in questions:
            answers: dict[str, Answer] = {}
            rows.append((question, answers))
            for name in SYSTEMS:
                (answers[name],) = ways[name]([question.messages()])
                live.update(_table(rows, console.width))
    console.print("\n", _totals(rows), sep="")
    seconds = time.perf_counter() - start
    console.print(
        f"{len(questions)} asked in {seconds:.0f} s. So few show how it works, not how well: "
        "the README has accuracies with intervals.",
        style="dim",
        highlight=False,
    )


def _table(rows: list[tuple[Question, dict[str, Answer]]], width: int) -> Table:
    from rich.text import Text

    table = _plain_table()
    table.add_column("set", style="dim", no_wrap=True)
    table.add_column("question", no_wrap=True)
    table.add_column("right", justify="center", no_wrap=True)
    for name in SYSTEMS:
        table.add_column(name, justify="right", no_wrap=True)
    room = max(16, min(70, width - 62))  # what the other columns leave
    for question, answers in rows:
        text = Text(question.question.replace("\n", " "))
        text.truncate(room, overflow="ellipsis")
        cells = [_cell(question, answers[name]) if name in answers else "…" for name in SYSTEMS]
        table.add_row(_set(question), text, question.letter, *cells)
    return table


def _plain_table(**options: Any) -> Table:
    from rich.table import Table

    return Table(box=None, pad_edge=False, **options)


def _set(question: Question) -> str:
    short = {"arc_easy": "ARC-E", "arc_challenge": "ARC-C", "openbookqa": "OBQA"}
    return short.get(question.subject, "MMLU-R")


def _letter(question: Question, answer: Answer) -> str | None:
    from cache2cache.evaluate.systems import extract_letter

    return extract_letter(answer.generation.text, question.letters)


def _cell(question: Question, answer: Answer) -> str:
    letter = _letter(question, answer)
    mark = "[green]✓[/]" if letter == question.letter else "[red]✗[/]"
    return f"{letter or '–'} {mark} {answer.seconds:4.1f}s"


def _totals(rows: list[tuple[Question, dict[str, Answer]]]) -> Table:
    table = _plain_table(title="totals", title_justify="left")
    for column in ("", "right", "no letter", "seconds each", "sharer wrote"):
        table.add_column(column, justify="left" if not column else "right")
    for name in SYSTEMS:
        answers = [(question, found[name]) for question, found in rows]
        letters = [(_letter(question, answer), question.letter) for question, answer in answers]
        written = sum(len(answer.message_ids) for _, answer in answers)
        if name == "sharer":
            written = sum(answer.generation.counts.generated for _, answer in answers)
        table.add_row(
            name,
            f"{sum(got == want for got, want in letters)} of {len(rows)}",
            str(sum(got is None for got, _ in letters)),
            f"{sum(answer.seconds for _, answer in answers) / len(rows):.1f}",
            str(written),
        )
    return table
