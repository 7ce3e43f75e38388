"""Which of several runs is best: pairs, seeds, corrections, gaps, and what must not be compared."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare.made import distillation, evaluation

from taid_vlm.compare import (
    Comparison,
    as_markdown,
    compare_runs,
    comparison_report,
    plain,
    read_method,
    read_reference,
)
from taid_vlm.compare.findings import findings
from taid_vlm.compare.judging import APART, EXACT, PAIRED, Judged
from taid_vlm.compare.tables import failures_table, figures_table, recovered_table
from taid_vlm.errors import TaidError
from taid_vlm.evaluation.answers import FILE
from taid_vlm.report import render

BOOT = 2000


def compared(*arguments: str, **options: Any) -> Comparison:
    return compare_runs([read_method(a) for a in arguments], n_boot=BOOT, **options)


def figure(comparison: Comparison, key: str) -> Judged:
    return next(j for j in (*comparison.held_out, *comparison.benchmarks)
                if j.measure.column.key == key)


def right(n: int, share: float, seed: int = 0) -> list[float]:
    return [float(x < share) for x in np.random.default_rng(seed).random(n)]


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, str]:
    return {name: f"{name}={distillation(tmp_path / name.lower(), gain, seed)}"
            for name, gain, seed in (("SFT", 0.3, 0), ("KD", 0.5, 1), ("TAID", 0.7, 2))}


# ----- held-out figures ---------------------------------------------------------------------


def test_the_best_is_called_best(runs: dict[str, str]) -> None:
    found = compared(*runs.values())
    kl = figure(found, "kl")
    assert kl.verdicts == {"TAID": "best"}
    assert kl.figures["Base"].value == pytest.approx(0.6, rel=0.05)
    assert kl.figures["TAID"].value == pytest.approx(0.3 * kl.figures["Base"].value, rel=0.05)
    assert {d.test for d in kl.against.values()} == {PAIRED}
    assert kl.against["TAID"].interval.value < kl.against["KD"].interval.value < 0
    assert all(d.significant for d in kl.against.values())
    assert findings(found)[0] == (
        "TAID wins: it is significantly better than every other method on held-out KL to the "
        "teacher, agreement with the teacher and held-out NLL of the data.")


def test_means_are_those_of_results_json(runs: dict[str, str]) -> None:
    found = compared(*runs.values())
    for judged in found.held_out:
        for name, estimates in judged.measure.estimates.items():
            assert judged.figures[name].value == pytest.approx(estimates[0].value, rel=1e-6)


def test_gap_recovered_is_the_gain(runs: dict[str, str]) -> None:
    found = compared(*runs.values())
    for key in ("kl", "nll", "agreement"):
        judged = figure(found, key)
        means = {name: e[0].value for name, e in judged.measure.estimates.items()}
        for name in ("SFT", "KD", "TAID"):
            share = judged.recovered[name].share
            assert share is not None
            assert share.value == pytest.approx(
                (means[name] - means["Base"]) / (means["Teacher"] - means["Base"]))
            assert share.low < share.value < share.high
    assert figure(found, "nll").recovered["TAID"].share.value == pytest.approx(0.7, abs=0.04)
    table = recovered_table(found.held_out, found)
    assert table is not None
    assert table.rows[2].values["nll"].value == pytest.approx(70, abs=4)


def test_pairs_see_what_independent_errors_do_not(tmp_path: Path) -> None:
    close = [f"{name}={distillation(tmp_path / name, gain, seed)}"
             for name, gain, seed in (("A", 0.5, 0), ("B", 0.515, 1))]
    kl = figure(compared(*close), "kl")
    assert kl.verdicts == {"B": "best"}
    gap = abs((kl.figures["A"].value or 0) - (kl.figures["B"].value or 0))
    assert gap < math.hypot(kl.figures["A"].stderr or 0, kl.figures["B"].stderr or 0)
    for name in ("A", "B"):
        (tmp_path / name / FILE).unlink()
    kl = figure(compared(*close), "kl")
    assert kl.verdicts == {"A": "tie", "B": "tie"}
    assert kl.against["B"].test == APART
    assert "no eval_answers.jsonl" in kl.measure.unpaired


def test_a_tie_is_a_tie(tmp_path: Path) -> None:
    same = [f"{name}={distillation(tmp_path / name, 0.5, seed)}"
            for seed, name in enumerate("AB")]
    found = compared(*same)
    assert figure(found, "kl").verdicts == {"A": "tie", "B": "tie"}
    assert findings(found)[0] == "No significant winner: A and B tie on all 3 held-out figures."
    assert "not significant" in findings(found)[1]


def test_the_order_of_the_runs_changes_no_figure(runs: dict[str, str]) -> None:
    first, turned = compared(*runs.values()), compared(*reversed(runs.values()))
    for judged in first.held_out:
        other = figure(turned, judged.measure.column.key)
        assert judged.verdicts == other.verdicts
        assert judged.figures == other.figures


def test_the_baseline_can_be_chosen(runs: dict[str, str]) -> None:
    found = compared(*runs.values(), baseline="KD")
    assert list(figure(found, "kl").against) == ["SFT", "TAID"]
    with pytest.raises(TaidError, match=r"--baseline 'TAD' is none of the runs. Did you mean"):
        compared(*runs.values(), baseline="TAD")


def test_corrected_over_the_whole_table(runs: dict[str, str]) -> None:
    found = compared(*runs.values())
    cells = [d for j in found.held_out for d in j.against.values()]
    assert len(cells) > 10
    assert all(d.adjusted >= d.p for d in cells)
    smallest = min(cells, key=lambda d: d.p)
    assert smallest.adjusted == pytest.approx(len(cells) * smallest.p)


def test_other_teachers(tmp_path: Path) -> None:
    """KL to another teacher is another figure; the likelihood of the data is not."""
    one = distillation(tmp_path / "one", 0.3)
    two = distillation(tmp_path / "two", 0.7, models__teacher__name="bigger",
                       models__teacher__parameters=20_000_000)
    found = compared(str(one), str(two))
    assert not figure(found, "kl").verdicts
    assert not figure(found, "kl").against
    assert figure(found, "nll").verdicts == {"two": "best"}
    assert "Teacher" not in figure(found, "nll").figures
    assert any(w.startswith("Different teachers: big (one), bigger (two).")
               for w in found.warnings)


def test_a_teacher_in_fewer_bits_is_another_teacher(tmp_path: Path) -> None:
    one = distillation(tmp_path / "one", 0.3)
    two = distillation(tmp_path / "two", 0.7, models__teacher__quantization="4bit")
    found = compared(str(one), str(two))
    assert not figure(found, "kl").verdicts
    assert any(w.startswith("Different teachers: big (one), big in 4bit (two).")
               for w in found.warnings)


def test_other_starts_have_no_base(tmp_path: Path) -> None:
    one, two = (distillation(tmp_path / name, 0.5) for name in ("one", "two"))
    results = json.loads((two / "results.json").read_text())
    results["eval"]["before"]["nll"] *= 2
    (two / "results.json").write_text(json.dumps(results))
    found = compared(str(one), str(two))
    assert "Base" not in figure(found, "kl").figures
    assert not figure(found, "kl").recovered
    assert any("different students" in w for w in found.warnings)


def test_a_diverged_run_wins_nothing(tmp_path: Path) -> None:
    good, bad = distillation(tmp_path / "good"), distillation(tmp_path / "bad", seed=1)
    lines = (bad / FILE).read_text().replace('"kl": 0.', '"kl": null, "x": 0.')
    (bad / FILE).write_text(lines)
    kl = figure(compared(str(good), str(bad)), "kl")
    assert not kl.verdicts
    assert math.isnan(kl.against["bad"].p)


# ----- seeds --------------------------------------------------------------------------------


def seeds(folder: Path, name: str, gain: float, numbers: Sequence[int]) -> str:
    made = [str(distillation(folder / f"{name}-{s}", gain + 0.02 * (s % 3), 10 * s))
            for s in numbers]
    return f"{name}={','.join(made)}"


def test_seeds_are_pooled(tmp_path: Path) -> None:
    found = compared(seeds(tmp_path, "A", 0.3, range(3)), seeds(tmp_path, "B", 0.7, range(3)))
    kl = figure(found, "kl")
    assert found.seeds == {"A": 3, "B": 3}
    assert kl.verdicts == {"B": "best"}
    assert "3 seeds" in kl.figures["A"].note
    assert kl.against["B"].interval.seeds_known
    assert "other seeds." in findings(found)[-1]
    one_seed = compared(*(f"{n}={tmp_path / f'{n}-0'}" for n in "AB"))
    assert kl.figures["A"].stderr > 0
    assert not figure(one_seed, "kl").against["B"].interval.seeds_known
    assert findings(one_seed)[-1].startswith("One seed each")


def test_one_seed_twice(tmp_path: Path) -> None:
    twice = [str(distillation(tmp_path / f"a{i}", 0.5, 3)) for i in range(2)]
    other = distillation(tmp_path / "b", 0.5, 4)
    found = compared(f"A={','.join(twice)}", f"B={other}")
    assert any("2 runs have the seed 3" in w for w in found.warnings)
    with pytest.raises(TaidError, match="is given twice"):
        compared(f"A={twice[0]},{twice[0]}", f"B={other}")


# ----- benchmarks ---------------------------------------------------------------------------


def test_right_and_wrong_are_tested_exactly(tmp_path: Path) -> None:
    """5 against 15 questions that divide the two: p of scipy.stats.binomtest(5, 20) = 0.04139."""
    first = [1.0] * 5 + [0.0] * 15 + [1.0] * 40
    second = [0.0] * 5 + [1.0] * 15 + [1.0] * 40
    found = compared(*(str(evaluation(tmp_path / name, scores))
                       for name, scores in (("a", first), ("b", second))))
    charts = figure(found, "charts")
    assert charts.against["b"].test == EXACT
    assert charts.against["b"].p == pytest.approx(0.04138947)
    assert charts.verdicts == {"b": "best"}
    assert charts.figures["b"].value == pytest.approx(100 * 55 / 60)


def test_groups_are_drawn_together(tmp_path: Path) -> None:
    """Four questions about each image are not four independent draws: McNemar does not hold."""
    one, two = right(40, 0.5, 1), right(40, 0.5, 2)
    groups = [f"image {i}" for i in range(40) for _ in range(4)]
    folders = [str(evaluation(tmp_path / name, np.repeat(scores, 4).tolist(), groups=groups))
               for name, scores in (("a", one), ("b", two))]
    grouped = figure(compared(*folders), "charts").against["b"]
    single = [str(evaluation(tmp_path / name, scores)) for name, scores in
              (("c", one), ("d", two))]
    plain_one = figure(compared(*single), "charts").against["d"]
    assert grouped.test == PAIRED
    assert (grouped.interval.low, grouped.interval.high) == pytest.approx(
        (plain_one.interval.low, plain_one.interval.high))


def test_a_group_may_count_as_a_whole(tmp_path: Path) -> None:
    """As in MMBench: right if all rotations are."""
    rng = np.random.default_rng(0)
    folders = []
    for name, share in (("a", 0.7), ("b", 0.9)):
        scores = [float(x < share) for x in rng.random(200)]
        whole = [min(scores[2 * i : 2 * i + 2]) for i in range(100)]
        entry = {"value": sum(whole) / 100, "stderr": 0.04, "n": 100}
        folders.append(str(evaluation(
            tmp_path / name, scores, groups=[str(i // 2) for i in range(200)],
            tasks__charts__figures={"circular": entry})))
    charts = figure(compared(*folders), "charts")
    assert charts.measure.items is not None
    assert len(charts.measure.items.groups) == 100
    assert charts.against["b"].test == EXACT


def test_a_figure_that_is_no_mean_is_not_paired(tmp_path: Path) -> None:
    entry = {"f1": {"value": 0.77, "stderr": 0.02, "n": 50}}
    folders = [str(evaluation(tmp_path / name, right(50, 0.5, i), tasks__charts__figures=entry))
               for i, name in enumerate("ab")]
    charts = figure(compared(*folders), "charts")
    assert charts.measure.unpaired == "its figure is no mean over questions"
    assert charts.against["b"].test == APART
    assert charts.against["b"].p == pytest.approx(1.0)


def test_gap_and_average(tmp_path: Path) -> None:
    shares = {"base": 0.2, "a": 0.5, "b": 0.55, "teacher": 0.95}
    for name, share in shares.items():
        made = tmp_path / name
        evaluation(made, right(300, share))
        more = evaluation(tmp_path / "more", right(200, share, 5), task="signs", name=name)
        _join(made, more)
    references = {role.lower(): read_reference(role, tmp_path / role.lower())
                  for role in ("Teacher", "Base")}
    found = compared(str(tmp_path / "a"), str(tmp_path / "b"), **references)
    keys = [j.measure.column.key for j in found.benchmarks]
    assert keys == ["average", "charts", "signs"]
    average = figure(found, "average")
    means = [figure(found, key).figures["a"].value or 0 for key in ("charts", "signs")]
    assert average.figures["a"].value == pytest.approx(sum(means) / 2)
    share = average.recovered["a"].share
    assert share is not None
    assert share.value == pytest.approx((0.5 - 0.2) / 0.75, abs=0.06)
    assert average.figures["a"].low < average.figures["a"].value < average.figures["a"].high
    table = figures_table("Benchmarks", found.benchmarks, found)
    assert [row.role for row in table.rows] == ["teacher", "start", "baseline", "baseline"]
    failures = failures_table(found)
    assert failures is not None
    assert failures.rows[0].values["charts"].value == pytest.approx(100 / 300)


def _join(into: Path, other: Path) -> None:
    first, second = (json.loads((f / "results.json").read_text()) for f in (into, other))
    first["tasks"] |= second["tasks"]
    (into / "results.json").write_text(json.dumps(first))
    for path in (other / "answers").iterdir():
        shutil.copy(path, into / "answers")
    shutil.rmtree(other)


def test_no_gap_to_recover(tmp_path: Path) -> None:
    same = right(100, 0.6)
    for name in ("base", "teacher", "a", "b"):
        evaluation(tmp_path / name, same if name != "b" else right(100, 0.6, 3))
    found = compared(str(tmp_path / "a"), str(tmp_path / "b"),
                     teacher=read_reference("Teacher", tmp_path / "teacher"),
                     base=read_reference("Base", tmp_path / "base"))
    assert figure(found, "charts").recovered["a"].share is None
    assert any("there is no gap to recover" in sentence for sentence in findings(found))
    assert plain(found)["benchmarks"]["charts"]["gap_recovered"] == {"a": None, "b": None}


def test_no_overall_winner(tmp_path: Path) -> None:
    for name, shares in (("a", (0.9, 0.3)), ("b", (0.3, 0.9))):
        made = evaluation(tmp_path / name, right(200, shares[0]))
        _join(made, evaluation(tmp_path / "more", right(200, shares[1]), task="signs"))
    found = compared(str(tmp_path / "a"), str(tmp_path / "b"))
    assert findings(found)[0] == "No overall winner: a is best on Charts; b is best on Signs."


def test_who_was_not_asked_is_not_behind(tmp_path: Path) -> None:
    for name, share in (("a", 0.5), ("b", 0.5), ("c", 0.9)):
        evaluation(tmp_path / name, right(100, share))
    _join(tmp_path / "a", evaluation(tmp_path / "x", right(100, 0.9), task="signs"))
    _join(tmp_path / "b", evaluation(tmp_path / "x", right(100, 0.2), task="signs"))
    found = compared(*(str(tmp_path / name) for name in "abc"))
    assert figure(found, "signs").verdicts == {"a": "best"}
    assert "c" not in figure(found, "signs").figures
    assert [j.measure.column.key for j in found.benchmarks] == ["charts", "signs"]  # no average
    assert findings(found)[0] == (
        "c wins: it is significantly better than every other method on Charts.")


def test_few_questions_decide_nothing(tmp_path: Path) -> None:
    folders = [str(evaluation(tmp_path / name, [share] * 40, groups=list("abcd") * 10))
               for name, share in (("a", 0.0), ("b", 1.0))]
    assert any(w.startswith("Only 4 records or independent questions (Charts)")
               for w in compared(*folders).warnings)


def test_what_a_harness_leaves_out(tmp_path: Path) -> None:
    """No scores, no path of the data, other figures inside a group."""
    changes: dict[str, Any] = {
        "tasks__charts__source": None, "tasks__charts__decimals": None,
        "tasks__charts__by_tag": {"task": {"x": {"other": {"value": 1, "stderr": 0, "n": 1}}}}}
    folders = [evaluation(tmp_path / name, right(30, 0.5, i), **changes)
               for i, name in enumerate("ab")]
    path = folders[0] / "answers/charts.jsonl"
    path.write_text(path.read_text().replace('"score": 1.0', '"score": null'))
    found = compared(*map(str, folders))
    charts = figure(found, "charts")
    assert charts.measure.unpaired == "some answers have no score of their own"
    assert charts.measure.column.unit == "points"
    assert "Charts: 30 questions, rule official" in as_markdown(found)
    assert render(comparison_report(found))


# ----- what must not be compared ------------------------------------------------------------


@pytest.mark.parametrize(("change", "value", "told"), [
    ("rule", "lmms", "charts: rule is not the same: official in"),
    ("rule_version", 2, "charts: the rule's version is not the same: 1 in"),
    ("source", {"path": "x", "sha256": "9" * 64}, "charts: the data (sha256) is not the same"),
    ("n", 51, "charts: the number of questions is not the same: 50 in"),
])
def test_other_benchmarks_are_refused(
    tmp_path: Path, change: str, value: Any, told: str
) -> None:
    one = evaluation(tmp_path / "one", right(50, 0.5))
    two = evaluation(tmp_path / "two", right(50, 0.5), **{f"tasks__charts__{change}": value})
    with pytest.raises(TaidError) as error:
        compared(str(one), str(two))
    assert told in str(error.value)
    assert "two'" in str(error.value)


@pytest.mark.parametrize(("change", "value", "told"), [
    ("tasks__charts__prompt_hash", "0" * 16, "Different charts: prompts: ffff"),
    ("tasks__charts__answering", {"method": "likelihood"}, "Different charts: ways of answering"),
    ("versions", {"torch": "2.14"}, "Different versions of torch: 2.15 (one), 2.14 (two)."),
    ("model__name", "one", ""),
])
def test_what_may_matter_is_told(tmp_path: Path, change: str, value: Any, told: str) -> None:
    one = evaluation(tmp_path / "one", right(50, 0.5))
    two = evaluation(tmp_path / "two", right(50, 0.5), **{change: value})
    warnings = compared(str(one), str(two)).warnings
    assert any(told in warning for warning in warnings) if told else not warnings


def test_other_held_out_data_are_refused(tmp_path: Path) -> None:
    one = distillation(tmp_path / "one")
    two = distillation(tmp_path / "two", data__eval__sha256="0" * 16)
    with pytest.raises(TaidError, match=rf"{'d' * 16} in '.*one', {'0' * 16} in '.*two'"):
        compared(str(one), str(two))


def test_nothing_in_common(tmp_path: Path) -> None:
    run, other = distillation(tmp_path / "run"), evaluation(tmp_path / "other", right(20, 0.5))
    assert findings(compared(str(run), str(other))) == [
        "These runs have no figure in common to be compared by."]


# ----- folders ------------------------------------------------------------------------------


def test_names(tmp_path: Path) -> None:
    made = [distillation(tmp_path / "runs" / name) for name in ("a=1", "b,2")]
    assert [read_method(str(folder)).name for folder in made] == ["a=1", "b,2"]
    assert read_method(f"T={made[1]}").name == "T"
    both = read_method(f"T={made[1].parent / 'a=1'}")
    assert (both.name, len(both.runs)) == ("T", 1)


@pytest.mark.parametrize(("key", "value"), [
    ("tasks", []), ("tasks__charts", []), ("tasks__charts__figures", {}), ("model", "x"),
    ("tasks__charts__figures__accuracy__value", "0.5"), ("tasks__charts__answers", 3),
    ("tasks__charts__n", None), ("tasks__charts__by_tag", {"kind": 3}), ("versions", [])])
def test_an_evaluation_of_another_shape_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "a", [1, 0], **{key: value})
    with pytest.raises(TaidError, match=key.split("__")[-1]) as error:
        read_method(str(folder))
    assert "is not an evaluation's results" in str(error.value)


@pytest.mark.parametrize(("key", "value"), [("score", "x"), ("id", None), ("answer", 3)])
def test_an_answer_of_another_shape_is_named(key: str, value: Any, tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "a", [1, 0])
    path = folder / "answers/charts.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{json.dumps({**json.loads(second), key: value})}\n")
    method = read_method(str(folder))
    with pytest.raises(TaidError, match=rf"charts.jsonl:2: {key}"):
        method.evaluations[0].answers("charts")


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    distillation(tmp_path / "above" / "inside")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "recipe.yaml").touch()
    (tmp_path / "empty").mkdir()
    for name, text in (("broken", "{"), ("list", "[]"), ("old", '{"schema": 0}'),
                       ("other", '{"schema": 1, "kind": "demo"}'),
                       ("newer", '{"schema": 3, "kind": "distillation"}'),
                       ("torn", '{"schema": 2, "kind": "distillation", "seed": 0}'),
                       ("empty evaluation", '{"schema": 1, "kind": "evaluation"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(text)
    for name, told in (("abov", "is no folder. Did you mean 'above'"), ("above", "inside"),
                       ("unfinished", "the run is not finished"), ("empty", "not the output of"),
                       ("broken", "is not a run's results"), ("list", "is not a run's results"),
                       ("old", "schema 0"), ("other", "kind = 'demo'"),
                       ("newer", "schema 3, but this version reads 1 and 2"),
                       ("torn", "objective: Field required"),
                       ("empty evaluation", "kind = 'evaluation'")):
        with pytest.raises(TaidError) as error:
            read_method(str(tmp_path / name))
        assert told in str(error.value), name
    with pytest.raises(TaidError, match="neither a folder nor NAME=FOLDER"):
        read_method("=")
    with pytest.raises(TaidError, match="is a distillation run"):
        read_reference("Teacher", tmp_path / "above" / "inside")


def test_names_must_differ(tmp_path: Path) -> None:
    one, two = (distillation(tmp_path / side / "run") for side in "ab")
    with pytest.raises(TaidError, match="2 of the runs are called 'run'"):
        compared(str(one), str(two))
    with pytest.raises(TaidError, match="'Teacher' cannot be a method's name"):
        compared(f"Teacher={one}", f"B={two}")
    with pytest.raises(TaidError, match="at least two"):
        compared(str(one))


def test_a_torn_answers_file_is_named(tmp_path: Path) -> None:
    one, two = distillation(tmp_path / "one"), distillation(tmp_path / "two")
    path = two / FILE
    path.write_text(path.read_text()[:-40])
    with pytest.raises(TaidError, match=r"two.eval_answers.jsonl:90: "):
        compared(str(one), str(two))
