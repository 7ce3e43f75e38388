"""`taid-vlm compose`: a student from a vision tower and a language model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from taid_vlm.commands.options import Numbers, Options, option, positional


class ComposeOptions(Options):
    tower: str = positional("timm:NAME, or a folder or hub name of CLIP, SigLIP, ViT ...")
    language_model: str = positional("folder or hub name of a causal language model")
    output_dir: Path = option(default=...)
    architecture: Literal["auto", "llava", "perception_lm", "fast_vlm"] = option(default="auto")
    tower_weights: str | None = option(
        "safetensors for a timm tower; otherwise its weights on the hub", "FILE")
    random_tower: bool = option("no pretrained weights", default=False)
    vision_feature_layer: Numbers | None = option(
        "hidden states that LLaVA projects, for example -2; several as =-2,-1", "I[,J...]")
    projector_activation: str | None = option("default gelu", "NAME")
    pooling_ratio: int | None = option(
        "of PerceptionLM: 2 leaves a quarter of the image tokens", "N")
    chat_template: str | None = option(
        "jinja file in place of the language model's own template", "FILE")
    dtype: str = option("default: the language model's", default="auto")
    seed: int = option("of the projector, and a random tower", default=0)


def run(options: ComposeOptions) -> None:
    from taid_vlm.students.compose import compose

    arguments, layers = options.model_dump(), options.vision_feature_layer
    if layers is not None and len(layers) == 1:
        arguments["vision_feature_layer"] = layers[0]
    print(compose(**arguments).table())
