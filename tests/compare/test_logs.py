"""Logs of lm-eval, lmms-eval and VLMEvalKit, in the shapes that these write, compared in pairs."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from taid_vlm.benchmarks.harness import vlmevalkit_logs
from taid_vlm.cli import main
from taid_vlm.compare import Comparison, as_markdown, compare_runs, comparison_report, read_method
from taid_vlm.compare.folders import read_folder
from taid_vlm.compare.judging import EXACT
from taid_vlm.errors import TaidError
from taid_vlm.report import render

FIRST = [1.0] * 5 + [0.0] * 15 + [1.0] * 40
SECOND = [0.0] * 5 + [1.0] * 15 + [1.0] * 40  # McNemar's p is .04139
DATE = "2026-03-01T10-00-00.123456"


def lm_eval(folder: Path, scores: Sequence[float], date: str = DATE, task: str = "arc",
            **changes: Any) -> Path:
    """As lm-eval 0.4.13 writes them: --output_path and --log_samples."""
    folder.mkdir(parents=True, exist_ok=True)
    value = sum(scores) / len(scores)
    raw = {
        "results": {task: {"alias": task, "acc,none": value, "acc_stderr,none": 0.06,
                           "acc_norm,none": value, "acc_norm_stderr,none": "N/A"}},
        "group_subtasks": {task: []}, "versions": {task: 1.0}, "n-shot": {task: 5},
        "configs": {task: {"output_type": "multiple_choice"}}, "config": {"limit": None},
        "model_name": folder.name, "lm_eval_version": "0.4.13", "chat_template_sha": None,
        "transformers_version": "5.23.0", **changes}
    (folder / f"results_{date}.json").write_text(json.dumps(raw))
    lines = []
    for index, score in enumerate(scores):
        likely = [-1.0, -2.0] if score else [-2.0, -1.0]
        lines.append({
            "doc_id": index, "doc": {"question": f"q{index}"}, "target": "0",
            "arguments": {f"gen_args_{i}": {"arg_0": f"Q: q{index}\nA:", "arg_1": f" {word}"}
                          for i, word in enumerate(("yes", "no"))},
            "resps": [[[str(x), "False"]] for x in likely],
            "filtered_resps": [[str(x), "False"] for x in likely], "filter": "none",
            "metrics": ["acc"], "doc_hash": "d", "prompt_hash": "p", "target_hash": "t",
            "acc": score, "acc_norm": score})
    write(folder / f"samples_{task}_{date}.jsonl", lines)
    return folder


def lmms_eval(folder: Path, scores: Sequence[float], **changes: Any) -> Path:
    """As lmms-eval 0.7.3 writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = {
        "results": {"mmstar": {"alias": "mmstar", "average,none": sum(scores) / len(scores),
                               "average_stderr,none": "N/A", "average_stderr_clt,none": 0.05}},
        "group_subtasks": {"mmstar": []}, "versions": {"mmstar": 0.0}, "n-shot": {"mmstar": 0},
        "configs": {"mmstar": {"output_type": "generate_until",
                               "generation_kwargs": {"max_new_tokens": 16}}},
        "config": {"model": "taid_vlm", "model_args": f"pretrained={folder.name}", "limit": None},
        "lmms_eval_version": "0.7.3", **changes}
    (folder / "20260301_100000_results.json").write_text(json.dumps(raw))
    write(folder / "20260301_100000_samples_mmstar.jsonl", [{
        "doc_id": index, "target": "A", "resps": [f"<think>x</think>{'A' if score else 'B'}"],
        "filtered_resps": "A" if score else "B", "token_counts": [None], "doc_hash": f"{index}",
        "average": {"question_id": index, "l2_category": "x", "score": score},
        "input": f"Which {index}?"} for index, score in enumerate(scores)])
    return folder


def kit(folder: Path, scores: Sequence[float], scored: bool = True, kind: str = "tsv") -> Path:
    """As VLMEvalKit writes them with PRED_FORMAT=tsv or json."""
    place = folder / "T20260301_Gabc123"
    place.mkdir(parents=True)
    rows = [{"index": index, "question": f"Which {index}?", "A": "red", "B": "blue", "answer": "A",
             "category": "colour", "prediction": "A" if score else "B"}
            for index, score in enumerate(scores)]
    table(place / f"{folder.name}_MMBench_DEV_EN.{kind}", rows)
    if scored:
        table(place / f"{folder.name}_MMBench_DEV_EN_exact_matching_result.{kind}",
              [{**row, "hit": int(score), "log": "Match"} for row, score in
               zip(rows, scores, strict=True)])
    (place / f"{folder.name}_MMBench_DEV_EN_acc.csv").write_text('"split","Overall"\n')
    return folder


def table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def write(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def compared(*folders: Path) -> Comparison:
    return compare_runs([read_method(str(folder)) for folder in folders])


@pytest.mark.parametrize("harness", [lm_eval, lmms_eval, kit])
def test_logs_are_compared_question_by_question(harness: Any, tmp_path: Path) -> None:
    found = compared(harness(tmp_path / "a", FIRST), harness(tmp_path / "b", SECOND))
    judged = found.benchmarks[0]
    assert judged.against["b"].test == EXACT
    assert judged.against["b"].p == pytest.approx(0.04138947)
    assert judged.figures["a"].value == pytest.approx(75)
    assert judged.figures["a"].low < 75 < judged.figures["a"].high
    assert not found.warnings
    rule = {"lm_eval": "lm-eval 0.4.13", "lmms_eval": "lmms-eval 0.7.3",
            "kit": "VLMEvalKit abc123"}[harness.__name__]
    assert f"rule {rule}" in as_markdown(found)
    page = render(comparison_report(found))
    assert "Which" in page or "Q: q" in page


def test_what_was_asked_and_said_is_there(tmp_path: Path) -> None:
    rows = [read_folder(make(tmp_path / name, FIRST)).answers(task)[5] for make, name, task in (
        (lm_eval, "a", "arc"), (lmms_eval, "b", "mmstar"), (kit, "c", "MMBench_DEV_EN"))]
    assert [row["answer"] for row in rows] == ["no", "<think>x</think>B", "B"]
    assert [row["read"] for row in rows] == ["no", "B", "B"]
    assert [row["answers"] for row in rows] == [["yes"], ["A"], ["A"]]
    assert [row["score"] for row in rows] == [0.0, 0.0, 0.0]
    assert rows[0]["prompt"] == "Q: q5\nA:"


def test_the_folder_above_a_single_model_will_do(tmp_path: Path) -> None:
    lm_eval(tmp_path / "out" / "org__model", FIRST)
    assert read_method(f"x={tmp_path / 'out'}").evaluations[0].results["model"]["name"] == \
        "org__model"
    lm_eval(tmp_path / "out" / "org__other", FIRST)
    with pytest.raises(TaidError, match=r"no results.json"):
        read_method(f"x={tmp_path / 'out'}")


def test_the_last_run_of_a_task_counts(tmp_path: Path) -> None:
    lm_eval(tmp_path / "a", SECOND, date="2026-03-02T10-00-00.0")
    lm_eval(tmp_path / "a", FIRST)
    lm_eval(tmp_path / "a", FIRST, task="gsm")
    results = read_folder(tmp_path / "a").results["tasks"]
    assert results.keys() == {"arc", "gsm"}
    assert results["arc"]["figures"]["acc"]["value"] == pytest.approx(sum(SECOND) / 60)


def test_a_group_is_one_benchmark(tmp_path: Path) -> None:
    folder = lm_eval(tmp_path / "a", FIRST, task="mmlu_law")
    lm_eval(folder, SECOND, task="mmlu_art")
    raw = json.loads((folder / f"results_{DATE}.json").read_text())
    law = {**raw["results"]["mmlu_art"]}
    raw["results"] = {"mmlu": {"alias": "mmlu", "acc,none": (sum(FIRST) + sum(SECOND)) / 120,
                               "acc_stderr,none": 0.04}, "mmlu_law": law, "mmlu_art": law}
    raw["group_subtasks"] = {"mmlu": ["mmlu_law", "mmlu_art"]}
    raw["n-shot"] = {"mmlu_law": 5, "mmlu_art": 5}
    (folder / f"results_{DATE}.json").write_text(json.dumps(raw))
    found = read_folder(folder)
    assert list(found.results["tasks"]) == ["mmlu"]
    assert len(found.answers("mmlu")) == 120
    assert found.results["tasks"]["mmlu"]["answering"]["num_fewshot"] == 5
    assert found.results["tasks"]["mmlu"]["by_tag"]["task"].keys() == {"mmlu_law", "mmlu_art"}
    assert compared(folder, _copy(folder, tmp_path / "b")).benchmarks[0].paired is not None


def _copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


@pytest.mark.parametrize(("changes", "told"), [
    ({"n-shot": {"arc": 0}}, "the number of solved examples is not the same: 5 in"),
    ({"lm_eval_version": "0.4.9"}, "rule is not the same: lm-eval 0.4.13 in"),
    ({"versions": {"arc": 2.0}}, "the rule's version is not the same: 1"),
    ({"config": {"limit": 60}}, "")])
def test_what_differs_is_refused(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    one, two = lm_eval(tmp_path / "a", FIRST), lm_eval(tmp_path / "b", SECOND, **changes)
    if not told:
        assert compared(one, two).warnings
        return
    with pytest.raises(TaidError, match=told):
        compared(one, two)


def test_other_questions_are_refused(tmp_path: Path) -> None:
    one, two = kit(tmp_path / "a", FIRST), kit(tmp_path / "b", SECOND)
    path = next(two.glob("*/*_result.tsv"))
    path.write_text(path.read_text().replace("red\tblue\tA", "red\tblue\tB", 1))
    with pytest.raises(TaidError, match=r"the questions \(hash\) is not the same"):
        compared(one, two)


def test_two_harnesses_are_not_mixed(tmp_path: Path) -> None:
    lm_eval(tmp_path / "a", FIRST)
    lmms_eval(tmp_path / "a", FIRST)
    with pytest.raises(TaidError, match="logs of lm-eval and of lmms-eval"):
        read_method(str(tmp_path / "a"))


def test_without_samples_there_are_no_pairs(tmp_path: Path) -> None:
    folders = [lm_eval(tmp_path / name, scores) for name, scores in
               (("a", FIRST), ("b", SECOND))]
    for folder in folders:
        next(folder.glob("samples_*")).unlink()
    charts = compared(*folders).benchmarks[0]
    assert charts.paired is None
    assert charts.figures["a"].value == pytest.approx(75)


def test_predictions_that_nobody_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = kit(tmp_path / "a", FIRST, scored=False), kit(tmp_path / "b", SECOND)
    assert main(["compare", str(one), str(two)]) == 2
    assert "none of them is evaluated. Let VLMEvalKit evaluate" in capsys.readouterr().err


def test_json_and_newest_run(tmp_path: Path) -> None:
    folder = kit(tmp_path / "a", FIRST, kind="json")
    later = folder / "T20260401_Gdef456"
    later.mkdir()
    for path in (folder / "T20260301_Gabc123").iterdir():
        (later / path.name).write_bytes(path.read_bytes())
    entry = read_folder(folder).results["tasks"]["MMBench_DEV_EN"]
    assert entry["rule"] == "VLMEvalKit def456"
    assert entry["figures"]["accuracy"]["value"] == 0.75


def test_xlsx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = kit(tmp_path / "a", FIRST)
    if importlib.util.find_spec("openpyxl") is None:
        for path in folder.glob("*/*.tsv"):
            path.rename(path.with_suffix(".xlsx"))
        with pytest.raises(TaidError, match="pip install openpyxl, or let VLMEvalKit write"):
            read_folder(folder)
        return
    from openpyxl import Workbook

    for path in folder.glob("*/*.tsv"):
        book = Workbook()
        for row in csv.reader(path.open(), delimiter="\t"):
            book.active.append([int(x) if x.isdecimal() else x for x in row])
        book.save(path.with_suffix(".xlsx"))
        path.unlink()
    other = kit(tmp_path / "b", SECOND)
    for path in other.glob("*/a_*"):
        path.unlink()
    assert compared(folder, other).benchmarks[0].against["b"].p == pytest.approx(0.04138947)


@pytest.mark.parametrize("text", ["{", "[]", '{"results": 3}'])
def test_a_broken_log_is_named(text: str, tmp_path: Path) -> None:
    folder = lm_eval(tmp_path / "a", FIRST)
    (folder / f"results_{DATE}.json").write_text(text)
    with pytest.raises(TaidError, match="results_2026"):
        read_folder(folder)


def test_a_torn_table_is_named(tmp_path: Path) -> None:
    folder = kit(tmp_path / "a", FIRST, kind="json")
    path = next(folder.glob("*/*_result.json"))
    path.write_text(path.read_text()[:-20])
    with pytest.raises(TaidError, match=r"_result.json' could not be read"):
        vlmevalkit_logs.read_kit(folder)
