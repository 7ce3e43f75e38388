"""One loss of a weighted sum, as the bodies of the fused objective take it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class BodyTerm:
    """One loss of a weighted sum, with all its numbers; `parameters` holds TAID's t, too.

    kd_temperature: 1 for a loss on the data.
    """

    name: str
    weight: float = 1.0
    kd_temperature: float = 1.0
    parameters: Mapping[str, float] = field(default_factory=dict)
