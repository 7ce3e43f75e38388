"""The command itself at tiny sizes: what it writes, what it refuses, and that it repeats."""

from __future__ import annotations

import html
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from miniature import command, pairs
from miniature.parts import PARTS

ROOT = Path(__file__).parents[2]
TINY = ["--seeds", "2", "--steps", "4", "--workers", "0"]
EXACT = [*TINY, "--parts", "gap,theory,sweeps,since,cut,exposure"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    output = tmp_path_factory.mktemp("miniature")
    return command.main([*EXACT, "--output-dir", str(output)]), output


def test_results_page_and_table_are_there_and_say_the_same(written):
    document, output = written
    assert {p.name for p in output.iterdir()} == {"results.json", "report.html", "table.md"}
    kept = json.loads((output / "results.json").read_text())
    assert kept["claims"] == json.loads(json.dumps(document["claims"]))
    assert list(kept["parts"]) == ["language", "gap", "theory", "sweeps", "since", "cut",
                                   "exposure"]
    assert {"versions", "machine", "seconds", "cpu_seconds", "command", "scale"} <= set(kept)
    page = html.unescape((output / "report.html").read_text())
    table = (output / "table.md").read_text()
    for claim in kept["claims"]:
        assert claim["claim"] in page
        line = f"| {claim['claim'].rstrip('.')} | {claim['part']} | {claim['verdict']} |"
        assert (line in table) == claim["in_the_paper"]
    taid = kept["parts"]["language"]["methods"]["TAID"]["intervals"]["jeffreys"]
    assert f"| {taid['value']:.3f} ± {taid['stderr']:.3f} |" in table and taid["n"] == 2


def test_two_runs_give_the_same_figures(written, tmp_path):
    document, _ = written
    again = command.main([*TINY, "--parts", "language", "--output-dir", str(tmp_path)])
    assert again["parts"]["language"] == document["parts"]["language"]


def test_the_command_runs_in_processes_of_its_own(written, tmp_path):
    document, _ = written
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "miniature.py"), "--parts", "language", *TINY,
         "--workers", "1", "--output-dir", str(tmp_path)], capture_output=True, text=True,
        timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    kept = json.loads((tmp_path / "results.json").read_text())
    want = json.loads(json.dumps(document["parts"]["language"]))
    assert kept["parts"]["language"] == want
    assert "TAID beats forward KL" in done.stdout and "report.html" in done.stdout


def test_small_models_go_through_recipes_and_are_pooled(tmp_path, monkeypatch):
    """One arm more than the start in each world; the others are the same code."""
    monkeypatch.setattr(pairs, "SCENES", {"TAID": {"name": "taid"}})
    monkeypatch.setattr(pairs, "TEXT", {"TAID": {"name": "taid"}})
    monkeypatch.setattr("miniature.parts.SCRATCH", ("KL", "TAID"))
    document = command.main([*TINY, "--parts", "scenes,pretrain", "--model-seeds", "2",
                             "--model-steps", "2", "--records", "6", "--output-dir",
                             str(tmp_path)])
    scenes, text = document["parts"]["scenes"], document["parts"]["pretrain"]["text"]
    for world, key in ((scenes, "scenes"), (text, "text")):
        assert world["TAID"]["pooled"]["kl"]["seeds"] == 2
        assert world["TAID"]["pooled"]["kl"]["records"] == 6
        assert len({one["recipe_hash"] for one in world["TAID"]["seeds"]}) == 2
        assert (tmp_path / ("" if key == "scenes" else "pretrain") / "seed-1" / key / "TAID"
                / "recipe.yaml").exists()
    assert 0 < scenes["TAID"]["pooled"]["accuracy"]["value"] < 1
    assert scenes["Teacher"]["pooled"]["caption_kl"]["value"] < scenes["Warm start"]["pooled"][
        "caption_kl"]["value"]
    starts = [one["figures"]["nll"] for one in text["Warm start"]["seeds"]]
    assert starts[0] != starts[1]  # another draw of random weights for every seed
    assert {c["part"] for c in document["claims"]} == {
        "instruction, scenes", "pre-training, plain text", "pre-training, exact language"}


def test_a_plain_text_is_the_telling_and_the_retelling():
    row = {"messages": [
        {"role": "user", "content": "a red cross at the top. how many?"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "describe it."},
        {"role": "assistant", "content": "it shows a red cross"}],
        "categories": ["count", "caption"]}
    assert pairs.plain_text(row) == "a red cross at the top. it shows a red cross."


@pytest.mark.parametrize(("arguments", "message"), [
    (["--parts", "language,swepes"], "--parts 'swepes'. Did you mean 'sweeps'"),
    (["--seeds", "1"], "--seeds 1, but it must be at least 2 (an interval over seeds needs two)."),
    (["--model-seeds", "0"], "--model-seeds 0, but it must be at least 2"),
    (["--steps", "0"], "--steps 0, but it must be at least 1."),
    (["--workers", "-1"], "--workers -1, but it must be at least 0."),
])
def test_mistakes_are_refused_before_anything_is_measured(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main([*arguments, "--output-dir", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_part_can_be_asked_for_and_brings_what_it_needs():
    parser = command.make_parser()
    for part in PARTS:
        plan = command.make_plan(parser.parse_args(["--parts", part]))
        assert set(plan.parts) == {part} | (
            {"language"} if part in ("gap", "sweeps", "since", "cut") else set())
    resized = command.make_plan(parser.parse_args(["--steps", "40", "--model-steps", "7"])).scale
    assert (resized.exact.steps, resized.exact.warm_steps, resized.exact.teacher_steps) == (
        40, 12, 60)
    assert resized.models.steps == 7
