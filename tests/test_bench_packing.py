"""The benchmark of batches by tokens and packed rows: its rows, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from zoo.lookalikes import lookalike

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import bench_packing  # noqa: E402


def test_all_arms_are_measured_on_the_same_records(tmp_path: Path) -> None:
    lookalike("smollm").save_pretrained(tmp_path / "tokenizer")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": "say", "completion": "a red one " * (1 + i % 9)})
                            + "\n" for i in range(24)))
    rows = bench_packing.main([
        "--data", str(data), "--tokenizer", str(tmp_path / "tokenizer"), "--rows", "4", "--rounds",
        "1", "--steps", "1", "--teacher", "64x1", "--student", "64x1", "--json",
        str(tmp_path / "found.json")])
    assert rows == json.loads((tmp_path / "found.json").read_text())
    assert [row["arm"] for row in rows] == list(bench_packing.ARMS)
    assert all(row["gradient"] < 2e-6 and row["tokens_per_cpu_second"] > 0 for row in rows)
    computed = {row["arm"]: row["computed"] for row in rows}
    assert computed["padded"] > computed["by tokens"] >= computed["packed"] == 1


def test_what_is_not_there_is_refused(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        bench_packing.main(["--data", str(tmp_path / "none"), "--tokenizer", str(tmp_path)])
    assert end.value.code == 2
    assert "none' is not there" in capsys.readouterr().err
