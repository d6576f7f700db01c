"""What all tests share: the tiny pair, and walls around unit tests.

A test without the marks `real` or `gpu` gets no network and a cache folder of its own, so the default run is
green on a plane and never touches a user's models.
"""

from __future__ import annotations

import gc
import socket
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from cache2cache.fuser.base import Fuser
from cache2cache.models.load import LanguageModel
from cache2cache.testing import CHATML, random_fuser, tiny_pair

# Deadlines measure the machine's load, not the code; derandomized, a failure on one machine is one on all.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True)
hypothesis.settings.load_profile("default")

_LOCAL = ("127.0.0.1", "::1", "localhost")


@pytest.fixture(autouse=True)
def _walls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory) -> Iterator[None]:
    if any(request.node.get_closest_marker(name) for name in ("real", "gpu")):
        yield
        return
    connect = socket.socket.connect

    def guarded(self: socket.socket, address) -> None:
        if isinstance(address, tuple) and address[0] not in _LOCAL:
            raise OSError(f"a unit test asked for the network: {address}; mark it `real` if it has to")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    monkeypatch.setenv("C2C_HOME", str(tmp_path_factory.getbasetemp() / "c2c-home"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more are slower on models this small, and one sums in one order
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect() -> None:
    """What is alive when a module begins stays out of garbage collections: after a thousand tests, each walks it for seconds."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def pair() -> tuple[LanguageModel, LanguageModel]:
    """Tiny receiver and sharer, with different sizes and tokenizers."""
    return tiny_pair()


@pytest.fixture(scope="session")
def receiver(pair: tuple[LanguageModel, LanguageModel]) -> LanguageModel:
    return pair[0]


@pytest.fixture(scope="session")
def sharer(pair: tuple[LanguageModel, LanguageModel]) -> LanguageModel:
    return pair[1]


@pytest.fixture(scope="session")
def fuser(pair: tuple[LanguageModel, LanguageModel]) -> Fuser:
    """A compact fuser of the pair with random weights and open gates. Shared: do not change it."""
    return random_fuser(*pair)


@pytest.fixture(scope="session")
def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: words begin with a space, which the first of a text loses; other characters are bytes."""
    tokens = ["<unk>", "<s>", "</s>", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [*map(chr, range(33, 127)), "aa", "bb", "cc", "▁aa", "▁bb", "▁cc"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [pair for letter in "abc" for pair in ((letter, letter), ("▁", letter * 2))]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*fallback, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=CHATML,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        clean_up_tokenization_spaces=False,
    )
