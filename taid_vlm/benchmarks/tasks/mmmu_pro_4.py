"""MMMU-Pro with the four options of MMMU."""

from __future__ import annotations

from dataclasses import replace

from taid_vlm.benchmarks.tasks import mmmu_pro

BENCHMARK = replace(mmmu_pro.BENCHMARK, name="mmmu_pro_4", title="MMMU-Pro (4 options)",
                    hub=(mmmu_pro.HUB, "standard (4 options)", mmmu_pro.SPLIT))
