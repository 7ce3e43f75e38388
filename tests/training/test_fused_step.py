"""The fused loss in the trainer: the weights of the reference, for every kind of head and run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from training.runs import make_trainer, rows, weights
from zoo import TEXT_FAMILIES, VLM_FAMILIES, build

from taid_vlm import DistillationConfig, DistillationTrainer, TaidError
from taid_vlm.fused.model_head import find_logit_transform
from taid_vlm.models.forward import accept_distill, unwrap
from taid_vlm.models.head import LogitTransform
from taid_vlm.training.loss import FusedStep, ReferenceStep

SHORT = {"max_steps": 20, "optim": "sgd", "learning_rate": 0.05, "logging_steps": 5,
         "max_grad_norm": 1.0}
TINY = 40_000  # bytes: a few rows per chunk


def relative(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    gap = sum(float((a[name] - b[name]).double().square().sum()) for name in a)
    size = sum(float(b[name].double().square().sum()) for name in b)
    return (gap / size) ** 0.5


def both(folder: Path, **options: Any) -> tuple[Any, Any]:
    """The same run with the fused loss in small chunks, and with the reference."""
    fused = make_trainer(folder / "fused", loss_implementation="fused",
                         loss_memory_budget=TINY, **options)
    reference = make_trainer(folder / "reference", loss_implementation="reference", **options)
    for trainer in (fused, reference):
        trainer.train()
    assert isinstance(fused._step, FusedStep)
    assert isinstance(reference._step, ReferenceStep)
    return fused, reference


OBJECTIVES: dict[str, Any] = {
    "taid": "taid", "jsd": "jsd", "adaptive": "adaptive_kl",
    "sum": {"terms": ["taid", {"name": "ce", "weight": 0.3}], "kd_temperature": 2},
    "advantage": {"terms": ["taid", {"name": "ce", "weight": 0.3}],
                  "token_weights": {"name": "visual_advantage", "strength": 2.0}},
    "sft": "sft",
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_twenty_steps_are_the_references(objective: Any, tmp_path: Path) -> None:
    """With accumulation, another vocabulary, padded rows and a rest."""
    fused, reference = both(tmp_path, objective=objective, per_device_train_batch_size=4,
                            gradient_accumulation_steps=2, **SHORT)
    assert relative(weights(fused), weights(reference)) < 1e-6
    ours, theirs = ([row for row in trainer.state.log_history if "nll" in row]
                    for trainer in (fused, reference))
    assert len(ours) == 4
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert all(a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6) for key in b
                   if isinstance(b[key], float) and "per_second" not in key)


@pytest.mark.parametrize(("student", "options"), [
    ("gemma2", {}), ("gemma2", {"tied": True}), ("gpt2", {"tied": True}),
    ("llama", {"freeze": ["head"]}), ("llama", {"lora": ["lm_head", "q_proj"]}),
    ("llama", {"lora": ["q_proj"]}), ("qwen2", {"padded_rows": 77}),
], ids=str)
def test_heads_of_all_kinds(student: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Softcap, tied, frozen, LoRA on the head and elsewhere, padded vocabulary."""
    data = rows(16, text_only=True)
    made = []
    for name in ("fused", "reference"):
        built = build(student, seed=1, tokenizer="permuted", tied=options.get("tied", False),
                      padded_rows=options.get("padded_rows"))
        teacher = build("gpt2" if student == "gpt2" else "qwen2")
        args = DistillationConfig(
            str(tmp_path / name), loss_implementation=name, loss_memory_budget=TINY,
            freeze=options.get("freeze"), report_to="none", save_strategy="no", use_cpu=True,
            disable_tqdm=True, per_device_train_batch_size=4, seed=3, **SHORT)
        adapter = options.get("lora") and LoraConfig(
            r=4, target_modules=options["lora"], lora_dropout=0.0)
        torch.manual_seed(0)
        trainer = DistillationTrainer(
            built.model, teacher.model, args, data, None, built.processor, teacher.processor,
            peft_config=adapter)
        trainer.train()
        made.append(trainer)
    assert isinstance(made[0]._step, FusedStep)
    moved = weights(made[0])
    assert relative(moved, weights(made[1])) < 1e-6


def test_a_head_that_is_not_known_falls_back_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def doubled(module: Any, inputs: Any, output: Any) -> Any:
        output.logits = output.logits * 2
        return output

    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.teacher_model.register_forward_hook(doubled)
    trainer.train()
    assert isinstance(trainer._step, ReferenceStep)
    assert "the teacher (internvl) does something behind its head" in caplog.text
    trainer = make_trainer(tmp_path, max_steps=1, loss_implementation="fused")
    trainer.teacher_model.register_forward_hook(doubled)
    with pytest.raises(TaidError, match=r"loss_implementation = .fused.*behind its head"):
        trainer.train()


@pytest.mark.parametrize("objective", ["sum", "advantage", "adaptive"])
@pytest.mark.parametrize("pair", [{"tokenizer": "other"}, {
    "teacher": "internvl", "student": "llava", "tokenizer": "metaspace"}, {
    "teacher": "smolvlm", "student": "qwen2_5_vl", "tokenizer": "unigram"}],
    ids=["other", "metaspace", "unigram"])
def test_models_that_split_text_differently(
    pair: dict[str, Any], objective: str, tmp_path: Path
) -> None:
    """Weights and all that is logged, of pieces, too."""
    fused, reference = both(
        tmp_path, objective=OBJECTIVES[objective], per_device_train_batch_size=4, **pair,
        **SHORT | {"max_steps": 6, "logging_steps": 2})
    assert fused.pairing.case == "c"
    assert relative(weights(fused), weights(reference)) < 1e-6
    ours, theirs = ([row for row in trainer.state.log_history if "nll" in row]
                    for trainer in (fused, reference))
    assert len(ours) == 3
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert {"kl", "agreement", "teacher_nll", "chunk_kl", "chunk_reverse_kl"} <= a.keys()
        assert all(a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6) for key in b
                   if isinstance(b[key], float) and "per_second" not in key)


def test_implementations_have_names(tmp_path: Path) -> None:
    with pytest.raises(TaidError, match="loss_implementation = 'fast'"):
        make_trainer(tmp_path, loss_implementation="fast")


def test_the_first_batch_may_be_empty(tmp_path: Path) -> None:
    """Nothing can be checked on it; the choice waits for the next one."""
    data = [{"prompt": "a", "completion": " "}] * 2 + rows(6, text_only=True)
    trainer = make_trainer(tmp_path, student="gemma2", teacher="qwen2", data=data, max_steps=4,
                           per_device_train_batch_size=2)
    trainer._get_train_sampler = lambda *_: None  # in order
    trainer.train()
    assert isinstance(trainer._step, FusedStep)
    assert trainer._step.transform == LogitTransform(1.0, 3.0)


SCALES = {"granite": 0.5, "falcon_h1": 0.5}


@pytest.mark.parametrize("family", VLM_FAMILIES + TEXT_FAMILIES)
def test_every_family_has_a_known_head(family: str) -> None:
    built = build(family)
    tokens = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    probe = {"student_inputs": {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)},
             "student_mask": torch.ones_like(tokens, dtype=torch.bool)}
    if family == "paligemma":
        probe["student_inputs"]["token_type_ids"] = torch.ones_like(tokens)
    state = torch.get_rng_state()
    transform = find_logit_transform(
        built.model, probe["student_inputs"], probe["student_mask"])
    cap = getattr(built.model.config.get_text_config(), "final_logit_softcapping", None)
    assert transform == LogitTransform(SCALES.get(family, 1.0), cap)
    assert torch.equal(state, torch.get_rng_state())


SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1,
         "bos_token_id": 2}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
         "mamba_n_groups": 1}
XLSTM = {"vocab_size": 96, "hidden_size": 32, "num_heads": 4, "num_blocks": 1}


@pytest.mark.parametrize(("name", "settings", "scale", "softcap"), [
    ("Cohere", {**SIZES, "logit_scale": 0.25}, 0.25, None),
    ("FalconH1", {**SIZES, **MAMBA, "lm_head_multiplier": 0.5}, 0.5, None),
    ("Granite", {**SIZES, "logits_scaling": 4.0}, 0.25, None),
    ("HyperCLOVAX", {**SIZES, "logits_scaling": 4.0}, 4.0, None),  # the same key, a factor
    ("RecurrentGemma", {**SIZES, "lru_width": 32, "logits_soft_cap": 3.0}, 1.0, 3.0),
    ("xLSTM", {**XLSTM, "output_logit_soft_cap": 3.0}, 1.0, 3.0),
])
def test_every_key_means_what_the_models_own_code_makes_of_it(
    name: str, settings: dict[str, Any], scale: float, softcap: float | None
) -> None:
    config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    torch.nn.init.normal_(model.get_output_embeddings().weight)  # or no cap would be felt
    tokens = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    mask = torch.ones_like(tokens, dtype=torch.bool)
    assert find_logit_transform(model, inputs, mask) == LogitTransform(scale, softcap)


def test_forward_stays_the_models_own() -> None:
    built = build("llama")
    tokens = torch.tensor([[5, 6, 7]])
    before = built.model(tokens).logits
    accept_distill(built.model)
    accept_distill(built.model)
    assert torch.equal(built.model(tokens).logits, before)
    assert built.model(tokens, distill=lambda model, inputs: (model, inputs))[0] is built.model
    assert built.model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (1, 6)
    assert unwrap(built.model) is built.model


# ----- processes ----------------------------------------------------------------------------


def launched(folder: Path, kind: str, processes: int) -> dict[str, Tensor]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("sharded.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
         f"--master_port={port}", str(script), kind, str(folder)],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / f"{kind}-{processes}.safetensors")


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "ddp-chunks", "fsdp-chunks"])
def test_two_processes_give_the_gradient_of_one(kind: str, tmp_path: Path) -> None:
    one, two = launched(tmp_path, kind, 1), launched(tmp_path, kind, 2)
    assert one.keys() == two.keys()
    assert relative(two, one) < 1e-5
    reference = launched(tmp_path, f"{kind}-reference", 1)
    assert relative(one, reference) < 1e-5
    sharded = json.loads((tmp_path / f"{kind}-2.json").read_text())["sharded"]
    assert sharded == kind.startswith("fsdp")
