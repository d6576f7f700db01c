from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cache2cache.testing import WORDS, tiny_tokenizer
from cache2cache.text.detokenise import Detokeniser, Speller

BYTES, MERGED = tiny_tokenizer(), tiny_tokenizer(merge=WORDS)


def pieces(tokenizer, ids, stop=()) -> tuple[list[str], Detokeniser]:
    """One per token until a stop text is met, and the rest."""
    detokeniser, out = Detokeniser(tokenizer, stop), []
    for token in ids:
        out.append(detokeniser.add(token))
        if detokeniser.stopped:
            break
    return [*out, detokeniser.end()], detokeniser


def before(text: str, stop) -> str:
    return text[: min([len(text), *(text.index(s) for s in stop if s in text)])]


texts = st.text(st.sampled_from("abß缓🚀é \n") | st.characters(codec="utf-8"), max_size=30)


class TestAllPieces:
    @given(texts, st.sampled_from([BYTES, MERGED]))
    @example("what 12==the question 🚀", MERGED)
    def test_are_the_text(self, text, tokenizer):
        got, _ = pieces(tokenizer, tokenizer.encode(text, add_special_tokens=False))
        assert "".join(got) == text

    @given(st.lists(st.integers(0, 259), max_size=30))
    def test_are_what_the_tokenizer_makes_of_any_bytes(self, ids):
        got, _ = pieces(BYTES, ids)
        assert "".join(got) == BYTES.decode(ids, skip_special_tokens=True)

    @given(texts, st.lists(st.text("abß缓\n", min_size=1, max_size=3), max_size=3))
    def test_end_before_the_first_stop_text(self, text, stop):
        got, detokeniser = pieces(BYTES, BYTES.encode(text, add_special_tokens=False), stop)
        # With a byte for a token, the stop text that is complete first ends the answer.
        ends = [text.index(s) + len(s) for s in stop if s in text]
        expected = before(text[: min(ends)], stop) if ends else text
        assert "".join(got) == expected
        assert detokeniser.stopped == bool(ends)


class TestEachPiece:
    @given(texts)
    def test_has_whole_characters(self, text):
        got, _ = pieces(BYTES, BYTES.encode(text, add_special_tokens=False))
        assert all("\ufffd" not in piece for piece in got) or "\ufffd" in text

    def test_comes_as_soon_as_it_is_whole(self):
        got, _ = pieces(BYTES, BYTES.encode("aé🚀b", add_special_tokens=False))
        assert got == ["a", "", "é", "", "", "", "🚀", "b", ""]

    def test_waits_while_a_stop_text_may_follow(self):
        got, _ = pieces(BYTES, BYTES.encode("xSTxSTOP", add_special_tokens=False), ("STOP",))
        assert got == ["x", "", "", "STx", "", "", "", "", ""]

    def test_is_what_was_held_back_at_the_end(self):
        got, detokeniser = pieces(BYTES, BYTES.encode("xSTO", add_special_tokens=False), ("STOP",))
        assert got == ["x", "", "", "", "STO"]
        assert not detokeniser.stopped

    def test_of_half_a_character_at_the_end_says_so(self):
        ids = BYTES.encode("a🚀", add_special_tokens=False)[:-1]
        assert pieces(BYTES, ids)[0] == ["a", "", "", "", "\ufffd"]

    def test_is_not_text_where_a_token_is_special(self):
        ids = [*BYTES.encode("a", add_special_tokens=False), BYTES.eos_token_id]
        assert pieces(BYTES, ids)[0] == ["a", "", ""]


@pytest.mark.parametrize("text", ["  aa\n   aa aa\n\n  aa ", "🚀🚀 aa 缓存", "What is the cap 12!\nuser"])
def test_every_tokenizer_writes_what_it_decodes_at_once(tokenizers, spaced_tokenizer, text):
    for tokenizer in (*tokenizers.values(), spaced_tokenizer):
        ids = tokenizer.encode(text)
        assert "".join(pieces(tokenizer, ids)[0]) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("words", [["▁a", "▁b", "c", "▁a"], ["c", "▁a"], ["<s>", "▁a", "<s>", "▁b"]])
def test_a_tokenizer_that_drops_the_first_space_keeps_the_others(words):
    backend = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "c": 2}, unk_token="c"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", clean_up_tokenization_spaces=False)
    ids = tokenizer.convert_tokens_to_ids(words)
    assert "".join(pieces(tokenizer, ids)[0]) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("prompt", ["aa", "aa 🚀", "<s>aa", "aa</s>"])
def test_an_answer_that_goes_on_with_a_text_keeps_its_first_space(spaced_tokenizer, prompt):
    before = spaced_tokenizer.encode(prompt, add_special_tokens=False)
    detokeniser = Detokeniser(spaced_tokenizer, before=before)
    assert [detokeniser.add(token) for token in spaced_tokenizer.encode("bb cc")] == [" bb", " cc"]


def test_tokens_are_spelled_as_they_are_in_a_text(spaced_tokenizer):
    spell = Speller(spaced_tokenizer)
    ids = spaced_tokenizer.convert_tokens_to_ids(["▁bb", "aa", "▁", "<0x0A>", "<0xF0>", "</s>"])
    assert [spell(token) for token in ids] == [" bb", "aa", " ", "\n", "\ufffd", "</s>"]
    assert [spell(token, first=True) for token in ids[:2]] == ["bb", "aa"]
