"""ARC-Challenge: the science questions that retrieval and word statistics got wrong. Clark et al., arXiv 1803.05457."""

from cache2cache.evaluate.tasks.base import Source
from cache2cache.evaluate.tasks.choice import LabelledChoiceTask

_HUB = ("allenai/ai2_arc", ("ARC-Challenge",))
_REVISION = "210d026faf9955653af8916fad021475a3f00453"

TASK = LabelledChoiceTask(
    name="arc_challenge",
    title="ARC-Challenge",
    licence="CC BY-SA 4.0",
    sources={
        "test": Source("arc_challenge/test", *_HUB, "test", _REVISION),
        "train": Source("arc_challenge/train", *_HUB, "train", _REVISION),
    },
)
