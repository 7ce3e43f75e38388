"""The mathematics: plain functions on tensors, without models, data or trainers."""

from taid_vlm.objectives.diagnostics import (
    CLOSE_DIAGNOSTICS,
    DIAGNOSTICS,
    best_guess,
    data_nll,
    diagnose,
)
from taid_vlm.objectives.divergences import LOSSES, divergence
from taid_vlm.objectives.estimates import sampled_reverse_kl
from taid_vlm.objectives.likelihood import chunk_logits, label_log_prob
from taid_vlm.objectives.objective import Objective, Term, VisualTerm, parse_objective
from taid_vlm.objectives.schedule import TaidSchedule
from taid_vlm.objectives.visual import advantage_weight, feature_loss, pool, relation_loss

__all__ = [
    "CLOSE_DIAGNOSTICS",
    "DIAGNOSTICS",
    "LOSSES",
    "Objective",
    "TaidSchedule",
    "Term",
    "VisualTerm",
    "advantage_weight",
    "best_guess",
    "chunk_logits",
    "data_nll",
    "diagnose",
    "divergence",
    "feature_loss",
    "label_log_prob",
    "parse_objective",
    "pool",
    "relation_loss",
    "sampled_reverse_kl",
]
