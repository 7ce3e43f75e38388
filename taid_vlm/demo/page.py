"""The demo's page: the comparison of each world's arms, and what they are about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from taid_vlm.compare import Comparison, comparison_report
from taid_vlm.compare.gallery import Images
from taid_vlm.compare.tables import figures_table
from taid_vlm.demo.arms import World
from taid_vlm.demo.truth import CAPTION_KL, QUESTIONS
from taid_vlm.report import Figure, Report, Section
from taid_vlm.report.page import MISSING, number
from taid_vlm.report.run import listed

CONSOLE = ("kl", "agreement", CAPTION_KL.key, QUESTIONS.name)

REAL = ("The teacher is small: its English is good and its arithmetic is not, and students learn "
        "both. Their start is the teacher without the fifteen layers in its middle.")

Compared = list[tuple[World, Comparison]]


def demo_report(compared: Compared, images: Mapping[str, Images], facts: dict[str, Any]) -> Report:
    """All comparisons one after the other.

    Args:
        images: of every world's questions, by their ids.
        facts: what results.json says beside the figures.
    """
    summary, provenance = list[str](), _provenance(facts)
    sections = [_introduction(compared, facts["real"])]
    for world, comparison in compared:
        page = comparison_report(comparison, {QUESTIONS.name: images[world.name]})
        place = f"{world.title}: " if len(compared) > 1 else ""
        summary += [place + page.summary[0], *page.summary[1:]]
        sections += [replace(section, title=place + section.title) for section in page.sections]
        provenance |= {place + name: text for name, text in page.provenance.items()}
    title = "TAID on a real language model" if facts["real"] else "TAID on two small worlds"
    return Report(title, summary, sections, provenance)


def _introduction(compared: Compared, real: bool) -> Section:
    more = REAL if real else f"{CAPTION_KL.label.capitalize()}: {CAPTION_KL.help}"
    return Section("One model, three objectives" if real else "Two worlds, four objectives", [
        "Every arm starts from the same warm start and takes the same steps over the same "
        "conversations in the same order; only the objective differs. One seed and one learning "
        "rate for all: errors are over held-out answers, captions or questions, and say nothing "
        f"about other seeds. {more}", *(_of_world(*pair) for pair in compared)])


def _of_world(world: World, comparison: Comparison) -> str:
    taid = comparison.methods[-1].runs[0].results
    alignment, share = taid.alignment, taid.train.adaptive_share
    assert alignment is not None
    acted = "" if share is None else f" TAID's adaptive term acted in {share:.0%} of the steps."
    products = " Products are in bfloat16, which this CPU has in hardware." if world.bf16 else ""
    return (f"{world.title}: {world.steps} steps of {world.batch_size} conversations.{products} "
            f"Alignment of teacher and student, case {alignment.case}: {alignment.reason}.{acted}")


def _provenance(facts: dict[str, Any]) -> dict[str, str]:
    largest = facts["memory"]["largest_worker_rss_bytes"] / 2**30
    return {
        "Command": f"taid-vlm demo{' --real' * facts['real']} --seed {facts['seed']}",
        "Time": f"{facts['seconds']:.0f} s, {facts['cpu_seconds']:.0f} s of CPU",
        "Peak memory": f"{largest:.2f} GiB in the largest worker process",
        "Machine": listed(facts["machine"]),
    }


def console_table(world: World, comparison: Comparison) -> str:
    """One line per model, in the figures that tell the arms apart."""
    judged = {j.measure.column.key: j for j in (*comparison.held_out, *comparison.benchmarks)}
    table = figures_table(world.title, [judged[key] for key in CONSOLE if key in judged],
                          comparison)
    lines = [f"\n{world.title} ({world.steps} steps each)",
             "  ".join(["", f"{'':<8}", *(f"{c.label:>22}" for c in table.columns)])]
    for row in table.rows:
        cells = [_cell(row.values.get(column.key), column.format) for column in table.columns]
        lines.append("  ".join(["", f"{row.name:<8}", *(f"{cell:>22}" for cell in cells)]))
    return "\n".join(lines)


def _cell(figure: Figure | None, spec: str) -> str:
    if figure is None or figure.value is None:
        return MISSING
    return f"{number(figure.value, spec)} ± {number(figure.stderr or 0.0, spec)}"
