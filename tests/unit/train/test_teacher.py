"""What the sharer teaches: its own distribution, at the positions where both models predict the same text."""

import numpy as np
import pytest
import torch

from cache2cache import C2C
from cache2cache.errors import DataError
from cache2cache.evaluate.scoring import target_ids
from cache2cache.testing import WORDS, random_fuser, tiny_model, tiny_tokenizer
from cache2cache.train.batch import TrainRow
from cache2cache.train.teacher import SharedVocabulary, teachers

CHATML_END = "<|im_end|>"


def pair_of(*, sharer_template: str | None = None, receiver_template: str | None = None, merge=WORDS, own=()) -> C2C:
    receiver = tiny_model("qwen3", tokenizer=tiny_tokenizer(merge=own), name="tiny-receiver")
    sharer = tiny_model("llama", 1, tokenizer=tiny_tokenizer(merge=merge, bos=True), name="tiny-sharer")
    templates = {"sharer_template": sharer_template, "receiver_template": receiver_template}
    return C2C(receiver, [sharer], [random_fuser(receiver, sharer, **templates)])


def row_of(pair: C2C, response: str, prompt: str = "what color?") -> TrainRow:
    (row,) = pair.rows([[{"role": "user", "content": prompt}]])
    ids = target_ids(pair.receiver, torch.as_tensor(row.ids), response)
    return TrainRow(row, np.array([*ids, pair.receiver.tokenizer.eos_token_id]), response)


def text_of(lm, ids) -> list[str]:
    return [lm.tokenizer.decode([int(i)]) for i in ids]


def sharer_probabilities(pair: C2C, row: TrainRow, written: list[int]) -> torch.Tensor:
    """(V,) after the sharer's prompt and some tokens of its answer."""
    (sharer,) = pair.sharers
    ids = torch.tensor([[*row.row.sharers[0].ids.tolist(), *written]])
    with torch.no_grad():
        return sharer.model(ids).logits[0, -1].softmax(-1)


def known(teacher) -> list[bool]:
    """At which positions the sharer says something."""
    return teacher.logprobs.isfinite().any(1).tolist()


def test_distributions_are_the_sharers_over_tokens_that_both_have():
    pair = pair_of()
    row = row_of(pair, "red")  # three tokens on either side, and the end
    (teacher,) = teachers([row], pair, SharedVocabulary(pair), 400)
    own, theirs = pair.receiver.tokenizer, pair.sharers[0].tokenizer
    written = theirs("red", add_special_tokens=False)["input_ids"]
    for t in range(4):
        p = sharer_probabilities(pair, row, written[:t])
        expected = {}
        for i in range(len(own)):
            token = own.convert_ids_to_tokens(i)
            same = theirs.convert_tokens_to_ids(token) if token in theirs.get_vocab() else None
            printable = "\ufffd" not in own.decode([i])
            if same is not None and printable and (token == CHATML_END or i not in own.added_tokens_decoder):
                expected[i] = float(p[same])
        total = sum(expected.values())
        got = {int(i): float(x.exp()) for i, x in zip(teacher.ids[t], teacher.logprobs[t], strict=True) if x.isfinite()}
        assert got.keys() == expected.keys()
        for i, value in got.items():
            assert value == pytest.approx(expected[i] / total, rel=1e-3, abs=1e-7), own.decode([i])


def test_the_likeliest_are_kept_in_order_and_normalised():
    pair = pair_of()
    (few,), (many,) = (list(teachers([row_of(pair, "red")], pair, SharedVocabulary(pair), top)) for top in (3, 50))
    assert few.ids.shape == few.logprobs.shape == (4, 3)
    assert few.logprobs.dtype == torch.float32 and few.ids.dtype == torch.long
    assert torch.equal(few.ids, many.ids[:, :3])
    torch.testing.assert_close(few.logprobs.exp().sum(1), torch.ones(4))
    torch.testing.assert_close(few.logprobs, many.logprobs[:, :3].log_softmax(1))
    assert (few.logprobs.diff(dim=1) <= 0).all()


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("x the y", [True, True, False, False, False, True, True, True]),  # the sharer has " the" in one token
        ("answer", [True, False, False, False, False, False, True]),
        ("é", [True, False, True]),  # in the middle of a character nothing is said
        ("é=é", [True, False, True, True, False, True]),
        ("", [True]),
    ],
)
def test_only_where_a_token_of_the_sharers_begins(response, expected):
    pair = pair_of()
    row = row_of(pair, response)
    (teacher,) = teachers([row], pair, SharedVocabulary(pair), 8)
    assert len(row.response) == len(expected) and known(teacher) == expected


def test_the_other_way_round_every_long_token_has_a_teacher():
    pair = pair_of(merge=(), own=WORDS)
    row = row_of(pair, "x the answer")
    (teacher,) = teachers([row], pair, SharedVocabulary(pair), 8)
    assert len(row.response) == 4 and all(known(teacher))


def test_positions_are_those_of_the_characters_not_of_the_tokens():
    """Behind a token that is one on one side and several on the other."""
    pair = pair_of()
    row = row_of(pair, "the red")
    (teacher,) = teachers([row], pair, SharedVocabulary(pair), 400)
    theirs = pair.sharers[0].tokenizer
    p = sharer_probabilities(pair, row, theirs("the", add_special_tokens=False)["input_ids"])
    space = pair.receiver.tokenizer(" ")["input_ids"][0]
    x = pair.receiver.tokenizer("x")["input_ids"][0]
    got = dict(zip(teacher.ids[3].tolist(), teacher.logprobs[3].tolist(), strict=True))
    wanted = (p[theirs(" ")["input_ids"][-1]] / p[theirs("x")["input_ids"][-1]]).log()
    assert got[space] - got[x] == pytest.approx(float(wanted), abs=1e-3)


@pytest.mark.parametrize("sharer_template", ["completion", "plain"])
def test_a_space_before_the_first_word_is_not_the_responses(sharer_template):
    """The sharer's prompt ends in "Answer:" or "Assistant:", so it says " the" where the receiver says "the"."""
    pair = pair_of(sharer_template=sharer_template, own=WORDS)
    row = row_of(pair, "the")
    (teacher,) = teachers([row], pair, SharedVocabulary(pair), 400)
    own, theirs = pair.receiver.tokenizer, pair.sharers[0].tokenizer
    p = sharer_probabilities(pair, row, [])

    def said(word: str) -> float:
        return sum(float(p[theirs(text, add_special_tokens=False)["input_ids"][0]]) for text in (word, f" {word}"))

    got = dict(zip(teacher.ids[0].tolist(), teacher.logprobs[0].tolist(), strict=True))
    the, answer = (own(word)["input_ids"][0] for word in ("the", "answer"))
    assert got[the] - got[answer] == pytest.approx(np.log(said("the") / said("answer")), abs=1e-3)


def test_both_may_begin_with_a_space():
    pair = pair_of(sharer_template="completion", receiver_template="completion", own=WORDS)
    row = row_of(pair, "the")
    assert text_of(pair.receiver, row.response)[0] == " the"
    (teacher,) = teachers([row], pair, SharedVocabulary(pair), 400)
    shared = text_of(pair.receiver, teacher.ids[0][teacher.logprobs[0].isfinite()])
    assert " the" in shared and "the" not in shared and all(text.startswith(" ") for text in shared)


def test_behind_a_lone_space_the_first_word_is_taught():
    """The receiver has written a space already, which the sharer is about to write with its first word."""
    template = "{{ messages[0]['content'] }}{% if add_generation_prompt %}\nAnswer:{% endif %}"
    pair = pair_of(sharer_template=template, receiver_template=template)
    row = row_of(pair, "the")
    assert text_of(pair.receiver, row.response)[:2] == [" ", "t"]
    (teacher,) = teachers([row], pair, SharedVocabulary(pair), 400)
    assert known(teacher)[:2] == [False, True]
    taught = text_of(pair.receiver, teacher.ids[1][teacher.logprobs[1].isfinite()])
    assert "x" in taught and " " not in taught, "the space that the sharer is about to write is there already"


def test_the_end_of_a_turn_is_taught_where_the_sharers_template_has_one():
    for template, ends in ((None, True), ("completion", False), ("plain", False)):
        pair = pair_of(sharer_template=template)
        row = row_of(pair, "red")
        (teacher,) = teachers([row], pair, SharedVocabulary(pair), 400)
        end = pair.receiver.tokenizer.eos_token_id
        assert (end in teacher.ids[0][teacher.logprobs[0].isfinite()].tolist()) == ends
        assert known(teacher) == [True, True, True, ends]


def test_every_row_gets_what_it_gets_alone():
    """However rows are batched, and in their order."""
    pair = pair_of()
    rows = [row_of(pair, "red " * n, "the color " * (n % 7)) for n in (1, 40, 3, 120, 2, 9)]
    together = list(teachers(rows, pair, SharedVocabulary(pair), 16))
    assert [len(teacher.ids) for teacher in together] == [len(row.response) for row in rows]
    for row, teacher in zip(rows, together, strict=True):
        (alone,) = teachers([row], pair, SharedVocabulary(pair), 16)
        torch.testing.assert_close(alone.logprobs, teacher.logprobs, rtol=1e-3, atol=1e-3)


def test_a_response_that_is_not_its_text_is_refused():
    pair = pair_of()
    row = row_of(pair, "red")
    with pytest.raises(DataError, match="not made of its text's tokens"):
        list(teachers([TrainRow(row.row, row.response, "blue")], pair, SharedVocabulary(pair), 4))
