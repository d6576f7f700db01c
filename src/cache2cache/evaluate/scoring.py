"""From a prefill to answers: the likelihood of the letters, the text, the likelihood of a reference response."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from cache2cache.decoding import GREEDY, end_tokens
from cache2cache.errors import ModelError
from cache2cache.evaluate.items import Answer, Cost, Item
from cache2cache.models import kv
from cache2cache.models.load import LanguageModel
from cache2cache.pipeline import C2C, Prefill
from cache2cache.text.continuation import continued
from cache2cache.types import clock


def answers(pair: C2C, prefill: Prefill, items: Sequence[Item], unit: PreTrainedTokenizerBase) -> list[Answer]:
    """Whatever the items ask for, from one prefill. Greedy.

    Args:
        items: of one task, one per row of the prefill.
        unit: the tokenizer that a target's tokens are counted with.

    Raises:
        ModelError: a valid letter is not one token of the receiver.
    """
    mask = prefill.mask
    found = [
        Answer("", cost=Cost(receiver_read=int(mask[row].sum()), sharer_read=_sharer_read(prefill, row)),
               timings=prefill.timings)
        for row in range(len(items))
    ]  # fmt: skip
    if not items[0].letters:
        found = _with_nats(pair, prefill, items, found, unit)
    if items[0].max_new_tokens:
        found = _with_text(pair, prefill, items, found)
    return found


def _with_text(pair: C2C, prefill: Prefill, items: Sequence[Item], found: Sequence[Answer]) -> list[Answer]:
    """Greedy answers, and the log-probabilities of the letters at their first position."""
    limit = items[0].max_new_tokens
    options: dict[str, Any] = {**GREEDY, "max_new_tokens": limit}
    ends = [Ends(item.one_line, item.letters) for item in items]
    criterion = Complete(pair.receiver.tokenizer, prefill.ids.shape[1], ends)
    options["stopping_criteria"] = StoppingCriteriaList([criterion])
    written = pair.decode(prefill, return_dict_in_generate=True, output_logits=True, **options)
    logits = written[0].raw.logits[0].float()  # (B, V)
    out = []
    for row, (item, answer, new, end) in enumerate(zip(items, found, written, ends, strict=True)):
        text, ids = new.text, new.ids
        out.append(
            replace(
                answer,
                text=end.answer(text),
                ended=len(ids) < limit or end.complete(text) or ends_turn(pair.receiver, ids),
                letter_logprobs=letter_logprobs(pair.receiver, logits[row], item.letters) if item.letters else (),
                cost=replace(answer.cost, receiver_wrote=len(ids)),
            )
        )
    return out


def _with_nats(
    pair: C2C, prefill: Prefill, items: Sequence[Item], found: Sequence[Answer], unit: PreTrainedTokenizerBase
) -> list[Answer]:
    lm = pair.receiver
    targets = [target_ids(lm, prefill.ids[row], item.target) for row, item in enumerate(items)]
    nats = target_nats(lm, prefill, targets)
    return [
        replace(answer, target_nats=x, target_tokens=len(unit(item.target, add_special_tokens=False)["input_ids"]))  # type: ignore[arg-type]
        for answer, x, item in zip(found, nats, items, strict=True)
    ]


@torch.no_grad()
def target_nats(lm: LanguageModel, prefill: Prefill, targets: Sequence[Sequence[int]]) -> list[float]:
    """Negative log-likelihood of each row's target tokens after its prompt, summed, in nats. The prefill stays as it is."""
    width, prompt = max(map(len, targets)), prefill.ids.shape[1] - 1
    tail = torch.zeros((len(targets), width), dtype=torch.long)
    labels = torch.full_like(tail, -100)
    for row, target in enumerate(targets):
        tail[row, : len(target)] = torch.tensor([int(prefill.ids[row, -1]), *target[:-1]])
        labels[row, : len(target)] = torch.tensor(target)
    mask = torch.cat([prefill.mask, torch.ones_like(tail[:, 1:])], dim=1).to(lm.device)
    with clock(prefill.timings, "decode", lm.device):
        logits = lm.model(
            input_ids=tail.to(lm.device),
            attention_mask=mask,
            position_ids=kv.position_ids(mask)[:, prompt:],
            past_key_values=kv.clone(prefill.cache),
            use_cache=True,
        ).logits
        per_token = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.to(lm.device).flatten(), ignore_index=-100, reduction="none"
        )
    return per_token.view_as(tail).double().sum(1).tolist()


def target_ids(lm: LanguageModel, prompt: torch.Tensor, target: str) -> list[int]:
    """Tokens of a target behind a prompt (n,)."""
    return continued(lm.tokenizer, int(prompt[-1]), target).ids.tolist()


def letter_logprobs(lm: LanguageModel, logits: torch.Tensor, letters: str) -> tuple[float, ...]:
    """Log-probability of each letter among the valid ones, with and without a space before it taken together.

    Args:
        logits: (V,) at the answer position.

    Raises:
        ModelError: a letter is not one token in either spelling.
    """
    scores = torch.stack([logits[_spellings(lm, letter)].logsumexp(0) for letter in letters])
    return tuple(scores.log_softmax(0).tolist())


def _spellings(lm: LanguageModel, letter: str) -> list[int]:
    texts = (letter, f" {letter}")
    spelled: list[list[int]] = [lm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]  # type: ignore[misc]
    for last in lm.tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]:  # type: ignore[index]
        spelled += [continued(lm.tokenizer, int(last), text).ids.tolist() for text in texts]  # type: ignore[arg-type]
    single = sorted({ids[0] for ids in spelled if len(ids) == 1})
    if not single:
        raise ModelError(f"{lm.card.id} has no token for the letter {letter}", got=spelled, allowed="one token")
    return single


@dataclass(frozen=True)
class Ends:
    """Where an answer is complete, though the model may go on."""

    one_line: bool
    """At the end of the first line that is not empty; otherwise before a new question, with which a model goes on that
    completes text and believes to be in a quiz."""
    letters: str = ""
    """Also behind one of these letters, if the answer begins with it as an option: "B.", "(C)", "D)"."""

    def complete(self, text: str) -> bool:
        """Whether the answer has come to its end."""
        return self._mark in text.lstrip() or self._option(text) is not None

    def answer(self, text: str) -> str:
        """The answer in what a model wrote."""
        option = self._option(text)
        return option or text.strip().split(self._mark, 1)[0].rstrip()

    @property
    def _mark(self) -> str:
        return "\n" if self.one_line else "\nQuestion:"

    def _option(self, text: str) -> str | None:
        if not self.letters:
            return None
        found = re.match(rf"\s*(\(?[{self.letters}][).])(?!\w)", text)
        return found[1] if found else None


@dataclass
class Complete(StoppingCriteria):
    """Ends each row where its answer is complete."""

    tokenizer: PreTrainedTokenizerBase
    prompt: int
    """Columns of the prompt."""
    ends: Sequence[Ends]
    """One per row."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt :], skip_special_tokens=True)
        done = [end.complete(text) for end, text in zip(self.ends, texts, strict=True)]
        return torch.tensor(done, device=input_ids.device)


def ends_turn(lm: LanguageModel, ids: Sequence[int]) -> bool:
    """Whether the last of these tokens ends the model's turn."""
    return bool(ids) and ids[-1] in end_tokens(lm)


def _sharer_read(prefill: Prefill, row: int) -> int:
    return sum(int(part.mask[row].sum()) for part in prefill.inputs.sharers if part is not None and part.due[row].any())
