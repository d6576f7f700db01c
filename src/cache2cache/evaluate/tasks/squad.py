"""SQuAD 1.1: questions whose answer is a few words of a passage. Rajpurkar et al., arXiv 1606.05250.

The development split is asked; the test split is not public.
"""

from dataclasses import dataclass
from typing import Any

from cache2cache.errors import DataError
from cache2cache.evaluate.items import Item
from cache2cache.evaluate.tasks.base import Row, Source
from cache2cache.evaluate.tasks.text import ShortAnswerTask

_HUB = ("rajpurkar/squad", ("plain_text",))
_REVISION = "7b6d24c440a36b6815f21b70d25016731768db1f"


@dataclass(frozen=True)
class SQuAD(ShortAnswerTask):
    """Short answers from a passage. Rows: id, title, context, question, answers."""

    def item(self, row: Row) -> Item:
        """See `Task.item`."""
        if row.get("context") is None:
            raise DataError("not a SQuAD row", got=", ".join(row), allowed="id, title, context, question, answers")
        return super().item(row)

    def from_hub(self, row: Row, config: str) -> dict[str, Any]:
        """See `Task.from_hub`. The hub keeps answers as {text, answer_start}."""
        return {**row, "answers": list(row["answers"]["text"])}


TASK = SQuAD(
    name="squad",
    title="SQuAD",
    licence="CC BY-SA 4.0",
    sources={
        "test": Source("squad/dev", *_HUB, "validation", _REVISION),
        "train": Source("squad/train", *_HUB, "train", _REVISION),
    },
)
