"""Losses on visual features in training: what both models see, captured, pooled and compared.

Features are taken where they enter the language model, from its `inputs_embeds` at the positions
of every image's global view, which is the same place in every family. What some families (Qwen3-VL)
hand to deeper layers besides is not compared.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from taid_vlm.adapters import GlobalViews
from taid_vlm.batch.collator import Batch, DistillationCollator
from taid_vlm.errors import TaidError
from taid_vlm.evaluation.canary import blank
from taid_vlm.models.forward import unwrap
from taid_vlm.models.parts import PROJECTOR, TOWER, parts_of
from taid_vlm.objectives import Objective, VisualTerm, feature_loss, pool, relation_loss

logger = logging.getLogger(__name__)

MAP, MAP_FILE = "visual_map", "visual_map.safetensors"
FEATURES = "visual_features"  # the term that needs the map
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def visual_collator(
    collator: DistillationCollator, objective: Objective, student: nn.Module,
    teacher: nn.Module | None,
) -> DistillationCollator:
    """The collator with what the objective asks of images; the same one if it asks nothing.

    Raises:
        TaidError: a model without vision, or a family whose tokens cannot be placed in the image.
    """
    if objective.visual_advantage:
        if collator.teacher is None or not collator.teacher.sees_images:
            raise TaidError("objective.token_weights: visual_advantage asks what the teacher sees, "
                            "but the teacher is a text model.")
        collator = replace(collator, degrade=blank)
    if not objective.visual:
        return collator
    adapters = {adapter.role: adapter for adapter in collator.adapters}
    return replace(collator, views={
        role: GlobalViews(adapters[role], unwrap(model).config)
        for role, model in (("student", student), ("teacher", teacher))})


def feature_map(student_width: int, teacher_width: int, seed: int) -> nn.Linear:
    """The learned linear map from the student's features to the teacher's; starts orthogonal.

    Draws nothing from the global random state.
    """
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, student_width, teacher_width, bias=False)
    nn.init.orthogonal_(layer.weight, generator=torch.Generator().manual_seed(seed))
    return layer


class VisualTerms:
    """The visual terms of one run, and the map that belongs to them; does nothing without terms.

    Args:
        terms: of the objective.
        student, teacher: the models, wrapped or not.
        accelerator: wraps the map as it does the student.
        seed: of the map's start.

    Raises:
        TaidError: a map under FSDP or DeepSpeed, which train only what is in their model.
    """

    def __init__(
        self, terms: Sequence[VisualTerm], student: nn.Module, teacher: nn.Module | None,
        accelerator: Accelerator, seed: int,
    ) -> None:
        self.terms, self.map = terms, None
        self._device = accelerator.device.type
        self._seen: dict[str, Tensor] = {}
        models = {"student": student, "teacher": teacher} if terms else {}
        self._decoders = {role: unwrap(model).get_decoder() for role, model in models.items()}
        if terms:
            _warn_if_frozen(student)
        if any(term.name == FEATURES for term in terms):
            if accelerator.distributed_type in SHARDED:
                raise TaidError(f"objective.{FEATURES} trains a map beside the student, which FSDP "
                                "and DeepSpeed cannot; use visual_relation, or train without them.")
            ours, theirs = (unwrap(model).config.get_text_config().hidden_size
                            for model in models.values())
            self.map = accelerator.prepare_model(feature_map(ours, theirs, seed))

    # ----- the step -------------------------------------------------------------------------

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Note what enters both language models; once per model."""
        hooks = [decoder.register_forward_pre_hook(partial(self._note, role), with_kwargs=True)
                 for role, decoder in self._decoders.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, role: str, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        self._seen.setdefault(role, kwargs["inputs_embeds"])

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Every term per image of the batch last watched, {name: [images]}, unweighted.

        The map runs even if there are no images: in several processes the others wait for it.
        """
        with torch.autocast(self._device, enabled=False):
            found = {term.name: self._loss(term, batch) for term in self.terms}
        self._seen.clear()
        return found

    def _loss(self, term: VisualTerm, batch: Batch) -> Tensor:
        s, u = (self._cells(role, batch, term.grid) for role in ("student", "teacher"))
        if term.name != FEATURES:
            return relation_loss(s, u)
        assert self.map is not None
        return feature_loss(self.map(s), u)

    def _cells(self, role: str, batch: Batch, grid: int) -> Tensor:
        """Pooled features of every image, [images, grid * grid, width]."""
        seen, views = self._seen[role], batch[f"{role}_views"]
        if not views:
            return seen.new_zeros(0, grid * grid, seen.shape[-1], dtype=torch.float32)
        return torch.stack([pool(seen[view.row, list(view.positions)], view.shape, grid)
                            for view in views])

    def weighted(self, losses: Mapping[str, Tensor]) -> Tensor | float:
        """The weighted sum of the terms over images; 0 without terms."""
        return sum((term.weight * losses[term.name].sum() for term in self.terms), start=0.0)

    # ----- the map --------------------------------------------------------------------------

    def add_group(self, optimizer: Any, learning_rate: float, weight_decay: float) -> Any:
        """Give the map a group of its own in the student's optimizer, once."""
        if self.map is None or any(group.get("part") == MAP for group in optimizer.param_groups):
            return optimizer
        optimizer.add_param_group({"params": list(self.map.parameters()), "part": MAP,
                                   "lr": learning_rate, "weight_decay": weight_decay})
        return optimizer

    def zero_grad(self) -> None:
        """After an optimizer step; Trainer clears the gradients of its model only."""
        if self.map is not None:
            self.map.zero_grad()

    def save(self, folder: Path) -> None:
        """Write the map into a checkpoint's folder."""
        if self.map is not None:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(unwrap(self.map).state_dict(), folder / MAP_FILE)

    def load(self, folder: Path) -> None:
        """Read the map back, bit for bit."""
        if self.map is None:
            return
        if not (folder / MAP_FILE).is_file():
            raise TaidError(f"'{folder}' holds no {MAP_FILE}: it was written by a run without "
                            f"{FEATURES}. Resume with that run's objective.")
        unwrap(self.map).load_state_dict(load_file(folder / MAP_FILE))


def _warn_if_frozen(student: nn.Module) -> None:
    parts = parts_of(student)
    trained = {parts[name] for name, p in student.named_parameters() if p.requires_grad}
    if trained.isdisjoint((TOWER, PROJECTOR)):
        logger.warning("The objective compares visual features, but neither the student's tower "
                       "nor its projector is trained, so they stay as they are.")
