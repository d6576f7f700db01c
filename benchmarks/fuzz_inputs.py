"""What fuzz_payload.py throws at the parser: damaged payloads, lies behind a right digest, and random bytes."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from copy import deepcopy

import torch

from cache2cache.serve import envelope
from cache2cache.serve.payload import SharerCache, ids_digest
from cache2cache.types import Geometry, ModelCard, Rope

KEY = b"k" * 32

PRELUDE = struct.Struct("<6sHBIQ")
"""How a payload begins: magic, version, signed or not, lengths of header and body."""

ODD_NUMBERS = (0, 1, -1, 7, 2**15, 2**31 - 1, 2**31, 2**32, 2**62, 2**63, 2**64, 10**400, 10**4299, 0.5, -0.0, 1e300)
ODD_VALUES = (*ODD_NUMBERS, None, True, "", "x", "int8", "float16", "\x00", "💥", [], {}, [[]], [1, 2], "9" * 5000)

Input = tuple[str, bytes, bytes | None]
"""How it was made, the bytes, and the key to read them with."""


def valid_payloads() -> list[tuple[bytes, bytes | None]]:
    """Payloads of every precision, plain and compressed, unsigned and signed, of three dtypes."""
    size = Geometry(
        layers=4, kv_heads=2, head_dim=6, vocab_size=10, max_positions=64,
        ropes=(Rope(inv_freq=(1.0, 0.1, 0.01)),), rope_of_layer=(0, 0, 0, 0),
    )  # fmt: skip
    card = ModelCard(id="tiny", revision="abc", geometry=size, tokenizer="0123456789abcdef")
    at, noise = torch.tensor([0, 2, 3, 5, 6]), torch.Generator().manual_seed(0)
    payloads = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        kv = torch.randn((2, 2, 2, 5, 6), generator=noise).to(dtype)
        cache = SharerCache(card, ids_digest(range(7)), 7, at, (1, 3), kv)
        for precision in (None, "float32", "bfloat16", "int8", "int4"):
            for compress in (False, True):
                for key in (None, KEY):
                    payloads.append((cache.to_bytes(precision=precision, compress=compress, key=key), key))
    return payloads


def make(dice: random.Random, valid: list[tuple[bytes, bytes | None]]) -> Input:
    """One input, which is never one of the valid payloads, except where a change happens to change nothing."""
    data, key = dice.choice(valid)
    kind = dice.choice(list(MAKERS))
    if kind in RESEALED:
        header, body = envelope.unseal(data, key)
        return kind, envelope.seal(*RESEALED[kind](dice, header, bytes(body)), key), key
    other, other_key = dice.choice([payload for payload in valid if payload != (data, key)])
    return kind, DAMAGED[kind](dice, data, other), dice.choice((key, other_key)) if kind == "swapped" else key


def flip_bits(dice: random.Random, data: bytes, other: bytes) -> bytes:
    changed = bytearray(data)
    for at in dice.sample(range(len(data)), dice.randint(1, 4)):
        changed[at] ^= 1 << dice.randrange(8)
    return bytes(changed)


def swapped(dice: random.Random, data: bytes, other: bytes) -> bytes:
    """One payload's header in another's place, with lengths that add up."""
    magic, version, signed, header_bytes, _ = PRELUDE.unpack_from(data)
    *_, other_header, body_bytes = PRELUDE.unpack_from(other)
    header = data[PRELUDE.size : PRELUDE.size + header_bytes]
    rest = other[PRELUDE.size + other_header :]
    whole = PRELUDE.pack(magic, version, signed, header_bytes, body_bytes) + header + rest
    return flip_bits(dice, whole, other) if whole == other else whole


DAMAGED: dict[str, Callable[[random.Random, bytes, bytes], bytes]] = {
    "bits": flip_bits,
    "truncated": lambda dice, data, other: data[: dice.randrange(len(data))],
    "continued": lambda dice, data, other: data + dice.randbytes(dice.randint(1, 64)),
    "swapped": swapped,
    "random": lambda dice, data, other: (
        dice.choice((b"", data[: dice.randrange(22)])) + dice.randbytes(dice.randrange(2000))
    ),
}
"""Inputs whose digest is wrong."""


def edit(dice: random.Random, data: bytes) -> bytes:
    """Bytes changed, removed, repeated and put in."""
    changed = bytearray(data)
    for _ in range(dice.randint(1, 5)):
        at = dice.randrange(len(changed) + 1)
        size = dice.choice((0, 1, 1, 2, 8, dice.randrange(64)))
        new = dice.choice((dice.randbytes(size), bytes(size), b"\xff" * size, bytes(changed[at : at + size]) * 2))
        changed[at : at + dice.choice((size, len(new)))] = new
    return bytes(changed)


def fields(dice: random.Random, header: bytes, body: bytes) -> tuple[bytes, bytes]:
    """Odd values, missing fields and unknown ones, at any depth."""
    whole = json.loads(header)
    for _ in range(dice.randint(1, 3)):
        holder = dice.choice([part for part in parts_of(whole) if part] or [whole])
        key = dice.choice(list(holder)) if isinstance(holder, dict) else dice.randrange(len(holder))
        old, action = holder[key], dice.random()
        if action < 0.1:
            del holder[key]
        elif action < 0.2 and isinstance(holder, dict):
            holder[dice.choice(("x", "", "__proto__", "kv"))] = old
        elif action < 0.5 and isinstance(old, int):
            holder[key] = old + dice.choice((-1, 1, 2, 64))
        else:
            holder[key] = deepcopy(dice.choice(ODD_VALUES))
    return written(whole), body


def parts_of(value: object) -> list:
    """A JSON value's objects and lists, itself included."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return ([value] if isinstance(value, (dict, list)) else []) + [part for x in inner for part in parts_of(x)]


def written(value: object) -> bytes:
    """JSON that fits into a header."""
    return json.dumps(value).encode()[: envelope.MAX_HEADER_BYTES]


def promises(dice: random.Random, header: bytes, body: bytes) -> tuple[bytes, bytes]:
    """Sizes that fit one another, and a body that is not of them."""
    whole = json.loads(header)
    size = whole["model"]["geometry"]
    whole["held"] = whole["length"] = dice.choice((1, 4, 6, 1000, 1 << 14, 1 << 20, 1 << 30))
    size["kv_heads"], size["head_dim"] = dice.choice((1, 2, 3, 1 << 30)), dice.choice((1, 5, 6, 7, 1 << 30))
    values = 4 * size["kv_heads"] * size["head_dim"] * whole["held"]
    width = {"int8": 1, "int4": 0.5}.get(whole["quantised"], 4 if whole["dtype"] == "float32" else 2)
    whole["body_bytes"] = int(values * width) + whole["held"] * 8 + dice.randrange(600)
    return written(whole), body


def plain_body(dice: random.Random, header: bytes, body: bytes) -> tuple[bytes, bytes]:
    """The body changed before compression, its size told as it is, compressed or not."""
    whole = json.loads(header)
    plain = envelope.decompress(memoryview(body), whole["body_bytes"]) if whole["compressed"] else body
    plain = edit(dice, plain)
    if dice.random() < 0.5:  # keep the size, so that more than the size is tested
        plain = (plain + bytes(len(body)))[: whole["body_bytes"]]
    compressed = dice.random() < 0.5
    whole |= {"body_bytes": len(plain), "compressed": compressed}
    return written(whole), envelope.compress(plain) if compressed else plain


def bomb(dice: random.Random, header: bytes, body: bytes) -> tuple[bytes, bytes]:
    """A frame that unpacks to far more than the header says."""
    return written(json.loads(header) | {"compressed": True}), dice.choice(BOMBS)


BOMBS = [envelope.compress(bytes(1 << power)) for power in (16, 22, 27)]

RESEALED: dict[str, Callable[[random.Random, bytes, bytes], tuple[bytes, bytes]]] = {
    "header bytes": lambda dice, header, body: (edit(dice, header)[: envelope.MAX_HEADER_BYTES], body),
    "header fields": fields,
    "promises": promises,
    "body bytes": lambda dice, header, body: (header, edit(dice, body)),
    "plain body": plain_body,
    "bomb": bomb,
}
"""Inputs whose digest and signature are right."""

MAKERS = [*DAMAGED, *RESEALED, *RESEALED]
