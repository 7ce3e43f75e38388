"""The page, the model card and the numbers of a comparison."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from compare.made import distillation, evaluation
from PIL import Image

from taid_vlm.cli import main
from taid_vlm.compare import (
    Comparison,
    as_markdown,
    compare_runs,
    comparison_report,
    gallery,
    read_method,
    read_reference,
    write_page,
)
from taid_vlm.compare.curves import capacity_gap, training_curves
from taid_vlm.report import render

HOSTILE = "<b onclick>|"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("runs")
    arguments = []
    for name, gain in (("KD", 0.3), ("TAID", 0.7)):
        runs = [distillation(folder / f"{name}{seed}", gain, seed) for seed in (0, 1)]
        scores = [float((i * 7) % 10 < 10 * gain) for i in range(50)]
        asked = [evaluation(folder / f"{name}e{seed}", scores) for seed in (0, 1)]
        arguments.append(f"{name}={','.join(map(str, [*runs, *asked]))}")
    teacher = evaluation(folder / "teacher", [1.0] * 50)
    base = evaluation(folder / "base", [0.0] * 45 + [1.0] * 5)
    return compare_runs([read_method(a) for a in arguments], read_reference("Teacher", teacher),
                        read_reference("Base", base))


def test_the_page_holds_everything(comparison: Comparison) -> None:
    report = comparison_report(comparison)
    assert [s.title for s in report.sections] == [
        "Benchmarks", "Held-out data", "Training", "Answers", "How this was measured"]
    titles = [table.title for s in report.sections for table in s.tables]
    for title in ("Scores", "Difference from KD", "Gap recovered", "Held-out figures",
                  "Where the probability goes", "Cost", "Answers that could not be read",
                  "KL(teacher ‖ student) by category", "Charts by kind"):
        assert title in titles
    curves = [curve.title for s in report.sections for curve in s.curves]
    assert {"Head and tail", "Calibration", "Interpolation t", "KL in training"} <= set(curves)


def test_questions_of_several_files_are_named_without_their_folders(tmp_path: Path) -> None:
    scores = [float(i % 3 == 0) for i in range(12)]
    source = {"path": ["/home/me/a.parquet", "rel/b.parquet"], "split": "train", "sha256": None}
    folders = [evaluation(tmp_path / name, scores, tasks__charts__source=source)
               for name in ("KD", "TAID")]
    compared = compare_runs([read_method(f"{folder.name}={folder}") for folder in folders])
    page = render(comparison_report(compared))
    assert "12 questions (a.parquet, rel/b.parquet)" in page and "/home/me" not in page


def test_the_page_is_self_contained_and_needs_no_script(comparison: Comparison) -> None:
    html = render(comparison_report(comparison))
    assert "http://" not in html
    assert "https://" not in html
    assert html.count("<script") == 1
    before = html[: html.index("<script>")]
    assert "TAID wins" in before
    assert before.count("data-sortable") == len(re.findall(r"<table", before)) > 5
    assert "▲" in before
    assert re.search(r'data-sort="-?\d', before)
    assert "NaN" not in before


def test_names_are_text(tmp_path: Path) -> None:
    made = [str(distillation(tmp_path / name, gain)) for name, gain in (("a", 0.4), ("b", 0.6))]
    found = compare_runs([read_method(f"{HOSTILE}={made[0]}"), read_method(f"B={made[1]}")])
    assert "<b onclick" not in render(comparison_report(found))
    assert r"| <b onclick>\| |" in as_markdown(found)
    for table in tables_of(as_markdown(found)):
        assert len({len(re.split(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def tables_of(markdown: str) -> list[str]:
    found = re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE)
    assert len(found) > 2
    return found


def test_the_card_says_what_how_and_with_what(comparison: Comparison) -> None:
    text = as_markdown(comparison)
    for part in ("### Benchmarks", "### Held-out figures", "### Difference from KD", "### Cost",
                 "How this was measured", "rule official, version 1", f"sha256 {'e' * 16}",
                 "Student's t with as many degrees", "torch 2.15", "recipe abcd", "(2 seeds)"):
        assert part in text, part
    for table in tables_of(text):
        widths = {line.count("|") for line in table.splitlines()}
        assert len(widths) == 1


def test_disagreements_first_and_the_rule_decides(comparison: Comparison) -> None:
    cards = gallery.benchmark_examples(
        "charts", "Charts", [*comparison.references, *comparison.methods])
    assert len(cards) == gallery.SHOWN
    divided = [card.scores["KD"] != card.scores["TAID"] for card in cards]
    assert divided == sorted(divided, reverse=True)
    assert cards[0].prompt.startswith("how ")
    assert cards[0].image is None  # the data are not there
    html = render(comparison_report(comparison))
    assert "the benchmark's own verdicts" in html.replace("&#39;", "'")


def test_images_come_from_the_data_if_they_are_the_same(tmp_path: Path) -> None:
    from taid_vlm.benchmarks.store import data_hash

    Image.new("RGB", (8, 8), "red").save(tmp_path / "dot.png")
    rows = [{"id": str(i), "question": f"how {i}?", "answer": "yes", "image": "dot.png"}
            for i in range(5)]
    data = tmp_path / "charts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "charts.yaml").write_text("type: yes_no\ndata: charts.jsonl\n")
    source = {"path": str(data), "split": "train", "max_records": None, "sha256": data_hash(data)}
    entry: dict[str, Any] = {"source": source, "benchmark": str(tmp_path / "charts.yaml")}
    found = gallery.benchmark_images(entry)
    assert sorted(found) == list("01234")
    assert gallery.thumbnail(found["0"][0].load()).startswith(b"\x89PNG")
    assert gallery.benchmark_images({**entry, "benchmark": "no such thing"}) == {}
    data.write_text(data.read_text() + "\n")
    assert gallery.benchmark_images(entry) == {}


def test_large_images_are_made_small() -> None:
    found = gallery.thumbnail(Image.effect_noise((900, 600), 80).convert("RGB"))
    assert found.startswith(b"\xff\xd8")
    assert len(found) < 60_000


def test_curves_are_means_at_common_steps(comparison: Comparison) -> None:
    loss = next(c for c in training_curves(comparison.methods) if c.title == "KL in training")
    assert loss.series["KD"] == [(50, 0.5), (100, 0.5)]
    assert "Means over seeds." in loss.caption


def test_the_capacity_gap_needs_two_teachers(tmp_path: Path, comparison: Comparison) -> None:
    assert capacity_gap(comparison) is None
    made = [distillation(tmp_path / name, 0.5, models__teacher__parameters=size,
                         models__teacher__name=name) for name, size in
            (("s", 2_000_000), ("l", 9_000_000))]
    found = capacity_gap(compare_runs([read_method(str(f)) for f in made]))
    assert found is not None
    assert [x for x, _ in found.series["taid"]] == [2.0, 9.0]


# ----- the command --------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    return [str(distillation(tmp_path / name, gain)) for name, gain in (("a", 0.4), ("b", 0.6))]


def test_the_command(two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, card = tmp_path / "new" / "page.html", tmp_path / "card.md"
    assert main(["compare", *two, "--html", str(page), "--markdown", str(card)]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == card.read_text().strip()
    assert "This student against that student, one of each method: b is significantly" in printed
    assert "**Bold**" not in printed
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert main(["compare", *two, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["held_out"]["kl"]["of_students"] == {"b": "best"}
    assert found["held_out"]["kl"]["verdicts"] == {}
    difference = found["held_out"]["kl"]["against_baseline"]["b"]
    assert difference["low"] < difference["difference"] < difference["high"] < 0
    assert difference["test"] == "paired t"


def test_mistakes_write_nothing(
    two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert main(["compare", two[0], str(tmp_path / "no"), "--html", str(page)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not page.exists()
    (tmp_path / "file").touch()
    assert main(["compare", *two, "--html", str(tmp_path / "file" / "page.html")]) == 2
    assert "could not be written" in capsys.readouterr().err


def test_a_run_without_held_out_data(tmp_path: Path) -> None:
    made = [distillation(tmp_path / name, eval={"before": None, "after": None},
                         data={"eval": None}, examples=[]) for name in "ab"]
    for folder in made:
        (folder / "eval_answers.jsonl").unlink()
    found = compare_runs([read_method(str(f)) for f in made])
    assert not found.held_out
    write_page(found, tmp_path / "page.html")
    assert "no figure in common" in (tmp_path / "page.html").read_text()
