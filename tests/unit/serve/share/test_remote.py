"""A sharer elsewhere: the same answers as in one process, and whatever goes wrong is noticed."""

from __future__ import annotations

import builtins
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache2cache import C2C
from cache2cache.errors import FuserMismatchError, MissingExtraError, ModelError, SharerError
from cache2cache.models import kv
from cache2cache.models.load import LanguageModel
from cache2cache.serve import wire
from cache2cache.serve.keys import Keys
from cache2cache.serve.node import NodeSettings
from cache2cache.serve.payload import SharerCache
from cache2cache.serve.remote import RemoteOptions, RemoteSharer
from cache2cache.testing import random_fuser, tiny_model
from cache2cache.types import Message, Span

GREEDY = {"do_sample": False, "max_new_tokens": 8}
TOKEN, KEY, OTHER_KEY = "t" * 20, b"k" * 32, b"o" * 32


def said(*texts: str) -> list[Message]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


CONVERSATIONS = [
    said("What color is the answer?"),
    said("naïve café — 缓存 🚀"),
    said("question: 12 == 12", "the answer", "and the question?"),
]


def same_bits(one: C2C, other: C2C, conversations=CONVERSATIONS, sharers=None) -> None:
    """Both fuse the same receiver cache."""
    a, b = (pair.prefill(conversations, sharers=sharers) for pair in (one, other))
    assert torch.equal(kv.stack(a.cache), kv.stack(b.cache))
    assert not b.degraded


# --- the same as in one process -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["compact", "paper"])
@pytest.mark.parametrize("fuse_last", [None, 1, 5])
@pytest.mark.parametrize("alignment", ["native", "retokenise-first", "retokenise-longest"])
def test_same_bits(receiver, sharer, node, kind, fuse_last, alignment):
    fuser = random_fuser(receiver, sharer, kind, fuse_last=fuse_last, alignment=alignment)
    same_bits(C2C(receiver, [sharer], [fuser]), C2C(receiver, [node.sharer()], [fuser]))


def test_same_bits_of_same_ids_and_deeper_layers(receiver, running):
    sharer = tiny_model("gemma3", 5, name="same-tokenizer")
    fuser = random_fuser(receiver, sharer, alignment="same-ids", layer_map=(3, 1))
    with running(sharer) as node:
        same_bits(C2C(receiver, [sharer], [fuser]), C2C(receiver, [node.sharer()], [fuser]))
        assert wire.parse(wire.CacheRequest, node.asked[0]).layers == (1, 3)


def test_same_bits_in_bfloat16(receiver, running):
    sharer = tiny_model("llama", 1)
    sharer = LanguageModel.wrap(sharer.model.bfloat16(), sharer.tokenizer, name="tiny-bf16")
    fuser = random_fuser(receiver, sharer)
    with running(sharer) as node:
        remote = node.sharer()
        assert remote.dtype == torch.bfloat16
        same_bits(C2C(receiver, [sharer], [fuser]), C2C(receiver, [remote], [fuser]))


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_same_bits_of_several_sharers_some_of_them_silent(receiver, sharer, node, mode):
    fusers = [random_fuser(receiver, sharer, seed=1, fuse_last=3), random_fuser(receiver, sharer, seed=2)]
    here = C2C(receiver, [sharer, sharer], fusers, mode)
    speaking = [[0, 1], [], [1]]
    same_bits(here, C2C(receiver, [node.sharer(), sharer], fusers, mode), sharers=speaking)
    same_bits(here, C2C(receiver, [node.sharer(), node.sharer()], fusers, mode), sharers=speaking)


@settings(max_examples=15)
@given(data=st.data())
def test_same_bits_whatever_is_said_and_whoever_speaks(receiver, sharer, shared, data):
    fuser = random_fuser(receiver, sharer, fuse_last=data.draw(st.none() | st.integers(1, 30)))
    rows = data.draw(st.integers(1, 4))
    conversations = [
        said(*data.draw(st.lists(st.text("a é\n缓🚀Q", max_size=12), min_size=1, max_size=3))) for _ in range(rows)
    ]
    speaking = [data.draw(st.sampled_from([[], [0]])) for _ in range(rows)]
    there = C2C(receiver, [shared.sharer()], [fuser])
    same_bits(C2C(receiver, [sharer], [fuser]), there, conversations, speaking)


def test_token_ids_with_their_own_mask_and_alignment(receiver, sharer, fuser, node):
    receiver_ids, sharer_ids = torch.tensor([[0, 7, 8, 9], [3, 4, 5, 6]]), torch.tensor([[5, 6, 7], [0, 0, 9]])
    given_ids = {
        "receiver_ids": receiver_ids,
        "sharer_ids": sharer_ids,
        "receiver_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]),
        "sharer_masks": [torch.tensor([[1, 1, 1], [0, 0, 1]])],
        "alignments": [torch.tensor([[0, 0, 2, 2], [2, 2, 2, 2]])],
        "spans": [Span(0, 2), Span(2, 3, fuse=False)],
    }
    a, b = (C2C(receiver, [s], [fuser]).prefill(**given_ids) for s in (sharer, node.sharer()))
    assert torch.equal(kv.stack(a.cache), kv.stack(b.cache))
    assert [p.positions for p in wire.parse(wire.CacheRequest, node.asked[0]).prompts] == [(0,), (0,)]


def test_answers_streams_beams_and_chats_are_the_same(receiver, sharer, fuser, node):
    here, there = C2C(receiver, [sharer], [fuser]), C2C(receiver, [node.sharer()], [fuser])
    a, b = (pair.generate(CONVERSATIONS, **GREEDY) for pair in (here, there))
    assert [(x.text, x.counts) for x in a] == [(x.text, x.counts) for x in b]
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4}
    a, b = (pair.generate(CONVERSATIONS[0], **options) for pair in (here, there))
    assert [x.ids for x in a] == [x.ids for x in b]
    assert "".join(here.stream(CONVERSATIONS[1], **GREEDY)) == "".join(there.stream(CONVERSATIONS[1], **GREEDY))
    chats = [pair.chat("be brief") for pair in (here, there)]
    for text in ("hello", "and now?", "the question"):
        a, b = (chat.send(text, **GREEDY) for chat in chats)
        assert a.ids == b.ids


def test_only_due_positions_and_mapped_layers_travel(receiver, sharer, node):
    fuser = random_fuser(receiver, sharer, fuse_last=2, layer_map=(2, 2))
    C2C(receiver, [node.sharer()], [fuser]).prefill(CONVERSATIONS[0])
    (request,) = (wire.parse(wire.CacheRequest, body) for body in node.asked)
    prompt = request.prompts[0]
    assert request.layers == (2,)
    assert len(prompt.positions) <= 2
    assert prompt.positions[-1] == len(prompt.ids) - 1
    assert request.precision is None


def test_a_sharer_that_is_not_heard_is_not_asked(receiver, sharer, node):
    closed = random_fuser(receiver, sharer, open_gates=False)
    there = C2C(receiver, [node.sharer()], [closed])
    there.prefill(CONVERSATIONS)
    there.prefill(CONVERSATIONS, sharers=[])
    assert not node.asked


def test_a_later_turn_asks_for_what_is_new(receiver, fuser, node):
    chat = C2C(receiver, [node.sharer()], [fuser]).chat()
    chat.send("hello", **GREEDY)
    chat.send("and now?", **GREEDY)
    first, second = (wire.parse(wire.CacheRequest, body).prompts[0] for body in node.asked)
    assert len(second.ids) > len(first.ids)
    assert second.positions[0] >= len(first.ids) - len("<|im_start|>assistant\n")


@pytest.mark.parametrize(("precision", "error"), [("float32", 0.0), ("bfloat16", 0.05), ("int8", 0.05), ("int4", 0.8)])
@pytest.mark.parametrize("compress", [False, True])
def test_precisions(receiver, sharer, node, precision, error, compress):
    fuser = random_fuser(receiver, sharer)
    remote = node.sharer(precision=precision, compress=compress)
    prepared = C2C(receiver, [sharer], [fuser]).prepare(CONVERSATIONS)
    part = prepared.sharers[0]
    needed, layers = part.mask.bool(), fuser.config.layer_map
    here = sharer.prefill(part.ids, part.mask, kv.new_cache(), needed, layers)
    there = remote.prefill(part.ids, part.mask, kv.new_cache(), needed, layers)
    # (2, L, B, H, M, D) -> (B, M, 2, L, H, D) -> only real tokens of mapped layers
    a, b = (kv.stack(c).permute(2, 4, 0, 1, 3, 5)[part.mask.bool()][:, :, sorted(set(layers))] for c in (here, there))
    a, b = a.float(), b.float()
    assert (a - b).abs().max() <= error * a.abs().max()
    assert (error > 0) == (not torch.equal(a, b))


@pytest.mark.parametrize("limits", [{"max_rows": 2}, {"max_tokens": 150}])
def test_batches_that_are_too_large_for_the_service_are_split(receiver, sharer, fuser, running, limits):
    conversations = [*CONVERSATIONS, *CONVERSATIONS[:2]]
    with running(sharer, NodeSettings(**limits)) as node:
        there = C2C(receiver, [node.sharer()], [fuser])
        answers = there.generate(conversations, **GREEDY)
        assert len(node.asked) > 1
    here = C2C(receiver, [sharer], [fuser]).generate(conversations, **GREEDY)
    assert [x.ids for x in answers] == [x.ids for x in here]


def test_a_prompt_that_is_too_long_for_the_service(receiver, sharer, fuser, running):
    with (
        running(sharer, NodeSettings(max_tokens=10)) as node,
        pytest.raises(SharerError, match="refuses with status 400.*too long"),
    ):
        C2C(receiver, [node.sharer()], [fuser]).prefill(CONVERSATIONS[0])


# --- meeting ------------------------------------------------------------------------------------------------------


def test_who_is_there(sharer, node):
    remote = node.sharer()
    assert remote.card == sharer.card
    assert remote.tokenizer.chat_template == sharer.tokenizer.chat_template
    with pytest.raises(ModelError, match="weights of tiny-sharer are needed here"):
        _ = remote.model


def test_a_fuser_of_another_pair_is_refused(receiver, node):
    other = random_fuser(receiver, tiny_model("qwen2"))
    with pytest.raises(FuserMismatchError, match="does not fit the pair"):
        C2C(receiver, [node.sharer()], [other])


@pytest.mark.parametrize(
    "address",
    ["", "http://", "ftp://host", "http://me:secret@host", "http://host/?token=secret", "http://[", "host:80"],
)
def test_addresses_that_are_none(address):
    with pytest.raises(SharerError, match="address") as caught:
        RemoteSharer.connect(address)
    assert "secret" not in str(caught.value)


def test_nobody_there():
    with pytest.raises(SharerError, match="cannot be reached"):
        RemoteSharer.connect("http://127.0.0.1:9", RemoteOptions(retries=0))


@pytest.mark.parametrize("token", [None, "x" * 20, "t" * 19])
def test_strangers_are_refused(sharer, running, token):
    with running(sharer, NodeSettings(keys=Keys([TOKEN]))) as node:
        with pytest.raises(SharerError, match="refuses with status 401"):
            node.sharer(token=token)
        assert node.sharer(token=TOKEN).card == sharer.card


@pytest.mark.parametrize(("theirs", "ours"), [(None, KEY), (OTHER_KEY, KEY)])
def test_a_description_that_is_not_signed_with_the_key(sharer, running, theirs, ours):
    with (
        running(sharer, NodeSettings(signing_key=theirs)) as node,
        pytest.raises(SharerError, match="does not sign with this key"),
    ):
        node.sharer(key=ours)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": {}}, "bad tokenizer"),
        ({"tokenizer": {"../evil.py": "import os"}}, "unknown tokenizer files"),
        ({"tokenizer": {"tokenizer.json": "{}", "tokenizer_config.json": "{}"}}, "bad tokenizer"),
        ({"dtype": "float64"}, "no sharer"),
        ({"extra": 1}, "no sharer"),
        ({"card": None}, "no sharer"),
    ],
)
def test_descriptions_that_are_wrong(monkeypatch, node, change, message):
    parse = wire.parse

    def changed(kind, raw):
        return parse(kind, raw) if kind is not wire.Description else parse(kind, _json(raw, change))

    monkeypatch.setattr(wire, "parse", changed)
    with pytest.raises(SharerError, match=message):
        node.sharer()


def _json(raw: bytes, change: dict) -> bytes:
    import json

    return json.dumps(json.loads(raw) | change).encode()


def test_a_tokenizer_that_is_not_the_cards(monkeypatch, node):
    from cache2cache.serve.tokenizer_files import pack
    from cache2cache.testing import tiny_tokenizer

    parse, other = wire.parse, pack(tiny_tokenizer())
    monkeypatch.setattr(wire, "parse", lambda kind, raw: parse(kind, _json(raw, {"tokenizer": other})))
    with pytest.raises(SharerError, match="not the one that it should be"):
        node.sharer()


def test_secrets_are_not_shown(node):
    options = RemoteOptions(token=TOKEN, key=KEY)
    assert TOKEN not in repr(options)
    assert repr(KEY) not in repr(options)
    assert TOKEN not in repr(node.sharer(token=TOKEN)._caller)


def test_missing_libraries_are_named(monkeypatch, receiver, fuser):
    real = builtins.__import__

    def without_httpx(name, *rest):
        if name == "httpx2":
            raise ImportError("No module named 'httpx2'")
        return real(name, *rest)

    for name in ("remote", "caller"):
        monkeypatch.delitem(sys.modules, f"cache2cache.serve.{name}", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_httpx)
    with pytest.raises(MissingExtraError, match=r"httpx2.*cache2cache\[serve\]"):
        C2C.from_pretrained("nowhere", ["http://127.0.0.1:9"], [fuser])


# --- what goes wrong ----------------------------------------------------------------------------------------------

FAULTS = {
    "a flipped bit": ({"body": lambda b: b[:-100] + bytes([b[-100] ^ 1]) + b[-99:]}, "digest is wrong"),
    "truncated": ({"body": lambda b: b[:-1]}, "truncated or continued"),
    "continued": ({"body": lambda b: b + b"x"}, "truncated or continued"),
    "nothing": ({"body": b""}, "truncated or continued"),
    "twice": ({"body": lambda b: b + b}, "truncated or continued"),
    "endless": ({"body": bytes(3 << 20)}, "more than was asked for"),
    "a huge length": ({"body": b"\xff" * 64}, "truncated or continued"),
    "a web page": ({"body": b"<html>hello</html>"}, "truncated or continued"),
    "an error": ({"status": 500, "body": b'{"error": {"message": "no\x07 luck"}}'}, "status 500"),
    "an endless error": ({"status": 500, "body": bytes(1 << 20)}, "more than was asked for"),
    "not a dict": ({"status": 400, "body": b"[1]"}, "status 400"),
    "a redirect": ({"status": 302, "headers": [(b"location", b"http://127.0.0.1:9/")]}, "status 302"),
    "busy for ever": ({"status": 429, "body": b"{}"}, "is busy"),
}


@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=FAULTS)
def test_a_faulty_answer_is_noticed(receiver, fuser, node, changed, change, message):
    remote = node.sharer(retries=1)
    node.meddle = changed(**change)
    with pytest.raises(SharerError, match=message):
        C2C(receiver, [remote], [fuser]).generate(CONVERSATIONS[0], **GREEDY)
    answer = C2C(receiver, [remote], [fuser], on_sharer_failure="receiver-alone").generate(CONVERSATIONS[0], **GREEDY)
    assert answer.ids == C2C(receiver).generate(CONVERSATIONS[0], **GREEDY).ids
    assert message in answer.degraded[0]
    assert answer.counts.sharer_prompt == ()


def forged(lie):
    """A meddler that takes payloads apart and puts them together with something different, properly sealed."""

    def meddle(answer):
        size = 1 << 24
        caches = [SharerCache.from_bytes(bytes(p), max_bytes=size) for p in wire.split(answer.body, 1)]
        return replace(answer, body=wire.join(lie(cache).to_bytes() for cache in caches))

    return meddle


LIES = {
    "another model": (lambda c: replace(c, model=c.model.model_copy(update={"id": "other"})), "another model's"),
    "another revision": (lambda c: replace(c, model=c.model.model_copy(update={"revision": "r2"})), "another model's"),
    "another prompt": (lambda c: replace(c, ids_digest="0" * 64), "another prompt"),
    "another length": (lambda c: replace(c, length=c.length + 1), "another prompt"),
    "fewer positions": (lambda c: replace(c, positions=c.positions[1:], kv=c.kv[:, :, :, 1:]), "other positions"),
    "fewer layers": (lambda c: replace(c, layers=c.layers[1:], kv=c.kv[:, 1:]), "other positions or layers"),
    "another dtype": (lambda c: replace(c, kv=c.kv.half()), "another dtype"),
}


@pytest.mark.parametrize(("lie", "message"), LIES.values(), ids=LIES)
def test_a_proper_payload_of_something_else_is_noticed(receiver, fuser, node, lie, message):
    remote = node.sharer()
    node.meddle = forged(lie)
    with pytest.raises(SharerError, match=message):
        C2C(receiver, [remote], [fuser]).prefill(CONVERSATIONS[0])
    node.meddle = forged(lambda cache: cache)
    C2C(receiver, [remote], [fuser]).prefill(CONVERSATIONS[0])


def test_a_replay_of_another_prompt_is_noticed(receiver, fuser, node):
    heard = []
    node.meddle = lambda said: heard.append(said) or heard[0]
    pair = C2C(receiver, [node.sharer()], [fuser])
    pair.prefill(said("one"))
    with pytest.raises(SharerError, match="another prompt"):
        pair.prefill(said("two"))


def test_with_a_key_nothing_but_the_answer_to_this_request_is_taken(receiver, sharer, fuser, running):
    with running(sharer, NodeSettings(signing_key=KEY)) as node:
        exact, coarse = node.sharer(key=KEY), node.sharer(key=KEY, precision="int4")
        same_bits(C2C(receiver, [sharer], [fuser]), C2C(receiver, [exact], [fuser]))
        with pytest.raises(SharerError, match="signed, but no key"):
            C2C(receiver, [node.sharer()], [fuser]).prefill(CONVERSATIONS[0])
        heard = []
        node.meddle = lambda said: heard.append(said) or said
        C2C(receiver, [coarse], [fuser]).prefill(CONVERSATIONS[0])
        # The same prompt, model, positions, layers and dtype, properly signed: only with fewer bits.
        node.meddle = lambda _: heard[0]
        with pytest.raises(SharerError, match="not signed with this key"):
            C2C(receiver, [exact], [fuser]).prefill(CONVERSATIONS[0])
        node.meddle = forged_unsigned
        with pytest.raises(SharerError, match="not signed"):
            C2C(receiver, [exact], [fuser]).prefill(CONVERSATIONS[0])


def forged_unsigned(answer):
    (payload,) = wire.split(answer.body, 1)
    return replace(answer, body=wire.join([bytes(payload[:8]) + b"\0" + bytes(payload[9:-32])]))


def test_a_sharer_that_breaks_off_is_asked_again(receiver, sharer, fuser, node, changed):
    remote, faults = node.sharer(retries=2), [lambda _: None, changed(status=503, body=b"")]
    node.meddle = lambda said: faults.pop()(said) if faults else said
    same_bits(C2C(receiver, [sharer], [fuser]), C2C(receiver, [remote], [fuser]))
    assert len(node.asked) == 3


def test_retries_end(receiver, fuser, node):
    remote = node.sharer(retries=2)
    node.meddle = lambda _: None
    with pytest.raises(SharerError, match="cannot be reached"):
        C2C(receiver, [remote], [fuser]).prefill(CONVERSATIONS[0])
    assert len(node.asked) == 3


def test_a_wait_that_is_longer_than_the_timeout_is_not_begun(receiver, fuser, node, changed):
    remote = node.sharer(retries=5, timeout=5)
    node.meddle = changed(status=429, headers=[(b"retry-after", b"3600")], body=b"{}")
    with pytest.raises(SharerError, match="is busy"):
        C2C(receiver, [remote], [fuser]).prefill(CONVERSATIONS[0])
    assert len(node.asked) == 1


def test_a_slow_sharer_is_given_up_and_left_alone_for_a_while(receiver, fuser, node):
    remote = node.sharer(timeout=0.3, cooldown=3600)
    node.trickle = 0.05
    pair = C2C(receiver, [remote], [fuser])
    with pytest.raises(SharerError, match="too slow"):
        pair.prefill(CONVERSATIONS[0])
    node.trickle = 0.0
    with pytest.raises(SharerError, match="not asked again yet"):
        pair.prefill(CONVERSATIONS[0])
    assert len(node.asked) == 1


def test_the_others_still_speak(receiver, sharer, node, changed):
    fusers = [random_fuser(receiver, sharer, seed=seed) for seed in (1, 2)]
    pair = C2C(receiver, [node.sharer(), sharer], fusers, on_sharer_failure="receiver-alone")
    node.meddle = changed(status=500, body=b"")
    answers = pair.generate(CONVERSATIONS, **GREEDY)
    here = C2C(receiver, [sharer, sharer], fusers).generate(CONVERSATIONS, sharers=[1], **GREEDY)
    assert [x.ids for x in answers] == [x.ids for x in here]
    assert [set(x.degraded) for x in answers] == [{0}] * 3


def test_a_chat_goes_on_through_a_failure(receiver, sharer, fuser, node, changed):
    chat = C2C(receiver, [node.sharer()], [fuser], on_sharer_failure="receiver-alone").chat()
    told = []
    for meddle in (changed(), changed(status=500, body=b""), changed()):
        node.meddle = meddle
        told.append(bool(chat.send("hello", **GREEDY).degraded))
    assert told == [False, True, False]


def test_an_unknown_policy(receiver):
    with pytest.raises(FuserMismatchError, match="on_sharer_failure"):
        C2C(receiver, on_sharer_failure="ignore")  # type: ignore[arg-type]


def test_killed_and_started_again(receiver, sharer, fuser, running):
    with running(sharer) as node:
        port = int(node.address.rpartition(":")[2])
        pair = C2C(receiver, [node.sharer(retries=1)], [fuser])
        before = pair.generate(CONVERSATIONS[0], **GREEDY)
    with pytest.raises(SharerError, match="cannot be reached"):
        pair.generate(CONVERSATIONS[0], **GREEDY)
    with running(sharer, port=port):
        assert pair.generate(CONVERSATIONS[0], **GREEDY).ids == before.ids
    other = tiny_model("llama", 7, tokenizer=sharer.tokenizer, name="tiny-impostor")
    with running(other, port=port), pytest.raises(SharerError, match="another model's"):
        pair.generate(CONVERSATIONS[0], **GREEDY)


def test_loading_by_address(monkeypatch, receiver, sharer, fuser, node):
    monkeypatch.setattr("cache2cache.loading.load", lambda *_, **__: receiver)
    pair = C2C.from_pretrained("r", [node.address], [fuser], remote=RemoteOptions(timeout=9), on_sharer_failure="fail")
    same_bits(C2C(receiver, [sharer], [fuser]), pair)


def test_an_address_is_tried_before_anything_is_loaded(monkeypatch, fuser):
    monkeypatch.setattr("cache2cache.loading.load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(SharerError, match="cannot be reached"):
        C2C.from_pretrained("r", ["http://127.0.0.1:9"], [fuser], remote=RemoteOptions(retries=0))
