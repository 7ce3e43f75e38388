"""The paper's eight benchmarks as one suite: its members, its average, and what keeps it back."""

import math

import pytest

from taid_vlm.benchmarks.suite import SUITES, average, with_members
from taid_vlm.benchmarks.table import as_text
from taid_vlm.errors import TaidError

EIGHT = [member.task for member in SUITES["taid-vlm"]]
VALUES = {"mmbench": 0.7, "mmstar": 0.5, "mmmu": 0.4, "math_vista": 0.45, "ocrbench": 650.0,
          "ai2d": 0.75, "hallusion_bench": 0.35, "mmvet": 0.4}


def entries(**changes):
    return {member.task: {"n": 10, "figures": {
        "another": {"value": 0.1, "stderr": 0.0, "n": 10},
        member.figure: {"value": value, "stderr": 0.01 * member.full, "n": 10}}}
        for member in SUITES["taid-vlm"]
        if (value := (VALUES | changes)[member.task]) is not None}


def test_the_average_is_the_leaderboard_s():
    """Means of the eight in per cent, where OCRBench's 650 of 1000 are 65."""
    found = average("taid-vlm", entries())
    assert found["missing"] == {}
    wanted = (70 + 50 + 40 + 45 + 65 + 75 + 35 + 40) / 8
    assert found["figures"]["average"]["value"] * 100 == pytest.approx(wanted)
    assert found["figures"]["average"]["stderr"] == pytest.approx(0.01 / math.sqrt(8))
    assert found["figures"]["average"]["n"] == 80


def test_without_all_there_is_none_and_the_missing_are_named():
    some = entries(mmmu=None, mmvet=math.nan)
    some["mmvet"]["unscored"] = {"no judge": 10}
    some["ai2d"]["figures"]["accuracy"]["value"] = None  # as results.json writes what is unknown
    found = average("taid-vlm", some)
    assert found == {"figures": {}, "missing": {
        "mmmu": "not evaluated", "ai2d": "no figure", "mmvet": "no judge"}}
    shown = as_text({"student": {"tasks": {}, "suites": {"taid-vlm": found}}})
    assert "student: taid-vlm: no average, missing: mmmu (not evaluated), ai2d" in shown
    whole = as_text({"s": {"tasks": {}, "suites": {"taid-vlm": average("taid-vlm", entries())}}})
    assert "52.5 ± 0.4" in whole and "missing" not in whole


def test_members_join_the_tasks(tmp_path):
    (tmp_path / "ai2d.tsv").touch()
    (tmp_path / "mmmu").mkdir()
    (tmp_path / "pope.tsv").touch()
    assert with_members(["mmstar=x.tsv", "pope"], [f"taid-vlm={tmp_path}"]) == [
        "mmstar=x.tsv", "pope", f"mmmu={tmp_path}/mmmu", f"ai2d={tmp_path}/ai2d.tsv"]
    assert with_members(["mmstar=x.tsv"], ["taid-vlm"]) == [
        "mmstar=x.tsv", *(task for task in EIGHT if task != "mmstar")]
    assert with_members(["pope"], []) == ["pope"]


@pytest.mark.parametrize(("suite", "words"), [
    ("taidvlm", "no suite 'taidvlm'.*taid-vlm"), ("taid-vlm=/no/such", "no folder '/no/such'"),
    ("taid-vlm={}", r"holds none of its benchmarks \(mmbench, ")])
def test_suites_that_are_not_there(tmp_path, suite, words):
    with pytest.raises(TaidError, match=words):
        with_members([], [suite.format(tmp_path)])
