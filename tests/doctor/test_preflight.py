"""The preflight is held against a plain loop over the collator that training uses."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from cli.recipes import pairs, write_parquet
from doctor.patients import ANSWER, Patient

from taid_vlm.config.recipe import load_recipe
from taid_vlm.doctor import Inspection
from taid_vlm.doctor.preflight import REMEDIES, spread
from taid_vlm.errors import TaidError
from taid_vlm.models.loading import load_processor, load_skeleton
from taid_vlm.runs.ingredients import gather
from taid_vlm.training.pair import pair_for_training


def mixed_rows(patient: Patient) -> list[dict[str, Any]]:
    """Good records and one or more of every kind that is left out."""
    rows = [dict(row) for row in patient.pictures(12)]
    (patient.folder / "broken.png").write_bytes(b"no image at all")
    rows[2]["completion"] = " "
    rows[5]["image"] = "broken.png"
    rows[6]["completion"] = ANSWER * 60
    rows[7]["image"] = "absent.png"
    rows[8]["completion"] = "a <|im_end|> b"
    rows.append({"text": ANSWER * 60})
    return rows


@pytest.fixture
def mixed(patient: Patient) -> Any:
    return patient.recipe(
        patient.checkpoints("internvl"), patient.checkpoints("llava", "other"),
        mixed_rows(patient), train={"max_length": 200, "per_device_train_batch_size": 3,
                                    "max_left_out": 0.4})


def test_the_account_is_that_of_a_plain_loop(mixed: Any, patient: Patient) -> None:
    (check,) = patient.inspect(mixed, everything=True).preflight
    recipe = load_recipe(mixed)
    found = gather(recipe)
    assert recipe.teacher is not None
    models = [load_skeleton(spec, "x") for spec in (recipe.student, recipe.teacher)]
    processors = [load_processor(spec, "x") for spec in (recipe.student, recipe.teacher)]
    _, collator = pair_for_training(*models, *processors, found.args, [found.train])
    dropped, sums = Counter[str](), Counter[str]()
    for start in range(0, 13, 3):  # batches of another size than one
        counts = collator([found.train[i] for i in range(start, min(start + 3, 13))])["counts"]
        dropped.update(counts.pop("dropped"))
        sums.update(counts)
    assert {one.reason: one.count for one in check.dropped} == dropped
    assert dropped == {"empty answer": 1, "unreadable image": 2, "longer than max_length": 1,
                       "special token inside an answer": 1}
    assert (check.records, check.usable, check.cut) == (13, 8, 1)
    assert check.usable == sums["rows"]
    assert check.cut == sums["cut"]
    assert (check.supervised, check.aligned, check.chunk) == tuple(
        sums[f"{name}_tokens"] for name in ("supervised", "aligned", "chunk"))
    assert 0 < check.chunk < check.aligned <= check.supervised


def test_reasons_name_their_records_and_what_to_do(mixed: Any, patient: Patient) -> None:
    done = patient.cli("inspect", mixed, "--all")
    assert done.status == 0
    assert "5 of 13 records will be left out (38.5%)" in done.out
    assert "2 x unreadable image: train.jsonl:6, train.jsonl:8" in done.out
    assert "1 x longer than max_length: train.jsonl:7" in done.out
    for reason in ("unreadable image", "empty answer", "longer than max_length"):
        assert REMEDIES[reason] in done.out


def test_lengths_are_measured_before_anything_is_cut(mixed: Any, patient: Patient) -> None:
    found = patient.inspect(mixed, everything=True)
    (check,) = found.preflight
    assert check.lengths["student"].max > 200  # the record that is too long counts, too
    # 13 records, of which 4 never come as far as tokens
    assert check.lengths["student"].n == check.lengths["teacher"].n == 9
    assert check.images["student"].n == 8
    assert check.images["student"].median == check.images["student"].max == 16


def test_workers_count_the_same(mixed: Any, patient: Patient) -> None:
    alone, helped = (
        patient.inspect(mixed, f"train.dataloader_num_workers={workers}", everything=True)
        for workers in (0, 2))
    assert alone.preflight == helped.preflight


def test_without_all_only_the_first_records_are_looked_at(patient: Patient) -> None:
    rows = [*pairs(40), {"prompt": "x", "completion": ""}]
    path = patient.recipe(patient.checkpoints("llama"), patient.checkpoints("qwen2"), rows)
    (first,), (every,) = (patient.inspect(path, everything=flag).preflight
                          for flag in (False, True))
    assert (first.whole, first.records, first.usable) == (False, 32, 32)
    assert (every.whole, every.records, every.usable) == (True, 41, 40)
    assert first.sentence == "0 of the first 32 records will be left out (0.0%)"


def test_held_out_records_are_gone_over_too(patient: Patient) -> None:
    held_out = patient.data([*pairs(3), {"prompt": "x", "completion": ""}], "eval.jsonl")
    path = patient.recipe(patient.checkpoints("llama"), patient.checkpoints("qwen2"))
    checks = patient.inspect(path, f"data.eval={held_out}", everything=True).preflight
    assert [(check.name, check.records, check.usable) for check in checks] == [
        ("data.train", 4, 4), ("data.eval", 4, 3)]


def streamed(patient: Patient, **limit: int) -> Inspection:
    data = write_parquet(patient.folder / "train.parquet", pairs(6))
    path = patient.recipe(
        patient.checkpoints("llama"), patient.checkpoints("qwen2"), train={"max_steps": 1},
        data={"train": {"path": str(data), "streaming": True, **limit}})
    return patient.inspect(path, everything=True)


def test_a_stream_needs_an_end(patient: Patient) -> None:
    (check,) = streamed(patient, max_records=5).preflight
    assert (check.records, check.usable) == (5, 5)
    with pytest.raises(TaidError, match=r"data\.train is streamed .* set data\.train\.max_records"):
        streamed(patient)


def gap(patient: Patient, number: int, at: int) -> Path:
    """A table of `number` rows whose row `at` is no record."""
    rows = pairs(number)
    rows[at]["prompt"] = None
    return write_parquet(patient.folder / "train.parquet", rows)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_malformed_row_is_left_out_as_in_training(patient: Patient, workers: int) -> None:
    """Rows of tables are only checked at their beginning when they are opened."""
    path = patient.recipe(
        patient.checkpoints("llama"), patient.checkpoints("qwen2"),
        data={"train": str(gap(patient, 300, 290))},
        train={"per_device_train_batch_size": 4, "dataloader_num_workers": workers})
    found = patient.inspect(path, everything=True)
    (check,) = found.preflight
    assert found.verdict.outcome == "shared"
    assert (check.records, check.usable, check.stops) == (300, 299, None)
    assert "data.train: 1 of 300 records will be left out (0.3%): 1 x malformed record" in (
        found.verdict.warnings)
    assert "train.parquet[290]: column 'prompt' is missing" in check.dropped[0].detail


def test_the_command_line_names_a_malformed_row(patient: Patient) -> None:
    path = patient.recipe(patient.checkpoints("llama"), patient.checkpoints("qwen2"),
                          data={"train": str(gap(patient, 260, 258))})
    done = patient.cli("inspect", path, "--all")
    assert done.status == 0
    assert "1 x malformed record: train.parquet[258]: column 'prompt' is missing" in done.out
    assert REMEDIES["malformed record"] in done.out


def test_a_malformed_row_of_a_stream_is_left_out_too(patient: Patient) -> None:
    source = {"path": str(gap(patient, 60, 50)), "streaming": True, "max_records": 60}
    path = patient.recipe(patient.checkpoints("llama"), patient.checkpoints("qwen2"),
                          train={"max_steps": 1}, data={"train": source})
    found = patient.inspect(path, everything=True)
    assert found.verdict.outcome == "shared"
    (check,) = found.preflight
    assert (check.records, check.usable, check.stops) == (60, 59, None)
    (dropped,) = check.dropped
    assert (dropped.reason, dropped.count) == ("malformed record", 1)
    assert "train.parquet[streamed 50]: column 'prompt' is missing" in dropped.detail


TURNS = {"messages": [{"role": role, "content": "a"} for role in ("user", "assistant") * 2]}


def test_a_conversation_deep_in_a_base_models_data_is_left_out(patient: Patient) -> None:
    """A model without a template takes one question."""
    path = patient.recipe(patient.checkpoints("llama"), patient.checkpoints("gpt2"),
                          [*pairs(40), TURNS])
    found = patient.inspect(path, everything=True)
    assert found.verdict.outcome == "shared"
    (check,) = found.preflight
    assert (check.records, check.usable, check.stops) == (41, 40, None)
    (dropped,) = check.dropped
    assert dropped.reason == "conversation for a model of one question"
    assert dropped.sources == ("train.jsonl:41",)
    assert "set student.chat_template" in dropped.detail
    assert "chat_template" in dropped.remedy


def test_nothing_but_conversations_for_a_base_model_is_refused(patient: Patient) -> None:
    path = patient.recipe(patient.checkpoints("llama"), patient.checkpoints("gpt2"), [TURNS] * 3)
    found = patient.inspect(path)
    assert found.verdict.outcome == "refused"
    assert "3 x conversation for a model of one question" in found.problem
    assert "train.jsonl:1 is a conversation (user, assistant, user, assistant)" in found.problem
    assert "chat_template: template.jinja" in found.verdict.changes[0]


@pytest.mark.parametrize(("values", "wanted"), [
    ([7], (7, 7, 7, 1)),
    ([3, 1, 2], (2, 3, 3, 3)),
    ([4, 1, 3, 2], (2, 4, 4, 4)),
    (list(range(1, 101)), (50, 95, 100, 100)),
    (list(range(1, 1001)), (500, 950, 1000, 1000)),
])
def test_spreads(values: list[int], wanted: tuple[int, ...]) -> None:
    found = spread(values)
    assert (found.median, found.p95, found.max, found.n) == wanted


OBJECTIVE = {"terms": [{"name": "taid"}, {"name": "visual_relation", "weight": 0.1, "grid": 2}],
             "token_weights": {"name": "visual_advantage", "strength": 1.0}}


def test_what_the_objective_asks_of_images_is_part_of_it(patient: Patient) -> None:
    """The training records pass the collator of visual terms, in workers as well."""
    path = patient.recipe(
        patient.checkpoints("qwen2_5_vl"), patient.checkpoints("llava"), patient.pictures(6),
        objective=OBJECTIVE, train={"dataloader_num_workers": 2})
    found = patient.inspect(path, everything=True)
    assert found.problem == ""
    assert found.preflight[0].usable == 6


def test_visual_terms_without_vision_are_refused(patient: Patient) -> None:
    path = patient.recipe(patient.checkpoints("llama"), patient.checkpoints("qwen2"),
                          objective=OBJECTIVE)
    found = patient.inspect(path)
    assert found.verdict.outcome == "refused"
    assert "the teacher is a text model" in found.problem
