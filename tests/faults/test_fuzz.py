"""Inputs broken at random: every command ends in success or in one message, never in a traceback,
and soon. The seed is printed; TAID_VLM_FAULTS_SEED chooses another, TAID_VLM_FAULTS_INPUTS more.
"""

from __future__ import annotations

import copy
import io
import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli.recipes import Outcome
from cli.test_distill import minimal
from faults.test_kills import SEED
from PIL import Image

Cli = Callable[..., Outcome]
INPUTS = int(os.environ.get("TAID_VLM_FAULTS_INPUTS", "60"))
LONGEST = 20.0  # seconds of one command
VALUES: tuple[Any, ...] = (
    None, "", "x", "../..", "\x00", "é" * 300, -1, 0, 1e400, 3.5, True, [], {}, [[]],
    {"a": {"b": []}}, "taid", ["taid", 3], "1e-3", 2**70)


def paths_of(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) \
        if isinstance(tree, list) else ()
    for key, value in items:
        yield from paths_of(value, (*path, key))


def changed(rng: random.Random, tree: Any) -> Any:
    """One place of a tree with another value, without its key, or with a key too many."""
    tree = copy.deepcopy(tree)
    *parents, last = rng.choice([path for path in paths_of(tree) if path])
    place = tree
    for key in parents:
        place = place[key]
    what = rng.randrange(3)
    if what == 0:
        place[last] = rng.choice(VALUES)
    elif what == 1:
        del place[last]
    elif isinstance(place, dict):
        place[rng.choice(("extra", "path", "name", "role", str(last) + "s"))] = rng.choice(VALUES)
    return tree


def flipped(rng: random.Random, data: bytes) -> bytes:
    """Bytes changed, cut off, or put in."""
    array = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(array)) if array else 0
        what = rng.randrange(3)
        if what == 0 and array:
            array[at] = rng.randrange(256)
        elif what == 1:
            del array[at:]
        else:
            array[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 8)))
    return bytes(array)


class World:
    """A recipe with its data and models, whole; `broken` breaks one thing of it."""

    def __init__(self, folder: Path, checkpoints: Any) -> None:
        self.folder = folder
        self.tree = minimal(folder, checkpoints, "image paths", {"max_steps": 1})
        self.models = {role: Path(self.tree[role]["model_name_or_path"])
                       for role in ("teacher", "student")}

    def broken(self, rng: random.Random) -> tuple[str, Path]:
        kind = rng.choice(("recipe", "recipe bytes", "records", "record bytes", "image", "model"))
        tree = copy.deepcopy(self.tree)
        data = Path(tree["data"]["train"] if isinstance(tree["data"]["train"], str)
                    else tree["data"]["train"]["path"])
        fresh = self.folder / "broken"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        lines = data.read_text(encoding="utf-8").splitlines()
        if kind == "recipe":
            tree = changed(rng, tree)
        elif kind == "records":
            at = rng.randrange(len(lines))
            lines[at] = json.dumps(changed(rng, json.loads(lines[at])))
        elif kind == "image":
            picture = fresh / f"odd.{rng.choice(('png', 'jpg', 'gif', 'bmp', 'webp', 'tiff'))}"
            buffer = io.BytesIO()
            shape = "JPEG" if picture.suffix == ".jpg" else picture.suffix[1:].upper()
            Image.effect_noise((24, 24), 60).convert("RGB").save(buffer, shape)
            picture.write_bytes(flipped(rng, buffer.getvalue()))
            lines[0] = json.dumps({"prompt": "<image>what", "completion": "red",
                                   "image": str(picture)})
        elif kind == "model":
            role = rng.choice(("teacher", "student"))
            shutil.copytree(self.models[role], fresh / role)
            file = rng.choice([path for path in sorted((fresh / role).iterdir())
                               if path.is_file()])
            if file.suffix == ".json" and rng.random() < 0.5:
                file.write_text(json.dumps(changed(rng, json.loads(file.read_text()))))
            else:
                file.write_bytes(flipped(rng, file.read_bytes()))
            tree[role]["model_name_or_path"] = str(fresh / role)
            kind = f"model: {role}/{file.name}"
        if kind in ("records", "image", "record bytes"):
            text = "\n".join(lines).encode()
            # beside the whole data, from where images are named
            target = data.with_name("broken.jsonl")
            target.write_bytes(flipped(rng, text) if kind == "record bytes" else text)
            tree["data"] = {**tree["data"], "train": str(target)}
        recipe = fresh / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
        if kind == "recipe bytes":
            recipe.write_bytes(flipped(rng, recipe.read_bytes()))
        return kind, recipe


@pytest.mark.faults
def test_broken_inputs_end_in_success_or_one_message(
    tmp_path: Path, checkpoints: Any, cli: Cli
) -> None:
    print(f"TAID_VLM_FAULTS_SEED={SEED}")
    world, rng, failures = World(tmp_path, checkpoints), random.Random(SEED), list[Any]()
    outcomes = Counter[int]()
    for number in range(INPUTS):
        kind, recipe = world.broken(rng)
        words = ("inspect", recipe, "--all") if number % 3 else ("distill", recipe, "--overwrite")
        started = time.perf_counter()
        try:
            done = cli(*words)
        except Exception as error:
            failures.append((number, kind, f"{type(error).__name__}: {error}"[:300]))
            continue
        took = time.perf_counter() - started
        errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
        if done.status not in (0, 2) or (done.status == 2 and len(errors) != 1) or took > LONGEST:
            failures.append((number, kind, done.status, round(took, 1), done.err[-300:]))
        outcomes[done.status] += 1
    print(f"ended in success: {outcomes[0]}, in one message: {outcomes[2]}")
    assert outcomes[0]
    assert outcomes[2]
    assert not failures, f"seed {SEED}:\n" + "\n".join(map(str, failures))
