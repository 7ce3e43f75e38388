"""scripts/bench_signals.py and scripts/plan_sizes.py, as far as they train and plan nothing."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench_signals  # noqa: E402
import plan_sizes  # noqa: E402

from taid_vlm.commands.recipes import shipped_recipes  # noqa: E402
from taid_vlm.config.recipe import parse_recipe  # noqa: E402


def options(folder: Path, **more: Any) -> Namespace:
    return Namespace(**{
        "teacher": folder / "teacher", "data": folder / "data.jsonl", "characters": 12,
        "columns": ["q", "a"], "folder": folder, "steps": 2, "held_out": 1, "seed": 0,
        "learning_rate": 1e-3, **more})


def test_records_that_fit_are_split_and_too_few_are_refused(tmp_path: Path) -> None:
    rows = [{"q": "x" * n, "a": "y"} for n in (3, 40, 4, 5, 6, 7)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bench_signals._write_records(options(tmp_path))
    sides = [[json.loads(line)["prompt"] for line in
              (tmp_path / f"{name}.jsonl").read_text().splitlines()]
             for name in ("train", "held_out")]
    assert [list(map(len, side)) for side in sides] == [[3, 4, 5, 6], [7]]
    with pytest.raises(SystemExit, match="5 records have at most 12 characters, but 6 are needed"):
        bench_signals._write_records(options(tmp_path, held_out=2))


@pytest.mark.parametrize("name", bench_signals.ARMS)
def test_arms_differ_in_their_signal_alone(name: str, tmp_path: Path) -> None:
    live = bench_signals.recipe(options(tmp_path), "forward_kl", "live")
    tree = bench_signals.recipe(options(tmp_path), "forward_kl", name)
    parse_recipe(tree)
    live["train"]["padding_side"] = bench_signals.ARMS[name].side
    assert {**tree, "output_dir": ""} == {**live, "output_dir": ""}


def test_an_unknown_arm_has_a_nearest_name(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        bench_signals.main(["--teacher", "x", "--data", "x", "--folder", str(tmp_path), "--arms",
                            "topp"])
    assert "Did you mean 'topk'" in capsys.readouterr().err


def test_sizes_of_every_recipe_that_is_planned_are_known() -> None:
    known = {**plan_sizes.QWEN3, **plan_sizes.QWEN3_MOE, **plan_sizes.QWEN25_VL,
             **plan_sizes.QWEN3_VL, **plan_sizes.ONEVISION}
    for shipped, processes, _ in plan_sizes.CASES.values():
        text = shipped_recipes()[shipped].read_text()
        assert processes >= 1
        assert sum(f"/{name}" in text for name in known) >= 2
