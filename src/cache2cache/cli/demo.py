"""`c2c demo`: real questions, four ways of answering, side by side."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from cache2cache.evaluate.questions import Question
    from cache2cache.evaluate.systems import Answer

RECEIVER, SHARER, FUSER = "smollm2-135m", "qwen2.5-coder-1.5b", "demo"
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
    from cache2cache.pipeline import C2C

    console = Console()
    for name in (RECEIVER, SHARER):
        pull(name)
    with _quiet(), console.status("loading the two models and the fuser"):
        pair = C2C.from_pretrained(RECEIVER, sharers=[SHARER], fusers=[FUSER])
    questions = read_questions(str(files("cache2cache") / "data" / "demo_questions.jsonl"))[:limit]
    console.print(f"receiver [bold]{RECEIVER}[/] ← sharer [bold]{SHARER}[/], {len(questions)} test questions, greedy\n")
    ways = systems(pair, message_tokens=message_tokens, max_new_tokens=8)
    start = time.perf_counter()
    rows: list[tuple[Question, dict[str, Answer]]] = []
    with Live(_table(rows), console=console, refresh_per_second=4) as live:
        for question in questions:
            answers: dict[str, Answer] = {}
            rows.append((question, answers))
            for name in SYSTEMS:
                (answers[name],) = ways[name]([question.messages()])
                live.update(_table(rows))
    console.print(_totals(rows))
    console.print(f"{len(questions)} questions in {time.perf_counter() - start:.0f} s. With so few, read the table in the "
                  "README for accuracy; this shows what it looks like.", style="dim", highlight=False)  # fmt: skip


def _table(rows: list[tuple[Question, dict[str, Answer]]]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_lines=False)
    table.add_column("set", style="dim", no_wrap=True)
    table.add_column("question", max_width=44, overflow="ellipsis", no_wrap=True)
    table.add_column("right", justify="center")
    for name in SYSTEMS:
        table.add_column(name, justify="right", no_wrap=True)
    for question, answers in rows:
        cells = [_cell(question, answers[name]) if name in answers else "…" for name in SYSTEMS]
        table.add_row(_set(question), escape(question.question), question.letter, *cells)
    return table


def _set(question: Question) -> str:
    return "mmlu-redux" if question.id.startswith("mmlu_redux") else question.subject.replace("_", "-")


def _letter(question: Question, answer: Answer) -> str | None:
    from cache2cache.evaluate.systems import extract_letter

    return extract_letter(answer.generation.text, question.letters)


def _cell(question: Question, answer: Answer) -> str:
    letter = _letter(question, answer)
    mark = "[green]✓[/]" if letter == question.letter else "[red]✗[/]"
    return f"{letter or '–'} {mark} {answer.seconds:5.1f} s"


def _totals(rows: list[tuple[Question, dict[str, Answer]]]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, title="\ntotals", title_justify="left")
    for column in ("", "right", "no letter", "seconds a question", "tokens written by the sharer"):
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of model loading, which would fight with ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
