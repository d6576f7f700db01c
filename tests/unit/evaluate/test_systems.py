"""The systems that are compared, and the letter that an answer names."""

import pytest

from cache2cache import C2C
from cache2cache.evaluate.systems import extract_letter, systems
from cache2cache.testing import random_fuser, tiny_pair


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"), (" B", "B"), ("C.", "C"), ("(D)", "D"), ("**B**", "B"), ("B) seven", "B"), ("C: because", "C"),
        ("Answer: B", "B"), ("The answer is C.", "C"), ("The correct answer is (A)", "A"), ("the correct option is D", "D"),
        ("B\nbecause", "B"),
        # prose, other letters, nothing
        ("A hot dog", None), ("Bananas are bad", None), ("E", None), ("G.", None), ("a", None), ("", None),
        ("I think it is B", None), ("Answer: all of them", None),
    ],
)  # fmt: skip
def test_only_a_named_letter_counts(text, letter):
    assert extract_letter(text, "ABCD") == letter


def test_ten_choices_have_ten_letters():
    assert extract_letter("J.", "ABCDEFGHIJ") == "J"


@pytest.fixture(scope="module")
def pair():
    receiver, sharer = tiny_pair()
    return C2C(receiver, [sharer], [random_fuser(receiver, sharer)])


def test_all_systems_answer_and_only_text_to_text_writes_a_message(pair):
    conversation = [{"role": "user", "content": "hello?"}]
    ways = systems(pair, message_tokens=5, max_new_tokens=4)
    answers = {name: way([conversation])[0] for name, way in ways.items()}
    assert list(answers) == ["receiver", "sharer", "text-to-text", "c2c"]
    assert {name: bool(answer.message_ids) for name, answer in answers.items()} == {
        "receiver": False, "sharer": False, "text-to-text": True, "c2c": False,
    }  # fmt: skip
    assert answers["c2c"].generation.ids == pair.generate(conversation, do_sample=False, max_new_tokens=4).ids
    assert answers["receiver"].generation.ids != answers["c2c"].generation.ids
    assert len(answers["text-to-text"].message_ids) <= 5
