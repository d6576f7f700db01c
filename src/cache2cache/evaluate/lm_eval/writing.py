"""What the receiver writes behind a context, up to a stop string."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from cache2cache.inputs import Row
from cache2cache.pipeline import C2C


def write(pair: C2C, rows: Sequence[Row], options: Mapping[str, Any]) -> list[str]:
    """Answers to one batch, cut where hf cuts them.

    Args:
        options: as `normalize_gen_kwargs` of the harness gives them: `until`, `max_gen_toks`, `do_sample`, and whatever
            else `transformers.generate` takes.
    """
    tokenizer = pair.receiver.tokenizer
    prefill = pair.read(pair.collate(rows))
    ours = {"until", "max_gen_toks"} | (set() if options["do_sample"] else {"temperature"})
    stops = [*filter(None, options["until"]), str(tokenizer.decode(tokenizer.eos_token_id))]  # type: ignore[arg-type]
    answers = pair.decode(
        prefill,
        **{name: value for name, value in options.items() if name not in ours},
        max_new_tokens=options["max_gen_toks"],
        stopping_criteria=StoppingCriteriaList([_Stops(tokenizer, prefill.ids.shape[1], stops)]),
    )
    return [_cut(answer.text, stops) for answer in answers]


@dataclass
class _Stops(StoppingCriteria):
    """Ends each row where one of the strings has been written."""

    tokenizer: PreTrainedTokenizerBase
    prompt: int
    """Columns of the prompt."""
    strings: Sequence[str]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt :])
        return torch.tensor([_cut(text, self.strings) != text for text in texts], device=input_ids.device)


def _cut(text: str, stops: Sequence[str]) -> str:
    """What stands before the first of the stop strings."""
    for stop in stops:
        text = text.split(stop)[0]
    return text
