"""What goes with a student when it is published: its card with licences, curves, the comparison."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from html import escape
from pathlib import Path

from huggingface_hub import hf_hub_download

from taid_vlm.config.yaml import parse_yaml
from taid_vlm.errors import TaidError
from taid_vlm.io.files import write_text
from taid_vlm.report import palette
from taid_vlm.report.card import public_name
from taid_vlm.report.charts import save_png
from taid_vlm.report.data import Report, Section
from taid_vlm.report.run import curves
from taid_vlm.runs.results import Model, Results

CARD, CURVES, COMPARISON = "README.md", "curves.png", "comparison.html"


def add_pages(
    folder: Path, results: Results, comparison: Path | None = None, licence: str | None = None
) -> None:
    """Put figures and the comparison beside a copy of a student, and say so in its card.

    Args:
        folder: with the student's files and the card that its run wrote.
        comparison: what `taid-vlm compare --html` wrote. licence: of the student, as the hub names
            licences.

    Raises:
        TaidError: there is no such page, or no card.
    """
    card = folder / CARD
    if not card.is_file():
        raise TaidError(f"the student has no model card ({CARD}); finish its run, which writes it.")
    _, head, text = card.read_text(encoding="utf-8").split("---\n", 2)
    drawn = curves(results.history)
    if drawn:
        styles = palette.assign(Report("", [], [Section("", curves=drawn)]))
        save_png(drawn, styles, folder / CURVES)
        text += f"\n## Training\n\n![{', '.join(curve.title for curve in drawn)}]({CURVES})\n"
    if comparison is not None:
        if not comparison.is_file():
            raise TaidError(f"--compare = '{comparison}' is not there. Write it with: taid-vlm "
                            f"compare ... --html {comparison}")
        page = comparison.read_text(encoding="utf-8")
        for model in _models(results).values():  # paths of this machine are nobody's business
            page = page.replace(escape(model.name), escape(public_name(model.name)))
        write_text(page, folder / COMPARISON)
        text += f"\n## Comparison\n\n[{COMPARISON}]({COMPARISON}), to be opened in a browser.\n"
    text += "\n".join(["\n## Licences", "", *licences(results), ""])
    own = f"license: {licence}\n" if licence else ""
    write_text(f"---\n{own}{head}---\n{text}", card)


def licences(results: Results) -> Iterator[str]:
    """What the cards of the models say that the student comes from."""
    for who, model in _models(results).items():
        says = licence_of(model.name, model.revision) or "not known, its card does not say"
        yield f"- {who}, {public_name(model.name)}: {says}"
    yield "- What these allow to be done with a model that learned from theirs is for you to check."


def _models(results: Results) -> dict[str, Model]:
    several = {f"Teacher {name}": one.model for name, one in results.teachers.items()}
    single = {"teacher": "Teacher", "student": "Base model"}
    return {single[role]: model for role, model in reversed(results.models.items())} | several


def licence_of(name: str, revision: str | None = None) -> str | None:
    """The licence that a model's card says, in a folder or on the hub; None if nothing does."""
    with contextlib.suppress(Exception):  # no card, no hub, a card that is none
        folder = Path(name).expanduser()
        card = folder / CARD if folder.is_dir() else Path(
            hf_hub_download(name, CARD, revision=revision))
        licence = parse_yaml(card.read_text(encoding="utf-8").split("---\n")[1]).get("license")
        return str(licence) if licence else None
    return None
