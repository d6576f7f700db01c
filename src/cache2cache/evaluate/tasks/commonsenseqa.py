"""CommonsenseQA: five choices each. Talmor et al., arXiv 1811.00937. The development split is asked; test has no answers."""

from cache2cache.evaluate.tasks.base import Source
from cache2cache.evaluate.tasks.choice import LabelledChoiceTask

_HUB = ("tau/commonsense_qa", ("default",))
_REVISION = "94630fe30dad47192a8546eb75f094926d47e155"

TASK = LabelledChoiceTask(
    name="commonsenseqa",
    title="CommonsenseQA",
    licence="MIT",
    sources={
        "test": Source("commonsenseqa/dev", *_HUB, "validation", _REVISION),
        "train": Source("commonsenseqa/train", *_HUB, "train", _REVISION),
    },
)
