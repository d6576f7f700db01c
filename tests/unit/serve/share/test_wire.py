"""What travels between a pair and a service."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache2cache.errors import PayloadError
from cache2cache.serve import wire


@given(st.lists(st.binary(max_size=20), max_size=5))
def test_payloads_come_apart_as_they_were_put_together(payloads):
    assert [bytes(p) for p in wire.split(wire.join(payloads), len(payloads))] == payloads


@given(st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=4), st.data())
def test_any_other_number_of_bytes_or_payloads_is_noticed(payloads, data):
    whole, count = wire.join(payloads), len(payloads)
    cut = data.draw(st.integers(0, len(whole) - 1))
    for wrong, expected in ((whole[:cut], count), (whole + b"x", count), (whole, count - 1), (whole, count + 1)):
        with pytest.raises(PayloadError, match="truncated or continued"):
            wire.split(wrong, expected)


@given(st.binary(max_size=64), st.integers(0, 4))
def test_nonsense_is_split_or_refused(data, count):
    try:
        payloads = wire.split(data, count)
    except PayloadError:
        return
    assert wire.join(bytes(p) for p in payloads) == data


def test_every_request_and_key_has_a_signing_key_of_its_own():
    keys = {wire.request_key(key, body) for key in (b"k" * 32, b"o" * 32) for body in (b"", b"a", b"b")}
    assert len(keys) == 6
    assert wire.signature(b"k" * 32, b"a") != wire.request_key(b"k" * 32, b"a").hex()
