"""A world of 64 x 64 drawn scenes with questions, answers and captions of known probability.

A scene is a handful of things: coloured shapes, one written word, or the bars of a chart.
Every thing owns an exact law over the phrases that may name it. A caption is an opening
followed by one phrase per thing, in a uniformly random order; so sampling a caption and
scoring one read the same tables, and the score is exact.
"""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

SIDE = 64  # pixels
PATCH = 8  # pixels; everything is drawn on this grid, which lets a small tower learn fast
CATEGORIES = ("exist", "count", "shape", "position", "color", "ocr", "compare", "chart")
COLORS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (235, 200, 20),
    "purple": (140, 50, 170),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"big": 7, "small": 4}  # half the width, in pixels
ROWS = ("top", "middle", "bottom")
NUMBERS = ("zero", "one", "two", "three", "four", "five")
WORDS = (
    *("ant", "bee", "bus", "cat", "cow", "cup", "dog", "egg"),
    *("fox", "hat", "jam", "key", "map", "net", "pen", "sun"),
)

Law = dict[str, float]  # text -> probability; sums to 1

OPENINGS: Law = {"there is": 0.4, "i see": 0.25, "this shows": 0.2, "here is": 0.1, "look at": 0.05}
SYNONYMS: dict[str, Law] = {
    "circle": {"circle": 0.6, "disc": 0.3, "ball": 0.1},
    "square": {"square": 0.7, "box": 0.3},
    "triangle": {"triangle": 1.0},
    "cross": {"cross": 0.7, "plus": 0.3},
    "big": {"big": 0.6, "large": 0.4},
    "small": {"small": 0.55, "little": 0.3, "tiny": 0.15},
    "top": {"top": 0.7, "upper": 0.3},
    "middle": {"middle": 1.0},
    "bottom": {"bottom": 0.7, "lower": 0.3},
    "word": {"word": 0.7, "text": 0.3},
    "bar": {"bar": 0.6, "column": 0.4},
}
PLACE_PROBABILITY = 0.5  # of saying where a shape is
JOINT = " and "
REQUEST = "describe it."  # what asks for a caption


class Turn(NamedTuple):
    """One exchange about a scene."""

    category: str
    question: str
    answer: str


def _say(*parts: str | Law) -> Law:
    """The law of the parts joined by spaces; a plain string is said with certainty."""
    laws = [{part: 1.0} if isinstance(part, str) else part for part in parts]
    law: Law = {}
    for choice in itertools.product(*(each.items() for each in laws)):
        text = " ".join(word for word, _ in choice)
        law[text] = law.get(text, 0.0) + math.prod(p for _, p in choice)
    return law


@dataclass(frozen=True)
class Shape:
    """A coloured shape in one cell (0-8, row by row) of a 3 x 3 board."""

    shape: str
    color: str
    size: str
    cell: int

    @property
    def place(self) -> str:
        """The row's name."""
        return ROWS[self.cell // 3]

    def phrases(self) -> Law:
        """The exact law over phrases that name the shape."""
        name = _say("a", SYNONYMS[self.size], self.color, SYNONYMS[self.shape])
        placed = _say(name, "at the", SYNONYMS[self.place])
        law = {text: p * (1 - PLACE_PROBABILITY) for text, p in name.items()}
        return law | {text: p * PLACE_PROBABILITY for text, p in placed.items()}

    def told(self) -> str:
        """The one complete wording."""
        return f"a {self.size} {self.color} {self.shape} at the {self.place}"


@dataclass(frozen=True)
class Word:
    """A written word."""

    text: str
    color: str

    def phrases(self) -> Law:
        """The exact law over phrases that name the word."""
        return _say("the", SYNONYMS["word"], self.text, "in", self.color)

    def told(self) -> str:
        """The one complete wording."""
        return f"the word {self.text} in {self.color}"


@dataclass(frozen=True)
class Bar:
    """A bar of a chart, `height` units (1-5) tall."""

    color: str
    height: int

    def phrases(self) -> Law:
        """The exact law over phrases that name the bar."""
        return _say("a", self.color, SYNONYMS["bar"], "of", NUMBERS[self.height])

    def told(self) -> str:
        """The one complete wording."""
        return f"a {self.color} bar of {NUMBERS[self.height]}"


Thing = Shape | Word | Bar


@dataclass(frozen=True)
class Scene:
    """Things of one kind: shapes in different cells, one word, or bars of different colours."""

    things: tuple[Thing, ...]

    @property
    def kind(self) -> type[Thing]:
        """The class of the scene's things."""
        return type(self.things[0])


# ---------------------------------------------------------------- sampling


def sample(rng: random.Random, most_shapes: int = 4) -> Scene:
    """Draw the contents of a scene: half are shapes (1 to `most_shapes`), else a word or bars."""
    kind = rng.choice((Shape, Shape, Word, Bar))
    if kind is Shape:
        return _sample_shapes(rng, rng.randint(1, most_shapes))
    if kind is Word:
        return Scene((Word(rng.choice(WORDS), rng.choice(list(COLORS))),))
    n = rng.randint(2, 4)
    colors, heights = rng.sample(list(COLORS), n), rng.sample(range(1, 6), n)
    return Scene(tuple(Bar(c, h) for c, h in zip(colors, heights, strict=True)))


def _sample_shapes(rng: random.Random, n: int) -> Scene:
    def one(cell: int) -> Shape:
        pick = rng.choice
        return Shape(pick(SHAPES), pick(list(COLORS)), pick(list(SIZES)), cell)

    return Scene(tuple(one(cell) for cell in rng.sample(range(9), n)))


# ---------------------------------------------------------------- drawing


def draw(rng: random.Random) -> tuple[Image.Image, Scene]:
    """Draw a random scene: a 64 x 64 RGB image and what it shows."""
    scene = sample(rng)
    return render(scene, rng), scene


def render(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw `scene` with random paper, slightly random colours and, for words and bars, places."""
    paper = rng.randint(215, 250)
    image = Image.new("RGB", (SIDE, SIDE), (paper, paper, paper + rng.randint(-5, 5)))
    pen = ImageDraw.Draw(image)
    painters: dict[Any, Callable[..., None]] = {
        Shape: _paint_shapes, Word: _paint_word, Bar: _paint_bars,
    }
    painters[scene.kind](pen, scene.things, rng)
    return image


def _ink(color: str, rng: random.Random) -> tuple[int, ...]:
    return tuple(max(0, min(255, channel + rng.randint(-15, 15))) for channel in COLORS[color])


def _paint_shapes(pen: ImageDraw.ImageDraw, shapes: Sequence[Shape], rng: random.Random) -> None:
    for thing in shapes:
        x, y = PATCH + 3 * PATCH * (thing.cell % 3), PATCH + 3 * PATCH * (thing.cell // 3)
        _paint_shape(pen, thing.shape, (x, y, SIZES[thing.size]), _ink(thing.color, rng))


def _paint_shape(
    pen: ImageDraw.ImageDraw, shape: str, place: tuple[int, int, int], ink: tuple[int, ...]
) -> None:
    x, y, r = place
    thin = max(1, r // 3)
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=ink)
    elif shape == "square":
        pen.rectangle((x - r + 1, y - r + 1, x + r - 1, y + r - 1), fill=ink)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=ink)
    else:
        pen.rectangle((x - thin, y - r, x + thin, y + r), fill=ink)
        pen.rectangle((x - r, y - thin, x + r, y + thin), fill=ink)


@lru_cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=20)


def _paint_word(pen: ImageDraw.ImageDraw, words: Sequence[Word], rng: random.Random) -> None:
    """One letter per 16-pixel cell: fixed pitch, so that a letter always meets the grid alike."""
    cell = 2 * PATCH
    left, top = cell * rng.randint(0, 1), cell * rng.randint(0, 3)
    ink = _ink(words[0].color, rng)
    for i, letter in enumerate(words[0].text):
        center = (left + cell * i + cell // 2, top + cell // 2)
        pen.text(center, letter, fill=ink, font=_font(), anchor="mm")


def _paint_bars(pen: ImageDraw.ImageDraw, bars: Sequence[Bar], rng: random.Random) -> None:
    """Up to four columns of 16 pixels; one unit of height is one 8-pixel grid line."""
    for line in range(1, 7):
        y = SIDE - 1 - PATCH * line
        pen.line([(0, y), (SIDE - 1, y)], fill=(190, 190, 190))
    for slot, bar in zip(sorted(rng.sample(range(4), len(bars))), bars, strict=True):
        x, top = 2 * PATCH * slot, SIDE - PATCH * bar.height
        pen.rectangle((x + 2, top, x + 13, SIDE - 1), fill=_ink(bar.color, rng))


# ---------------------------------------------------------------- questions


def questions(scene: Scene, rng: random.Random) -> list[Turn]:
    """Every question there is to ask, as (category, question, answer), in random order."""
    askers: dict[Any, Callable[..., list[Turn]]] = {
        Shape: _ask_shapes, Word: _ask_word, Bar: _ask_bars,
    }
    asked = askers[scene.kind](scene.things, rng)
    rng.shuffle(asked)
    return asked


def _ask_shapes(shapes: Sequence[Shape], rng: random.Random) -> list[Turn]:
    asked = [_ask_exist(shapes, rng), _ask_count(shapes, rng)]
    if lone := _unique(shapes, "shape"):
        thing = rng.choice(lone)
        asked.append(Turn("color", f"what color is the {thing.shape}?", thing.color))
    if lone := _unique(shapes, "color"):
        thing = rng.choice(lone)
        asked.append(Turn("shape", f"what shape is the {thing.color} one?", thing.shape))
        thing = rng.choice(lone)
        asked.append(Turn("position", f"where is the {thing.color} shape?", thing.place))
    return asked


def _ask_exist(shapes: Sequence[Shape], rng: random.Random) -> Turn:
    """Half the answers are yes, except that a scene with every shape leaves nothing to deny."""
    present = {thing.shape for thing in shapes}
    absent = [shape for shape in SHAPES if shape not in present]
    yes = not absent or rng.random() < 0.5
    shape = rng.choice(sorted(present) if yes else absent)
    return Turn("exist", f"is there a {shape}?", "yes" if yes else "no")


def _ask_count(shapes: Sequence[Shape], rng: random.Random) -> Turn:
    """Mostly about a colour that occurs, so that zero does not win by guessing."""
    color = rng.choice(shapes).color if rng.random() < 0.75 else rng.choice(list(COLORS))
    n = sum(thing.color == color for thing in shapes)
    return Turn("count", f"how many {color} shapes?", NUMBERS[n])


def _unique(shapes: Sequence[Shape], attribute: str) -> list[Shape]:
    values = [getattr(thing, attribute) for thing in shapes]
    return [thing for thing, value in zip(shapes, values, strict=True) if values.count(value) == 1]


def _ask_word(words: Sequence[Word], rng: random.Random) -> list[Turn]:
    del rng  # nothing to choose: one word, two questions
    return [
        Turn("ocr", "what does it say?", words[0].text),
        Turn("color", "what color is the word?", words[0].color),
    ]


def _ask_bars(bars: Sequence[Bar], rng: random.Random) -> list[Turn]:
    ordered = sorted(bars, key=lambda bar: bar.height)
    bar = rng.choice(bars)
    return [
        Turn("compare", "which bar is tallest?", ordered[-1].color),
        Turn("compare", "which bar is shortest?", ordered[0].color),
        Turn("chart", f"how tall is the {bar.color} bar?", NUMBERS[bar.height]),
    ]


# ---------------------------------------------------------------- captions


def describe(scene: Scene) -> str:
    """The complete, unvaried telling of the scene, in the order of its things."""
    return ", ".join(thing.told() for thing in scene.things)


def _choose(law: Law, rng: random.Random) -> str:
    return rng.choices(list(law), weights=list(law.values()))[0]


def caption(scene: Scene, rng: random.Random) -> str:
    """Draw a caption from the grammar."""
    things = rng.sample(scene.things, len(scene.things))
    phrases = [_choose(thing.phrases(), rng) for thing in things]
    return f"{_choose(OPENINGS, rng)} {JOINT.join(phrases)}"


def caption_log_probability(scene: Scene, text: str) -> float:
    """The exact log p(text | scene) of the grammar, in nats; -inf for a text it cannot produce.

    A text has one probability per order of the things that explains it, and identical things
    make several orders explain the same text; their sum is the permanent of the table
    p(phrase i | thing j), over the number of orders.
    """
    for opening, chance in OPENINGS.items():
        if text.startswith(opening + " "):
            phrases = text[len(opening) + 1 :].split(JOINT)
            laws = [thing.phrases() for thing in scene.things]
            ways = _permanent([[law.get(phrase, 0.0) for law in laws] for phrase in phrases])
            p = chance * ways / math.factorial(len(laws))
            return math.log(p) if p > 0 else -math.inf
    return -math.inf


def _permanent(table: list[list[float]]) -> float:
    """The permanent of a square table (at most 5 x 5 here), and 0 for any other shape."""
    n = len(table)
    if any(len(row) != n for row in table):
        return 0.0
    orders = itertools.permutations(range(n))
    return sum(math.prod(row[j] for row, j in zip(table, order, strict=True)) for order in orders)


def turns(scene: Scene, rng: random.Random, most: int = 3) -> list[Turn]:
    """A conversation: up to `most` questions and, anywhere among them, one caption."""
    told = questions(scene, rng)[:most]
    told.insert(rng.randint(0, len(told)), Turn("caption", REQUEST, caption(scene, rng)))
    return told


def messages(turns: Sequence[Turn]) -> list[dict]:
    """The turns as chat messages of typed parts, the image's part first."""
    told: list[dict] = []
    for turn in turns:
        told.append({"role": "user", "content": [{"type": "text", "text": turn.question}]})
        told.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    told[0]["content"].insert(0, {"type": "image"})
    return told
