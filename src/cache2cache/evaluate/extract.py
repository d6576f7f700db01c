"""What an answer says: the letter it names, the number it ends in, the words it shares with the right ones.

Reading nothing out of an answer is better than guessing: None is counted and shown as a format failure, whereas a guess
looks like an answer.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterator, Sequence
from decimal import Decimal
from types import ModuleType
from typing import Any

from cache2cache.errors import MissingExtraError

_FORMATTING = re.compile(r"\\[()\[\]]|[*`$\"“”«»「」『』]|__|(?<![A-Za-z])['‘’]|['‘’](?![A-Za-z])")

# A letter in brackets, or closed by one, is meant as a letter; a lower-case i may also number a list.
_MARKED = r"[(\[{]?\s*(?P<marked>[A-Za-hj-z])\s*[)\]}](?![A-Za-z0-9])"
_PLAIN = r"(?P<plain>[A-Z])"
# "B or C", "A/B/C/D" and "A-D" name no letter.
_NO_LIST = (
    r"(?![-–—~][A-Z](?![A-Za-z])"
    r"|\s*(?:[,/&+、|]|(?:or|and|oder|und|o|y|ou|et)\s|[或和与及])\s*[(\[]?[A-Z](?![A-Za-z]))"
)
# Not a word: "The answer is A cat" names no letter.
_END = r"(?=\s*(?:选项|项)?\s*(?:$|[\n,;:!。]|\.(?![A-Za-z0-9])|\((?![A-Z]\))|(?:because|since|as)\b|因为))"
# "(A) is wrong" does not answer A.
_NOT_DENIED = r"(?!\s*(?:(?:is|are|was)\s+(?:not|wrong|incorrect|false|out)\b|isn['’]?t|can['’]?t|cannot))"
_BULLET = r"[-•>#\s]*"
_NOUN = r"(?i:(?:option|choice|letter|opción|选项?)\s*)?"

_SAID = (
    r"\banswer(?:\s+(?:to|for)\s[^.,:;!?\n]{1,80}?)?\s*(?:is|would\s+be|:|=)"
    r"|\b(?:correct|right|best)\s+(?:option|choice)\s*(?:is|would\s+be|:)"
    r"|\b(?:respuesta|opción)(?:\s+correcta)?\s*(?:es|:)"
    r"|\bantwort\s*(?:ist|lautet|:)"
    r"|\bréponse(?:\s+(?:correcte|exacte))?\s*(?:est|:)"
    r"|(?:答案|正确的?选项)\s*(?:应?该?[是为选]|:)"
    r"|(?:[故应]|应该|因此|所以|本题)选择?"
    r"|\\f?box(?:ed)?\s*\{"
)
_STATED = re.compile(
    rf"(?i:(?:{_SAID})\s*:?\s*(?:(?:the\s+)?(?:option|choice|letter)\b|la\s+opción\b|la\b|l'option\b|选项|选)?\s*:?\s*)"
    rf"(?:{_MARKED}|{_PLAIN}{_END}){_NO_LIST}"
)
"""Such as "The correct answer is B", "答案是B", "\\boxed{B}"."""

_CONFIRMED = re.compile(
    rf"(?:^|[\n.,;:!]|(?i:\b(?:option|choice|so|thus|therefore)\b))\s*(?:{_MARKED}|{_PLAIN}(?![A-Za-z0-9]))"
    r"\s+is\s+(?:the\s+)?(?:correct|right|best)(?:\s+(?:answer|option|choice))?(?=\s*(?:$|[\n.,;!]|because\b|since\b))"
)
"""Such as "B is correct"."""

_LEADING = re.compile(
    rf"{_BULLET}{_NOUN}(?:{_MARKED}{_NOT_DENIED}|{_PLAIN}\.(?=\s|$|[^\x00-\x7f])(?!\s*[A-Z]\.)){_NO_LIST}"
)
"""Such as "B. carbon dioxide" or "(B) carbon dioxide" at the start."""

_ALONE = re.compile(rf"{_BULLET}{_NOUN}[(\[{{]?\s*(?P<plain>[A-Z])\s*[)\]}}]?\s*[.,;!。]?\s*")
"""A line that is nothing but a letter."""

_DOUBT = re.compile(
    r"\b(?:not|never|no|neither|nor|if|whether|unless|suppose|assum\w+|doubt\w*|wrong|incorrect|possible|another|one"
    r"|nicht|kein\w*|wenn|ob|falls|falsch\w*|si|incorrecta|mauvaise|fausse|pas)\b|n['’]t\b|[不非若]|如果|错误|是否|假如",
    re.IGNORECASE,
)
"""A clause with one of these states no answer: "I don't think the answer is B"."""


def extract_letter(text: str, letters: str) -> str | None:
    """The letter that an answer names; None if it names none, or several. Never guesses from prose.

    A letter counts if it stands alone in the first or last line, leads the answer as "B.", "B)" or "(B)", or is stated
    ("The answer is B", "B is correct", also in Chinese, French, German and Spanish, and in LaTeX's box). A lower-case letter
    counts if it is all there is, or in brackets. Statements that contradict each other, or a letter that is none of the
    valid ones, are no answer.

    Args:
        letters: the valid ones, such as "ABCD"; up to "ABCDEFGHIJ".
    """
    named = {letter.upper() for letter in _named(_plain(text))}
    return named.pop() if len(named) == 1 and named <= set(letters) else None


def _plain(text: str) -> str:
    """Without full-width forms, markdown, quotes, LaTeX other than boxes, empty lines, and white space in a row."""
    text = unicodedata.normalize("NFKC", text)
    text = re.sub(r"\\(?:text|math)[a-z]*\{([^{}]*)\}", r"\1", text)
    lines = (" ".join(line.split()) for line in _FORMATTING.sub("", text).splitlines())
    return "\n".join(line for line in lines if line)


def _named(text: str) -> Iterator[str]:
    if match := _ALONE.fullmatch(text.upper()):
        yield match["plain"]
    for line in (text.split("\n", 1)[0], text.rsplit("\n", 1)[-1]):
        if match := _ALONE.fullmatch(line):
            yield match["plain"]
    if (match := _LEADING.match(text)) and not _lists_options(_letter(match), text[match.end() :]):
        yield _letter(match)
    for pattern in (_STATED, _CONFIRMED):
        for match in pattern.finditer(text):
            clause = re.split(r"[.!?;,\n。]", text[: match.start(match.lastgroup or 0)])[-1]
            if not _DOUBT.search(clause):
                yield _letter(match)


def _letter(match: re.Match[str]) -> str:
    return (match["marked"] or match["plain"]).upper()


def _lists_options(letter: str, rest: str) -> bool:
    """Whether the next letter's option follows: then the options were repeated, and the first is not the answer."""
    return re.search(rf"(?<![A-Za-z0-9])[(\[]?{chr(ord(letter) + 1)}[.)\]]\s+\S", rest) is not None


def extract_number(text: str) -> str | None:
    """The number that an answer ends in: the last one stated after "answer", otherwise the last of all. Found by math-verify.

    Thousands separators, units and currencies are left out; a percentage is the number before its sign.

    Raises:
        MissingExtraError: math-verify is not installed.
    """
    import sympy

    found = _parsed(text)
    value: Any = found[0] if found else None
    while isinstance(value, sympy.Eq):  # 9 × 2 = 18
        value = value.rhs
    if value is None or not _is_arithmetic(value):
        return None
    percent = value.has(sympy.UnevaluatedExpr)  # how math-verify writes 1/100
    value = value.doit() * (100 if percent else 1)
    if not (value.is_Number and value.is_finite):
        return None
    return f"{Decimal(str(value)).normalize():f}" if value.is_Float else str(value)


def same_number(number: str, right: str) -> bool:
    """Whether two numbers are equal, by math-verify, to six decimals."""
    # Its time limits use signals, which only the main thread may. They are not needed: what extract_number returns
    # is a number already, and comparing numbers takes no time.
    return bool(_math_verify().verify(_parsed(right), _parsed(number), timeout_seconds=None))


def _parsed(text: str) -> list[Any]:
    library = _math_verify()
    configs = [library.LatexExtractionConfig(), library.ExprExtractionConfig()]
    return library.parse(text, configs, fallback_mode="no_fallback", parsing_timeout=None)


def _is_arithmetic(value: Any) -> bool:
    """Whether a sympy expression is made of numbers by +, −, × and ÷, so that its value is found at once."""
    import sympy

    def simple(node: Any) -> bool:
        kinds = (sympy.Number, sympy.Add, sympy.Mul, sympy.UnevaluatedExpr)
        return isinstance(node, kinds) or (isinstance(node, sympy.Pow) and node.exp == -1)

    return isinstance(value, sympy.Expr) and all(map(simple, sympy.preorder_traversal(value)))


def _math_verify() -> ModuleType:
    try:
        import math_verify
    except ImportError as error:
        raise MissingExtraError("GSM8K needs math-verify", hint="pip install 'cache2cache[eval]'") from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that time limits are off
    return math_verify


def squad_scores(text: str, accepted: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 of words (both 0 to 1) with the nearest accepted answer, as SQuAD defines them, by torchmetrics.

    Raises:
        MissingExtraError: torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.text import squad
    except ImportError as error:
        raise MissingExtraError("SQuAD needs torchmetrics", hint="pip install 'cache2cache[eval]'") from error
    answers = {"text": list(accepted), "answer_start": [0] * len(accepted)}
    scores = squad({"prediction_text": text, "id": ""}, {"answers": answers, "id": ""})
    # They come in per cent and in single precision.
    return round(scores["exact_match"].item() / 100, 6), round(scores["f1"].item() / 100, 6)
