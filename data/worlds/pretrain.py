"""Trains the demo's teachers, and warm-starts its students, by next-token prediction on answers.

Every step draws fresh scenes, so nothing is ever seen twice. On one CPU core the teachers take
some tens of minutes; that is why the repository ships them trained.
"""

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from tqdm import tqdm
from transformers import BatchEncoding, PreTrainedModel

from worlds import models, scenes, words
from worlds.models import Processor
from worlds.scenes import Turn

IGNORED = -100  # the label that the models' loss skips
EVAL_SEED = 10**6  # far from every training seed


@dataclass(frozen=True)
class Recipe:
    """How one model is trained; a step sees `batch` scenes."""

    steps: int
    batch: int = 32
    learning_rate: float = 1e-3
    questions: int = 5  # per scene, at most
    warm_up: float = 0.04  # share of the steps


RECIPES = {
    "scenes-teacher": Recipe(steps=4500, batch=24),
    "scenes-student": Recipe(steps=1050, learning_rate=2e-3),
    "words-teacher": Recipe(steps=3700, learning_rate=1.5e-3),
    "words-student": Recipe(steps=350, learning_rate=3e-3),
}


@dataclass(frozen=True)
class Example:
    """A conversation about one scene; `image` is None in the world of words."""

    turns: Sequence[Turn]
    image: Image.Image | None = None

    def messages(self) -> list[dict]:
        """The conversation as its world writes it."""
        return (words if self.image is None else scenes).messages(self.turns)


def _world(name: str) -> str:
    return name.split("-")[0]


def example(world: str, rng: random.Random, most: int) -> Example:
    """Draw a scene of `world` ("scenes" or "words") with up to `most` questions and a caption."""
    if world == "scenes":
        image, scene = scenes.draw(rng)
        return Example(scenes.turns(scene, rng, most), image)
    telling, scene = words.tell(rng)
    return Example(words.turns(telling, scene, rng, most))


def encode(name: str, processor: Processor, examples: Sequence[Example]) -> BatchEncoding:
    """Tensors for the model called `name`, padded on the right, with `labels` on the answers.

    The labels, (examples, tokens), hold the ids of each answer and of the token that ends it,
    and -100 everywhere else.
    """
    texts = [processor.apply_chat_template(each.messages(), tokenize=False) for each in examples]
    images = [each.image for each in examples if each.image is not None]
    pictures = {"images": images} if images else {}
    batch = processor(text=texts, padding=True, return_tensors="pt", **pictures)
    tokenizer = getattr(processor, "tokenizer", processor)
    start = tokenizer.convert_tokens_to_ids(models.DIALECTS[name].assistant)
    answers = answer_mask(batch["input_ids"], start, tokenizer.eos_token_id)
    batch["labels"] = batch["input_ids"].masked_fill(~answers, IGNORED)
    return batch


def answer_mask(ids: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """True from after each `start` id to its `end` id, inclusive; `ids` is (rows, tokens)."""
    opened = (ids == start).cumsum(1)
    closed = (ids == end).cumsum(1) - (ids == end).long()
    return (opened > closed) & (ids != start)


def train(name: str, recipe: Recipe, seed: int = 0) -> tuple[Processor, PreTrainedModel]:
    """Build the model called `name` and train it from scratch."""
    processor, model = models.build(name, seed)
    rng, world = random.Random(seed + 1), _world(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, recipe))
    bar = tqdm(range(recipe.steps), desc=name, mininterval=2)
    model.train()
    for _ in bar:
        drawn = [example(world, rng, recipe.questions) for _ in range(recipe.batch)]
        loss = model(**encode(name, processor, drawn)).loss  # mean over the answers' tokens
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return processor, model.eval()


def _warm_cosine(step: int, recipe: Recipe) -> float:
    """The learning rate's factor: linear up, then half a cosine down to zero."""
    warm = max(1, round(recipe.steps * recipe.warm_up))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, recipe.steps - warm)))


@torch.no_grad()
def accuracy(
    name: str, processor: Processor, model: PreTrainedModel, n_scenes: int = 500
) -> dict[str, tuple[float, int]]:
    """Greedy exact match on held-out scenes: category -> (share right, number of questions).

    Every question is asked alone, and the category "all" counts all of them. One forward pass
    is enough: greedy decoding gives the answer if and only if each of the answer's tokens is
    the most probable one after those before it.
    """
    rng, right = random.Random(EVAL_SEED), defaultdict(list)
    for _ in tqdm(range(0, n_scenes, 32), desc=f"{name}: accuracy", leave=False):
        asked = [one for _ in range(32) for one in asked_alone(_world(name), rng)]
        batch = encode(name, processor, asked)
        labels, guesses = batch.pop("labels")[:, 1:], model(**batch).logits.argmax(-1)[:, :-1]
        hits = ((guesses == labels) | (labels == IGNORED)).all(1)
        for each, hit in zip(asked, hits.tolist(), strict=True):
            right[each.turns[0].category].append(hit)
            right["all"].append(hit)
    return {category: (sum(hits) / len(hits), len(hits)) for category, hits in right.items()}


def asked_alone(world: str, rng: random.Random, most: int = 3) -> list[Example]:
    """One single-turn example per question about a fresh scene."""
    if world == "scenes":
        image, scene = scenes.draw(rng)
        return [Example([turn], image) for turn in scenes.questions(scene, rng)[:most]]
    telling, scene = words.tell(rng)
    return [Example(words.after(telling, [turn])) for turn in scenes.questions(scene, rng)[:most]]


def train_all(out_dir: Path, names: Sequence[str] = models.NAMES, seed: int = 0) -> dict:
    """Train the models called `names` and save each as a checkpoint folder under `out_dir`.

    Returns name -> category -> (held-out accuracy, number of questions).
    """
    scores = {}
    for name in names:
        processor, model = train(name, RECIPES[name], seed)
        models.save(Path(out_dir) / name, processor, model)
        scores[name] = accuracy(name, processor, model)
    return scores
