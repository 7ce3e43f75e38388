"""A small vision tower that learns what drawings show, as towers come pretrained in practice.

Every patch is asked what is drawn there (colour, shape, size, letter, height of a bar), and the
picture as a whole which icon it is. No language model is part of it, so a step takes milliseconds.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from real_vlm.data import SIDE, Icon, scenes
from taid_vlm.io.files import whole_file
from taid_vlm.io.folders import whole_or_absent

PATCH = 16
GRID = SIDE // PATCH
# A shape's cell and the patches it lies in, in one direction: the middle one is between two.
PATCHES = ((0,), (1, 2), (3,))
LABELS = {"color": 1 + len(scenes.COLORS), "shape": 1 + len(scenes.SHAPES),
          "size": 1 + len(scenes.SIZES), "letter": 27, "height": 6}  # 0: nothing of the kind
IGNORED = -100
ICON_SHARE = 0.3  # of the pictures, where there are icons
SAVE_SECONDS = 60
POSITION_STD = 0.5  # the family's own leaves small towers blind to where things are


@dataclass(frozen=True)
class TowerPlan:
    """How large it is, and how long it learns."""

    steps: int
    width: int = 192
    layers: int = 6
    batch: int = 64
    learning_rate: float = 1e-3
    warm_up: float = 0.05
    seed: int = 0


class Pretraining(nn.Module):
    """The tower, and linear readings of its patches and of their mean."""

    def __init__(self, plan: TowerPlan, icons: int) -> None:
        super().__init__()
        self.tower = SiglipVisionModel(SiglipVisionConfig(
            hidden_size=plan.width, intermediate_size=4 * plan.width,
            num_hidden_layers=plan.layers, num_attention_heads=max(1, plan.width // 64),
            image_size=SIDE, patch_size=PATCH, vision_use_head=False))
        positions = next(module for name, module in self.tower.named_modules()
                         if name.endswith("position_embedding"))
        nn.init.normal_(positions.weight, std=POSITION_STD)
        self.patches = nn.Linear(plan.width, sum(LABELS.values()))
        self.icons = nn.Linear(plan.width, max(1, icons))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 3, side, side] -> [N, patches, labels of all kinds], [N, icons]."""
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states[-1]
        return self.patches(hidden), self.icons(hidden.mean(1))


# ----- pictures and what is known of them ---------------------------------------------------


def labels_of(scene: scenes.Scene, image: Image.Image) -> np.ndarray:
    """[GRID, GRID, kinds]: what is drawn in every patch."""
    labels = np.zeros((GRID, GRID, len(LABELS)), np.int64)
    colors, shapes, sizes = list(scenes.COLORS), scenes.SHAPES, list(scenes.SIZES)
    pixels = np.asarray(image, np.int64)
    if scene.kind is scenes.Shape:
        for thing in scene.things:
            place = np.ix_(PATCHES[thing.cell // 3], PATCHES[thing.cell % 3])
            labels[place] = (1 + colors.index(thing.color), 1 + shapes.index(thing.shape),
                             1 + sizes.index(thing.size), 0, 0)
    elif scene.kind is scenes.Word:
        (word,) = scene.things
        rows, columns = np.nonzero(abs(pixels - pixels[-1, -1]).sum(-1) > 60)
        row, column = rows.min() // PATCH, columns.min() // PATCH
        for index, letter in enumerate(word.text):
            labels[row, column + index] = (1 + colors.index(word.color), 0, 0,
                                           1 + ord(letter) - ord("a"), 0)
    else:
        foot = pixels[-1, PATCH // 2::PATCH]
        slots = np.nonzero(abs(foot - pixels[0, 0]).sum(-1) > 60)[0]
        for slot, bar in zip(slots, scene.things, strict=True):
            labels[:, slot] = (1 + colors.index(bar.color), 0, 0, 0, bar.height)
    return labels


@dataclass(frozen=True)
class Pictures:
    """pixels: [N, 3, side, side] in -1 to 1. patches: [N, patches, kinds]. icons: [N]."""

    pixels: Tensor
    patches: Tensor
    icons: Tensor


def draw(icons: Sequence[Icon], number: int, rng: random.Random) -> Pictures:
    """Pictures that nobody has seen before."""
    images, patches, numbers = [], [], []
    unknown = np.full((GRID, GRID, len(LABELS)), IGNORED)
    for _ in range(number):
        if icons and rng.random() < ICON_SHARE:
            numbers.append(rng.randrange(len(icons)))
            images.append(icons[numbers[-1]].drawn(rng))
            patches.append(unknown)
        else:
            image, scene = scenes.draw(rng)
            images.append(image)
            patches.append(labels_of(scene, image))
            numbers.append(IGNORED)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return Pictures(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1,
                    torch.from_numpy(np.stack(patches)).flatten(1, 2), torch.tensor(numbers))


def loss_of(model: Pretraining, pictures: Pictures) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        patches, icons = model(pictures.pixels)
    loss = torch.zeros(())
    for index, logits in enumerate(patches.float().split(list(LABELS.values()), -1)):
        loss = loss + _cross_entropy(logits.flatten(0, 1), pictures.patches[..., index].flatten())
    return loss + _cross_entropy(icons.float(), pictures.icons)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    if not (labels != IGNORED).any():
        return torch.zeros(())
    return nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED)


@torch.no_grad()
def accuracy(model: Pretraining, icons: Sequence[Icon], number: int = 256) -> dict[str, float]:
    """Shares right on pictures not learned from: of every kind of label, where there is something,
    and of icons."""
    pictures = draw(icons, number, random.Random("held out"))
    model.eval()
    patches, named = model(pictures.pixels)
    shares = {}
    for index, (kind, logits) in enumerate(zip(
            LABELS, patches.split(list(LABELS.values()), -1), strict=True)):
        labels = pictures.patches[..., index]
        shares[kind] = float((logits.argmax(-1) == labels)[labels > 0].float().mean())
    if icons:
        known = pictures.icons != IGNORED
        shares["icon"] = float((named.argmax(-1) == pictures.icons)[known].float().mean())
    return shares


# ----- training -----------------------------------------------------------------------------


def train_tower(
    plan: TowerPlan, icons: Sequence[Icon], folder: Path, say: Callable[[int, int, float], None]
) -> None:
    """Train it and write it to `folder` as `SiglipVisionModel` with its image processor.

    What is drawn at a step follows from its number, so a run that goes on from `folder`.state.* is
    the run that was never stopped.

    Args:
        say: is told the step, of how many, and the loss.
    """
    torch.manual_seed(plan.seed)
    model = Pretraining(plan, len(icons)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, weight_decay=0.01,
                                  betas=(0.9, 0.98))
    state = folder.with_suffix(".state.safetensors")
    first = _load_state(state, model, optimizer)
    saved = time.monotonic()
    for step in range(first, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * factor(step, plan.steps, plan.warm_up)
        pictures = draw(icons, plan.batch, random.Random(f"{plan.seed} {step}"))
        loss = loss_of(model, pictures)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        say(step + 1, plan.steps, float(loss.detach()))
        if time.monotonic() - saved > SAVE_SECONDS:
            _save_state(state, model, optimizer, step + 1)
            saved = time.monotonic()
    _write(model, icons, folder)
    state.unlink(missing_ok=True)


def factor(step: int, steps: int, warm_up: float) -> float:
    """The learning rate's: linear up, then half a cosine down."""
    warm = max(1, round(steps * warm_up))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _write(model: Pretraining, icons: Sequence[Icon], folder: Path) -> None:
    shares = accuracy(model, icons)
    with whole_or_absent(folder, "the tower could not be written to '{}'") as partial:
        model.tower.save_pretrained(partial)
        SiglipImageProcessor(size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3,
                             image_std=[0.5] * 3).save_pretrained(partial)
        (partial / "accuracy.json").write_text(json.dumps(shares, indent=1))


def _save_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
    with whole_file(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial,
                  {"step": str(step)})


def _load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The step to go on with; 0 where nothing was saved."""
    if not path.exists():
        return 0
    tensors = load_file(path)
    model.load_state_dict({name.removeprefix("model."): tensor
                           for name, tensor in tensors.items() if name.startswith("model.")})
    moments: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, moment = name.split(".")
            moments.setdefault(int(index), {})[moment] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])
