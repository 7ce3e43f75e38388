"""Several teachers by name, each with its part of a batch (`batch/several.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from taid_vlm.alignment import Pairing
from taid_vlm.teachers.signal import Teacher


@dataclass(frozen=True)
class Teachers:
    """What stands where a single teacher would; its own are as they would be alone.

    by_name: the teachers. pairings: how each is compared with the student.
    """

    by_name: Mapping[str, Teacher]
    pairings: Mapping[str, Pairing]

    model = None  # in this process, for all records

    @property
    def models(self) -> dict[str, Any]:
        """Those that are models in this process."""
        models = {name: getattr(teacher, "model", None) for name, teacher in self.by_name.items()}
        return {name: model for name, model in models.items() if model is not None}


def each(teacher: Any) -> dict[str, Any]:
    """Every teacher there is by name, a single one (or what will become one) as ""."""
    if isinstance(teacher, Teachers):
        return dict(teacher.by_name)
    if isinstance(teacher, Mapping):
        return dict(teacher)
    return {} if teacher is None else {"": teacher}
