"""From examples to tokens: the response is kept whole, prompts lose words and never template tokens."""

from dataclasses import replace

import pytest

from cache2cache import C2C
from cache2cache.errors import ContextLengthError, ConversationError, ModelError
from cache2cache.testing import random_fuser, tiny_model, tiny_tokenizer
from cache2cache.train.batch import Example
from cache2cache.train.rows import shortened, train_rows


@pytest.fixture(scope="module")
def c2c(pair, fuser):
    receiver, sharer = pair
    return C2C(receiver, [sharer], [fuser])


def said(*contents):
    roles = ("system", "user", "assistant")
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def example(*contents, response="yes", place="train, line 3"):
    return Example(said(*contents), response, contents[-1], place)


def contents(messages):
    return [message["content"] for message in messages]


def texts(row, c2c):
    """The prompt as receiver and sharer read it."""
    return [
        lm.tokenizer.decode(ids) for lm, ids in ((c2c.receiver, row.row.ids), (c2c.sharers[0], row.row.sharers[0].ids))
    ]


def test_a_row_holds_the_prompt_of_both_sides_and_the_response_with_its_end(c2c):
    whole = example("Be brief.", "what is the answer?")
    (row,), dropped = train_rows([whole], c2c)
    (expected,) = c2c.rows([whole.messages])
    assert (row.row.ids == expected.ids).all() and (row.row.sharers[0].ids == expected.sharers[0].ids).all()
    assert c2c.receiver.tokenizer.decode(row.response) == "yes" + c2c.receiver.tokenizer.eos_token
    assert (row.text, dropped) == ("yes", [])


def test_a_row_remembers_what_is_learned_of_it(c2c):
    rows, _ = train_rows([example("hi"), replace(example("hi"), alone=True)], c2c)
    assert [row.alone for row in rows] == [False, True]


def test_of_a_long_response_the_beginning_is_learned(c2c):
    rows, _ = train_rows([example("Be brief.", "which?", response="because it is so")], c2c)
    cut, _ = train_rows([example("Be brief.", "which?", response="because it is so")], c2c, response_tokens=4)
    assert len(rows[0].response) > 4 and (cut[0].response == rows[0].response[:4]).all()
    assert cut[0].text == "because it is so"
    size = len(cut[0].row.ids) + 4
    kept = train_rows([example("Be brief.", "which?", response="because " * 99)], c2c, max_tokens=99, response_tokens=4)
    assert len(kept[0]) == 1 and size < 99, "only what is learned has to fit"
    (short,), _ = train_rows([example("Be brief.", "which?")], c2c, response_tokens=99)
    assert c2c.receiver.tokenizer.decode(short.response) == "yes" + c2c.receiver.tokenizer.eos_token


def test_behind_a_word_a_response_begins_with_a_space(pair):
    """As an evaluation measures it: "Answer:" asks for " B"."""
    receiver, sharer = pair
    fuser = random_fuser(receiver, sharer, receiver_template="completion")
    (row,), _ = train_rows([example("Be brief.", "which?", response="B")], C2C(receiver, [sharer], [fuser]))
    assert receiver.tokenizer.decode(row.response) == " B" + receiver.tokenizer.eos_token


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (9, ["a b c", " d e\n f  g h i"]),
        (7, ["a b c", "f  g h i"]),
        (6, ["a b c", "g h i"]),
        (5, ["b c", "g h i"]),
        (4, ["b c", "h i"]),
        (2, ["c", "i"]),
    ],
)
def test_the_longest_message_loses_its_first_words(words, expected):
    assert contents(shortened(said("a b c", " d e\n f  g h i"), words)) == expected


def test_text_without_spaces_is_shortened_too():
    (message,) = shortened(said("缓" * 100), 2)
    assert set(message["content"]) == {"缓"} and 32 < len(message["content"]) <= 64


def test_an_empty_message_stays_empty():
    assert contents(shortened(said("", "a b c"), 2)) == ["", "b c"]


@pytest.mark.parametrize("alignment", ["native", "retokenise-first", "retokenise-longest"])
@pytest.mark.parametrize("max_tokens", [90, 120, 200])
def test_a_prompt_is_shortened_until_both_sides_fit_and_no_further(pair, alignment, max_tokens):
    receiver, sharer = pair
    c2c = C2C(receiver, [sharer], [random_fuser(receiver, sharer, alignment=alignment)])
    words = [f"w{i}" for i in range(100)]
    long = example("Be brief.", " ".join(words), response="the answer")
    (row,), dropped = train_rows([long], c2c, max_tokens=max_tokens)
    assert not dropped and receiver.tokenizer.decode(row.response[:-1]) == "the answer"

    def size(messages):
        (read,) = c2c.rows([messages])
        theirs = len(sharer.tokenizer("the answer", add_special_tokens=False)["input_ids"]) + 1
        return max(len(read.ids) + len(row.response), len(read.sharers[0].ids) + theirs)

    kept = next(k for k in range(100, 0, -1) if size(said("Be brief.", " ".join(words[-k:]))) <= max_tokens)
    (expected,) = c2c.rows([said("Be brief.", " ".join(words[-kept:]))])
    assert (row.row.ids == expected.ids).all(), "the most words that fit, and the whole template around them"


def test_rows_that_fit_are_left_as_they_are(c2c):
    short = example("Be brief.", "  what is\n the answer? ")
    (row,), _ = train_rows([short], c2c)
    (same,), _ = train_rows([short], c2c, max_tokens=500)
    assert (row.row.ids == same.row.ids).all()
    exact = max(len(row.row.ids) + len(row.response), len(row.row.sharers[0].ids) + len("yes") + 1)
    (same,), _ = train_rows([short], c2c, max_tokens=exact)
    assert (row.row.ids == same.row.ids).all(), "max_tokens itself is allowed"


def test_a_response_that_does_not_fit_is_dropped_and_named(c2c):
    rows = [example("a", "b", place="train, line 1"), example("a", "b", response="x" * 200, place="train, line 2")]
    kept, dropped = train_rows(rows, c2c, max_tokens=150)
    assert [row.text for row in kept] == ["yes"]
    assert [(row.place, row.reason, row.held_out) for row in dropped] == [("train, line 2", "too long", None)]


def test_the_sharers_side_counts_with_its_response(pair):
    """The sharer's side is the longer one, and no message can be shortened."""
    receiver, sharer = pair
    wordy = random_fuser(receiver, sharer, sharer_template="x" * 100 + "{{ messages[-1]['content'] }}")
    c2c = C2C(receiver, [sharer], [wordy])
    prompt, response = "x" * 100 + "b", " yes"
    size = sum(len(sharer.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (prompt, response)) + 1
    assert len(train_rows([example("a", "b")], c2c, max_tokens=size)[0]) == 1
    assert len(train_rows([example("a", "b")], c2c, max_tokens=size - 1)[0]) == 0


@pytest.mark.parametrize("long_side", ["prompt", "response"])
def test_a_row_longer_than_the_context_is_named_unless_it_may_be_shortened(c2c, long_side):
    long = {"prompt": example("a", "b " * 400), "response": example("a", "b", response="b " * 270)}[long_side]
    with pytest.raises(ContextLengthError, match=r"train, line 3: .*context.*data\.max_tokens"):
        train_rows([long], c2c)
    kept, dropped = train_rows([long], c2c, max_tokens=10_000)
    longest = min(lm.card.geometry.max_positions for lm in (c2c.receiver, *c2c.sharers))
    if long_side == "prompt":
        assert len(kept[0].row.ids) + len(kept[0].response) <= longest
    else:
        assert [row.reason for row in dropped] == ["too long"]


def test_a_row_that_a_model_cannot_read_is_named(c2c):
    with pytest.raises(ConversationError, match="train, line 3: "):
        train_rows([Example([{"role": "human", "content": "hi"}], "yes", "hi", "train, line 3")], c2c)


def test_a_receiver_that_cannot_end_its_turn_is_refused(sharer):
    tokenizer = tiny_tokenizer()
    receiver = tiny_model("qwen3", tokenizer=tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="ends its turn"):
        train_rows([example("a", "b")], C2C(receiver, [sharer], [random_fuser(receiver, sharer)]))
