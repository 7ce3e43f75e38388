"""`taid-vlm plan`: what it counts, what it says, and what it advises."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.recipes import Checkpoints, Outcome, pairs, picture_rows, write_jsonl, write_recipe
from plan.models import write_pair
from torch._subclasses.fake_tensor import DataDependentOutputException

from taid_vlm.config.model import ModelSpec
from taid_vlm.config.recipe import Recipe, load_recipe, parse_recipe
from taid_vlm.errors import TaidError
from taid_vlm.plan import ledger as kinds
from taid_vlm.plan.advice import EIGHT_BIT, advise
from taid_vlm.plan.plan import (
    COUNTED,
    ESTIMATED,
    EVALUATION,
    GPU_PROCESS,
    STEP,
    UPDATE,
    Plan,
    plan_recipe,
)
from taid_vlm.plan.shapes import Shapes, model_of_shapes
from taid_vlm.plan.text import as_text, human
from taid_vlm.training.loss import FusedStep

Cli = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan reads configurations and processors only."""
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("safetensors.safe_open", refuse)
    monkeypatch.setattr("taid_vlm.models.loading.load_model", refuse)


def sizes(plan: Plan) -> dict[str, int]:
    return {part.name: part.most for part in plan.components}


def small(folder: Path, checkpoints: Checkpoints, **train: Any) -> dict[str, Any]:
    data = write_jsonl(folder / "train.jsonl", pairs(8))
    return {"teacher": checkpoints("llama"), "student": checkpoints("qwen2", seed=1),
            "data": {"train": str(data)}, "output_dir": str(folder / "out"),
            "train": {"per_device_train_batch_size": 4, **train}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, checkpoints: Checkpoints) -> Plan:
    """The plan of `small` as it is."""
    return plan_recipe(parse_recipe(small(tmp_path_factory.mktemp("base"), checkpoints)))[0]


def numel(checkpoints: Checkpoints, family: str, seed: int = 0) -> int:
    model = model_of_shapes(ModelSpec(checkpoints(family, seed=seed)), "student", Shapes())
    return sum(p.numel() for p in model.parameters())


# ----- what is counted ----------------------------------------------------------------------


def test_parameters_gradients_and_states(base: Plan, checkpoints: Checkpoints) -> None:
    found, count = sizes(base), numel(checkpoints, "qwen2", seed=1)
    assert found[kinds.GRADIENTS] == 4 * count
    assert found[kinds.OPTIMIZER] == 8 * count
    for kind, expected in ((kinds.STUDENT, count), (kinds.TEACHER, numel(checkpoints, "llama"))):
        assert 4 * expected <= found[kind] < 4 * expected + 1000  # buffers of the positions
    assert base.peak >= GPU_PROCESS
    assert base.peak == sum(part.at_peak for part in base.components) == max(base.phases.values())


def test_what_stays_frozen_has_no_gradient(tmp_path: Path, checkpoints: Checkpoints) -> None:
    tree = small(tmp_path, checkpoints)
    tree["student"] = {"model_name_or_path": tree["student"],
                       "peft": {"r": 2, "target_modules": ["q_proj"]}}
    found = sizes(plan_recipe(parse_recipe(tree))[0])
    assert found[kinds.GRADIENTS] == 4 * 2 * (2 * (32 + 32))  # rank 2 in both layers, A and B
    assert found[kinds.OPTIMIZER] == 2 * found[kinds.GRADIENTS]


def test_more_processes_keep_buckets(
    base: Plan, tmp_path: Path, checkpoints: Checkpoints
) -> None:
    four = plan_recipe(parse_recipe(small(tmp_path, checkpoints)), processes=4)[0]
    assert sizes(four)[kinds.BUCKETS] == sizes(base)[kinds.GRADIENTS]
    assert kinds.BUCKETS not in sizes(base)


def test_a_sharded_student_is_counted_as_it_lies(
    base: Plan, tmp_path: Path, checkpoints: Checkpoints
) -> None:
    whole, tree = sizes(base), small(tmp_path, checkpoints, fsdp=True)
    four = plan_recipe(parse_recipe(tree), processes=4)[0]
    spread = sizes(four)
    for kind in (kinds.GRADIENTS, kinds.OPTIMIZER):
        assert spread[kind] == pytest.approx(whole[kind] / 4, rel=0.02)
    buffers = whole[kinds.STUDENT] - whole[kinds.GRADIENTS]
    assert spread[kinds.STUDENT] - buffers == pytest.approx(whole[kinds.GRADIENTS] / 4, rel=0.02)
    assert kinds.BUCKETS not in spread
    assert spread[kinds.TEACHER] == whole[kinds.TEACHER]
    assert 0 < spread[kinds.GATHERED] <= 2 * whole[kinds.GRADIENTS]
    how = {part.name: part.how for part in four.components}
    assert how[kinds.GRADIENTS] == COUNTED and how[kinds.GATHERED] == ESTIMATED
    assert four.peak == sum(part.at_peak for part in four.components) == max(four.phases.values())
    assert "shards" not in " ".join(four.notes)
    alone = plan_recipe(parse_recipe(tree))[0]
    assert sizes(alone) == whole and "--processes" in " ".join(alone.notes)


def test_what_sharding_takes_beside_shares_is_named(
    tmp_path: Path, checkpoints: Checkpoints
) -> None:
    tree = small(tmp_path, checkpoints, fsdp=True, fsdp_config={"cpu_offload": True},
                 gradient_accumulation_steps=2, bf16=True)
    plan = plan_recipe(parse_recipe(tree), processes=2)[0]
    notes = " ".join(plan.notes)
    assert "sync_each_batch" in notes and "memory of the host" in notes
    assert kinds.CASTS not in sizes(plan)
    zero = small(tmp_path, checkpoints, deepspeed={"zero_optimization": {"stage": 2}})
    two = plan_recipe(parse_recipe(zero), processes=2)[0]
    assert sizes(two)[kinds.OPTIMIZER] == pytest.approx(1.5 * sizes(two)[kinds.STUDENT], rel=0.02)
    assert {part.how for part in two.components if part.name == kinds.OPTIMIZER} == {ESTIMATED}


def test_a_teacher_in_half_precision(
    base: Plan, tmp_path: Path, checkpoints: Checkpoints
) -> None:
    tree, full = small(tmp_path, checkpoints), sizes(base)[kinds.TEACHER]
    tree["teacher"] = {"model_name_or_path": tree["teacher"], "dtype": "bfloat16"}
    half = sizes(plan_recipe(parse_recipe(tree))[0])[kinds.TEACHER]
    assert half == pytest.approx(full / 2, rel=0.01)


def test_evaluation_has_a_peak_of_its_own(tmp_path: Path, checkpoints: Checkpoints) -> None:
    tree = small(tmp_path, checkpoints)
    tree["data"]["eval"] = tree["data"]["train"]
    peaks = []
    for size in (1, 8):
        tree["train"]["per_device_eval_batch_size"] = size
        peaks.append(plan_recipe(parse_recipe(tree))[0].phases)
    assert peaks[0]["evaluation"] < peaks[1]["evaluation"]
    assert peaks[0]["training step"] == peaks[1]["training step"]


def test_room_for_logits_is_kept_on_a_cpu(tmp_path: Path, checkpoints: Checkpoints) -> None:
    """It lies there while an optimizer steps, too; an evaluation works in it."""
    def phases(implementation: str, **train: Any) -> Any:
        tree = small(tmp_path, checkpoints, loss_implementation=implementation, **train)
        tree["data"]["eval"] = tree["data"]["train"]
        return plan_recipe(parse_recipe(tree))[0].phases

    fused, reference = (phases(name, use_cpu=True) for name in ("fused", "reference"))
    assert fused[UPDATE] > reference[UPDATE] + 10_000
    little = phases("fused", use_cpu=True, loss_memory_budget=50_000)
    assert little[EVALUATION] < reference[EVALUATION] - 500_000
    fused, reference = (phases(name) for name in ("fused", "reference"))
    assert fused[UPDATE] == reference[UPDATE]


def test_every_stage_has_a_plan(tmp_path: Path, checkpoints: Checkpoints) -> None:
    tree = small(tmp_path, checkpoints) | {"stages": [
        {"name": "head", "train": {"freeze": ["language_model"]}}, {"name": "all"}]}
    first, second = plan_recipe(parse_recipe(tree))
    assert (first.stage, second.stage) == ("head", "all")
    assert sizes(first)[kinds.GRADIENTS] < sizes(second)[kinds.GRADIENTS]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "internvl", "gemma3"])
def test_families_whose_shapes_depend_on_values(
    family: str, tmp_path: Path, checkpoints: Checkpoints
) -> None:
    """Grids, masks and tiles are looked at in their forward."""
    data = write_jsonl(tmp_path / "train.jsonl", picture_rows(tmp_path, 2))
    plan = plan_recipe(parse_recipe({
        "student": checkpoints(family), "data": {"train": str(data)}, "objective": "ce",
        "output_dir": str(tmp_path / "out")}))[0]
    assert not plan.notes
    assert plan.batch.image_tokens["student"] > 0
    assert sizes(plan)[kinds.STUDENT_TOWER] > 0


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "falcon_h1", "lfm2"])
def test_experts_and_states_are_rehearsed(
    family: str, tmp_path: Path, checkpoints: Checkpoints
) -> None:
    data = write_jsonl(tmp_path / "train.jsonl", [
        {"prompt": "what is this", "completion": f"a red square {i}"} for i in range(4)])
    plan = plan_recipe(parse_recipe({
        "student": checkpoints(family), "data": {"train": str(data)}, "objective": "ce",
        "train": {"bf16": True}, "output_dir": str(tmp_path / "out")}))[0]
    assert not plan.notes
    assert sizes(plan)[kinds.STUDENT_LANGUAGE] > 0
    assert bool(plan.experts) == (family not in ("falcon_h1", "lfm2"))
    if plan.experts:
        experts = plan.experts["student"]
        assert experts.per_token < experts.parameters
        assert f"a token passes {experts.per_token:,} (2 of " in as_text([plan])


def test_a_model_that_cannot_be_rehearsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(write_pair(tmp_path, words=40))
    rehearsed = plan_recipe(recipe)[0]

    def refuse(*args: Any) -> None:
        raise DataDependentOutputException(torch.ops.aten.item.default)

    monkeypatch.setattr("taid_vlm.plan.plan.rehearse_training", refuse)
    plan = plan_recipe(recipe)[0]
    assert "DataDependentOutputException" in plan.notes[0]
    how = {part.name: part.how for part in plan.components}
    assert how[kinds.STUDENT_LANGUAGE] == how[kinds.LOSS] == ESTIMATED
    ratio = sizes(plan)[kinds.STUDENT_LANGUAGE] / sizes(rehearsed)[kinds.STUDENT_LANGUAGE]
    assert 0.5 < ratio < 2


# ----- what is said -------------------------------------------------------------------------


def test_the_command(cli: Cli, tmp_path: Path, checkpoints: Checkpoints) -> None:
    path = write_recipe(tmp_path, small(tmp_path, checkpoints))
    done = cli("plan", path, "--memory", "24GB")
    assert done.status == 0, done.err
    assert "fits in 24.0 GB" in done.out and "DOES NOT" not in done.out
    for name, how in ((kinds.STUDENT, "counted"), (kinds.STUDENT_LANGUAGE, "rehearsed"),
                      (kinds.OVERHEAD, "estimated")):
        line = next(line for line in done.out.splitlines() if line.startswith(name))
        assert line.endswith(how)
    assert not (tmp_path / "out").exists()


def test_json(cli: Cli, tmp_path: Path, checkpoints: Checkpoints) -> None:
    path = write_recipe(tmp_path, small(tmp_path, checkpoints))
    done = cli("plan", path, "train.per_device_train_batch_size=2", "--json")
    told = json.loads(done.out)
    assert told["peak"] == told["stages"][0]["peak"]
    assert told["stages"][0]["batch"]["rows"] == 2
    assert told["advice"] is None


@pytest.mark.parametrize(("options", "named"), [
    (["--memory", "24 apples"], "--memory = '24 apples'"),
    (["--processes", "0"], "--processes = 0"),
    (["train.freeze=[tower]"], "freeze: this student has no 'tower'"),
])
def test_mistakes(
    options: list[str], named: str, cli: Cli, tmp_path: Path, checkpoints: Checkpoints
) -> None:
    done = cli("plan", write_recipe(tmp_path, small(tmp_path, checkpoints)), *options)
    assert done.status == 2
    assert len(done.errors) == 1 and named in done.errors[0]


def test_what_a_plan_leaves_out_is_named(tmp_path: Path, checkpoints: Checkpoints) -> None:
    recipe = parse_recipe(small(tmp_path, checkpoints, torch_compile=True, optim="galore_adamw"))
    notes = " ".join(plan_recipe(recipe)[0].notes)
    assert "torch_compile" in notes and "galore_adamw" in notes


# ----- what is advised ----------------------------------------------------------------------


def test_overrides_can_be_pasted(cli: Cli, tmp_path: Path, checkpoints: Checkpoints) -> None:
    tree = small(tmp_path, checkpoints, per_device_train_batch_size=2, bf16=True, use_cpu=True,
                 gradient_checkpointing=True, freeze=["language_model"],
                 loss_implementation="reference")
    tree["teacher"] = {"model_name_or_path": tree["teacher"], "dtype": "bfloat16"}
    path = write_recipe(tmp_path, tree)
    before = json.loads(cli("plan", path, "--json").out)["peak"]
    done = cli("plan", path, "--memory", str(before - 1))
    assert done.status == 2
    assert "this recipe needs" in done.errors[0]
    said, pasted = done.out.split("what to change")[1].splitlines()[1:3]
    after = json.loads(cli("plan", path, *shlex.split(pasted), "--json").out)["peak"]
    assert after < before
    assert f"{human(before - after)} less" in said


class Sums:
    """In place of plans: a sum that every change takes something from."""

    def __init__(self, base: Plan) -> None:
        self.base, self.asked = base, 0

    def __call__(self, recipe: Recipe, processes: int = 1, seen: Any = None) -> list[Plan]:
        self.asked += 1
        train = recipe.train
        peak = 100 + 10 * train["per_device_train_batch_size"]
        peak += 50 * (not train.get("gradient_checkpointing")) + 5 * (not train.get("bf16"))
        if train.get("optim") == EIGHT_BIT:
            raise TaidError("bitsandbytes is not here")
        return [replace(self.base, peak=peak + 8 * (recipe.student.peft is None))]


@pytest.fixture
def sums(base: Plan, monkeypatch: pytest.MonkeyPatch) -> Sums:
    found = Sums(base)
    monkeypatch.setattr("taid_vlm.plan.advice.plan_recipe", found)
    return found


def test_changes_are_ranked(sums: Sums, tmp_path: Path, checkpoints: Checkpoints) -> None:
    """Without any: 100 + 4 x 10 + 50 + 5 + 8 = 203."""
    path = write_recipe(tmp_path, small(tmp_path, checkpoints))

    def reload(more: Sequence[str]) -> Recipe:
        return load_recipe(path, more)

    plans = sums(reload(()))
    assert plans[0].peak == 203
    assert advise(reload, plans, 203).fits
    advice = advise(reload, plans, 185)
    assert [change.peak for change in advice.changes] == [153, 183, 195, 198]
    assert "micro-batches of 2" in advice.changes[1].what  # the largest that fits
    assert advice.together is None  # one of them is enough
    told = reload(advice.changes[1].overrides).train
    assert told["per_device_train_batch_size"] * told["gradient_accumulation_steps"] == 4


def test_several_changes_together(
    sums: Sums, tmp_path: Path, checkpoints: Checkpoints
) -> None:
    path = write_recipe(tmp_path, small(tmp_path, checkpoints))

    def reload(more: Sequence[str]) -> Recipe:
        return load_recipe(path, more)

    advice = advise(reload, sums(reload(())), 120)
    assert advice.together is not None
    assert advice.together.peak == 100 + 10 + 8
    assert sums(reload(advice.together.overrides))[0].peak == 118
    assert "student.peft" not in " ".join(advice.together.overrides)  # it is not needed
    asked, told = sums.asked, list[str]()
    assert advise(reload, sums(reload(())), 50, tell=told.append).together is None
    assert sums.asked - asked == 1 + len(told)  # nothing is planned twice, or without a word
    batches = [what for what in told if what.startswith("micro-batches")]
    assert set(batches) == {"micro-batches of 1, as many records per step"}  # 2 cannot fit then


def test_a_large_adapter_needs_no_values(tmp_path: Path) -> None:
    """One that is large enough to be made without values, as those of real models are."""
    text = {"hidden_size": 512, "intermediate_size": 2048}
    path = write_pair(tmp_path, words=5, number=2, text=text,
                      student={"peft": {"r": 64, "target_modules": ["down_proj"]}})
    found = sizes(plan_recipe(load_recipe(path))[0])
    assert found[kinds.GRADIENTS] == 4 * 4 * 64 * (2048 + 512)  # rank 64 in four layers, A and B


def test_figures_of_two_chunks_stand_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_pair(tmp_path, words=20, number=4, text={"vocab_size": 4096}, train={
        "loss_implementation": "fused", "loss_memory_budget": 3 * 2**20,
        "gradient_accumulation_steps": 2})
    few = plan_recipe(load_recipe(path))[0]
    monkeypatch.setattr("taid_vlm.plan.rehearsal._FewFigures", FusedStep)
    assert plan_recipe(load_recipe(path))[0].peak == pytest.approx(few.peak, rel=1e-4)


def test_sampled_answers_are_as_long_as_they_may_be(
    tmp_path: Path, checkpoints: Checkpoints
) -> None:
    """After the longest prompt, where that is longer than references; too long ones are not asked.
    """
    def planned(**train: Any) -> dict[int, Plan]:
        tree = small(tmp_path, checkpoints, **train)
        return {number: plan_recipe(parse_recipe({**tree, "objective": {
            "name": "taid", "on_policy": {"max_new_tokens": number}}}))[0] for number in (1, 200)}

    few, many = planned().values()
    prompt = few.batch.tokens["student"] - few.batch.answer_tokens // few.batch.rows
    assert 200 < many.batch.tokens["student"] <= prompt + 200
    assert many.batch.answer_tokens >= 4 * 100
    assert many.phases[STEP] > few.phases[STEP]
    assert planned(max_length=150)[200].batch == few.batch


def test_no_usable_record(tmp_path: Path, checkpoints: Checkpoints) -> None:
    tree = small(tmp_path, checkpoints, max_length=4)
    with pytest.raises(TaidError, match="can be used"):
        plan_recipe(parse_recipe(tree))


def test_a_batch_by_tokens_is_as_many_of_the_longest_as_it_holds(
    tmp_path: Path, checkpoints: Checkpoints
) -> None:
    by_rows = small(tmp_path, checkpoints, per_device_train_batch_size=3)
    rows = plan_recipe(parse_recipe(by_rows))[0]
    longest = max(rows.batch.tokens.values())
    by_tokens = small(tmp_path, checkpoints, tokens_per_batch=3 * longest + 1, packing=True)
    del by_tokens["train"]["per_device_train_batch_size"]
    found = plan_recipe(parse_recipe(by_tokens))[0]
    assert found.batch.rows == 3
    assert sizes(found) == sizes(rows)
