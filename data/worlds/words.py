"""The same world told in words: the prompt describes a scene, the answers are about it.

Objects, questions and the caption grammar are those of `scenes`; only the picture is replaced by
a complete telling, and scenes hold up to five shapes. A caption is now a retelling.
"""

import random
from collections.abc import Sequence

from worlds import scenes
from worlds.scenes import (
    CATEGORIES,
    Scene,
    Turn,
    caption,
    caption_log_probability,
    questions,
)

__all__ = [
    "CATEGORIES",
    "after",
    "caption",
    "caption_log_probability",
    "messages",
    "questions",
    "tell",
    "turns",
]

MOST_SHAPES = 5


def tell(rng: random.Random) -> tuple[str, Scene]:
    """Draw a scene: its telling in words, and the scene itself."""
    scene = scenes.sample(rng, MOST_SHAPES)
    return scenes.describe(scene), scene


def turns(telling: str, scene: Scene, rng: random.Random, most: int = 3) -> list[Turn]:
    """A conversation: up to `most` questions and one retelling, after the telling."""
    return after(telling, scenes.turns(scene, rng, most))


def after(telling: str, turns: Sequence[Turn]) -> list[Turn]:
    """The same turns, the first of them preceded by the telling."""
    first, *others = turns
    return [first._replace(question=f"{telling}. {first.question}"), *others]


def messages(turns: Sequence[Turn]) -> list[dict]:
    """The turns as chat messages with plain strings."""
    told = []
    for turn in turns:
        told.append({"role": "user", "content": turn.question})
        told.append({"role": "assistant", "content": turn.answer})
    return told
