"""results.json: one typed shape, read strictly; files of the schema before are read, too."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compare.made import distillation

import taid_vlm
from taid_vlm.compare import as_markdown, compare_runs, read_method
from taid_vlm.errors import TaidError
from taid_vlm.runs.results import Part, Results, read_results

OLD = Path(__file__).parent / "compare" / "schema_1"  # written by `taid-vlm distill` of that time


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return distillation(tmp_path / "run") / "results.json"


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))
    return path


def test_what_is_written_is_what_is_read(path: Path, tmp_path: Path) -> None:
    results = read_results(path)
    again = results.write(tmp_path / "again.json")
    assert again.read_text() == path.read_text()
    assert pickle.loads(pickle.dumps(results)) == results  # between processes
    tree = json.loads(path.read_text())
    assert (tree["schema"], tree["kind"]) == (2, "distillation")
    assert results.eval.after is not None
    assert results.eval.after.figures["kl"] == tree["eval"]["after"]["kl"]
    assert results.eval.after.by_category["odd"].figures["kl"] != tree["eval"]["after"]["kl"]


def test_what_is_not_finite_is_null_in_the_file_and_nan_here(path: Path, tmp_path: Path) -> None:
    rewritten(path, lambda tree: tree["eval"]["after"].update(kl_stderr=None))
    after = read_results(path).eval.after
    assert after is not None
    assert math.isnan(after.figures["kl_stderr"])
    assert "chunk_kl" not in after.figures  # not measured is something else
    again = json.loads(read_results(path).write(tmp_path / "again.json").read_text())
    assert again["eval"]["after"]["kl_stderr"] is None


@pytest.mark.parametrize(("change", "told"), [
    (lambda tree: tree.pop("train"), "train: Field required"),
    (lambda tree: tree["train"].pop("steps"), "train.steps: Field required"),
    (lambda tree: tree["train"].update(stepps=3), "train.stepps: Extra inputs"),
    (lambda tree: tree.update(more=3), "more: Extra inputs"),
    (lambda tree: tree["eval"]["after"].update(kl="near"), "eval.after.kl"),
    (lambda tree: tree["models"].update(third={}), "models.third"),
    (lambda tree: tree.update(schema=3), "schema"),
    (lambda tree: tree.pop("schema"), "'schema'"),
])
def test_a_broken_file_is_named_with_its_place(
    change: Callable[[dict[str, Any]], Any], told: str, path: Path
) -> None:
    rewritten(path, change)
    with pytest.raises(TaidError) as caught:
        read_results(path)
    assert str(caught.value).startswith(f"'{path}' is not a run's results (")
    assert told in str(caught.value)


def test_how_the_loss_was_computed(path: Path) -> None:
    report = {"name": "fused", "reason": None, "bodies": ["eager"]}
    rewritten(path, lambda tree: tree["train"].update(loss_implementation=report))
    loss = read_results(path).train.loss_implementation
    assert loss is not None
    assert (loss.name, loss.bodies) == ("fused", ["eager"])
    rewritten(path, lambda tree: tree["train"]["loss_implementation"].update(name="other"))
    with pytest.raises(TaidError, match=r"train\.loss_implementation\.name"):
        read_results(path)


def test_schema_1_is_read(tmp_path: Path) -> None:
    tree = json.loads((OLD / "results.json").read_text())
    assert tree["schema"] == 1
    results = read_results(OLD / "results.json")
    assert results.version == 2
    assert results.train.loss_implementation is None
    assert results.eval.after is not None
    assert results.eval.after.figures["kl"] == tree["eval"]["after"]["kl"]
    assert results.examples[1].answers == tree["examples"][1]["answers"]
    assert read_results(results.write(tmp_path / "new.json")) == results


def test_schema_1_is_compared(tmp_path: Path) -> None:
    """With a run of today's on the same data."""
    tree = json.loads((OLD / "results.json").read_text())
    (tmp_path / "new").mkdir()
    for file in OLD.iterdir():
        (tmp_path / "new" / file.name).write_bytes(file.read_bytes())
    results = read_results(OLD / "results.json")
    results.write(tmp_path / "new" / "results.json")
    compared = compare_runs([read_method(f"old={OLD}"), read_method(f"new={tmp_path / 'new'}")])
    kl = next(j for j in compared.held_out if j.measure.column.key == "kl")
    assert kl.figures["old"].value == kl.figures["new"].value == pytest.approx(
        tree["eval"]["after"]["kl"], rel=1e-6)
    assert kl.ranking == {"old": "tie", "new": "tie"}
    assert not kl.verdicts  # one seed each
    assert "| old | " in as_markdown(compared)


def test_the_first_files_of_schema_1_lack_some_keys(path: Path) -> None:
    def age(tree: dict[str, Any]) -> None:
        tree["schema"] = 1
        for key in ("kind", "data", "canary", "stages", "examples"):
            del tree[key]
        del tree["train"]["answer_tokens"], tree["train"]["loss_implementation"]

    results = read_results(rewritten(path, age))
    assert (results.data, results.examples) == ({"eval": None}, [])
    assert results.train.answer_tokens is None


def test_every_field_is_described() -> None:
    """In the docstring of its type, by its name."""
    kinds, seen = [Results], set()
    while kinds:
        kind = kinds.pop()
        if kind in seen:
            continue
        seen.add(kind)
        text = " ".join(part.__doc__ or "" for part in kind.__mro__ if issubclass(part, Part))
        for name, field in kind.model_fields.items():
            inner = [t for t in _types(field.annotation) if hasattr(t, "model_fields")]
            kinds += inner
            assert inner or (field.alias or name) in text, f"{kind.__name__}.{name}"
    assert len(seen) > 10


def _types(annotation: Any) -> list[Any]:
    inside = getattr(annotation, "__args__", ())
    return [annotation, *(t for part in inside for t in _types(part))]


def test_reading_and_reporting_need_no_torch() -> None:
    """Whatever the package's own `__init__` brings along."""
    package = Path(taid_vlm.__file__).parent
    code = f"""
import sys, types
sys.modules["taid_vlm"] = types.ModuleType("taid_vlm")
sys.modules["taid_vlm"].__path__ = [{str(package)!r}]
from pathlib import Path
from taid_vlm.report.run import run_report
from taid_vlm.runs.results import read_results
results = read_results(Path({str(OLD / "results.json")!r}))
run_report(results, [None] * len(results.examples), "")
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
