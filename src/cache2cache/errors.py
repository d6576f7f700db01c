"""Every error that cache2cache raises on purpose.

Each is a `C2CError` and also the standard exception that a caller would expect, so both
``except C2CError`` and ``except ValueError`` work. The text always answers four questions:
what is wrong, what was got, what is allowed, what to do next.
"""

from typing import Any


class C2CError(Exception):
    """Base of all errors of this package.

    Args:
        what: what is wrong, one sentence without a full stop.
        got: the offending value.
        allowed: the values that would have been accepted.
        hint: what to do next.
    """

    def __init__(self, what: str, *, got: object = None, allowed: object = None, hint: str | None = None):
        self.what, self.got, self.allowed, self.hint = what, got, allowed, hint
        super().__init__(what)

    def __str__(self) -> str:
        text = self.what
        if self.got is not None:
            text += f"; got {self.got}"
        if self.allowed is not None:
            text += f"; allowed: {self.allowed}"
        if self.hint:
            text += f". {self.hint}"
        return text

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.what, self.got, self.allowed, self.hint)


def _rebuild(cls: type[C2CError], what: str, got: object, allowed: object, hint: str | None) -> C2CError:
    return cls(what, got=got, allowed=allowed, hint=hint)


class ConversationError(C2CError, ValueError):
    """A conversation that no template could render: empty, a role that is unknown, content that is not text."""


class TemplateError(C2CError, ValueError):
    """A chat template that does not compile or refuses a conversation."""


class AlignmentError(C2CError, ValueError):
    """Two renderings that cannot be aligned."""


class ContextLengthError(C2CError, ValueError):
    """A prompt, with the tokens asked for, that is longer than a model's context."""


class GenerationError(C2CError, ValueError):
    """An option of `transformers.generate` that would go wrong on a cache that holds the prompt already."""


class ModelError(C2CError, ValueError):
    """A model that cannot take part: no per-token KV cache, no fast tokenizer, weights that are not finite."""


class UnknownModelError(C2CError, LookupError):
    """A name that is neither in the catalogue, nor a folder, nor a hub id."""


class DownloadError(C2CError, OSError):
    """A model that could not be fetched: no network, a full disk."""

    __str__ = C2CError.__str__


class ChecksumError(DownloadError):
    """Bytes that are not the expected ones."""


class FuserFormatError(C2CError, ValueError):
    """A fuser folder that is incomplete, damaged, unsafe or of an unknown layout."""


class FuserMismatchError(C2CError, ValueError):
    """A fuser that was trained for another pair than the one it was given."""


class RecipeError(C2CError, ValueError):
    """A training recipe with fields that are missing, unknown or out of range."""


class DataError(C2CError, ValueError):
    """Rows that do not have the promised form."""


class TrainingError(C2CError, RuntimeError):
    """A training run that cannot go on: another run's folder, a loss that is not finite or explodes."""


class EvaluationError(C2CError, RuntimeError):
    """A system that fails on more rows than a run allows, or that breaks the promises of its interface."""


class PayloadError(C2CError, ValueError):
    """A sharer's cache that is malformed, damaged, tampered with, too large, or of another model or prompt."""


class RequestError(C2CError, ValueError):
    """A request that a server cannot answer as it is asked: an unknown sharer, options out of range, too much memory.

    Args:
        field: the request's field that is at fault, where it is one.
    """

    def __init__(self, what: str, *, field: str | None = None, **rest: Any):
        super().__init__(what, **rest)
        self.field = field

    def __reduce__(self) -> tuple[Any, ...]:
        return *super().__reduce__(), {"field": self.field}


class BusyError(C2CError, RuntimeError):
    """A server that takes no further request now: its queue is full, or it is about to stop.

    Args:
        retry_after: seconds after which asking again is worth it.
    """

    def __init__(self, what: str, *, retry_after: float = 1.0, **rest: Any):
        super().__init__(what, **rest)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return *super().__reduce__(), {"retry_after": self.retry_after}


class SharerError(C2CError, RuntimeError):
    """A sharer that runs as a service and is dead, slow, busy, not the model that it was, or sends what it should not."""


class MissingExtraError(C2CError, ImportError):
    """A feature whose optional dependencies are not installed."""
