"""Models that lie on the hub: private ones, and adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli.hub import COMMIT, TOKEN, Hub
from cli.recipes import Checkpoints, Outcome, pairs, write_jsonl, write_recipe
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from taid_vlm.config.model import ModelSpec
from taid_vlm.errors import TaidError
from taid_vlm.models.loading import load_config, load_model, load_processor
from taid_vlm.models.lora import find_adapter

Cli = Callable[..., Outcome]
IDS = torch.arange(5, 25)[None]


def files(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def adapter_on(base: str, named: str, folder: Path) -> torch.Tensor:
    """An adapter without a tokenizer in a folder, on a base under another name; its logits."""
    auto = AutoModelForImageTextToText if "llava" in base else AutoModelForCausalLM
    model = auto.from_pretrained(base)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False))
    model.active_peft_config.base_model_name_or_path = named
    model.save_pretrained(folder)
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("family", ["qwen2", "llava"])
def test_a_token_reaches_all_that_is_fetched(
    family: str, hub: Hub, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    hub.files["me/base"] = files(checkpoints(family))
    with pytest.raises(TaidError, match="student: cannot load 'me/base'"):
        load_config(ModelSpec(model_name_or_path="me/base"), "student")
    spec = ModelSpec(model_name_or_path="me/base", init_kwargs={"token": TOKEN})
    config = load_config(spec, "student")
    assert (config.model_type, config._commit_hash) == (family, COMMIT)
    load_processor(spec, "student")
    assert load_model(spec, "student").name_or_path == "me/base"


@pytest.mark.parametrize("family", ["qwen2", "llava"])
def test_an_adapter_on_the_hub(
    family: str, hub: Hub, checkpoints: Checkpoints, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a base that is there, too; a second time without the hub."""
    name = f"me/{family}-adapter"
    hub.files["me/base"] = files(checkpoints(family))
    expected = adapter_on(checkpoints(family), "me/base", tmp_path / "adapter")
    hub.files[name] = {**files(tmp_path / "adapter"), "training_args.bin": b"a pickle"}
    spec = ModelSpec(model_name_or_path=name, init_kwargs={"token": TOKEN})
    for _ in range(2):
        load_processor(spec, "student")
        model = load_model(spec, "student").eval()
        with torch.no_grad():
            assert torch.allclose(model(input_ids=IDS).logits, expected, atol=1e-5)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not [step for step in hub.steps if "training_args.bin" in step]


def test_an_adapter_that_is_its_own_base(
    hub: Hub, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    adapter_on(checkpoints("qwen2"), "me/circle", tmp_path / "adapter")
    hub.files["me/circle"] = files(tmp_path / "adapter")
    with pytest.raises(TaidError, match="'me/circle', which is itself"):
        find_adapter(ModelSpec(model_name_or_path="me/circle"), "student")


@pytest.mark.parametrize("merged", [True, False])
def test_a_run_from_the_hub_and_back(
    merged: bool, hub: Hub, checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    """A fresh adapter on another is merged, so its folder is whole; one on a model names that."""
    adapter_on(checkpoints("qwen2"), checkpoints("qwen2"), tmp_path / "adapter")
    hub.files["me/start"] = files(tmp_path / "adapter" if merged else checkpoints("qwen2"))
    rows = str(write_jsonl(tmp_path / "rows.jsonl", pairs(8)))
    done = cli("distill", write_recipe(tmp_path, {
        "student": {"model_name_or_path": "me/start", "peft": {"target_modules": "all-linear"}},
        "objective": "ce", "data": {"train": rows},
        "train": {"max_steps": 1, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
                  "push_to_hub": True, "hub_model_id": "me/next"},
        "output_dir": str(tmp_path / "out")}))
    assert done.status == 0, done.err
    pushed = hub.files["me/next"]
    assert ("model.safetensors" in pushed) == merged
    assert ("adapter_config.json" in pushed) == (not merged)
    library = "transformers" if merged else "peft"
    for line in ("base_model: me/start\n", f"library_name: {library}\n"):
        assert line in pushed["README.md"].decode()
    if not merged:
        config = json.loads(pushed["adapter_config.json"])
        assert (config["base_model_name_or_path"], config["revision"]) == ("me/start", COMMIT)
    assert not [name for name, data in pushed.items() if str(tmp_path).encode() in data]
