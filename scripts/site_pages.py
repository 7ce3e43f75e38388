"""A hook of mkdocs: pages of the site that lie elsewhere (README, changes, measured tables).

    python scripts/site_pages.py > docs/api.md

writes the page of the public functions and classes, from their docstrings.
"""

from __future__ import annotations

import inspect
import json
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
    pages |= {f"notebooks/{path.stem}.md": notebook_page(json.loads(path.read_text("utf-8")))
              for path in sorted((ROOT / "docs/notebooks").glob("*.ipynb"))}
    for place, text in pages.items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are in the repository, for where the pages lie on the site."""
    place = page.file.src_uri
    if place in MOVED.values():
        markdown = re.sub(r"\]\(docs/", "](", markdown)
    markdown = markdown.replace("](../docs/", "](../").replace("](../benchmarks/", "](benchmarks/")
    markdown = markdown.replace(".ipynb)", ".md)")
    for name, moved in MOVED.items():
        markdown = re.sub(rf"\]\((?:\.\./)?{name}", f"]({moved}", markdown)
    return markdown


def notebook_page(notebook: dict[str, Any]) -> str:
    """A notebook as Markdown: texts, code, and what it printed and drew."""
    parts: list[str] = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            png = output.get("data", {}).get("image/png")
            parts.append(f"![figure](data:image/png;base64,{png})" if png else
                         f"```text\n{''.join(output['text']).rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def public() -> dict[str, list[Any]]:
    """What is documented for use from Python, by the module that it is imported from."""
    import taid_vlm
    from taid_vlm import objectives
    from taid_vlm.adapters import make_adapter
    from taid_vlm.alignment import build_vocabulary_map, pair_models
    from taid_vlm.batch.collator import DistillationCollator
    from taid_vlm.records import parse_record

    mathematics = [getattr(objectives, name) for name in objectives.__all__
                   if name not in taid_vlm.__all__]
    return {
        "taid_vlm": [getattr(taid_vlm, name) for name in sorted(taid_vlm.__all__)],
        "taid_vlm.records": [parse_record], "taid_vlm.adapters": [make_adapter],
        "taid_vlm.alignment": [build_vocabulary_map, pair_models],
        "taid_vlm.batch.collator": [DistillationCollator],
        "taid_vlm.objectives": [thing for thing in mathematics if inspect.isfunction(thing)],
    }


def api() -> str:
    """The page of `public`, from its docstrings."""
    lines = ["# Python", "", "What is meant for use from Python, with examples that the tests run. "
             "Nothing is imported", "before it is used. Shapes stand in brackets: N tokens, V and "
             "K entries of a vocabulary, B rows of T.", ""]
    for module, things in public().items():
        lines += [f"## {module}", ""]
        for thing in things:
            lines += [f"### {thing.__name__}", "", "```python", _signature(thing), "```", "",
                      *_sections(inspect.getdoc(thing) or ""), ""]
    return "\n".join(lines)


def _signature(thing: Any) -> str:
    """As it is called; of transformers' TrainingArguments only what this package adds."""
    parameters = list(inspect.signature(thing).parameters.values())
    own = vars(thing).get("__annotations__", {}) if inspect.isclass(thing) else {}
    inherited = [p for p in parameters if own and p.name not in own and p.name != "output_dir"]
    own_ones = [p.replace(annotation=p.empty) for p in parameters if p not in inherited]
    words = [str(p) for p in own_ones]
    named = [p.kind is p.KEYWORD_ONLY for p in own_ones]
    if any(named):
        words.insert(named.index(True), "*")
    if inherited:
        words.append("**training_arguments")
    line = f"{thing.__name__}({', '.join(words)})"
    return line if len(line) <= 90 else f"{thing.__name__}(\n    " + ",\n    ".join(words) + ",\n)"


def _sections(docstring: str) -> list[str]:
    """Text as it is; Args, Returns and the like as headed blocks; the example as Python."""
    lines: list[str] = []
    for block in re.split(r"\n(?=(?:Args|Returns|Raises|Example):\n)", docstring):
        head, _, body = block.partition("\n")
        if head not in ("Args:", "Returns:", "Raises:", "Example:"):
            lines += ["```text", block.strip(), "```", ""]
            continue
        kind = "pycon" if head == "Example:" else "text"
        lines += [f"**{head[:-1]}**", "", f"```{kind}", inspect.cleandoc(f"\n{body}"), "```", ""]
    return lines


if __name__ == "__main__":
    print(api(), end="")
