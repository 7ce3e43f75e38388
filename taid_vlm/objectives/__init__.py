"""The mathematics: plain functions on tensors, without models, data or trainers."""

from taid_vlm.objectives.diagnostics import DIAGNOSTICS, diagnose
from taid_vlm.objectives.divergences import LOSSES, divergence
from taid_vlm.objectives.objective import Objective, Term, parse_objective
from taid_vlm.objectives.schedule import TaidSchedule

__all__ = [
    "DIAGNOSTICS",
    "LOSSES",
    "Objective",
    "TaidSchedule",
    "Term",
    "diagnose",
    "divergence",
    "parse_objective",
]
