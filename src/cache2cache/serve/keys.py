"""Secrets: where they come from, and comparing them so that the time taken tells nothing. They are never printed."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from cache2cache.errors import RequestError

_SHORTEST = 16


class Keys:
    """Keys of which a caller must present one. Only their digests are held.

    Raises:
        RequestError: no keys, or one that is short enough to be guessed.
    """

    def __init__(self, keys: Iterable[str]):
        self._digests = [_digest(_checked(key, "a key")) for key in keys]
        if not self._digests:
            raise RequestError("no keys at all, so nobody would be let in", allowed="one key per line")

    @classmethod
    def load(cls, variable: str, path: Path | None) -> Keys | None:
        """Keys from a file or an environment variable, one per line; None if neither is given.

        Raises:
            RequestError: see `Keys`; also a file that cannot be read.
        """
        text = _text(variable, path)
        return None if text is None else cls(line.strip() for line in text.splitlines() if line.strip())

    def accept(self, presented: str) -> bool:
        """Whether this is one of them. All are compared, whichever fits."""
        digest = _digest(presented)
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


def secret(variable: str, path: Path | None) -> str | None:
    """One secret from a file or an environment variable, without outer white space; None if neither is given.

    Raises:
        RequestError: it is short enough to be guessed, or the file cannot be read.
    """
    text = _text(variable, path)
    return None if text is None else _checked(text.strip(), f"the secret in {path or variable}")


def _text(variable: str, path: Path | None) -> str | None:
    """The file's, if there is one, otherwise the variable's."""
    if path is None:
        return os.environ.get(variable)
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read", got=f"{type(error).__name__}") from error


def _checked(key: str, what: str) -> str:
    if len(key) < _SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
        raise RequestError(
            f"{what} cannot be used", allowed=f"at least {_SHORTEST} printable ASCII characters without spaces",
            hint='Make one: python -c "import secrets; print(secrets.token_urlsafe(32))"',
        )  # fmt: skip
    return key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
