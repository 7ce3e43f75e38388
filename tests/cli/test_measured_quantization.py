"""What quantization changes of a teacher, against plain sums in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.recipes import Checkpoints, Outcome, pairs, picture_rows, write_jsonl, write_recipe
from cli.test_quantization import named
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from taid_vlm.config.recipe import load_recipe
from taid_vlm.models.loading import load_model, load_skeleton
from taid_vlm.models.quantization import bytes_of, stored_tensors
from taid_vlm.runs.ingredients import gather
from taid_vlm.training.pair import pair_for_training

Cli = Callable[..., Outcome]
RECORDS = 5


def recipe(
    folder: Path, teacher: Mapping[str, Any], student: str, sees: bool, **train: Any
) -> Path:
    rows = picture_rows(folder, 8) if sees else pairs(8)
    return write_recipe(folder, {
        "teacher": dict(teacher), "student": student,
        "data": {"train": str(write_jsonl(folder / "train.jsonl", rows))},
        "train": {"use_cpu": True, **train}, "output_dir": str(folder / "out")})


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("sees", [False, True], ids=["text", "images"])
def test_the_divergence_is_that_of_plain_sums(
    bits: str, sees: bool, cli: Cli, checkpoints: Checkpoints, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """KL, agreement, likelihoods and errors of both models, loaded by transformers alone; never
    are both in memory."""
    pytest.importorskip("bitsandbytes")
    teacher = checkpoints("internvl" if sees else "llama")
    student = checkpoints("llava", "permuted", seed=1) if sees else checkpoints("qwen2", seed=1)
    path = recipe(tmp_path, named(teacher, quantization=bits), student, sees)
    models = _watched(monkeypatch)
    done = cli("inspect", path, "--measure-quantization", RECORDS, "--json")
    assert done.status == 0
    assert len(models) == 2
    measured = json.loads(done.out)["quantization"]
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.float32} if bits == "4bit" else {}
    whole = auto.from_pretrained(teacher).eval()
    rounded = auto.from_pretrained(teacher, quantization_config=BitsAndBytesConfig(
        **{f"load_in_{bits}": True}, **four)).eval()
    for module in rounded.modules():  # its way of evaluation on a CPU takes larger layers
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    expected = _by_hand(path, whole, rounded)
    assert (measured["records"], measured["tokens"]) == (RECORDS, sum(expected["tokens"]))
    for name in ("kl", "agreement", "nll", "quantized_nll"):
        value, stderr = _clustered(expected[name], expected["tokens"])
        assert measured[name]["value"] == pytest.approx(value, rel=1e-4, abs=1e-7)
        assert measured[name]["stderr"] == pytest.approx(stderr, rel=1e-3, abs=1e-6)
    assert measured["kl"]["value"] > 0
    assert measured["bytes"] == bytes_of(stored_tensors(whole))
    assert measured["quantized_bytes"] == bytes_of(stored_tensors(rounded))
    worst = [token["kl"] for token in measured["changed_tokens"]]
    assert worst == sorted(worst, reverse=True)
    assert worst[0] == pytest.approx(max(expected["each"]), rel=1e-4)
    per_record = [total / n for total, n in zip(expected["kl"], expected["tokens"], strict=True)]
    assert measured["changed_records"][0]["kl"] == pytest.approx(max(per_record), rel=1e-4)


def _watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which versions were loaded; each only after the one before is gone."""
    import gc
    import weakref

    loaded: list[str] = []
    alive: list[weakref.ref[PreTrainedModel]] = []

    def load(spec: Any, *args: Any) -> PreTrainedModel:
        gc.collect()
        assert not any(ref() is not None for ref in alive), "two models are in memory"
        model = load_model(spec, *args)
        alive.append(weakref.ref(model))
        loaded.append(str(spec.quantization))
        return model

    monkeypatch.setattr("taid_vlm.doctor.rounding.load_model", load)
    return loaded


@torch.no_grad()
def _by_hand(path: Path, whole: Any, rounded: Any) -> dict[str, list[float]]:
    """Sums over every record's tokens, in float64."""
    found = gather(load_recipe(path))
    student = load_skeleton(load_recipe(path).student, "student")
    _, collator = pair_for_training(student, whole, found.student_processor,
                                    found.teacher_processor, found.args, [found.train])
    out: dict[str, list[float]] = {name: [] for name in (
        "kl", "agreement", "nll", "quantized_nll", "tokens", "each")}
    for record in list(found.train)[:RECORDS]:
        batch = collator([record])
        p, q = (model(**batch["teacher_inputs"]).logits[batch["teacher_mask"]].double()
                .log_softmax(-1) for model in (whole, rounded))
        labels = batch["teacher_labels"][:, None]
        kl = (p.exp() * (p - q)).sum(-1)
        out["each"] += kl.tolist()
        for name, values in (("kl", kl), ("agreement", (p.argmax(-1) == q.argmax(-1)).double()),
                             ("nll", -p.gather(1, labels)), ("quantized_nll", -q.gather(1, labels)),
                             ("tokens", torch.ones(len(labels)))):
            out[name].append(float(values.sum()))
    return out


def _clustered(totals: list[float], tokens: list[float]) -> tuple[float, float]:
    """A ratio of sums, and its standard error over records."""
    mean, n = sum(totals) / sum(tokens), len(totals)
    squares = sum((total - mean * count) ** 2 for total, count in zip(totals, tokens, strict=True))
    return mean, (squares * n / (n - 1)) ** 0.5 / sum(tokens)


def test_it_is_shown_in_text_and_on_the_page(
    cli: Cli, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """In bfloat16, of one record, which has no standard error."""
    pytest.importorskip("bitsandbytes")
    path = recipe(tmp_path, named(checkpoints("llama"), quantization="4bit"),
                  checkpoints("qwen2", seed=1), False, bf16=True)
    done = cli("inspect", path, "--measure-quantization", 1, "--html", tmp_path / "page.html")
    assert done.status == 0
    page = (tmp_path / "page.html").read_text()
    for words in ("KL(whole || quantized)", "same most likely token", "differs most: a token",
                  "train.jsonl:1", "memory, quantized"):
        assert words in done.out
        assert words in page
    assert "±" not in done.out


@pytest.mark.parametrize(("teacher", "words"), [
    ({}, "it has no teacher.quantization"),
    ({"server": {"url": "http://localhost:9/v1", "model": "m"}}, "the teacher is served"),
    (None, "the recipe has no teacher"),
])
def test_where_nothing_can_be_compared_one_message_says_why(
    teacher: dict[str, Any] | None, words: str, cli: Cli, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    path = recipe(tmp_path, named(checkpoints("llama"), **(teacher or {})),
                  checkpoints("qwen2", seed=1), False)
    if teacher is None:
        tree = {key: value for key, value in load_recipe(path).tree().items() if key != "teacher"}
        write_recipe(tmp_path, {**tree, "objective": "ce"})
    done = cli("inspect", path, "--measure-quantization", 4)
    assert done.status == 2
    assert len(done.errors) == 1
    assert words in done.err


def test_a_number_of_records_is_asked_for(
    cli: Cli, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    path = recipe(tmp_path, named(checkpoints("llama"), quantization="4bit"),
                  checkpoints("qwen2", seed=1), False)
    done = cli("inspect", path, "--measure-quantization", 0)
    assert done.status == 2
    assert "--measure-quantization = 0" in done.err
