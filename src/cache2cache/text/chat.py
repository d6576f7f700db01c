"""From messages to one side's rendering: text, token ids, and where each message's content lies.

The ranges come from the template itself: the conversation is rendered a second time with two sentinel
characters of its own around each content. Searching the text for the content would go wrong as soon as a message
repeats another one, is empty, or also occurs in the template.

Knows nothing about models or about the other side of the pair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from cache2cache.errors import ConversationError, ModelError, TemplateError
from cache2cache.types import Conversation, Message, Rendering

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")

BOS = "{% if adds_bos %}{{ bos_token }}{% endif %}"
"""Jinja text: the beginning of sequence, for the tokenizers that add one."""

TEMPLATES: Mapping[str, str] = MappingProxyType(
    {
        # For models that have no chat template of their own.
        #   System: …⏎⏎User: …⏎⏎Assistant: …⏎⏎User: …⏎⏎Assistant:
        "plain": BOS
        + "{% for message in messages %}{% if not loop.first %}{{ '\n\n' }}{% endif %}"
        + "{{ message['role'] | capitalize + ': ' + message['content'] }}{% endfor %}"
        + "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}",
        # For models that complete text better than they chat.
        #   …⏎⏎…⏎⏎Answer: …⏎⏎…⏎⏎Answer:
        "completion": BOS
        + "{% for message in messages %}{% if not loop.first %}{{ '\n\n' }}{% endif %}"
        + "{{ ('Answer: ' if message['role'] == 'assistant' else '') + message['content'] }}{% endfor %}"
        + "{% if add_generation_prompt %}{{ '\n\nAnswer:' }}{% endif %}",
    }
)
"""Templates that any model can be given by name, as Jinja text; line breaks are shown as ⏎ above."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Conversation,
    *,
    template: str | None = None,
    add_generation_prompt: bool = True,
    outer_space: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> Rendering:
    """Render and tokenise a conversation as one side reads it.

    Args:
        template: None for the model's own chat template ("plain" if it has none), a name of TEMPLATES, or Jinja text.
        add_generation_prompt: end with what makes the model answer.
        outer_space: let the ranges include the outer white space of a content where the template keeps it.
        variables: what the template may ask for beyond the messages, such as `enable_thinking`.

    Raises:
        ConversationError: no conversation at all, see `check`.
        TemplateError: an unknown name, or a template that does not compile or refuses this conversation.
        ModelError: the tokenizer cannot tell the characters of its tokens.
    """
    check(messages)
    writer = _Writer(tokenizer, resolve(tokenizer, template), add_generation_prompt, dict(variables or {}))
    text = writer(messages)
    return tokenise(tokenizer, text, content_ranges(writer, messages, text, outer_space))


def check(messages: Conversation) -> None:
    """Raise ConversationError unless `messages` is a non-empty list of dicts with a known role and text as content.

    The last message may be the assistant's, as in training rows.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ConversationError(
            "a conversation must be a list of messages",
            got=type(messages).__name__,
            allowed='[{"role": "user", "content": "…"}, …]',
        )
    if not messages:
        raise ConversationError("the conversation is empty", hint="Give at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ConversationError(
                f"message {index} is not a dict with role and content",
                got=sorted(map(str, message)) if isinstance(message, Mapping) else type(message).__name__,
            )
        if message["role"] not in ROLES:
            raise ConversationError(f"message {index} has an unknown role", got=repr(message["role"]), allowed=ROLES)
        if not isinstance(message["content"], str):
            raise ConversationError(
                f"the content of message {index} is not text", got=type(message["content"]).__name__, allowed="str"
            )
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:
            raise ConversationError(
                f"the content of message {index} is not Unicode text", got=error, hint="Half an emoji, perhaps"
            ) from error


def resolve(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str | None:
    """Jinja text of a template given by name or text; None means that the tokenizer's own is to be used."""
    if template is None:
        return None if tokenizer.chat_template else TEMPLATES["plain"]
    if template in TEMPLATES:
        return TEMPLATES[template]
    if "{{" in template or "{%" in template:
        return template
    raise TemplateError(
        "unknown template", got=repr(template), allowed=sorted(TEMPLATES), hint="Jinja text is accepted as well"
    )


def tokenise(tokenizer: PreTrainedTokenizerBase, text: str, ranges: Sequence[tuple[int, int]]) -> Rendering:
    """Tokenise rendered text. The template has written the special tokens already, so none are added."""
    if not tokenizer.is_fast:
        raise ModelError(
            "this tokenizer cannot tell which characters its tokens cover",
            got=type(tokenizer).__name__,
            allowed="a fast tokenizer (tokenizer.json)",
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts, ends = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T.copy()
    ids = np.array(encoded["input_ids"], dtype=np.int64)
    return Rendering(text, ids, starts, _closed(text, starts, ends), tuple(ranges))


def _closed(text: str, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(N,) ends of the tokens, including characters that normalisation merged into the one before or removed.

    The offsets leave them out: of e + combining accent, a tokenizer that composes them says that é covers the e.
    A gap of white space is another thing, it belongs to the token behind it.
    """
    ends = ends.copy()
    following = np.append(starts[1:], len(text))
    for last in np.flatnonzero(following > ends):
        end, stop = ends[last], ends[last]
        while stop < following[last] and not text[stop].isspace():
            stop += 1
        while stop > end and last >= 0 and ends[last] == end:  # all tokens of that character
            ends[last] = stop
            last -= 1
    return ends


class _Writer:
    """Renders messages with one template: messages → text."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None,
        add_generation_prompt: bool,
        variables: dict[str, Any],
    ):
        self.tokenizer = tokenizer
        self.options = {
            "adds_bos": _adds_bos(tokenizer),
            **variables,
            "chat_template": template,
            "add_generation_prompt": add_generation_prompt,
        }

    def __call__(self, messages: Conversation) -> str:
        try:
            # Copies, because a template gets the very dicts and must not be able to change the caller's.
            turns: list[Any] = [dict(message) for message in messages]
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, **self.options))
        # A template is a program: besides refusing, it may fail in any way in which an expression can.
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise TemplateError(
                "the chat template refuses this conversation",
                got=f"roles {[message['role'] for message in messages]} → {type(error).__name__}: {error}",
                hint='Change the messages, or give another template, such as "plain"',
            ) from error


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model is used to text that begins with the tokenizer's beginning-of-sequence token."""
    if tokenizer.bos_token_id is None:
        return False
    return tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def content_ranges(
    writer: _Writer, messages: Conversation, text: str, outer_space: bool = False
) -> tuple[tuple[int, int], ...]:
    """Character range in `text` of each message's content, ordered and disjoint.

    A message that the template leaves out, or moves out of its place among the others, gets an empty range.
    """
    cores = [message["content"] if outer_space else message["content"].strip() for message in messages]
    marks = _unused(text, messages)
    places = _marked_places(writer, messages, cores, text, marks)
    for index, place in enumerate(places):
        if place is None:
            places[index] = _probed_place(writer, messages, index, cores[index], text, marks[0][0])
    return _in_order(places)


_Place = tuple[int, int] | None
"""Where in the text a content lies, if it is there."""


def _unused(text: str, messages: Conversation) -> list[tuple[str, str]]:
    """For each message two private-use characters that occur neither in the text nor in any content."""
    used = set(text).union(*(message["content"] for message in messages))
    spare = (chr(c) for plane in (0xF0000, 0x100000) for c in range(plane, plane + 0xFFFE) if chr(c) not in used)
    return [(next(spare), next(spare)) for _ in messages]


def _marked_places(
    writer: _Writer, messages: Conversation, cores: Sequence[str], text: str, marks: Sequence[tuple[str, str]]
) -> list[_Place]:
    """Places from one rendering with sentinels around every core; None where it does not tell.

    Of a content that is written several times it is the first.
    """
    unknown: list[_Place] = [None] * len(messages)
    swapped = [
        _swap(message, core, left + core + right)
        for message, core, (left, right) in zip(messages, cores, marks, strict=True)
    ]
    try:
        marked = writer(swapped)
    except TemplateError:
        return unknown
    known = {mark for pair in marks for mark in pair}
    if "".join(character for character in marked if character not in known) != text:
        return unknown
    # Each sentinel stands behind as many removed characters as there are sentinels before it.
    found: dict[str, list[int]] = {mark: [] for mark in known}
    for before, index in enumerate(index for index, character in enumerate(marked) if character in known):
        found[marked[index]].append(index - before)
    # A template that writes one without the other looks into the content.
    return [(found[a][0], found[b][0]) if 0 < len(found[a]) == len(found[b]) else None for a, b in marks]


def _swap(message: Message, core: str, other: str) -> Message:
    """The message with another core; white space that is not in the core stays, because some templates trim."""
    before, _, after = message["content"].partition(core) if core else (message["content"], "", "")
    return {**message, "content": before + other + after}


def _probed_place(
    writer: _Writer, messages: Conversation, index: int, core: str, text: str, mark: str
) -> tuple[int, int] | None:
    """A content's place from one rendering, for templates that rewrite, repeat, drop or inspect it."""
    # As long as the core, because some templates count characters.
    probe = [*messages[:index], _swap(messages[index], core, mark * max(1, len(core))), *messages[index + 1 :]]
    try:
        return _probe(text, writer(probe), mark, core)
    except TemplateError as error:
        raise TemplateError(
            f"the chat template inspects message {index}, so the place of its content cannot be found",
            got=error.got,
            hint='Give another template, such as "plain"',
        ) from error


def _probe(text: str, probed: str, mark: str, core: str) -> tuple[int, int] | None:
    """Where in `text` lies what stands in the place of the marks in `probed`."""
    if mark not in probed:  # the template drops this message
        return None
    before, after = probed[: probed.index(mark)], probed[probed.rindex(mark) + 1 :]
    start = _common_prefix(text, before)
    if text.startswith(core, start):
        return start, start + len(core)
    return start, max(start, len(text) - _common_prefix(text[::-1], after[::-1]))


def _in_order(places: Sequence[_Place]) -> tuple[tuple[int, int], ...]:
    """Ordered, disjoint ranges: as many places as can stay; those that are missing or were moved become empty ones."""
    kept, ranges, floor = set(_unmoved(places)), [], 0
    for index, place in enumerate(places):
        start, end = place if place is not None and index in kept else (floor, floor)
        start = max(start, floor)
        floor = max(start, end)
        ranges.append((start, floor))
    return tuple(ranges)


def _unmoved(places: Sequence[_Place]) -> list[int]:
    """Indices of the longest series of places in which each lies behind the one before; of equals the one that ends last,
    as the question does.
    """
    there = [(index, place) for index, place in enumerate(places) if place is not None]
    if all(a[0] <= b[0] and a[1] <= b[1] for (_, a), (_, b) in pairwise(there)):
        return [index for index, _ in there]
    series: list[list[int]] = []
    for at, (index, (start, end)) in enumerate(there):
        before = (chain for chain, (_, p) in zip(series, there[:at], strict=True) if p[0] <= start and p[1] <= end)
        series.append([*max(before, key=len, default=[]), index])
    return max(series, key=lambda chain: (len(chain), chain[-1]), default=[])


def _common_prefix(text: str, other: str) -> int:
    """Number of leading characters that two texts share."""
    if text.startswith(other):
        return len(other)
    return next((index for index, pair in enumerate(zip(text, other, strict=False)) if pair[0] != pair[1]), len(text))
