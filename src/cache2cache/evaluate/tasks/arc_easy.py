"""ARC-Easy: grade-school science questions. Clark et al., arXiv 1803.05457."""

from cache2cache.evaluate.tasks.base import Source
from cache2cache.evaluate.tasks.choice import LabelledChoiceTask

_HUB = ("allenai/ai2_arc", ("ARC-Easy",))
_REVISION = "210d026faf9955653af8916fad021475a3f00453"

TASK = LabelledChoiceTask(
    name="arc_easy",
    title="ARC-Easy",
    licence="CC BY-SA 4.0",
    sources={
        "test": Source("arc_easy/test", *_HUB, "test", _REVISION),
        "train": Source("arc_easy/train", *_HUB, "train", _REVISION),
    },
)
