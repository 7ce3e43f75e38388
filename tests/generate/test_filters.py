"""Filters of generated answers: each rule keeps what it says."""

from __future__ import annotations

from typing import Any

import pytest

from taid_vlm.errors import TaidError
from taid_vlm.generate.filters import RULES, SCRIPTS, Said, parse_filters, pieces, reading


def kept(rule: str, *texts: str, of: int = 0, seen: set[Any] | None = None, **more: Any
         ) -> list[bool]:
    [chosen] = parse_filters([rule])
    said = [Said("p", of or len(texts), text, more.get("cut", False), pieces(text),
                 more.get("question", "")) for text in texts]
    return chosen.keeps(said, set() if seen is None else seen)


def test_length_and_limit() -> None:
    assert kept("min_length=3", "a b", "a b c", "a b c d") == [False, True, True]
    assert kept("max_length=3", "a b", "a b c", "a b c d") == [True, True, False]
    assert kept("cut", "a", cut=True) == [False]
    assert kept("cut", "a") == [True]


def test_repetition() -> None:
    round_and_round = "I see " + "a red square and " * 12
    assert kept("repeats", round_and_round, round_and_round[:40], "x" * 400, "我喜欢你" * 40,
                "The sum of 12 and 30 is 42: 10 + 30 is 40 and 2 more are 42, as was asked.") \
        == [False, True, False, False, True]


def test_scripts() -> None:
    mixed = "The answer is красный, да, конечно"
    assert kept("script=latin", "It is a naïve café.", "Это дом", mixed, "42 + 1 = 43", "𝑥 + 𝑦") \
        == [True, False, False, True, True]
    assert kept("script=cyrillic+latin", mixed) == [True]
    assert kept("script=hiragana+katakana+cjk", "これはペンです。日本語", "데이터") == [True, False]
    assert kept("script", "这是一个", "It is one", question="What is it?") == [False, True]
    assert kept("script=question", "这是一个", "Der α ist 3", question="3?") == [True, True]
    assert len(set(SCRIPTS)) == len(SCRIPTS)


def test_final_answers_are_read() -> None:
    same = ["#### 18", "So it is \\boxed{18}.", "First 3 and 6, then 18.\nThe answer is $18.",
            "9 * 2 = 18\nShe earns 18", "18", "18.0"]
    assert len({reading(text) for text in same}) == 1
    assert reading("Yes.") == reading("yes") != reading("No")
    assert reading("Long talk.\nThe answer is **Paris**.") == reading("paris")
    assert reading("A story of 3 mice.\nThe answer is B") == reading("(B)")


def test_agreement_is_of_more_than_half() -> None:
    assert kept("agree", "yes", "no", "yes") == [True, False, True]
    assert kept("agree", "yes", "no") == [False, False]
    assert kept("agree", "yes", "yes", of=4) == [False, False]  # two of four were left out before
    assert kept("agree=0.8", "1", "1", "1", "2") == [False] * 4
    assert kept("agree=0.75", "1", "1", "1", "2") == [True, True, True, False]


def test_the_same_again() -> None:
    seen: set[Any] = set()
    assert kept("duplicates", "a  b", "a b", "A b", seen=seen) == [True, False, True]
    assert kept("duplicates", "a b", "c", seen=seen) == [False, True]


def test_order_and_description() -> None:
    filters = parse_filters(["judge", "duplicates", "agree=0.75", "cut"])
    assert [each.name for each in filters] == ["cut", "agree", "duplicates", "judge"]
    assert filters[1].describe() == {"rule": "agree", "version": 1, "value": 0.75}
    assert filters[0].describe() == {"rule": "cut", "version": 1}
    assert parse_filters(["none"]) == []
    assert all(rule.version >= 1 for rule in RULES.values())


@pytest.mark.parametrize(("texts", "words"), [
    (["cutt"], "Did you mean 'cut'"), (["cut=3"], "has no value"), (["cut", "cut"], "twice"),
    (["min_length"], "whole number"), (["max_length=-1"], "whole number"),
    (["agree=0.3"], "from 0.5 to 1"),
    (["script=latn"], "Did you mean 'latin'"), (["none", "cut"], "no such rule"),
    (["judge=high"], "from 0 to 1"), (["agree=nan"], "from 0.5")])
def test_rules_that_cannot_be(texts: list[str], words: str) -> None:
    with pytest.raises(TaidError, match=words):
        parse_filters(texts)
