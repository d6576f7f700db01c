"""MMLU: 57 subjects from school to profession. Hendrycks et al., arXiv 2009.03300."""

from cache2cache.evaluate.tasks.base import Source
from cache2cache.evaluate.tasks.choice import ChoiceTask

_HUB = ("cais/mmlu", ("all",))
_REVISION = "c30699e8356da336a370243923dbaf21066bb9fe"

TRAIN = Source("mmlu/val", *_HUB, "validation", _REVISION)
"""MMLU has no training questions of its own subjects; its validation split takes their place."""

TASK = ChoiceTask(
    name="mmlu",
    title="MMLU",
    licence="MIT",
    # The hub's rows have the local layout but for the id: rows without one are numbered.
    sources={"test": Source("mmlu/test", *_HUB, "test", _REVISION), "train": TRAIN},
)
