"""What all multiple-choice tasks share: wordings, scoring, and the hub's layout of labelled choices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from cache2cache.errors import DataError, EvaluationError
from cache2cache.evaluate.extract import extract_letter
from cache2cache.evaluate.items import Answer, Item
from cache2cache.evaluate.questions import LETTERS, Question
from cache2cache.evaluate.tasks.base import Kind, Row, Scored, Task, checked
from cache2cache.types import Conversation, Message

PAPER = """Accurately answer the following question:

{question}

Choices:
{options}

Instructions:
- Carefully read the question and all options.
- Select the single most correct answer.
- Respond ONLY in the following format: "The correct answer is {letters}".
- Do not include any explanations, additional text, or punctuation besides the answer.

The correct answer is"""
"""Source: arXiv 2510.03215, A.3.6."""


@dataclass(frozen=True)
class ChoiceTask(Task):
    """Multiple choice, scored by the likelihood of the letters and by the letter that the answer names.

    Rows: id, subject, question, choices, answer (index into choices).
    """

    kind: ClassVar[Kind] = "choice"
    metrics: ClassVar[tuple[str, ...]] = ("likelihood", "generate")

    def item(self, row: Row) -> Item:
        """See `Task.item`."""
        return choice_item(self.name, checked(Question, row, "multiple-choice"))

    def score(self, item: Item, answer: Answer) -> Scored:
        """See `Task.score`. Of letters that are equally likely the first counts."""
        if len(answer.letter_logprobs) != len(item.letters):
            raise EvaluationError(
                "an answer lacks the log-probability of a letter",
                got=f"{len(answer.letter_logprobs)} for the letters {item.letters}",
                hint="This is a mistake in the system",
            )
        likeliest = item.letters[answer.letter_logprobs.index(max(answer.letter_logprobs))]
        named = extract_letter(answer.text, item.letters)
        right = {"likelihood": likeliest == item.target, "generate": named == item.target}
        return Scored(named, {name: float(is_right) for name, is_right in right.items()})


@dataclass(frozen=True)
class LabelledChoiceTask(ChoiceTask):
    """A set that the hub keeps as choices {text, label} and an answerKey, labels being letters or digits."""

    def from_hub(self, row: Row, config: str) -> dict[str, Any]:
        """See `Task.from_hub`."""
        return labelled(row, row["question"], self.name)


def labelled(row: Row, question: str, subject: str) -> dict[str, Any]:
    """A hub row with labelled choices in the local layout.

    Raises:
        ValueError: the answer's label is none of the choices', or two choices have the same.
    """
    choices: Mapping[str, Any] = row["choices"]
    labels = list(choices["label"])
    if labels.count(row["answerKey"]) != 1:
        raise ValueError(f"answerKey {row['answerKey']!r} is not one of the labels {labels}")
    answer = labels.index(row["answerKey"])
    return {"id": row["id"], "subject": subject, "question": question, "choices": choices["text"], "answer": answer}


def choice_item(task: str, question: Question) -> Item:
    """A question in all wordings.

    Raises:
        DataError: fewer than two or more than ten choices, or an answer that is none of them.
    """
    if not 2 <= len(question.choices) <= len(LETTERS):
        raise DataError("a question has too few or too many choices", got=len(question.choices), allowed="2 to 10")
    if not 0 <= question.answer < len(question.choices):
        raise DataError("answer out of range", got=question.answer, allowed=f"0–{len(question.choices) - 1}")
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(question.letters, question.choices, strict=True))
    paper = PAPER.format(question=question.question, options=options, letters="/".join(question.letters))
    return Item(
        task=task,
        id=question.id,
        subject=question.subject,
        wordings={
            # Fused models were trained on exactly this.
            "plain": question.messages(),
            "paper": one_turn(paper),
            "bare": one_turn(f"Question: {question.question}\n{options}"),
        },
        topic=question.question,
        target=question.letter,
        letters=question.letters,
        max_new_tokens=16,
    )


def one_turn(content: str) -> Conversation:
    """A conversation of one user message."""
    return [Message(role="user", content=content)]
