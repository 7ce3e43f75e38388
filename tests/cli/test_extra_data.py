"""Real weights and real images, where TAID_VLM_EXTRA_DATA names a folder that holds them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cli.recipes import Checkpoints, Outcome, loaded, write_jsonl, write_recipe
from faults.test_kills import KILLED, ends_alike
from faults.victims import Harm, Victim
from safetensors.torch import load_file, save_file
from students.composing import Parts

from taid_vlm.evaluation.canary import BLIND_BELOW

EXTRA = Path(os.environ.get("TAID_VLM_EXTRA_DATA", "/nonexistent"))
TRAIN = {"max_steps": 25, "learning_rate": 1e-3, "use_cpu": True, "disable_tqdm": True}


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if not (EXTRA / name).exists()]
    return pytest.mark.skipif(bool(missing), reason=f"TAID_VLM_EXTRA_DATA lacks {missing}")


def shaken(checkpoint: Path, folder: Path) -> Path:
    """A copy of a checkpoint whose weights are a little off."""
    shutil.copytree(checkpoint, folder)
    generator = torch.Generator().manual_seed(0)
    weights = {name: x + 0.3 * x.std() * torch.randn(x.shape, generator=generator)
               for name, x in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@needs("stories260K", "text/tinyshakespeare.txt")
def test_a_shaken_llama_finds_back(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    """The teacher is the model the student was before: KL must fall towards 0."""
    text = (EXTRA / "text/tinyshakespeare.txt").read_text()[:60_000]
    scenes = [{"text": scene} for scene in text.split("\n\n") if len(scene) > 80]
    tree = {
        "teacher": str(EXTRA / "stories260K"),
        "student": str(shaken(EXTRA / "stories260K", tmp_path / "shaken")),
        "data": {side: str(write_jsonl(tmp_path / f"{side}.jsonl", part))
                 for side, part in (("train", scenes[:120]), ("eval", scenes[120:140]))},
        "train": {**TRAIN, "max_length": 128},
        "evaluate": {"examples": 2, "max_new_tokens": 8}, "output_dir": str(tmp_path / "out"),
    }
    done = cli("distill", write_recipe(tmp_path, tree))
    assert done.status == 0, done.err
    results = loaded(tmp_path / "out/results.json")
    before, after = results["eval"]["before"], results["eval"]["after"]
    assert results["alignment"]["case"] == "a"
    assert after["kl"] + 3 * after["kl_stderr"] < before["kl"] - 3 * before["kl_stderr"]
    assert after["agreement"] > before["agreement"]


@needs("nlvr_test.parquet")
def test_real_pictures_from_a_table(
    cli: Callable[..., Outcome], checkpoints: Checkpoints, tmp_path: Path
) -> None:
    columns = {"prompt": "statement", "completion": "label", "category": "label"}
    source = {"path": str(EXTRA / "nlvr_test.parquet"), "columns": columns, "max_records": 24}
    tree = {
        "teacher": checkpoints("internvl"), "student": checkpoints("llava", "permuted", seed=1),
        "data": {"train": source, "eval": source}, "train": {**TRAIN, "learning_rate": 5e-3},
        "evaluate": {"examples": 2, "max_new_tokens": 4}, "output_dir": str(tmp_path / "out"),
    }
    done = cli("distill", write_recipe(tmp_path, tree))
    assert done.status == 0, done.err
    results = loaded(tmp_path / "out/results.json")
    assert results["train"]["records_left_out"] == {}
    assert results["eval"]["after"]["n_answers"] == 24
    assert results["eval"]["after"]["kl"] < results["eval"]["before"]["kl"]


def pictures_with_sentences(folder: Path) -> dict[str, Any]:
    """`data` of a recipe: NLVR's pictures with an answer longer than a word."""
    columns = {"prompt": "statement", "completion": "sentence"}
    table = pq.read_table(EXTRA / "nlvr_test.parquet").slice(0, 96)
    answers = pa.array([f"It says: {statement}" for statement in table["statement"].to_pylist()])
    pq.write_table(table.append_column("sentence", answers), folder / "pictures.parquet")
    data = {side: {"path": str(folder / f"{side}.parquet"), "columns": columns}
            for side in ("train", "eval")}
    rows = pq.read_table(folder / "pictures.parquet")
    pq.write_table(rows.slice(0, 64), data["train"]["path"])
    pq.write_table(rows.slice(64, 32), data["eval"]["path"])
    return data


PAIRS = {
    "internvl -> composed": ("internvl", None),
    "qwen2_5_vl -> smolvlm, another tokenizer": ("qwen2_5_vl", ("smolvlm", "metaspace")),
    "gemma3 -> llava": ("gemma3", ("llava", "permuted")),
}


@needs("nlvr_test.parquet")
@pytest.mark.parametrize("name", PAIRS)
def test_families_learn_from_each_other_on_real_pictures(
    cli: Callable[..., Outcome], checkpoints: Checkpoints, tmp_path: Path, name: str
) -> None:
    """50 steps: the student comes nearer to its teacher, and both look at the pictures."""
    teacher, student = PAIRS[name]
    ours = Parts(tmp_path).composed("siglip") if student is None else checkpoints(*student, seed=1)
    done = cli("distill", write_recipe(tmp_path, {
        "teacher": checkpoints(teacher), "student": ours,
        "data": pictures_with_sentences(tmp_path), "train": {**TRAIN, "max_steps": 50},
        "evaluate": {"examples": 2, "max_new_tokens": 4, "canary": 16},
        "output_dir": str(tmp_path / "out"),
    }))
    assert done.status == 0, done.err
    results = loaded(tmp_path / "out/results.json")
    before, after = results["eval"]["before"], results["eval"]["after"]
    assert results["alignment"]["case"] == ("c" if "another" in name else "b")
    assert after["coverage"] == 1.0
    assert after["kl"] + 3 * after["kl_stderr"] < before["kl"] - 3 * before["kl_stderr"]
    # an untrained teacher gives a chunk of several tokens almost no probability
    assert ("chunk_kl" in after) == (results["alignment"]["case"] == "c")
    assert after.get("chunk_kl", 0.0) <= before.get("chunk_kl", 0.0)
    for look in (results["canary"]["teacher"], results["canary"]["student"]["after"]):
        assert look["kl_blank"] > 5 * look["kl_blank_stderr"]


@needs("nlvr_test.parquet")
@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_on_policy_across_families_on_real_pictures(
    checkpoints: Checkpoints, tmp_path: Path, processes: int
) -> None:
    """Killed while it samples and gone on with it ends bit for bit where the whole run does, and
    both models look at the pictures, the student in answers of its own, too."""
    tree = {
        "teacher": checkpoints("qwen2_5_vl"), "student": checkpoints("smolvlm", "metaspace", 1),
        "data": pictures_with_sentences(tmp_path),
        "objective": {"name": "taid", "on_policy": {"lmbda": 0.5, "max_new_tokens": 12,
                                                    "max_age": 2}},
        "train": {**TRAIN, "max_steps": 24, "per_device_train_batch_size": 8 // processes,
                  "save_strategy": "steps", "save_steps": 8, "logging_steps": 4, "bf16": True},
        "evaluate": {"examples": 2, "max_new_tokens": 4, "canary": 16},
    }
    whole, output = tmp_path / "whole", tmp_path / "out"

    def victim(folder: Path, *harms: Harm, words: tuple[str, ...] = ()) -> Victim:
        recipe = write_recipe(tmp_path, {**tree, "output_dir": str(folder)}, folder.name + ".yaml")
        return Victim(["distill", recipe, *words], folder, harms, tmp_path / "log")

    unharmed = [Harm()] * processes
    first = victim(whole, *unharmed)
    assert first.wait(600) == [0] * processes, first.error()
    steps = first.counts()["step"]
    killed = victim(output, *unharmed[1:], Harm("kill", "step", 2 * steps // 3))
    assert KILLED in killed.wait(600)
    assert (output / "checkpoint-8").is_dir() and not (output / "student").exists()
    again = victim(output, *unharmed, words=("--resume",))
    assert again.wait(600) == [0] * processes, again.error()
    ends_alike(output, whole, processes)
    results, of_whole = loaded(output / "results.json"), loaded(whole / "results.json")
    assert results["alignment"]["case"] == "c" and results["machine"]["processes"] == processes
    own, of_whole = results["train"]["on_policy"], of_whole["train"]["on_policy"]
    print({**own, "canary": results["canary"], "kl": [
        results["eval"][when]["kl"] for when in ("before", "after")]})
    assert {**own, "seconds": 0} == {**of_whole, "seconds": 0}
    assert own["sampled"] > 50 and own["reused"]
    for look in (results["canary"]["teacher"], results["canary"]["student"]["after"], own["look"]):
        assert look["kl_blank"] > 5 * look["kl_blank_stderr"]
        assert look["kl_shuffled"] > max(2 * look["kl_shuffled_stderr"], BLIND_BELOW)
