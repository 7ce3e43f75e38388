"""The examples of the public functions run, and none lacks one."""

from __future__ import annotations

import doctest
import inspect
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
from site_pages import api, public  # noqa: E402

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
FIRST = ("distill",)  # whose run others look at


def things() -> list[Any]:
    every = {thing.__name__: thing for group in public().values() for thing in group}
    return sorted(every.values(), key=lambda thing: thing.__name__ not in FIRST)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all of them run, one after the other."""
    return tmp_path_factory.mktemp("examples")


@pytest.mark.parametrize("thing", things(), ids=lambda thing: thing.__name__)
def test_the_example_runs(
    thing: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(folder)
    docstring = inspect.getdoc(thing) or ""
    test = doctest.DocTestParser().get_doctest(docstring, {}, thing.__name__, None, None)
    assert test.examples, f"{thing.__name__} lacks an example in its docstring"
    said: list[str] = []
    with caplog.at_level(logging.ERROR):
        result = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append)
    assert not result.failed, "".join(said)


@pytest.mark.parametrize("thing", things(), ids=lambda thing: thing.__name__)
def test_arguments_are_described(thing: Any) -> None:
    docstring = inspect.getdoc(thing) or ""
    if inspect.isfunction(thing):
        assert "Args:" in docstring, thing.__name__


def test_the_page_is_that_of_the_docstrings() -> None:
    """Written anew by: python scripts/site_pages.py > docs/api.md"""
    page = api()
    assert (ROOT / "docs/api.md").read_text(encoding="utf-8") == page
    assert all(page.count(f"### {thing.__name__}\n") == 1 for thing in things())
