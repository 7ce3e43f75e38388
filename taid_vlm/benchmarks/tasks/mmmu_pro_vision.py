"""MMMU-Pro with question and options within the picture."""

from __future__ import annotations

from dataclasses import replace

from taid_vlm.benchmarks.tasks import mmmu_pro

BENCHMARK = replace(mmmu_pro.BENCHMARK, name="mmmu_pro_vision", title="MMMU-Pro (vision)",
                    read=mmmu_pro.read_in_view, rules=mmmu_pro.IN_VIEW_RULES,
                    hub=(mmmu_pro.HUB, "vision", mmmu_pro.SPLIT))
