"""The whole-step benchmark: its rows, its reference, its measures, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import mmap
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from objectives import reference as textbook

from taid_vlm.errors import TaidError

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench_growth  # noqa: E402
import bench_held_out  # noqa: E402
import bench_step  # noqa: E402
from bench import (  # noqa: E402
    problem,
    step_floors,
    step_processes,
    step_reference,
    step_rows,
    step_setup,
    step_trainers,
    step_worker,
)

TINY = ["--scale", "tiny", "--implementations", "ours,sft", "--rounds", "2", "--steps", "1",
        "--batch-size", "2", "--sequence-length", "80"]
SETUP = step_setup.Setup(batch_size=2, sequence_length=80)
KEYS = {"implementation", "objective", "kind", "scale", "dtype", "seconds", "seconds_spread",
        "ratio_to_ours", "answer_tokens_per_second", "tokens_per_second", "peak_memory_bytes",
        "loss_error", "grad_norm_error", "differs", "parts", "conditions"}


class Inside(step_processes.Child):
    """A child in this process: the same work and the same pipe without loading everything again."""

    def __init__(self, target, *arguments):
        self.pipe, theirs = step_processes.multiprocessing.Pipe()
        self.process = self
        self.thread = threading.Thread(target=target, args=(theirs, *arguments), daemon=True)
        self.thread.start()
        self.pipe.poll(60)  # one is ready before the next begins: they share the random numbers

    def join(self, seconds=None):
        self.thread.join(seconds)

    def terminate(self):
        assert not self.thread.is_alive()


@pytest.fixture(autouse=True)
def inside(monkeypatch):
    monkeypatch.setattr(step_processes, "Child", Inside)
    monkeypatch.setattr(step_worker, "be_quiet", lambda: None)
    monkeypatch.setattr(step_worker, "memory_limit", contextlib.nullcontext)


# ----- the script -----------------------------------------------------------------------------


def test_every_row_is_there_with_its_figures(tmp_path, capsys):
    rows = bench_step.main([*TINY, "--accumulation", "2", "--json", str(tmp_path / "rows.json"),
                            "--markdown", str(tmp_path / "rows.md")])
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert [row["implementation"] for row in rows] == ["ours", "sft"]
    for row in rows:
        assert set(row) >= KEYS and "error" not in row
        assert row["loss_error"] < 1e-5 and row["grad_norm_error"] < 1e-4
        assert row["differs"] is None
        assert row["steps_timed"] == 2
        assert row["cpu_seconds"] > 0
        low, high = row["seconds_spread"]
        assert 0 < low <= row["seconds"] <= high
        assert row["tokens_per_second"] > row["answer_tokens_per_second"] > 0
        assert sum(row["parts"].values()) > 0
        assert min(row["parts"][part] for part in step_worker.PARTS) > 0
    assert rows[0]["ratio_to_ours"] == 1.0
    assert rows[0]["loss"] != pytest.approx(rows[1]["loss"])
    page = (tmp_path / "rows.md").read_text()
    assert "## forward_kl, text, tiny, float32" in page and "| ours | " in page
    assert "no teacher" in capsys.readouterr().out


def test_a_pair_that_sees_images_is_trained_on_them():
    rows = bench_step.main([*TINY, "--kind", "vlm", "--objective", "taid"])
    assert all(row["loss_error"] < 1e-5 and row["differs"] is None for row in rows)
    assert rows[0]["tokens"] > 2 * 64  # image tokens are counted


def test_a_step_that_trains_on_something_else_is_told_and_what_cannot_run_is_a_row(monkeypatch):
    def refused(*arguments):
        raise ValueError("one family only\nwith more below")

    def other(setup, *rest):
        return step_trainers.ours_reference(replace(setup, objective="reverse_kl"), *rest)

    monkeypatch.setitem(step_trainers.TRAINERS, "trl_gkd", refused)
    monkeypatch.setitem(step_trainers.TRAINERS, "trl_gold", other)
    rows = bench_step.main([*TINY, "--implementations", "trl_gkd,trl_gold", "--rounds", "1"])
    assert rows[0]["error"] == "ValueError: one family only"
    assert rows[1]["seconds"] > 0 and rows[1]["ratio_to_ours"] is None
    assert "its loss is" in rows[1]["differs"] and "its gradient's norm" in rows[1]["differs"]


def test_trl_has_its_own_losses_only():
    rows = bench_step.main([*TINY, "--objective", "taid", "--implementations",
                            "trl_gkd,trl_gold,trl_distillation"])
    assert [row["error"] for row in rows] == ["has no taid"] * 3


@pytest.mark.parametrize("name", ["trl_gkd", "trl_gold", "trl_distillation"])
def test_trl_trains_on_the_same(name):
    pytest.importorskip("trl")
    row, = bench_step.main([*TINY, "--objective", "jsd", "--implementations", name])
    assert row["loss_error"] < 1e-4 and row["seconds"] > 0


@pytest.mark.parametrize(("arguments", "said"), [
    (["--objective", "tiad"], "Did you mean 'taid'"),
    (["--implementations", "trl_gkt"], "Did you mean 'trl_gkd'"),
    (["--answer-fraction", "1"], "must be in (0, 1)"),
    (["--student", "x"], "--student and --teacher go together"),
    (["--student", "x", "--teacher", "y", "--layers", "2"], "--layers"),
    (["--rounds", "0"], "at least 1"),
])
def test_mistakes_are_refused_before_anything_is_measured(arguments, said, capsys):
    with pytest.raises(SystemExit):
        bench_step.main(arguments)
    assert said in capsys.readouterr().err


def test_a_pair_that_is_not_there_is_one_message(tmp_path):
    with pytest.raises(TaidError, match=r"the pair could not be made: .*nowhere"):
        bench_step.main([*TINY, "--student", str(tmp_path / "nowhere"), "--teacher", "x"])


# ----- processes ------------------------------------------------------------------------------


def test_a_process_that_ends_says_so(monkeypatch):
    monkeypatch.undo()
    child = step_processes.Child(bool)  # returns at once
    assert child.receive() == {"error": "its process ended with exit code 0"}
    assert child.ask("steps", 1) == {"error": "its process ended with exit code 0"}
    child.end()


def test_every_round_begins_with_another(monkeypatch):
    turns = []

    def ready(pipe, setup, name, steps):
        pipe.send({"name": name, "steps": steps})
        while (order := pipe.recv())[0] != "end":
            if order[0] == "steps":
                turns.append(name)
            pipe.send({"seconds": [1.0], "cpu_seconds": [0.5]} if order[0] == "steps"
                      else {"parts": {}})

    monkeypatch.setattr(step_processes, "work", ready)
    found = step_processes.run_all(SETUP, ["a", "b", "c"], rounds=3, steps=1)
    assert turns == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert found["b"] == {"name": "b", "steps": 4, "seconds": [[1.0]] * 3,
                          "cpu_seconds": [[0.5]] * 3, "parts": {}}
    turns.clear()
    step_processes.run_all(SETUP, ["a", "b"], rounds=2, steps=1, together=False)
    assert turns == ["a", "a", "b", "b"]


# ----- what is trained on ---------------------------------------------------------------------


@pytest.mark.parametrize("name", bench_step.OBJECTIVES)
def test_the_references_formulas_are_the_textbooks(name):
    torch.manual_seed(0)
    s, u = 3 * torch.randn(2, 5, 40, dtype=torch.float64)
    extra = (problem.TAID_T,) if name == "taid" else ()
    got = step_reference.FORMULAS[name](s, u, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(got, getattr(textbook, name)(s, u, *extra), rtol=1e-9, atol=1e-12)


def test_rows_are_as_long_as_asked_and_the_same_everywhere():
    setup = replace(SETUP, batch_size=5, answer_fraction=0.5, sequence_length=200)
    pair, again = step_setup.make_pair(setup), step_setup.make_pair(setup)
    assert pair.rows == again.rows
    for role, model in pair.models.items():
        for one, other in zip(model.parameters(), again.models[role].parameters(), strict=True):
            assert torch.equal(one, other)
    processor = pair.processors["student"]
    encoded = [step_rows.encode_alone(processor, row) for row in pair.rows]
    lengths = [inputs["input_ids"].shape[1] for inputs, _ in encoded]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == pytest.approx(200, abs=10) and lengths[-1] == pytest.approx(150, abs=10)
    assert len(encoded[0][1]) == pytest.approx(100, abs=5)
    answers, tokens = step_rows.count_tokens(processor, pair.rows)
    assert tokens == sum(lengths) and answers == sum(len(answer) for _, answer in encoded)


def test_a_lengthened_tokenizer_reads_texts_as_before():
    processor = step_setup.make_pair(SETUP, ()).processors["student"]
    longer = step_setup.lengthened(processor, 1500)
    assert len(processor) == 1024 and len(longer) == 1500
    text = "<user>a red ball, ~600~ ok<bot>yes</s>"
    assert longer(text)["input_ids"] == processor(text)["input_ids"]


# ----- memory ---------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_the_peak_is_of_what_came_after_and_is_gone_again():
    memory = step_worker.PeakMemory("cpu")
    with pages(100_000_000):
        assert memory.peak() > 95_000_000
    memory.restart()
    assert memory.peak() < 50_000_000
    with pages(60_000_000):
        assert 55_000_000 < memory.peak() < 95_000_000


@contextlib.contextmanager
def pages(size):
    """New memory from the system, whatever malloc has kept, and back to it."""
    with mmap.mmap(-1, size) as memory:
        filled = np.frombuffer(memory, np.uint8)
        filled[:] = 1
        yield
        del filled


def test_parts_count_what_is_outermost_and_only_while_on():
    parts = step_worker.Parts("cpu")
    inner = parts.timed("batch", lambda: time.sleep(0.01))
    outer = parts.timed("loss", inner)
    outer()
    assert not parts.seconds
    parts.on = True
    outer()
    inner()
    assert parts.seconds["loss"] >= 0.01 and 0.01 <= parts.seconds["batch"] < 0.1
    with pytest.raises(ZeroDivisionError):
        parts.timed("loss", lambda: 1 / 0)()
    inner()
    assert parts.seconds["batch"] >= 0.02


@pytest.mark.parametrize("kind", ["text", "vlm"])
def test_a_whole_step_against_its_floors(kind, capsys):
    rows = bench_step.main(["--floors", "--scale", "tiny", "--kind", kind, "--rounds", "2",
                       "--batch-size", "2", "--dtype", "bfloat16", "--threads", "1"])
    (row,) = rows
    floors = sum(row["parts"][name] for name in ("trunk", "teacher", "products", "optimizer"))
    assert floors > 0
    assert row["ratio_to_floor"] > 0.5 < row["ratio_to_parts"]
    assert "| x floor |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench_step.main(["--floors", "--accumulation", "2"])


def test_what_grows_is_measured_in_processes_of_its_own(monkeypatch, tmp_path, capsys):
    """The children's work in this process: loading everything again takes seconds a point."""
    monkeypatch.setattr(bench_growth, "measure", lambda axis, point, rounds, threads: {
        **step_floors.floors_of(point.setup, rounds)[0], "axis": axis, "title": point.title})
    axes = bench_growth.axes("tiny")
    monkeypatch.setattr(bench_growth, "axes", lambda scale: {
        "vocabulary": [replace(axes["vocabulary"][0], setup=replace(
            axes["vocabulary"][0].setup, vocab=rows, sequence_length=96)) for rows in (1024, 4096)],
        "images": axes["images"][1:3]})
    rows = bench_growth.main(["--scale", "tiny", "--rounds", "1", "--axes", "vocabulary,images",
                              "--markdown", str(tmp_path / "growth.md")])
    small, large, one, two = rows
    assert large["parts"]["products"] > small["parts"]["products"]
    assert small["step_memory_bytes"] >= 0  # what this process has kept from before is not in it
    assert one["answer_tokens"] == two["answer_tokens"]
    assert (tmp_path / "growth.md").read_text().count("| what grows |") == 2
    with pytest.raises(SystemExit):
        bench_growth.main(["--axes", "image"])
    assert "Did you mean 'images'" in capsys.readouterr().err


def test_held_out_figures_and_canary_against_forward_passes(tmp_path, monkeypatch, capsys):
    """The forward passes are those that the evaluation and the canary make."""
    monkeypatch.setattr(bench_held_out, "be_quiet", lambda: None)  # it holds for a process
    calls = {"student": 0, "canary": 0}
    monkeypatch.setattr(bench_held_out, "student_forward", counted(
        calls, "student", bench_held_out.student_forward))
    monkeypatch.setattr(bench_held_out.canary, "answer_logits", counted(
        calls, "canary", bench_held_out.canary.answer_logits))
    rows = bench_held_out.main([
        "--scale", "tiny", "--kinds", "vlm", "--dtypes", "mixed", "--records", "3", "--rounds",
        "2", "--sequence-length", "90", "--json", str(tmp_path / "a.json"),
        "--markdown", str(tmp_path / "a.md")])
    assert [row["what"] for row in rows] == ["evaluation", "canary"]
    assert len({row["answer_tokens"] for row in rows}) == 1  # every answer follows an image
    assert calls == {"student": 3, "canary": 3 * (1 + 2 * 3)}  # three pictures of one batch
    for row in rows:
        assert row["ratio_spread"][0] <= row["ratio"] <= row["ratio_spread"][1]
        assert row["forward_cpu_seconds"] > 0
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads(json.dumps(rows))
    assert (tmp_path / "a.md").read_text().count("| vlm, tiny, mixed |") == 2
    assert "x forward" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench_held_out.main(["--dtypes", "float16"])


def counted(calls, name, function):
    def call(*arguments):
        calls[name] += 1
        return function(*arguments)
    return call
