"""What cannot work or has no effect is refused before any weights are loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.recipes import Checkpoints, Outcome, pairs, write_jsonl, write_recipe

Cli = Callable[..., Outcome]
EVALUATED = ["train.eval_strategy=steps", "train.eval_steps=1"]


@pytest.fixture
def recipe(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    return write_recipe(tmp_path, {
        "teacher": checkpoints("llama"), "student": checkpoints("qwen2", seed=1),
        "data": {side: str(write_jsonl(tmp_path / f"{side}.jsonl", pairs(number, number)))
                 for side, number in (("train", 8), ("eval", 4))},
        "train": {"max_steps": 2, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"},
        "evaluate": {"examples": 0}, "output_dir": str(tmp_path / "out"),
    })


REFUSED: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "unknown tracker": (["train.report_to=tensorbord"],
                        ("train.report_to = 'tensorbord'", "Did you mean 'tensorboard'?")),
    "length grouping": (["train.train_sampling_strategy=group_by_length"],
                        ("train_sampling_strategy = 'group_by_length'", "lengths", "sequential")),
    "unknown metric": ([*EVALUATED, "train.metric_for_best_model=nonsense"],
                       ("metric_for_best_model = 'nonsense'", "Valid: agreement")),
    "mistyped metric": ([*EVALUATED, "train.metric_for_best_model=reverse_kll"],
                        ("Did you mean 'reverse_kl'?",)),
    "chunks of a pair without": ([*EVALUATED, "train.metric_for_best_model=chunk_kl"],
                                 ("metric_for_best_model = 'chunk_kl'", "split texts alike",
                                  "Did you mean 'kl'?")),
    "spikes without a factor": (["train.spike_window=5"],
                                ("train.spike_window = 5 has no effect", "train.spike_factor")),
    "no factor of a spike": (["train.spike_factor=1"],
                             ("train.spike_factor = 1", "a number above 1")),
    "metric without evaluation": (["train.metric_for_best_model=kl"],
                                  ("metric_for_best_model = 'kl' has no effect", "eval_strategy")),
    "the best of nothing": ([*EVALUATED, "train.save_strategy=best"],
                            ("train.save_strategy = 'best'", "metric_for_best_model")),
    "best model without evaluation": (["train.load_best_model_at_end=true",
                                       "train.save_strategy=steps"],
                                      ("train: --load_best_model_at_end",)),
    "upload without a hub": (["train.push_to_hub=true"], ("train.push_to_hub", "HF_HUB_OFFLINE")),
    "upload's name alone": (["train.hub_model_id=me/mine"],
                            ("train.hub_model_id has no effect without train.push_to_hub",)),
    "upload's token alone": (["train.hub_token=hf_abcdefghijklmnop"],
                             ("train.hub_token has no effect without train.push_to_hub",)),
    "learning rate": (["train.learning_rate=-1"], ("train.learning_rate = -1", "at least 0")),
    "weight decay": (["train.weight_decay=-1"], ("train.weight_decay = -1", "at least 0")),
    "gradient norm": (["train.max_grad_norm=-1"], ("train.max_grad_norm = -1", "at least 0")),
    "no steps": (["train.max_steps=0"], ("train.max_steps = 0", "at least 1")),
    "no epochs": (["train.num_train_epochs=-1"], ("train.num_train_epochs = -1",)),
    "negative seed": (["train.seed=-1"], ("train.seed = -1", "at least 0")),
    "keep none": (["train.save_total_limit=0"], ("train.save_total_limit = 0", "at least 1")),
    "negative log": (["train.logging_steps=-1"], ("train.logging_steps = -1",)),
    "betas": (["train.adam_beta1=2"], ("train.optim = 'adamw_torch_fused' cannot work", "beta")),
    "unknown schedule": (["train.lr_scheduler_type=cosin"], ("train: cosin is not a valid",)),
    "schedule without its arguments": (
        ["train.lr_scheduler_type=warmup_stable_decay"],
        ("train.lr_scheduler_type = 'warmup_stable_decay' cannot work", "num_decay_steps")),
    "wrong arguments of a schedule": (
        ["train.lr_scheduler_type=cosine", "train.lr_scheduler_kwargs={a: 1}"],
        ("train.lr_scheduler_kwargs = {'a': 1} cannot work", "'a'")),
    "argument that fails later": (
        ["train.lr_scheduler_type=cosine", "train.lr_scheduler_kwargs={num_cycles: x}"],
        ("train.lr_scheduler_kwargs = {'num_cycles': 'x'} cannot work",)),
    "constant with warmup": (["train.lr_scheduler_type=constant", "train.warmup_steps=1"],
                             ("train.warmup_steps = 1", "constant_with_warmup")),
    "arguments of another optimizer": (["train.optim_args=a=1"],
                                       ("train.optim_args = 'a=1' has no effect",)),
    "modules of another optimizer": (["train.optim_target_modules=[q_proj]"],
                                     ("train.optim_target_modules", "has no effect")),
    "deepspeed's file": (["train.deepspeed=nowhere.json"],
                         ("train.deepspeed = 'nowhere.json' is no file",)),
    "fsdp's file": (["train.fsdp=full_shard", "train.fsdp_config=nowhere.json"],
                    ("train.fsdp_config = 'nowhere.json' is no file",)),
    "accelerate's file": (["train.accelerator_config=nowhere.json"],
                          ("train.accelerator_config = 'nowhere.json' is no file",)),
    "fsdp in one process": (["train.fsdp=full_shard"], ("train.fsdp", "accelerate launch")),
    "fsdp's arguments alone": (["train.fsdp_config={min_num_params: 1}"],
                               ("train.fsdp_config", "no effect without train.fsdp")),
    "float16": (["train.fp16=true"], ("train.fp16 = True needs a GPU", "bf16")),
    "half evaluation": (["train.bf16_full_eval=true"], ("train.bf16_full_eval has no effect",)),
    "half evaluation, too": (["train.fp16_full_eval=true"], ("fp16_full_eval has no effect",)),
    "cut batches": (["train.accelerator_config={split_batches: true}"],
                    ("train.accelerator_config.split_batches = True",)),
    "dispatched batches": (["train.accelerator_config={dispatch_batches: true}"],
                           ("train.accelerator_config.dispatch_batches = True",)),
    "tf32": (["train.tf32=true"], ("train: --tf32 requires",)),
    "batch size by trial": (["train.auto_find_batch_size=true"],
                            ("train.auto_find_batch_size", "taid-vlm plan")),
    "counted inputs": (["train.include_num_input_tokens_seen=true"], ("has no effect",)),
    "evaluation steps alone": (["train.eval_steps=1"],
                               ("train.eval_steps = 1 has no effect", "eval_strategy: steps")),
    "recomputation's arguments alone": (
        ["train.gradient_checkpointing_kwargs={use_reentrant: false}"],
        ("train.gradient_checkpointing_kwargs", "no effect without train.gradient_checkpointing")),
    "evaluation at the start, of nothing": (["train.eval_on_start=true", "data.eval=null"],
                                            ("train.eval_on_start", "data.eval")),
    "workers that stay": (["train.dataloader_persistent_workers=true"],
                          ("train.dataloader_num_workers = 0", "persistent_workers")),
    "compiled around the fused loss": (["train.torch_compile=true"],
                                       ("train.torch_compile = True", "reference")),
    "a sharded teacher in one process": (
        ["teacher.sharding=fsdp"], ("teacher.sharding = 'fsdp'", "accelerate launch")),
    "a teacher sharded in no known way": (
        ["teacher.sharding=zero3"], ("teacher.sharding = 'zero3'", "fsdp")),
    "a teacher in two places": (
        ["teacher.sharding=fsdp", "teacher.devices=cpu"], ("teacher.sharding", "devices")),
    "a teacher placed twice": (
        ["teacher.devices=cpu", "teacher.init_kwargs={device_map: auto}"],
        ("teacher.devices = 'cpu'", "init_kwargs.device_map = 'auto'")),
    "a teacher on devices that are not there": (
        ["teacher.devices=[97]"], ("teacher.devices = [97]", "this machine has")),
    "parallelism": (["train.parallelism_config={tp_size: 2}"], ("train.parallelism_config",)),
    "an adapter on nothing": (["student.peft={r: 4, target_modules: [nope]}"],
                              ("student.peft", "nope")),
    "an unknown key of an adapter": (["student.peft={rank: 4}"], ("student.peft", "'r'")),
}
if importlib.util.find_spec("tensorboard") is None:
    REFUSED["a tracker that is not there"] = (["train.report_to=tensorboard"],
                                              ("train.report_to = 'tensorboard'", "TensorBoard"))
if importlib.util.find_spec("bitsandbytes") is None:
    REFUSED["an optimizer that is not there"] = (
        ["train.optim=adamw_8bit"], ("train.optim = 'adamw_8bit'", "bitsandbytes"))
if importlib.util.find_spec("deepspeed") is None:
    REFUSED["deepspeed that is not there"] = (["train.deepspeed={a: 1}"],
                                              ("train.deepspeed", "needs the deepspeed library"))
if torch.cuda.is_available():
    del REFUSED["tf32"]


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_weights(case: str, recipe: Path, cli: Cli) -> None:
    overrides, wanted = REFUSED[case]
    done = cli("distill", recipe, *overrides)
    assert done.status == 2, done.err
    assert len(done.errors) == 1 and "Traceback" not in done.err
    missing = [words for words in wanted if words not in done.errors[0]]
    assert not missing, f"{missing} not in {done.errors[0]}"
    assert not (recipe.parent / "out").exists()


@pytest.mark.parametrize("overrides", [
    ["train.lr_scheduler_type=cosine_with_min_lr", "train.lr_scheduler_kwargs={min_lr: 1e-5}"],
    [*EVALUATED, "train.lr_scheduler_type=reduce_lr_on_plateau"],
    [*EVALUATED, "train.save_strategy=best", "train.metric_for_best_model=eval_kl"],
    ["train.optim=sgd", "train.max_grad_norm=0", "train.train_sampling_strategy=sequential"],
    ["train.optim=adafactor", "train.bf16=true", "train.gradient_checkpointing=true"],
])
def test_what_works_is_not_refused(overrides: list[str], recipe: Path, cli: Cli) -> None:
    done = cli("distill", recipe, *overrides)
    assert done.status == 0, done.err


@pytest.mark.parametrize(("metric", "greatest"), [
    ("kl", False), ("eval_nll", False), ("agreement", True), ("loss", False)])
def test_the_best_is_as_the_figure_has_it(metric: str, greatest: bool, tmp_path: Path) -> None:
    from taid_vlm import DistillationConfig

    def config(**said: Any) -> DistillationConfig:
        return DistillationConfig(str(tmp_path), use_cpu=True, metric_for_best_model=metric, **said)

    assert config().greater_is_better is greatest
    assert config(greater_is_better=not greatest).greater_is_better is not greatest
