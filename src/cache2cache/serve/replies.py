"""What clients of the OpenAI API are sent: whole answers and pieces of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cache2cache.serve.engine import Event, Request, TokenLogprob, Usage

_LEAST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""

Json = dict[str, Any]


@dataclass
class Choice:
    """One answer, as far as it has come."""

    request: Request
    events: list[Event] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)

    @property
    def tokens(self) -> int:
        """Number of tokens that were written."""
        return sum(len(event.tokens) for event in self.events)

    @property
    def usage(self) -> Usage:
        usage = self.events[0].usage
        assert usage is not None, "an answer begins with its usage"
        return usage

    @property
    def degraded(self) -> tuple[int, ...]:
        return self.events[0].degraded


class Reply:
    """How the answers to one request are written down.

    Args:
        name: of the request.
        model: as the client asked for it.
        sharers: ids of the engine's sharers.
        choices: all answers, in order; they grow while pieces are written.
        n: answers per prompt.
    """

    prefix: str
    whole_object: str
    piece_object: str

    def __init__(self, name: str, model: str, sharers: Sequence[str], choices: Sequence[Choice], n: int):
        self.choices = choices
        self._id, self._model, self._sharers, self._n = f"{self.prefix}-{name}", model, sharers, n
        self._created = int(time.time())

    def whole(self) -> Json:
        """All answers."""
        choices = [
            {
                "index": i,
                **self._content(choice.text),
                "logprobs": self._logprobs(choice.events, 0),
                "finish_reason": choice.events[-1].finish,
            }
            for i, choice in enumerate(self.choices)
        ]
        return self._head(self.whole_object, choices) | {"usage": self.usage()} | self._extra(self.degraded())

    def piece(self, index: int) -> Json | None:
        """What the last event of an answer adds; None if it adds nothing that can be seen."""
        events = self.choices[index].events
        first, event = len(events) == 1, events[-1]
        if not (first or event.text or event.logprob or event.finish):
            return None
        before = sum(len(e.logprob.text) for e in events[:-1] if e.logprob) if event.logprob else 0
        choice = {
            "index": index,
            **self._delta(event.text, first),
            "logprobs": self._logprobs([event], before),
            "finish_reason": event.finish,
        }
        degraded = [self._sharers[i] for i in event.degraded]
        return self._head(self.piece_object, [choice]) | self._extra(degraded)

    def last(self) -> Json:
        """The piece after all others, with what they took."""
        return self._head(self.piece_object, []) | {"usage": self.usage()}

    def degraded(self) -> list[str]:
        """Sharers that should have spoken and could not, in any of the answers that have begun."""
        missing = {i for choice in self.choices if choice.events for i in choice.degraded}
        return [self._sharers[i] for i in sorted(missing)]

    def usage(self) -> Json:
        """Tokens and bytes of all answers; those of a prompt once, however many answers it has."""
        asked = self.choices[:: self._n]
        prompt = sum(choice.usage.prompt_tokens for choice in asked)
        completion = sum(choice.tokens for choice in self.choices)
        heard: dict[str, int] = {}
        for choice in asked:
            spoke = (i for i in choice.request.sharers if i not in choice.degraded)
            for i, tokens in zip(spoke, choice.usage.sharer_tokens, strict=True):
                heard[self._sharers[i]] = heard.get(self._sharers[i], 0) + tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {
                "cached_tokens": sum(choice.usage.cached_tokens for choice in asked),
                "sharer_tokens": heard,
                "cache_bytes": sum(choice.usage.cache_bytes for choice in asked),
            },
        }

    def _head(self, kind: str, choices: list[Json]) -> Json:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}

    @staticmethod
    def _extra(degraded: list[str]) -> Json:
        return {"c2c": {"degraded": degraded}} if degraded else {}

    def _content(self, text: str) -> Json:
        raise NotImplementedError

    def _delta(self, text: str, first: bool) -> Json:
        raise NotImplementedError

    def _logprobs(self, events: Sequence[Event], before: int) -> Json | None:
        """Of some events, None if nobody asked.

        Args:
            before: characters of the tokens before them.
        """
        raise NotImplementedError


class ChatReply(Reply):
    """To /v1/chat/completions."""

    prefix, whole_object, piece_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _content(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str, first: bool) -> Json:
        return {"delta": {"role": "assistant", "content": text} if first else {"content": text}}

    def _logprobs(self, events: Sequence[Event], before: int) -> Json | None:
        tokens = [
            _token(event.logprob) | {"top_logprobs": [_token(one) for one in event.top]}
            for event in events
            if event.logprob
        ]
        return {"content": tokens, "refusal": None} if tokens else None


class CompletionReply(Reply):
    """To /v1/completions."""

    prefix, whole_object, piece_object = "cmpl", "text_completion", "text_completion"

    def _content(self, text: str) -> Json:
        return {"text": text}

    def _delta(self, text: str, first: bool) -> Json:
        return {"text": text}

    def _logprobs(self, events: Sequence[Event], before: int) -> Json | None:
        reported = [(event.logprob, event.top) for event in events if event.logprob]
        if not reported:
            return None
        offsets = []
        for chosen, _ in reported:
            offsets.append(before)
            before += len(chosen.text)
        return {
            "tokens": [chosen.text for chosen, _ in reported],
            "token_logprobs": [_finite(chosen.logprob) for chosen, _ in reported],
            # Different tokens may have one text, such as halves of characters: the likeliest is the one that counts.
            "top_logprobs": [{t.text: _finite(t.logprob) for t in (chosen, *top[::-1])} for chosen, top in reported],
            "text_offset": offsets,
        }


def _token(one: TokenLogprob) -> Json:
    # A token that is no whole character has been decoded to something that is not its bytes.
    spelled = None if "\ufffd" in one.text else list(one.text.encode())
    return {"token": one.text, "logprob": _finite(one.logprob), "bytes": spelled}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
