"""LoRA students end to end: trained, evaluated, inspected, merged, and trained on."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli.recipes import (
    Checkpoints,
    Outcome,
    command,
    loaded,
    pairs,
    picture_rows,
    write_jsonl,
    write_recipe,
)
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from zoo import build, save

from taid_vlm.config.model import ModelSpec
from taid_vlm.errors import TaidError
from taid_vlm.models.loading import load_model, load_processor, load_skeleton
from taid_vlm.models.parts import is_tied

peft = pytest.importorskip("peft")

Cli = Callable[..., Outcome]
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
HEAD = {"r": 4, "target_modules": ["q_proj", "lm_head"]}
EMBEDDINGS = {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}
WHOLE_HEAD = {**LORA, "modules_to_save": ["lm_head"]}
SHARED = {**LORA, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
DORA = {**LORA, "use_dora": True}
CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "text": ("qwen2", False, LORA),
    "text, DoRA": ("qwen2", False, DORA),
    "text, tied": ("qwen2", True, LORA),
    "text, tied, head": ("qwen2", True, HEAD),
    "text, tied, embeddings": ("qwen2", True, EMBEDDINGS),
    "text, tied, whole head": ("qwen2", True, WHOLE_HEAD),
    "text, tied, kept so": ("qwen2", True, SHARED),
    "images": ("llava", False, WHOLE_HEAD),
    "images, tied, head": ("llava", True, HEAD),
    "images, tied, embeddings": ("llava", True, {**EMBEDDINGS, "use_dora": True}),
}
IDS = {"input_ids": torch.arange(5, 25)[None], "attention_mask": torch.ones(1, 20).long()}


@dataclass(frozen=True)
class Student:
    """A LoRA student as a run left it, its recipe, and its base model."""

    recipe: Path
    folder: Path
    base: Path
    sees_images: bool
    tied: bool
    peft: Mapping[str, Any]

    @property
    def tree(self) -> dict[str, Any]:
        return yaml.safe_load(self.recipe.read_text())

    def attached(self) -> Any:
        """The base model and its adapter, unmerged, by peft alone."""
        auto = AutoModelForImageTextToText if self.sees_images else AutoModelForCausalLM
        return peft.PeftModel.from_pretrained(auto.from_pretrained(self.base), self.folder).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**IDS).logits


def spec(folder: Path, **more: Any) -> ModelSpec:
    return ModelSpec.model_validate({"model_name_or_path": str(folder), **more})


def recipe_tree(folder: Path, teacher: str, student: Path, sees: bool, **peft: Any
                ) -> dict[str, Any]:
    """Two steps that move the weights far enough to be seen."""
    rows = {side: picture_rows(folder, 6, seed) if sees else pairs(6, seed)
            for seed, side in enumerate(("train", "eval"))}
    return {
        "teacher": teacher,
        "student": {"model_name_or_path": str(student), "peft": peft},
        "data": {side: str(write_jsonl(folder / f"{side}.jsonl", part))
                 for side, part in rows.items()},
        "train": {"max_steps": 2, "learning_rate": 5e-2, "use_cpu": True, "disable_tqdm": True,
                  "per_device_train_batch_size": 3},
        "evaluate": {"examples": 1, "max_new_tokens": 3},
        "output_dir": str(folder / "out"),
    }


@pytest.fixture(scope="module", params=CASES)
def student(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory,
    checkpoints: Checkpoints,
) -> Student:
    family, tied, config = CASES[request.param]
    sees, folder = family == "llava", tmp_path_factory.mktemp("lora")
    base = save(build(family, tokenizer="permuted" if sees else "plain", seed=1, tied=tied),
                folder / "base")
    teacher = checkpoints("internvl" if sees else "llama")
    recipe = write_recipe(folder, recipe_tree(folder, teacher, base, sees, **config))
    assert command("distill", recipe) == 0
    return Student(recipe, folder / "out/student", base, sees, tied, config)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, checkpoints: Checkpoints) -> Student:
    """A text student with an adapter that is nothing special."""
    folder = tmp_path_factory.mktemp("plain")
    base = save(build("qwen2", seed=1), folder / "base")
    recipe = write_recipe(folder, recipe_tree(folder, checkpoints("llama"), base, False, **LORA))
    assert command("distill", recipe) == 0
    return Student(recipe, folder / "out/student", base, False, False, LORA)


def copied(student: Student, folder: Path, **changes: Any) -> Path:
    """The adapter elsewhere, with other values in its adapter_config.json."""
    shutil.copytree(student.folder, folder)
    config = loaded(folder / "adapter_config.json")
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return folder


# ----- one student through every command ----------------------------------------------------


def test_it_loads_merged(student: Student) -> None:
    attached, start = student.attached(), load_model(spec(student.base), "student")
    merged = load_model(spec(student.folder), "student")
    assert (logits(attached) - logits(start)).abs().max() > 0.1
    torch.testing.assert_close(logits(merged), logits(attached), rtol=1e-4, atol=1e-4)
    assert all(p.requires_grad for p in merged.parameters())
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_a_tied_head_is_untied_only_where_the_adapter_changes_it(student: Student) -> None:
    merged = load_model(spec(student.folder), "student")
    skeleton = load_skeleton(spec(student.folder), "student")
    assert is_tied(merged) == is_tied(skeleton) == (
        student.tied and student.peft in (LORA, SHARED))
    assert merged.config.tie_word_embeddings == is_tied(merged)
    assert {n: p.shape for n, p in merged.named_parameters()} == {
        n: p.shape for n, p in skeleton.named_parameters()}


def test_merge(student: Student, cli: Cli, tmp_path: Path) -> None:
    done = cli("merge", student.folder, "--output-dir", tmp_path / "merged")
    assert done.status == 0, done.err
    untied = student.tied and student.peft not in (LORA, SHARED)
    assert ("head untied" in done.out) == untied
    auto = AutoModelForImageTextToText if student.sees_images else AutoModelForCausalLM
    merged = auto.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(student.attached()), rtol=1e-4, atol=1e-4)
    (AutoProcessor if student.sees_images else AutoTokenizer).from_pretrained(tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "model.safetensors"} <= names
    assert not any("adapter" in name for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_evaluate(student: Student, cli: Cli, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "sums.jsonl", [
        {"question": f"{a} + {a}?", "options": ["0", "2", "4"], "answer": "ABC"[a]}
        for a in range(3)])
    (tmp_path / "sums.yaml").write_text(yaml.safe_dump(
        {"type": "multiple_choice", "data": "sums.jsonl", "images": False}))
    assert cli("merge", student.folder, "--output-dir", tmp_path / "merged").status == 0
    done = cli("evaluate", "--model", f"run={student.folder.parent}",
               f"merged={tmp_path / 'merged'}", "--tasks", tmp_path / "sums.yaml",
               "--max-new-tokens", 4, "--dtype", "float32", "--output-dir", tmp_path / "eval")
    assert done.status == 0, done.err
    said = [(tmp_path / "eval" / name / "answers/sums.jsonl").read_text().splitlines()
            for name in ("run", "merged")]
    texts = [[json.loads(line)["answer"] for line in lines] for lines in said]
    assert texts[0] == texts[1]
    both = [loaded(tmp_path / "eval" / name / "results.json")["model"]
            for name in ("run", "merged")]
    assert both[0]["parameters"] == both[1]["parameters"]
    assert "base_sha256" in both[0]
    assert "base_sha256" not in both[1]


def test_inspect_plan_and_the_next_recipe(student: Student, cli: Cli, tmp_path: Path) -> None:
    tree = {**student.tree, "student": str(student.folder), "output_dir": str(tmp_path / "next")}
    tree["train"] |= {"max_steps": 1, "learning_rate": 1e-3}
    recipe = write_recipe(tmp_path, tree)
    for name in ("inspect", "plan"):
        done = cli(name, recipe)
        assert done.status == 0, done.out + done.err
    assert cli("distill", recipe).status == 0
    first, second = (loaded(folder / "results.json")
                     for folder in (student.folder.parent, tmp_path / "next"))
    assert second["eval"]["before"]["kl"] == pytest.approx(first["eval"]["after"]["kl"], rel=1e-3)
    parts = second["models"]["student"]["parts"].values()
    assert all(part["trained"] == part["parameters"] for part in parts)
    assert (tmp_path / "next/student/model.safetensors").exists()
    assert second["models"]["student"].get("saved") is None


def test_it_can_be_the_teacher(student: Student, cli: Cli, tmp_path: Path) -> None:
    tree = {**student.tree, "teacher": str(student.folder), "student": str(student.base),
            "output_dir": str(tmp_path / "out")}
    tree["train"] |= {"max_steps": 1}
    assert cli("distill", write_recipe(tmp_path, tree)).status == 0


# ----- what a run writes --------------------------------------------------------------------


def test_the_folder_works_from_anywhere(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    save(build("qwen2", seed=1), tmp_path / "base")
    tree = recipe_tree(tmp_path, checkpoints("llama"), Path("base"), False, **LORA)
    assert command("distill", write_recipe(tmp_path, tree)) == 0
    written = loaded(tmp_path / "out/student/adapter_config.json")["base_model_name_or_path"]
    assert written == str(tmp_path / "base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    load_model(spec(tmp_path / "out/student"), "student")
    assert loaded(tmp_path / "out/results.json")["models"]["student"]["saved"] == "adapter"


def test_an_adapter_on_an_adapter_is_saved_merged(
    plain: Student, cli: Cli, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    tree = {**plain.tree, "student": {"model_name_or_path": str(plain.folder), "peft": DORA},
            "output_dir": str(tmp_path / "out")}
    with caplog.at_level(logging.INFO, "taid_vlm"):
        assert cli("distill", write_recipe(tmp_path, tree)).status == 0
    assert "holds all weights" in caplog.text
    output, names = tmp_path / "out", {p.name for p in (tmp_path / "out/student").iterdir()}
    assert loaded(output / "results.json")["models"]["student"]["saved"] == "merged"
    assert "model.safetensors" in names
    assert not any("adapter" in name for name in names)
    tree |= {"student": str(output / "student"), "output_dir": str(tmp_path / "next")}
    tree["train"] |= {"max_steps": 1}
    assert cli("distill", write_recipe(tmp_path, tree)).status == 0
    after, before = (loaded(folder / "results.json")["eval"][when] for folder, when in (
        (output, "after"), (tmp_path / "next", "before")))
    assert before["kl"] == pytest.approx(after["kl"], rel=1e-4)


def test_stages_of_adapters(checkpoints: Checkpoints, cli: Cli, tmp_path: Path) -> None:
    """Each starts where the one before ended, and the last folder needs none of the others."""
    base = save(build("qwen2", seed=1, tied=True), tmp_path / "base")
    tree = recipe_tree(tmp_path, checkpoints("llama"), base, False, **HEAD)
    tree["stages"] = [{"name": "a"}, {"name": "b"}, {"name": "c", "train": {"max_steps": 1}}]
    assert cli("distill", write_recipe(tmp_path, tree)).status == 0
    folders = [tmp_path / "out" / place for place in ("stages/1-a", "stages/2-b", "")]
    results = [loaded(folder / "results.json") for folder in folders]
    for earlier, later in pairwise(results):
        assert later["eval"]["before"]["kl"] == pytest.approx(
            earlier["eval"]["after"]["kl"], rel=1e-4)
    assert [r["models"]["student"]["saved"] for r in results] == ["adapter", "merged", "merged"]
    shutil.rmtree(tmp_path / "out/stages")
    shutil.rmtree(base)
    load_model(spec(tmp_path / "out/student"), "student")


# ----- folders that do not load -------------------------------------------------------------


def test_a_relative_base_starts_at_the_adapter_or_where_we_are(
    plain: Student, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(plain.base, tmp_path / "base")
    folder = copied(plain, tmp_path / "deep/adapter", base_model_name_or_path="../../base")
    expected = logits(plain.attached())
    torch.testing.assert_close(logits(load_model(spec(folder), "student")), expected,
                               rtol=1e-4, atol=1e-4)
    other = copied(plain, tmp_path / "other", base_model_name_or_path="./base")
    with pytest.raises(TaidError, match="there is no model"):
        load_model(spec(other), "student")
    monkeypatch.chdir(tmp_path)
    load_model(spec(other), "student")


def test_a_processor_that_is_not_beside_the_adapter_is_the_bases(
    plain: Student, tmp_path: Path
) -> None:
    folder = copied(plain, tmp_path / "adapter")
    for path in folder.iterdir():
        if not path.name.startswith("adapter"):
            path.unlink()
    assert load_processor(spec(folder), "student").get_vocab() == AutoTokenizer.from_pretrained(
        plain.base).get_vocab()


@pytest.mark.parametrize(("changes", "words"), [
    ({"base_model_name_or_path": "/nowhere/base"},
     ("base_model_name_or_path = \"/nowhere/base\"", "there is no model", "write the folder")),
    ({"base_model_name_or_path": None}, ("base_model_name_or_path = null", "must name the base")),
    ({"base_model_name_or_path": "who/knows"},
     ("base_model_name_or_path = 'who/knows'", "cannot be loaded", "write")),
    ({"peft_type": "IA3"}, ('peft_type = "IA3"', "LORA", "peft")),
    ({"r": 2}, ("does not fit its base model", "size mismatch")),
    ({"target_modules": ["q_proj"]}, ("has no use for, 4 weights", "v_proj", "base_model_name")),
    ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, ("lacks 4 weights", "k_proj")),
    ({"modules_to_save": ["lm_head"]}, ("lacks the weight", "lm_head.weight")),
])
def test_what_is_wrong_with_an_adapter(
    changes: dict[str, Any], words: tuple[str, ...], plain: Student, cli: Cli, tmp_path: Path
) -> None:
    folder = copied(plain, tmp_path / "adapter", **changes)
    done = cli("merge", folder, "--output-dir", tmp_path / "merged")
    assert (done.status, len(done.errors)) == (2, 1)
    assert str(folder) in done.err
    assert all(word in done.err for word in words), done.err
    assert not (tmp_path / "merged").exists()


def test_a_folder_is_refused_before_its_base_is_loaded(plain: Student, tmp_path: Path) -> None:
    folder = copied(plain, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(TaidError, match="pickled"):
        load_skeleton(spec(folder), "student")
    nested = copied(plain, tmp_path / "nested", base_model_name_or_path=str(plain.folder))
    with pytest.raises(TaidError, match="itself an adapter: merge that first"):
        load_skeleton(spec(nested), "student")
    itself = copied(plain, tmp_path / "itself", base_model_name_or_path=".")
    with pytest.raises(TaidError, match="itself an adapter"):
        load_skeleton(spec(itself), "student")


# ----- merge --------------------------------------------------------------------------------


def test_merge_in_half_precision(plain: Student, cli: Cli, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        done = cli("merge", plain.folder, "--output-dir", tmp_path / dtype, "--dtype", dtype)
        assert done.status == 0, done.err
    exact, rounded = (load_file(tmp_path / dtype / "model.safetensors")
                      for dtype in ("float32", "bfloat16"))
    assert loaded(tmp_path / "bfloat16/config.json")["dtype"] == "bfloat16"
    assert exact.keys() == rounded.keys()
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)


def test_merge_says_when_the_logits_are_others(
    plain: Student, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from taid_vlm.students import merge as module

    merge = module.merge_attached

    def spoil(model: Any, role: str) -> Any:
        merged = merge(model, role)
        with torch.no_grad():
            merged.lm_head.weight.mul_(1.001)
        return merged

    monkeypatch.setattr(module, "merge_attached", spoil)
    done = cli("merge", plain.folder, "--output-dir", tmp_path / "m")
    assert done.status == 2
    assert "differ from the adapter's by 1.0e-03" in done.err
    assert not (tmp_path / "m").exists()


def test_what_merge_refuses(plain: Student, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/note").write_text("mine")
    for arguments, words in (
        ((plain.folder, "--output-dir", tmp_path / "full"), ("is not empty",)),
        ((plain.base, "--output-dir", tmp_path / "m"), (str(plain.base), "is a whole model")),
        ((tmp_path / "full", "--output-dir", tmp_path / "m"), ("adapter_config.json",)),
        ((plain.folder, "--output-dir", tmp_path / "m", "--dequantize"), ("is not quantized",)),
    ):
        done = cli("merge", *arguments)
        assert (done.status, len(done.errors)) == (2, 1)
        assert all(word in done.err for word in words), done.err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["note"]
    assert not (tmp_path / "m").exists()


def test_a_quantized_base_is_not_merged_into_unasked(
    plain: Student, cli: Cli, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(plain.base, base)
    config = loaded(base / "config.json")
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    folder = copied(plain, tmp_path / "adapter", base_model_name_or_path=str(base))
    done = cli("merge", folder, "--output-dir", tmp_path / "m")
    assert done.status == 2
    assert "quantized" in done.err
    assert "--dequantize" in done.err
    with pytest.raises(TaidError, match="--dequantize"):
        load_model(spec(folder), "model")


def test_merge_into_dequantized_weights(plain: Student, cli: Cli, tmp_path: Path) -> None:
    """What is written is the rounded base's weights, in full, with the adapter in them."""
    pytest.importorskip("bitsandbytes")
    four_bits = AutoModelForCausalLM.from_pretrained(
        plain.base, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    four_bits.save_pretrained(tmp_path / "base")
    folder = copied(plain, tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    arguments = ("merge", folder, "--output-dir", tmp_path / "m", "--dtype", "float32")
    assert cli(*arguments).status == 2
    done = cli(*arguments, "--dequantize")
    assert done.status == 0, done.err
    assert "quantization_config" not in loaded(tmp_path / "m/config.json")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        base = four_bits.dequantize(torch.float32)
        attached = peft.PeftModel.from_pretrained(base, folder).eval()
    torch.testing.assert_close(logits(merged), logits(attached), rtol=1e-3, atol=1e-3)
    assert (logits(merged) - logits(plain.attached())).abs().max() > 1e-2


# ----- mistakes in student.peft, before weights ---------------------------------------------


@pytest.mark.parametrize(("config", "words"), [
    ({"modules_to_save": ["lmhead"]}, ("modules_to_save has 'lmhead'", "'lm_head'")),
    ({"target_modules": ["q_proj", "vproj"]}, ("target_modules has 'vproj'", "'v_proj'")),
    ({"target_modules": ".*nope"}, ("target_modules = '.*nope'", "such as 'model.layers.")),
    ({"target_modules": "("}, ("target_modules = '('", "regular expression")),
    ({"modules_to_safe": ["lm_head"]}, ("no key 'modules_to_safe'", "'modules_to_save'")),
])
def test_names_that_match_nothing(
    config: dict[str, Any], words: tuple[str, ...], checkpoints: Checkpoints, cli: Cli,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from taid_vlm.runs import run

    monkeypatch.setattr(run, "load_model", lambda *_: pytest.fail("weights were loaded"))
    base = Path(checkpoints("qwen2", seed=1))
    tree = recipe_tree(tmp_path, checkpoints("llama"), base, False, **{**LORA, **config})
    recipe = write_recipe(tmp_path, tree)
    done = cli("distill", recipe)
    assert (done.status, len(done.errors)) == (2, 1)
    assert all(word in done.err for word in ("student.peft", *words)), done.err
    assert not os.path.exists(tmp_path / "out")
    assert cli("inspect", recipe).status != 0
