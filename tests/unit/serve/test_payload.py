"""Payloads: what goes in comes out, and nothing else comes out."""

from __future__ import annotations

import hashlib
import json
import random
import struct
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from cache2cache.errors import MissingExtraError, PayloadError
from cache2cache.models import kv as caches
from cache2cache.serve import envelope
from cache2cache.serve.payload import Precision, SharerCache, ids_digest
from cache2cache.serve.quantise import dequantise, quantise
from cache2cache.testing import tiny_model
from cache2cache.types import Geometry, ModelCard, Rope

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
IDS = [5, 3, 8, 1, 9, 2, 2]
MAX_BYTES = 1 << 20
LEVELS = {"int8": 127, "int4": 7}

CARD = ModelCard(
    id="tiny",
    revision="abc",
    geometry=Geometry(
        layers=4, kv_heads=2, head_dim=6, vocab_size=10, max_positions=64,
        ropes=(Rope(inv_freq=(1.0, 0.1, 1 / 3)),), rope_of_layer=(0, 0, 0, 0),
    ),
    tokenizer="0123456789abcdef",
)  # fmt: skip


def held(dtype: torch.dtype = torch.float32, seed: int = 0, **fields: Any) -> SharerCache:
    """A cache of two of four layers and five of seven positions, with one channel of zeros and one large one."""
    values = torch.randn((2, 2, 2, 5, 6), generator=torch.Generator().manual_seed(seed))
    values[0, 1, 0, :, 3] = 0
    values[1, 0, 1, :, 2] *= 1000
    settings = {
        "model": CARD,
        "ids_digest": ids_digest(IDS),
        "length": len(IDS),
        "positions": torch.tensor([0, 2, 3, 5, 6]),
        "layers": (1, 3),
        "kv": values.to(dtype),
        **fields,
    }
    return SharerCache(**settings)


def read(data: bytes, key: bytes | None = None, max_bytes: int = MAX_BYTES) -> SharerCache:
    return SharerCache.from_bytes(data, max_bytes=max_bytes, key=key)


def resealed(
    data: bytes,
    header: Callable[[dict], Any] = lambda fields: fields,
    body: Callable[[bytes], bytes] = lambda body: body,
) -> bytes:
    """The payload of someone who lies and computes the digest of the lie."""
    raw, content = envelope.unseal(data)
    changed = header(json.loads(raw))
    return envelope.seal(changed if isinstance(changed, bytes) else json.dumps(changed).encode(), body(bytes(content)))


# --- what goes in comes out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, KEY], ids=["unsigned", "signed"])
@pytest.mark.parametrize("compress", [False, True], ids=["plain", "zstd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_it_is_every_bit_comes_back(dtype: torch.dtype, compress: bool, key: bytes | None):
    cache = held(dtype)
    back = read(cache.to_bytes(compress=compress, key=key), key)
    assert back.kv.dtype == dtype
    assert torch.equal(back.kv.view(torch.uint8), cache.kv.view(torch.uint8))
    assert torch.equal(back.positions, cache.positions)
    for field in ("model", "ids_digest", "length", "layers"):
        assert getattr(back, field) == getattr(cache, field)


@pytest.mark.parametrize(
    ("own", "precision", "comes_back"),
    [
        (torch.bfloat16, "float32", torch.float32),
        (torch.float16, "float32", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.bfloat16, "bfloat16", torch.bfloat16),
    ],
)
def test_float_precisions_convert(own: torch.dtype, precision: Precision, comes_back: torch.dtype):
    cache = held(own)
    back = read(cache.to_bytes(precision=precision))
    assert back.kv.dtype == comes_back
    assert torch.equal(back.kv, cache.kv.to(comes_back))


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "zstd"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, 2**-24), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str
)
def test_integer_precisions_err_by_half_a_scale(
    dtype: torch.dtype, rounding: float, precision: Precision, compress: bool
):
    cache = held(dtype)
    back = read(cache.to_bytes(precision=precision, compress=compress))
    assert back.kv.dtype == dtype
    original = cache.kv.float()
    scale = original.abs().amax(3, keepdim=True) / LEVELS[precision]
    # The last factor is what rounding adds when the code is multiplied out and cast.
    assert ((back.kv.float() - original).abs() <= (0.5 * scale + original.abs() * rounding) * 1.01).all()
    assert (back.kv.float() - original).abs().max() > 0.1 * scale.max()  # it is quantised, and by this much
    assert (back.kv[0, 1, 0, :, 3] == 0).all()


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("channels", [1, 2, 5, 8])
@given(data=st.data())
def test_any_cache_quantises_within_half_a_scale(precision, channels: int, data: st.DataObject):
    numbers = data.draw(
        st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=6 * channels, max_size=6 * channels),
        label="numbers",
    )
    kv = torch.tensor(numbers).reshape(2, 1, 1, 3, channels)
    tensors = quantise(kv, precision)
    back = dequantise(tensors, precision, torch.float32)
    assert ((back - kv).abs() <= 0.5001 * tensors["scales"][:, :, :, None]).all()
    ideal = (kv.abs().amax(3) / LEVELS[precision]).clamp(min=torch.finfo(torch.float32).tiny)
    assert torch.equal(tensors["scales"], ideal)


@pytest.mark.parametrize(("precision", "bits"), [("float32", 32), ("bfloat16", 16), ("int8", 8), ("int4", 4)])
def test_each_precision_takes_its_bits(precision: Precision, bits: int):
    """Between two lengths of prompt, so that headers and scales cancel."""
    sizes = {}
    for count in (100, 200):
        cache = held(
            length=count, positions=torch.arange(count), kv=torch.randn((2, 2, 2, count, 6)), ids_digest="0" * 64
        )
        sizes[count] = len(cache.to_bytes(precision=precision))
    per_position = (sizes[200] - sizes[100]) / 100
    assert per_position == pytest.approx(8 + 2 * 2 * 2 * 6 * bits / 8, abs=0.5)


def test_the_cache_of_a_model_travels():
    lm = tiny_model("llama")
    ids = torch.arange(3, 23)[None]
    cache = caches.prefill(lm.model, ids, torch.ones_like(ids))
    at, layers = torch.arange(4, 19), (0, 2)
    kv = caches.gather(cache, at[None], layers)[:, :, 0]
    sent = SharerCache(lm.card, ids_digest(ids[0]), ids.shape[1], at, layers, kv)
    back = read(sent.to_bytes(compress=True, key=KEY), KEY)
    back.matches(lm.card, ids[0])
    assert torch.equal(back.kv, kv)


@pytest.mark.parametrize("precision", [None, *get_args(Precision)])
def test_the_same_cache_gives_the_same_bytes(precision: Precision | None):
    first, second = (held().to_bytes(precision=precision, compress=True, key=KEY) for _ in range(2))
    assert first == second
    strided = replace(held(), kv=held().kv.transpose(3, 4).contiguous().transpose(3, 4))
    assert strided.to_bytes(precision=precision, compress=True, key=KEY) == first


def test_ids_have_one_digest_whatever_holds_them():
    digests = {ids_digest(ids) for ids in (IDS, np.array(IDS, dtype=np.int32), torch.tensor(IDS))}
    assert digests == {hashlib.sha256(struct.pack("<7q", *IDS)).hexdigest()}


# --- caches that cannot be ----------------------------------------------------------------------------------------


def geometry(**sizes: int) -> ModelCard:
    return CARD.model_copy(update={"geometry": CARD.geometry.model_copy(update=sizes)})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"ids_digest": "0" * 63}, "digest of the token ids"),
        ({"ids_digest": "0" * 64 + "\n"}, "digest of the token ids"),
        ({"ids_digest": "A" * 64}, "digest of the token ids"),
        ({"layers": ()}, "layers"),
        ({"layers": (3, 1)}, "layers"),
        ({"layers": (1, 1)}, "layers"),
        ({"layers": (-1, 1)}, "layers"),
        ({"layers": (1, 4)}, "layers"),
        ({"layers": (1, 2, 3)}, "keys and values"),
        ({"positions": torch.tensor([0, 2, 3, 5, 7])}, "ascending positions"),
        ({"positions": torch.tensor([-1, 2, 3, 5, 6])}, "ascending positions"),
        ({"positions": torch.tensor([0, 2, 2, 5, 6])}, "ascending positions"),
        ({"positions": torch.tensor([0, 3, 2, 5, 6])}, "ascending positions"),
        ({"positions": torch.tensor([0, 2, 3, 5])}, "keys and values"),
        ({"positions": torch.tensor([0, 2, 3, 5, 6], dtype=torch.int32)}, "positions have"),
        ({"positions": torch.tensor([[0, 2, 3, 5, 6]])}, "positions have"),
        ({"positions": torch.empty(0, dtype=torch.int64)}, "positions have"),
        ({"length": 6}, "ascending positions"),
        ({"length": 0}, "ascending positions"),
        ({"kv": torch.zeros((2, 2, 2, 5, 7))}, "keys and values"),
        ({"kv": torch.zeros((2, 2, 2, 5, 6), dtype=torch.float64)}, "keys and values"),
        ({"kv": torch.zeros((2, 2, 2, 5, 6), dtype=torch.int8)}, "keys and values"),
        ({"model": geometry(layers=0)}, "geometry"),
        ({"model": geometry(kv_heads=-2)}, "geometry"),
        ({"model": geometry(head_dim=1 << 31)}, "geometry"),
    ],
)
def test_fields_that_contradict_one_another_are_refused(fields: dict, says: str):
    with pytest.raises(PayloadError, match=says):
        held(**fields)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_not_finite_is_refused_wherever_it_stands(value: float, dtype: torch.dtype):
    for at in range(2 * 2 * 2 * 5 * 6):
        kv = held(dtype).kv.clone()
        kv.view(-1)[at] = value
        with pytest.raises(PayloadError, match="finite"):
            held(kv=kv)


@pytest.mark.parametrize(
    ("cache", "options", "says"),
    [
        (held(), {"precision": "int2"}, "precision; got int2; allowed: float32, bfloat16, int8, int4"),
        (held(), {"precision": "float16"}, "precision"),
        (held(kv=torch.full((2, 2, 2, 5, 6), 3.4e38)), {"precision": "bfloat16"}, "too large"),
        (held(), {"key": b""}, "key is empty"),
        (held(model=CARD.model_copy(update={"id": "x" * 70_000})), {}, "header is too long"),
    ],
)
def test_what_cannot_be_written_is_refused(cache: SharerCache, options: dict, says: str):
    with pytest.raises(PayloadError, match=says):
        cache.to_bytes(**options)


# --- envelopes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, KEY], ids=["unsigned", "signed"])
def test_every_truncation_is_refused(key: bytes | None):
    data = held(torch.bfloat16).to_bytes(key=key)
    for size in range(len(data)):
        with pytest.raises(PayloadError):
            read(data[:size], key)


def prelude(data: bytes, **changes: int | bytes) -> bytes:
    """Other values in the prelude, the rest as it was."""
    names = ("magic", "version", "signed", "header", "body")
    form = struct.Struct("<6sHBIQ")
    fields = dict(zip(names, form.unpack_from(data), strict=True)) | changes
    return form.pack(*fields.values()) + data[form.size :]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: b"", "not a payload"),
        (lambda data: b"<html>502 Bad Gateway</html>" * 9, "not a payload"),
        (lambda data: prelude(data, magic=b"C2CkvX"), "not a payload"),
        (lambda data: prelude(data, version=2), "another format version"),
        (lambda data: prelude(data, signed=1), "signed, but no key"),
        (lambda data: prelude(data, signed=2), "signed, but no key"),
        (lambda data: prelude(data, header=0), "lengths are wrong"),
        (lambda data: prelude(data, header=(1 << 32) - 1), "lengths are wrong"),
        (lambda data: prelude(data, body=(1 << 64) - 1), "lengths are wrong"),
        (lambda data: data + b"\0", "lengths are wrong"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "digest is wrong"),
        (lambda data: data[:100] + data[100:][::-1], "digest is wrong"),
    ],
)
def test_bytes_that_are_no_payload_are_refused(change: Callable[[bytes], bytes], says: str):
    with pytest.raises(PayloadError, match=says):
        read(change(held().to_bytes()))


def test_a_header_that_is_too_long_is_refused_even_if_its_lengths_add_up():
    data = envelope.seal(b"", b"x" * 200_000)
    with pytest.raises(PayloadError, match="lengths are wrong"):
        read(prelude(data, header=100_000, body=100_000))


@pytest.mark.parametrize(
    ("signed_with", "read_with", "says"),
    [
        (None, KEY, "not signed, but a key is required"),
        (KEY, None, "signed, but no key"),
        (KEY, OTHER_KEY, "not signed with this key"),
        (KEY, b"", "key is empty"),
    ],
)
def test_keys_must_agree(signed_with: bytes | None, read_with: bytes | None, says: str):
    with pytest.raises(PayloadError, match=says):
        read(held().to_bytes(key=signed_with), read_with)


def test_no_error_shows_a_key():
    with pytest.raises(PayloadError) as refused:
        read(held().to_bytes(key=b"a secret of ours"), b"another secret")
    assert "secret" not in str(refused.value)


def test_a_signature_that_is_cut_off_is_missed():
    """Removing it and saying that there never was one yields a whole, unsigned payload, which a key refuses."""
    header, body = envelope.unseal(held().to_bytes(key=KEY), KEY)
    stripped = envelope.seal(header, bytes(body))
    assert torch.equal(read(stripped).kv, held().kv)
    with pytest.raises(PayloadError, match="not signed, but a key is required"):
        read(stripped, KEY)


# --- tampering ----------------------------------------------------------------------------------------------------


def refuses_flips(count: int, key: bytes | None, compress: bool) -> None:
    """Flip one bit at `count` places, half of them outside keys and values."""
    data = held(torch.bfloat16).to_bytes(compress=compress, key=key)
    places = random.Random(0)
    header = struct.calcsize("<6sHBIQ") + struct.unpack_from("<I", data, 9)[0]
    for i in range(count):
        at = places.randrange(len(data) if i % 2 else header)
        flipped = bytearray(data)
        flipped[at] ^= 1 << places.randrange(8)
        with pytest.raises(PayloadError):
            read(bytes(flipped), key)


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "zstd"])
@pytest.mark.parametrize("key", [None, KEY], ids=["digest", "signature"])
def test_flipped_bits_are_noticed(key: bytes | None, compress: bool):
    refuses_flips(500, key, compress)


@pytest.mark.slow
@pytest.mark.parametrize("compress", [False, True], ids=["plain", "zstd"])
@pytest.mark.parametrize("key", [None, KEY], ids=["digest", "signature"])
def test_ten_thousand_flipped_bits_are_noticed(key: bytes | None, compress: bool):
    refuses_flips(10_000, key, compress)


def test_a_flip_that_the_digest_was_recomputed_for_still_fails_the_signature():
    header, body = envelope.unseal(held().to_bytes(key=KEY), KEY)
    lie = bytearray(body)
    lie[-1] ^= 1
    signature = held().to_bytes(key=KEY)[-32:]
    unsigned = prelude(envelope.seal(header, bytes(lie), OTHER_KEY)[:-32], signed=1)
    with pytest.raises(PayloadError, match="not signed with this key"):
        read(unsigned + signature, KEY)


@pytest.mark.parametrize("key", [None, KEY], ids=["digest", "signature"])
def test_parts_of_two_payloads_do_not_mix(key: bytes | None):
    """Two payloads of one key and of one size: every mixture of their headers, bodies, digests and signatures."""
    other_ids = [*IDS[:-1], 7]
    payloads = [held().to_bytes(key=key), held(seed=1, ids_digest=ids_digest(other_ids)).to_bytes(key=key)]
    split = struct.calcsize("<6sHBIQ") + struct.unpack_from("<I", payloads[0], 9)[0]
    ends = [0, split, len(payloads[0]) - 32 * (2 if key else 1), *([len(payloads[0]) - 32] if key else [])]
    parts = [[data[a:b] for a, b in zip(ends, [*ends[1:], None], strict=True)] for data in payloads]
    for choice in range(1, 2 ** len(ends) - 1):
        mixed = b"".join(parts[choice >> i & 1][i] for i in range(len(ends)))
        with pytest.raises(PayloadError, match="digest is wrong|not signed with this key"):
            read(mixed, key)
    for data, ids in zip(payloads, (IDS, other_ids), strict=True):
        read(data, key).matches(CARD, ids)


@pytest.mark.parametrize(
    "ids", [[*IDS[:-1], 7], IDS[:-1], [*IDS, 1], IDS[::-1], []], ids=["other", "shorter", "longer", "order", "none"]
)
def test_replay_under_another_prompt_is_refused(ids: list[int]):
    back = read(held().to_bytes(key=KEY), KEY)
    back.matches(CARD, IDS)
    with pytest.raises(PayloadError, match="another prompt"):
        back.matches(CARD, ids)


def test_a_length_that_is_not_the_prompts_is_refused():
    with pytest.raises(PayloadError, match="another prompt"):
        held(length=9).matches(CARD, IDS)


@pytest.mark.parametrize(
    ("card", "says"),
    [
        (CARD.model_copy(update={"id": "other"}), "other id; allowed: other"),
        (CARD.model_copy(update={"revision": None}), "other revision"),
        (CARD.model_copy(update={"tokenizer": "f" * 16}), "other tokenizer"),
        (geometry(layers=5), "other geometry"),
        (geometry(max_positions=128), "other geometry"),
        (CARD.model_copy(update={"id": "other", "tokenizer": None}), "other id, tokenizer"),
    ],
)
def test_another_models_cache_is_refused(card: ModelCard, says: str):
    with pytest.raises(PayloadError, match=f"another model's; got tiny: {says}"):
        held().matches(card, IDS)


# --- headers that lie ---------------------------------------------------------------------------------------------


def sized(**sizes: object) -> Callable[[dict], dict]:
    def change(header: dict) -> dict:
        header["model"]["geometry"] |= sizes
        return header

    return change


HEADER_LIES: list[tuple[Callable[[dict], Any], str]] = [
    (lambda h: b"", "header is malformed"),
    (lambda h: b"\xff\xfe", "header is malformed"),
    (lambda h: b"[]", "header is malformed"),
    (lambda h: b"null", "header is malformed"),
    (lambda h: b"[" * 60_000, "header is malformed"),
    (lambda h: json.dumps(h).encode()[:-1], "header is malformed"),
    (lambda h: json.dumps(h).encode() + b"{}", "header is malformed"),
    (lambda h: h | {"x": 1}, "'x': "),
    (lambda h: h | {"length": "7"}, "'length': "),
    (lambda h: h | {"length": 7.0}, "'length': "),
    (lambda h: h | {"length": True}, "'length': "),
    (lambda h: h | {"length": -1}, "'length': "),
    (lambda h: h | {"length": 10**4000}, "'length': "),
    (lambda h: b'{"length":1' + b"0" * 5000 + b"}", "header is malformed"),
    (lambda h: h | {"length": 6}, "ascending positions"),
    (lambda h: h | {"held": 0}, "'held': "),
    (lambda h: h | {"held": 4}, "not those of its header"),
    (lambda h: h | {"held": (1 << 31) - 1}, "cache is too large"),
    (lambda h: h | {"layers": []}, "'layers': "),
    (lambda h: h | {"layers": "13"}, "'layers': "),
    (lambda h: h | {"layers": [1]}, "not those of its header"),
    (lambda h: h | {"layers": [1, 4]}, "ascending layers"),
    (lambda h: h | {"layers": [3, 1]}, "ascending layers"),
    (lambda h: h | {"layers": [-1, 10**4000]}, "ascending layers"),
    (lambda h: h | {"layers": [1] * 20_000}, "cache is too large"),
    (lambda h: h | {"dtype": "float64"}, "'dtype': "),
    (lambda h: h | {"dtype": "bfloat16"}, "not those of its header"),
    (lambda h: h | {"quantised": "int2"}, "'quantised': "),
    (lambda h: h | {"quantised": "int8"}, "not those of its header"),
    (lambda h: h | {"compressed": 1}, "'compressed': "),
    (lambda h: h | {"compressed": True}, "cannot be decompressed"),
    (lambda h: h | {"body_bytes": h["body_bytes"] + 1}, "another size"),
    (lambda h: h | {"body_bytes": h["body_bytes"] - 1}, "another size"),
    (lambda h: h | {"body_bytes": 1}, "cannot have the size"),
    (lambda h: h | {"body_bytes": (1 << 62) - 1}, "body is too large"),
    (lambda h: h | {"body_bytes": 1 << 62}, "'body_bytes': "),
    (lambda h: h | {"ids_digest": "zz"}, "digest of the token ids"),
    (lambda h: h | {"ids_digest": None}, "'ids_digest': "),
    (lambda h: h | {"model": None}, "'model': "),
    (lambda h: h | {"model": h["model"] | {"code": "x"}}, "'model.code': "),
    (sized(layers=0), "geometry"),
    (sized(layers=3), "one per layer"),
    (sized(layers=3, rope_of_layer=[0] * 3), "ascending layers"),
    (sized(layers=10**4000), "one per layer"),
    (sized(rope_of_layer=[10**4000] * 4), "ropes that are not there"),
    (sized(kv_heads=0), "geometry"),
    (sized(kv_heads=3), "cannot have the size"),
    (sized(head_dim=-6), "geometry"),
    (sized(head_dim=10**4000), "geometry"),
    (sized(head_dim=(1 << 31) - 1, kv_heads=(1 << 31) - 1), "cache is too large"),
]


@pytest.mark.parametrize(("lie", "says"), HEADER_LIES, ids=range(len(HEADER_LIES)))
def test_headers_that_lie_are_refused(lie: Callable[[dict], Any], says: str):
    data = resealed(held().to_bytes(), header=lie)
    with pytest.raises(PayloadError, match=says) as refused:
        read(data)
    assert len(str(refused.value)) < 1000


def test_every_field_of_the_header_is_needed():
    def without(name: str) -> Callable[[dict], dict]:
        return lambda h: {key: value for key, value in h.items() if key != name}

    data = held().to_bytes()
    for name in json.loads(envelope.unseal(data)[0]):
        with pytest.raises(PayloadError, match=f"'{name}': Field required"):
            read(resealed(data, header=without(name)))


# --- bodies that lie ----------------------------------------------------------------------------------------------


def rebuilt(precision: Precision | None, change: Callable[[dict], dict], compress: bool = False) -> bytes:
    """A payload whose tensors were changed, with everything in the header that follows from them."""
    data = held().to_bytes(precision=precision)
    body = save(change(load(bytes(envelope.unseal(data)[1]))))
    return resealed(
        data,
        header=lambda h: h | {"body_bytes": len(body), "compressed": compress},
        body=lambda _: envelope.compress(body) if compress else body,
    )


def put(name: str, place: Any, value: float) -> Callable[[dict], dict]:
    def change(tensors: dict) -> dict:
        tensors[name][place] = value
        return tensors

    return change


BODY_LIES: list[tuple[Precision | None, Callable[[dict], dict], str]] = [
    (None, put("kv", (1, 1, 1, 4, 5), torch.nan), "not finite"),
    (None, put("kv", (0, 0, 0, 0, 0), torch.inf), "not finite"),
    (None, put("positions", 4, 7), "ascending positions"),
    (None, put("positions", 0, -1), "ascending positions"),
    (None, put("positions", 1, 0), "ascending positions"),
    (None, lambda t: {"kv": t["kv"], "position": t["positions"]}, "not those of its header"),
    (None, lambda t: t | {"x": torch.zeros(1)}, "not those of its header"),
    (None, lambda t: t | {"kv": t["kv"].flatten()}, "not those of its header"),
    (None, lambda t: t | {"kv": t["kv"].view(torch.int32)}, "not those of its header"),
    (None, lambda t: t | {"positions": t["positions"].double()}, "not those of its header"),
    ("int8", lambda t: t | {"kv": t["kv"].view(torch.uint8)}, "not those of its header"),
    ("int4", lambda t: t | {"kv": t["kv"].view(torch.int8)}, "not those of its header"),
    ("int8", put("scales", (0, 0, 0, 0), 0.0), "scales that are not positive"),
    ("int8", put("scales", (0, 0, 0, 0), -1.0), "scales that are not positive"),
    ("int4", put("scales", (0, 0, 0, 0), torch.nan), "scales that are not positive"),
    ("int4", put("scales", (0, 0, 0, 0), torch.inf), "not finite"),
]


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "zstd"])
@pytest.mark.parametrize(("precision", "change", "says"), BODY_LIES, ids=range(len(BODY_LIES)))
def test_bodies_that_lie_are_refused(precision, change: Callable[[dict], dict], says: str, compress: bool):
    with pytest.raises(PayloadError, match=says):
        read(rebuilt(precision, change, compress))


@pytest.mark.parametrize(
    "change",
    [
        lambda body: bytes(len(body)),
        lambda body: b"\xff" * len(body),
        lambda body: body[8:] + body[:8],
        lambda body: struct.pack("<Q", len(body)) + body[8:],
        lambda body: body[:8] + body[8:].replace(b"[0,", b"[8,", 1),
        lambda body: body[:8] + body[8:].replace(b'"I64"', b'"F64"', 1),
        lambda body: body[:8] + body[8:].replace(b'"I64"', b'"X64"', 1),
        lambda body: b"\x80\x04." + body[3:],
    ],
)
def test_bodies_that_are_not_safetensors_are_refused(change: Callable[[bytes], bytes]):
    with pytest.raises(PayloadError, match="not safetensors|not those of its header"):
        read(resealed(held().to_bytes(), body=change))


# --- compression and memory ---------------------------------------------------------------------------------------


def frames(*parts: bytes, **options: Any) -> bytes:
    return b"".join(zstandard.ZstdCompressor(**options).compress(part) for part in parts)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda body: b"", "another size"),
        (lambda body: b"not zstd at all", "cannot be decompressed"),
        (lambda body: frames(body)[:-9], "another size|cannot be decompressed"),
        (lambda body: frames(body) + b"and more", "cannot be decompressed"),
        (lambda body: frames(body, b"and more"), "more than"),
        (lambda body: frames(body[:-1]), "another size"),
        (lambda body: frames(body + b"\0"), "more than"),
        (lambda body: frames(bytes(1 << 26)), "more than"),
    ],
)
def test_frames_that_lie_are_refused(change: Callable[[bytes], bytes], says: str):
    plain = bytes(envelope.unseal(held().to_bytes())[1])
    with pytest.raises(PayloadError, match=says):
        read(resealed(held().to_bytes(compress=True), body=lambda _: change(plain)))


def peak(call: Callable[[], object]) -> int:
    """Most memory that Python held at once while refusing, in bytes."""
    tracemalloc.start()
    try:
        with pytest.raises(PayloadError):
            call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_bomb_does_not_go_off():
    """2 GiB of zeros in some hundred kB, and the header promises no more than what the cache takes."""
    block = bytes(1 << 20)
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    bomb = b"".join([compressor.compress(block) for _ in range(2048)] + [compressor.flush()])
    data = resealed(held().to_bytes(compress=True), body=lambda _: bomb)
    assert peak(lambda: read(data)) < len(bomb) + (1 << 22)


def test_a_frame_that_wants_a_huge_window_is_refused():
    """A frame's window is memory too: 16 MiB here, asked for in a handful of bytes; zstd itself allows 128."""
    magic, no_size_and_16_mib, empty_last_block = b"\x28\xb5\x2f\xfd", b"\x00\x70", b"\x01\x00\x00"
    data = resealed(held().to_bytes(compress=True), body=lambda _: magic + no_size_and_16_mib + empty_last_block)
    with pytest.raises(PayloadError, match="too much memory"):
        read(data)


def promising(held_positions: int, precision: Precision | None) -> bytes:
    """A few hundred bytes that promise a cache of many positions."""

    def change(header: dict) -> dict:
        values = 2 * 2 * 2 * held_positions * 6
        width = {None: 4, "int8": 1, "int4": 0.5}[precision]  # type: ignore[index]
        scales = 0 if precision is None else 2 * 2 * 2 * 6 * 4
        promise = int(values * width) + held_positions * 8 + scales + 300
        return header | {"held": held_positions, "length": held_positions, "body_bytes": promise, "compressed": True}

    return resealed(held().to_bytes(precision=precision, compress=True), header=change)


@pytest.mark.parametrize("precision", [None, "int8", "int4"])
def test_promises_allocate_nothing(precision: Precision | None):
    """Even where the bound would allow it, memory follows the bytes that come, not those that are promised."""
    data = promising(1 << 24, precision)
    assert peak(lambda: read(data, max_bytes=1 << 40)) < 1 << 22


@pytest.mark.parametrize("precision", [None, *get_args(Precision)])
@pytest.mark.parametrize("compress", [False, True], ids=["plain", "zstd"])
def test_the_bound_is_on_what_comes_and_on_what_it_becomes(precision: Precision | None, compress: bool):
    count = 500
    cache = held(length=count, positions=torch.arange(count), kv=torch.zeros((2, 2, 2, count, 6)))
    data = cache.to_bytes(precision=precision, compress=compress)
    header, _ = envelope.unseal(data)
    in_memory = cache.kv.numel() * (2 if precision == "bfloat16" else 4)
    needed = max(len(data), json.loads(header)["body_bytes"], in_memory)
    assert len(read(data, max_bytes=needed).positions) == count
    with pytest.raises(PayloadError, match="too large"):
        read(data, max_bytes=needed - 1)


def test_without_zstandard_compression_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    data = held().to_bytes(compress=True)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    for call in (lambda: read(data), lambda: held().to_bytes(compress=True)):
        with pytest.raises(MissingExtraError, match=r"cache2cache\[serve\]"):
            call()
    assert torch.equal(read(held().to_bytes()).kv, held().kv)


# --- fuzzing ------------------------------------------------------------------------------------------------------

VALID = [
    held(torch.bfloat16).to_bytes(precision=precision, compress=compress)
    for precision in (None, "int8", "int4")
    for compress in (False, True)
]


def read_or_refuse(data: bytes, key: bytes | None = None) -> None:
    try:
        back = read(data, key)
    except PayloadError as error:
        str(error)
    else:
        assert back.kv.isfinite().all() and back.kv.nbytes <= MAX_BYTES


@given(st.binary(max_size=400), st.sampled_from([None, KEY]))
def test_any_bytes_are_read_or_refused(data: bytes, key: bytes | None):
    read_or_refuse(data, key)


@given(
    st.sampled_from(VALID),
    st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 4), st.binary(max_size=4)), min_size=1, max_size=6),
    st.booleans(),
)
def test_any_change_behind_a_right_digest_is_read_or_refused(data: bytes, edits: list, in_header: bool):
    parts = [bytearray(part) for part in envelope.unseal(data)]
    changed = parts[0 if in_header else 1]
    for at, removed, added in edits:
        at %= len(changed) + 1
        changed[at : at + removed] = added
    read_or_refuse(envelope.seal(bytes(parts[0]), bytes(parts[1])))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(st.sampled_from(VALID), st.integers(0, 30), _JSON)
def test_any_value_of_any_field_is_read_or_refused(data: bytes, which: int, value: Any):
    def change(header: dict) -> dict:
        places = [(header, key) for key in header]
        places += [(header["model"], key) for key in header["model"]]
        places += [(header["model"]["geometry"], key) for key in header["model"]["geometry"]]
        holder, key = places[which % len(places)]
        holder[key] = value
        return header

    read_or_refuse(resealed(data, header=change))
