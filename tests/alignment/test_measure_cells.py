"""scripts/measure_cells.py: cells keep no more than the student's first tokens can tell apart."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from zoo import build, save

ROOT = Path(__file__).parents[2]


def test_cells_keep_no_more_than_the_bound(tmp_path: Path) -> None:
    save(build("llama"), tmp_path / "teacher")
    save(build("gpt2", tokenizer="other"), tmp_path / "student")
    process = subprocess.run(
        [sys.executable, "scripts/measure_cells.py", tmp_path / "teacher", tmp_path / "student"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=True)
    rows = re.findall(r"\| (\d\.\d{4}) \| (\d\.\d{4}) \(.*?\| (\d\.\d{4}) \(", process.stdout)
    assert len(rows) == 4
    for whole, kept, bound in (map(float, row) for row in rows):
        assert 0 < kept <= bound < whole
