"""The collator's benchmark: its rows, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from zoo.lookalikes import lookalike

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import bench_collator  # noqa: E402


@pytest.fixture
def tokenizers(tmp_path: Path) -> list[str]:
    for role, name in (("teacher", "smollm"), ("student", "qwen")):
        lookalike(name).save_pretrained(tmp_path / role)
    return ["--teacher", str(tmp_path / "teacher"), "--student", str(tmp_path / "student")]


def test_both_checkouts_are_measured(tokenizers: list[str], tmp_path: Path) -> None:
    written = tmp_path / "rows.json"
    few = ["--tokens", "64", "--rows", "4", "--rounds", "1", "--json", str(written)]
    rows = bench_collator.main([*tokenizers, "--against", str(ROOT), *few])
    assert rows == json.loads(written.read_text())
    assert [(row["checkout"], row["kind"]) for row in rows] == [
        (checkout, kind) for checkout in ("this", "against")
        for kind in ("prose", "code", "scripts", "images")]
    for row in rows:
        low, high = row["spread"]
        assert 0 < low <= row["tokens_per_cpu_second"] <= high
        assert row["ratio_to_bare"] > 0.5


@pytest.mark.parametrize(("flag", "told"), [
    ("--student", "holds no tokenizer.json"), ("--against", "is no checkout")])
def test_what_is_not_there_is_refused(
    flag: str, told: str, tokenizers: list[str], tmp_path: Path, capsys: Any
) -> None:
    with pytest.raises(SystemExit) as end:
        bench_collator.main([*tokenizers, flag, str(tmp_path / "none")])
    assert end.value.code == 2 and told in capsys.readouterr().err
