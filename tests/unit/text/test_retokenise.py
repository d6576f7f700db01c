from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache2cache.errors import AlignmentError
from cache2cache.text.chat import render
from cache2cache.text.retokenise import retokenise, retokenise_text

ASK = [{"role": "user", "content": "What is the capital of France?"}]


def talk(texts: list[str]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


def bare(tokenizer, **ids):
    """A copy of a tokenizer without any special tokens but those given."""
    other = copy.deepcopy(tokenizer)
    for role in ("pad", "eos", "bos", "unk"):
        setattr(other, f"{role}_token_id", ids.get(role))
    return other


class TestText:
    def test_takes_the_first_or_the_longest(self, tokenizers):
        receiver, sharer = tokenizers["runs"], tokenizers["unigram"]
        (token,) = receiver("the capital", add_special_tokens=False)["input_ids"][:1]
        pieces = sharer.encode(receiver.decode([token]), add_special_tokens=False)
        assert len(pieces) > 1
        assert retokenise_text([token], receiver, sharer, "first") == pieces[:1]
        longest = max(len(sharer.decode([piece])) for piece in pieces)
        (got,) = retokenise_text([token], receiver, sharer, "longest")
        assert len(sharer.decode([got])) == longest

    def test_is_the_identity_between_equals(self, tokenizers):
        ids = tokenizers["bpe"]("user asks: 2+2=?\n\n", add_special_tokens=False)["input_ids"]
        assert retokenise_text(ids, tokenizers["bpe"], tokenizers["bpe"]) == ids

    def test_loses_bytes_of_split_characters(self, tokenizers):
        """What the published fusers were trained with: a part of a character is a replacement character."""
        ids = tokenizers["bytes"]("é", add_special_tokens=False)["input_ids"]
        (first, *_) = tokenizers["bytes"].encode("\ufffd", add_special_tokens=False)
        assert len(ids) == 2
        assert retokenise_text(ids, tokenizers["bytes"], tokenizers["bytes"]) == [first, first]

    def test_maps_special_tokens_by_their_role_and_the_later_role_wins(self, tokenizers):
        receiver = bare(tokenizers["bpe"], pad=7, eos=7, bos=8, unk=9)
        sharer = bare(tokenizers["unigram"], pad=1, eos=2, bos=3)
        assert retokenise_text([7, 8], receiver, sharer) == [2, 3]
        ordinary = sharer.encode(receiver.decode([9]), add_special_tokens=False)
        assert retokenise_text([9], receiver, sharer) == ordinary[:1], "the sharer has no such role"

    def test_accepts_arrays(self, tokenizers):
        ids = np.array(tokenizers["bpe"].encode("user"))
        assert retokenise_text(ids, tokenizers["bpe"], tokenizers["bpe"]) == ids.tolist()

    def test_converts_a_token_only_once(self, tokenizers, monkeypatch):
        receiver, sharer = copy.deepcopy(tokenizers["bpe"]), tokenizers["unigram"]
        decoded = []
        monkeypatch.setattr(receiver, "decode", lambda ids: decoded.append(ids) or "x")
        for _ in range(3):
            retokenise_text([70, 71, 70], receiver, sharer)
        assert decoded == [[70], [71]]
        retokenise_text([70], receiver, sharer, "longest")
        assert decoded[2:] == [[70]], "each strategy has its own cache"

    def test_stands_in_for_tokens_that_are_nothing_to_the_sharer(self, tokenizers):
        receiver, blind = tokenizers["bpe"], tokenizers["wordpiece"]
        space = receiver.encode(" ", add_special_tokens=False)
        assert retokenise_text(space, receiver, bare(blind, unk=0)) == [0]
        assert retokenise_text(space, receiver, bare(blind, eos=5)) == [5]
        with pytest.raises(AlignmentError, match=r"no token for one of the receiver's; got id \d+, ' '"):
            retokenise_text(space, receiver, bare(blind))

    def test_refuses_an_unknown_strategy(self, tokenizers):
        with pytest.raises(AlignmentError, match=r"unknown strategy; got 'prefix'; allowed: \('first', 'longest'\)"):
            retokenise_text([1], tokenizers["bpe"], tokenizers["bpe"], "prefix")


def assert_sound(got, receiver, sharer, messages, **sides) -> None:
    ours = render(receiver, messages, template=sides["receiver_template"])
    assert got.receiver_ids[~got.receiver_padding].tolist() == ours.ids.tolist(), "the receiver reads all it would"
    sizes = {len(got.receiver_ids), len(got.sharer_ids), len(got.receiver_padding), len(got.sharer_padding)}
    assert len(sizes) == 1
    assert not (got.receiver_padding & got.sharer_padding).any()
    assert not ((got.receiver_padding | got.sharer_padding) & got.message_mask).any(), "messages have no padding"
    borders = [(section.start, section.stop) for section in got.sections]
    assert [start for start, _ in borders] == [0, *(stop for _, stop in borders[:-1])]
    assert borders[-1][1] == len(got.receiver_ids)
    assert (np.diff(got.alignment) >= 0).all()
    spoken = got.sharer_ids[~got.sharer_padding]
    inside = got.message_mask[~got.receiver_padding]
    assert spoken[got.alignment[inside]].tolist() == got.sharer_ids[got.message_mask].tolist()


class TestConversation:
    @pytest.mark.parametrize("strategy", ["first", "longest"])
    def test_is_sound(self, tokenizer, tokenizers, templates, conversations, strategy):
        ways = {"receiver_template": templates["smollm2"], "sharer_template": templates["gemma"]}
        sharer = tokenizers["runs"]
        for messages in conversations:
            got = retokenise(messages, tokenizer, sharer, strategy, **ways)
            assert_sound(got, tokenizer, sharer, messages, **ways)

    @given(texts=st.lists(st.text(max_size=10), min_size=1, max_size=3))
    @settings(max_examples=30)
    def test_is_sound_for_any_text(self, byte_pair, templates, texts):
        ways = {"receiver_template": templates["gemma"], "sharer_template": templates["qwen25"]}
        got = retokenise(talk(texts), *byte_pair, **ways)
        assert_sound(got, *byte_pair, talk(texts), **ways)

    def test_pads_the_shorter_template_on_its_right(self, tokenizers):
        tokenizer = tokenizers["bytes"]
        got = retokenise(
            ASK,
            tokenizer,
            tokenizer,
            receiver_template="<{{ messages[0].content }}>",
            sharer_template="--{{ messages[0].content }}",
        )
        size = len(ASK[0]["content"])
        assert [(part.start, part.stop, part.message) for part in got.sections] == [
            (0, 2, False), (2, 2 + size, True), (2 + size, 3 + size, False),
        ]  # fmt: skip
        assert np.flatnonzero(got.receiver_padding).tolist() == [1]
        assert np.flatnonzero(got.sharer_padding).tolist() == [2 + size]
        assert got.receiver_ids[1] == tokenizer.pad_token_id
        assert got.alignment.tolist() == [0, *range(2, 2 + size), 1 + size]

    def test_keeps_the_white_space_that_the_receiver_reads(self, tokenizers, templates):
        """The reference failed where only one of the templates trims."""
        messages = talk(["  padded \n"])
        for receiver, length in (("smollm2", len("  padded \n")), ("gemma", len("padded"))):
            for sharer in ("smollm2", "gemma"):
                got = retokenise(
                    messages,
                    tokenizers["bytes"],
                    tokenizers["bytes"],
                    receiver_template=templates[receiver],
                    sharer_template=templates[sharer],
                )
                assert got.message_mask.sum() == length

    def test_joins_the_templates_around_an_empty_message(self, tokenizers, templates):
        got = retokenise(
            talk(["", "ok", "go"]),
            tokenizers["bpe"],
            tokenizers["runs"],
            receiver_template=templates["smollm2"],
            sharer_template=templates["qwen25"],
        )
        assert [section.message for section in got.sections] == [False, True, False, True, False]

    def test_can_end_with_the_last_content(self, tokenizers, templates):
        got = retokenise(
            talk(["a", "b"]),
            tokenizers["bpe"],
            tokenizers["runs"],
            receiver_template=templates["smollm2"],
            sharer_template=templates["qwen25"],
            add_generation_prompt=False,
            end_with_content=True,
        )
        assert [section.message for section in got.sections] == [False, True, False, True]
        assert tokenizers["bpe"].decode(got.receiver_ids[-1:]) == "b"
