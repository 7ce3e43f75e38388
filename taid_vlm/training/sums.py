"""What a micro-batch adds to the log and to the schedule: sums on the device, which nothing waits
for. What has a count of its own has it under "tokens/<name>"."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from taid_vlm.batch.collator import Batch
from taid_vlm.batch.figures import Measured
from taid_vlm.batch.losses import by_weight, compared_tokens, weight_sum
from taid_vlm.models.packing import fed_tokens
from taid_vlm.training.loss import StepLoss


def token_sums(
    batch: Batch, found: StepLoss, seen: Mapping[str, Tensor], apart: bool = False
) -> dict[str, Tensor]:
    """Of the losses, per token and per image.

    Args:
        seen: losses per image, {name: [images]}.
        apart: whether each loss is over its own tokens, and not all over all.
    """
    sums = {f"loss/{name}": by_weight(batch, x).sum() for name, x in found.losses.items()}
    sums["tokens"] = _count(batch["labels"], found.loss)
    sums["tokens/loss"] = batch["weights"].double().sum() if "weights" in batch else \
        sums["tokens"].clone()
    if apart:
        sums |= {f"tokens/loss/{name}": sums["tokens/loss"].clone() for name in found.losses}
    figures = {f"loss/{name}": Measured(values) for name, values in seen.items()}
    if found.weight is not None:
        tokens, weight = compared_tokens(batch), found.weight
        figures["visual_weight"] = Measured(weight if tokens is None else weight[tokens])
    for name, figure in figures.items():
        sums[name] = figure.values.sum()
        sums[f"tokens/{name}"] = _count(figure.values, found.loss)
    return sums


def figure_sums(batch: Batch, figures: Mapping[str, Measured]) -> dict[str, Tensor]:
    """Of what is reported of a batch, by what its answers count."""
    sums = {}
    for name, (values, tokens) in figures.items():
        amount = _count(values, values)
        if "weights" in batch:
            weight = batch["weights"] if tokens is None else batch["weights"][tokens]
            values, amount = values * weight, weight.double().sum()
        sums[name], sums[f"tokens/{name}"] = values.sum(), amount
    return sums


def step_counts(batch: Batch) -> Tensor:
    """What the answer tokens count; images and tokens fed to the student, without padding, of the
    references."""
    images, fed = torch.stack(
        [batch["images"].sum(), fed_tokens(batch["student_inputs"]).sum()]).tolist()
    own = weight_sum(batch["sampled"]) if "sampled" in batch else 0.0
    return torch.tensor([weight_sum(batch) + own, images, fed], dtype=torch.float64)


def _count(values: Tensor, like: Tensor) -> Tensor:
    return torch.full((), len(values), dtype=torch.float64, device=like.device)


def on_policy_figures(
    batch: Batch, figures: Mapping[str, Measured]
) -> dict[str, Measured]:
    """Figures of sampled answers under names of their own; KL also of the first and the second
    half of each answer: what a student that has left the references' ground does not know."""
    named = {f"on_policy/{name}": figure for name, figure in figures.items()}
    if "kl" in figures:
        values, tokens = figures["kl"]
        late = _late(batch["row"])
        late = late if tokens is None else late[tokens]
        for half, inside in (("early", ~late), ("late", late)):
            at = inside.nonzero()[:, 0]
            named[f"on_policy/kl_{half}"] = Measured(
                values[at], at if tokens is None else tokens[at])
    return named


def _late(row: Tensor) -> Tensor:
    """Whether each of the tokens, in order, stands in the second half of its row's."""
    counts = torch.bincount(row)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    return 2 * place >= counts[row]
