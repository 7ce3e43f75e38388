"""Loading models and processors."""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import get_max_memory, patch_environment
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations import deepspeed
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from taid_vlm.adapters import Processor, check_kwargs
from taid_vlm.config.model import ModelSpec, TeacherSpec
from taid_vlm.errors import TaidError
from taid_vlm.io.hashing import SHORT, sha256
from taid_vlm.models.lora import (
    LoraFolder,
    find_adapter,
    hub_options,
    merge_adapter,
    refuse_quantized,
    untie_skeleton,
)
from taid_vlm.models.processing import set_processor
from taid_vlm.models.quantization import (
    load_options,
    refuse_stored,
    refuse_unavailable,
    settle,
    tensors_in,
)

logger = logging.getLogger(__name__)


def read_config(spec: ModelSpec, role: str) -> PretrainedConfig:
    """The configuration of a model of any kind, a vision tower's too; an adapter's is its base's.
    """
    adapter = find_adapter(spec, role)
    if adapter is not None:
        return _base_config(adapter, role)
    _check_folder(spec.model_name_or_path, role)
    config = guarded(
        role, spec.model_name_or_path, AutoConfig.from_pretrained, spec.model_name_or_path,
        revision=spec.revision, trust_remote_code=spec.trust_remote_code, **hub_options(spec),
    )
    return _with_commit(config, spec)


def _with_commit(config: PretrainedConfig, spec: ModelSpec) -> PretrainedConfig:
    """Note which commit of the hub it is, which transformers 5.24 no longer does."""
    if getattr(config, "_commit_hash", None) is None and not Path(spec.model_name_or_path).exists():
        file = try_to_load_from_cache(
            spec.model_name_or_path, "config.json", spec.init_kwargs.get("cache_dir"),
            spec.revision)
        config._commit_hash = Path(file).parent.name if isinstance(file, str) else None
    return config


def _base_config(adapter: LoraFolder, role: str) -> PretrainedConfig:
    try:
        config = read_config(adapter.base, role)
    except TaidError as error:
        raise TaidError(f"{role}: {adapter.named}, which cannot be loaded "
                        f"({str(error).removeprefix(f'{role}: ')}). Put the model there, or write "
                        "the folder or hub name of the one that the adapter was trained on."
                        ) from error
    refuse_quantized(config, adapter, role)
    return config


def load_config(spec: ModelSpec, role: str) -> PretrainedConfig:
    """The model's configuration; cheap, so that a wrong name fails before anything is loaded."""
    config = read_config(spec, role)
    if getattr(config, "is_encoder_decoder", False):
        raise TaidError(
            f"{role}: '{spec.model_name_or_path}' ({config.model_type}) is an encoder-decoder. Its "
            "decoder never sees the prompt in its own token stream, so streams cannot be aligned; "
            "choose a decoder-only model.", code="encoder_decoder"
        )
    refuse_stored(config, spec, role)
    _auto_class(config, spec, role)
    return config


def load_model(
    spec: ModelSpec, role: str, half: torch.dtype | None = None
) -> PreTrainedModel:
    """Load weights (safetensors only) into the right Auto class; an adapter's, merged into its
    base model's.

    Args:
        half: the half precision of the run, if it has one; see `quantization.load_options`.

    Raises:
        TaidError: nothing there, an architecture that is not supported, unsafe weights only, or
            what `quantization` needs is missing.
    """
    adapter = find_adapter(spec, role)
    if adapter is not None:
        _base_config(adapter, role)
        return merge_adapter(load_model(adapter.base, role), adapter, role)
    config = load_config(spec, role)
    refuse_unavailable(spec, role)
    auto, dtype = _auto_class(config, spec, role), weights_dtype(spec, role, config)
    options: dict[str, Any] = {"dtype": dtype, **load_options(config, spec, dtype, half),
                               **spec.init_kwargs, **_device_map(spec)}
    if spec.attn_implementation is not None:
        options["attn_implementation"] = spec.attn_implementation
    model, report = guarded(
        role, spec.model_name_or_path, auto.from_pretrained, spec.model_name_or_path,
        revision=spec.revision, trust_remote_code=spec.trust_remote_code, use_safetensors=True,
        output_loading_info=True, ignore_mismatched_sizes=True, **options,
    )
    _check_loaded(report, spec, role)
    _check_ends(model, spec, role)
    settle(model, spec, role)
    placed = role != "student" and options.get("device_map") is not None
    if placed and not hasattr(model, "hf_device_map"):  # transformers notes several devices only
        model.hf_device_map = {"": model.device}
    _with_commit(model.config, spec)
    return model


def _device_map(spec: ModelSpec) -> dict[str, Any]:
    """`devices` of a teacher, for `from_pretrained`: what is free on some of them, and beside."""
    devices = spec.devices if isinstance(spec, TeacherSpec) else None
    if not isinstance(devices, list):
        return {} if devices is None else {"device_map": devices}
    free = get_max_memory()
    return {"device_map": "auto", "max_memory": {key: free[key] for key in (*devices, "cpu")}}


def _check_ends(model: PreTrainedModel, spec: ModelSpec, role: str) -> None:
    """transformers takes whatever generation_config.json says, and fails when it generates."""
    settings = getattr(model, "generation_config", None)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(settings, key, None)
        values = value if isinstance(value, list) else [value]
        if any(type(x) is not int for x in values if x is not None):
            raise TaidError(f"{role}: '{spec.model_name_or_path}/generation_config.json': {key} = "
                            f"{value!r}, but it must be a token's number or a list of them.")


def _check_loaded(report: Mapping[str, Any], spec: ModelSpec, role: str) -> None:
    """Every weight of the model must come from the checkpoint, in its shape: what is left would
    train as drawn at random. transformers knows which weights are tied and need not be there."""
    mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    for what, keys in (("lacks", report["missing_keys"]), ("has another shape for", mismatched)):
        if keys:
            raise TaidError(
                f"{role}: the checkpoint '{spec.model_name_or_path}' {what} {len(keys)} of the "
                f"model's weights ({_some(keys)}{_instead(report['unexpected_keys'])}). Save the "
                "model with save_pretrained, or name the checkpoint that belongs to this config.")
    if report["unexpected_keys"]:
        logger.warning("%s: '%s' holds weights that the model has no use for: %s.", role,
                       spec.model_name_or_path, _some(report["unexpected_keys"]))


def _instead(unexpected: Collection[str]) -> str:
    return f"; it holds {_some(unexpected)} instead" if unexpected else ""


def _some(keys: Collection[str]) -> str:
    names = sorted(keys)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def load_skeleton(spec: ModelSpec, role: str) -> PreTrainedModel:
    """The model with shapes only (on torch's meta device): nothing is read but its config."""
    config = load_config(spec, role)
    auto, adapter = _auto_class(config, spec, role), find_adapter(spec, role)
    with torch.device("meta"):
        model: PreTrainedModel = guarded(
            role, spec.model_name_or_path, auto.from_config, config,
            trust_remote_code=spec.trust_remote_code)
        if adapter is not None:
            untie_skeleton(model, adapter)
    return model


def restore_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Load a checkpoint of this very model, in place and bit for bit.

    `save_pretrained` writes some architectures under their original parameter names, which only
    `from_pretrained` knows how to read back; a plain `load_state_dict` would match nothing.
    """
    dtype = next(model.parameters()).dtype
    saved = type(model).from_pretrained(
        str(folder), config=model.config, dtype=dtype, use_safetensors=True)
    model.load_state_dict(saved.state_dict(), strict=True)


def refuse_nonfinite(model: nn.Module, what: str) -> None:
    """Raise TaidError if a weight is no number: nothing of the sort is put in place of anything."""
    for name, parameter in model.named_parameters():
        if not all(is_finite(tensor.detach()) for tensor in tensors_in(parameter)):
            raise TaidError(f"{what} is not written: '{name}' holds weights that are no numbers. "
                            "Lower train.learning_rate; the checkpoints before it are whole.")


def is_finite(x: Tensor) -> bool:
    """Whether all of it are numbers."""
    wide = x.is_floating_point() and x.dtype.itemsize == 1  # 8-bit floats cannot be asked
    return bool((x.half() if wide else x).isfinite().all())


def weights_hash(model: nn.Module) -> str:
    """Of the names and bytes of all parameters, with what rounded ones keep beside them."""
    parts = (part for name, p in sorted(model.named_parameters()) for tensor in tensors_in(p)
             for part in (name.encode(), tensor.detach().cpu().contiguous().view(-1).view(
                 torch.uint8).numpy().tobytes()))
    return sha256(parts).hex()[:SHORT]


def load_processor(spec: ModelSpec, role: str) -> Processor:
    """A processor for models with vision, a tokenizer for text models."""
    return read_processor(load_config(spec, role), spec, role)


def read_processor(config: PretrainedConfig, spec: ModelSpec, role: str) -> Processor:
    """The same beside a configuration of any kind."""
    seeing, adapter = sees_images(config), find_adapter(spec, role)
    auto = AutoProcessor if seeing else AutoTokenizer
    name = spec.processor_name_or_path or (
        spec.model_name_or_path if adapter is None else adapter.processor_name(seeing))
    processor = guarded(role, name, auto.from_pretrained, name, revision=spec.revision,
                        trust_remote_code=spec.trust_remote_code, **hub_options(spec))
    tokenizer = getattr(processor, "tokenizer", processor)
    # its own files may make it fail at the first text (a limit that is no number, for one)
    if not guarded(role, name, tokenizer, "a b", add_special_tokens=False)["input_ids"]:
        raise TaidError(f"{role}: '{name}' holds no tokenizer; save it beside the model, or set "
                        f"{role}.processor_name_or_path.", code="no_tokenizer")
    if spec.chat_template is not None:
        processor.chat_template = read_template(spec.chat_template, role)
    set_processor(processor, spec.processor_kwargs, role)
    check_kwargs(processor, spec.chat_template_kwargs, role)
    return processor


def read_template(value: str, role: str) -> str:
    """A chat template given as text or as the path of a jinja file."""
    if "{{" in value or "{%" in value:
        return value
    path = Path(value).expanduser()
    if not path.is_file():
        raise TaidError(f"{role}.chat_template: '{value}' is neither a file nor a template.")
    return path.read_text()


def sees_images(config: PretrainedConfig) -> bool:
    """Whether transformers knows the model as image-text-to-text."""
    auto_map = getattr(config, "auto_map", None) or {}
    return (config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
            or "AutoModelForImageTextToText" in auto_map)


def _auto_class(config: PretrainedConfig, spec: ModelSpec, role: str) -> Any:
    if sees_images(config):
        return AutoModelForImageTextToText
    auto_map = getattr(config, "auto_map", None) or {}
    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in auto_map:
        return AutoModelForCausalLM
    raise TaidError(
        f"{role}: '{spec.model_name_or_path}' ({config.model_type}) is neither a causal language "
        "model nor an image-text-to-text model for transformers.", code="no_language_model"
    )


def weights_dtype(spec: ModelSpec, role: str, config: PretrainedConfig) -> Any:
    """What `load_model` loads a model's weights as; "auto": as its configuration says."""
    if spec.dtype is not None:
        return spec.dtype
    stored_half = getattr(config, "dtype", None) == torch.float16
    if role == "student" or (stored_half and not torch.cuda.is_available()):
        return "float32"  # half precision is slow on a CPU and no place for master weights
    return "auto"


def _check_folder(name: str, role: str) -> None:
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise TaidError(f"{role}: folder '{name}' holds no config.json, so it is no model.")
        if not any(path.glob("*.safetensors")) and any(path.glob("*.bin")):
            raise TaidError(f"{role}: '{name}' holds pickled weights only (*.bin), which can run "
                            "code when they are loaded; save the model as safetensors.")
    elif name.count("/") > 1 or name.startswith((".", "/", "~")) or path.exists():
        raise TaidError(f"{role}: no model at '{name}'.{_similar_folder(path)}")


def _similar_folder(path: Path) -> str:
    """A hint for a mistyped path: hub names and relative paths look alike."""
    names = [p.name for p in path.parent.glob("*") if p.is_dir()] if path.parent.is_dir() else []
    match = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f" Did you mean the folder '{path.parent / match[0]}'?" if match else ""


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Inside, transformers makes models with all of their weights in every process: under ZeRO-3 it
    would keep a share of them, under FSDP's lean loading have them in one process. A student is
    sharded when training begins."""
    zero, deepspeed._hf_deepspeed_config_weak_ref = deepspeed._hf_deepspeed_config_weak_ref, None
    try:
        with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
            yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = zero


def guarded(role: str, name: str, load: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a loader of transformers; its many exceptions become one message."""
    try:
        with _whole():
            return load(*args, **kwargs)
    except Exception as error:  # tokenizers, for one, raises plain ones
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2]) or type(error).__name__
        hint = "" if Path(name).exists() else (  # so that no network is blamed for a typing error
            f" There is no folder '{name}' here, so it was taken for a name on the hub."
            f"{_similar_folder(Path(name))}")
        raise TaidError(f"{role}: cannot load '{name}': {reason}{hint}") from error


def weight_bytes(spec: ModelSpec, skeleton: PreTrainedModel) -> int:
    """Of a number in a teacher's weights as they will be loaded, and in its hidden states."""
    name = weights_dtype(spec, "teacher", skeleton.config)
    kind = getattr(skeleton.config, "dtype", None) if name == "auto" else getattr(torch, name)
    return kind.itemsize if isinstance(kind, torch.dtype) else 4
