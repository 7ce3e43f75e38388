"""What a user can get wrong ends in one message before training, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli.recipes import (
    Checkpoints,
    Outcome,
    byte_rows,
    loaded,
    pairs,
    picture_rows,
    write_jsonl,
    write_parquet,
    write_recipe,
)

from taid_vlm.training.trainer import DistillationTrainer

Cli = Callable[..., Outcome]


@dataclass
class Kitchen:
    """A good recipe for text, and one for images, that a case then spoils."""

    folder: Path
    checkpoints: Checkpoints

    def recipe(self, images: bool = False) -> Path:
        teacher, student = ("internvl", "llava") if images else ("llama", "qwen2")
        make = (lambda n, seed: picture_rows(self.folder, n, seed)) if images else pairs
        return write_recipe(self.folder, {
            "teacher": self.checkpoints(teacher),
            "student": self.checkpoints(student, seed=1),
            "data": {side: str(write_jsonl(self.folder / f"{side}.jsonl", make(number, number)))
                     for side, number in (("train", 8), ("eval", 4))},
            "train": {"max_steps": 2, "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-3},
            "evaluate": {"examples": 0},
            "output_dir": str(self.folder / "out"),
        })

    def write(self, name: str, text: str) -> str:
        (self.folder / name).write_text(text)
        return str(self.folder / name)

    def rows(self, rows: Sequence[dict[str, Any]], name: str = "broken.jsonl") -> str:
        return str(write_jsonl(self.folder / name, rows))

    def spoilt(self, model: str, change: Callable[[Path], None]) -> str:
        """A copy of a checkpoint with something broken."""
        copy = self.folder / f"{Path(model).name}-spoilt"
        shutil.copytree(model, copy)
        change(copy)
        return str(copy)


@pytest.fixture
def kitchen(tmp_path: Path, checkpoints: Checkpoints) -> Kitchen:
    return Kitchen(tmp_path, checkpoints)


# ----- the cases: what is spoilt, and what the message must say -----------------------------

Spoil = Callable[[Kitchen], list[str]]


def train(path: str) -> list[str]:
    return [f"data.train={path}"]


def encoder_decoder(kitchen: Kitchen) -> list[str]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(kitchen.folder / "t5")
    return [f"teacher={kitchen.folder}/t5"]


def encoder(kitchen: Kitchen) -> list[str]:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                       intermediate_size=8, image_size=8, patch_size=4)
    ViTModel(config).save_pretrained(kitchen.folder / "vit")
    return [f"student={kitchen.folder}/vit"]


def pickled_weights(kitchen: Kitchen) -> list[str]:
    def pickle_them(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save({}, folder / "pytorch_model.bin")

    return [f"student={kitchen.spoilt(kitchen.checkpoints('qwen2', seed=1), pickle_them)}"]


def spoilt_student(change: Callable[[Path], None]) -> Spoil:
    return lambda kitchen: [
        f"student={kitchen.spoilt(kitchen.checkpoints('qwen2', seed=1), change)}"]


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-400])


def no_folder(kitchen: Kitchen) -> list[str]:
    (kitchen.folder / "empty-model").mkdir()
    return [f"student={kitchen.folder}/empty-model"]


def only_an_adapter(kitchen: Kitchen) -> list[str]:
    (kitchen.folder / "only-adapter").mkdir()
    kitchen.write("only-adapter/adapter_config.json", "{}")
    return [f"student={kitchen.folder}/only-adapter"]


def blind_to_its_files(kitchen: Kitchen) -> list[str]:
    def forget(folder: Path) -> None:
        for path in folder.glob("tokenizer*"):
            path.unlink()

    return [f"teacher={kitchen.spoilt(kitchen.checkpoints('internvl'), forget)}"]


def broken_images(kitchen: Kitchen) -> list[str]:
    rows = picture_rows(kitchen.folder, 6)
    for index in range(4):
        (kitchen.folder / f"{index}.png").write_bytes(b"no image at all")
    return train(kitchen.rows(rows))


def missing_images(kitchen: Kitchen) -> list[str]:
    return train(kitchen.rows([{**row, "image": f"pictures/{i}.png"}
                               for i, row in enumerate(picture_rows(kitchen.folder, 6))]))


def broken_bytes(kitchen: Kitchen) -> list[str]:
    rows = [{**row, "image": {"bytes": b"no image", "path": None}} for row in byte_rows(6)]
    return train(str(write_parquet(kitchen.folder / "broken.parquet", rows)))


def late_images(kitchen: Kitchen) -> list[str]:
    """Images only behind the records that are probed."""
    return train(kitchen.rows([*pairs(40), *picture_rows(kitchen.folder, 2)]))


def output_is_a_file(kitchen: Kitchen) -> list[str]:
    return [f"output_dir={kitchen.write('taken', 'x')}"]


def streamed(kitchen: Kitchen) -> list[str]:
    path = write_parquet(kitchen.folder / "train.parquet", pairs())
    return [f"data.train={{path: {path}, streaming: true}}", "train.max_steps=-1"]


def streamed_eval(kitchen: Kitchen) -> list[str]:
    path = write_parquet(kitchen.folder / "eval.parquet", pairs())
    return [f"data.eval={{path: {path}, streaming: true}}"]


def pipe(kitchen: Kitchen) -> list[str]:
    os.mkfifo(kitchen.folder / "pipe.jsonl")
    return train(f"{kitchen.folder}/pipe.jsonl")


def latin(kitchen: Kitchen) -> list[str]:
    (kitchen.folder / "latin.csv").write_bytes("prompt,completion\na,\xe9\n".encode("latin-1"))
    return train(f"{kitchen.folder}/latin.csv")


def deep_row(kitchen: Kitchen) -> list[str]:
    deep = "[" * 100_000 + "]" * 100_000
    row = f'{{"prompt": "a", "completion": {deep}}}'
    return train(kitchen.write("broken.jsonl", f"{GOOD}\n{row}\n"))


def no_data(kitchen: Kitchen) -> list[str]:
    (kitchen.folder / "none").mkdir()
    return train(f"{kitchen.folder}/none")


GOOD = json.dumps(pairs(1)[0])
def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


TEXT_CASES: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "wrong data path": (lambda k: train(f"{k.folder}/trian.jsonl"),
                        ("trian.jsonl", "does not exist", "Did you mean 'train.jsonl'?")),
    "wrong eval path": (lambda k: [f"data.eval={k.folder}/evall.jsonl"],
                        ("evall.jsonl", "'eval.jsonl'")),
    "a pipe": (pipe, ("pipe.jsonl", "no regular file")),
    "a device": (lambda k: train("/dev/null"), ("/dev/null", "no regular file")),
    "text in another encoding": (latin, ("latin.csv", "not UTF-8 at byte")),
    "a row nested too deeply": (deep_row, ("broken.jsonl:2", "not valid JSON")),
    "the folder that it runs in": (lambda k: train("."), ("a folder needs metadata.jsonl",)),
    "a folder without data": (no_data, ("none", "a folder needs metadata.jsonl")),
    "a split of a file": (lambda k: [f"data.eval={{path: {k.folder}/eval.jsonl, split: test}}"],
                          ("data.eval: ", "eval.jsonl", "split = 'test' has no effect")),
    "a stream of one JSON text": (
        lambda k: [f"data.train={{path: {k.write('a.json', f'[{GOOD}]')}, streaming: true}}"],
        ("data.train: ", "streaming = True has no effect")),
    "unknown file type": (lambda k: train(k.write("train.xlsx", "x")), ("train.xlsx", "'.xlsx'")),
    "wrong model path": (
        lambda k: [f"student={k.checkpoints.folder}/qwen2-plain-l"],
        ("student: no model at", "qwen2-plain-l'", "Did you mean", "/qwen2-plain-1'?")),
    "wrong teacher path": (lambda k: [f"teacher={k.checkpoints.folder}/lama-plain-0"],
                           ("teacher: no model at", "Did you mean", "/llama-plain-0'")),
    "model on the hub, offline": (lambda k: ["teacher=nobody/nothing"],
                                  ("teacher: cannot load 'nobody/nothing'",
                                   "There is no folder 'nobody/nothing' here")),
    "folder without config.json": (no_folder, ("student", "empty-model", "config.json")),
    "broken config.json": (spoilt_student(lambda f: (f / "config.json").write_text("{")),
                           ("student", "qwen2-plain-1-spoilt")),
    "only pickled weights": (pickled_weights, ("student", "qwen2-plain-1-spoilt", "safetensors")),
    "truncated weights": (spoilt_student(truncate), ("student", "qwen2-plain-1-spoilt")),
    "only an adapter": (only_an_adapter, ("student: '", "only-adapter/adapter_config.json",
                                          "peft_type = null", "LORA")),
    "no tokenizer": (
        spoilt_student(lambda f: [p.unlink() for p in f.glob("tokenizer*")] and None),
        ("student", "qwen2-plain-1-spoilt", "holds no tokenizer")),
    "a limit that is no number": (
        spoilt_student(lambda f: change_json(f / "tokenizer_config.json", model_max_length={})),
        ("student: cannot load", "qwen2-plain-1-spoilt", "'>' not supported")),
    "encoder-decoder": (encoder_decoder, ("teacher", "t5", "encoder-decoder", "decoder-only")),
    "no language model": (encoder, ("student", "vit", "neither")),
    "missing column": (lambda k: train(k.rows([{"prompt": "a", "response": "b"}])),
                       ("broken.jsonl:1", "'completion' is missing", "prompt, response",
                        "data.train.columns: {completion: response}")),
    "malformed JSON": (lambda k: train(k.write("broken.jsonl", f"{GOOD}\n\n{GOOD[:-4]}\n")),
                       ("broken.jsonl:3", "not valid JSON")),
    "a line that is no object": (lambda k: train(k.write("broken.jsonl", f"{GOOD}\n[1]\n")),
                                 ("broken.jsonl:2", "object")),
    "empty file": (lambda k: train(k.write("broken.jsonl", "\n")),
                   ("broken.jsonl", "holds no records")),
    "empty eval file": (lambda k: [f"data.eval={k.write('broken.jsonl', '')}"],
                        ("broken.jsonl", "holds no records")),
    "unknown role": (
        lambda k: train(k.rows([{"messages": [{"role": "robot", "content": "x"}]}])),
        ("broken.jsonl:1", "messages[0].role = 'robot'", "assistant")),
    "answers that are no text": (lambda k: train(k.rows([{"prompt": "a", "completion": 7}])),
                                 ("broken.jsonl:1", "completion")),
    "all answers empty": (
        lambda k: train(k.rows([{**row, "completion": " "} for row in pairs(5)])),
        ("none of the first 5", "empty answer")),
    "all held-out answers empty": (
        lambda k: [f"data.eval={k.rows([{**row, 'completion': ' '} for row in pairs(3)])}"],
        ("none of the first 3", "empty answer")),
    "no answer among the first": (
        lambda k: train(k.rows([*({**row, "completion": " "} for row in pairs(32)), *pairs(8)])),
        ("none of the first 32", "32 x empty answer")),
    "everything too long": (lambda k: ["train.max_length=4"], ("longer than max_length",)),
    "unknown loss": (lambda k: ["objective.name=tiad"], ("'tiad'", "'taid'")),
    "t_start > t_end": (lambda k: ["objective={name: taid, t_start: 0.9, t_end: 0.1}"],
                        ("t_start = 0.9", "t_end = 0.1")),
    "different tokenizer": (lambda k: [f"student={k.checkpoints('qwen2', 'other')}",
                                       "objective={name: taid, alignment: shared}"],
                            ("split text differently", "Teacher: '", "student: '")),
    "streamed without max_steps": (streamed, ("data.train is streamed", "train.max_steps")),
    "streamed evaluation": (streamed_eval, ("data.eval", "data.eval.max_records")),
    "unknown dtype": (lambda k: ["student.dtype=float12"], ("student.dtype = 'float12'",
                                                            "'float32'")),
    "unknown peft option": (lambda k: ["student.peft={rank: 4}"], ("student.peft", "rank")),
    "evaluation steps without data": (
        lambda k: ["data.eval=null", "train.eval_strategy=steps"], ("data.eval", "eval_strategy")),
    "adapter on nothing": (lambda k: ["student.peft={r: 4, target_modules: [nope]}"],
                           ("student.peft", "nope")),
    "batches of nothing": (lambda k: ["train.per_device_train_batch_size=0"],
                           ("train.per_device_train_batch_size = 0",)),
    "half a step": (lambda k: ["train.max_steps=2.5"], ("train.max_steps = 2.5",)),
    "less than a step": (lambda k: ["train.max_steps=0.5"], ("train.max_steps = 0.5",)),
    "half precision without a GPU": (lambda k: ["train.bf16=true", "train.use_cpu=false"],
                                     ("error: train: ", "bf16", "use_cpu")),
    "output_dir is a file": (output_is_a_file, ("output_dir", "taken")),
    "images behind the first records": (
        late_images, ("hold images", "the student and the teacher cannot see")),
    "a template that is none": (lambda k: ["student.chat_template='{% for %}'"],
                                ("student.chat_template",)),
    "no chat template there": (lambda k: ["student.chat_template=nowhere.jinja"],
                               ("student.chat_template", "nowhere.jinja")),
}
IMAGE_CASES: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "teacher without vision": (lambda k: [f"teacher={k.checkpoints('llama')}"],
                               ("images", "the teacher cannot see")),
    "student without vision": (lambda k: [f"student={k.checkpoints('qwen2', seed=1)}"],
                               ("images", "the student cannot see")),
    "no tokenizer beside the processor": (
        blind_to_its_files, ("error: teacher: ", "internvl-plain-0-spoilt")),
    "neither with vision": (
        lambda k: [f"teacher={k.checkpoints('llama')}",
                   f"student={k.checkpoints('qwen2', seed=1)}"],
        ("the student and the teacher cannot see",)),
    "all images unreadable": (broken_images, ("no image of", "broken.jsonl", "0.png")),
    "all images elsewhere": (missing_images, ("no image of", "pictures/0.png", "image_root")),
    "all bytes unreadable": (broken_bytes, ("no image of", "broken.parquet[0]")),
    "more marks than images": (
        lambda k: train(k.rows([{**row, "prompt": "<image><image>"}
                                for row in picture_rows(k.folder, 2)])),
        ("broken.jsonl:1", "more image marks")),
}


if torch.accelerator.is_available():
    del TEXT_CASES["half precision without a GPU"]


def check_refused(done: Outcome, wanted: Sequence[str], folder: Path) -> None:
    """One message, and no output folder that could pass for a run's."""
    assert done.status == 2, done.err
    assert len(done.errors) == 1
    missing = [words for words in wanted if words not in done.err]
    assert not missing, f"{missing} not in {done.errors[0]}"
    assert "Traceback" not in done.err
    assert not (folder / "out").exists()


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(self: DistillationTrainer, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(DistillationTrainer, "train", train)


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("case", TEXT_CASES)
def test_mistakes_with_text(case: str, kitchen: Kitchen, cli: Cli) -> None:
    recipe = kitchen.recipe()
    spoil, wanted = TEXT_CASES[case]
    check_refused(cli("distill", recipe, *spoil(kitchen)), wanted, kitchen.folder)


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("case", IMAGE_CASES)
def test_mistakes_with_images(case: str, kitchen: Kitchen, cli: Cli) -> None:
    recipe = kitchen.recipe(images=True)
    spoil, wanted = IMAGE_CASES[case]
    check_refused(cli("distill", recipe, *spoil(kitchen)), wanted, kitchen.folder)


@pytest.mark.parametrize("index", [8, -9, 1000])
def test_a_record_that_is_not_there(index: int, kitchen: Kitchen, cli: Cli) -> None:
    done = cli("inspect", kitchen.recipe(), f"--record={index}")
    check_refused(done, (f"--record {index}", "no such record"), kitchen.folder)


@pytest.mark.parametrize("arguments", [[], ["destill"], ["distill"], ["inspect", "x", "--record=a"],
                                       ["distill", "x", "--resum=1"]])
def test_a_malformed_command_line(arguments: list[str], cli: Cli) -> None:
    done = cli(*arguments)
    assert done.status == 2
    assert "usage: taid-vlm" in done.err


def test_no_recipe(kitchen: Kitchen, cli: Cli) -> None:
    kitchen.recipe()
    done = cli("distill", kitchen.folder / "recip.yaml")
    check_refused(done, ("recip.yaml", "Did you mean 'recipe.yaml'?"), kitchen.folder)


# ----- one bad record among good ones -------------------------------------------------------


@pytest.mark.parametrize("images", [False, True])
def test_an_empty_answer_is_counted(images: bool, kitchen: Kitchen, cli: Cli) -> None:
    recipe = kitchen.recipe(images)
    for side in ("train", "eval"):
        rows = [json.loads(line) for line in (kitchen.folder / f"{side}.jsonl").open()]
        rows[1]["completion"] = "\n"
        write_jsonl(kitchen.folder / f"{side}.jsonl", rows)
    counted(kitchen, cli, recipe, "empty answer")


def test_an_unreadable_image_is_counted(kitchen: Kitchen, cli: Cli) -> None:
    recipe = kitchen.recipe(images=True)
    for side in ("train", "eval"):
        rows = [json.loads(line) for line in (kitchen.folder / f"{side}.jsonl").open()]
        rows[1]["image"] = "gone.png"
        write_jsonl(kitchen.folder / f"{side}.jsonl", rows)
    counted(kitchen, cli, recipe, "unreadable image")


def counted(kitchen: Kitchen, cli: Cli, recipe: Path, reason: str) -> None:
    """Two epochs of training see the bad record twice, each evaluation once."""
    done = cli("distill", recipe, "train.max_steps=-1", "train.num_train_epochs=2")
    assert done.status == 0, done.err
    results = loaded(kitchen.folder / "out" / "results.json")
    assert results["train"]["records_left_out"] == {reason: 2}
    for when in ("before", "after"):
        assert results["eval"][when]["dropped"] == {reason: 1}
        assert results["eval"][when]["n_answers"] == 3
    assert reason in (kitchen.folder / "out" / "report.html").read_text()


# ----- a full disk --------------------------------------------------------------------------


class FullDisk:
    """Stands in for a writer: puts down half a file where it was asked to, then fails."""

    def __init__(self, after: int = 0) -> None:
        self.left = after

    def __call__(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def write(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left >= 0:
                return original(*args, **kwargs)
            path = next((Path(x) for x in args if isinstance(x, (str, Path))), None)
            if path is not None and path.parent.is_dir() and not path.is_dir():
                path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        return write


def fill_disk(patch: pytest.MonkeyPatch, what: str, after: int = 0) -> None:
    import transformers.modeling_utils as modeling

    owner, name = {"weights": (modeling, "safe_save_file"), "optimizer": (torch, "save")}[what]
    patch.setattr(owner, name, FullDisk(after)(getattr(owner, name)))


@pytest.mark.parametrize("what", ["weights", "optimizer"])
def test_a_full_disk_at_a_checkpoint(
    what: str, kitchen: Kitchen, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = kitchen.recipe()
    fill_disk(monkeypatch, what)
    done = cli("distill", recipe)
    assert done.status == 2
    assert len(done.errors) == 1
    assert "No space left on device" in done.errors[0]
    assert str(kitchen.folder / "out" / "checkpoint-2") in done.errors[0]
    assert [path.name for path in (kitchen.folder / "out").iterdir()] == ["recipe.yaml"]


def test_a_full_disk_leaves_the_earlier_checkpoint(
    kitchen: Kitchen, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = kitchen.recipe()
    with monkeypatch.context() as patch:
        fill_disk(patch, "weights", after=1)
        assert cli("distill", recipe, "train.save_steps=1").status == 2
    assert sorted(path.name for path in (kitchen.folder / "out").iterdir()) == [
        "checkpoint-1", "recipe.yaml"]
    assert cli("distill", recipe, "train.save_steps=1", "--resume").status == 0


def test_a_full_disk_at_the_student_keeps_the_earlier_one(
    kitchen: Kitchen, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, output = kitchen.recipe(), kitchen.folder / "out"
    assert cli("distill", recipe, "train.save_strategy='no'").status == 0
    before = {path.name: path.read_bytes() for path in (output / "student").iterdir()}
    with monkeypatch.context() as patch:
        fill_disk(patch, "weights")
        done = cli("distill", recipe, "train.save_strategy='no'", "train.seed=5", "--overwrite")
    assert done.status == 2
    assert len(done.errors) == 1
    assert "No space left on device" in done.errors[0]
    assert str(output / "student") in done.errors[0]
    assert {path.name: path.read_bytes() for path in (output / "student").iterdir()} == before
    assert not list(output.glob(".*"))


def test_a_full_disk_at_the_first_student(
    kitchen: Kitchen, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, output = kitchen.recipe(), kitchen.folder / "out"
    fill_disk(monkeypatch, "weights")
    assert cli("distill", recipe, "train.save_strategy='no'").status == 2
    assert [path.name for path in output.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(("name", "left"), [
    ("recipe.yaml", set()), ("results.json", {"recipe.yaml", "student", "eval_answers.jsonl"}),
    ("report.html", {"recipe.yaml", "student", "eval_answers.jsonl", "results.json"}),
])
def test_a_full_disk_at_the_small_files(
    name: str, left: set[str], kitchen: Kitchen, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def fail(source: Any, target: Any) -> None:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    done = cli("distill", kitchen.recipe(), "train.save_strategy='no'")
    assert done.status == 2
    assert len(done.errors) == 1
    assert f"{kitchen.folder}/out/{name}" in done.errors[0]
    assert "No space left on device" in done.errors[0]
    assert {path.name for path in (kitchen.folder / "out").glob("*")} == left


def test_the_kitchen_itself_is_sound(kitchen: Kitchen, cli: Cli) -> None:
    """Without a mistake both recipes run, so the refusals above are about the mistakes."""
    for images in (False, True):
        recipe = kitchen.recipe(images)
        done = cli("distill", recipe, f"output_dir={kitchen.folder}/{images}")
        assert done.status == 0, done.err
        assert yaml.safe_load((kitchen.folder / str(images) / "recipe.yaml").read_text())
