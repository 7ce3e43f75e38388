"""The drawn world: questions, drawings, and captions whose probability is exact."""

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
from worlds import scenes, words
from worlds.scenes import Bar, Scene, Shape, Word, caption, caption_log_probability

TWINS = Scene((Shape("circle", "red", "big", 0), Shape("circle", "red", "big", 0)))
PAIR = Scene((Shape("square", "blue", "small", 4), Shape("cross", "red", "big", 8)))
WORD = Scene((Word("cat", "green"),))
CHART = Scene((Bar("red", 2), Bar("blue", 5), Bar("green", 1)))
SMALL = {"twins": TWINS, "pair": PAIR, "word": WORD, "chart": CHART}


def every_caption(scene: Scene) -> set[str]:
    """All texts of the grammar, listed without asking for their probability."""
    texts = set()
    for things in itertools.permutations(scene.things):
        for phrases in itertools.product(*(thing.phrases() for thing in things)):
            body = scenes.JOINT.join(phrases)
            texts |= {f"{opening} {body}" for opening in scenes.OPENINGS}
    return texts


@pytest.mark.parametrize("scene", SMALL.values(), ids=SMALL)
def test_caption_probabilities_sum_to_one(scene):
    total = math.fsum(math.exp(caption_log_probability(scene, t)) for t in every_caption(scene))
    assert total == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("scene", [TWINS, WORD, CHART], ids=["twins", "word", "chart"])
def test_caption_probabilities_are_the_observed_frequencies(scene):
    rng, n = random.Random(0), 20_000
    for text, count in Counter(caption(scene, rng) for _ in range(n)).most_common(20):
        p = math.exp(caption_log_probability(scene, text))
        assert abs(count / n - p) < 5 * math.sqrt(p * (1 - p) / n), text


def test_identical_things_share_a_caption():
    """Two orders explain "circle and circle", so its probability is not halved by them."""
    phrase = TWINS.things[0].phrases()["a big red circle"]
    said = "i see a big red circle and a big red circle"
    expected = math.log(scenes.OPENINGS["i see"] * phrase**2)
    assert caption_log_probability(TWINS, said) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "i see",
        "i see a red bar of two",
        "i see a red bar of two and a blue bar of five and a blue bar of five",
        "i see a red bar of three and a blue bar of five and a green bar of one",
        "i see a red bar of two and a blue bar of five and a green bar of one and a red bar of two",
        "behold a red bar of two and a blue bar of five and a green bar of one",
    ],
)
def test_texts_outside_the_grammar_are_impossible(text):
    assert caption_log_probability(CHART, text) == -math.inf


@pytest.mark.parametrize("world", ["scenes", "words"])
def test_every_caption_is_possible(world):
    rng = random.Random(1)
    for _ in range(300):
        scene = scenes.sample(rng) if world == "scenes" else words.tell(rng)[1]
        logp = caption_log_probability(scene, caption(scene, rng))
        assert -math.inf < logp < 0


def answers(scene: Scene) -> dict[str, str]:
    """Every question that is ever asked about the scene, with its one answer."""
    rng = random.Random(0)
    asked = {turn[1:] for _ in range(400) for turn in scenes.questions(scene, rng)}
    assert len(dict(asked)) == len(asked), "a question with two answers"
    return dict(asked)


def test_answers_about_shapes():
    scene = Scene(
        (
            Shape("circle", "red", "big", 0),
            Shape("circle", "blue", "small", 5),
            Shape("cross", "red", "small", 7),
        )
    )
    got = answers(scene)
    assert {q: got.pop(q) for q in list(got) if "many" in q} == {
        f"how many {color} shapes?": {"red": "two", "blue": "one"}.get(color, "zero")
        for color in scenes.COLORS
    }
    assert got == {
        "is there a circle?": "yes",
        "is there a cross?": "yes",
        "is there a square?": "no",
        "is there a triangle?": "no",
        "what color is the cross?": "red",
        "what shape is the blue one?": "circle",
        "where is the blue shape?": "middle",
    }


def test_answers_about_words_and_charts():
    assert answers(WORD) == {"what does it say?": "cat", "what color is the word?": "green"}
    assert answers(CHART) == {
        "which bar is tallest?": "blue",
        "which bar is shortest?": "green",
        "how tall is the red bar?": "two",
        "how tall is the blue bar?": "five",
        "how tall is the green bar?": "one",
    }


def test_every_category_occurs():
    rng = random.Random(3)
    asked = {
        turn.category for _ in range(100) for turn in scenes.questions(scenes.sample(rng), rng)
    }
    assert asked == set(scenes.CATEGORIES)


def test_a_seed_fixes_the_picture_and_the_conversation():
    def one() -> tuple:
        rng = random.Random(7)
        image, scene = scenes.draw(rng)
        return image.tobytes(), scene, scenes.turns(scene, rng)

    assert one() == one()


def nearest_color(pixel: np.ndarray) -> str:
    """The name of the colour closest to an RGB pixel."""
    return min(scenes.COLORS, key=lambda name: ((scenes.COLORS[name] - pixel) ** 2).sum())


def test_shapes_are_drawn_where_the_scene_says():
    rng = random.Random(5)
    for _ in range(50):
        image, scene = scenes.draw(rng)
        pixels = np.asarray(image).astype(int)
        assert pixels.shape == (scenes.SIDE, scenes.SIDE, 3)
        for thing in scene.things if scene.kind is Shape else ():
            y, x = (8 + 24 * (thing.cell // 3), 8 + 24 * (thing.cell % 3))
            assert nearest_color(pixels[y, x]) == thing.color


def test_messages_put_the_image_first():
    rng = random.Random(0)
    told = scenes.messages(scenes.turns(WORD, rng))
    assert told[0]["content"][0] == {"type": "image"}
    assert [message["role"] for message in told] == ["user", "assistant"] * 3
    assert all(part["type"] == "text" for message in told[1:] for part in message["content"])
