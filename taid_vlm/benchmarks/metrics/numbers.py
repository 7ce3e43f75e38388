"""Numbers as people and models write them: signs, thousands, currencies, units, words, LaTeX."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from taid_vlm.benchmarks.metrics.anls import anls
from taid_vlm.benchmarks.metrics.final import LATEX_TEXT, final_texts
from taid_vlm.benchmarks.metrics.latex import value_of
from taid_vlm.benchmarks.metrics.text import normalised, of_text
from taid_vlm.benchmarks.question import Question, Rule, Verdict, one_by_one

EQUAL = 1e-9  # relative: floats that were written with all their digits
LARGEST = 300  # power of ten
TAIL = 2000  # characters at an answer's end, in which its last number is looked for first
LAST_NUMBER = "last_number"  # as a place where a final answer is looked for
NUMBER_PLACES = ("boxed", "hashes", "answer_is", "whole", LAST_NUMBER)
TEXT_PLACES = ("boxed", "hashes", "answer_is")

_SCALES = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
_COUNTED = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen twenty"""
_WORDS = {word: float(value) for value, word in enumerate(_COUNTED.split())}
# only these tell two quantities apart: 10 cm is not 10 m, but 10 apples are 10
_UNITS = {alias: unit for unit, aliases in {
    "%": "% percent pct percentage", "$": "$ us$ usd dollar dollars buck bucks",
    "€": "€ eur euro euros", "£": "£ gbp pound_sterling", "¥": "¥ jpy yen cny yuan rmb",
    "₹": "₹ inr rupee rupees", "cent": "¢ cent cents", "mm": "mm millimeter millimeters millimetre "
    "millimetres", "cm": "cm centimeter centimeters centimetre centimetres",
    "m": "m meter meters metre metres", "km": "km kilometer kilometers kilometre kilometres",
    "in": "inch inches", "ft": "ft foot feet", "mi": "mi mile miles", "yd": "yd yard yards",
    "mg": "mg milligram milligrams", "g": "g gram grams", "kg": "kg kilogram kilograms",
    "lb": "lb lbs", "oz": "oz ounce ounces", "ml": "ml milliliter milliliters millilitre "
    "millilitres", "l": "l liter liters litre litres", "s": "s sec second seconds",
    "min": "min minute minutes", "h": "h hr hour hours", "day": "day days", "week": "week weeks",
    "month": "month months", "year": "year years yr yrs", "°c": "°c", "°f": "°f", "°": "°",
}.items() for alias in aliases.split()}
_NUMBER = re.compile(r"""
    (?<![\w.])(?P<sign>[-+]?)\s?(?P<before>us\$|[$€£¥₹])?\s?(?P<inner>-?)
    (?P<digits>\d{1,3}(?:[,\ \u00a0\u202f\u2009]\d{3})+(?!\d)|\d{1,3}(?:\.\d{3}){2,}(?!\d)
        |\d++|(?=\.\d))(?P<decimals>\.\d++)?
    (?:(?P<mixed>\s\d{1,9})?\s?/\s?(?P<below>\d{1,9})(?![\d/.]))?
    (?:e(?P<exponent>[-+]?\d{1,3})\b|\s?(?:[×x*]|\\times)\s?10\s?\^?\{?(?P<power>[-+]?\d{1,3})\}?)?
    (?:\s?(?P<scale>thousand|million|billion|trillion)\b|(?P<k>k)\b)?
    (?:\s?-?(?P<unit>%|°\s?[cf]\b|[°¢€£¥₹$]|[^\W\d_]++))?
""", re.VERBOSE | re.IGNORECASE)
_MARKUP = re.compile(r"\\[,;:! ]|\\(?=[$%])|\\left\b|\\right\b|[*_`]{2,}")
_CURRENCY_MATHS = re.compile(r"\$(?=[^$]*\\)|(?<=\d)\$(?=\W|$)|\\[()\[\]]")
_VULGAR = re.compile("[¼½¾⅐-⅞]")


@dataclass(frozen=True)
class Quantity:
    """A number, and its unit where one of _UNITS stands beside it ("" otherwise)."""

    value: float
    unit: str = ""


def quantities(text: str) -> list[Quantity]:
    """All numbers of a text, in their order: "1,250 dollars in 2 days" -> 1250 $, 2 day."""
    return [quantity for _, quantity in _found(text)]


def _found(text: str) -> list[tuple[str, Quantity]]:
    return [(match[0].strip(), quantity) for match in _NUMBER.finditer(_plain(text))
            if (quantity := _quantity(match)) is not None]


def read_quantity(text: str) -> Quantity | None:
    """The number that a short text is: with currency and unit, as a word, as an expression of
    LaTeX, or the only one in it; None where there are none or several."""
    plain = _plain(text).strip()
    match = _NUMBER.fullmatch(plain.rstrip("."))
    if match is not None:
        return _quantity(match)
    word = _WORDS.get(plain.rstrip(".").lower())
    value = value_of(plain) if word is None and "\\" in plain else word
    if value is not None:
        return Quantity(value)
    found = quantities(text)
    return found[0] if len(found) == 1 else None


def same_quantity(said: Quantity, gold: Quantity, tolerance: float = 0.0) -> bool:
    """Whether two quantities are the same, within a share of the gold's value.

    Units that both have must be the same. A unit that only one has is not looked at, and where
    that is a percent sign its number may be meant as it is or as hundredths: "10 %" is 10 and 0.1.
    """
    if said.unit and gold.unit and said.unit != gold.unit:
        return False
    values = [said.value]
    if said.unit != gold.unit and "%" in (said.unit, gold.unit):
        values.append(said.value / 100 if said.unit == "%" else said.value * 100)
    room = max(tolerance, EQUAL) * abs(gold.value)
    return any(abs(value - gold.value) <= room for value in values)


def _plain(text: str) -> str:
    """Without LaTeX's markup, with ASCII's signs, and fractions of one character written out."""
    text = _VULGAR.sub(lambda m: " " + unicodedata.normalize("NFKC", m[0]).replace("⁄", "/"), text)
    text = _MARKUP.sub("", LATEX_TEXT.sub(r" \1", text))
    text = _CURRENCY_MATHS.sub("", text) if "\\" in text or text.count("$") == 2 else text
    return re.sub(r"[ \t]+", " ", text).replace("−", "-").replace("–", "-").replace("％", "%")


def _quantity(match: re.Match[str]) -> Quantity | None:
    part = match.groupdict()
    digits = re.sub(r"\D", "", part["digits"])
    value = float(f"{digits or 0}{part['decimals'] or ''}")
    if part["below"] is not None:
        if not int(part["below"]):
            return None
        value = value + int(part["mixed"]) / int(part["below"]) if part["mixed"] \
            else value / int(part["below"])
    exponent = int(part["exponent"] or part["power"] or 0)
    if abs(exponent) > LARGEST:
        return None
    scale = _SCALES.get((part["scale"] or "").lower(), 1e3 if part["k"] else 1.0)
    value = value * scale * 10.0 ** exponent * (
        -1 if "-" in (part["sign"], part["inner"]) else 1)
    units = [_UNITS.get(re.sub(r"\s", "", part[name] or "").lower(), "")
             for name in ("before", "unit")]
    return Quantity(value, next(filter(None, units), "")) if math.isfinite(value) else None


# ----- rules --------------------------------------------------------------------------------


def final_quantity(answer: str, places: Sequence[str]) -> tuple[str, Quantity] | None:
    """The final answer's text and number, looked for at `places` in their order."""
    for place in places:
        if place == LAST_NUMBER:
            if found := _found(answer[-TAIL:]) or _found(answer):
                return found[-1]
            continue
        if place == "whole" and len(answer) > TAIL:
            continue  # no single number
        for text in final_texts(answer, (place,)):
            number = read_quantity(text)
            if number is None and place != "whole":
                number = next(iter(quantities(text)), None)
            if number is not None:
                return text, number
    return None


def _judge_number(question: Question, answer: str, places: Sequence[str], tolerance: float
                  ) -> Verdict:
    found = final_quantity(answer, places)
    if found is None:
        return Verdict(0.0, None)
    golds = map(read_quantity, question.answers)
    return Verdict(float(any(gold is not None and same_quantity(found[1], gold, tolerance)
                             for gold in golds)), found[0])


def _relaxed(answer: str, question: Question, places: Sequence[str], tolerance: float) -> float:
    """Against a gold that is a number as a number, otherwise as text."""
    number = final_quantity(answer, (*places, "whole"))
    said = normalised(final_or_whole(answer, places))
    for text in question.answers:
        match = _NUMBER.fullmatch(_plain(text).strip())
        gold = match and _quantity(match)
        if said == normalised(text) or (
                gold and number and same_quantity(number[1], gold, tolerance)):
            return 1.0
    return 0.0


def final_or_whole(answer: str, places: Sequence[str]) -> str:
    """The final answer's text, the whole answer where no pattern finds one."""
    return next(final_texts(answer, places), answer.strip())


def _name(name: str, places: Sequence[str], usual: Sequence[str], tolerance: float = 0.0,
          usual_tolerance: float = 0.0) -> str:
    """A rule's name says what is not as usual: rules of one name give the same verdicts."""
    more = ([] if tuple(places) == tuple(usual) else [",".join(places)]) + (
        [] if tolerance == usual_tolerance else [f"{tolerance:g}"])
    return name + (f"[{';'.join(more)}]" if more else "")


def number_rule(places: Sequence[str] = NUMBER_PLACES, tolerance: float = 0.0) -> Rule:
    """The final answer is the right number, units and currencies aside."""
    return Rule(_name("number", places, NUMBER_PLACES, tolerance), 1,
                one_by_one(partial(_judge_number, places=places, tolerance=tolerance)),
                source=f"own: the number at the first of {', '.join(places)}")


def relaxed_rule(places: Sequence[str] = TEXT_PLACES, tolerance: float = 0.05) -> Rule:
    """Numbers within a share of the right one, other answers as normalised text."""
    def score(answer: str, question: Question) -> float:
        return _relaxed(answer, question, places, tolerance)

    return Rule(_name("relaxed", places, TEXT_PLACES, tolerance, 0.05), 1,
                of_text(score, partial(final_or_whole, places=places)),
                source=f"own, after ChartQA's: the text at the first of {', '.join(places)}")


def anls_rule(places: Sequence[str] = TEXT_PLACES) -> Rule:
    """ANLS of the final answer."""
    def score(answer: str, question: Question) -> float:
        return anls(final_or_whole(answer, places), question)

    return Rule(_name("anls", places, TEXT_PLACES), 1,
                of_text(score, partial(final_or_whole, places=places)),
                source=f"DocVQA's script on the text at the first of {', '.join(places)}")


def text_rule(places: Sequence[str]) -> Rule:
    """The final answer is an accepted one, both normalised."""
    def score(answer: str, question: Question) -> float:
        said = normalised(final_or_whole(answer, places))
        return said in set(map(normalised, question.answers))

    return Rule(_name("normalised", places, ()), 1,
                of_text(score, partial(final_or_whole, places=places)),
                source=f"own: normalised text at the first of {', '.join(places)}")
