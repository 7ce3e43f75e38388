"""scripts/real_pairs.py from its records to its table, with tiny models in this process."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo.families import build, save

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from real_pairs import command, data, page, plan, results, work  # noqa: E402

from taid_vlm.config.recipe import parse_recipe  # noqa: E402
from taid_vlm.errors import TaidError  # noqa: E402
from taid_vlm.evaluation.statistics import Pooled  # noqa: E402
from taid_vlm.io.files import read_json  # noqa: E402


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Data in the forms of the real files."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for part, answers in (("train", range(16)), ("test", range(50, 56))):
        rows = [{"question": f"what is {n} of it", "answer": f"it is <<1*{n}={n}>>{n}"}
                for n in answers]
        (folder / f"gsm8k_{part}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    speeches = [f"KING:\nthere is one red house {n}" for n in range(60)]
    (folder / "tinyshakespeare.txt").write_text("\n\n".join(speeches))
    (folder / "mt_bench_questions.jsonl").write_text("".join(
        json.dumps({"turns": [f"say {n}", "again"]}) + "\n" for n in range(4)))
    return folder


SMALL = ["--steps", "4", "--seeds", "2", "--pool", "8", "--validation", "2", "--test", "3",
         "--elsewhere", "2", "--characters", "80", "--no-bf16"]


@pytest.fixture
def started(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a run of few arms, which happen in this process."""
    torch.manual_seed(0)
    small = build("llama")
    config = type(small.model.config)(**{**small.model.config.to_dict(), "num_hidden_layers": 4})
    save(replace(small, model=type(small.model)(config)), tmp_path / "teacher")
    monkeypatch.setattr(work, "fresh", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(plan, "RATES", (1e-3,))
    main = replace(plan.BLOCKS["main"], methods=("kl", "sft"))
    monkeypatch.setitem(plan.BLOCKS, "main", main)
    return ["--teacher", str(tmp_path / "teacher"), "--data", str(texts), "--folder",
            str(tmp_path / "runs"), "--output", str(tmp_path / "table"), *SMALL]


def test_it_breaks_off_goes_on_and_makes_the_table(
    started: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any,
) -> None:
    carried_out: list[str] = []

    def one(options: Namespace, arm: plan.Arm, rate: float) -> dict[str, Any]:
        if len(carried_out) == 4:
            raise KeyboardInterrupt
        carried_out.append(arm.name)
        return work.carry_out(options, arm, rate)

    run = [*started, "--blocks", "main,again"]
    monkeypatch.setattr(command, "carry_out", one)
    with pytest.raises(KeyboardInterrupt):
        command.main("Trials.", run)
    assert carried_out == ["half/kl/1/rate-0.001", "half/kl/4/seed-0", "half/kl/4/seed-1",
                           "half/sft/1/rate-0.001"]
    table = (tmp_path / "table.md").read_text()
    assert "| KL | 0.001 |" in table and "| SFT | 0.001 |" not in table
    assert "- The objectives: 2 of 6 arms" in table and "- One arm once more: 1 of 2" in table

    carried_out[:] = ["before"]
    monkeypatch.setattr(command, "carry_out", lambda *arguments: (
        carried_out.append(arguments[1].name), work.carry_out(*arguments))[1])
    assert command.main("Trials.", run) == 0
    assert carried_out[1:] == ["half/sft/4/seed-0", "half/sft/4/seed-1", "half/kl/4/seed-0-again"]
    found = read_json(tmp_path / "table.json", "results")
    assert found["open"] == [] and set(found["again"]["figures"].values()) == {0.0}
    sft = found["blocks"]["main"]["methods"]["sft"]
    values = [read_json(tmp_path / f"runs/arms/half/{method}/4/seed-{seed}.json", "an arm")[
        "held_out"]["by_category"]["gsm8k"]["kl"] for method in ("sft", "kl") for seed in (0, 1)]
    mean = (values[0] + values[1]) / 2
    assert sft["figures"]["gsm8k"]["kl"]["value"] == pytest.approx(mean)
    assert sft["against"]["kl"]["gsm8k"]["kl"]["value"] == pytest.approx(
        mean - (values[2] + values[3]) / 2)
    assert values[0] != values[1], "a seed is the order of the records"
    assert not list((tmp_path / "runs" / "running").rglob("*.safetensors"))
    table = (tmp_path / "table.md").read_text()
    assert "Less KL (gsm8k's answers):" in table and "## Not run" not in table
    (tmp_path / "table.md").unlink()
    assert command.main("Trials.", [*run, "--table"]) == 0
    written = (tmp_path / "table.md").read_text()
    assert written == table
    assert command.main("Trials.", [*run, "--steps", "3"]) == 2
    assert "holds arms with --steps 4, not 3" in capsys.readouterr().err


def test_no_record_is_in_two_splits(texts: Path, tmp_path: Path) -> None:
    sizes = data.Sizes(pool=8, validation=4, test=3, elsewhere=2, characters=80)
    data.write_splits(texts, tmp_path, sizes)
    splits = {path.relative_to(tmp_path).as_posix(): path.read_text().splitlines()
              for path in tmp_path.rglob("*.jsonl") if "texts" not in path.parts}
    assert {name: len(rows) for name, rows in splits.items()} == {
        "gsm8k/train.jsonl": 8, "gsm8k/validation.jsonl": 4, "text/train.jsonl": 8,
        "text/validation.jsonl": 4, "test.jsonl": 7}
    rows = [row for lines in splits.values() for row in lines]
    assert len(set(rows)) == len(rows)
    assert not any("<<" in row for row in rows)
    with pytest.raises(TaidError, match="30 records of gsm8k are needed, but 16 are short enough"):
        data.write_splits(texts, tmp_path, replace(sizes, pool=26))


@pytest.mark.parametrize(("more", "message"), [
    (["--blocks", "man"], "Did you mean 'main'"),
    (["--seeds", "1"], "an interval over seeds needs at least 2"),
    (["--pool", "7"], "--pool 7, but 4 steps of 2 see 8 records"),
    (["--teacher", "none"], "--teacher = 'none' is no model's folder"),
    (["--data", "none"], "--data = 'none' is no folder"),
])
def test_what_cannot_work_is_refused_first(
    more: list[str], message: str, started: list[str], tmp_path: Path, capsys: Any,
) -> None:
    with pytest.raises(SystemExit) as end:
        command.main("Trials.", [*started, *more])
    assert end.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_table_of_nothing_is_refused(started: list[str], capsys: Any) -> None:
    assert command.main("Trials.", [*started, "--table"]) == 2
    assert "holds no arms yet" in capsys.readouterr().err


def test_every_arm_is_an_ordinary_recipe_and_methods_differ_in_theirs_alone(
    started: list[str]
) -> None:
    options = command.make_parser("Trials.").parse_args(started)
    arms = list(plan.all_arms(list(plan.BLOCKS), 300, 3))
    assert len(arms) == len({arm.name for arm in arms})
    kl = work.recipe(options, plan.Arm("half", "kl", 300, 0), Path("student"), 1e-3)
    for arm in arms:
        tree = work.recipe(options, replace(arm, seed=0), Path("student"), 1e-3)
        parse_recipe(tree)
        if (arm.pair, arm.steps) == ("half", 300):
            assert {**tree, "objective": "", "output_dir": ""} == {
                **kl, "objective": "", "output_dir": ""}
    names = [arm.name for arm in arms]
    for arm in arms:  # a rate is chosen before it is needed
        for tuning in plan.tuning_arms(arm.pair, arm.method, 300):
            assert names.index(tuning.name) <= names.index(arm.name)


@pytest.mark.parametrize(("figure", "low", "high", "word"), [
    ("kl", 0.1, 0.2, "**loses**"), ("kl", -0.2, -0.1, "**wins**"), ("kl", -0.1, 0.1, "ties"),
    ("agreement", 0.1, 0.2, "**wins**"), ("agreement", -0.2, -0.1, "**loses**"),
])
def test_who_wins(figure: str, low: float, high: float, word: str) -> None:
    assert page.verdict({"low": low, "high": high}, figure) == word


def test_errors_of_seeds_and_of_records_have_their_own_students_t() -> None:
    found = results.described(Pooled(1.0, 0.1, 0.2, 31, 3))
    half = ((0.1 * 4.3027) ** 2 + (0.2 * 2.0423) ** 2) ** 0.5
    assert found["high"] - 1 == pytest.approx(half, rel=1e-4)
    assert found["low"] == pytest.approx(2 - found["high"])


def test_only_common_records_with_a_figure_count() -> None:
    records = [{"category": "gsm8k", "tokens": 4, "counts": {"kl": 2}, "kl": 1.0},
               {"category": "gsm8k", "tokens": 3, "counts": {}},
               {"category": "text", "tokens": 5, "counts": {}, "kl": 2.0}]
    assert results.sums({"records": records}, "gsm8k", "kl") == {"0": (1.0, 2)}
