"""`train.tokens_per_batch` and `train.packing` in recipes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli.recipes import Checkpoints, Outcome, write_recipe
from cli.test_cache import built, cached, carried_out, difference, tree

Cli = Callable[..., Outcome]


def by_tokens(folder: Path, checkpoints: Checkpoints, **train: Any) -> dict[str, Any]:
    recipe = tree(folder, checkpoints, "b", tokens_per_batch=300, **train)
    del recipe["train"]["per_device_train_batch_size"]
    return recipe


def test_a_cached_teacher_gives_what_a_live_one_does(
    tmp_path: Path, cli: Cli, checkpoints: Checkpoints
) -> None:
    """Of records with images, every one twice; the teacher in memory is packed, too."""
    live = by_tokens(tmp_path, checkpoints, packing=True, optim="sgd", learning_rate=0.1)
    folder = built(cli, tmp_path, live)
    first = carried_out(cli, tmp_path, live)
    second = carried_out(cli, tmp_path, cached(live, folder))
    assert difference(first, second) < 1e-5
    assert first["weights"].keys() == second["weights"].keys()


def test_a_step_is_said_in_tokens(
    tmp_path: Path, cli: Cli, checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = by_tokens(tmp_path, checkpoints, max_steps=1, gradient_accumulation_steps=2)
    assert cli("distill", write_recipe(tmp_path, recipe)).status == 0
    assert "steps     1 of 2 x 300 tokens at most each" in caplog.messages


@pytest.mark.parametrize(("change", "told"), [
    ({"per_device_train_batch_size": 8}, "train.per_device_train_batch_size = 8 has no effect"),
    ({"packing": "row"}, "train.packing"),
    ({"tokens_per_batch": 3}, "train.tokens_per_batch = 3"),
])
def test_what_cannot_be_is_told_in_a_line(
    change: dict[str, Any], told: str, tmp_path: Path, cli: Cli, checkpoints: Checkpoints
) -> None:
    recipe = by_tokens(tmp_path, checkpoints)
    recipe["train"] |= change
    done = cli("distill", write_recipe(tmp_path, recipe))
    assert done.status == 2
    assert len(done.errors) == 1 and told in done.errors[0], done.err


def test_a_model_that_mixes_records_is_refused_before_its_weights(
    tmp_path: Path, cli: Cli, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = by_tokens(tmp_path, checkpoints, packing=True)
    recipe["teacher"] = {"model_name_or_path": checkpoints("gemma3")}
    path = write_recipe(tmp_path, recipe)
    monkeypatch.setattr("taid_vlm.models.loading.load_model", None)
    done = cli("distill", path)
    assert done.status == 2
    assert len(done.errors) == 1, done.err
    assert "train.packing: the teacher (gemma3) cannot have several records" in done.errors[0]
    assert "train.tokens_per_batch alone" in done.err
