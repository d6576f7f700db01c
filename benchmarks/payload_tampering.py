"""What becomes of answers that somebody changes on their way, with a shared key and without."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from fuzz_inputs import PRELUDE, swapped
from payload_service import Service, listen, wanted

from cache2cache.errors import SharerError
from cache2cache.inputs import Row
from cache2cache.models import kv
from cache2cache.pipeline import C2C
from cache2cache.serve import envelope, wire
from cache2cache.serve.caller import Reply
from cache2cache.serve.payload import Precision

KEY = b"shared by those two and nobody else"
ANOTHER_KEY = b"whoever meddles has one of his own"


class Post:
    """Carries answers from a sharer to its listener, or others in their place. Stands in for a `Caller`.

    Args:
        key: that both sides share; None for none.
    """

    address = "in this process"

    def __init__(self, pair: C2C, key: bytes | None):
        self._pair, self.key = pair, key
        self._service = Service(pair.sharers[0], key=key)
        self._instead: bytes | None = None
        self._sent = b""

    def ask(self, method: str, path: str, *, body: bytes, max_bytes: int) -> Reply:
        """See `Caller.ask`."""
        if self._instead is not None:
            return Reply(self._instead, {})
        reply = self._service.ask(method, path, body=body, max_bytes=max_bytes)
        self._sent = reply.body
        return reply

    def answer(self, row: Row, precision: Precision | None = None) -> bytes:
        """What the sharer says to a row."""
        self._instead = None
        self._listener(precision)(row)
        return self._sent

    def listener(self) -> Callable[[Row, bytes], bool]:
        """(row, bytes) → whether they are refused as the answer to the row."""
        ask = self._listener(None)

        def refuses(row: Row, data: bytes) -> bool:
            self._instead = data
            try:
                ask(row)
            except SharerError:
                return True
            return False

        return refuses

    def _listener(self, precision: Precision | None) -> Callable[[Row], object]:
        lm = self._pair.sharers[0]
        remote = listen(self, lm, key=self.key, precision=precision)

        def ask(row: Row) -> None:
            (part,), (positions, layers) = self._pair.collate([row]).sharers, wanted(self._pair, row)
            assert part is not None, "the sharer speaks"
            needed = torch.zeros_like(part.mask, dtype=torch.bool)
            needed[:, positions] = True
            remote.prefill(part.ids, part.mask, kv.new_cache(), needed, layers)

        return ask


@dataclass(frozen=True)
class Fared:
    """How one kind of meddling fared."""

    kind: str
    times: int
    noticed: int


def tamper(pair: C2C, rows: Sequence[Row], key: bytes | None, flips: int, seed: int) -> list[Fared]:
    """Meddle in every way.

    Args:
        rows: two or more, which differ.
        key: that both sides share; whoever meddles does not have it.
        flips: of one bit at a random place.
    """
    post = Post(pair, key)
    answers = [post.answer(row) for row in rows]
    coarser = [post.answer(row, "int4") for row in rows]
    refuses, dice = post.listener(), random.Random(seed)
    wrongly = [i for i, (row, data) in enumerate(zip(rows, answers, strict=True)) if refuses(row, data)]
    assert not wrongly, f"answers that nobody has touched are refused: {wrongly}"

    def forged_bit(i: int) -> bytes:
        header, body = parts(answers[i])
        return forged(header, flipped(body, dice), key)

    pairs, numbers = list(itertools.permutations(range(len(rows)), 2)), range(len(rows))
    kinds = {
        "one bit flipped": [refuses(rows[i], flipped(answers[i], dice)) for i in some(numbers, flips)],
        "another answer's header": [refuses(rows[i], header_of(answers[j], answers[i], dice)) for i, j in pairs],
        "the answer to another prompt": [refuses(rows[i], answers[j]) for i, j in pairs],
        "the answer with fewer bits than asked for": [refuses(rows[i], coarser[i]) for i in numbers],
        "another answer's body, digest made right": [
            refuses(rows[i], forged(parts(answers[i])[0], parts(answers[j])[1], key)) for i, j in pairs
        ],
        "one bit of the body flipped, digest made right": [
            refuses(rows[i], forged_bit(i)) for i in some(numbers, flips // 10)
        ],
    }
    return [Fared(kind, len(noticed), sum(noticed)) for kind, noticed in kinds.items()]


def some(numbers: Sequence[int], count: int) -> Iterator[int]:
    """So many of them, one after the other and again."""
    return itertools.islice(itertools.cycle(numbers), count)


def flipped(answer: bytes, dice: random.Random) -> bytes:
    """One bit of it the other way round."""
    changed = bytearray(answer)
    changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def header_of(other: bytes, answer: bytes, dice: random.Random) -> bytes:
    """An answer with another one's header, and lengths that add up."""
    return wire.join([swapped(dice, payload_of(other), payload_of(answer))])


def forged(header: bytes, body: bytes, key: bytes | None) -> bytes:
    """An answer with a right digest, made by somebody who does not have the key."""
    return wire.join([envelope.seal(header, body, None if key is None else ANOTHER_KEY)])


def parts(answer: bytes) -> tuple[bytes, bytes]:
    """Header and body of an answer, as anybody can take them out."""
    payload = payload_of(answer)
    *_, header_bytes, body_bytes = PRELUDE.unpack_from(payload)
    split = PRELUDE.size + header_bytes
    return payload[PRELUDE.size : split], payload[split : split + body_bytes]


def payload_of(answer: bytes) -> bytes:
    """The only payload of an answer."""
    (payload,) = wire.split(answer, 1)
    return bytes(payload)
