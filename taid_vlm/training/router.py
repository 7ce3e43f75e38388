"""The load of a student's experts kept even, as a term of the objective.

    L = (experts / layers) sum_l sum_e f_le P_le

(Switch Transformers, Fedus et al., 2022, eq. 4; per layer). P_le is the mean probability that layer
l's router gives expert e over all tokens of an optimizer step, padding left out. f_le is the share
of tokens that were sent to e: counted over all processes in the optimizer step BEFORE this one, so
that the term is a plain sum over tokens and the gradient is the same under any batch split,
accumulation and number of processes (a count within each micro-batch is not, and forces every few
records to use all experts; Qiu et al., 2025). The first step has even shares, whose gradient is 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from taid_vlm.batch.collator import Batch
from taid_vlm.errors import TaidError
from taid_vlm.models.experts import balance_weight, chosen_experts, routers_of
from taid_vlm.models.forward import unwrap
from taid_vlm.models.packing import fed_tokens

ROUTER, LOAD_FILE = "router", "router_load.safetensors"


def check_router(weight: float, student: Any) -> str:
    """Whether the term and the student go together; a hint where the term is missing, else "".

    Raises:
        TaidError: a student without routers, or one whose family balances its experts otherwise.
    """
    config = unwrap(student).config
    usual, experts = balance_weight(config), chosen_experts(config)
    if weight and not (experts and routers_of(student)):
        raise TaidError(f"objective: the term {ROUTER} is for students with experts, and "
                        f"{config.model_type} has none; take it out.")
    if weight and usual is None:
        raise TaidError(f"objective: the term {ROUTER} is not for {config.model_type}, which "
                        "balances its experts by biases that pre-training moves; take it out.")
    if weight or not experts or usual is None:
        return ""
    return (f"the student sends every token to {experts[0]} of {experts[1]} experts, and nothing "
            f"in the objective keeps their load even; its family adds {{name: {ROUTER}, weight: "
            f"{usual}}} to the terms")


class RouterTerm:
    """The router term of one run; does nothing with weight 0.

    Args:
        weight: of the term; 0 without one.
        student: wrapped or not.
        accelerator: adds up what all processes have counted.

    Raises:
        TaidError: as `check_router`.
    """

    def __init__(self, weight: float, student: nn.Module, accelerator: Accelerator) -> None:
        self.weight, self.accelerator = weight, accelerator
        self.routers = routers_of(student) if weight else []
        self._seen: dict[int, Tensor] = {}
        if not weight:
            return
        check_router(weight, student)
        chosen = chosen_experts(unwrap(student).config)
        assert chosen is not None
        self.top_k, experts = chosen
        even = torch.full((len(self.routers), experts), self.top_k / experts)
        self.load = even.to(accelerator.device)
        self._counts = torch.zeros_like(self.load, dtype=torch.float64)

    # ----- the step -------------------------------------------------------------------------

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Note what all routers say of the batch; layers that are run again do not count twice."""
        hooks = [module.register_forward_hook(partial(self._note, layer, index))
                 for layer, (module, index) in enumerate(self.routers)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, layer: int, index: int, module: nn.Module, args: Any, output: Any) -> None:
        self._seen.setdefault(layer, output[index] if isinstance(output, tuple) else output)

    def losses(self, batch: Batch) -> Tensor | None:
        """The term per token of the batch last watched, [tokens without padding], unweighted."""
        if not self.weight:
            return None
        mask = fed_tokens(batch["student_inputs"]).reshape(-1).bool()
        layers = [self._seen[layer].reshape(len(mask), -1) for layer in range(len(self.routers))]
        self._seen.clear()
        if torch.is_grad_enabled() and not layers[0].requires_grad:
            raise TaidError(f"objective.{ROUTER} gets no gradient through reentrant checkpointing; "
                            "set train.gradient_checkpointing_kwargs: {use_reentrant: false}.")
        with torch.autocast(self.accelerator.device.type, enabled=False):
            logits = torch.stack(layers).float()[:, mask]  # [layers, tokens, experts]
            chosen = logits.detach().topk(self.top_k, dim=-1).indices.flatten(1)
            ones = torch.ones_like(chosen, dtype=torch.float64)
            self._counts.scatter_add_(1, chosen, ones)
            experts = logits.shape[-1]
            return experts * (logits.softmax(-1) * self.load[:, None]).sum(-1).mean(0)

    def finish_step(self, applied: bool) -> None:
        """After an optimizer step: what all processes counted is the next one's load."""
        if not self.weight:
            return
        counts = self.accelerator.reduce(self._counts, "sum")
        self._counts = torch.zeros_like(self._counts)
        total = counts.sum(-1, keepdim=True)
        if applied:  # decided on the device, which nothing waits for
            load = (counts * self.top_k / total.clamp(min=1)).float()
            self.load = torch.where((total > 0).all(), load, self.load)

    # ----- checkpoints ----------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write the load into a checkpoint's folder."""
        if self.weight:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({"load": self.load.cpu()}, folder / LOAD_FILE)

    def restore(self, folder: Path) -> None:
        """Read the load back, bit for bit."""
        if not self.weight:
            return
        if not (folder / LOAD_FILE).is_file():
            raise TaidError(f"'{folder}' holds no {LOAD_FILE}: it was written by a run without the "
                            f"term {ROUTER}. Resume with that run's objective.")
        self.load = load_file(folder / LOAD_FILE)["load"].to(self.accelerator.device)
