"""`teacher:` and `student:` of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

from taid_vlm.config.kinds import Count, Positive
from taid_vlm.config.section import Section
from taid_vlm.config.server import Server

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES: tuple[str, ...] = get_args(Dtype)
Quantization = Literal["4bit", "8bit", "fp8"]
DESCRIPTION = "teacher"  # in a cache: the folder with the teacher's config and processor


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
        quantization: Round the linear layers when they are loaded, but not the output head: 4bit
            (nf4 with scales rounded, too), 8bit (int8) or fp8. A checkpoint that is stored rounded
            needs no key.
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
    quantization: Quantization | None = None
    trust_remote_code: bool = False
    chat_template: str | None = None
    processor_kwargs: dict[str, Any] = {}
    chat_template_kwargs: dict[str, Any] = {}
    init_kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def _rounded_once(self) -> Self:
        for key in self.init_kwargs if self.quantization else ():
            if "quantization" in key or key.startswith("load_in_"):
                raise ValueError(f".quantization = '{self.quantization}' and .init_kwargs.{key} "
                                 "both say how weights are rounded; take one of the two out.")
        return self


class StudentSpec(ModelSpec):
    """The model that is trained.

    Args:
        peft: Arguments of peft's LoraConfig, to train an adapter only: {r: 16, lora_alpha: 32,
            target_modules: all-linear}.
    """

    peft: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _trained_beside(self) -> Self:
        if self.quantization is not None and self.peft is None:
            raise ValueError(f".quantization = '{self.quantization}' needs .peft: rounded weights "
                             "cannot be trained, but an adapter on top of them can.")
        return self


class ServerSpec(Server):
    """A teacher behind a URL: an OpenAI-compatible vLLM server.

    Args:
        top_logprobs: How many of the most likely tokens are compared one by one, the others
            together; the server has to be started with --max-logprobs of at least as many.
        check: The served model's weights, if they are at hand: before training, what the server
            says is compared with what they say.
    """

    top_logprobs: Positive = 64
    check: str | None = None


Sharding = Literal["replicate", "fsdp", "tensor"]


class TeacherSpec(ModelSpec):
    """The model that is learned from: its weights in this process, a server that has them, or
    what it said once.

    Args:
        model_name_or_path: Folder or hub name, where there is neither server nor cache. A LoRA
            adapter stands for its base model with the adapter merged.
        sharding: How it lies in several processes, however the student is trained: whole in each
            (replicate, the default), or all but its head spread over them, layers gathered one
            after the other (fsdp) or every layer computed together (tensor).
        devices: Where it lies in a process: cpu, over all devices (auto), or over some ([1, 2]);
            what does not fit there, in the CPU's memory. Its head is where the student is. Left
            out: where the student is.
        server: Where the teacher is served. No weights are loaded then, only configuration and
            processor, from processor_name_or_path.
        cache: Folder that `taid-vlm cache` wrote, instead of a model: training then loads none of
            the teacher's weights but its head. Config, processor, chat template and its variables
            come from there, so that only trust_remote_code may stand beside it.
    """

    sharding: Sharding | None = None
    devices: Literal["auto", "cpu"] | Annotated[list[Count], Field(min_length=1)] | None = None
    server: ServerSpec | None = None
    cache: str | None = None

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """What `_of_processor` and `_described_by_its_cache` fill in may be left out."""
        reference = super().__get_pydantic_json_schema__(schema, handler)
        _, mapping = handler.resolve_ref_schema(reference)["anyOf"]
        named = mapping.pop("required")
        mapping["allOf"] = [{"anyOf": [{"required": keys} for keys in (
            named, ["processor_name_or_path", "server"], ["cache"])]}]
        return reference

    @property
    def is_sharded(self) -> bool:
        return self.sharding not in (None, "replicate")

    @model_validator(mode="before")
    @classmethod
    def _of_processor(cls, value: Any) -> Any:
        """With a server the processor's folder is also where the configuration comes from."""
        if not isinstance(value, Mapping) or value.get("server") is None:
            return value
        place = value.get("model_name_or_path") or value.get("processor_name_or_path")
        if not place:
            raise ValueError(".processor_name_or_path is missing: with a server it says where the "
                             "model's configuration and processor are; no weights are loaded.")
        return {**value, "model_name_or_path": place}

    @model_validator(mode="after")
    def _nothing_to_load(self) -> Self:
        for key in ("dtype", "attn_implementation", "quantization", "init_kwargs", "sharding",
                    "devices"):
            default = TeacherSpec.model_fields[key].default
            if self.server is not None and getattr(self, key) != default:
                raise ValueError(f".{key} has no effect with a server, which has loaded its model; "
                                 "take it out.")
        return self

    @model_validator(mode="after")
    def _in_one_place(self) -> Self:
        device_map = self.init_kwargs.get("device_map")
        if self.devices is not None and device_map is not None:
            raise ValueError(f".devices = {self.devices!r} and init_kwargs.device_map = "
                             f"{device_map!r:.60} say the same; take the second out.")
        if self.is_sharded and self.quantization is not None:
            raise ValueError(f".sharding = '{self.sharding}' cannot shard a teacher in "
                             f"{self.quantization}; take one of the two out.")
        if self.is_sharded and (self.devices is not None or device_map is not None):
            key = "init_kwargs.device_map" if self.devices is None else "devices"
            raise ValueError(f".sharding = '{self.sharding}' spreads the teacher over processes, "
                             f"{key} over one process's devices; take one of the two out.")
        return self

    @model_validator(mode="before")
    @classmethod
    def _described_by_its_cache(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or not isinstance(value.get("cache"), str):
            return value
        return {"model_name_or_path": _described(value["cache"]), **value}

    @model_validator(mode="after")
    def _cache_alone(self) -> Self:
        if self.cache is None:
            return self
        if not self.cache:
            raise ValueError(".cache = '', but it must be a folder that `taid-vlm cache` wrote.")
        plain = TeacherSpec.model_fields
        described = {"cache", "trust_remote_code"}
        if self.model_name_or_path == _described(self.cache):
            described.add("model_name_or_path")
        for key, inner in self:
            if key not in described and inner != plain[key].default:
                raise ValueError(
                    f".{key} = {inner!r:.60} has no effect beside .cache = '{self.cache}', which "
                    "holds its own teacher, processor and chat template; take one of the two out.")
        return self


def _described(cache: str) -> str:
    return str(Path(cache).expanduser() / DESCRIPTION)
