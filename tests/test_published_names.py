"""A saved model's weights have the names of its family's checkpoints on the hub."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from zoo import VLM_FAMILIES, build, save

from taid_vlm.models.published import save_weights, use_published_names
from taid_vlm.students.compose import compose
from taid_vlm.students.merge import merge
from taid_vlm.students.shrink import shrink

LLAVA = ("language_model.lm_head.", "language_model.model.", "multi_modal_projector.",
         "vision_tower.vision_model.")
NEWER = ("lm_head.", "model.language_model.")
IDEFICS = ("lm_head.", "model.connector.", "model.text_model.", "model.vision_model.")
QWEN2 = ("lm_head.", "model.embed_tokens.", "model.layers.", "model.norm.", "visual.")
# how names begin in the checkpoint that is named beside them, all of them
PUBLISHED: dict[str, tuple[str, ...]] = {
    "llava": LLAVA,  # llava-hf/llava-1.5-7b-hf
    "llava_next": ("image_newline", *LLAVA),  # llava-hf/llava-v1.6-mistral-7b-hf
    "llava_onevision": ("image_newline", *LLAVA),  # llava-hf/llava-onevision-qwen2-0.5b-ov-hf
    "gemma3": LLAVA,  # google/gemma-3-4b-it
    "paligemma": LLAVA,  # google/paligemma2-3b-pt-224
    "internvl": (*LLAVA[:3], "vision_tower.embeddings.",
                 "vision_tower.encoder."),  # OpenGVLab/InternVL3-1B-hf
    "mistral3": (*LLAVA[:3], "vision_tower.ln_pre.", "vision_tower.patch_conv.",
                 "vision_tower.transformer."),  # mistralai/Mistral-Small-3.1-24B-Instruct-2503
    "smolvlm": IDEFICS,  # HuggingFaceTB/SmolVLM2-500M-Video-Instruct
    "idefics3": IDEFICS,  # HuggingFaceM4/Idefics3-8B-Llama3
    "qwen2_vl": QWEN2,  # Qwen/Qwen2-VL-2B-Instruct
    "qwen2_5_vl": QWEN2,  # Qwen/Qwen2.5-VL-3B-Instruct
    "qwen3_vl": (*NEWER, "model.visual."),  # Qwen/Qwen3-VL-2B-Instruct
    "qwen3_vl_moe": (*NEWER, "model.visual."),  # Qwen/Qwen3-VL-30B-A3B-Instruct
    "hy_v4_vl": ("lm_head.", "model.embed_tokens.", "model.hc_head.", "model.layers.",
                 "model.norm.", "vit."),  # tencent/Hy4
    "qwen3_5": (*NEWER, "model.visual."),  # Qwen/Qwen3.5-2B
    "gemma4": (*NEWER, "model.embed_vision.", "model.vision_tower.encoder.",
               "model.vision_tower.patch_embedder."),  # google/gemma-4-E2B-it
    "lfm2_vl": (*NEWER, "model.multi_modal_projector.",
                "model.vision_tower.vision_model."),  # LiquidAI/LFM2-VL-450M
    "perception_lm": (*NEWER, "model.multi_modal_projector.",
                      "model.vision_tower.timm_model."),  # facebook/Perception-LM-1B
    "fast_vlm": (*NEWER, "model.multi_modal_projector.",
                 "model.vision_tower.timm_model."),  # KamilaMila/FastVLM-0.5B
    "ovis2": (*NEWER, "model.vision_tower.head_", "model.vision_tower.transformer.",
              "model.visual_embeddings_table."),  # thisisiron/Ovis2-1B-hf
}


def names(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return sorted(file.keys())


def load(folder: Path) -> PreTrainedModel:
    """As a user does; every weight has its place, and every place its weight."""
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    assert not report["mismatched_keys"]
    return model.eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 9)[None], use_cache=False).logits


@pytest.mark.parametrize("family", VLM_FAMILIES)
def test_names_are_those_of_the_hub(family: str, tmp_path: Path) -> None:
    model = build(family).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_weights(model, tmp_path / "saved")
    begins = PUBLISHED[family]
    saved = names(tmp_path / "saved")
    assert [name for name in saved if not name.startswith(begins)] == []
    assert [begin for begin in begins if not any(name.startswith(begin) for name in saved)] == []
    loaded = load(tmp_path / "saved")
    after = loaded.state_dict()
    assert before.keys() == after.keys() and all(before[key].equal(after[key]) for key in before)
    assert logits(loaded).equal(logits(model))
    save_weights(loaded, tmp_path / "again")  # nothing is put before a name twice
    assert names(tmp_path / "again") == saved


@pytest.mark.parametrize("family", ["llava", "llava_next", "gemma3", "lfm2_vl"])
def test_names_that_were_written_without_it_are_mended(family: str, tmp_path: Path) -> None:
    model = build(family).model
    model.save_pretrained(tmp_path / "plain")
    assert not any(re.search(r"vision_tower\.vision_model\.", x) for x in names(tmp_path / "plain"))
    loaded = load(tmp_path / "plain")
    save_weights(loaded, tmp_path / "saved")
    assert all(name.startswith(PUBLISHED[family]) for name in names(tmp_path / "saved"))
    assert logits(load(tmp_path / "saved")).equal(logits(model))


def test_a_text_model_and_a_wrapped_one_stay_as_they_are() -> None:
    for model in (build("llama").model, torch.nn.Linear(2, 2)):
        before = dict(vars(model))
        use_published_names(model)
        assert vars(model) == before


def vision_names(folder: Path) -> list[str]:
    saved = names(folder)
    assert all(name.startswith(LLAVA) for name in saved), saved
    load(folder)
    return [name for name in saved if name.startswith("vision_tower.vision_model.encoder.")]


def test_composed_shrunk_and_merged_models_have_them_too(tmp_path: Path) -> None:
    """One after the other, from a tower in a folder of its own."""
    torch.manual_seed(0)
    square = {"height": 32, "width": 32}
    SiglipVisionModel(SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        image_size=32, patch_size=8)).save_pretrained(tmp_path / "tower")
    SiglipImageProcessor(size=square).save_pretrained(tmp_path / "tower")
    save(build("qwen2"), tmp_path / "text")
    compose(str(tmp_path / "tower"), str(tmp_path / "text"), tmp_path / "composed")
    assert vision_names(tmp_path / "composed")
    shrink(str(tmp_path / "composed"), tmp_path / "shrunk", tower_layers=2)
    assert vision_names(tmp_path / "shrunk")
    model = get_peft_model(load(tmp_path / "shrunk"), LoraConfig(target_modules="all-linear"))
    model.save_pretrained(tmp_path / "adapter")
    for dtype in ("auto", "bfloat16"):
        merge(tmp_path / "adapter", tmp_path / dtype, dtype=dtype)
        assert vision_names(tmp_path / dtype) == vision_names(tmp_path / "shrunk")
