"""Tasks that are answered with a few words, scored as in SQuAD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from cache2cache.evaluate.extract import squad_scores
from cache2cache.evaluate.items import Answer, Item
from cache2cache.evaluate.tasks.base import Kind, Row, Scored, Task, checked, nats_per_token
from cache2cache.evaluate.tasks.choice import one_turn

Text = Annotated[str, StringConstraints(pattern=r"\S")]
"""Text that is not blank."""


class ShortAnswerRow(BaseModel):
    """One question with every answer that counts as right."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    title: str
    context: Text | None = None
    """A passage that holds the answer."""
    question: Text
    answers: Annotated[list[Text], Field(min_length=1)]
    """The first is the reference whose likelihood is measured."""


@dataclass(frozen=True)
class ShortAnswerTask(Task):
    """Short answers, scored by the words that they share with the nearest accepted one, and by exact match."""

    kind: ClassVar[Kind] = "generation"
    metrics: ClassVar[tuple[str, ...]] = ("f1", "em", "nats")

    def item(self, row: Row) -> Item:
        """See `Task.item`."""
        return short_answer_item(self.name, checked(ShortAnswerRow, row, "short-answer"))

    def score(self, item: Item, answer: Answer) -> Scored:
        """See `Task.score`. An answer without text is a format failure and wrong."""
        text = answer.text.strip()
        em, f1 = squad_scores(text, item.accepted) if text else (0.0, 0.0)
        return Scored(text or None, {"f1": f1, "em": em, "nats": nats_per_token(answer)})


def short_answer_item(task: str, row: ShortAnswerRow) -> Item:
    """A row in all wordings."""
    bare = f"Question: {row.question}"
    ask = "Answer with a few words."
    if row.context is not None:
        bare = f"Context: {row.context}\n\n{bare}"
        ask = "Answer with a few words from the context."
    return Item(
        task=task,
        id=row.id,
        subject=row.title,
        wordings={"plain": one_turn(f"{bare}\n{ask}"), "bare": one_turn(bare)},
        topic=row.question,
        target=row.answers[0],
        accepted=tuple(dict.fromkeys(row.answers)),
        max_new_tokens=32,
    )
