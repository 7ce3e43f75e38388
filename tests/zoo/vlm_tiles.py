"""Families that cut an image into tiles (and look at the whole of it, too)."""

from __future__ import annotations

from typing import Any

import torchvision
import transformers as hf
from torch.torch_version import TorchVersion
from transformers import PreTrainedTokenizerBase
from transformers.models.smolvlm import processing_smolvlm

from .parts import Family, Parts, Text, square, tied, vision

_PINPOINTS = [[32, 64], [64, 32], [64, 64]]  # (height, width) that tiles of 32 can make up


def _allow_missing_num2words() -> None:
    """SmolVLM's processor refuses to exist without num2words, which only its video prompts use.

    Where the package is absent, put `str` in its place, for this process alone: a subprocess that
    loads a saved SmolVLM needs the real package.
    """
    if processing_smolvlm.num2words is None:
        processing_smolvlm.num2words = str


def lanczos(family: str) -> Any:
    """The image processor that AutoProcessor will load: without torchvision 0.27, which brings
    Lanczos resampling, that is the one on PIL."""
    old = TorchVersion(torchvision.__version__) < (0, 27)
    return getattr(hf, f"{family}ImageProcessor{'Pil' if old else ''}")


def _smolvlm(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """Tiles of 32 x 32 plus the whole image: 4 image tokens each, row and column markers too."""
    _allow_missing_num2words()
    config = hf.SmolVLMConfig(
        vision_config=vision(),
        text_config=hf.LlamaConfig(**text).to_dict(),
        scale_factor=2,
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        **tied(text),
    )
    tile = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    processor = hf.SmolVLMProcessor(
        lanczos("SmolVLM")(**tile),
        tok,
        hf.SmolVLMVideoProcessor(**tile),
        image_seq_len=4,
        chat_template=tok.chat_template,
    )
    return processor, config, hf.SmolVLMForConditionalGeneration


def _idefics3(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """As SmolVLM, with one image token per tile (patches of 16 pixels)."""
    config = hf.Idefics3Config(
        vision_config=vision(patch_size=16),
        text_config=hf.LlamaConfig(**text).to_dict(),
        scale_factor=2,
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        **tied(text),
    )
    processor = hf.Idefics3Processor(
        lanczos("Idefics3")(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        tok,
        image_seq_len=1,
        chat_template=tok.chat_template,
    )
    return processor, config, hf.Idefics3ForConditionalGeneration


def _internvl(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """4 image tokens per tile, one to four tiles (and a thumbnail) by the aspect ratio."""
    config = hf.InternVLConfig(
        vision_config=vision(image_size=[32, 32], patch_size=[8, 8]),
        text_config=hf.Qwen2Config(**text | {"hidden_size": 48}).to_dict(),
        image_token_id=tok.context_image_token_id,
        image_seq_length=4,
        **tied(text),
    )
    processor = hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(
            size=square(32), crop_to_patches=True, min_patches=1, max_patches=4
        ),
        tok,
        hf.InternVLVideoProcessor(size=square(32)),
        image_seq_length=4,
        chat_template=tok.chat_template,
    )
    return processor, config, hf.InternVLForConditionalGeneration


def _llava_next(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """16 image tokens per tile and one per row of the unpadded image (CLIP tower, Llama 3)."""
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**vision(num_hidden_layers=3)),
        text_config=hf.LlamaConfig(**text),
        image_token_index=tok.image_token_id,
        image_grid_pinpoints=_PINPOINTS,
        image_seq_length=16,
        **tied(text),
    )
    processor = hf.LlavaNextProcessor(
        hf.LlavaNextImageProcessor(
            size={"shortest_edge": 32}, crop_size=square(32), image_grid_pinpoints=_PINPOINTS
        ),
        tok,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tok.chat_template,
    )
    return processor, config, hf.LlavaNextForConditionalGeneration


def _llava_onevision(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """Tiles as LLaVA-NeXT for one image; several images of a sample get 17 tokens each."""
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**vision(vision_use_head=False)),
        text_config=hf.Qwen2Config(**text),
        image_token_index=tok.image_token_id,
        video_token_index=tok.video_token_id,
        image_grid_pinpoints=_PINPOINTS,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        **tied(text),
    )
    processor = hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size=square(32), image_grid_pinpoints=_PINPOINTS),
        tok,
        hf.LlavaOnevisionVideoProcessor(size=square(32)),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=tok.chat_template,
    )
    return processor, config, hf.LlavaOnevisionForConditionalGeneration


def _perception_lm(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """16 image tokens per tile, a thumbnail in front; the tower is timm's, with a class token."""
    tower = hf.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        model_args={"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 48, "num_heads": 4},
        do_pooling=False,
    )
    config = hf.PerceptionLMConfig(
        vision_config=tower,
        text_config=hf.LlamaConfig(**text),
        vision_use_cls_token=True,
        projector_pooling_ratio=1,
        image_token_id=tok.image_token_id,
        video_token_id=tok.video_token_id,
        **tied(text),
    )
    processor = hf.PerceptionLMProcessor(
        hf.PerceptionLMVideoProcessor(size=square(32)),
        hf.PerceptionLMImageProcessor(
            vision_input_type="thumb+tile", tile_size=32, max_num_tiles=4
        ),
        tok,
        patch_size=8,
        pooling_ratio=1,
        chat_template=tok.chat_template,
    )
    return processor, config, hf.PerceptionLMForConditionalGeneration


def _lfm2_vl(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """Small images at their own size, larger ones in two to four tiles and a thumbnail."""
    config = hf.Lfm2VlConfig(
        vision_config=hf.Siglip2VisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_patches=16,
            patch_size=8,
            vision_use_head=False,
        ),
        text_config=hf.Lfm2Config(
            **text, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False
        ),
        image_token_id=tok.image_token_id,
        projector_hidden_size=32,
        downsample_factor=2,
        **tied(text),
    )
    processor = hf.Lfm2VlProcessor(
        hf.Lfm2VlImageProcessor(
            downsample_factor=2,
            tile_size=32,
            encoder_patch_size=8,
            min_image_tokens=4,
            max_image_tokens=16,
            max_num_patches=64,
            min_tiles=2,
            max_tiles=4,
            use_thumbnail=True,
        ),
        tok,
        chat_template=tok.chat_template,
    )
    return processor, config, hf.Lfm2VlForConditionalGeneration


def _ovis2(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """16 image tokens per tile with indicators between; the tower gives visual words."""
    ids = tok.convert_tokens_to_ids
    indicators = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    config = hf.Ovis2Config(
        vision_config=vision(vocab_size=64, hidden_stride=1, num_visual_indicator_tokens=5),
        text_config=hf.Qwen2Config(**text).to_dict(),
        image_token_id=ids("<IMG_ATOM>"),
        visual_indicator_token_ids=[ids(token) for token in indicators],
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        **tied(text),
    )
    processor = hf.Ovis2Processor(
        hf.Ovis2ImageProcessor(size=square(32), crop_to_patches=True, max_patches=4),
        tok,
        image_seq_length=16,
        chat_template=tok.chat_template,
    )
    return processor, config, hf.Ovis2ForConditionalGeneration


TILES: dict[str, Family] = {
    "smolvlm": _smolvlm,
    "idefics3": _idefics3,
    "internvl": _internvl,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "perception_lm": _perception_lm,
    "lfm2_vl": _lfm2_vl,
    "ovis2": _ovis2,
}
