"""GSM8K: grade-school word problems, answered with a number at the end of a derivation. Cobbe et al., arXiv 2110.14168."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from cache2cache.errors import DataError
from cache2cache.evaluate.extract import extract_number, same_number
from cache2cache.evaluate.items import Answer, Item
from cache2cache.evaluate.tasks.base import Kind, Row, Scored, Source, Task, checked, nats_per_token
from cache2cache.evaluate.tasks.choice import one_turn
from cache2cache.evaluate.tasks.text import Text

_HUB = ("openai/gsm8k", ("main",))
_REVISION = "740312add88f781978c0658806c59bc2815b9866"
_MARK = "####"
"""Stands between a solution and its number."""
_CALCULATOR = re.compile(r"<<[^<>]*>>")
"""Calculator annotations inside a solution, <<9*2=18>>."""


class GSM8KRow(BaseModel):
    """One problem."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    question: Text
    answer: Text
    """The solution, ending in "#### 18"."""
    final: Text
    """The number."""


@dataclass(frozen=True)
class GSM8K(Task):
    """Word problems. The target is the reference solution, so that its likelihood can be measured; what an answer is
    compared with is the number in `accepted`."""

    kind: ClassVar[Kind] = "generation"
    metrics: ClassVar[tuple[str, ...]] = ("correct", "nats")

    def item(self, row: Row) -> Item:
        """See `Task.item`."""
        problem = checked(GSM8KRow, row, "GSM8K")
        solution, mark, _ = problem.answer.partition(_MARK)
        if not mark:
            raise DataError("a GSM8K solution without its number", got=problem.answer[-40:], allowed=f"… {_MARK} 18")
        return Item(
            task=self.name,
            id=problem.id,
            subject=self.name,
            wordings={
                "plain": one_turn(f"{problem.question}\nThink step by step, then end with 'The answer is N.'"),
                "bare": one_turn(f"Question: {problem.question}"),
            },
            topic=problem.question,
            target=f"{_CALCULATOR.sub('', solution).strip()}\nThe answer is {problem.final}.",
            accepted=(problem.final,),
            max_new_tokens=256,
            one_line=False,
        )

    def score(self, item: Item, answer: Answer) -> Scored:
        """See `Task.score`."""
        number = extract_number(answer.text)
        right = number is not None and same_number(number, item.accepted[0])
        return Scored(number, {"correct": float(right), "nats": nats_per_token(answer)})

    def from_hub(self, row: Row, config: str) -> dict[str, Any]:
        """See `Task.from_hub`."""
        _, _, final = row["answer"].partition(_MARK)
        return {**row, "final": final.strip().replace(",", "")}


TASK = GSM8K(
    name="gsm8k",
    title="GSM8K",
    licence="MIT",
    sources={
        "test": Source("gsm8k/test", *_HUB, "test", _REVISION),
        "train": Source("gsm8k/train", *_HUB, "train", _REVISION),
    },
)
