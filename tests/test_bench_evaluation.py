"""The evaluation's benchmark: its rows, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import bench_evaluation  # noqa: E402


def test_every_case_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    written = tmp_path / "rows.json"
    rows = bench_evaluation.main(["--scale", "tiny", "--rows", "4", "--tokens", "3", "--rounds",
                                  "1", "--json", str(written), "--markdown", f"{tmp_path}/t.md"])
    assert rows == json.loads(written.read_text())
    assert [row["case"] for row in rows] == [
        *(f"{kind}: {case}" for kind in ("text", "vlm")
          for case in ("once", "generate", "choose by letter", "choose by text")), "server"]
    assert [row["case"] for row in rows if row["ratio"] is None] == ["text: once", "vlm: once"]
    for row in rows:
        if row["ratio"] is None:
            continue
        low, high = row["spread"]
        assert 0 < low <= row["ratio"] <= high
    assert (tmp_path / "t.md").read_text().startswith("| case | evaluate, s | plain, s | ratio |")


def test_a_scale_that_is_none_is_refused(capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        bench_evaluation.main(["--scale", "smal"])
    assert end.value.code == 2
    assert "Did you mean 'small'?" in capsys.readouterr().err
