"""Visual terms and token weights in training: their values by hand, and what must not change."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from training.runs import make_trainer, rows, weights
from training.test_invariance import SGD, TOLERANCE, in_processes, relative
from zoo import VLM_FAMILIES, build

from taid_vlm import DistillationTrainer
from taid_vlm.adapters import make_adapter
from taid_vlm.alignment import pair_models
from taid_vlm.batch import losses
from taid_vlm.batch.collator import DistillationCollator
from taid_vlm.batch.forward import student_forward, teacher_forward
from taid_vlm.batch.losses import advantage_weights, token_losses
from taid_vlm.errors import TaidError
from taid_vlm.evaluation.canary import blank
from taid_vlm.fused.heads import _MatrixPass
from taid_vlm.models.forward import answer_logits, head_rows
from taid_vlm.objectives import divergence
from taid_vlm.training import visual
from taid_vlm.training.visual import MAP, MAP_FILE, feature_map

WEIGHTS = {"name": "visual_advantage", "strength": 2.0}
TERMS = ["taid", {"name": "visual_features", "weight": 0.5, "grid": 3},
         {"name": "visual_relation", "weight": 0.25, "grid": 2}]
ALL: dict[str, Any] = {"terms": TERMS, "token_weights": WEIGHTS}
SPLITS = {"4 x 2": (4, 2), "1 x 8": (1, 8)}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def split(batch: int, accumulation: int) -> dict[str, int]:
    return {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}


def logs(trainer: DistillationTrainer) -> list[dict[str, Any]]:
    return [row for row in trainer.state.log_history if "loss" in row]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ----- values by hand -----------------------------------------------------------------------


def view_of(model: torch.nn.Module, pixels: Tensor) -> Tensor:
    """A model's features of an image as its own method gives them, the whole image last."""
    found = model.model.get_image_features(pixels).pooler_output
    return found[-1].double()


def naive_pool(features: Tensor, grid: int) -> Tensor:
    side = math.isqrt(len(features))
    image = features.T.reshape(1, -1, side, side)
    return adaptive_avg_pool2d(image, grid)[0].flatten(1).T


def naive_losses(trainer: DistillationTrainer, data: list[dict[str, Any]]) -> dict[str, float]:
    """Means over all images, which are encoded one by one."""
    features: list[float] = []
    relation: list[float] = []
    weight = trainer.visual.map.weight.detach().double()
    for row in data:
        for picture in row.get("images", []):
            batch = trainer.data_collator([
                {"prompt": "<image>what", "completion": "red", "images": [picture]}])
            s, u = (view_of(model, batch[f"{role}_inputs"]["pixel_values"])
                    for role, model in (("student", trainer.model),
                                        ("teacher", trainer.teacher_model)))
            mapped = naive_pool(s, 3) @ weight.T
            cosine = torch.nn.functional.cosine_similarity
            features.append(float((1 - cosine(mapped, naive_pool(u, 3))).mean()))
            a, b = (cosine(x[:, None], x[None], dim=-1)
                    for x in (naive_pool(s, 2), naive_pool(u, 2)))
            relation.append(float(((a - b) ** 2).mean()))
    return {"visual_features": sum(features) / len(features),
            "visual_relation": sum(relation) / len(relation)}


def naive_weight(trainer: DistillationTrainer, row: dict[str, Any]) -> Tensor:
    """Weights of a row's tokens from two forwards of the teacher, every input made anew."""
    blind = {**row, **({"images": [blank(x) for x in row["images"]]} if "images" in row else {})}
    found = []
    for shown in (row, blind):
        batch = trainer.data_collator([shown])
        logits = teacher_forward(trainer.teacher_model, batch)
        labels = batch["teacher_labels"]
        found.append(logits.double().log_softmax(-1)[range(len(labels)), labels])
    return 1 + 2.0 * (1 - torch.exp(-(found[0] - found[1]).clamp(min=0)))


@torch.no_grad()
def by_hand(trainer: DistillationTrainer, data: list[dict[str, Any]]) -> dict[str, float]:
    plain, weighed, weight, tokens = 0.0, 0.0, 0.0, 0
    for row in data:
        batch = trainer.data_collator([row])
        s, u = student_forward(trainer.model, batch), teacher_forward(trainer.teacher_model, batch)
        t = trainer.objective.schedule(1).t
        loss = token_losses(trainer.objective, batch, s, u, trainer.pairing, t)["taid"].double()
        w = naive_weight(trainer, row)
        if "images" not in row:
            assert torch.equal(w, torch.ones_like(w))
        plain, weighed = plain + float(loss.sum()), weighed + float((loss * w).sum())
        weight, tokens = weight + float(w.sum()), tokens + len(loss)
    seen = naive_losses(trainer, data)
    return {
        "loss": weighed / tokens + 0.5 * seen["visual_features"] + 0.25 * seen["visual_relation"],
        "loss/taid": plain / tokens, "visual_weight": weight / tokens,
        **{f"loss/{name}": value for name, value in seen.items()}}


@pytest.mark.parametrize("parts", [(8, 1), (2, 4)])
def test_every_logged_figure_is_the_one_by_hand(parts: tuple[int, int], tmp_path: Path) -> None:
    """Images counted by images and tokens by tokens, whatever the split."""
    data = rows(8)
    trainer = make_trainer(tmp_path, data=data, objective=ALL, max_steps=1, learning_rate=0.0,
                           logging_steps=1, **split(*parts))
    expected = by_hand(trainer, data)
    trainer.train()
    found = logs(trainer)[0]
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert 1.05 < found["visual_weight"] < 3
    assert found["loss/visual_features"] > 0.1 and found["loss/visual_relation"] > 0.01


def test_the_schedule_is_driven_by_the_unweighted_loss(tmp_path: Path) -> None:
    t = []
    for objective in ("taid", {"name": "taid", "token_weights": WEIGHTS}):
        trainer = make_trainer(tmp_path, objective=objective, max_steps=4, learning_rate=0.0)
        trainer.train()
        t.append(trainer.recorder.t)
    assert t[0] == t[1]


def test_weights_of_pairs_and_chunks() -> None:
    """Where texts are split differently: a chunk's advantage is the sum over its teacher tokens."""
    teacher, student = build("internvl"), build("llava", seed=1, tokenizer="other")
    theirs, ours = (make_adapter(teacher.processor, "teacher"),
                    make_adapter(student.processor, "student"))
    pairing = pair_models(theirs, ours, head_rows(teacher.model), head_rows(student.model))
    assert pairing.case == "c"
    batch = DistillationCollator(ours, theirs, pairing, degrade=blank)(rows(4))
    u = teacher_forward(teacher.model, batch)

    def nll(logits: Tensor) -> Tensor:
        return divergence("ce", logits, None, labels=batch["teacher_labels"])

    found = advantage_weights(2.0, batch, nll(u), lambda b: nll(teacher_forward(teacher.model, b)))
    blind = {**batch["teacher_inputs"], **batch["teacher_degraded"]}
    without = answer_logits(teacher.model, blind, batch["teacher_mask"])
    labels = batch["teacher_labels"]
    gain = [float((a.log_softmax(-1) - b.log_softmax(-1))[y]) for a, b, y in zip(
        u.detach().double(), without.detach().double(), labels, strict=True)]
    wanted = [1.0] * len(batch["labels"])
    for s, t in zip(batch["pair_student"].tolist(), batch["pair_teacher"].tolist(), strict=True):
        wanted[s] = 1 + 2 * (1 - math.exp(-max(gain[t], 0)))
    for token, chunk in enumerate(batch["chunk_student"].tolist()):
        if chunk >= 0:
            total = sum(g for g, c in zip(gain, batch["chunk_teacher"].tolist(), strict=True)
                        if c == chunk)
            wanted[token] = 1 + 2 * (1 - math.exp(-max(total, 0)))
    for token, row in enumerate(batch["row"].tolist()):
        if not batch["images"][row]:
            wanted[token] = 1.0
    assert found.tolist() == pytest.approx(wanted, rel=1e-4)
    assert len(batch["chunk_last"]) > 3 and len(batch["pair_student"]) > 3
    assert set(losses.compared_tokens(batch).tolist()) == {
        *batch["pair_student"].tolist(), *batch["chunk_last"].tolist()}


# ----- the same under any split -------------------------------------------------------------


def gradient(output: Path, **options: Any) -> dict[str, Tensor]:
    trainer = make_trainer(output, objective=ALL, **{**SGD, **options})
    before = weights(trainer)
    trainer.train()
    return {name: before[name] - after for name, after in weights(trainer).items()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return gradient(tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("name", SPLITS)
def test_gradient_does_not_depend_on_batches(
    name: str, reference: dict[str, Tensor], tmp_path: Path
) -> None:
    assert relative(reference, gradient(tmp_path, **split(*SPLITS[name]))) < TOLERANCE
    assert reference["visual_map"].norm() > 1e-3


def test_two_processes_give_the_gradient_of_one(
    reference: dict[str, Tensor], tmp_path: Path
) -> None:
    """Also where micro-batches of one process, or all of its step, have no image."""
    blind: dict[str, Any] = {"kinds": ["one", "text", "text"], "max_steps": 3}
    options = {**SGD, "objective": ALL}
    in_processes(2, tmp_path, single={**options, **split(1, 4)},
                 blind={**options, **blind, **split(1, 1)})
    before = weights(make_trainer(tmp_path, objective=ALL))
    several = gradient(tmp_path / "one", **blind, **split(2, 1))
    for name, wanted in (("single", reference), ("blind", several)):
        after = load_file(tmp_path / name / "final.safetensors")
        assert relative(wanted, {key: before[key] - after[key] for key in before}) < TOLERANCE, name


def test_resuming_is_bit_for_bit(tmp_path: Path) -> None:
    options = {"objective": ALL, "max_steps": 6, "save_strategy": "steps", "save_steps": 3,
               "dropout": 0.1, "weight_decay": 0.1, "learning_rates": {"projector": 1e-4},
               **split(4, 1)}
    whole, resumed = (make_trainer(tmp_path / "whole", **options) for _ in range(2))
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert same(weights(whole), weights(resumed))
    assert whole.recorder.t[3:] == resumed.recorder.t
    saved = load_file(checkpoint / MAP_FILE)
    assert not torch.equal(saved["weight"], weights(whole)["visual_map"])
    (checkpoint / MAP_FILE).unlink()
    with pytest.raises(TaidError, match=f"holds no {MAP_FILE}"):
        make_trainer(tmp_path / "again", **options).train(resume_from_checkpoint=str(checkpoint))


def test_evaluation_moves_nothing_and_asks_for_nothing(
    tmp_path: Path, count: list[str]
) -> None:
    plain, evaluated = (trained(tmp_path, ALL, **more) for more in (
        {}, {"eval_strategy": "steps", "eval_steps": 1}))
    assert same(weights(plain), weights(evaluated))
    assert plain.recorder.t == evaluated.recorder.t
    count.clear()
    evaluated.held_out(rows(4))
    assert count == []
    assert not {"teacher_degraded", "teacher_views"} & evaluated.collator(rows(2)).keys()


# ----- what is not asked for does not happen ------------------------------------------------


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every second forward of the teacher leaves an entry."""
    calls: list[str] = []

    def counted(*args: Any) -> Tensor:
        calls.append("weights")
        return advantage_weights(*args)

    monkeypatch.setattr("taid_vlm.training.loss.advantage_weights", counted)
    return calls


def trained(folder: Path, objective: Any, **options: Any) -> DistillationTrainer:
    trainer = make_trainer(folder, objective=objective, dropout=0.1, max_grad_norm=1.0, **options)
    trainer.train()
    return trainer


def test_without_weight_all_is_as_it_was(tmp_path: Path, count: list[str]) -> None:
    """Absent or 0: the same bits, no second forward, no degraded image, no map."""
    zero = [{"name": name, "weight": 0} for name in ("visual_features", "visual_relation")]
    nothing = {**WEIGHTS, "strength": 0}
    runs = [trained(tmp_path, objective) for objective in (
        "taid", {"terms": ["taid", *zero], "token_weights": nothing})]
    students = [{name: p for name, p in weights(run).items() if not name.startswith("visual_map")}
                for run in runs]
    assert same(*students)
    assert runs[0].recorder.t == runs[1].recorder.t
    assert count == []
    assert runs[0].visual.map is None
    assert runs[0].data_collator is runs[0].collator
    assert "visual_weight" not in logs(runs[0])[0]


@pytest.mark.parametrize("tokenizer", ["permuted", "other"])
def test_the_teachers_logits_are_made_once_for_each_image(
    tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused pass makes those of the real image anyway; beside them only the degraded one's."""
    trainer = make_trainer(tmp_path, objective={"name": "taid", "token_weights": WEIGHTS},
                           max_steps=1, kinds=["one"], canary_records=0, tokenizer=tokenizer)
    rows_made, batches = [], []
    plain, collate = _MatrixPass.logits, trainer.data_collator
    head = trainer.teacher_model.get_output_embeddings().weight

    def logits(self: Any, x: Tensor) -> Tensor:
        if self.head.weight is head and trainer._step is not None:  # not while it is checked
            rows_made.append(len(x))
        return plain(self, x)

    def collated(data: Any) -> Any:
        batches.append(collate(data))
        return batches[-1]

    trainer.data_collator = collated
    monkeypatch.setattr(_MatrixPass, "logits", logits)
    trainer.train()
    assert trainer.loss_report["name"] == "fused"
    assert sum(rows_made) == 2 * len(batches[0]["teacher_labels"])  # the next one is only fetched


def test_the_second_forward_is_for_images_only(tmp_path: Path) -> None:
    objective = {"name": "taid", "token_weights": WEIGHTS}
    for kinds, wanted in ((["one"], 2), (["text"], 1)):
        trainer = make_trainer(tmp_path, objective=objective, max_steps=2, kinds=kinds,
                               canary_records=0, loss_implementation="reference")
        calls = []
        trainer.teacher_model.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        trainer.train()
        assert len(calls) == 2 * wanted, kinds


# ----- the map ------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(32, 48), (48, 32), (32, 32)])
def test_the_map_starts_orthogonal_and_draws_nothing(widths: tuple[int, int]) -> None:
    state = torch.get_rng_state()
    first, second, other = (feature_map(*widths, seed).weight for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, second) and not torch.equal(first, other)
    narrow = first if widths[0] >= widths[1] else first.T
    torch.testing.assert_close(narrow @ narrow.T, torch.eye(min(widths)))


@pytest.mark.parametrize("rates", [None, {"tower": 1e-5, "language_model": 1e-4}])
def test_the_map_has_a_group_of_its_own(rates: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, objective=ALL, learning_rates=rates, learning_rate=2e-3,
                           weight_decay=0.01, lr_scheduler_type="constant", logging_steps=1)
    start = weights(trainer)["visual_map"]
    trainer.train()
    groups = trainer.optimizer.param_groups
    (own,) = [group for group in groups if group.get("part") == MAP]
    assert [own["lr"], own["weight_decay"]] == [2e-3, 0.01]
    assert [id(p) for p in own["params"]] == [id(p) for p in trainer.visual.map.parameters()]
    assert groups[-1] is own
    assert not torch.equal(start, weights(trainer)["visual_map"])
    assert logs(trainer)[0]["learning_rate"] == 2e-3


def test_the_map_is_no_part_of_the_student(tmp_path: Path) -> None:
    trainer = trained(tmp_path, ALL, max_steps=1)
    trainer.save_model(str(tmp_path / "student"))
    assert not (tmp_path / "student" / MAP_FILE).exists()
    assert not any("visual_map" in name for name in load_file(
        tmp_path / "student" / "model.safetensors"))


def test_the_terms_teach_the_tower(tmp_path: Path) -> None:
    """Features and relations come closer, and with the language model frozen nothing else can
    have brought them there."""
    objective = {"terms": [{"name": "fkl", "weight": 0}, {"name": "visual_features"},
                           {"name": "visual_relation", "weight": 10}]}
    trainer = make_trainer(tmp_path, objective=objective, max_steps=30, learning_rate=5e-3,
                           logging_steps=1, freeze=["language_model", "head"], kinds=["one"])
    before = weights(trainer)
    trainer.train()
    first, last = logs(trainer)[0], logs(trainer)[-1]
    assert last["loss/visual_features"] < 0.7 * first["loss/visual_features"]
    assert last["loss/visual_relation"] < 0.7 * first["loss/visual_relation"]
    moved = {name for name, p in weights(trainer).items() if not torch.equal(before[name], p)}
    assert any("vision" in name for name in moved)


# ----- what cannot work ---------------------------------------------------------------------


@pytest.mark.parametrize("objective", [
    {"terms": ["taid", "visual_relation"]}, {"name": "taid", "token_weights": WEIGHTS}])
def test_text_models_are_refused(objective: Any, tmp_path: Path) -> None:
    with pytest.raises(TaidError, match=r"takes no images|the teacher is a text model"):
        make_trainer(tmp_path, teacher="llama", student="qwen2", objective=objective,
                     data=rows(8, text_only=True))


def test_frozen_eyes_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for freeze, told in ((["tower", "projector"], True), (["tower"], False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "taid_vlm"):
            make_trainer(tmp_path, objective=ALL, freeze=freeze)
        assert ("so they stay as they are" in caplog.text) == told


def test_a_map_under_a_sharding_accelerator_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(visual, "SHARDED", (trainer.accelerator.distributed_type,))
    with pytest.raises(TaidError, match="which FSDP and DeepSpeed cannot"):
        make_trainer(tmp_path, objective=ALL)
    make_trainer(tmp_path, objective={"terms": ["taid", "visual_relation"]})


# ----- degraded images ----------------------------------------------------------------------


@pytest.mark.parametrize("family", VLM_FAMILIES)
def test_only_pixels_are_made_twice(family: str) -> None:
    model = build(family)
    theirs, ours = (make_adapter(model.processor, role) for role in ("teacher", "student"))
    pairing = pair_models(theirs, ours, *[head_rows(model.model)] * 2)
    collate = DistillationCollator(ours, theirs, pairing, degrade=blank)
    batch = collate(rows(3, kinds=["one", "text"]))
    degraded, real = batch["teacher_degraded"], batch["teacher_inputs"]
    assert list(degraded) == ["pixel_values"]
    assert degraded["pixel_values"].shape == real["pixel_values"].shape
    assert collate(rows(1, kinds=["text"]))["teacher_degraded"] == {}


def test_a_processor_whose_tokens_see_the_pixels_is_refused(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llava")
    theirs, ours = (make_adapter(model.processor, role) for role in ("teacher", "student"))
    pairing = pair_models(theirs, ours, *[head_rows(model.model)] * 2)

    def other_token(ids: Tensor) -> Tensor:
        return ids.index_fill(1, torch.tensor([0]), 7)

    encode = type(theirs).encode

    def encode_by_content(self: Any, rendered: Any, images: Any, side: Any = "right") -> Any:
        batch = encode(self, rendered, images, side)
        if images[0] and images[0][0].getpixel((0, 0)) == (128, 128, 128):
            batch.inputs["input_ids"] = other_token(batch.inputs["input_ids"])
        return batch

    monkeypatch.setattr(type(theirs), "encode", encode_by_content)
    with pytest.raises(TaidError, match="'input_ids' depends on what an image shows"):
        DistillationCollator(ours, theirs, pairing, degrade=blank)(rows(1, kinds=["one"]))
