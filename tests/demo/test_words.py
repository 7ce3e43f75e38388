"""The world told in words."""

import random

from worlds import scenes, words
from worlds.scenes import Bar, Scene, Shape, Word


def test_the_telling_names_everything():
    shapes = Scene((Shape("circle", "red", "big", 0), Shape("cross", "blue", "small", 5)))
    assert scenes.describe(shapes) == (
        "a big red circle at the top, a small blue cross at the middle"
    )
    assert scenes.describe(Scene((Word("cat", "red"),))) == "the word cat in red"
    bars = Scene((Bar("red", 2), Bar("green", 5)))
    assert scenes.describe(bars) == "a red bar of two, a green bar of five"


def test_only_the_first_question_carries_the_telling():
    rng = random.Random(0)
    telling, scene = words.tell(rng)
    first, *others = words.turns(telling, scene, rng)
    assert first.question.startswith(telling + ". ")
    assert others and not any(telling in turn.question for turn in others)


def test_a_conversation_has_one_retelling_and_at_most_three_questions():
    rng = random.Random(0)
    for _ in range(50):
        telling, scene = words.tell(rng)
        categories = [turn.category for turn in words.turns(telling, scene, rng)]
        assert categories.count("caption") == 1
        assert 2 <= len(categories) <= 4


def test_messages_are_plain_strings():
    rng = random.Random(0)
    telling, scene = words.tell(rng)
    turns = words.turns(telling, scene, rng)
    told = words.messages(turns)
    assert [m["content"] for m in told] == [text for turn in turns for text in turn[1:]]
    assert [m["role"] for m in told] == ["user", "assistant"] * len(turns)
