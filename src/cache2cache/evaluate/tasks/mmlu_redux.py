"""MMLU-Redux 2.0: 100 test questions of each MMLU subject, checked by hand. Gema et al., arXiv 2406.04127.

Every row that the annotators found wrong in any way is left out, as the benchmark's authors do and as our training data
are screened against. The C2C paper says that it leaves out those marked "no correct answer" only, so its numbers are over
a few more rows.
"""

from dataclasses import dataclass
from typing import Any

from cache2cache.evaluate.tasks import mmlu
from cache2cache.evaluate.tasks.base import Row, Source, Split
from cache2cache.evaluate.tasks.choice import ChoiceTask

SUBJECTS = (
    "abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge", "college_biology",
    "college_chemistry", "college_computer_science", "college_mathematics", "college_medicine", "college_physics",
    "computer_security", "conceptual_physics", "econometrics", "electrical_engineering", "elementary_mathematics",
    "formal_logic", "global_facts", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
    "high_school_european_history", "high_school_geography", "high_school_government_and_politics",
    "high_school_macroeconomics", "high_school_mathematics", "high_school_microeconomics", "high_school_physics",
    "high_school_psychology", "high_school_statistics", "high_school_us_history", "high_school_world_history",
    "human_aging", "human_sexuality", "international_law", "jurisprudence", "logical_fallacies", "machine_learning",
    "management", "marketing", "medical_genetics", "miscellaneous", "moral_disputes", "moral_scenarios", "nutrition",
    "philosophy", "prehistory", "professional_accounting", "professional_law", "professional_medicine",
    "professional_psychology", "public_relations", "security_studies", "sociology", "us_foreign_policy", "virology",
    "world_religions",
)  # fmt: skip


@dataclass(frozen=True)
class MMLURedux(ChoiceTask):
    """Multiple choice whose rows carry the annotators' verdict in `error_type`."""

    def from_hub(self, row: Row, config: str) -> dict[str, Any]:
        """See `Task.from_hub`. Each subject is a config; rows of MMLU, which serve as training rows, name theirs."""
        return {"subject": config, **row}

    def reason_to_drop(self, row: Row, split: Split) -> str | None:
        """See `Task.reason_to_drop`."""
        verdict = row.get("error_type", "ok")
        return None if verdict == "ok" else verdict


TASK = MMLURedux(
    name="mmlu_redux",
    title="MMLU-Redux",
    licence="CC BY 4.0",
    sources={
        "test": Source(
            "mmlu_redux/test",
            "edinburgh-dawg/mmlu-redux-2.0",
            SUBJECTS,
            "test",
            "372ea425445d51e1ba1188c56e5e893f8138621f",
        ),
        "train": mmlu.TRAIN,
    },
)
