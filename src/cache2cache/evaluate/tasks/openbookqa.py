"""OpenBookQA: elementary science that wants a fact and common sense; asked without the facts. arXiv 1809.02789."""

from dataclasses import dataclass
from typing import Any

from cache2cache.evaluate.tasks.base import Row, Source
from cache2cache.evaluate.tasks.choice import ChoiceTask, labelled

_HUB = ("allenai/openbookqa", ("main",))
_REVISION = "388097ea7776314e93a529163e0fea805b8a6454"


@dataclass(frozen=True)
class OpenBookQA(ChoiceTask):
    """OpenBookQA's layout on the hub: the question is called question_stem."""

    def from_hub(self, row: Row, config: str) -> dict[str, Any]:
        """See `Task.from_hub`."""
        return labelled(row, row["question_stem"], self.name)


TASK = OpenBookQA(
    name="openbookqa",
    title="OpenBookQA",
    licence="Apache-2.0 (its repository; none stated for the data)",
    sources={
        "test": Source("openbookqa/test", *_HUB, "test", _REVISION),
        "train": Source("openbookqa/train", *_HUB, "train", _REVISION),
    },
)
