"""Weights in fewer bits: what is rounded how, what that needs, its bytes.

    4bit   bitsandbytes nf4, with scales that are quantized once more
    8bit   bitsandbytes int8 (LLM.int8: features of a large size stay in half precision)
    fp8    torchao's 8-bit floats (e4m3), a scale per row; products in the model's own type

Of every kind the linear layers are rounded; embeddings, norms and the output head stay as they are,
so that logits are exactly head(hidden) of that model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, TorchAoConfig
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import is_bitsandbytes_available, is_torchao_available

from taid_vlm.config.model import ModelSpec, Quantization
from taid_vlm.errors import TaidError

FP8_SINCE = (8, 9)  # compute capability of the first GPUs with 8-bit floats
BLOCK, BLOCK_OF_SCALES = 64, 256  # of nf4: weights per scale, and scales per scale
TABLES = 4 * (16 + 256 + 1)  # bytes of a weight's code book, that of its scales, and their offset
_INSIDE = ("quant_state", "state", "state2", "CB", "SCB", "absmax", "code", "offset")


def stored_method(config: PretrainedConfig) -> str | None:
    """How a checkpoint's own weights are rounded: gptq, awq, fp8, mxfp4, 4bit, 8bit ...; None
    where they are not."""
    found = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None)
    if found is None:
        return None
    stored: Mapping[str, Any] = found if isinstance(found, Mapping) else found.to_dict()
    for bits in ("4bit", "8bit"):
        if stored.get(f"load_in_{bits}"):
            return bits
    method = stored.get("quant_method") or "unknown"
    return str(getattr(method, "value", method))


def is_quantized(config: PretrainedConfig, spec: ModelSpec) -> bool:
    """Whether the weights are stored rounded, or are to be loaded so."""
    return (stored_method(config) is not None or spec.quantization is not None
            or any("quantization" in key or key.startswith("load_in_") for key in spec.init_kwargs))


def refuse_stored(config: PretrainedConfig, spec: ModelSpec, role: str) -> None:
    """Raise TaidError for a key that asks for other bits than the checkpoint already has."""
    stored = stored_method(config)
    if spec.quantization is not None and stored not in (None, spec.quantization):
        raise TaidError(f"{role}.quantization = '{spec.quantization}', but the weights of "
                        f"'{spec.model_name_or_path}' are stored quantized already ({stored}). "
                        "Take the key out, and they are loaded as they are.")


def refuse_unavailable(spec: ModelSpec | None, role: str) -> None:
    """Raise TaidError where the library or the hardware is missing; loads nothing."""
    if spec is None or spec.quantization is None:
        return
    key = f"{role}.quantization = '{spec.quantization}' needs"
    library, there = ("torchao", is_torchao_available()) if spec.quantization == "fp8" else (
        "bitsandbytes", is_bitsandbytes_available())
    if spec.quantization == "fp8" and (problem := _without_fp8()):
        raise TaidError(f"{key} a GPU with 8-bit floats (compute capability 8.9 or later: Ada, "
                        f"Hopper, Blackwell), and {problem}. Take 8bit, which is as large, or "
                        "4bit.")
    if not there:
        raise TaidError(f"{key} the {library} library: pip install 'taid-vlm[quantized]'.")


def _without_fp8() -> str:
    """What the hardware lacks, "" if nothing."""
    if not torch.cuda.is_available():
        return "there is no GPU here"
    capability = torch.cuda.get_device_capability()
    if capability >= FP8_SINCE:
        return ""
    return f"the {torch.cuda.get_device_name()} has {'.'.join(map(str, capability))}"


def half_precision(args: Any) -> torch.dtype | None:
    """Of a run, by its TrainingArguments."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def load_options(
    config: PretrainedConfig, spec: ModelSpec, dtype: Any, half: torch.dtype | None
) -> dict[str, Any]:
    """What `from_pretrained` is told of `quantization`; {} where weights are loaded as they are.

    Args:
        dtype: what the other weights are loaded as, a name or "auto".
        half: the half precision of the run, which 4-bit weights of a model in float32 are
            multiplied in; one in half precision computes in its own.
    """
    kind = spec.quantization
    if kind is None or stored_method(config) is not None:
        return {}
    if kind == "fp8":
        from torchao.quantization import Float8WeightOnlyConfig

        return {"quantization_config": TorchAoConfig(
            Float8WeightOnlyConfig(set_inductor_config=False))}
    if kind == "8bit":
        # it says of every product that its input becomes float16
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    own = config.dtype if dtype == "auto" else getattr(torch, str(dtype).rpartition(".")[2])
    own = own if isinstance(own, torch.dtype) else torch.float32
    return {"quantization_config": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=half if half is not None and own == torch.float32 else own)}


def settle(model: PreTrainedModel, spec: ModelSpec, role: str) -> None:
    """Let rounded weights say the same in training and in evaluation.

    On a CPU bitsandbytes rounds the scales of 4-bit weights once more at the first evaluation, and
    cannot train on what that leaves.

    Raises:
        TaidError: the output head was rounded, too; it must stay as it was.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    head = model.get_output_embeddings()
    if spec.quantization is not None and (
            type(head) is not nn.Linear or not _is_plain(head.weight)):
        raise TaidError(f"{role}.quantization = '{spec.quantization}' has rounded the output head "
                        f"({type(head).__name__}) of '{spec.model_name_or_path}'; load it with "
                        "init_kwargs.quantization_config, which can name what stays.")


def _is_plain(weight: Tensor) -> bool:
    return weight.is_floating_point() and not hasattr(weight, "__tensor_flatten__")


# ----- bytes --------------------------------------------------------------------------------


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of different storages; tied weights count once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def stored_tensors(model: nn.Module) -> Iterator[Tensor]:
    """All tensors that a model keeps, those inside of its rounded weights, too."""
    for module in model.modules():
        for kept in (*module._parameters.values(), *module._buffers.values(),
                     getattr(module, "state", None)):
            yield from tensors_in(kept)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """A tensor itself, or what a rounded one consists of: numbers, scales, tables."""
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from tensors_in(getattr(value, name))
    elif value is not None:
        if isinstance(value, Tensor):
            yield value
        for name in _INSIDE:
            yield from tensors_in(getattr(value, "__dict__", {}).get(name))


def numel(parameter: Tensor) -> int:
    """Of the weight that it stands for: 4-bit ones lie two in a byte."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return parameter.numel() if shape is None else int(shape.numel())


def saved_bytes(model: PreTrainedModel, spec: ModelSpec) -> int:
    """What rounding takes off a model's weights, which may have shapes only."""
    kind = spec.quantization or stored_method(model.config)
    if kind not in get_args(Quantization):
        return 0
    kept = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
    return sum(m.weight.numel() * m.weight.element_size() - _rounded(m.weight, str(kind))
               for name, m in model.named_modules()
               if type(m) is nn.Linear and should_convert_module(name, kept))


def _rounded(weight: Tensor, kind: str) -> int:
    """Bytes of a linear layer's weight with its scales."""
    if kind != "4bit":
        return weight.numel() + 4 * len(weight)
    scales = -(-weight.numel() // BLOCK)
    return -(-weight.numel() // 2) + scales + 4 * -(-scales // BLOCK_OF_SCALES) + TABLES
