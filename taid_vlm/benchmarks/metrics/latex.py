"""The value of a short arithmetic expression as models write it: LaTeX, plain text or a mix."""

from __future__ import annotations

import math
import re
import string
from fractions import Fraction

LONGEST = 200  # characters; what is longer is no single value
DEEPEST = 30  # brackets
LARGEST = 20_000  # bits of an exact power; beyond it floats are enough
_IGNORED = re.compile(r"\$|\\[,; ]|\\left\b|\\right\b|\\displaystyle\b")
_TOKEN = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?|\.\d+|\\[a-z]+|.", re.DOTALL | re.ASCII)
_DIGITS = tuple(string.digits)
_CLOSING = {"(": ")", "{": "}", "[": "]"}
_TIMES = ("*", "\\cdot", "\\times")
_OVER = ("/", ":", "\\div")
_AFTER_FACTOR = (None, "+", "-", ")", "}", "]")
_FRACTIONS = ("\\frac", "\\dfrac", "\\tfrac")

Number = Fraction | float


class _Unreadable(Exception):
    """The text is no arithmetic expression."""


def value_of(text: str) -> float | None:
    """The value of numbers, + - * / : ^, brackets, fractions, roots and \\pi; else None.

    "2(\\sqrt{2}-1)" -> 0.828..., "1,250" -> 1250.0, "x+1" -> None. Rational parts are exact, so
    a quotient of numbers too large for floats still has its value. An expression ends at a full
    stop and at a bracket that closes nothing ("3/4}. So ..." -> 0.75), as it does for the parser
    behind MATH-Vision's published verdicts, latex2sympy2; like that one this knows no degrees.
    """
    text = _expression(text)
    if not text or len(text) > LONGEST or sum(map(text.count, _CLOSING)) > DEEPEST:
        return None
    tokens = _TOKEN.findall(_IGNORED.sub(" ", text.lower()))
    try:
        value = float(_Parser([token for token in tokens if not token.isspace()]).whole())
    except (_Unreadable, ArithmeticError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _expression(text: str) -> str:
    depth = 0
    for index, letter in enumerate(text[:LONGEST + 1]):
        depth += (letter in _CLOSING) - (letter in _CLOSING.values())
        if depth < 0 or (letter == "." and not text.startswith(_DIGITS, index + 1)):
            return text[:index]
    return text


class _Parser:
    """Recursive descent over the tokens of one expression."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens, self._at = tokens, 0

    def whole(self) -> Number:
        value = self._sum()
        if self._next is not None:
            raise _Unreadable
        return value

    @property
    def _next(self) -> str | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def _take(self, *wanted: str) -> str:
        """The next token, if it is one of those; else nothing is taken."""
        token = self._next
        if token not in wanted:
            return ""
        self._at += 1
        return str(token)

    def _sum(self) -> Number:
        value = self._product()
        while sign := self._take("+", "-"):
            value = value + self._product() if sign == "+" else value - self._product()
        return value

    def _product(self) -> Number:
        value = self._signed()
        while self._next not in _AFTER_FACTOR:
            if self._take(*_TIMES):
                value = value * self._signed()
            elif self._take(*_OVER):
                value = value / self._signed()
            else:  # "2\\pi", "3(4)": nothing between two factors
                value = value * self._factor()
        return value

    def _factor(self) -> Number:
        if all(token.endswith(_DIGITS) for token in self._tokens[self._at - 1:self._at + 1]):
            raise _Unreadable  # two numbers side by side are no product
        return self._power()

    def _signed(self) -> Number:
        sign = 1
        while token := self._take("+", "-"):
            sign = -sign if token == "-" else sign
        return sign * self._power()

    def _power(self) -> Number:
        base = self._atom()
        return _raised(base, self._exponent()) if self._take("^") else base

    def _exponent(self) -> Number:
        return self._signed() if self._next == "-" else self._power()

    def _atom(self) -> Number:
        token = self._next
        self._at += 1
        if token == "\\pi":
            return math.pi
        if token in _FRACTIONS:
            return self._argument() / self._argument()
        if token == "\\sqrt":
            degree = self._bracket("]") if self._take("[") else Fraction(2)
            return _root(self._argument(), degree)
        if token in _CLOSING:
            return self._bracket(_CLOSING[token])
        if token is None or not token.endswith(_DIGITS):
            raise _Unreadable
        return Fraction(token.replace(",", ""))

    def _bracket(self, closing: str) -> Number:
        value = self._sum()
        if not self._take(closing):
            raise _Unreadable
        return value

    def _argument(self) -> Number:
        if not self._take("{"):
            raise _Unreadable
        return self._bracket("}")


def _raised(base: Number, exponent: Number) -> Number:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if bits * abs(exponent.numerator) <= LARGEST:
            return base ** exponent.numerator
    return math.pow(base, exponent)


def _root(value: Number, degree: Number) -> float:
    if value < 0:
        raise _Unreadable
    return math.sqrt(value) if degree == 2 else math.pow(value, 1 / degree)
