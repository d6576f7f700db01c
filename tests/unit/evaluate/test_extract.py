"""Reading answers: what names a letter and what must not, numbers, and words in common."""

import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache2cache.errors import MissingExtraError
from cache2cache.evaluate.extract import extract_letter, extract_number, same_number, squad_scores

TEN = "ABCDEFGHIJ"


@pytest.mark.parametrize(
    "answer",
    [
        "{}", " {}\n", "\n\n{}", "{}.", "({})", "[{}]", "**{}**", "- {}", "{}) seven", "({}) seven", "{}. seven", "**{}.** seven",
        "Option {}", "Answer: {}", "**Answer:** {}. seven", "### Answer\n{}", "Answer = {}", "The answer is {}",
        "the answer is {}.", "The answer is: ({}).", "The correct answer is {}", 'The correct answer is "{}".',
        "The correct option is {}", "So the best choice is ({}).", "The answer to the question is {}.",
        "The answer is option {}.", "The answer is {} (seven)", "The answer is {} because it is seven.",
        "{} is correct", "Option {} is the correct answer.", "\\boxed{{{}}}", "The answer is $\\boxed{{\\text{{({})}}}}$.",
        "答案是{}", "答案：{}", "正确答案是 {}。", "答案为（{}）", "答案应该是{}选项。", "故选{}。", "因此选{}",
        "正确选项是{}", "{}．七",
        "La respuesta correcta es {}", "La respuesta es la {}.", "Respuesta: {}", "La opción correcta es la ({}).",
        "Die richtige Antwort ist {}", "Antwort: {}", "Die Antwort lautet: {}.",
        "La réponse correcte est {}", "La bonne réponse est ({}).", "Réponse : {}",
    ],
)  # fmt: skip
def test_every_letter_is_read_in_every_way_of_naming_it(answer):
    assert [extract_letter(answer.format(letter), TEN) for letter in TEN] == list(TEN)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        # full-width and circled forms
        ("（Ｂ）", "B"), ("Ｂ", "B"), ("答案：（Ｃ）", "C"), ("Ⓓ", "D"),
        # lower case where nothing else can be meant
        ("b", "B"), (" b. ", "B"), ("(b)", "B"), ("b)", "B"), ("(b) seven", "B"), ("The answer is (b).", "B"),
        # at the end of a derivation, after other options were discussed or repeated
        ("Oxygen is out. So it is carbon dioxide.\n\nB", "B"), ("(A) is wrong. The answer is B.", "B"),
        ("A. oxygen\nB. carbon\nC. neon\nAnswer: B", "B"), ("A. oxygen B. carbon C. neon. The answer is C.", "C"),
        ("Since it is not A, the answer is B.", "B"), ("The correct answer is A/B/C/D. The correct answer is B", "B"),
        # said twice
        ("B. The answer is B.", "B"), ("Answer: B\nB. carbon, because", "B"),
        # texts of options that look like letters
        ("B. vitamin C.", "B"), ("A. is standard weight", "A"), ("(C) ~(M ∨ S)", "C"),
    ],
)  # fmt: skip
def test_a_named_letter_is_read(text, letter):
    assert extract_letter(text, TEN) == letter


@pytest.mark.parametrize(
    "text",
    [
        "", "   \n ", "seven", "42", "\\boxed{42}",
        # prose
        "A cat is an animal", "A hot dog", "Bananas are bad", "b cat", "I think it is", "I think it is B", "I am not sure",
        "The answer is A cat", "The answer is a cat", "The answer is I think seven", "Answer: all of them", "Answer: BC",
        "Answer: None of the above", "Vitamin B", "It is vitamin C.", "Grade: A", "A+B", "C++", "E = mc^2", "so", "AB",
        # abbreviations
        "U.S. troops", "E.g., a dog", "D.C. is a city", "A. M. Turing", "The answer is B.C.",
        # several
        "I think B or C", "The answer is B or C", "Answer: B and C", "Answer: B, C", "The answer is A/B/C/D", "Answer: A-D",
        "(A) and (B) are right", "答案：B和C", "\\boxed{B, C}", "La respuesta es A o B", "Die Antwort ist A oder B",
        "La réponse est A ou B", "A. oxygen\nB. carbon\nC. neon", "A. oxygen B. carbon C. neon",
        # contradictions
        "Answer: B. Answer: C", "B. The answer is C", "A\nB\nC\nD", "B\n\nC is correct",
        # negated, doubted or asked
        "The answer is not B", "I don't think the answer is B.", "The wrong answer is B", "If the answer is B, then",
        "One answer is B",
        "Is the answer B?", "Which is the answer: A?", "(A) is wrong", "B) is incorrect", "If B is correct then",
        "答案不是B", "错误的答案是B", "不应选B", "答案是B吗", "La respuesta no es B", "La respuesta incorrecta es B",
        "Die Antwort ist nicht B", "Die falsche Antwort ist B", "La mauvaise réponse est B",
        # cut off, or Q and A
        "The answer is", "Answer:", "A: carbon dioxide", "A:",
    ],
)  # fmt: skip
def test_prose_doubt_and_several_letters_name_none(text):
    assert extract_letter(text, TEN) is None


@pytest.mark.parametrize("text", ["E", "The answer is E.", "(e)", "The answer is E. The answer is B.", "K"])
def test_a_letter_that_is_not_valid_is_no_answer(text):
    assert extract_letter(text, "ABCD") is None


@given(st.text(alphabet=st.sampled_from("ABKab .,:()*#\n\\{}答案是选the answer is"), max_size=60))
def test_whatever_is_read_is_a_valid_letter(text):
    assert extract_letter(text, "AB") in ("A", "B", None)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18", "18"), ("The answer is 18.", "18"), ("The answer is 18.00", "18"), ("The answer is -5.", "-5"), ("#### 18", "18"),
        ("The answer is 1,234.", "1234"), ("The answer is $1,234.50", "1234.5"), ("The answer is 5,000,000 dollars", "5000000"),
        ("The answer is 12 eggs.", "12"), ("The answer is 50%.", "50"), ("The answer is 3/4", "3/4"), ("**Answer:** 42", "42"),
        ("答案是 42。", "42"), ("\\boxed{42}", "42"), ("The answer is $\\frac{3}{4}$.", "3/4"), ("so $9 \\times 2 = 18$", "18"),
        ("5 + 3 = 8", "8"), ("so $20 - $2 = $18", "18"), ("First 3, then 4", "4"),
        ("She makes 9 * 2 = $18 a day.\nThe answer is 18.", "18"), ("The answer is 18 because 3 + 15.", "18"),
        ("The answer is 3. No: the answer is 4.", "4"),
        ("", None), ("no number", None), ("The answer is five", None), ("3/0", None), ("$x + y$", None),
    ],
)  # fmt: skip
def test_the_last_stated_number_is_read(text, number):
    assert extract_number(text) == number


@pytest.mark.parametrize(
    "text", ["9^9^9^9^9", "The answer is $9^{9^{9^9}}$", "The answer is $99999999!$", "(" * 3000, "9" * 9000]
)
def test_a_number_that_nobody_can_compute_is_none(text):
    assert extract_number(text) is None


@pytest.mark.parametrize(
    ("number", "right", "same"),
    [
        ("1234", "1,234", True), ("18", "18.0", True), ("3/4", "0.75", True), ("18", "19", False), ("-5", "5", False),
        ("18.01", "18", False),
    ],
)  # fmt: skip
def test_numbers_are_compared_by_value(number, right, same):
    assert same_number(number, right) is same


def test_numbers_are_read_in_threads_too():
    got = []
    thread = threading.Thread(target=lambda: got.append((extract_number("The answer is 7."), same_number("7", "7.0"))))
    thread.start()
    thread.join()
    assert got == [("7", True)]


@pytest.mark.parametrize(
    ("text", "accepted", "em", "f1"),
    [
        ("The Norman!", ("norman",), 1, 1),  # articles, case and punctuation do not count
        ("in 1973", ("1974", "1973"), 0, 2 / 3),  # the nearest accepted answer counts
        ("March of 1974", ("in March 1974",), 0, 2 / 3),
        ("yes", ("no",), 0, 0),
    ],
)
def test_short_answers_are_scored_as_squad_does(text, accepted, em, f1):
    assert squad_scores(text, accepted) == pytest.approx((em, f1), abs=1e-6)


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("math_verify", lambda: extract_number("18")),
        ("torchmetrics.functional.text", lambda: squad_scores("a", ("b",))),
    ],
)
def test_a_missing_library_is_named(monkeypatch, module, call):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'cache2cache\[eval\]'"):
        call()
