from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache2cache.errors import AlignmentError
from cache2cache.text.align import align
from cache2cache.text.chat import render
from cache2cache.types import Rendering


def rendering(*parts: str | list[str]) -> Rendering:
    """A rendering written down by hand: strings are template, lists are contents; tokens are split at |."""
    tokens, ranges = [], []
    for part in parts:
        new = [token for token in "".join(part).split("|") if token]
        if isinstance(part, list):
            start = sum(map(len, tokens))
            ranges.append((start, start + sum(map(len, new))))
        tokens += new
    ends = list(itertools.accumulate(map(len, tokens)))
    return spans("".join(tokens), list(zip([0, *ends], ends, strict=False)), ranges)


def spans(text: str, offsets: list[tuple[int, int]], ranges: list[tuple[int, int]]) -> Rendering:
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    return Rendering(text, np.arange(len(offsets)), starts, ends, tuple(ranges))


def shown(receiver: Rendering, sharer: Rendering, **options) -> list[tuple[str, str]]:
    """Aligned tokens as text."""
    return [
        (receiver.text[receiver.starts[i] : receiver.ends[i]], sharer.text[sharer.starts[j] : sharer.ends[j]])
        for i, j in enumerate(align(receiver, sharer, **options))
    ]


class TestContent:
    def test_maps_to_the_token_that_reaches_as_far(self):
        receiver = rendering("<u>|:", ["The| qu|ick| fo|x"], "\n|>")
        sharer = rendering("<user>", ["Th|e quick| f|ox"], "</user>|!")
        assert shown(receiver, sharer)[2:-2] == [
            ("The", "e quick"), (" qu", "e quick"), ("ick", "e quick"), (" fo", "ox"), ("x", "ox"),
        ]  # fmt: skip

    def test_finds_tokens_that_straddle_the_border(self):
        receiver = rendering("u:", ["Hi| you"], "\n")
        sharer = spans("user: Hi you.\n", [(0, 4), (4, 8), (8, 13), (13, 14)], [(6, 12)])
        assert shown(receiver, sharer) == [("u:", "user"), ("Hi", ": Hi"), (" you", " you."), ("\n", "\n")]

    def test_of_repeated_messages_stays_in_its_message(self):
        receiver = rendering("<", ["user"], "><", ["us|er"], ">")
        sharer = rendering("[", ["use|r"], "][", ["user"], "]|\n")
        assert align(receiver, sharer).tolist() == [0, 2, 3, 4, 4, 6]

    def test_pairs_the_bytes_of_one_character_from_the_right(self):
        rocket = "a🚀b"
        four = spans(rocket, [(0, 1), (1, 2), (1, 2), (1, 2), (1, 2), (2, 3)], [(0, 3)])
        two = spans(rocket, [(0, 1), (1, 2), (1, 2), (2, 3)], [(0, 3)])
        one = spans(rocket, [(0, 2), (2, 3)], [(0, 3)])
        assert align(four, two).tolist() == [0, 1, 1, 1, 2, 3]
        assert align(two, four).tolist() == [0, 3, 4, 5]
        assert align(four, one).tolist() == [0, 0, 0, 0, 0, 1]
        assert align(one, four).tolist() == [4, 5]

    def test_takes_no_later_token_when_the_character_is_inside_of_one(self):
        receiver = spans("ab🚀", [(0, 1), (1, 2), (2, 3)], [(0, 3)])
        sharer = spans("ab🚀", [(0, 3), (2, 3)], [(0, 3)])  # a, b and the first bytes of the rocket; the rest of it
        assert align(receiver, sharer).tolist() == [0, 0, 1]

    def test_with_gaps_maps_to_the_next_token(self):
        receiver = rendering("", ["a| |b"], "|")
        sharer = spans("a b", [(0, 1), (2, 3)], [(0, 3)])
        assert align(receiver, sharer)[:3].tolist() == [0, 1, 1]

    def test_that_a_template_shortened_is_matched_at_its_end(self):
        receiver = rendering("<", ["think|ing| |so"], ">|\n")
        sharer = rendering("[", ["so"], "]|\n")
        assert align(receiver, sharer).tolist() == [0, 1, 1, 1, 1, 3, 3]
        assert align(sharer, receiver).tolist() == [0, 4, 6, 6]

    def test_that_the_sharer_does_not_see_maps_to_the_token_before(self):
        receiver = rendering("<", ["old|er"], ">|<", ["new"], ">|\n")
        sharer = rendering("[", [""], "", ["new"], "]|\n")
        assert align(receiver, sharer).tolist() == [0, 0, 0, 0, 0, 1, 3, 3]


class TestTemplate:
    def test_is_aligned_on_the_right(self):
        receiver = rendering("<s>|sys|<u>", ["a"], "</u>|<a>", ["b"], "</a>|<u>|:")
        sharer = rendering("<u>", ["a"], "</u>|\n|<a>", ["b"], "</a>|<u>|:")
        assert shown(receiver, sharer, answer_anchor=False) == [
            ("<s>", "<u>"), ("sys", "<u>"), ("<u>", "<u>"), ("a", "a"),
            ("</u>", "\n"), ("<a>", "<a>"), ("b", "b"), ("</a>", "</a>"), ("<u>", "<u>"), (":", ":"),
        ]  # fmt: skip

    def test_that_the_sharer_lacks_maps_to_the_token_before(self):
        receiver = rendering("<", ["a"], "|".join("/,"), ["b"], ">")
        sharer = rendering("", ["a"], "", ["b"], "")
        assert align(receiver, sharer).tolist() == [0, 0, 0, 0, 1, 1]

    def test_at_the_end_is_anchored_at_the_last_fused_token(self):
        receiver = rendering("<", ["a"], "</u>|<a>|:")
        sharer = rendering("<", ["a"], "\n|\n|Answer|:")
        assert shown(receiver, sharer)[2:] == [("</u>", "Answer"), ("<a>", ":"), (":", ":")]
        assert shown(receiver, sharer, answer_anchor=False)[2:] == [("</u>", "\n"), ("<a>", "Answer"), (":", ":")]

    def test_of_one_token_at_the_end(self):
        receiver, sharer = rendering("<", ["a"], ":"), rendering("<", ["a"], "\n|:")
        assert align(receiver, sharer).tolist() == [0, 1, 3]

    def test_without_messages(self):
        assert align(rendering("a|b|c"), rendering("x|y"), answer_anchor=False).tolist() == [0, 0, 1]


class TestErrors:
    def test_another_conversation(self):
        with pytest.raises(AlignmentError, match="not of the same conversation; got 1 and 2 messages"):
            align(rendering("<", ["a"], ">"), rendering("<", ["a"], ",", ["b"], ">"))

    def test_nothing_to_align_with(self):
        with pytest.raises(AlignmentError, match="sharer's rendering has no tokens"):
            align(rendering("<", ["a"], ">"), spans("", [], [(0, 0)]))

    def test_nothing_to_align(self):
        assert align(spans("", [], [(0, 0)]), rendering("<", ["a"], ">")).shape == (0,)


def naive(receiver: Rendering, sharer: Rendering) -> list[int]:
    """The rule of the docstring for contents of equal length, one token at a time; -1 where it says nothing."""
    aligned = []
    for i in range(len(receiver.ids)):
        last = max(receiver.ends[i] - 1, receiver.starts[i])
        found = -1
        for ours, theirs in zip(receiver.ranges, sharer.ranges, strict=True):
            if ours[0] <= last < ours[1]:
                point = theirs[0] + max(receiver.ends[i] - ours[0], 1)
                found = next(j for j in range(len(sharer.ids)) if max(sharer.ends[: j + 1]) >= point)
                run = [j for j in range(len(sharer.ids)) if sharer.ends[j] == point]
                right = sum(receiver.ends[i + 1 :] == receiver.ends[i])
                if found in run:
                    found = run[max(len(run) - 1 - right, 0)]
        aligned.append(found)
    return aligned


def assert_sound(receiver: Rendering, sharer: Rendering, byte_level: bool) -> None:
    aligned = align(receiver, sharer)
    assert aligned.shape == receiver.ids.shape
    assert aligned.dtype == np.int64
    assert (np.diff(aligned) >= 0).all(), "never decreasing"
    assert ((aligned >= 0) & (aligned < len(sharer.ids))).all()
    if byte_level:
        assert_covers(receiver, sharer, aligned)


def assert_covers(receiver: Rendering, sharer: Rendering, aligned: np.ndarray) -> None:
    """The last character of a content token lies in the token it maps to."""
    for ours, theirs in zip(receiver.ranges, sharer.ranges, strict=True):
        if ours[1] - ours[0] != theirs[1] - theirs[0]:
            continue
        last = receiver.ends - 1
        inside = np.flatnonzero((ours[0] <= last) & (last < ours[1]) & (receiver.starts < receiver.ends))
        point = last[inside] - ours[0] + theirs[0]
        assert (sharer.starts[aligned[inside]] <= point).all()
        assert (point < sharer.ends[aligned[inside]]).all()


def talk(texts: list[str]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


class TestProperties:
    def test_covers_the_last_character(self, byte_pair, faithful, conversations):
        receiver, sharer = byte_pair
        for messages in conversations:
            assert_sound(
                render(receiver, messages, template=faithful), render(sharer, messages, template=faithful), True
            )

    def test_holds_across_templates(self, tokenizers, templates, conversations):
        for messages in conversations:
            sides = [render(tokenizers["bpe"], messages, template=way) for way in [*templates.values(), "completion"]]
            for receiver in sides:
                for sharer in sides:
                    assert_sound(receiver, sharer, byte_level=True)

    def test_holds_for_every_kind_of_tokenizer(self, tokenizers, faithful, conversations):
        for messages in conversations:
            sides = [render(tokenizer, messages, template=faithful) for tokenizer in tokenizers.values()]
            for receiver in sides:
                for sharer in sides:
                    assert_sound(receiver, sharer, byte_level=False)

    def test_is_the_identity_between_equals(self, tokenizer, templates, conversations):
        for messages in conversations:
            for template in templates.values():
                same = render(tokenizer, messages, template=template)
                assert align(same, same, answer_anchor=False).tolist() == list(range(len(same.ids)))

    @given(texts=st.lists(st.text(max_size=10), min_size=1, max_size=3))
    @settings(max_examples=30)
    def test_holds_for_any_text(self, byte_pair, templates, texts):
        receiver = render(byte_pair[0], talk(texts), template=templates["smollm2"])
        sharer = render(byte_pair[1], talk(texts), template=templates["gemma"])
        assert_sound(receiver, sharer, byte_level=True)
        expected = naive(receiver, sharer)
        assert [got for got, want in zip(align(receiver, sharer), expected, strict=True) if want >= 0] == [
            want for want in expected if want >= 0
        ]

    @given(data=st.data())
    @settings(max_examples=60)
    def test_holds_for_any_offsets(self, data):
        """Whatever a tokenizer may say of its tokens: gaps, overlaps, empty spans."""

        def side() -> Rendering:
            ends = sorted(data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=20)))
            offsets = [(end - data.draw(st.integers(0, min(end, 3))), end) for end in ends]
            bounds = sorted(data.draw(st.lists(st.integers(0, 30), min_size=4, max_size=4)))
            return spans("x" * 30, offsets, [(bounds[0], bounds[1]), (bounds[2], bounds[3])])

        assert_sound(side(), side(), byte_level=False)

    def test_takes_milliseconds_for_a_long_chat(self, tokenizers, templates):
        messages = talk([f"user {index} wrote 缓存 and padded 🚀 with the capital of France" for index in range(150)])
        receiver = render(tokenizers["bpe"], messages, template=templates["smollm2"])
        sharer = render(tokenizers["runs"], messages, template=templates["qwen25"])
        assert len(receiver.ids) > 4000
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            align(receiver, sharer)
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 0.02
