"""The notebook runs, cell by cell, and is small and free of this machine's paths."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import run_notebook  # noqa: E402
from site_pages import notebook_page  # noqa: E402

NOTEBOOK = ROOT / "docs/notebooks/words.ipynb"


def read() -> dict[str, Any]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def printed(notebook: dict[str, Any]) -> list[str]:
    """What every cell of code printed."""
    return ["".join("".join(output.get("text", "")) for output in cell["outputs"])
            for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook, stored = read(), printed(read())
    run_notebook.run(notebook, {"STEPS": 2, "RECORDS": 12})
    now = printed(notebook)
    assert now[1:3] == stored[1:3]  # a record, and the pair: no step is in them
    assert ["TAID" in text for text in now] == ["TAID" in text for text in stored]
    assert re.search(r"teacher +\d+\.\d% of \d+ right", now[-1])
    assert Path("runs/TAID/report.html").is_file() and Path("page.html").is_file()


def test_a_change_of_what_no_cell_says_is_refused() -> None:
    with pytest.raises(AssertionError, match="does not say EPOCHS"):
        run_notebook.run({"cells": [{"cell_type": "code", "source": ["STEPS = 1"]}]}, {"EPOCHS": 1})


def test_what_is_stored_is_small_and_of_no_machine() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 150_000 and text.count("image/png") == 1
    assert not re.search(r"/(home|root|tmp|work|Users)/", re.sub(r'"image/png": ".*"', "", text))
    assert all(cell["outputs"] for cell in read()["cells"][4:] if cell["cell_type"] == "code")


def test_the_site_shows_it() -> None:
    page = notebook_page(read())
    assert "data:image/png;base64," in page and "```python\nSTEPS" in page and "case b:" in page
