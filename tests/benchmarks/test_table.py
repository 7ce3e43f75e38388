"""Figures for the terminal, and `taid-vlm export`."""

import base64
import io
import json

from PIL import Image

from taid_vlm.benchmarks.reading import read_questions
from taid_vlm.benchmarks.registry import find_benchmark
from taid_vlm.benchmarks.table import as_text
from taid_vlm.cli import main
from taid_vlm.config.data import DataSource


def entry(**more):
    return {"rule": "lmms", "rule_version": 2, "parse_failures": 1, "unanswered": {"broken": 2},
            "cut": 4, "seconds": 3.21, "decimals": 1, "figures": {
                "accuracy": {"value": 0.5, "stderr": 0.125, "n": 16},
                "f1": {"value": None, "stderr": None, "n": 16}}, **more}


def test_figures_in_per_cent_points_and_missing():
    points = entry(decimals=None, figures={"total": {"value": 612.5, "stderr": 7.0, "n": 9}})
    text = as_text({"student": {"tasks": {"mmstar": entry(), "mme": points}}})
    lines = [line.split() for line in text.splitlines()]
    assert lines[1] == ["student", "mmstar", "lmms", "2", "accuracy", "50.0", "±", "12.5", "16",
                        "1", "2", "4", "3.2"]
    assert lines[2] == ["f1", "-", "16"]
    assert "612.50 ± 7.00" in text
    assert lines[0][-4:] == ["unread", "unanswered", "cut", "seconds"]
    assert "student, mmstar: unanswered: 2 x broken" in text
    assert "thoughts" not in text


def test_a_guess_is_told():
    text = as_text({"student": {"tasks": {"mmmu": entry(guesses=True)}}})
    assert "student, mmmu: 1 unread answers were guessed at random, as the rule 'lmms' has" in text
    assert "guessed" not in as_text({"student": {"tasks": {"mmmu": entry()}}})


def test_what_was_taken_off_as_thoughts_is_told():
    thoughts = {"rule": "auto", "version": 1, "answers": {"think": 7}, "cut": 2,
                "characters": {"mean": 31.0, "max": 90}, "tokens": {"mean": 9.5, "max": 20}}
    text = as_text({"student": {"tasks": {"mmstar": entry(thoughts=thoughts)}}})
    assert ("student, mmstar: thoughts taken off (auto 1): 7 by think; of 10 tokens on average, at "
            "most 20") in text
    assert "student, mmstar: 2 answers were cut inside their thought: raise --max-new-tok" in text
    text = as_text({"student": {"tasks": {"mmstar": entry(
        thoughts={"rule": "auto", "version": 1, "answers": {}, "cut": 0})}}})
    assert "thought" not in text


def test_averages_of_suites_and_rows_left_out():
    text = as_text({"student": {
        "tasks": {"scienceqa": entry(left_out={"no image": 7})},
        "suites": {"openllm": {"figures": {"average": {"value": 0.31, "stderr": 0.01, "n": 6}}}}}})
    assert ["student", "openllm", "average", "31.0", "±", "1.0", "6"] in [
        line.split() for line in text.splitlines()]
    assert text.endswith("scienceqa: rows left out: 7 with no image")


def test_export_writes_a_table_that_reads_back(tmp_path, capsys):
    picture = io.BytesIO()
    Image.new("RGB", (64, 48), "teal").save(picture, "PNG")
    row = {"question_id": 3, "image": base64.b64encode(picture.getvalue()).decode(),
           "question": "What is it?", "options": ["A cat.", "A dog."], "answer": "1"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["export", f"ai2d={tmp_path}/data.jsonl", "--output-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "ai2d.tsv")
    ai2d = find_benchmark("ai2d")
    first, again = (read_questions(ai2d, DataSource(str(tmp_path / name)))[0]
                    for name in ("data.jsonl", "ai2d.tsv"))
    assert (again.prompt, again.choices, again.answers) == (
        first.prompt, first.choices, first.answers)
    assert again.images[0].load().tobytes() == first.images[0].load().tobytes()
