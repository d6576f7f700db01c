"""Where secrets come from."""

from __future__ import annotations

import pytest

from cache2cache.errors import RequestError
from cache2cache.serve.keys import Keys, secret

KEY, OTHER = "k" * 16, "o" * 32


@pytest.mark.parametrize(
    ("presented", "fits"),
    [
        (KEY, True),
        (OTHER, True),
        (KEY + "k", False),
        (KEY[1:], False),
        ("", False),
        (f"{KEY}\n{OTHER}", False),
        ("ü", False),
    ],
)
def test_one_of_the_keys_must_fit_whole(presented, fits):
    assert Keys([KEY, OTHER]).accept(presented) is fits


def test_keys_are_held_as_digests_only():
    keys = Keys([KEY])
    assert KEY not in repr(vars(keys))


def test_from_a_file_or_a_variable(monkeypatch, tmp_path):
    assert Keys.load("C2C_TEST_KEYS", None) is None
    monkeypatch.setenv("C2C_TEST_KEYS", OTHER)
    assert Keys.load("C2C_TEST_KEYS", None).accept(OTHER)
    path = tmp_path / "keys"
    path.write_text(f"\n  {KEY}  \n\n{'z' * 16}\n")
    keys = Keys.load("C2C_TEST_KEYS", path)  # the file goes first
    assert [keys.accept(key) for key in (KEY, "z" * 16, OTHER)] == [True, True, False]


def test_a_secret(monkeypatch, tmp_path):
    assert secret("C2C_TEST_SECRET", None) is None
    monkeypatch.setenv("C2C_TEST_SECRET", f" {OTHER}\n")
    assert secret("C2C_TEST_SECRET", None) == OTHER
    path = tmp_path / "secret"
    path.write_text(f"{KEY}\n")
    assert secret("C2C_TEST_SECRET", path) == KEY


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", b"short", b"k" * 15, b"with a space inside it", "ü".encode() * 20, b"\xff" * 20]
)
def test_secrets_that_cannot_be_used(tmp_path, content):
    path = tmp_path / "secret"
    path.write_bytes(content)
    for load in (Keys.load, secret):
        with pytest.raises(RequestError) as caught:
            load("C2C_TEST_SECRET", path)
        assert "with a space" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    for load in (Keys.load, secret):
        with pytest.raises(RequestError, match="cannot be read"):
            load("C2C_TEST_SECRET", tmp_path / "nowhere")


def test_one_bad_key_among_good_ones_is_not_passed_over(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"{KEY}\nshort\n")
    with pytest.raises(RequestError, match="a key cannot be used"):
        Keys.load("C2C_TEST_KEYS", path)
