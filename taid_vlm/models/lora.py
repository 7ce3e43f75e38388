"""LoRA (or DoRA) adapters in folders or on the hub: their base model, and both merged in memory."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import warnings
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from taid_vlm.config.model import ModelSpec
from taid_vlm.errors import TaidError, nearest
from taid_vlm.models.published import save_weights
from taid_vlm.models.quantization import is_quantized

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TEACHER = "teacher"  # the name of its adapter inside of a student
_BASE = "base_model_name_or_path"
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_HUB_OPTIONS = ("token", "cache_dir", "local_files_only", "force_download")
_TOKENIZERS = ("tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True)
class LoraFolder:
    """An adapter's folder, and the model that it was trained on.

    base: as the adapter's spec, with the base model's folder or hub name and revision.
    """

    folder: Path
    base: ModelSpec

    @property
    def named(self) -> str:
        """The key that names the base, with its value, for messages."""
        return f"'{self.folder / CONFIG}' has {_BASE} = '{self.base.model_name_or_path}'"

    def processor_name(self, sees_images: bool) -> str:
        """Where its processor or tokenizer is: beside the adapter, or else at the base model."""
        names = _PROCESSORS if sees_images else _TOKENIZERS
        own = any((self.folder / name).exists() for name in names)
        return str(self.folder) if own else self.base.model_name_or_path


def is_adapter(name: str) -> bool:
    """Whether it names a folder with an adapter and without a model of its own."""
    folder = Path(name).expanduser()
    return (folder / CONFIG).exists() and not (folder / "config.json").exists()


def find_adapter(spec: ModelSpec, role: str) -> LoraFolder | None:
    """The adapter that a model's name stands for; None where it names something else.

    Raises:
        TaidError: an adapter of another kind than LoRA, pickled weights, a base that is missing.
    """
    folder = _adapter_folder(spec)
    if folder is None:
        return None
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind, base = config.get("peft_type"), config.get(_BASE)
    except (OSError, ValueError, AttributeError) as error:
        raise TaidError(f"{role}: '{folder / CONFIG}' is no adapter's configuration: "
                        f"{error}.") from error
    if kind != "LORA":
        raise TaidError(f"{role}: '{folder / CONFIG}' has peft_type = {json.dumps(kind)}, but only "
                        "LORA (and DoRA) is merged here; merge it into its base model with peft.")
    if not (folder / WEIGHTS).exists():
        raise TaidError(f"{role}: '{folder}' holds no {WEIGHTS} (pickled weights can run code when "
                        "they are loaded); save the adapter as safetensors.")
    base = _base_folder(folder, base, role)
    if base == spec.model_name_or_path:
        raise TaidError(f"{role}: '{folder / CONFIG}' has {_BASE} = '{base}', which is itself.")
    return LoraFolder(folder, spec.model_copy(update={
        "model_name_or_path": base, "revision": config.get("revision") or "main"}))


def _adapter_folder(spec: ModelSpec) -> Path | None:
    """Where the adapter lies, one of the hub in the hub's cache; None for what is none."""
    name = spec.model_name_or_path
    path = Path(name).expanduser()
    if is_adapter(name):
        return path
    if path.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        return None
    place = {"revision": spec.revision, **hub_options(spec)}
    try:
        with contextlib.suppress(EntryNotFoundError):
            _check_whole(name, **place)
            return None
        hf_hub_download(name, CONFIG, **place)
        return Path(snapshot_download(
            name, allow_patterns=[WEIGHTS, "*.json", "*.jinja", "*.model", "*.txt"], **place))
    except Exception:  # no hub, no such name, no access: loading the configuration says which
        return None


@cache
def _check_whole(name: str, **place: Any) -> None:
    """Raise what the hub does where a name of the hub has no model of its own."""
    hf_hub_download(name, "config.json", **place)


def hub_options(spec: ModelSpec) -> dict[str, Any]:
    """What of `init_kwargs` is about reaching the hub, and holds for whatever is fetched there."""
    return {key: spec.init_kwargs[key] for key in _HUB_OPTIONS if key in spec.init_kwargs}


def _base_folder(folder: Path, name: Any, role: str) -> str:
    """Folder or hub name of the base; a relative path starts at the adapter or where we are."""
    key = f"{role}: '{folder / CONFIG}' has {_BASE} = {json.dumps(name)}"
    mend = "write the folder or hub name of the model that the adapter was trained on there."
    if not name or not isinstance(name, str):
        raise TaidError(f"{key}, but it must name the base model: {mend}")
    path = Path(name).expanduser()
    for place in (folder / path, path):
        if place.is_dir():
            if is_adapter(str(place)) or place.resolve() == folder.resolve():
                raise TaidError(f"{key}, which is itself an adapter: merge that first (taid-vlm "
                                f"merge '{place}' --output-dir DIR), and write DIR there.")
            return str(place.resolve())
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise TaidError(f"{key}, but there is no model: put it back, or {mend}")
    return name


# ----- merging ------------------------------------------------------------------------------


def attach_adapter(base: PreTrainedModel, folder: Path, role: str) -> Any:
    """The base model with the adapter's weights, as peft trains it; raises TaidError.

    Every weight of the adapter must come from its file, and every one in the file must be used.
    Draws no random numbers.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise TaidError(f"{role}: '{folder}' holds an adapter, which needs the peft library: "
                        "pip install 'taid-vlm[peft]'.") from None
    with _fitting(folder, role), torch.random.fork_rng():
        model = PeftModel(base, _config_of(folder))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    _load_weights(model, folder, role, trained)
    return model.eval()


def add_teacher(model: Any, folder: Path, empty: bool = False) -> None:
    """Put the adapter in `folder` beside a PeftModel's own, which stays the active one and the only
    one that is saved: frozen, under the name TEACHER. Draws no random numbers; raises TaidError.

    Args:
        empty: its weights are not read, and stay on the meta device.
    """
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    layers = model.get_base_model()
    with _fitting(folder, "teacher"), torch.random.fork_rng():
        model.add_adapter(TEACHER, _config_of(folder), low_cpu_mem_usage=empty)
    for layer in layers.modules():
        if hasattr(layer, "_active_adapter"):
            layer._active_adapter = [model.active_adapter]
    own = {name for name, p in model.named_parameters() if is_teachers(name)}
    if not empty:
        _load_weights(model, folder, "teacher", own, TEACHER)
    for name, p in model.named_parameters():
        p.requires_grad_(trained.get(name, False))
    model.save_pretrained = functools.partial(
        model.save_pretrained, selected_adapters=[model.active_adapter])


def is_teachers(name: str) -> bool:
    """Whether a parameter is of the adapter that `add_teacher` adds."""
    return f".{TEACHER}." in name


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All but those of a teacher's adapter."""
    return {name: p for name, p in model.named_parameters() if not is_teachers(name)}


def _config_of(folder: Path) -> Any:
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False  # what belongs to the adapter is what has a gradient
    return config


def _load_weights(
    model: Any, folder: Path, role: str, expected: Collection[str], name: str = "default"
) -> None:
    from peft import load_peft_weights, set_peft_model_state_dict

    mapping = getattr(model.get_base_model(), "_checkpoint_conversion_mapping", None)
    with _fitting(folder, role):
        weights = load_peft_weights(str(folder), device="cpu", key_mapping=mapping)
        report = set_peft_model_state_dict(model, weights, adapter_name=name)
    for what, keys in (("lacks", {*expected} & {*report.missing_keys}),
                       ("holds, but the model has no use for,", report.unexpected_keys)):
        if keys:
            raise TaidError(f"{role}: the adapter '{folder}' {what} {len(keys)} weights "
                            f"({_some(keys)}). Save it anew with save_pretrained, or name the "
                            f"model that it was trained on as {_BASE} in its {CONFIG}.")


@contextlib.contextmanager
def _fitting(folder: Path, role: str) -> Iterator[None]:
    """What peft raises of an adapter that does not fit its base model, as one message."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tied weights, which `merge_adapter` sees to
            yield
    except KeyError as error:
        raise TaidError(f"{role}: the adapter '{folder}' lacks the weight {error}, which its "
                        f"{CONFIG} promises.") from error
    except (ValueError, TypeError, RuntimeError, OSError, SafetensorError) as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise TaidError(f"{role}: the adapter '{folder}' does not fit its base model: {reason} "
                        f"Name the model that it was trained on as {_BASE} in its {CONFIG}."
                        ) from error


def _some(keys: Collection[str]) -> str:
    names = sorted(keys)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def merge_adapter(base: PreTrainedModel, adapter: LoraFolder, role: str) -> PreTrainedModel:
    """The base model with the adapter in its weights, in place; raises TaidError."""
    frozen = {name for name, p in base.named_parameters() if not p.requires_grad}
    merged = merge_attached(attach_adapter(base, adapter.folder, role), role)
    for name, parameter in merged.named_parameters():  # peft froze them all
        parameter.requires_grad_(name not in frozen)
    merged.name_or_path = str(adapter.folder.resolve())
    return merged


def write_merged(base: PreTrainedModel, adapter: LoraFolder, role: str) -> None:
    """Put the merged model's weights in place of the adapter's, in the adapter's folder."""
    merged = merge_adapter(base, adapter, role)
    for name in (CONFIG, WEIGHTS, "README.md"):  # peft's README is the adapter's card
        (adapter.folder / name).unlink(missing_ok=True)
    save_weights(merged, adapter.folder)


def merge_attached(model: Any, role: str) -> PreTrainedModel:
    """What `attach_adapter` gave, as one plain model with the same logits.

    Where the adapter changes input embeddings or head and the two are tied, each gets a weight of
    its own first: merged into a shared one, what one of them learnt would change the other.
    """
    plain = model.get_base_model()
    head, embeddings = plain.get_output_embeddings(), plain.get_input_embeddings()
    touched = any(inner_module(module) is not module for module in (head, embeddings))
    if touched and _tied(inner_module(head), inner_module(embeddings)):
        _own_weight(inner_module(head))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged: PreTrainedModel = model.merge_and_unload()
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise TaidError(f"{role}: the adapter cannot be merged: {error}") from error
    if touched and not _tied(merged.get_output_embeddings(), merged.get_input_embeddings()):
        _forget_tie(merged)
    return merged.eval()


def untie_skeleton(model: PreTrainedModel, adapter: LoraFolder) -> None:
    """Untie a model without weights where merging the adapter will; reads names only."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    names, changed = _ends(model), changed_ends(model, adapter)
    config = json.loads((adapter.folder / CONFIG).read_text(encoding="utf-8"))
    whole = all(key in {f"{name}.weight" for name in names} for key in changed)
    if _tied(head, embeddings) and changed and not (whole and config.get("ensure_weight_tying")):
        _own_weight(head)
        _forget_tie(model)


def changed_ends(model: PreTrainedModel, adapter: LoraFolder) -> list[str]:
    """Names of the adapter's weights that change head or input embeddings; reads names only."""
    with safe_open(adapter.folder / WEIGHTS, "pt") as file:
        keys = [key.removeprefix("base_model.model.") for key in file.keys()]  # noqa: SIM118
    return [key for key in keys for name in _ends(model) if key.startswith(f"{name}.")]


def _ends(model: PreTrainedModel) -> list[str]:
    ends = (model.get_output_embeddings(), model.get_input_embeddings())
    return [name for name, module in model.named_modules() if module in ends]


def inner_module(module: Any) -> Any:
    """The model's own module inside what peft put around it."""
    while True:
        inner = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
        if inner is None:
            return module
        module = inner


def _tied(head: Any, embeddings: Any) -> bool:
    return head is not None and getattr(head, "weight", None) is embeddings.weight


def _own_weight(head: Any) -> None:
    head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)


def _forget_tie(model: PreTrainedModel) -> None:
    """Say in configuration and model that the head has a weight of its own."""
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    for module in model.modules():
        if getattr(module, "all_tied_weights_keys", None):
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys()


# ----- before anything is loaded ------------------------------------------------------------


def refuse_quantized(config: PretrainedConfig, adapter: LoraFolder, role: str) -> None:
    """Raise TaidError for a base whose weights are rounded: what is merged into them is, too."""
    if adapter.base.quantization is not None:
        raise TaidError(f"{role}.quantization = '{adapter.base.quantization}', but "
                        f"'{adapter.folder}' is an adapter, which cannot be merged into rounded "
                        f"weights: taid-vlm merge '{adapter.folder}' --output-dir DIR, and use "
                        "DIR.")
    if is_quantized(config, adapter.base):
        raise TaidError(f"{role}: the base model of '{adapter.folder}' is quantized, and an "
                        "adapter cannot be merged into rounded weights: taid-vlm merge "
                        f"'{adapter.folder}' --output-dir DIR --dequantize, and use DIR.")


def check_names(model: nn.Module, config: Any) -> None:
    """Raise TaidError for names in a LoraConfig that are no modules of the model.

    Args:
        model: may be on the meta device.
    """
    paths = [name for name, _ in model.named_modules() if name]
    targets = config.target_modules
    if isinstance(targets, str):
        if targets != "all-linear" and not _matches(targets, paths):
            raise TaidError(f"student.peft: target_modules = '{targets}' is no regular expression "
                            f"of a module's whole name, such as '{max(paths, key=len)}'.")
        targets = None
    # as peft compares them
    unknown = [("target_modules", name) for name in sorted(targets or ())
               if not any(f".{path}".endswith(f".{name}") for path in paths)]
    unknown += [("modules_to_save", name) for name in config.modules_to_save or ()
                if not any(path.endswith(name) for path in paths)]
    for key, name in unknown:
        last = {path.rpartition(".")[2] for path in paths}
        raise TaidError(f"student.peft: {key} has '{name}', which is no module of this student."
                        f"{nearest(name, (name for name in last if not name.isdigit()))}")


def _matches(pattern: str, paths: Iterable[str]) -> bool:
    try:
        return any(re.fullmatch(pattern, path) for path in paths)
    except re.error:
        return False


def name_base(model: Any) -> None:
    """Let the adapter of a PeftModel name its base so that its folder works from anywhere."""
    config = model.active_peft_config
    name = config.base_model_name_or_path
    if name and Path(name).expanduser().exists():
        config.base_model_name_or_path = str(Path(name).expanduser().resolve())
    elif config.revision is None:
        config.revision = getattr(model.config, "_commit_hash", None)
