"""Asking another machine over HTTP: deadlines, retries and bounded answers. Knows nothing of caches."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx2

from cache2cache.errors import SharerError

_CONNECT_SECONDS = 5.0
_FIRST_PAUSE = 0.1
_MAX_ERROR_BYTES = 1 << 14
_BUSY = (429, 503)


@dataclass(frozen=True)
class Reply:
    """An answer with status 200."""

    body: bytes
    headers: Mapping[str, str]


@dataclass
class Caller:
    """A service and how patiently it is asked. May be used from several threads.

    Asking again is safe, since what is asked for is computed and changes nothing. Still it is done only where no answer
    has come or the service says that it is busy: an answer that is wrong stays wrong, and one that is slow gets slower.

    Raises:
        SharerError: an address that is none, or one with a password in it, which would end up in logs.
    """

    address: str
    token: str | None = field(default=None, repr=False)
    timeout: float = 30.0
    """Seconds for all attempts together. An answer that only trickles in may take up to twice as long to be noticed."""
    retries: int = 2
    cooldown: float = 2.0
    """Seconds for which a service that could not be reached or was too slow is not asked again, so that those who
    wait behind a request that failed do not all wait as long."""

    def __post_init__(self) -> None:
        try:
            url = httpx2.URL(self.address)
        except httpx2.InvalidURL as error:
            raise SharerError("not an address", got=self.address, allowed="http://host:port") from error
        if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.query or url.fragment:
            raise SharerError("the address of a sharer is its scheme, host and port", allowed="http://host:port")
        # Answers are taken as they come: one that was compressed could be of any size afterwards.
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {self.token}"} if self.token else {})
        self._client = httpx2.Client(base_url=url, headers=headers)
        self._rests_until = 0.0

    def ask(self, method: str, path: str, *, body: bytes | None = None, max_bytes: int) -> Reply:
        """One request.

        Args:
            max_bytes: of the answer.

        Raises:
            SharerError: it cannot be reached, is too slow, too busy, or does not answer as it should.
        """
        if time.monotonic() < self._rests_until:
            raise self._error("failed a moment ago and is not asked again yet", hint="Ask again in a few seconds")
        deadline, pause, attempt = time.monotonic() + self.timeout, _FIRST_PAUSE, 0
        while True:
            try:
                return self._attempt(method, path, body, max_bytes, deadline)
            except _AgainError as again:
                wait = max(pause, again.retry_after)
                if attempt == self.retries or time.monotonic() + wait > deadline:
                    self._rests_until = time.monotonic() + self.cooldown
                    raise self._error(str(again), hint="Is it running, and is the address right?") from again.__cause__
            except httpx2.TimeoutException as error:
                self._rests_until = time.monotonic() + self.cooldown
                raise self._error("is too slow", got=f"nothing within {self.timeout:g} s") from error
            except httpx2.HTTPError as error:
                raise self._error("cannot be asked", got=f"{type(error).__name__}: {error}") from error
            time.sleep(wait)
            attempt, pause = attempt + 1, pause * 4

    def _attempt(self, method: str, path: str, body: bytes | None, max_bytes: int, deadline: float) -> Reply:
        left = max(deadline - time.monotonic(), 0.01)
        timeout = httpx2.Timeout(left, connect=min(left, _CONNECT_SECONDS))
        content_type = {"Content-Type": "application/json"} if body is not None else {}
        try:
            with self._client.stream(method, path, content=body, headers=content_type, timeout=timeout) as response:
                return self._read(response, max_bytes, deadline)
        except (httpx2.NetworkError, httpx2.RemoteProtocolError) as error:
            raise _AgainError(f"cannot be reached ({type(error).__name__})") from error

    def _read(self, response: httpx2.Response, max_bytes: int, deadline: float) -> Reply:
        good = response.status_code == 200
        allowed, parts, size = max_bytes if good else _MAX_ERROR_BYTES, [], 0
        for part in response.iter_raw():
            parts.append(part)
            size += len(part)
            if size > allowed:
                raise self._error("sends more than was asked for", got=f"over {allowed:,} bytes")
            if time.monotonic() > deadline:
                raise httpx2.ReadTimeout("the answer trickles in")
        data = b"".join(parts)
        if good:
            return Reply(data, response.headers)
        said = _message(data)
        if response.status_code in _BUSY:
            raise _AgainError(f"is busy ({said})", _seconds(response.headers.get("retry-after")))
        raise self._error(f"refuses with status {response.status_code}", got=said)

    def _error(self, what: str, *, got: str | None = None, hint: str | None = None) -> SharerError:
        return SharerError(f"the sharer at {self.address} {what}", got=got, hint=hint)


class _AgainError(Exception):
    """An attempt that may be repeated."""

    def __init__(self, what: str, retry_after: float = 0.0):
        super().__init__(what)
        self.retry_after = retry_after


def _message(data: bytes) -> str:
    """The message of an error in OpenAI's shape, in one printable line."""
    try:
        said = str(json.loads(data)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        said = data.decode("utf-8", "replace")
    return "".join(c if c.isprintable() else " " for c in said[:300]) or "no reason given"


def _seconds(header: str | None) -> float:
    return float(header) if header is not None and header.isdecimal() and len(header) < 6 else 0.0
