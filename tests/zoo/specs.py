"""What each family adds to the zoo's shared tokenizer: special tokens, template, conventions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer, Qwen3_5Tokenizer
from transformers.models.paligemma.processing_paligemma import EXTRA_TOKENS

from . import templates


@dataclass(frozen=True)
class Spec:
    """What a family adds to the shared BPE. `special`, then `added`, are in id order."""

    special: tuple[str, ...]
    eos: str
    pad: str | None
    bos: str | None = None
    named: Mapping[str, str] = field(default_factory=dict)  # tokenizer attribute -> token
    template: str | None = None
    adds_bos: bool = False  # the tokenizer itself prepends bos, as Llama 3's and Gemma's do
    added: tuple[str, ...] = ()  # added tokens that are no special tokens: "<think>"
    rstrip: frozenset[str] = frozenset()  # special tokens that swallow the whitespace behind them
    qwen_class: type[PreTrainedTokenizerBase] | None = None
    padding_side: str | None = None  # None: whatever the classes default to


_CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_THOUGHT = ("<think>", "</think>")
_QWEN_VISION = {
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}
_QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_INTERN_VISION = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
_GEMMA_VISION = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}
_GEMMA4_MODALITIES = {
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "image_token": "<|image|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "audio_token": "<|audio|>",
}
_LFM2_VISION = {
    "image_token": "<image>",
    "image_start_token": "<|image_start|>",
    "image_end_token": "<|image_end|>",
    "image_thumbnail_token": "<|img_thumbnail|>",
}
_LLAMA_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
_GEMMA_TOKENS = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
_MISTRAL_TOKENS = ("<pad>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]",
                   "[/SYSTEM_PROMPT]")
_PHI_ROLES = ("<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
_GLM_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_HARMONY = ("<|return|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>")
_GRID = [(row, col) for row in range(1, 5) for col in range(1, 5)]
_IDEFICS_TOKENS = (
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{row}_col_{col}>" for row, col in _GRID),
)
_OVIS_TOKENS = ("<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")


def _qwen(
    template: str, vision: Mapping[str, str] | None = None, side: str | None = None,
    extra: tuple[str, ...] = (), added: tuple[str, ...] = (),
    qwen_class: type[PreTrainedTokenizerBase] = Qwen2Tokenizer,
) -> Spec:
    named = dict(vision or {})
    return Spec(
        special=(*_CHATML_TOKENS, *named.values(), *extra),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        named=named,
        template=template,
        added=added,
        qwen_class=qwen_class,
        padding_side=side,
    )


def _llama3(
    template: str, vision: Mapping[str, str] | None = None, extra: tuple[str, ...] = (),
    added: tuple[str, ...] = (), eos: str = "<|eot_id|>", adds_bos: bool = True,
) -> Spec:
    named = dict(vision or {})
    return Spec(
        special=(*_LLAMA_TOKENS, "<|eot_id|>", "<|finetune_right_pad_id|>", *named.values(),
                 *extra),
        bos="<|begin_of_text|>",
        eos=eos,
        pad="<|finetune_right_pad_id|>",
        named=named,
        template=template,
        added=added,
        adds_bos=adds_bos,
    )


def _gemma(
    template: str | None, tokens: tuple[str, ...] = _GEMMA_TOKENS,
    vision: Mapping[str, str] | None = None, **changes: object,
) -> Spec:
    named = dict(vision or {})
    return Spec(
        special=(*tokens, *named.values()),
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        named=named,
        template=template,
        padding_side="left",
        **{"adds_bos": True, **changes},  # type: ignore[arg-type]
    )


def _mistral(template: str, extra: tuple[str, ...] = ()) -> Spec:
    return Spec(
        special=(*_MISTRAL_TOKENS, *extra),
        bos="<s>",
        eos="</s>",
        pad="<pad>",
        template=template,
        adds_bos=True,
    )


SPECS: dict[str, Spec] = {
    "llava": _qwen(templates.llava_qwen(), {"image_token": "<image>"}, side="left"),
    "llava_next": _llama3(templates.llama3("{{ '<image>\n' }}"), {"image_token": "<image>"}),
    "llava_onevision": _qwen(
        templates.llava_qwen(after_role="{{ ' ' }}", video="{{ '<video>' }}"),
        {"image_token": "<image>", "video_token": "<video>"},
    ),
    "fast_vlm": _qwen(
        templates.chatml("{{ '<image>\n' }}", system=True), {"image_token": "<image>"}
    ),
    "perception_lm": _llama3(
        templates.llama3("<|image|>"), {"image_token": "<|image|>", "video_token": "<|video|>"}
    ),
    "qwen2_vl": _qwen(
        templates.chatml(_QWEN_IMAGE, system=True, video=_QWEN_VIDEO), _QWEN_VISION),
    "qwen2_5_vl": _qwen(
        templates.chatml(_QWEN_IMAGE, system=True, video=_QWEN_VIDEO), _QWEN_VISION),
    "qwen3_vl": _qwen(templates.chatml(_QWEN_IMAGE, video=_QWEN_VIDEO), _QWEN_VISION),
    "qwen3_vl_moe": _qwen(templates.chatml(_QWEN_IMAGE, video=_QWEN_VIDEO), _QWEN_VISION),
    "hy_v4_vl": _qwen(templates.chatml(_QWEN_IMAGE, video=_QWEN_VIDEO), _QWEN_VISION),
    "qwen3_5": _qwen(
        templates.thinking(_QWEN_IMAGE, open_thought=True, video=_QWEN_VIDEO), _QWEN_VISION,
        added=_THOUGHT, qwen_class=Qwen3_5Tokenizer,
    ),
    "internvl": _qwen(
        templates.chatml("{{ '<IMG_CONTEXT>\n' }}", video="{{ '<video>\n' }}"), _INTERN_VISION),
    "ovis2": _qwen(
        templates.chatml("{{ '<image>\n' }}", system=True), {"image_token": "<image>"},
        extra=_OVIS_TOKENS,
    ),
    "qwen2": _qwen(templates.chatml(system=True)),
    "qwen3": _qwen(templates.thinking(), added=_THOUGHT),
    "smolvlm": Spec(
        special=(*_CHATML_TOKENS, *_IDEFICS_TOKENS),
        bos="<|im_start|>",
        eos="<end_of_utterance>",
        pad="<|im_end|>",
        template=templates.idefics("<|im_start|>"),
    ),
    # The end of a turn is NOT the eos token: the generation config lists both.
    "idefics3": Spec(
        special=(*_LLAMA_TOKENS, "<|eot_id|>", *_IDEFICS_TOKENS),
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        pad="<|eot_id|>",
        template=templates.idefics("<|begin_of_text|>"),
        adds_bos=True,
    ),
    "lfm2_vl": Spec(
        special=("<|pad|>", "<|startoftext|>", *_CHATML_TOKENS, *_LFM2_VISION.values(),
                 *(f"<|img_row_{row}_col_{col}|>" for row, col in _GRID)),
        bos="<|startoftext|>",
        eos="<|im_end|>",
        pad="<|pad|>",
        named=_LFM2_VISION,
        template=templates.chatml("<image>", bos="{{ bos_token }}"),
        adds_bos=True,
    ),
    "mistral3": _mistral(templates.mistral("[IMG]"), extra=("[IMG]", "[IMG_BREAK]", "[IMG_END]")),
    "mistral": _mistral(templates.mistral()),
    "gemma3": _gemma(templates.gemma("<start_of_image>"), vision=_GEMMA_VISION),
    "gemma4": _gemma(
        templates.gemma("<|image|>", ("<|turn>", "<turn|>"), "<|channel>thought\n<channel|>",
                        video="<|video|>"),
        ("<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|video|>"),
        _GEMMA4_MODALITIES,
    ),
    # A base model, of prefix and suffix: no chat template, and the processor writes the bos.
    "paligemma": _gemma(
        None, ("<pad>", "<eos>", "<bos>"), {"image_token": "<image>"}, adds_bos=False,
        added=tuple(EXTRA_TOKENS),
    ),
    "gemma2": _gemma(templates.gemma()),
    "gemma3_text": _gemma(templates.gemma()),
    "llama": _llama3(templates.llama3()),
    "phi3": Spec(
        special=("<s>", "<|endoftext|>", *_PHI_ROLES),
        bos="<s>",
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        template=templates.PHI3,
        rstrip=frozenset(_PHI_ROLES),
    ),
    # The whole conversation in ChatML, thoughts as Qwen3's, its metadata left out.
    "smollm3": _llama3(templates.thinking(), extra=("<|im_start|>", "<|im_end|>"), added=_THOUGHT,
                       eos="<|im_end|>", adds_bos=False),
    "olmo2": Spec(
        special=("<|endoftext|>", "<|pad|>"),
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        pad="<|pad|>",
        template=templates.OLMO,
    ),
    "granite": Spec(
        special=("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"),
        bos="<|end_of_text|>",
        eos="<|end_of_text|>",
        pad="<|end_of_text|>",
        template=templates.GRANITE,
    ),
    "glm4": Spec(
        special=("<|endoftext|>", "[gMASK]", "<sop>", *_GLM_ROLES),
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        template=templates.GLM4,
        padding_side="left",
    ),
    "lfm2": Spec(
        special=("<|pad|>", "<|startoftext|>", *_CHATML_TOKENS),
        bos="<|startoftext|>",
        eos="<|im_end|>",
        pad="<|pad|>",
        template=templates.chatml(bos="{{ bos_token }}"),
        adds_bos=True,
    ),
    "gemma4_text": _gemma(
        templates.gemma(None, ("<|turn>", "<turn|>"), "<|channel>thought\n<channel|>"),
        ("<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>"),
    ),
    "falcon_h1": _qwen(templates.chatml()),
    "qwen3_moe": _qwen(templates.thinking(), added=_THOUGHT),
    "mixtral": _mistral(templates.mistral()),
    "gpt_oss": Spec(
        special=("<|startoftext|>", "<|endoftext|>", *_HARMONY),
        bos="<|startoftext|>",
        eos="<|return|>",
        pad="<|endoftext|>",
        template=templates.HARMONY,
    ),
    "deepseek_v3": Spec(
        special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"),
        added=("<｜User｜>", "<｜Assistant｜>"),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        pad="<｜▁pad▁｜>",
        template=templates.DEEPSEEK,
        adds_bos=True,
    ),
    # A base model: no chat template and, like the real one, no padding token.
    "gpt2": Spec(special=("<|endoftext|>",), bos="<|endoftext|>", eos="<|endoftext|>", pad=None),
}

# The token that closes a turn where it is not the eos token.
END_OF_TURN: dict[str, str] = {
    "idefics3": "<end_of_utterance>",
    "gemma3": "<end_of_turn>",
    "gemma4": "<turn|>",
    "gemma4_text": "<turn|>",
    "gemma2": "<end_of_turn>",
    "gemma3_text": "<end_of_turn>",
    "phi3": "<|end|>",
}
