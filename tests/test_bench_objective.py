"""The benchmark's own measures: the floor's operations, memory, errors, and its output."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from objectives import reference as textbook
from torch.utils.flop_counter import FlopCounterMode

from taid_vlm.fused.heads import Head

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench_objective  # noqa: E402
from bench import implementations, measure, problem  # noqa: E402

KEYS = {"implementation", "objective", "dtype", "tokens", "ratio_to_floor", "peak_extra_bytes",
        "gradient_error"}
TINY = ["--tokens", "24", "--vocab", "512", "--student-hidden", "16", "--teacher-hidden", "24",
        "--repeats", "2"]
CASE = problem.Case(tokens=40, answers=10, vocab=300, student_hidden=16, teacher_hidden=24,
                    dtype=torch.float32, objective="taid")
SEVERAL = replace(CASE, memory_budget=3 * 4 * 300 * 4)  # four rows a chunk


def gradients(name, case, given):
    return measure.step(implementations.IMPLEMENTATIONS[name](case))(given)


# ----- the script -----------------------------------------------------------------------------


def test_every_row_is_there_with_its_figures_or_its_error(tmp_path, capsys):
    names = ["ours", "naive", "trl", "gkd", "liger", "liger_triton"]
    rows = bench_objective.main([
        *TINY, "--objective", "taid", "--json", str(tmp_path / "rows.json"),
        "--csv", str(tmp_path / "rows.csv"), "--plot", str(tmp_path / "rows.svg")])
    kept = json.loads((tmp_path / "rows.json").read_text())
    assert kept == rows
    assert [row["implementation"] for row in kept] == names
    assert all(set(row) >= KEYS for row in kept)
    figures = {row["implementation"]: row for row in kept if "error" not in row}
    assert set(figures) == {"ours", "naive"}  # the others have no TAID
    for row in figures.values():
        assert row["gradient_error"] < 1e-5
        assert row["ratio_to_floor"] > 0
        assert row["peak_extra_bytes"] >= row["gradient_bytes"] == 4 * 16 * (24 + 512)
        assert row["conditions"]["versions"]["torch"] == torch.__version__.split("+")[0]
    printed = capsys.readouterr().out
    assert all(name in printed for name in names) and "has no taid" in printed
    lines = list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))
    assert [line["implementation"] for line in lines] == names
    assert float(lines[0]["ratio_to_floor"]) == figures["ours"]["ratio_to_floor"]
    picture = (tmp_path / "rows.svg").read_text()
    assert "ours: " in picture and "trl: has no taid" in picture
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.csv", "rows.json", "rows.svg"]


def test_a_library_that_is_missing_is_a_row(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.trainer.distillation_trainer", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.chunked_loss", None)
    rows = bench_objective.main([*TINY, "--objective", "jsd", "--implementations",
                                 "trl,ours,liger", "--answer-fraction", "0.25", "--frozen-head"])
    assert [row["implementation"] for row in rows] == ["trl", "ours", "liger"]
    for row in (rows[0], rows[2]):
        assert row["error"].startswith("not installed") and row["ratio_to_floor"] is None
    assert rows[1]["answers"] == 6 and rows[1]["gradient_bytes"] == 4 * 16 * 24


def test_what_fails_while_timed_is_a_row_and_the_others_go_on(monkeypatch):
    def late(case):
        calls = []

        def loss(given):
            calls.append(given)
            if len(calls) > 2:
                raise MemoryError("out of memory\nwith more below")
            return implementations.naive(case)(given)

        return loss

    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "gkd", late)
    rows = bench_objective.main([*TINY, "--objective", "jsd", "--implementations", "gkd,naive"])
    assert rows[0]["error"] == "MemoryError: out of memory" and rows[0]["peak_extra_bytes"] is None
    assert rows[1]["ratio_to_floor"] > 0


def test_models_that_split_text_differently():
    rows = bench_objective.main([*TINY, "--objective", "taid,jsd", "--teacher-vocab", "700"])
    assert [row["implementation"] for row in rows] == 2 * ["ours", "all logits"]
    for row in rows:
        assert row["gradient_error"] < 1e-5
        assert 24 <= row["tokens"] < 27
        assert row["tokens_in_pieces"] < row["tokens"]
        assert row["pairs"] < row["teacher_tokens"] < row["tokens"]
        assert row["floor_flops"] == 6 * row["tokens"] * 512 * 16 + 2 * row[
            "teacher_tokens"] * 700 * 24
        assert row["ratio_to_floor"] > 0
        assert row["peak_extra_bytes"] >= row["gradient_bytes"]


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="the limit is Linux's")
def test_too_large_an_allocation_is_an_error_not_the_end():
    with measure.memory_limit("cpu"), pytest.raises(RuntimeError, match="allocate"):
        torch.empty(2**45, dtype=torch.uint8)
    torch.empty(2**20)


@pytest.mark.parametrize(("arguments", "said"), [
    (["--objective", "tiad"], "Did you mean 'taid'"),
    (["--implementations", "lieger"], "Did you mean 'liger'"),
    (["--answer-fraction", "0"], "must be in (0, 1]"),
    (["--tokens", "0"], "at least 1"),
    (["--plot", "x.jpeg"], ".svg"),
    (["--tokenizers", "/nowhere/a", "/nowhere/b"], "/nowhere/a"),
])
def test_mistakes_are_refused_before_anything_is_measured(arguments, said, capsys):
    with pytest.raises(SystemExit):
        bench_objective.main(arguments)
    assert said in capsys.readouterr().err


# ----- the measures ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", [CASE, SEVERAL, replace(CASE, frozen_head=True)])
def test_the_floor_does_what_its_formula_counts(case):
    given = problem.make_problem(case)
    floor = measure.make_floor(case, given)
    with FlopCounterMode(display=False) as counter:
        floor(given)
    assert counter.get_total_flops() == measure.floor_flops(case) == 2 * 10 * 300 * (3 * 16 + 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 4, 9, 10])
def test_the_floor_is_cut_as_our_objective_is(rows, dtype, monkeypatch):
    case = replace(CASE, dtype=dtype, memory_budget=2 * dtype.itemsize * 300 * rows)
    seen, plain = [], Head.open

    def opened(head, needs=(), chunks=1, *more, **named):
        seen.append(chunks)
        return plain(head, needs, chunks, *more, **named)

    monkeypatch.setattr(Head, "open", opened)
    gradients("ours", case, problem.make_problem(case))
    assert seen[0] == len(case.chunks()) == -(-10 // rows)
    assert sum(chunk.stop - chunk.start for chunk in case.chunks()) == 10


def test_the_memory_measure_sees_what_is_planted_in_forward_backward_and_compiled_code():
    class Planted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            torch.empty(3_000_000, dtype=torch.uint8)  # gone before the larger one
            return x.sum()

        @staticmethod
        def backward(ctx, upstream):
            torch.empty(5_000_000, dtype=torch.uint8)
            return upstream.expand(1000)

    x = torch.ones(1000, requires_grad=True)
    old = [torch.ones(10_000_000)]  # freed inside: it was there before, so it counts for nothing

    def run():
        old.clear()
        Planted.apply(x).backward()

    peak = measure.peak_extra_bytes(run, "cpu")
    assert 5_000_000 <= peak < 5_020_000

    double = torch.compile(lambda x: x.cumsum(0).cumsum(0))
    y = torch.ones(2_000_000)
    double(y)
    assert 8_000_000 <= measure.peak_extra_bytes(lambda: double(y), "cpu") < 16_100_000


def test_naive_needs_its_logits_several_times_over():
    case = replace(CASE, tokens=64, answers=64, vocab=4096)
    given = problem.make_problem(case)
    peak = measure.peak_extra_bytes(lambda: gradients("naive", case, given), "cpu")
    assert peak > 4 * 4 * 64 * 4096


@pytest.mark.parametrize("objective", sorted(implementations.FORMULAS))
def test_formulas_have_the_gradients_of_the_textbook(objective):
    torch.manual_seed(0)
    s, u = 3 * torch.randn(2, 5, 40, dtype=torch.float64)
    s.requires_grad_()
    extra = (problem.TAID_T,) if objective == "taid" else ()
    want, = torch.autograd.grad(getattr(textbook, objective)(s, u, *extra).sum(), s)
    got, = torch.autograd.grad(implementations.FORMULAS[objective](s, u).sum(), s)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["ours", "naive"])
@pytest.mark.parametrize("case", [CASE, SEVERAL], ids=["one chunk", "several"])
def test_the_reference_is_the_gradient_of_the_mean_over_answers(name, case):
    for objective in implementations.FORMULAS:
        case = replace(case, objective=objective)
        given = problem.make_problem(case)
        want = measure.reference(given, objective)
        assert want[0][~given.mask].abs().max() == 0 < want[0].abs().max()
        errors = measure.gradient_errors(gradients(name, case, given), want)
        assert errors["gradient_error"] < 1e-5, objective


def test_a_wrong_gradient_is_told():
    given = problem.make_problem(CASE)
    hidden, head = measure.reference(given, "taid")
    wrong = head.clone()
    wrong[7, 3] += 0.02 * head.abs().max()
    errors = measure.gradient_errors((hidden, wrong), (hidden, head))
    assert errors["gradient_error"] == pytest.approx(0.02)
    assert errors["gradient_error_hidden"] == 0


@pytest.mark.parametrize(("rows", "chunks"), [(200, 2), (1000, 1)])
def test_gradients_are_checked_in_several_chunks_if_that_is_what_is_timed(rows, chunks):
    case = replace(CASE, tokens=4000, answers=1000, memory_budget=2 * 4 * 300 * rows)
    small = measure.check_case(case)
    assert len(case.chunks()) == 1000 // rows and len(small.chunks()) == chunks
    part = problem.make_problem(case).first(small.answers)
    assert len(part.answers) == 64 == int(part.mask.sum())
    assert len(part.student_hidden) == small.tokens
