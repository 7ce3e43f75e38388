"""Good pairs and a wrong one of every kind: the verdict, and the words that tell what to change."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from doctor.patients import ANSWER, TEXT_ROWS, Patient, set_config, without
from zoo import make_tokenizer

from taid_vlm.doctor.table import fact_rows

# ----- good pairs ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Good:
    teacher: tuple[str, str] | None
    student: tuple[str, str]
    outcome: str
    case: str | None
    words: str
    images: bool = False


GOOD = {
    "same rows": Good(("llama", "plain"), ("llama", "plain"), "exact", "a", "same tokenizer"),
    "other ids": Good(("internvl", "plain"), ("llava", "permuted"), "shared", "b",
                      "shared tokens", True),
    "other tokenizer": Good(("qwen3_vl", "plain"), ("smolvlm", "other"), "chunks", "c",
                            "different splits", True),
    "metaspace": Good(("llama", "metaspace"), ("qwen2", "plain"), "chunks", "c",
                      "different splits"),
    "no teacher": Good(None, ("qwen2", "plain"), "alone", None, "every supervised token"),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_pair_is_told_how_it_is_compared(name: str, patient: Patient) -> None:
    good = GOOD[name]
    teacher = good.teacher and patient.checkpoints(*good.teacher)
    path = patient.recipe(
        teacher, patient.checkpoints(*good.student, seed=1),
        patient.pictures() if good.images else TEXT_ROWS,
        objective="taid" if teacher else "ce")
    done = patient.cli("inspect", path)
    assert done.status == 0, done.err
    assert not done.err.strip()
    assert done.out.startswith(f"verdict   {good.outcome.upper()}: ")
    assert good.words in " ".join(done.out.split())
    verdict = json.loads(patient.cli("inspect", path, "--json").out)["verdict"]
    assert (verdict["outcome"], verdict["case"]) == (good.outcome, good.case)
    assert good.words in verdict["reason"]
    assert verdict["changes"] == []


# ----- wrong pairs --------------------------------------------------------------------------

Spoil = Callable[[Patient], Path]


def text_pair(patient: Patient, **changes: Any) -> Path:
    models = {"teacher": patient.checkpoints("llama"),
              "student": patient.checkpoints("qwen2", seed=1)}
    return patient.recipe(**(models | changes))


def image_pair(patient: Patient, **changes: Any) -> Path:
    models = {"teacher": patient.checkpoints("internvl"),
              "student": patient.checkpoints("llava", seed=1), "rows": patient.pictures()}
    return patient.recipe(**(models | changes))


def other_tokenizer_but_shared(patient: Patient) -> Path:
    return text_pair(patient, student=patient.checkpoints("qwen2", "other"),
                     objective={"name": "taid", "alignment": "shared"})


def blind_teacher(patient: Patient) -> Path:
    return image_pair(patient, teacher=patient.checkpoints("llama"))


def encoder_decoder(patient: Patient) -> Path:
    from transformers import T5Config

    folder = patient.folder / "t5"
    T5Config(vocab_size=600, architectures=["T5ForConditionalGeneration"]).save_pretrained(folder)
    make_tokenizer("llama").save_pretrained(folder)
    return text_pair(patient, teacher=str(folder))


def florence(patient: Patient) -> Path:
    from transformers import CLIPImageProcessor, Florence2Config, Florence2Processor

    folder = patient.folder / "florence"
    Florence2Config(is_encoder_decoder=True, architectures=["Florence2ForConditionalGeneration"]
                    ).save_pretrained(folder)
    tokenizer = make_tokenizer("llava")
    Florence2Processor(CLIPImageProcessor(), tokenizer).save_pretrained(folder)
    return image_pair(patient, teacher=str(folder))


def no_template(patient: Patient) -> Path:
    student = patient.checkpoints("llava", seed=1)
    return image_pair(patient, student=patient.spoilt(student, without("chat_template*")))


def conversation_without_template(patient: Patient) -> Path:
    chat = [{"role": role, "content": text} for role, text in (
        ("user", "what"), ("assistant", "a"), ("user", "and"), ("assistant", "b"))]
    return text_pair(patient, student=patient.checkpoints("gpt2"), rows=[{"messages": chat}])


LOSES_PARTS = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
               "{% if message['content'] is string %}{{ message['content'] }}{% endif %}<|im_end|>"
               "{% endfor %}")
LOSES_ANSWERS = ("{% for message in messages %}{% if message['role'] == 'user' %}"
                 "<|im_start|>{{ message['content'] }}<|im_end|>{% endif %}{% endfor %}")


def template_without_parts(patient: Patient) -> Path:
    student = patient.checkpoints("llava", seed=1)
    return image_pair(patient, student=patient.with_template(student, LOSES_PARTS))


def template_without_answers(patient: Patient) -> Path:
    return text_pair(patient, student=patient.with_template(
        patient.checkpoints("qwen2", seed=1), LOSES_ANSWERS))


def small_head(patient: Patient) -> Path:
    student = patient.checkpoints("qwen2", seed=1)
    change = set_config(vocab_size=500, pad_token_id=0)
    return text_pair(patient, student=patient.spoilt(student, change))


def padding_beyond_the_head(patient: Patient) -> Path:
    student = patient.checkpoints("qwen2", seed=1)
    return text_pair(patient, student=patient.spoilt(student, set_config(vocab_size=500)))


def nothing_to_learn(patient: Patient) -> Path:
    return text_pair(patient, rows=[{"prompt": "what", "completion": " "}] * 3)


def nothing_short_enough(patient: Patient) -> Path:
    return text_pair(patient, train={"max_length": 8})


def missing_images(patient: Patient) -> Path:
    return image_pair(patient, rows=[{**row, "image": f"pictures/{index}.png"}
                                     for index, row in enumerate(patient.pictures())])


def no_such_model(patient: Patient) -> Path:
    return text_pair(patient, student=str(patient.folder / "nothing"))


# what is spoilt -> words of the message, words of what to change
WRONG: dict[Spoil, tuple[str, str]] = {
    other_tokenizer_but_shared: ("split text differently", "Take objective.alignment out"),
    blind_teacher: ("the teacher cannot see", "Name a vision-language model"),
    encoder_decoder: ("is an encoder-decoder", "Name a decoder-only model"),
    florence: ("is an encoder-decoder", "Name a decoder-only model"),
    no_template: ("student: the processor has no chat template", "chat_template: template.jinja"),
    conversation_without_template: ("the student has no chat template",
                                    "chat_template: template.jinja"),
    template_without_parts: ("student: the chat template prints no typed parts",
                             "came with the processor"),
    template_without_answers: ("student: the chat template does not print a question and an answer",
                               "it has to print both contents"),
    small_head: ("student: the head has 500 rows, but the tokenizer names 515",
                 "resize_token_embeddings"),
    padding_beyond_the_head: ("student: cannot load", "Change what the message names"),
    nothing_to_learn: ("none of the first 3 records can be used: 3 x empty answer",
                       "Give these records an answer"),
    nothing_short_enough: ("longer than max_length", "Raise train.max_length"),
    missing_images: ("no image of", "data.train.image_root"),
    no_such_model: ("student: no model at", "Change what the message names"),
}
FOUND_OF_BOTH = [spoil for spoil in WRONG if spoil not in (no_such_model, padding_beyond_the_head)]


@pytest.mark.parametrize("spoil", WRONG, ids=lambda spoil: spoil.__name__)
def test_a_wrong_pair_is_told_what_to_change(spoil: Spoil, patient: Patient) -> None:
    message, change = WRONG[spoil]
    path = spoil(patient)
    done = patient.cli("inspect", path)
    assert done.status == 2
    (error,) = done.errors
    assert done.err.strip() == error  # one sentence, no trace and no warnings
    assert message in error
    words = " ".join(done.out.split())
    assert words.startswith("verdict REFUSED: ")
    assert change in words
    plain = patient.cli("inspect", path, "--json")
    assert plain.status == 2
    found = json.loads(plain.out)
    assert found["verdict"]["outcome"] == "refused"
    assert f"error: {found['verdict']['reason']}" == error
    assert found["problem"] == found["verdict"]["reason"]
    assert any(change in told for told in found["verdict"]["changes"])


@pytest.mark.parametrize("spoil", WRONG, ids=lambda spoil: spoil.__name__)
def test_what_distill_says_is_what_the_doctor_says(
    spoil: Spoil, patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Distilling loads weights before it pairs, so the skeletons stand in for them here."""
    from taid_vlm.models.loading import load_skeleton

    monkeypatch.setattr("taid_vlm.runs.run.load_model",
                        lambda spec, role, *_: load_skeleton(spec, role))
    path = spoil(patient)
    told = patient.inspect(path, "train.max_steps=1").problem
    assert patient.cli("distill", path, "train.max_steps=1").errors == [f"error: {told}"]


@pytest.mark.parametrize("spoil", FOUND_OF_BOTH, ids=lambda spoil: spoil.__name__)
def test_a_refused_pair_shows_what_can_be_found(spoil: Spoil, patient: Patient) -> None:
    facts = patient.inspect(spoil(patient)).facts
    assert facts.keys() == {"teacher", "student"}
    for side in facts.values():
        assert side.model is not None
        assert side.model.architecture
        assert side.tokenizer is not None
        assert side.tokenizer.tokens > 400
    lines = {(row.section, row.label) for row in fact_rows(facts)}
    assert {("Head", "rows"), ("Tokenizer", "kind"), ("Chat template", "from")} <= lines


def test_one_good_side_is_shown_beside_a_missing_one(patient: Patient) -> None:
    facts = patient.inspect(no_such_model(patient)).facts
    assert facts["teacher"].head is not None
    assert facts["student"].model is None
    assert facts["student"].tokenizer is None


# ----- warnings -----------------------------------------------------------------------------


def warned(patient: Patient, path: Path, *overrides: str) -> str:
    found = patient.inspect(path, *overrides)
    assert found.verdict.outcome != "refused", found.problem
    return "\n".join(found.verdict.warnings)


def test_a_plain_pair_is_warned_of_nothing(patient: Patient) -> None:
    path = patient.recipe(patient.checkpoints("llama"), patient.checkpoints("llama", seed=1))
    assert warned(patient, path) == ""


@pytest.mark.parametrize("teacher", [True, False])
def test_questions_and_answers_that_nothing_separates(patient: Patient, teacher: bool) -> None:
    rows = [{"prompt": "what is it?", "completion": ANSWER}] * 4
    path = patient.recipe(patient.checkpoints("gpt2") if teacher else None,
                          patient.checkpoints("gpt2", seed=1), rows,
                          objective="taid" if teacher else "ce")
    told = warned(patient, path)
    for role in ("teacher", "student") if teacher else ("student",):
        assert told.count(f"{role}: no chat template, so a question and its answer") == 1
        assert f"'what is it?{ANSWER[:20]}'" in told and f"set {role}.chat_template" in told
    spaced = [{"prompt": "what is it?", "completion": " " + ANSWER}] * 4
    path = patient.recipe(None, patient.checkpoints("gpt2", seed=1), spaced, objective="ce")
    assert "no chat template" not in warned(patient, path)


def test_templates_that_think_differently(patient: Patient) -> None:
    path = text_pair(patient, teacher=patient.checkpoints("qwen3"))
    told = warned(patient, path)
    assert "think differently before an answer (teacher: empty; student: none)" in told


def test_a_student_that_is_asked_otherwise_than_it_learned(patient: Patient) -> None:
    path = text_pair(patient, student=patient.checkpoints("qwen3"))
    told = warned(patient, path)
    assert "prints a thought (empty) before the answers it learns, and another (none)" in told
    assert "generation prompt" not in warned(patient, text_pair(patient))


def test_default_system_prompts_that_differ(patient: Patient) -> None:
    told = warned(patient, text_pair(patient))
    assert "teacher: none; student: 'You are a helpful assistant.'" in told


def test_no_end_of_turn(patient: Patient) -> None:
    open_ended = ("{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}\n"
                  "{% endfor %}")
    path = text_pair(patient, student=patient.with_template(
        patient.checkpoints("qwen2", seed=1), open_ended))
    assert "leaves the last answer open; <|im_end|> is put behind it" in warned(patient, path)


def test_samples_that_cannot_be_spelled(patient: Patient) -> None:
    rows = [*TEXT_ROWS, {"prompt": "what", "completion": "cafe\u0301 a"}]  # Qwen2's NFC changes it
    told = warned(patient, text_pair(patient, rows=rows))
    assert "1 of 5 probed answers cannot be spelled by both tokenizers" in told
    assert "1 of the first 5 records will be left out" not in told  # there are no more than these
    assert "1 of 5 records will be left out (20.0%): 1 x cannot be aligned" in told


def test_images_that_do_not_fit_into_a_record(patient: Patient) -> None:
    """InternVL makes 22 tokens of a picture of 640x480 here, and LLaVA 16 of any."""
    path = patient.recipe(
        patient.checkpoints("internvl"), patient.checkpoints("llava", seed=1),
        [*patient.pictures(), {"text": ANSWER}], train={"max_length": 20})
    told = warned(patient, path)
    assert "an image of 640x480 pixels is 22 tokens for the teacher, but a record may have 20" in (
        told)
    assert "for the student, but" not in told
    assert re.search(r"records will be left out .*x longer than max_length", told)


def test_a_vocabulary_of_which_little_is_shared(patient: Patient) -> None:
    path = text_pair(patient, teacher=patient.checkpoints("qwen2"),
                     student=patient.checkpoints("mistral", "unigram"))
    assert re.search(r"\d+ of the student's 438 tokens \(12%\) have no partner",
                     warned(patient, path))


# ----- facts --------------------------------------------------------------------------------


def test_facts_are_those_of_the_models(patient: Patient) -> None:
    from zoo import build

    built = build("gemma2", tied=True)
    folder = patient.folder / "gemma"
    built.model.save_pretrained(folder)
    built.processor.save_pretrained(folder)
    facts = patient.inspect(patient.recipe(
        str(folder), patient.checkpoints("llama", "metaspace"))).facts
    teacher, student = facts["teacher"], facts["student"]
    assert sum(teacher.model.parameters.values()) == sum(
        p.numel() for p in built.model.parameters())
    assert teacher.head.rows == built.model.get_output_embeddings().weight.shape[0]
    assert teacher.head.tied
    assert not student.head.tied
    assert teacher.head.softcap == {"final_logit_softcapping": 3.0}
    assert student.head.softcap == student.head.scale == {}
    assert teacher.end_of_turn == "<end_of_turn>"
    assert teacher.one_end is False
    assert student.one_end is True
    assert teacher.tokenizer.kind == "byte-level BPE"
    assert student.tokenizer.kind == "BPE with metaspace and byte fallback"
    assert teacher.tokenizer.adds == "<bos> in front"
    assert teacher.template.before_answer == "<end_of_turn>\n<start_of_turn>model\n"
    assert teacher.max_length == teacher.model.positions == 1024


@pytest.mark.parametrize(("family", "before", "glued", "system", "thoughts"), [
    ("qwen2", "<|im_end|>\n<|im_start|>assistant\n", "", "You are a helpful assistant.",
     ("none", "none")),
    ("smolvlm", "<end_of_utterance>\nAssistant: ", " ", None, ("none", "none")),
    ("mistral", "[/INST] ", " ", None, ("none", "none")),
    ("gpt2", "", "", None, ("none", "none")),
    ("qwen3_5", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", "", None,
     ("empty", "open")),
    ("gemma4", "<turn|>\n<|turn>model\n", "", None, ("none", "empty")),
])
def test_what_templates_print_around_answers(
    family: str, before: str, glued: str, system: str | None, thoughts: tuple[str, str],
    patient: Patient
) -> None:
    path = patient.recipe(None, patient.checkpoints(family), objective="ce")
    template = patient.inspect(path).facts["student"].template
    assert template.before_answer == before
    assert template.glued == glued
    assert template.system == system
    assert (template.thought, template.asked_thought) == thoughts


def test_image_tokens_are_those_of_real_images_of_that_size(patient: Patient) -> None:
    from PIL import Image

    path = image_pair(patient, teacher=patient.checkpoints("qwen2_5_vl"))
    Image.new("RGB", (1000, 250), (9, 90, 200)).save(patient.folder / "0.png")
    found = patient.inspect(path)
    for role, stream in found.record.sides.items():
        (image,) = [piece for piece in stream.pieces if piece.kind == "image"]
        assert found.facts[role].images.tokens["1000x250"] == image.count
    assert len(set(found.facts["teacher"].images.tokens.values())) > 1


# ----- stages -------------------------------------------------------------------------------


def test_every_stage_is_checked_and_the_first_is_shown(patient: Patient) -> None:
    other = patient.data([{"prompt": "and", "completion": "two"}] * 3, "other.jsonl")
    stages = [{"name": "one", "data": {"train": other}}, {"name": "two"}]
    found = patient.inspect(text_pair(patient, stages=stages, train={"max_steps": 1}))
    assert found.record.source == "other.jsonl:1"
    assert [check.name for check in found.preflight] == ["one: data.train", "two: data.train"]
    assert [check.records for check in found.preflight] == [3, 4]


def test_a_stage_that_is_refused_is_named(patient: Patient) -> None:
    stages = [{"name": "one"}, {"name": "two", "objective": {
        "name": "taid", "alignment": "exact"}}]
    found = patient.inspect(text_pair(patient, stages=stages, train={"max_steps": 1}))
    assert found.verdict.outcome == "refused"
    assert found.problem.startswith("stages 'two': alignment: exact")
    assert found.verdict.changes[0].startswith("Take objective.alignment out")


def test_answers_stand_in_the_json_as_in_the_text(patient: Patient) -> None:
    path = text_pair(patient)
    sides = json.loads(patient.cli("inspect", path, "--json").out)["record"]["sides"]
    for side in sides.values():
        compared = [piece for piece in side["pieces"] if piece["group"] is not None]
        assert "".join(piece["text"] for piece in compared).startswith(ANSWER)
        assert [piece["group"] for piece in compared] == list(range(len(compared)))
