"""`merge`: a LoRA adapter and its base model as one stock checkpoint with the adapter's logits.

Both are computed with in float32, where a wrong merge and rounding can be told apart (in bfloat16
the same logits may differ by some percent), and the weights are rounded once, when all is checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from taid_vlm.adapters import Processor, make_adapter
from taid_vlm.config.model import DTYPES, ModelSpec
from taid_vlm.errors import TaidError, nearest
from taid_vlm.io.folders import new_folder, whole_or_absent
from taid_vlm.io.terminal import table
from taid_vlm.models.loading import load_config, load_model, read_processor, refuse_nonfinite
from taid_vlm.models.lora import (
    LoraFolder,
    attach_adapter,
    find_adapter,
    merge_attached,
)
from taid_vlm.models.parts import is_tied
from taid_vlm.models.published import save_weights
from taid_vlm.models.quantization import is_quantized
from taid_vlm.students.shrink import check_saved, probe_inputs, probe_logits

ROLE = "merge"
SAME = 1e-4  # share of the largest logit that rounding may change in float32


@dataclass(frozen=True)
class Merged:
    """What was written.

    untied: whether the head got a weight of its own, because the adapter changed it or the input
    embeddings. error: the largest difference from the adapter's logits, as a share of the largest,
    before weights were rounded to `dtype`.
    checks: what was found to hold of the checkpoint.
    """

    output_dir: Path
    adapter: Path
    base: str
    dtype: str
    parameters: int
    untied: bool
    error: float
    checks: tuple[str, ...]

    def table(self) -> str:
        """The same for people, one line per fact."""
        head = "; head untied from the input embeddings" * self.untied
        return table([
            ("adapter", str(self.adapter)),
            ("base model", self.base),
            ("merged", f"{self.parameters:,} parameters, {self.dtype}{head}"),
            ("logits", f"the adapter's within {self.error:.1e} of the largest, in float32"),
            ("loaded again", "; ".join(self.checks)),
            ("written to", str(self.output_dir)),
        ])


def merge(
    adapter: str | Path, output_dir: str | Path, *, dtype: str = "auto", dequantize: bool = False
) -> Merged:
    """Merge an adapter into its base model, and write the model with its processor.

    Args:
        adapter: folder of the adapter.
        output_dir: a new or empty folder.
        dtype: of the weights; "auto" is the base model's.
        dequantize: merge into a quantized base's weights as they are after rounding.

    Raises:
        TaidError: anything a user can mend; before weights are loaded where that is possible, and
            with nothing left in `output_dir`.
    """
    if dtype not in DTYPES:
        raise TaidError(f"{ROLE}: dtype = '{dtype}'.{nearest(dtype, DTYPES)}")
    folder = new_folder(Path(output_dir).expanduser().absolute())
    spec = ModelSpec.model_validate({"model_name_or_path": str(adapter), "dtype": dtype})
    found = find_adapter(spec, ROLE)
    if found is None:
        what = "is a whole model" if (Path(adapter).expanduser() / "config.json").exists() \
            else "holds no adapter (no adapter_config.json)"
        raise TaidError(f"{ROLE}: '{adapter}' {what}; name the folder of an adapter, such as the "
                        "student/ of a run with student.peft.")
    config = _base_config(spec, found, dequantize)
    processor = read_processor(config, spec, ROLE)
    base = load_model(found.base.model_copy(update={"dtype": "float32"}), ROLE)
    base = base.dequantize(torch.float32).float().cpu() if dequantize else base
    tied = is_tied(base)
    merged, error = _merged(base, found, processor)
    with whole_or_absent(folder, "the merged model could not be saved to '{}'") as partial:
        save_weights(merged, partial)
        merged = _rounded(merged, partial, config.dtype if dtype == "auto" else dtype)
        processor.save_pretrained(partial)
        check_saved(merged, processor, partial)
    return Merged(folder, found.folder, found.base.model_name_or_path, str(merged.dtype)[6:],
                  sum(p.numel() for p in merged.parameters()), tied and not is_tied(merged), error,
                  ("plain Auto classes load the same weights, token ids and logits; it answers",))


def _base_config(spec: ModelSpec, found: LoraFolder, dequantize: bool) -> PretrainedConfig:
    if not dequantize:
        return load_config(spec, ROLE)  # which refuses a quantized base
    config = load_config(found.base, ROLE)
    if not is_quantized(config, found.base):
        raise TaidError(f"{ROLE}: --dequantize, but the base model "
                        f"'{found.base.model_name_or_path}' is not quantized; leave it out.")
    return config


def _merged(
    base: PreTrainedModel, found: LoraFolder, processor: Processor
) -> tuple[PreTrainedModel, float]:
    """The merged model, and how far its logits are from the adapter's; raises TaidError."""
    probes = probe_inputs(make_adapter(processor, "student"))
    attached = attach_adapter(base, found.folder, ROLE)
    expected = [probe_logits(attached, inputs) for inputs in probes]
    merged = merge_attached(attached, ROLE)
    refuse_nonfinite(merged, "the merged model")
    error = max(_distance(probe_logits(merged, inputs), logits)
                for inputs, logits in zip(probes, expected, strict=True))
    if not error <= SAME:
        raise TaidError(f"{ROLE}: the merged model's logits differ from the adapter's by "
                        f"{error:.1e} of the largest, and not by rounding: this adapter is more "
                        "than a change of weights; use it with peft.")
    return merged, error


def _rounded(model: PreTrainedModel, folder: Path, dtype: torch.dtype | str | None
             ) -> PreTrainedModel:
    """What lies in the folder in another precision, which transformers sees to: it knows what
    stays in float32."""
    name = str(dtype or model.dtype).removeprefix("torch.")
    if name == "float32":
        return model
    again = load_model(ModelSpec.model_validate(
        {"model_name_or_path": str(folder), "dtype": name}), ROLE)
    for path in folder.glob("model*.safetensors*"):  # mapped into memory: never written over
        path.unlink()
    save_weights(again, folder)
    return again


def _distance(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).abs().max() / expected.abs().max())
