"""The GPU check: its table has every part, and one that fails or takes too long harms no other."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import gpu_check  # noqa: E402
from gpu_check import Part  # noqa: E402


def test_a_part_that_fails_or_hangs_leaves_the_others(tmp_path: Path, monkeypatch: Any) -> None:
    def parts(work: Path, logs: Path, rehearse: bool) -> list[Part]:
        return [Part("hangs", "", 1, [("-c", "import time; time.sleep(99)")]),
                Part("breaks", "", 1, [("-c", "raise SystemExit('broken | here')")]),
                Part("builds", "", 1, [("-c", "")], after="breaks"),
                Part("refuses", "", 1, [("-c", "import sys; print('x needs y'); sys.exit(2)")]),
                Part("lacks", "", 1, [("-c", "")], package="no_such_package"),
                Part("works", "", 20, [("-c", "")])]

    monkeypatch.setattr(gpu_check, "all_parts", parts)
    outcomes = gpu_check.main(["--rehearse", "--minutes", "0.5", "--output", str(tmp_path / "o")])
    assert [o.status for o in outcomes] == [
        "timed out", "failed", "skipped", "skipped", "skipped", "ok"]
    assert outcomes[0].seconds < 10
    assert outcomes[1].reason == "broken | here"
    assert "'breaks', which was failed" in outcomes[2].reason
    kept = json.loads((tmp_path / "o/gpu_check.json").read_text())["parts"]
    assert [part["name"] for part in kept] == [o.name for o in outcomes]
    page = (tmp_path / "o/gpu_check.md").read_text()
    assert all(f"| {o.name} | " in page for o in outcomes)


def test_the_kernels_are_rehearsed(tmp_path: Path) -> None:
    outcomes = gpu_check.main(["--rehearse", "--only", "kernels", "--output", str(tmp_path / "o")])
    status = {outcome.name: outcome.status for outcome in outcomes}
    assert status.pop("kernels") == "ok" and set(status.values()) == {"skipped"}
    assert "eager bfloat16" in outcomes[0].figures
    assert len(outcomes) == len(gpu_check.all_parts(tmp_path, tmp_path, True))


@pytest.mark.slow
def test_all_is_rehearsed(tmp_path: Path) -> None:
    outcomes = gpu_check.main(["--rehearse", "--output", str(tmp_path / "o")])
    assert all(o.status == "ok" or o.reason == "needs a GPU" for o in outcomes), outcomes
