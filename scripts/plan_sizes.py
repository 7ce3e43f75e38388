"""What `taid-vlm plan` says of models of real sizes, none of whose weights are needed.

    python scripts/fetch_real.py REAL --only qwen3
    python scripts/plan_sizes.py --tokenizer REAL/qwen3 --folder runs/sizes \\
        [--only NAME,...] [--json FILE]

Configurations of published models (their sizes are below) with Qwen's tokenizer are written to
--folder, and 64 records that are as long as `max_length` allows, or have one image of 1024x768
pixels and 200 words. Each case is a shipped recipe, or one under overrides, planned on one
device; figures are those of `taid-vlm plan`: planned, not measured.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import transformers as hf
from bench.common import described, names
from PIL import Image

from taid_vlm.commands.recipes import recipe_path
from taid_vlm.config.recipe import load_recipe
from taid_vlm.errors import TaidError, nearest
from taid_vlm.io.files import write_json
from taid_vlm.io.terminal import table
from taid_vlm.plan.plan import fullest, plan_recipe
from taid_vlm.plan.text import human

Sizes = Mapping[str, int]
COMMON = {"vocab_size": 151_936, "max_position_embeddings": 40_960, "dtype": "bfloat16"}


def sizes(hidden: int, inner: int, layers: int, heads: int, groups: int, tied: bool = False,
          **more: Any) -> dict[str, Any]:
    return {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": groups,
            "tie_word_embeddings": tied, **COMMON, **more}


# as in the published config.json of each
QWEN3 = {
    "Qwen3-0.6B": sizes(1024, 3072, 28, 16, 8, True, head_dim=128),
    "Qwen3-1.7B": sizes(2048, 6144, 28, 16, 8, True, head_dim=128),
    "Qwen3-4B": sizes(2560, 9728, 36, 32, 8, True, head_dim=128),
    "Qwen3-8B": sizes(4096, 12288, 36, 32, 8, head_dim=128),
    "Qwen3-14B": sizes(5120, 17408, 40, 40, 8, head_dim=128),
    "Qwen3-32B": sizes(5120, 25600, 64, 64, 8, head_dim=128),
}
EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "head_dim": 128, "norm_topk_prob": True}
QWEN3_MOE = {
    "Qwen3-30B-A3B": sizes(2048, 6144, 48, 32, 4, moe_intermediate_size=768, **EXPERTS),
    "Qwen3-235B-A22B": sizes(4096, 12288, 94, 64, 4, moe_intermediate_size=1536, **EXPERTS),
}
WIDE = {"vocab_size": 152_064}
QWEN25_VL = {
    "Qwen2.5-VL-3B-Instruct": sizes(2048, 11008, 36, 16, 2, True),
    "Qwen2.5-VL-7B-Instruct": sizes(3584, 18944, 28, 28, 4, **WIDE),
    "Qwen2.5-VL-72B-Instruct": sizes(8192, 29568, 80, 64, 8, **WIDE),
}
TOWER = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "patch_size": 14,
         "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
         "fullatt_block_indexes": [7, 15, 23, 31]}
QWEN3_VL = {  # text, and of its tower: depth, width, inner width, layers that are passed on
    "Qwen3-VL-2B-Instruct": (sizes(2048, 6144, 28, 16, 8, True, head_dim=128),
                             (24, 1024, 4096, [5, 11, 17])),
    "Qwen3-VL-8B-Instruct": (sizes(4096, 12288, 36, 32, 8, head_dim=128),
                             (27, 1152, 4304, [8, 16, 24])),
}
ONEVISION = {  # Qwen2 under SigLIP so400m
    "llava-onevision-qwen2-0.5b-ov-hf": sizes(896, 4864, 24, 14, 2, True, vocab_size=152_000),
    "llava-onevision-qwen2-7b-ov-hf": sizes(3584, 18944, 28, 28, 4, vocab_size=152_128),
}
SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26,
          "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
          "vision_use_head": False}
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")

# by name: a shipped recipe, what is changed in it, and on how many devices it trains
CASES: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "8B to 0.6B": ("qwen3_8b_to_0.6b", 1, ()),
    "8B in 4 bits to 0.6B": ("qwen3_8b_to_0.6b", 1, ("teacher.quantization=4bit",)),
    "24 GB": ("qwen3_8b_to_0.6b_24gb", 1, ()),
    "80 GB": ("qwen3_14b_to_1.7b_80gb", 1, ()),
    "8 x 80 GB": ("qwen2.5_vl_72b_to_3b_8x80gb", 4, ()),
    "64 x 80 GB": ("qwen3_235b_a22b_to_4b_64x80gb", 32, ()),
    "7B to 3B pictures": ("qwen2.5_vl_7b_to_3b", 1, ()),
    "7B to 0.5B": ("llava_onevision_7b_to_0.5b", 1, ()),
    "7B to 0.5B by LoRA": ("llava_onevision_7b_to_0.5b", 1, (
        "student.peft={r: 64, lora_alpha: 64, target_modules: all-linear}",
        "student.dtype=bfloat16", "train.per_device_train_batch_size=1",
        "train.per_device_eval_batch_size=1")),
    "7B in 4 bits to 0.5B": ("llava_onevision_7b_to_0.5b", 1, (
        "teacher.quantization=4bit", "train.per_device_train_batch_size=1",
        "train.per_device_eval_batch_size=1")),
    "7B to 0.5B on 8": ("llava_onevision_7b_to_0.5b", 8, ()),
    "24 GB pictures": ("qwen3_vl_8b_to_2b_24gb", 1, ()),
    "FSDP": ("qwen3_32b_to_4b_8x80gb_fsdp", 8, ()),
    "on policy": ("qwen3_8b_to_0.6b_on_policy", 1, ()),
    "72B live": ("qwen2.5_vl_72b_to_3b_8x80gb", 1, (
        "teacher={model_name_or_path: Qwen/Qwen2.5-VL-72B-Instruct, dtype: bfloat16}",)),
    "235B-A22B live": ("qwen3_235b_a22b_to_4b_64x80gb", 1, (
        "teacher={model_name_or_path: Qwen/Qwen3-235B-A22B, dtype: bfloat16}",)),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = described(__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", type=names, default=list(CASES))
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    write_models(options.tokenizer, options.folder)
    write_records(options.folder)
    planned = {}
    for name in options.only:
        if name not in CASES:
            parser.error(f"--only {name!r}.{nearest(name, CASES)}")
        planned[name] = plan(name, options.folder)
        print(_text(name, planned[name]), flush=True)
        if options.json is not None:
            write_json(planned, options.json)
    return 0


# ----- models and records -------------------------------------------------------------------


def write_models(tokenizer: Path, folder: Path) -> None:
    """Configuration and processor of every model, without weights."""
    text = hf.PreTrainedTokenizerFast.from_pretrained(tokenizer)
    for kind, models in ((hf.Qwen3Config, QWEN3), (hf.Qwen3MoeConfig, QWEN3_MOE)):
        for name, values in models.items():
            _save(kind(**values, architectures=[kind.__name__.replace("Config", "ForCausalLM")]),
                  text, folder / name)

    def token(name: str) -> int:
        return int(text.convert_tokens_to_ids(f"<|{name}|>"))

    for name, values in QWEN25_VL.items():
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
        config = hf.Qwen2_5_VLConfig(
            text_config={**values, "rope_parameters": rope}, dtype="bfloat16",
            vision_config={**TOWER, "out_hidden_size": values["hidden_size"],
                           "intermediate_size": 3420},
            image_token_id=token("image_pad"), video_token_id=token("video_pad"),
            vision_start_token_id=token("vision_start"), vision_end_token_id=token("vision_end"),
            tie_word_embeddings=values["tie_word_embeddings"],
            architectures=["Qwen2_5_VLForConditionalGeneration"])
        processor = hf.Qwen2_5_VLProcessor(
            hf.Qwen2VLImageProcessor(), text, hf.Qwen2VLVideoProcessor(), chat_template=TEMPLATE)
        _save(config, processor, folder / name)

    for name, (values, (depth, width, inner, passed_on)) in QWEN3_VL.items():
        rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}
        config = hf.Qwen3VLConfig(
            text_config={**values, "rope_parameters": rope}, dtype="bfloat16",
            vision_config={"depth": depth, "hidden_size": width, "intermediate_size": inner,
                           "num_heads": 16, "patch_size": 16, "deepstack_visual_indexes": passed_on,
                           "out_hidden_size": values["hidden_size"]},
            image_token_id=token("image_pad"), video_token_id=token("video_pad"),
            vision_start_token_id=token("vision_start"), vision_end_token_id=token("vision_end"),
            tie_word_embeddings=values["tie_word_embeddings"],
            architectures=["Qwen3VLForConditionalGeneration"])
        processor = hf.Qwen3VLProcessor(
            hf.Qwen2VLImageProcessor(patch_size=16), text, hf.Qwen3VLVideoProcessor(patch_size=16),
            chat_template=TEMPLATE)
        _save(config, processor, folder / name)

    for name, values in ONEVISION.items():
        config = hf.LlavaOnevisionConfig(
            text_config={**values, "model_type": "qwen2"}, dtype="bfloat16",
            vision_config={**SIGLIP, "model_type": "siglip_vision_model"},
            image_token_id=token("image_pad"), video_token_id=token("video_pad"),
            tie_word_embeddings=values["tie_word_embeddings"],
            architectures=["LlavaOnevisionForConditionalGeneration"])
        processor = hf.LlavaOnevisionProcessor(
            hf.LlavaOnevisionImageProcessor(), text, hf.LlavaOnevisionVideoProcessor(),
            num_image_tokens=729, vision_feature_select_strategy="full",
            chat_template=TEMPLATE.replace("<|vision_start|>", "").replace("<|vision_end|>", ""),
            image_token="<|image_pad|>", video_token="<|video_pad|>")
        _save(config, processor, folder / name)


def _save(config: Any, processor: Any, folder: Path) -> None:
    config.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_records(folder: Path) -> None:
    """64 texts of 100 to 1,900 words with answers of half of them, and 64 about a picture."""
    random = np.random.default_rng(0)
    words = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "sleeps")

    def some(number: int) -> str:
        return " ".join(random.choice(words, number))

    text = [{"prompt": some(n), "completion": some(n)}
            for n in np.linspace(50, 980, 64).astype(int)]
    Image.fromarray(random.integers(0, 256, (768, 1024, 3), np.uint8)).save(folder / "0.png")
    seen = [{"images": ["0.png"], "prompt": "what is this ?", "completion": some(200)}] * 64
    for name, rows in (("text", text), ("pictures", seen)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# ----- plans --------------------------------------------------------------------------------


def plan(name: str, folder: Path) -> dict[str, Any]:
    """The plan of one case, with the recipe's models and data taken from `folder`."""
    shipped, processes, overrides = CASES[name]
    path = recipe_path(shipped)
    recipe = load_recipe(path, overrides)
    models = {role: folder / Path(spec.model_name_or_path).name
              for role, spec in (("teacher", recipe.teacher), ("student", recipe.student)) if spec}
    keys = {role: "processor_name_or_path" if role == "teacher" and recipe.teacher.server else
            "model_name_or_path" for role in models}
    for place in models.values():
        if not place.is_dir():
            raise TaidError(f"{shipped}: the sizes of {place.name} are not known here.")
    kind = "text" if models["student"].name.startswith("Qwen3-") else "pictures"
    recipe = load_recipe(path, [
        *overrides, *(f"{role}.{keys[role]}={place}" for role, place in models.items()),
        f"data={{train: {folder / kind}.jsonl}}"])
    return asdict(fullest(plan_recipe(recipe, processes)))


def _text(name: str, planned: Mapping[str, Any]) -> str:
    parts = [(part["name"], human(part["most"])) for part in planned["components"]]
    parts += [(f"{role}: parameters, those a token passes",
               f"{it['parameters'] / 1e9:.1f} B, {it['per_token'] / 1e9:.1f} B")
              for role, it in planned["experts"].items()]
    forms = [(f"cache {form['options']}", f"{form['per_token']:,} bytes a token")
             for form in (planned["cache"] or {"forms": ()})["forms"]]
    return f"\n{name}: {human(planned['peak'])} in the {planned['fullest']}\n" + table(
        [("", ""), *parts, *forms], right=(1,))


if __name__ == "__main__":
    sys.exit(main())
