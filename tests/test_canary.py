"""The vision canary: exact where a model is blind, and as a naive float64 loop where it looks."""

from __future__ import annotations

import json
import logging
import math
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli.recipes import Checkpoints, command, png, write_parquet, write_recipe
from torch import nn
from training.runs import make_trainer
from zoo import Built, build
from zoo.images import image, images, noise

from taid_vlm import DistillationConfig
from taid_vlm.adapters import Continuation, ModelAdapter, make_adapter
from taid_vlm.batch.collator import DistillationCollator
from taid_vlm.config.recipe import parse_recipe
from taid_vlm.errors import RecipeError, TaidError
from taid_vlm.evaluation import canary
from taid_vlm.evaluation.canary import (
    BLIND_BELOW,
    account,
    blank,
    blind_warnings,
    choose,
    in_own_words,
    is_blind,
    look,
    shuffled,
)
from taid_vlm.evaluation.held_out import Tally
from taid_vlm.objectives import diagnose
from taid_vlm.records import Record, parse_record
from taid_vlm.report import render
from taid_vlm.report.run import run_report
from taid_vlm.runs import run
from taid_vlm.runs.results import read_results
from taid_vlm.training.config import training_arguments

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl", "gemma3")
BRIDGES = ("projector", "merger", "connector")  # what stands between tower and language model
FIGURES = ("kl_blank", "kl_shuffled", "gain_blank", "gain_shuffled")


def rows() -> list[dict[str, Any]]:
    """One image or two of all sizes, texts between them, two turns, answers of unequal length."""
    pictures = images(8)
    asked = [{"prompt": "<image>what is this", "completion": "a red square" + " and" * index,
              "images": [pictures[index]]} for index in range(5)]
    two = [{"prompt": "is <image> left of <image>", "completion": "yes it is",
            "images": [pictures[i], pictures[i + 1]]} for i in (4, 6)]
    turns = [("user", "hello"), ("assistant", "good day to you"), ("user", "<image>what"),
             ("assistant", "blue"), ("user", "sure"), ("assistant", "yes blue")]
    late = {"messages": [{"role": role, "content": text} for role, text in turns],
            "images": [pictures[7]]}
    text = {"prompt": "hello", "completion": "good day"}
    return [text, *asked[:3], text, *two, late, *asked[3:]]


def with_images(made: list[dict[str, Any]] | None = None) -> list[Record]:
    parsed = [parse_record(row, f"r{i}") for i, row in enumerate(made or rows())]
    return [record for record in parsed if record.images]


@cache
def shared(family: str = "llava") -> Built:
    """For tests that leave the weights as they are."""
    return build(family)


def adapter_of(built: Built) -> ModelAdapter:
    return make_adapter(built.processor, "student")


@torch.no_grad()
def blinded(model: nn.Module) -> nn.Module:
    """A bridge of zeros: whatever the pixels are, the language model gets the same."""
    bridges = [m for name, m in model.named_modules() if any(b in name for b in BRIDGES)]
    assert bridges
    for parameter in (p for module in bridges for p in module.parameters()):
        parameter.zero_()
    return model


def figures(built: Built, records: list[Record] | None = None, **options: Any) -> dict[str, Any]:
    records = with_images() if records is None else records
    return canary.canary(built.model, adapter_of(built), records, **options)


# ----- looking or not -----------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_looks(family: str) -> None:
    found = figures(shared(family))
    assert found["n_records"] == 8 and found["without_partner"] == 0
    for name in ("kl_blank", "kl_shuffled"):
        assert found[name] > 0.05 and 0 < found[f"{name}_stderr"] < found[name]
    assert not is_blind(found)
    assert blind_warnings({"student": found}) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_blind_model_is_exactly_zero(family: str) -> None:
    """Also where the number of image tokens depends on the size, as the sizes are kept."""
    built = build(family)
    blinded(built.model)
    found = figures(built)
    assert [found[name] for name in FIGURES] == [0.0] * 4
    assert [found[f"{name}_stderr"] for name in FIGURES] == [0.0] * 4
    warning = blind_warnings({"student": found})["student"]
    assert "student DOES NOT LOOK" in warning and "8 records" in warning


def test_the_threshold_lies_between_hardly_and_dimly_looking() -> None:
    """Weights of the bridge's last layer grow from 0, beside a bias that stays."""
    built, seen = build("llava"), []
    last = built.model.model.multi_modal_projector.linear_2
    weight = last.weight.detach().clone()
    for scale in (1e-4, 1e-3, 1e-1):
        with torch.no_grad():
            last.weight.copy_(scale * weight)
        seen.append(figures(built))
    kl = [found["kl_blank"] for found in seen]
    assert 0 < kl[0] < kl[1] < kl[2] and kl[0] < BLIND_BELOW < kl[2]
    assert is_blind(seen[0]) and not is_blind(seen[2])


def test_rounding_to_bfloat16_stays_below_the_threshold() -> None:
    logits = torch.randn(500, 1000, generator=torch.Generator().manual_seed(0)) * 2 + 20
    moved = diagnose(logits.bfloat16().float(), logits)["kl"].mean()
    assert 1e-4 < moved < BLIND_BELOW


def test_either_substitute_shows_that_a_model_looks() -> None:
    assert is_blind({"kl_blank": 0.0, "kl_shuffled": 9e-4})
    assert not is_blind({"kl_blank": 0.0, "kl_shuffled": 2e-3})
    assert not is_blind({"kl_blank": 2e-3, "kl_shuffled": 0.0})
    assert is_blind({"kl_blank": 0.0}) and not is_blind({"kl_blank": math.nan})
    assert not is_blind({})


# ----- the naive loop -----------------------------------------------------------------------


def answer_laws(built: Built, record: Record, pictures: list[Any]) -> tuple[np.ndarray, list[int]]:
    """log p [tokens, V] and the tokens of the answers after the first image, one full forward."""
    adapter = adapter_of(built)
    encoded = adapter.encode([adapter.render(record)], [pictures])
    row = encoded.rows[0]
    first = min(start for start, _ in row.images)
    at = [position for answer in row.answers if row.byte_spans[answer.tokens[0].position][0] > first
          for position in [*(t.position for t in answer.tokens), answer.end_of_turn]]
    inputs = {key: x.double() if x.is_floating_point() else x
              for key, x in encoded.inputs.items() if key != "mm_token_type_ids"}
    with torch.no_grad():
        logits = built.model(**inputs).logits[0].numpy()
    assert logits.dtype == np.float64
    shifted = logits[[position - 1 for position in at]]
    top = shifted.max(-1, keepdims=True)
    log_p = shifted - top - np.log(np.exp(shifted - top).sum(-1, keepdims=True))
    return log_p, [row.ids[position] for position in at]


def test_figures_equal_the_naive_loop() -> None:
    """By the definitions, one record at a time; the error is Cochran's with records as clusters."""
    built = build("llava")
    built.model.double()
    records = with_images()
    found = figures(built, records, batch_size=3)
    sums: dict[str, list[float]] = {name: [] for name in FIGURES}
    sizes = []
    for record, partner in zip(records, shuffled(records), strict=True):
        assert partner is not None
        real = [ref.load() for ref in record.images]
        others = {"blank": [blank(x) for x in real], "shuffled": [
            other.load().resize(x.size) for other, x in zip(partner.images, real, strict=True)]}
        p, ids = answer_laws(built, record, real)
        for version, pictures in others.items():
            q, _ = answer_laws(built, record, pictures)
            sums[f"kl_{version}"].append((np.exp(p) * (p - q)).sum())
            sums[f"gain_{version}"].append(sum(p[i, t] - q[i, t] for i, t in enumerate(ids)))
        sizes.append(len(ids))
    assert found["n_tokens"] == sum(sizes) and found["n_records"] == len(sizes)
    for name, totals in sums.items():
        mean, n = sum(totals) / sum(sizes), len(sizes)
        residuals = np.array(totals) - mean * np.array(sizes)
        stderr = math.sqrt(n / (n - 1) * (residuals**2).sum()) / sum(sizes)
        assert found[name] == pytest.approx(mean, rel=1e-5)
        assert found[f"{name}_stderr"] == pytest.approx(stderr, rel=1e-5)


@pytest.mark.parametrize("family", ["internvl", "smolvlm", "qwen2_5_vl"])
@pytest.mark.parametrize("size", [2, 5, 64])
def test_figures_do_not_depend_on_the_batch_size(family: str, size: int) -> None:
    built = shared(family)
    first, second = figures(built, batch_size=1), figures(built, batch_size=size)
    assert first.keys() == second.keys()
    for name in first:
        assert second[name] == pytest.approx(first[name], rel=2e-4, abs=1e-5)


@pytest.mark.parametrize("world", [2, 3, 20])
def test_processes_merge_to_the_whole(world: int) -> None:
    built, records, merged = shared(), with_images(), Tally()
    whole = look(built.model, adapter_of(built), records, batch_size=1)
    for rank in range(world):
        merged.merge(look(built.model, adapter_of(built), records, batch_size=1,
                          process=(rank, world)))
    for name, moments in whole.table[""].items():
        for key, value in vars(moments).items():
            assert getattr(merged.table[""][name], key) == pytest.approx(value, rel=1e-12)


def test_no_state_is_touched() -> None:
    built = shared()
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    for training in (True, False):
        built.model.train(training)
        figures(built)
        assert built.model.training == training
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert all(p.grad is None for p in built.model.parameters())


def test_dropout_is_off() -> None:
    built = build("llava")
    for module in built.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    quiet = figures(built)
    built.model.train()
    assert figures(built) == quiet


# ----- substitutes --------------------------------------------------------------------------


def test_a_blank_image_keeps_the_size_and_nothing_else() -> None:
    first, second = (blank(noise(57, 35, seed)) for seed in (0, 1))
    assert first.size == (57, 35) and first.mode == "RGB"
    assert first.tobytes() == second.tobytes() == bytes([128]) * (57 * 35 * 3)


def single(picture: Any, source: str = "r") -> Record:
    return parse_record({"prompt": "<image>what", "completion": "red", "images": [picture]}, source)


def test_shuffling_leaves_no_record_its_own_images() -> None:
    records = with_images()
    partners = shuffled(records)
    assert shuffled(records) == partners
    for record, partner in zip(records, partners, strict=True):
        assert partner is not None and len(partner.images) == len(record.images)
        assert partner.images[0].value != record.images[0].value
    assert len({id(partner) for partner in partners}) == len(records)


def test_records_about_one_image_are_no_partners() -> None:
    """Several questions about one picture are common; by path, bytes or pixels."""
    for same, other in ((Path("a.png"), Path("b.png")), (b"a", b"b"),
                        (image(seed=1), image(seed=2))):
        records = [single(same), single(same), single(other), single(same)]
        found = shuffled(records)
        assert [partner and records.index(partner) for partner in found[:2]] == [2, 2]
        assert found[2] is records[3] and found[3] is records[2]
    assert shuffled([single(b"a"), single(b"a")]) == [None, None]
    assert shuffled([]) == []


def test_records_without_a_partner_are_counted() -> None:
    built = shared()
    records = [single(image(seed=1)), single(image(seed=2)), *with_images()[3:4]]
    assert [len(record.images) for record in records] == [1, 1, 2]
    found = figures(built, records)
    assert found["n_records"] == 3 and found["without_partner"] == 1
    pair = figures(built, records[:2])
    assert found["kl_shuffled"] == pytest.approx(pair["kl_shuffled"], rel=1e-4)
    alone = figures(built, records[2:])
    assert alone["without_partner"] == 1 and alone["kl_blank"] > 0.01
    assert not {"kl_shuffled", "gain_shuffled"} & alone.keys()
    assert figures(built, []) == {}


# ----- which records ------------------------------------------------------------------------


def collator(built: Built) -> DistillationCollator:
    return DistillationCollator(adapter_of(built))


def test_the_first_records_that_can_be_used_are_chosen() -> None:
    built = shared()
    broken = {"prompt": "<image>what", "completion": "red", "images": [b"no image"]}
    empty = {"prompt": "<image>what", "completion": " ", "images": [image()]}
    malformed = {"prompt": "<image><image>", "completion": "red", "images": [image()]}
    after = {"messages": [{"role": "user", "content": "what"},
                          {"role": "assistant", "content": "red"},
                          {"role": "user", "content": "<image>"}], "images": [image()]}
    data = [broken, empty, malformed, after, *rows()]
    assert [len(r.images) for r in choose(data, 4, collator(built))] == [1, 1, 1, 2]
    assert len(choose(data, 100, collator(built))) == 8
    assert choose(data[:4], 100, collator(built)) == []
    assert choose([rows()[0]] * 3, 100, collator(built)) == []


def test_too_long_for_the_model_is_not_chosen() -> None:
    built = shared()
    short = make_adapter(built.processor, "student", max_length=30)
    long = {"prompt": "<image>what", "completion": "red " * 40, "images": [image()]}
    brief = {"prompt": "<image>what", "completion": "red", "images": [image()]}
    found = choose([long, brief], 5, DistillationCollator(short))
    assert [record.answers for record in found] == [["red"]]


def test_answers_before_the_image_are_not_counted() -> None:
    """No image can change what stands before it; they would only thin the figure out."""
    built = shared()
    late = next(record for record in with_images() if len(record.answers) == 3)
    rest = [Record("r", late.messages[2:], late.images)]
    whole = figures(built, [late])
    assert whole["n_tokens"] == figures(built, rest)["n_tokens"]


# ----- in a run -----------------------------------------------------------------------------


def test_the_trainer_logs_it_and_asks_the_teacher_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[str] = []
    measure = canary.canary

    def spy(model: Any, adapter: ModelAdapter, *args: Any, **options: Any) -> Any:
        asked.append(adapter.role)
        return measure(model, adapter, *args, **options)

    monkeypatch.setattr(canary, "canary", spy)
    made = make_trainer(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    with caplog.at_level(logging.WARNING, logger="taid_vlm"):
        made.train()
    assert asked == ["teacher", "student", "student"]
    logged = [row for row in made.state.log_history if "eval_kl" in row]
    assert len(logged) == 2
    teacher = [row["eval_canary_teacher_kl_blank"] for row in logged]
    student = [row["eval_canary_student_kl_blank"] for row in logged]
    assert teacher[0] == teacher[1] > 0.05
    assert student[0] != student[1] and min(student) > 0.05
    assert "LOOK" not in caplog.text


def test_asking_changes_nothing_in_training(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    asked, silent = (make_trainer(tmp_path, canary_records=n, **options) for n in (64, 0))
    for trainer in (asked, silent):
        trainer.train()
    for first, second in zip(asked.model.parameters(), silent.model.parameters(), strict=True):
        assert torch.equal(first, second)
    assert asked.recorder.t == silent.recorder.t
    assert not any("canary" in key for row in silent.state.log_history for key in row)


def test_a_student_that_stops_looking_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = make_trainer(tmp_path)
    before = made.look(made.eval_dataset)
    blinded(made.model)
    with caplog.at_level(logging.WARNING, logger="taid_vlm"):
        metrics = made.evaluate()
    told_now = [r.getMessage() for r in caplog.records if "DOES NOT LOOK" in r.getMessage()]
    assert len(told_now) == 1
    assert "The student" in told_now[0] and "did look at first" in told_now[0]
    assert "The teacher does look" in told_now[0] and "projector" in told_now[0]
    assert metrics["eval_canary_student_kl_blank"] == 0.0
    assert metrics["eval_canary_teacher_kl_blank"] == before["teacher"]["kl_blank"]


def test_both_blind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = make_trainer(tmp_path)
    blinded(made.model)
    blinded(made.teacher_model)
    with caplog.at_level(logging.WARNING, logger="taid_vlm"):
        looks = made.look(made.eval_dataset)
    told_now = [r.getMessage() for r in caplog.records if "DOES NOT LOOK" in r.getMessage()]
    assert [text.split()[1] for text in told_now] == ["teacher", "student"]
    assert "teacher does look" not in "".join(told_now)
    result = account(looks, looks)
    assert result is not None
    shown = result["warnings"]
    assert [text.split(":")[0] for text in shown[1:3]] == ["Before training", "After training"]
    assert shown[0].startswith("The teacher") and shown[3] == canary.CHECKS and len(shown) == 4


def test_texts_alone_are_not_asked_about(tmp_path: Path) -> None:
    made = make_trainer(tmp_path)
    texts = [{"prompt": "hello", "completion": "good day"}] * 3
    assert made.look(texts) == {}
    assert not any("canary" in key for key in made.evaluate(texts))
    assert account({}, {}) is None


def test_two_sets_are_two_questions(tmp_path: Path) -> None:
    made, data = make_trainer(tmp_path), rows()
    first, second = made.look(data[:4]), made.look(data[4:])
    assert first["teacher"]["n_records"] == 3 and second["teacher"]["n_records"] == 5


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(TaidError, match="canary_records = -1"):
        DistillationConfig(str(tmp_path), canary_records=-1)
    made = make_trainer(tmp_path)
    with pytest.raises(TaidError, match="with a length"):
        made.evaluate(iter([]))
    tree = {"teacher": "t", "student": "s", "data": {"train": "x.jsonl"}, "output_dir": "o"}
    with pytest.raises(RecipeError, match=r"evaluate\.canary = -1"):
        parse_recipe({**tree, "evaluate": {"canary": -1}})
    with pytest.raises(RecipeError, match=r"train\.canary_records belongs to 'evaluate\.canary'"):
        parse_recipe({**tree, "train": {"canary_records": 3}})
    args = training_arguments(parse_recipe({**tree, "evaluate": {"canary": 3}}))
    assert args.canary_records == 3


def test_results_and_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A student that is blind from the start, through the command."""
    load = run.load_model

    def load_blind(spec: Any, role: str, *others: Any) -> Any:
        model = load(spec, role, *others)
        return blinded(model) if role == "student" else model

    monkeypatch.setattr(run, "load_model", load_blind)
    made, data = Checkpoints(tmp_path), []
    for row in rows():
        pictures = []
        for picture in row.get("images", []):
            picture.save(tmp_path / "one.png")
            pictures.append((tmp_path / "one.png").read_bytes())
        if "prompt" in row:
            data.append({"prompt": row["prompt"], "completion": row["completion"],
                         "images": pictures})
    file = str(write_parquet(tmp_path / "rows.parquet", data))
    tree = {
        "teacher": made("internvl"), "student": made("llava", "permuted", 1),
        "data": {"train": file, "eval": file}, "evaluate": {"examples": 0, "canary": 5},
        "train": {"max_steps": 1, "use_cpu": True, "save_strategy": "no", "learning_rate": 0.0},
        "output_dir": str(tmp_path / "out"),
    }
    with caplog.at_level(logging.WARNING, logger="taid_vlm"):
        assert command("distill", write_recipe(tmp_path, tree)) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    found = results["canary"]
    assert found["teacher"]["kl_blank"] > 0.05 and found["teacher"]["n_records"] == 5
    assert found["student"]["before"]["kl_blank"] == found["student"]["after"]["kl_blank"] == 0.0
    assert [text[:15] for text in found["warnings"][:2]] == ["Before training", "After training:"]
    assert caplog.text.count("DOES NOT LOOK") == 2
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Does it look?" in page and "DOES NOT LOOK" in page and "student before" in page
    whole = read_results(tmp_path / "out" / "results.json")
    without = run_report(whole.model_copy(update={"canary": None}), (), "")
    assert "Does it look?" not in render(without)


# ----- in answers of the model's own --------------------------------------------------------


def continued(records: list[Record], adapter: ModelAdapter, tokens: list[str]) -> Any:
    """What a student "says": these words, and its end."""
    def say(pairs: Any) -> list[Continuation]:
        ids = [adapter.tokenizer(text, add_special_tokens=False)["input_ids"] for text in tokens]
        return [Continuation(record, turn, tuple(said), adapter.end_of_turn_id)
                for (record, turn), said in zip(pairs, ids, strict=True)]

    return in_own_words(adapter, records, say)


def test_an_own_answer_that_is_the_reference_has_the_references_figures() -> None:
    built = shared()
    adapter, records = adapter_of(built), [
        record for record in with_images() if len(record.learned) == 1]
    shown = continued(records, adapter, [r.messages[-1].text for r in records])
    own = canary.canary(built.model, adapter, [record for record, _ in shown],
                        rendered=[rendered for _, rendered in shown])
    reference = canary.canary(built.model, adapter, records)
    assert own == pytest.approx(reference, rel=1e-6)


def test_own_answers_are_what_is_looked_at_and_empty_ones_are_not() -> None:
    """Another answer's tokens have other figures; a conversation ends with its own answer."""
    built = shared()
    adapter, records = adapter_of(built), with_images()
    said = ["two blue circles above"] * (len(records) - 1) + [""]
    shown = continued(records, adapter, said)
    assert len(shown) == len(records) - 1
    assert all(record.messages[-1].text.strip() == said[0] for record, _ in shown)
    own = canary.canary(built.model, adapter, [record for record, _ in shown],
                        rendered=[rendered for _, rendered in shown])
    tokens = len(adapter.tokenizer(said[0], add_special_tokens=False)["input_ids"]) + 1
    assert own["n_tokens"] == tokens * len(shown)
    assert own["kl_shuffled"] > 0.05
    blinded((other := build("llava")).model)
    blind = canary.canary(other.model, adapter, [record for record, _ in shown],
                          rendered=[rendered for _, rendered in shown])
    assert [blind[name] for name in FIGURES] == [0.0] * 4


def test_a_run_on_policy_says_whether_its_student_looks_in_its_own_answers(
    tmp_path: Path
) -> None:
    checkpoints = Checkpoints(tmp_path)
    data = str(write_parquet(tmp_path / "rows.parquet", [
        {"image": png(i % 4), "prompt": "what is this", "completion": "a red square"}
        for i in range(6)]))
    tree = {
        "teacher": checkpoints("internvl"), "student": checkpoints("llava", "permuted", seed=1),
        "data": {"train": data, "eval": data},
        "objective": {"name": "taid", "on_policy": {"lmbda": 0.5, "max_new_tokens": 6}},
        "train": {"max_steps": 1, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
                  "per_device_eval_batch_size": 4},
        "evaluate": {"examples": 0, "canary": 5}, "output_dir": str(tmp_path / "out")}
    assert command("distill", write_recipe(tmp_path, tree)) == 0
    results = read_results(tmp_path / "out/results.json")
    assert results.train.on_policy is not None
    look = results.train.on_policy.look
    assert look is not None and 0 < look.n_records <= 5
    assert look.figures["kl_shuffled"] > 0
    assert "in answers of its own" in (tmp_path / "out/report.html").read_text()
