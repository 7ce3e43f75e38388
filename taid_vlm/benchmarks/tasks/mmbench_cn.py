"""MMBench-CN: MMBench in Chinese."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from taid_vlm.benchmarks.tasks import mmbench

BENCHMARK = replace(mmbench.BENCHMARK, name="mmbench_cn", title="MMBench-CN",
                    read=partial(mmbench.read, line=mmbench.LINE_CN),
                    hub=("lmms-lab/MMBench", "cn", "dev"))
