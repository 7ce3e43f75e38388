"""Several teachers by name, each with its part of a batch (`batch/several.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from taid_vlm.alignment import Pairing
from taid_vlm.teachers.served import ServedTeacher
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

    @property
    def served(self) -> dict[str, ServedTeacher]:
        return {name: teacher for name, teacher in self.by_name.items()
                if isinstance(teacher, ServedTeacher)}
