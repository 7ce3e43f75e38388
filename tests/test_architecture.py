"""docs/architecture.md says which file may know which; here it is held to it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "taid_vlm"


def listed() -> list[str]:
    """Module paths in the order of the page's tree, for example 'objectives/schedule'.

    A folder without files below it stands for all of its files.
    """
    tree = (ROOT / "docs" / "architecture.md").read_text().split("```text\n")[1].split("```")[0]
    found: list[str] = []
    folders: list[str] = []
    for line in tree.splitlines()[1:]:
        match = re.match(r"^( +)([\w.]+)(/?)\s", line + " ")
        if not match:
            continue
        depth, name = len(match[1]) // 2 - 1, match[2]
        path = "/".join([*folders[:depth], name])
        if match[3]:
            folders = [*folders[:depth], name]
            found.append(path + "/")
        elif name.endswith(".py"):
            found.append(path.removesuffix(".py"))
    return [module for entry in found for module in _opened(entry, found)]


def _opened(entry: str, found: list[str]) -> list[str]:
    if not entry.endswith("/"):
        return [entry]
    if any(other != entry and other.startswith(entry) for other in found):
        return []
    return [module for module in modules() if module.startswith(entry)]


def modules() -> dict[str, Path]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return {str(p.relative_to(PACKAGE).with_suffix("")): p for p in paths
            if p.name != "__init__.py"}


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere in it, folders as 'records/'."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("taid_vlm.").replace(".", "/")
                      for alias in node.names if alias.name.startswith("taid_vlm.")}
        if not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("taid_vlm")):
            continue
        base = (node.module or "").removeprefix("taid_vlm").strip(".").replace(".", "/")
        is_folder = (PACKAGE / base).is_dir()
        for alias in node.names:
            inner = f"{base}/{alias.name}".strip("/")
            is_module = is_folder and (PACKAGE / f"{inner}.py").exists()
            names.add(inner if is_module else base + "/" * is_folder)
    return names - {"", "/"}


def wings() -> set[str]:
    """Rooms below the line of the tree."""
    page = (ROOT / "docs" / "architecture.md").read_text().split("--- wings")[1].split("```")[0]
    return set(re.findall(r"^  (\w+)/", page, re.MULTILINE))


ORDER = listed()


def test_the_tree_names_every_file_once() -> None:
    assert sorted(ORDER) == sorted(modules())


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_what_stands_before_it(name: str) -> None:
    place = {module: index for index, module in enumerate(ORDER)}
    for target in imported(modules()[name]):
        if target.endswith("/"):
            inside = [m for m in ORDER if m.startswith(target)]
            if name.startswith(target):
                continue
            assert max(place[m] for m in inside) < place[name], f"{name} imports {target}"
        else:
            assert place[target] < place[name], f"{name} imports {target}"


def test_the_core_knows_no_wing() -> None:
    assert {"students", "report", "benchmarks", "compare", "doctor", "plan", "demo"} <= wings()
    for name, path in modules().items():
        if name.split("/")[0] not in wings() and "/" in name:
            for target in imported(path):
                assert target.split("/")[0] not in wings(), f"{name} imports {target}"


def test_few_modules_lie_in_no_room() -> None:
    assert len([*PACKAGE.glob("*.py")]) <= 4


def test_files_and_functions_stay_short() -> None:
    """A file fits in the head, a function on a screen."""
    for name, path in modules().items():
        source = path.read_text()
        assert len(source.splitlines()) <= 500, name
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 60, f"{name}.{node.name}: {length} lines"
