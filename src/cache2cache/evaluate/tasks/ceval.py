"""C-Eval: 52 subjects in Chinese. Huang et al., arXiv 2305.08322.

The validation split is asked, as is usual: the answers of the test split were secret for years.
"""

from dataclasses import dataclass
from typing import Any

from cache2cache.evaluate.tasks.base import Row, Source
from cache2cache.evaluate.tasks.choice import ChoiceTask

SUBJECTS = (
    "accountant", "advanced_mathematics", "art_studies", "basic_medicine", "business_administration",
    "chinese_language_and_literature", "civil_servant", "clinical_medicine", "college_chemistry", "college_economics",
    "college_physics", "college_programming", "computer_architecture", "computer_network", "discrete_mathematics",
    "education_science", "electrical_engineer", "environmental_impact_assessment_engineer", "fire_engineer",
    "high_school_biology", "high_school_chemistry", "high_school_chinese", "high_school_geography",
    "high_school_history", "high_school_mathematics", "high_school_physics", "high_school_politics",
    "ideological_and_moral_cultivation", "law", "legal_professional", "logic", "mao_zedong_thought", "marxism",
    "metrology_engineer", "middle_school_biology", "middle_school_chemistry", "middle_school_geography",
    "middle_school_history", "middle_school_mathematics", "middle_school_physics", "middle_school_politics",
    "modern_chinese_history", "operating_system", "physician", "plant_protection", "probability_and_statistics",
    "professional_tour_guide", "sports_science", "tax_accountant", "teacher_qualification", "urban_and_rural_planner",
    "veterinary_medicine",
)  # fmt: skip
_HUB = ("ceval/ceval-exam", SUBJECTS)
_REVISION = "617524a00b307ff6f9933702f724131fe12ca7ce"


@dataclass(frozen=True)
class CEval(ChoiceTask):
    """C-Eval's layout on the hub: a config per subject, the choices in columns A to D, ids counted anew in each."""

    def from_hub(self, row: Row, config: str) -> dict[str, Any]:
        """See `Task.from_hub`."""
        return {
            "id": f"{config}-{row['id']}",
            "subject": config,
            "question": row["question"],
            "choices": [row[letter] for letter in "ABCD"],
            "answer": ["A", "B", "C", "D"].index(row["answer"]),
        }


TASK = CEval(
    name="ceval",
    title="C-Eval",
    licence="CC BY-NC-SA 4.0",
    sources={
        "test": Source("ceval/val", *_HUB, "val", _REVISION),
        "train": Source("ceval/dev", *_HUB, "dev", _REVISION),
    },
)
