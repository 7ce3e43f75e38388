"""Every recipe in recipes/, carried out for two steps on small models of its families.

Keys stay as they are shipped but for names of models and data, the number of steps and workers,
and what says where a teacher lies or is served.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from cli.recipes import Checkpoints, answer, command, write_jsonl
from cli.test_command_line import ROOT
from pyarrow import parquet
from students.composing import Parts
from training.vllm import NAME, standing_in
from zoo import build
from zoo.images import images

from taid_vlm.config.recipe import load_recipe

RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.yaml"))}
FAMILIES = {  # what a hub name begins with -> the family of the small model in its place
    "Qwen/Qwen3-VL": "qwen3_vl", "Qwen/Qwen2.5-VL": "qwen2_5_vl", "Qwen/Qwen3-235B": "qwen3_moe",
    "Qwen/Qwen3-": "qwen3", "Qwen/Qwen2": "qwen2", "OpenGVLab/InternVL3": "internvl",
    "llava-hf/llava-onevision": "llava_onevision", "google/gemma-3": "gemma3_text",
    "HuggingFaceTB/SmolLM2": "llama", "microsoft/Phi-3": "phi3", "TinyLlama/": "llama",
    "meta-llama/": "llama", "stabilityai/stablelm": "llama", "EleutherAI/pythia": "gpt2",
}
STEPS, ROWS = 2, 12
MANTIS = [source["path"] for side in yaml.safe_load(RECIPES["taid_vlm_2b"].read_text())[
    "data"].values() for source in (side if isinstance(side, list) else [side])]
BITSANDBYTES = find_spec("bitsandbytes") is not None  # an extra: 8-bit optimizers, 4-bit teachers
Tree = dict[str, Any]


def ultrachat(rng: random.Random) -> Tree:
    said = [{"role": "user", "content": "say: " + answer(rng)},
            {"role": "assistant", "content": answer(rng)}]
    return {"prompt": said[0]["content"], "prompt_id": "0" * 64, "messages": said}


def family(name: str) -> str:
    return next(family for start, family in FAMILIES.items() if name.startswith(start))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """By hub name a file in the columns that the data set has."""
    rng, folder = random.Random(0), tmp_path_factory.mktemp("data")
    for number, picture in enumerate(images(ROWS)):
        picture.save(folder / f"{number}.png")
    files = [{"path": str(folder / f"{number}.png"), "bytes": None} for number in range(ROWS)]
    rows = {
        "HuggingFaceH4/ultrachat_200k": [ultrachat(rng) for _ in range(ROWS)],
        "trl-lib/llava-instruct-mix": [
            {"images": [file], "prompt": [{"role": "user", "content": f"What? {answer(rng)}"}],
             "completion": [{"role": "assistant", "content": answer(rng)}]} for file in files],
    }
    for shards in MANTIS:
        mantis(rng, folder / shards)
    rows["generated/records.jsonl"] = rows["trl-lib/llava-instruct-mix"]
    return {name: str(write_jsonl(folder / f"{name.rpartition('/')[2]}.jsonl", lines))
            for name, lines in rows.items()} | {shards: str(folder / shards) for shards in MANTIS}


def mantis(rng: random.Random, shards: Path) -> None:
    """A table of Mantis-Instruct, whose pictures came in an archive beside it."""
    shards.parent.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(images(ROWS)):
        picture.save(shards.with_name(f"{number}.png"))
    rows = [{"id": str(number), "source": "made",
             "images": [{"bytes": None, "path": f"{at}.png"} for at in (number, 0)],
             "conversation": [
                 {"role": "user", "content": "<image> <image> What differs? " + answer(rng)},
                 {"role": "assistant", "content": answer(rng)}]} for number in range(ROWS)]
    spoken = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    pictures = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    schema = pa.schema([("id", pa.string()), ("source", pa.string()), ("images", pictures),
                        ("conversation", spoken)])
    parquet.write_table(pa.Table.from_pylist(rows, schema),
                        shards.with_name(shards.name.replace("*", "00000-of-00001")))


@pytest.fixture
def servers() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def small(tree: Tree, folder: Path, data: Mapping[str, str], checkpoints: Checkpoints,
          servers: ExitStack) -> Tree:
    """A shipped recipe that can be carried out here."""
    def model(spec: Tree, seed: int) -> None:
        name = spec["model_name_or_path"]
        if name.startswith("runs/"):
            name = composed(folder, checkpoints)
        spec["model_name_or_path"] = name if Path(name).exists() else checkpoints(
            family(name), other(name), seed)
        spec.pop("sharding", None)  # of one process there is nothing to share
        if not BITSANDBYTES:
            spec.pop("quantization", None)

    def source(each: Any) -> Any:
        each = {"path": each} if isinstance(each, str) else dict(each)
        for key in ("name", "split"):
            each.pop(key, None)
        return {**each, "path": data[each["path"]]}

    teachers = tree.get("teachers") or ({"": tree["teacher"]} if "teacher" in tree else {})
    for seed, spec in enumerate(teachers.values()):
        if "server" in spec:
            built = build(family(spec["processor_name_or_path"]))
            spec["processor_name_or_path"] = checkpoints(family(spec["processor_name_or_path"]))
            server = servers.enter_context(standing_in(built))
            spec["server"] |= {"url": server.url, "model": NAME, "top_logprobs": 8}
        else:
            model(spec, seed)
    model(tree["student"], 7)
    tree["data"] = {key: [*map(source, each)] if isinstance(each, list) else source(each)
                    for key, each in tree["data"].items()}
    for train in (tree["train"], *(stage["train"] for stage in tree.get("stages", ()))):
        train.pop("num_train_epochs", None)
        if train is tree["train"] or "max_steps" in train:
            train["max_steps"] = STEPS
    tree["train"].pop("fsdp", None)
    if not BITSANDBYTES and "bnb" in tree["train"].get("optim", ""):
        del tree["train"]["optim"]
    tree["train"] |= {"use_cpu": True, "dataloader_num_workers": 0, "save_steps": STEPS,
                      "gradient_accumulation_steps": 2}
    return {**tree, "evaluate": {"examples": 1, "max_new_tokens": 4, "canary": 2},
            "output_dir": str(folder / "out")}


def other(name: str) -> str:
    """Whose tokenizer is not the teacher's."""
    return "metaspace" if "SmolLM2" in name else "plain"


def composed(folder: Path, checkpoints: Checkpoints) -> str:
    tower = Parts(folder).tower("siglip")
    assert command("compose", tower, checkpoints("qwen3", seed=7), "--output-dir",
                   folder / "composed") == 0
    return str(folder / "composed")


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps(
    name: str, tmp_path: Path, data: Mapping[str, str], checkpoints: Checkpoints,
    servers: ExitStack,
) -> None:
    load_recipe(RECIPES[name])
    tree = small(yaml.safe_load(RECIPES[name].read_text()), tmp_path, data, checkpoints, servers)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    assert command("plan", recipe) == 0
    cached = []
    if name.endswith("_cached"):
        cached = [f"teacher={{cache: {tmp_path / 'cache'}}}"]
        assert command("cache", recipe, "--output", tmp_path / "cache") == 0
    assert command("distill", recipe, *cached) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["train"]["steps"] == STEPS
    assert results["train"]["loss_implementation"]["name"] in ("fused", "sparse")
    assert results["train"]["records_left_out"] == {}
    assert (tmp_path / "out/student/model.safetensors").exists() or (
        tmp_path / "out/student/adapter_model.safetensors").exists()


def test_every_line_that_a_recipe_says_to_type_is_a_command(cli: Any) -> None:
    """Commands and options, in the comments."""
    for name, path in RECIPES.items():
        text = path.read_text().replace("\\\n#", "")
        for line in text.splitlines():
            if "taid-vlm " not in line and "-m taid_vlm " not in line:
                continue
            words = line.replace("-m taid_vlm", "taid-vlm").partition("taid-vlm ")[2].split()
            options = [word for word in words if word.startswith("--")]
            known = cli(words[0], "--help").out
            assert all(option in known for option in options), (name, line)
            assert words[0] not in ("distill", "cache", "inspect") or words[1] in RECIPES
