"""A hook of mkdocs: pages of the site that lie elsewhere (README, changes, measured tables), and
one of the public functions and classes.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MOVED = {"README.md": "index.md", "CHANGELOG.md": "changes.md"}


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    pages = {MOVED[name]: (ROOT / name).read_text(encoding="utf-8") for name in MOVED}
    pages |= {f"benchmarks/{path.name}": path.read_text(encoding="utf-8")
              for path in sorted((ROOT / "benchmarks").iterdir())}
    for place, text in {**pages, "api.md": api()}.items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are in the repository, for where the pages lie on the site."""
    place = page.file.src_uri
    if place in MOVED.values():
        markdown = re.sub(r"\]\(docs/", "](", markdown)
    markdown = markdown.replace("](../docs/", "](../").replace("](../benchmarks/", "](benchmarks/")
    for name, moved in MOVED.items():
        markdown = re.sub(rf"\]\((?:\.\./)?{name}", f"]({moved}", markdown)
    return markdown


def api() -> str:
    """What `dir(taid_vlm)` shows, with its docstrings."""
    import taid_vlm

    lines = ["# Python", "", "What `taid_vlm` exports; nothing is imported before it is used.", ""]
    for name in sorted(taid_vlm.__all__):
        thing = getattr(taid_vlm, name)
        try:
            signature = str(inspect.signature(thing))
        except ValueError:
            signature = "(...)"
        lines += [f"## `{name}`", "", "```python", f"{name}{signature}", "```", "", "```text",
                  inspect.getdoc(thing) or "", "```", ""]
    return "\n".join(lines)
