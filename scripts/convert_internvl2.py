"""InternVL2's checkpoints with code of their own as transformers' InternVL, every weight as it is.

    python scripts/convert_internvl2.py InternVL2-1B --output-dir InternVL2-1B-hf
    python scripts/convert_internvl2.py InternVL2-8B --output-dir InternVL2-8B-hf --tokenizer FOLDER

The folder has config.json (model_type internvl_chat) and safetensors; its code is never run. What
transformers' classes cannot hold is refused. --tokenizer is for checkpoints whose tokenizer is code
of their own, too (InternLM2's): a folder with the same tokens as a tokenizer.json. Videos are left
out: these tokenizers have no token for them. Dropped paths, which act in training alone, are too.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
)

from taid_vlm.errors import TaidError, one_of
from taid_vlm.io.files import read_json
from taid_vlm.io.folders import new_folder, whole_or_absent

LANGUAGE = {"Qwen2ForCausalLM": "qwen2", "LlamaForCausalLM": "llama",
            "InternLM2ForCausalLM": "llama"}
TOKENS = {"start_image_token": "<img>", "end_image_token": "</img>",
          "context_image_token": "<IMG_CONTEXT>",
          "video_token": "</quad>"}  # transformers wants one; nothing says this one
TURN = ("<|im_start|>", "<|im_end|>")
QK_EPS = 1e-6  # the only one that transformers' class knows for queries and keys
VISION = {"qkv_bias": "attention_bias", "qk_normalization": "use_qk_norm",
          "dropout": "projection_dropout",
          **{key: key for key in (
              "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
              "hidden_act", "attention_dropout", "norm_type", "layer_norm_eps", "image_size",
              "patch_size", "num_channels", "initializer_range")}}
INTERNLM2 = {"bias": "attention_bias", **{key: key for key in (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta",
    "rope_scaling", "initializer_range", "tie_word_embeddings", "bos_token_id", "eos_token_id",
    "pad_token_id")}}
# the part of a name that changes, in the order they are tried: the first that fits is taken
NAMES = tuple((re.compile(old + r"(?=\.|$)"), new) for old, new in (
    (r"^vision_model\.embeddings\.class_embedding", "model.vision_tower.embeddings.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding",
     "model.vision_tower.embeddings.position_embeddings"),
    (r"^vision_model\.embeddings\.patch_embedding",
     "model.vision_tower.embeddings.patch_embeddings.projection"),
    (r"^vision_model\.encoder\.layers", "model.vision_tower.encoder.layer"),
    (r"^mlp1\.0", "model.multi_modal_projector.layer_norm"),
    (r"^mlp1\.1", "model.multi_modal_projector.linear_1"),
    (r"^mlp1\.3", "model.multi_modal_projector.linear_2"),
    (r"^language_model\.model\.tok_embeddings", "model.language_model.embed_tokens"),
    (r"^language_model\.model", "model.language_model"),
    (r"^language_model\.(lm_head|output)", "lm_head"),
))
VISION_LAYER = {"attn.proj": "attention.projection_layer", "attn": "attention",
                "norm1": "layernorm_before", "norm2": "layernorm_after",
                "ls1": "lambda_1", "ls2": "lambda_2"}
INTERNLM2_LAYER = {"attention.wo": "self_attn.o_proj", "attention.wqkv": "self_attn.qkv",
                   "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
                   "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm",
                   "ffn_norm": "post_attention_layernorm"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    try:
        output = new_folder(options.output_dir.absolute())
        with whole_or_absent(output, "the model could not be saved to '{}'") as partial:
            convert(options.folder, partial, options.tokenizer or options.folder)
    except TaidError as error:
        print(f"convert_internvl2: {error}", file=sys.stderr)
        return 2
    return 0


def convert(folder: Path, output: Path, tokenizer: Path) -> None:
    """Write model and processor to `output`; raises TaidError."""
    facts = read_json(folder / "config.json", "a checkpoint's config")
    config = converted_config(facts)
    processor = make_processor(tokenizer, facts, config)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise TaidError(f"'{folder}' has no .safetensors files.")
    weights = dict(converted({k: v for file in files for k, v in load_file(file).items()}, config))
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config)
    missing = model.state_dict().keys() - weights.keys()
    if config.tie_word_embeddings:
        missing -= {"lm_head.weight"}
    if strange := sorted(missing | (weights.keys() - model.state_dict().keys())):
        raise TaidError(f"'{folder}': {strange[0]} is not in both the checkpoint and transformers' "
                        "classes.")
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    tokenizer = processor.tokenizer
    model.generation_config.eos_token_id = sorted(
        {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN[1])})
    model.save_pretrained(output)
    processor.save_pretrained(output)


# ----- configuration ------------------------------------------------------------------------


def converted_config(facts: Mapping[str, Any]) -> InternVLConfig:
    """What transformers' classes are built from; raises TaidError where they compute otherwise."""
    if facts.get("model_type") != "internvl_chat":
        raise TaidError(f"model_type = '{facts.get('model_type')}', but it must be internvl_chat.")
    vision, language = facts["vision_config"], facts["llm_config"]
    architecture = (language.get("architectures") or [None])[0]
    one_of("llm_config.architectures", architecture, LANGUAGE)
    size = facts.get("force_image_size") or vision["image_size"]
    for key, value, only in (
            ("ps_version", facts.get("ps_version"), "v2"),
            ("force_image_size", size, vision["image_size"]),
            ("vision_config.layer_norm_eps", vision["layer_norm_eps"] if vision.get(
                "qk_normalization") else QK_EPS, QK_EPS)):
        if value != only:
            raise TaidError(f"{key} = {value!r}, but transformers' InternVL computes only what "
                            f"{only!r} means.")
    own = INTERNLM2 if architecture == "InternLM2ForCausalLM" else {k: k for k in language}
    text = {own[key]: value for key, value in language.items()
            if key in own and key not in ("model_type", "architectures", "auto_map")}
    return InternVLConfig(
        text_config=AutoConfig.for_model(LANGUAGE[architecture], **text),
        vision_config={VISION[key]: value for key, value in vision.items() if key in VISION},
        downsample_ratio=facts["downsample_ratio"], vision_feature_layer=facts["select_layer"],
        image_seq_length=int((size // vision["patch_size"] * facts["downsample_ratio"]) ** 2),
        tie_word_embeddings=bool(language.get("tie_word_embeddings", False)),
        dtype=facts.get("torch_dtype", "bfloat16"))


def make_processor(
    folder: Path, facts: Mapping[str, Any], config: InternVLConfig
) -> InternVLProcessor:
    """Tiles, thumbnail and tokens; its chat template says how an image stands in a turn."""
    try:
        plain, tokenizer = (AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, **more) for more in (
                {}, {"extra_special_tokens": TOKENS}))
    except (ValueError, OSError) as error:
        raise TaidError(f"the tokenizer of '{folder}' cannot be loaded without its own code: "
                        f"{str(error).splitlines()[0]}", mend="Give --tokenizer.") from error
    if strange := [t for t in (*TOKENS.values(), *TURN) if t not in plain.get_vocab()]:
        raise TaidError(f"the tokenizer of '{folder}' has no {strange[0]}.")
    config.image_token_id = tokenizer.context_image_token_id
    side = config.vision_config.image_size[0]
    images = GotOcr2ImageProcessor(
        size={"height": side, "width": side}, crop_to_patches=bool(facts["dynamic_image_size"]),
        min_patches=facts["min_dynamic_patch"], max_patches=facts["max_dynamic_patch"],
        use_thumbnail=facts["use_thumbnail"], image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225])
    videos = InternVLVideoProcessor(size=images.size)  # asked for, and never used
    return InternVLProcessor(images, tokenizer, videos, config.image_seq_length, CHATML)


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<IMG_CONTEXT>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


# ----- weights ------------------------------------------------------------------------------


def converted(
    weights: Mapping[str, Tensor], config: InternVLConfig
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its new name; fused queries, keys and values in three."""
    text = config.text_config
    for old, tensor in weights.items():
        name = renamed(old)
        if ".attention.qkv." in name:
            parts = tensor.chunk(3)
        elif ".self_attn.qkv." in name:  # for every key its queries, the key, its value
            groups = text.num_attention_heads // text.num_key_value_heads
            rows = tensor.unflatten(0, (text.num_key_value_heads, groups + 2, -1))
            parts = [rows[:, a:b].flatten(0, 2) for a, b in (
                (0, groups), (groups, groups + 1), (groups + 1, groups + 2))]
        else:
            yield name, tensor
            continue
        for letter, part in zip("qkv", parts, strict=True):
            yield name.replace(".qkv.", f".{letter}_proj."), part.clone()


def renamed(old: str) -> str:
    name = next((pattern.sub(new, old) for pattern, new in NAMES if pattern.search(old)), old)
    inside = re.fullmatch(r"(model\.(?:vision_tower\.encoder\.layer|language_model\.layers)\.\d+\.)"
                          r"(.*)", name)
    if inside is None:
        return name
    place, rest = inside.groups()
    layer = VISION_LAYER if "vision_tower" in place else INTERNLM2_LAYER
    for part, new in layer.items():
        if rest == part or rest.startswith(f"{part}."):
            return place + new + rest.removeprefix(part)
    return name


if __name__ == "__main__":
    sys.exit(main())
