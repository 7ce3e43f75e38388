"""What the tests of composed students share: small towers, language models, and students."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from zoo import build, save

from taid_vlm.students.compose import compose

VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
       "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
SQUARE = {"height": 32, "width": 32}
# name -> (model, image processor, tokens before the patches, default layer)
TOWERS: dict[str, tuple[Any, Any, int, int]] = {
    "clip": (lambda: hf.CLIPModel(hf.CLIPConfig(vision_config=VIT, text_config=TEXT)),
             hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE), 1, -2),
    "clip_vision": (lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**VIT)),
                    hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE), 1, -2),
    "siglip": (lambda: hf.SiglipModel(hf.SiglipConfig(vision_config=VIT, text_config=TEXT)),
               hf.SiglipImageProcessor(size=SQUARE), 0, -1),
    "vit": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT)),
            hf.ViTImageProcessor(size=SQUARE), 1, -2),
    "vit_msn": (lambda: hf.ViTMSNModel(hf.ViTMSNConfig(**VIT)),
                hf.ViTImageProcessor(size=SQUARE), 1, -2),
    "beit": (lambda: hf.BeitModel(hf.BeitConfig(**VIT)), hf.ViTImageProcessor(size=SQUARE), 1, -2),
    # its processor crops to another size than it was trained at, as in the real checkpoints
    "dinov2": (lambda: hf.Dinov2Model(hf.Dinov2Config(**VIT | {"image_size": 48})),
               hf.BitImageProcessor(size={"shortest_edge": 40}, crop_size=SQUARE), 1, -1),
    "ijepa": (lambda: hf.IJepaModel(hf.IJepaConfig(**VIT)),
              hf.ViTImageProcessor(size=SQUARE), 0, -1),
}


class Parts:
    """Towers, language models and composed students on disk, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def tower(self, name: str) -> str:
        folder = self.folder / "towers" / name
        if not folder.exists():
            torch.manual_seed(0)
            TOWERS[name][0]().save_pretrained(folder)
            TOWERS[name][1].save_pretrained(folder)
        return str(folder)

    def text(self, family: str, tied: bool = False, **options: Any) -> str:
        folder = self.folder / "text" / "-".join([family, str(tied), *map(str, options.values())])
        if not folder.exists():
            save(build(family, tied=tied, **options), folder)
        return str(folder)

    def composed(self, tower: str, family: str = "qwen2", **options: Any) -> str:
        """`tower`: a name of TOWERS, or of timm (then with random weights)."""
        folder = self.folder / "composed" / f"{tower}-{family}".replace(":", "_")
        if not folder.exists():
            is_timm = tower.startswith("timm:")
            compose(tower if is_timm else self.tower(tower), self.text(family), folder,
                    random_tower=is_timm, **options)
        return str(folder)


def loaded(folder: str | Path) -> tuple[Any, Any]:
    model = hf.AutoModelForImageTextToText.from_pretrained(folder).eval()
    return model, hf.AutoProcessor.from_pretrained(folder)


def inputs_of(processor: Any, *images: Any, question: str = "What is it?") -> dict[str, Any]:
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}],
                                         add_generation_prompt=True)
    given = processor(text=[text], images=[list(images)] if images else None, return_tensors="pt")
    return {key: given[key] for key in ("input_ids", "attention_mask", "pixel_values")
            if key in given}
