"""The pages: every link leads somewhere, every message quoted is one, the site builds."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md",
         *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md")),
         ROOT / "data/README.md"]


def anchors(page: Path) -> set[str]:
    """Of its headings, as the hub of a repository and mkdocs make them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else (page.parent / path).resolve()
        assert target.exists(), f"{page.name}: {link}"
        assert target.is_relative_to(ROOT), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@cache
def texts() -> str:
    """Every text of the package's source, with … for what is put in."""
    found = []
    for path in sorted((ROOT / "taid_vlm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…"
                                     for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[\w,.]*[sdgrf]", "…", node.value))
    return "\n".join(found)


def quoted() -> list[str]:
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^### `(.+)`$", page, re.MULTILINE)


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_is_one(message: str) -> None:
    assert len(re.findall(r"\w+", message)) > 2
    pattern = "[^\n]*?".join(re.escape(part) for part in message.split("…"))
    assert re.search(pattern, texts()), message


def test_messages_are_quoted() -> None:
    assert len(quoted()) >= 20
    assert "no such message as this one" not in texts()


def test_every_guide_is_on_the_site() -> None:
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r": (\w+\.md)$", site, re.MULTILINE))
    assert named == {page.name for page in (ROOT / "docs").glob("*.md")} | {
        "index.md", "changes.md"}


def test_the_site_builds(tmp_path: Path) -> None:
    """Strictly: a warning is an error."""
    pytest.importorskip("mkdocs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True))
    index = (tmp_path / "site/index.html").read_text(encoding="utf-8")
    assert "Your first distillation" in index and 'href="troubleshooting/"' in index
    api = (tmp_path / "site/api/index.html").read_text(encoding="utf-8")
    assert "DistillationTrainer" in api and "&gt;&gt;&gt; divergence(" in api
