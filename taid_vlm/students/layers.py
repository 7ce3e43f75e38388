"""Layers of a model: which to keep, the config without the others, and the weights to match.

The cut model is built from its own config and given the teacher's tensors under new numbers, so
that nothing of the longer model is left in it. `skipping` is the check: a teacher whose dropped
layers hand their input on must give the same logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from taid_vlm.batch.collator import DistillationCollator
from taid_vlm.errors import TaidError
from taid_vlm.models.forward import answer_logits
from taid_vlm.records import Malformed, Record

Side = Literal["language model", "vision tower"]
Kept = tuple[int, ...]  # numbers of the teacher's layers, in order

COUNT_KEYS = ("num_hidden_layers", "depth")
STACKS = ("layers", "blocks", "h", "layer", "block")  # names of a model's list of layers
# Lists that hold layers' numbers, and numbers of layers at the start or at the end.
LAYER_NUMBERS = ("mlp_only_layers", "moe_layers", "full_attn_idxs", "fullatt_block_indexes",
                 "global_attn_indexes", "window_block_indices", "deepstack_visual_indexes")
FIRST_LAYERS = ("first_k_dense_replace", "num_dense_layers", "max_window_layers")
LAST_LAYERS = ("num_kv_shared_layers",)
# Lists that are as long as the model is deep only by chance.
NOT_BY_LAYER = ("architectures", "image_size", "patch_size", "image_mean", "image_std")
# What tells kinds of layers apart: each kind is thinned out by itself.
KIND_LISTS = ("layer_types", "layers_block_type")
KIND_NUMBERS = ("fullatt_block_indexes", "global_attn_indexes", "window_block_indices")
FIRST, LAST = "it is the first", "it is the last"


@dataclass(frozen=True)
class Stack:
    """The layers of one side of a model, as its config tells them.

    key: where the side's config lies ("text_config"); "" where it is the whole config.
    count: how many layers; used: how many of them anything comes after.
    kinds: what kind each layer is.
    must: layers that have to stay, with the reason.
    """

    side: Side
    key: str
    count: int
    used: int
    kinds: tuple[Any, ...]
    must: Mapping[int, str] = field(hash=False)


# ----- reading a config ---------------------------------------------------------------------


def language_stack(config: PretrainedConfig) -> Stack:
    """The decoder's layers; raises TaidError where the config does not tell them."""
    text = config.get_text_config(decoder=True)
    key = "" if text is config else next(
        (name for name in config.sub_configs if getattr(config, name, None) is text), None)
    count = _count(text)
    if key is None or count is None:
        raise TaidError(f"layers: the config of {config.model_type} does not say how many decoder "
                        "layers there are, so none can be taken out.")
    must = {0: FIRST, count - 1: LAST}
    deep = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None) or ()
    must |= dict.fromkeys(range(len(deep)), "visual features are added behind it")
    modes = getattr(text, "kv_sharing_modes", None) or ()
    stores = [i for i, mode in enumerate(modes) if mode == "store"]
    must |= dict.fromkeys(stores, "later layers use its keys and values")
    return Stack("language model", key, count, count, _kinds(text, count), must)


def tower_stack(config: PretrainedConfig) -> Stack:
    """The vision tower's layers; raises TaidError where there is no plain list of them."""
    vision = getattr(config, "vision_config", None)
    if vision is None:
        raise TaidError(f"tower_layers: {config.model_type} has no vision tower.")
    count = _count(vision)
    if count is None:
        raise TaidError(f"tower_layers: the tower of {config.model_type} ({vision.model_type}) "
                        "keeps its layers in code of its own and not in its config. Leave the "
                        "tower as it is, or compose a student with a smaller one.")
    used = max(_features(config, count))
    must = {0: FIRST, used - 1: LAST}
    must |= dict.fromkeys(range(used, count), "the place of the features is counted from the end")
    deep = getattr(vision, "deepstack_visual_indexes", None) or ()
    must |= dict.fromkeys(deep, "its features go into the language model")
    return Stack("vision tower", "vision_config", count, used, _kinds(vision, count), must)


def _count(config: PretrainedConfig) -> int | None:
    counts = (getattr(config, name, None) for name in COUNT_KEYS)
    return next((count for count in counts if isinstance(count, int)), None)


def _features(config: PretrainedConfig, count: int) -> list[int]:
    """After how many layers the language model's visual features are taken."""
    chosen = getattr(config, "vision_feature_layer", None)
    chosen = -1 if chosen is None else chosen
    return [i if i >= 0 else count + 1 + i for i in ([chosen] if isinstance(chosen, int)
                                                     else chosen)]


def _kinds(config: PretrainedConfig, count: int) -> tuple[Any, ...]:
    named = (getattr(config, name, None) for name in KIND_LISTS)
    lists = [x for x in named if isinstance(x, (list, tuple)) and len(x) == count]
    numbers = [set(getattr(config, name, None) or ()) for name in KIND_NUMBERS]
    return tuple((*(names[i] for names in lists), *(i in names for names in numbers))
                 for i in range(count))


# ----- which layers -------------------------------------------------------------------------


def checked_number(stack: Stack, number: int, option: str) -> int:
    """`number` if so many layers can be kept; raises TaidError."""
    if not len(stack.must) <= number <= stack.count:
        why = "; ".join(f"{i}: {reason}" for i, reason in sorted(stack.must.items()))
        raise TaidError(f"{option} = {number}, but the teacher's {stack.side} has {stack.count} "
                        f"layers and at least {len(stack.must)} must stay ({why}).")
    return number


def checked_list(stack: Stack, keep: Sequence[int], option: str) -> Kept:
    """An explicit choice, in order, also without the first or the last; raises TaidError."""
    kept = tuple(sorted(set(keep)))
    outside = [i for i in kept if not 0 <= i < stack.count]
    if outside or len(kept) != len(keep) or not kept:
        raise TaidError(f"{option} = {','.join(map(str, keep))}, but it must name layers from 0 to "
                        f"{stack.count - 1}, each once.")
    for i, reason in sorted(stack.must.items()):
        if i not in kept and reason not in (FIRST, LAST):
            raise TaidError(f"{option} lacks layer {i}, but it must stay: {reason}.")
    return kept


def even_choice(stack: Stack, number: int) -> Kept:
    """Evenly spaced layers.

    The n layers of a kind keep q of them, at round(i (n - 1) / (q - 1)) for i = 0 ... q - 1 (one
    alone: the middle). Kinds (as sliding and full attention) get places in proportion to their
    number, by largest remainder, at least one each where there are places enough. A layer that
    must stay (first and last always) takes the place of the nearest one of its kind that was
    chosen.
    """
    groups: dict[Any, list[int]] = {}
    for i in range(stack.used):
        groups.setdefault(stack.kinds[i], []).append(i)
    places = _shares([len(g) for g in groups.values()], number - (stack.count - stack.used))
    chosen = set(range(stack.used, stack.count))
    for group, share in zip(groups.values(), places, strict=True):
        chosen |= set(_spread(group, share))
    for i in sorted(set(stack.must) - chosen):
        free = chosen - set(stack.must)
        nearest = min(free, key=lambda j: (stack.kinds[j] != stack.kinds[i], abs(i - j), j))
        chosen = chosen - {nearest} | {i}
    return tuple(sorted(chosen))


def _spread(group: Sequence[int], number: int) -> list[int]:
    if number == 1:
        return [group[(len(group) - 1) // 2]]
    steps = number - 1
    return [group[(2 * i * (len(group) - 1) + steps) // (2 * steps)] for i in range(number)]


def _shares(sizes: Sequence[int], number: int) -> list[int]:
    """`number` places in proportion to `sizes`, none with more than its size."""
    exact = [number * size / sum(sizes) for size in sizes]
    least = 1 if number >= len(sizes) else 0
    shares = [max(least, int(share)) for share in exact]
    while sum(shares) != number:
        step = 1 if sum(shares) < number else -1
        fits = [i for i, s in enumerate(shares) if least <= s + step <= sizes[i]]
        shares[max(fits, key=lambda i: step * (exact[i] - shares[i]))] += step
    return shares


def best_choice(stack: Stack, number: int, scores: Sequence[float]) -> Kept:
    """The layers that must stay, and of the others those with the largest scores."""
    others = sorted(set(range(stack.count)) - set(stack.must), key=lambda i: (-scores[i], i))
    return tuple(sorted([*stack.must, *others[: number - len(stack.must)]]))


@torch.inference_mode()
def block_influence(
    model: PreTrainedModel, stack: Stack, collator: DistillationCollator,
    records: Iterable[Sequence[Record | Malformed]],
) -> list[float]:
    """1 - cos(what goes into a layer, what comes out), the mean over answers' positions.

    ShortGPT's block influence (Men et al., 2024, arXiv:2403.03853): a layer that hardly turns the
    hidden state can be missed most easily. Measured where the model predicts an answer's tokens.

    Args:
        records: batches of records; the collator's `student` is the adapter of `model`.

    Raises:
        TaidError: no answer token in any of them.
    """
    sums, tokens = torch.zeros(stack.count, dtype=torch.float64), 0
    layers, mask = stack_modules(model, stack)[1], torch.empty(0)

    def note(index: int, before: Tensor, after: Tensor) -> None:
        into, out = (x[..., mask, :].double() for x in (before, after))
        turned = 1 - torch.cosine_similarity(into, out, dim=-1)
        streams = turned.numel() // turned.shape[-1]  # Gemma 3n has four, the others one
        sums[index] += turned.sum().cpu() / streams

    with _hooked(layers, range(stack.count), note):
        for batch in map(collator, records):
            mask = batch["student_mask"].to(model.device)
            if not batch["counts"]["aligned_tokens"]:
                continue
            inputs = {key: x.to(model.device) for key, x in batch["student_inputs"].items()}
            answer_logits(model, inputs, mask)
            tokens += int(mask.sum())
    if not tokens:
        raise TaidError("calibration: no record holds an answer that this model can be measured "
                        "on; see the warnings for what was left out.")
    return (sums / tokens).tolist()


# ----- cutting ------------------------------------------------------------------------------


def cut_config(config: PretrainedConfig, cuts: Mapping[Stack, Kept]) -> dict[str, Any]:
    """The config, as a dictionary, of the model with the kept layers only."""
    tree = config.to_dict()
    for stack, kept in cuts.items():
        side = tree[stack.key] if stack.key else tree
        _cut_side(side, getattr(config, stack.key) if stack.key else config, stack.count, kept)
        if stack.side == "vision tower" and tree.get("vision_feature_layer") is not None:
            tree["vision_feature_layer"] = _moved(tree["vision_feature_layer"], stack.count, kept)
    return tree


def _cut_side(side: dict[str, Any], config: PretrainedConfig, count: int, kept: Kept) -> None:
    """Every entry of one side's config that has to do with layers, in place."""
    for name, value in side.items():
        if name in LAYER_NUMBERS and value is not None:
            side[name] = [kept.index(i) for i in value if i in kept]
        elif isinstance(value, (list, tuple)) and len(value) == count and _by_layer(name):
            side[name] = [value[i] for i in kept]
        elif name in FIRST_LAYERS and isinstance(value, int):
            side[name] = sum(i < value for i in kept)
        elif name in LAST_LAYERS and isinstance(value, int):
            side[name] = sum(i >= count - value for i in kept)
        elif name == "per_layer_config" and isinstance(value, Mapping):
            side[name] = {kept.index(int(i)): x for i, x in value.items() if int(i) in kept}
    step = side.get("decoder_sparse_step")
    if step is not None and step > 1:  # every step-th layer is sparse: no longer, so name the rest
        dense = [i for i in range(count) if (i + 1) % step or i in (config.mlp_only_layers or ())]
        side["mlp_only_layers"] = [kept.index(i) for i in dense if i in kept]
        side["decoder_sparse_step"] = 1
    for name in COUNT_KEYS:
        name = config.attribute_map.get(name, name)
        if isinstance(side.get(name), int):
            side[name] = len(kept)


def _by_layer(name: str) -> bool:
    return not (name in NOT_BY_LAYER or name.startswith("mtp_") or "token_id" in name)


def _moved(feature: Any, count: int, kept: Kept) -> Any:
    """Where the same features are found among fewer layers, counted from the same end."""
    if not isinstance(feature, int):
        return [_moved(one, count, kept) for one in feature]
    before = feature if feature >= 0 else count + 1 + feature
    after = sum(i < before for i in kept)
    return after if feature >= 0 else after - len(kept) - 1


def cut_layers(model: PreTrainedModel, cuts: Mapping[Stack, Kept]) -> PreTrainedModel:
    """A model of the kept layers, whose tensors are the teacher's own.

    Raises:
        TaidError: this architecture ties its layers together in a way that a cut would break.
    """
    tensors = dict(model.state_dict())
    for stack, kept in cuts.items():
        prefix = stack_modules(model, stack)[0]
        tensors = {name: x for old, x in tensors.items()
                   if (name := _renumbered(old, prefix, kept)) is not None}
    student = empty_model(model, cut_config(model.config, cuts))
    wanted = student.state_dict()
    for name, tensor in tensors.items():
        if name in wanted and wanted[name].shape != tensor.shape:
            tensors[name] = _cut_tensor(name, tensor, wanted[name].shape, cuts)
    return fill(student, model, tensors)


def _renumbered(name: str, prefix: str, kept: Kept) -> str | None:
    """A tensor's name in the cut model; None if its layer is gone."""
    if not name.startswith(prefix + "."):
        return name
    number, _, rest = name[len(prefix) + 1 :].partition(".")
    return f"{prefix}.{kept.index(int(number))}.{rest}" if int(number) in kept else None


def _cut_tensor(
    name: str, tensor: Tensor, wanted: torch.Size, cuts: Mapping[Stack, Kept]
) -> Tensor:
    """A tensor that holds all layers' shares side by side, as per-layer embeddings do."""
    changed = [i for i, (a, b) in enumerate(zip(tensor.shape, wanted, strict=False)) if a != b]
    for stack, kept in cuts.items():
        if tensor.ndim == len(wanted) and len(changed) == 1:
            size, dim = tensor.shape[changed[0]] // stack.count, changed[0]
            if tensor.shape[dim] == size * stack.count and wanted[dim] == size * len(kept):
                rows = torch.tensor(kept)[:, None] * size + torch.arange(size)
                return tensor.index_select(dim, rows.flatten().to(tensor.device))
    raise TaidError(f"layers: {name} has shape {list(tensor.shape)}, but {list(wanted)} after the "
                    "cut: the kept layers are of another make at their new places, and this "
                    "architecture's config cannot say so. Choose other layers with --keep.")


def empty_model(like: PreTrainedModel, tree: Mapping[str, Any]) -> PreTrainedModel:
    """A model of the same class under another config, its weights not yet set."""
    config = type(like.config).from_dict(dict(tree))
    attention = like.config._attn_implementation
    with no_init_weights():
        return type(like)._from_config(config, dtype=like.dtype, attn_implementation=attention)


def fill(
    student: PreTrainedModel, teacher: PreTrainedModel, tensors: Mapping[str, Tensor]
) -> PreTrainedModel:
    """Give an empty model its tensors (not copied), and the teacher's generation settings."""
    try:
        student.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise TaidError(f"{type(teacher).__name__} cannot be shrunk this way: {reason}") from error
    student.tie_weights()
    student.generation_config = teacher.generation_config
    return student.to(teacher.device).eval()


def stack_modules(model: PreTrainedModel, stack: Stack) -> tuple[str, nn.ModuleList]:
    """A stack's place in the model and its layers; raises TaidError."""
    part = model.get_decoder() if stack.side == "language model" else \
        model.get_encoder(modality="image")
    names = {id(module): name for name, module in model.named_modules()}
    stacks = [(names[id(module)], module) for name, module in part.named_modules()
             if isinstance(module, nn.ModuleList) and len(module) == stack.count
             and name.rpartition(".")[2] in STACKS]
    if (part is model and stack.side == "vision tower") or len(stacks) != 1:
        raise TaidError(f"{type(model).__name__}: its {stack.side} has no plain list of "
                        f"{stack.count} layers, so none can be taken out.")
    return stacks[0]


# ----- checking -----------------------------------------------------------------------------


@contextmanager
def skipping(model: PreTrainedModel, cuts: Mapping[Stack, Kept]) -> Iterator[None]:
    """The model with its dropped layers switched off: each gives back what it was given."""
    with ExitStack() as all_stacks:
        for stack, kept in cuts.items():
            dropped = sorted(set(range(stack.count)) - set(kept))
            all_stacks.enter_context(_hooked(stack_modules(model, stack)[1], dropped, None))
        yield


@contextmanager
def _hooked(layers: nn.ModuleList, numbers: Iterable[int], note: Any) -> Iterator[None]:
    """Hook layers: `note(number, before, after)`, or, without it, the layer does nothing."""

    def hook(number: int) -> Any:
        def call(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            before = args[0] if args else kwargs["hidden_states"]
            if note is not None:
                return note(number, before, output[0] if isinstance(output, tuple) else output)
            return (before, *output[1:]) if isinstance(output, tuple) else before
        return call

    handles = [layers[i].register_forward_hook(hook(i), with_kwargs=True, prepend=True)
               for i in numbers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
