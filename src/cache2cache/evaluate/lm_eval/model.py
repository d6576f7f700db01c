"""The model that lm-evaluation-harness asks."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import simple_parse_args_string
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from cache2cache import inputs
from cache2cache.errors import DataError, GenerationError, TemplateError
from cache2cache.evaluate.lm_eval.contexts import Asked, Reader, pack
from cache2cache.evaluate.lm_eval.likelihood import Scored, prepare, scores
from cache2cache.evaluate.lm_eval.writing import write
from cache2cache.fuser.several import FusionMode
from cache2cache.inputs import Row
from cache2cache.models.load import check_device
from cache2cache.pipeline import C2C
from cache2cache.text import chat

_MAX_NEW_TOKENS = 256
"""Of tasks that do not say; the same as hf's."""


@register_model("c2c")
class C2CLM(TemplateLM):
    """A pair, or a receiver alone.

    Args:
        batch_size: most rows of one forward pass.

    Raises:
        GenerationError: a batch size that is not a positive number.
    """

    def __init__(self, pair: C2C, batch_size: int | str = 1):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise GenerationError(
                "c2c does not look for a batch size by itself", got=repr(batch_size), allowed="1, 2, 3, …"
            )
        self.pair = pair
        self.batch_size = int(batch_size)
        self.tokenizer: PreTrainedTokenizerBase = pair.receiver.tokenizer
        self._reader = Reader(pair)

    @classmethod
    def from_pretrained(
        cls,
        receiver: str | Path,
        sharer: str | Sequence[str] | None = None,
        fuser: str | Sequence[str] | None = None,
        *,
        device: str = "cpu",
        sharer_device: str | None = None,
        dtype: str = "auto",
        mode: FusionMode = "parallel",
        trust_remote_code: bool = False,
        batch_size: int | str = 1,
    ) -> C2CLM:
        """Load a pair; the arguments are those of `C2C.from_pretrained`.

        Args:
            sharer, fuser: one name, or several as a list or separated by `;`. Without any, the receiver is alone.
            device: the harness's command line says `cuda:0` where its `--device` is not given.
        """
        for name in (device, sharer_device or device):
            check_device(name, hint="The harness asks for cuda:0 where it is not told otherwise: --device cpu")
        pair = C2C.from_pretrained(
            receiver,
            _names(sharer),
            _names(fuser),
            device=device,
            sharer_device=sharer_device,
            dtype=dtype,
            mode=mode,
            trust_remote_code=trust_remote_code,
        )
        return cls(pair, batch_size)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> C2CLM:
        """How the harness makes a model: from `model_args`, and from its own options such as `--device`.

        Raises:
            GenerationError: a largest batch size, up to which the harness's own models look for theirs.
        """
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if "max_batch_size" in options | arg_dict:
            raise GenerationError(
                "c2c does not look for a batch size by itself", got="max_batch_size", hint="Give --batch_size alone"
            )
        return cls.from_pretrained(**arg_dict, **options)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> C2CLM:
        """The same from text, `receiver=…,sharer=…`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # --- text and tokens ------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id  # type: ignore[return-value]

    @property
    def prefix_token_id(self) -> int:
        return self._reader.prefix_token

    @property
    def max_length(self) -> int | None:
        """The receiver's context, which the harness notes with its results."""
        return self.pair.receiver.card.geometry.max_positions

    @property
    def tokenizer_name(self) -> str:
        """Part of the name of a cache of requests. Ours carry conversations, whatever the tokenizer."""
        return "c2c"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self._reader.tokens(string, add_special_tokens)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return super()._encode_pair(self._reader.text(context), continuation)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as JSON: a context is a string, and each model will render it in its own way.

        Args:
            add_generation_prompt: false if the last message is the beginning of the answer.
        """
        return pack(Asked(chat_history, not add_generation_prompt))  # type: ignore[arg-type]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The receiver's template, which the harness notes with its results.

        Raises:
            TemplateError: a template chosen by name.
        """
        if isinstance(chat_template, str):
            raise TemplateError("templates come with the fuser", got=repr(chat_template), hint="Leave the name out")
        return chat.resolve(self.tokenizer, self.pair.template) or str(self.tokenizer.chat_template)

    # --- requests -------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[Scored]:
        """See `TemplateLM`. A context is read once for all its continuations."""
        asked: dict[tuple[str, tuple[int, ...]], dict[int, list[int]]] = defaultdict(dict)
        for i, ((context, _), ids, continuation) in enumerate(requests):
            asked[context, tuple(ids)][i] = continuation
        contexts = [prepare(self._reader, context, ids, tails) for (context, ids), tails in asked.items()]
        found: dict[int, Scored] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for batch in _batches([c.space for c in contexts], [len(c.row.ids) for c in contexts], self.batch_size):
                for i, answer in scores(self.pair, [contexts[k] for k in batch], self.batch_size):
                    found[i] = answer
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
                    bar.update()
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> NoReturn:
        """Refused.

        Raises:
            GenerationError: always.
        """
        raise GenerationError(
            "a whole text has no prompt that the sharers could read first, so C2C has no likelihood of it",
            got="loglikelihood_rolling",
            allowed="loglikelihood, multiple_choice, generate_until",
            hint="Measure the likelihood of responses with c2c eval, or the receiver alone with --model hf",
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """See `LM`.

        Raises:
            ContextLengthError: context and max_gen_toks are longer than the receiver's context.
            DataError: an empty context.
        """
        asked: list[tuple[str, dict[str, Any]]] = [request.args for request in requests]  # type: ignore[misc]
        options: list[dict[str, Any]] = [dict(normalize_gen_kwargs(given, _MAX_NEW_TOKENS)) for _, given in asked]
        rows = [self._row(context, o["max_gen_toks"]) for (context, _), o in zip(asked, options, strict=True)]
        alike = [json.dumps(o, sort_keys=True, default=str) for o in options]
        found: dict[int, str] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for batch in _batches(alike, [len(row.ids) for row in rows], self.batch_size):
                for i, text in zip(batch, write(self.pair, [rows[i] for i in batch], options[batch[0]]), strict=True):
                    found[i] = text
                    self.cache_hook.add_partial("generate_until", asked[i], text)
                    bar.update()
        return [found[i] for i in range(len(requests))]

    def _row(self, context: str, new: int) -> Row:
        if not context:
            raise DataError("a context to be answered must have tokens", got=repr(context))
        ids = self._reader.tokens(self._reader.text(context))
        inputs.check_length(self.pair.receiver, len(ids), new)
        return self._reader.prompt(context).fitted(ids)


def _batches(groups: Sequence[Hashable], lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in batches of one group each, the longest first."""
    for group in dict.fromkeys(groups):
        members = [i for i, other in enumerate(groups) if other == group]
        members.sort(key=lambda i: -lengths[i])
        yield from (members[at : at + size] for at in range(0, len(members), size))


def _names(value: str | Sequence[str] | None) -> list[str]:
    if isinstance(value, str):
        return [name.strip() for name in value.split(";")]
    return list(value or ())
