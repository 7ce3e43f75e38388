"""`teacher:` and `student:` of a recipe."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

from taid_vlm.config.section import Section

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES: tuple[str, ...] = get_args(Dtype)


class ModelSpec(Section):
    """A model, its processor or tokenizer, and how both are loaded.

    Args:
        model_name_or_path: Folder or hub name. A LoRA adapter stands for its base model with the
            adapter merged.
        processor_name_or_path: Where processor or tokenizer come from, if not from the model.
        revision: Hub revision.
        dtype: What weights are loaded as. Left out: float32 for the student (its master weights),
            the checkpoint's own for the teacher.
        attn_implementation: As in transformers, for example sdpa or flash_attention_2.
        trust_remote_code: Run code that came with the checkpoint.
        chat_template: A jinja file, or the template itself.
        processor_kwargs: How its processor shows pictures, under the processor's own names
            (max_pixels, size, max_patches, do_image_splitting ...), and under videos_kwargs for
            videos. Saved with the student.
        chat_template_kwargs: Variables of the chat template, for training, inspection and
            answering alike: {enable_thinking: false}.
        init_kwargs: Anything else that from_pretrained takes.
    """

    bare: ClassVar[str] = "model_name_or_path"

    model_name_or_path: str
    processor_name_or_path: str | None = None
    revision: str = "main"
    dtype: Dtype | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    chat_template: str | None = None
    processor_kwargs: dict[str, Any] = {}
    chat_template_kwargs: dict[str, Any] = {}
    init_kwargs: dict[str, Any] = {}


class StudentSpec(ModelSpec):
    """The model that is trained.

    Args:
        peft: Arguments of peft's LoraConfig, to train an adapter only: {r: 16, lora_alpha: 32,
            target_modules: all-linear}.
    """

    peft: dict[str, Any] | None = None
