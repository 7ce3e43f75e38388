"""The comparison as one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from taid_vlm.compare import curves, tables
from taid_vlm.compare.compare import AVERAGE, Comparison
from taid_vlm.compare.findings import findings
from taid_vlm.compare.gallery import Images, benchmark_examples, held_out_examples
from taid_vlm.report import Example, Report, Section, write_report
from taid_vlm.report.run import listed
from taid_vlm.runs.machine import versions


def comparison_report(
    comparison: Comparison, images: Mapping[str, Images] | None = None
) -> Report:
    """Findings, tables, curves and a gallery.

    Args:
        images: {benchmark: its images by question id}; of others they are looked for where
            results.json says.
    """
    sections = [_benchmarks(comparison), _held_out(comparison), _training(comparison),
                _answers(comparison, images or {}), _method(comparison)]
    return Report(
        title=f"{_listed(comparison)}, compared",
        summary=findings(comparison),
        sections=[section for section in sections if section is not None],
        provenance=provenance(comparison),
    )


def write_page(comparison: Comparison, path: Path) -> Path:
    """Write the page whole or not at all; raises TaidError."""
    return write_report(comparison_report(comparison), path)


def _listed(comparison: Comparison) -> str:
    *most, last = comparison.names
    if not most:
        most, last = [last], comparison.baseline.lower()
    return f"{', '.join(most)} and {last}"


def _benchmarks(comparison: Comparison) -> Section | None:
    judged = comparison.benchmarks
    if not judged:
        return None
    everyone = [*comparison.references, *comparison.methods]
    shown = [tables.figures_table("Scores", judged, comparison),
             tables.against_table(judged, comparison),
             tables.recovered_table(judged, comparison), tables.failures_table(comparison)]
    for j in judged:
        if j.measure.column is not AVERAGE:
            shown += tables.tag_tables(j.measure.column.key, j.measure.column.label, everyone)
    return Section("Benchmarks", _unpaired(judged), [table for table in shown if table])


def _unpaired(judged: Sequence[Any]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for j in judged:
        if j.measure.unpaired and j.pairs:
            reasons.setdefault(j.measure.unpaired, []).append(j.measure.column.label)
    return [f"Not compared in pairs, so that small differences go unnoticed: {', '.join(labels)} "
            f"({reason})." for reason, labels in reasons.items()]


def _held_out(comparison: Comparison) -> Section | None:
    judged = comparison.held_out
    if not judged:
        return None
    main = [j for j in judged if j.measure.column.key not in tables.SPREAD]
    spread = [j for j in judged if j.measure.column.key in tables.SPREAD]
    shown = [
        tables.figures_table("Held-out figures", main, comparison,
                             "Means per answer token. The base is the student before training."),
        tables.against_table(main, comparison),
        tables.recovered_table(main, comparison, tables.GAPS),
        tables.category_table(comparison.methods, next(
            j.measure.column.key for j in main if j.measure.column.key not in comparison.first)),
        tables.spread_table(spread, comparison),
    ]
    drawn = [curves.masses(comparison), curves.reliability(comparison.methods),
             curves.capacity_gap(comparison)]
    return Section("Held-out data", _unpaired(judged), [table for table in shown if table],
                   [curve for curve in drawn if curve])


def _training(comparison: Comparison) -> Section | None:
    cost = tables.cost_table(comparison.methods)
    if cost is None:
        return None
    return Section("Training", [], [cost], curves.training_curves(comparison.methods))


def _answers(comparison: Comparison, images: Mapping[str, Images]) -> Section | None:
    everyone = [*comparison.references, *comparison.methods]
    cards: list[Example] = []
    for j in comparison.benchmarks:
        column = j.measure.column
        if column is not AVERAGE and len(j.figures) > 1:
            cards += benchmark_examples(column.key, column.label, everyone, images.get(column.key))
    cards += held_out_examples(comparison.methods)
    return Section("Answers", [], examples=cards) if cards else None


def _method(comparison: Comparison) -> Section:
    return Section("How this was measured", [*comparison.warnings, *how_measured(comparison)])


def how_measured(comparison: Comparison) -> list[str]:
    """Data, statistics and rules, in sentences."""
    text = []
    data = next((run.results.data["eval"] for m in comparison.methods for run in m.runs), None)
    if data:
        text.append(f"Held-out data: {data.records:,} records, sha256 {data.sha256}; figures "
                    "are means per answer token, the same tokens for every method.")
    entries = {name: entry for method in (*comparison.methods, *comparison.references)
               for e in method.evaluations for name, entry in e.results["tasks"].items()}
    text += [_task(entry) for entry in entries.values()]
    text.append(
        "Differences and their 95 % intervals are of pairs; records, or questions about one item, "
        "are one draw. Intervals are by Student's t with as many degrees of freedom as these draws "
        "leave (jackknife variance), and by seeds' own where a method has several; of shares by "
        "Clopper and Pearson, of gaps by Fieller. Significance is at 5 % after Holm's correction "
        "over all comparisons on this page.")
    return text


def _task(entry: dict[str, Any]) -> str:
    answering, source = entry.get("answering") or {}, entry.get("source") or {}
    settings = ", ".join(f"{key} {value}" for key, value in answering.items() if key != "method")
    paths = source.get("path") or ""
    # where a file lies is nobody's business
    names = [Path(path).name if Path(path).is_absolute() else path
             for path in ([paths] if isinstance(paths, str) else paths)]
    data = ", ".join(filter(None, [
        *names,
        f"sha256 {source['sha256'][:16]}" if source.get("sha256") else ""]))
    return (f"{entry['title']}: {entry['n']:,} questions{f' ({data})' if data else ''}, rule "
            f"{entry['rule']}, version {entry['rule_version']}, prompts {entry['prompt_hash']}, "
            f"answered by {answering.get('method', 'unknown means')}"
            f"{f' ({settings})' if settings else ''}.")


def provenance(comparison: Comparison) -> dict[str, str]:
    """Where every row comes from, as label -> text."""
    rows = {}
    for method in (*comparison.references, *comparison.methods):
        runs = [f"{run.folder} (recipe {run.results.recipe_hash}, seed {run.results.seed})"
                for run in method.runs]
        evaluations = [f"{e.folder} ({e.results['model']['name']})" for e in method.evaluations]
        rows[method.name] = "; ".join([*runs, *evaluations])
    return {**rows, "Measured with": listed(comparison.methods[0].parts[0].versions),
            "Compared with": f"taid-vlm {versions().get('taid-vlm', '')}"}
