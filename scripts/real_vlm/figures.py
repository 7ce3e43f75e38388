"""What came of it: results.json, table.md and a page with held-out pictures and all answers."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from real_vlm.data import SIDE
from real_vlm.parts import BLIND_ROW, CUT_ROW, MOST_QUESTIONS, TEACHER_ROW, Work
from real_vlm.plan import ARMS
from taid_vlm.compare import Comparison, Method, compare_runs, comparison_report, plain
from taid_vlm.compare.folders import Distillation, Evaluation, read_folder
from taid_vlm.compare.markdown import as_markdown
from taid_vlm.compare.measures import BASE, TEACHER
from taid_vlm.demo.truth import QUESTIONS, caption_measure, questions_task
from taid_vlm.evaluation.statistics import Pooled, mean_of, pool_seeds
from taid_vlm.io.files import read_json, write_json, write_text
from taid_vlm.records import open_records
from taid_vlm.report import Column, Example, Figure, Report, Row, Section, Table, write_report
from taid_vlm.runs.folders import RESULTS
from taid_vlm.runs.machine import machine, peak_memory, versions

BASELINE = "TAID"
SHOWN = 3  # pictures of every kind of question on the page
MAJORITY_ROW = "Always the most frequent answer"
Rows = list[dict[str, Any]]


def write_figures(work: Work, seeds: Sequence[int], times: Path) -> None:
    """What has been answered so far; a comparison with a page once a seed of all arms is done."""
    answers = _answers(work, seeds)
    if TEACHER_ROW not in answers:
        return
    teacher = read_folder(work.output / "teacher")
    methods = [Method(name, _runs(work, name, seeds), [
        read_folder(work.answers(name, seed)) for seed in seeds]) for name in ARMS if seeds]
    document: dict[str, Any] = {
        "schema": 1, "kind": "real_vlm", "plan": asdict(work.plan),
        "finished_seeds": list(seeds),
        "records": work.plan.records, "cpu_seconds": read_json(times, "times of this script"),
        "tower_accuracy": read_json(work.output / "tower" / "accuracy.json", "a tower's accuracy"),
        "by_kind": _by_kind(work, answers), "canary": _canary(teacher, methods),
        "memory": peak_memory(), "machine": machine(), "versions": versions(),
    }
    text = [introduction(document), markdown(kinds_table(document)), canary_table(document)]
    if methods:
        comparison = _compared(work, methods)
        document |= plain(comparison)
        text.append(as_markdown(comparison))
        _write_page(work, comparison, document, _gallery(work, answers))
    write_json(document, work.output / "results.json")
    write_text("\n\n".join(text) + "\n", work.output / "table.md")
    work.say(f"{len(seeds)} seeds: {work.output / 'table.md'}\n\n"
             f"{markdown(kinds_table(document))}\n")


def _compared(work: Work, methods: Sequence[Method]) -> Comparison:
    references = [Method(name, (), (read_folder(work.answers(row)),), trained=False)
                  for name, row in ((TEACHER, TEACHER_ROW), (BASE, CUT_ROW))]
    return compare_runs(methods, *references, BASELINE,
                        more=[caption_measure(methods, _entropies(work))])


def _write_page(
    work: Work, comparison: Comparison, document: Mapping[str, Any], gallery: list[Example]
) -> None:
    page = comparison_report(comparison, {QUESTIONS.name: {}})
    first = Section("By kind of question", [introduction(document)], [kinds_table(document)])
    pictures = Section("Held-out pictures", ["Not chosen: the first of every kind. Students are "
                                             "those of the first seed."], examples=gallery)
    rest = [section for section in page.sections if not section.examples]
    write_report(Report("A VLM with real words and real pictures", page.summary,
                        [first, pictures, *rest], page.provenance), work.output / "report.html")


def _entropies(work: Work) -> dict[str, float]:
    """-log p(caption | scene) of held-out scenes, by record."""
    records: Any = open_records(work.held_out())
    known = {records.where(index): records.columns_of(index).get("caption_log_probability")
             for index in range(len(records))}
    return {where: -float(value) for where, value in known.items() if value is not None}


def _runs(work: Work, name: str, seeds: Sequence[int]) -> list[Distillation]:
    runs = [read_folder(work.arm(name, seed)) for seed in seeds]
    return [run for run in runs if isinstance(run, Distillation)]


def _answers(work: Work, seeds: Sequence[int]) -> dict[str, list[Rows]]:
    """{model: [seeds][questions]}, of those that have answered."""
    folders = {name: [work.answers(name)] for name in (TEACHER_ROW, BLIND_ROW, CUT_ROW)
               if (work.answers(name) / RESULTS).exists()}
    folders |= {name: [work.answers(name, seed) for seed in seeds] for name in ARMS if seeds}
    answers: dict[str, list[Rows]] = {}
    for name, own in folders.items():
        read = [read_folder(folder) for folder in own]
        answers[name] = [one.answers(QUESTIONS.name) for one in read
                         if isinstance(one, Evaluation)]
    return answers


# ----- by kind of question ------------------------------------------------------------------


def _by_kind(work: Work, answers: Mapping[str, list[Rows]]) -> dict[str, dict[str, Any]]:
    """{kind: {model: share right}}, with errors over seeds and questions together."""
    kinds = [row["tags"]["category"] for row in answers[TEACHER_ROW][0]]
    likely = _most_frequent(work)
    by_kind: dict[str, dict[str, Any]] = {}
    for kind in ["all", *dict.fromkeys(kinds)]:
        chosen = [i for i, one in enumerate(kinds) if kind in ("all", one)]
        own = by_kind[kind] = {}
        for name, seeds in answers.items():
            groups = [seeds[0][i]["group"] for i in chosen]
            own[name] = _as_json(pool_seeds(
                [[float(rows[i]["score"] or 0) for i in chosen] for rows in seeds],
                groups=groups))
        rows = [answers[TEACHER_ROW][0][i] for i in chosen]
        guesses = mean_of([float(row["answers"][0] == likely.get(row["tags"]["category"]))
                           for row in rows], [row["group"] for row in rows])
        own[MAJORITY_ROW] = {"value": guesses.value, "stderr": guesses.stderr, "n": guesses.n,
                             "seeds": 1}
    return by_kind


def _as_json(pooled: Pooled) -> dict[str, Any]:
    return {"value": pooled.value, "stderr": pooled.stderr, "n": pooled.n, "seeds": pooled.seeds}


def _most_frequent(work: Work) -> dict[str, str]:
    """By kind, of the teacher's training answers."""
    counts: dict[str, Counter[str]] = {}
    for path in work.files("train"):
        for row in pq.read_table(path, columns=["messages", "categories"]).to_pylist():
            said = [m["content"][0]["text"] for m in row["messages"] if m["role"] == "assistant"]
            for kind, text in zip(row["categories"], said, strict=True):
                counts.setdefault(kind, Counter())[text] += 1
    return {kind: own.most_common(1)[0][0] for kind, own in counts.items()}


def kinds_table(document: Mapping[str, Any]) -> Table:
    kinds = document["by_kind"]
    columns = [Column(kind, kind, "higher", ".1f", "%") for kind in kinds]
    roles = {TEACHER_ROW: "teacher", CUT_ROW: "start", MAJORITY_ROW: "baseline",
             BLIND_ROW: "baseline", BASELINE: "main"}
    rows = [Row(name, roles.get(name, ""), {
        kind: Figure(100 * own[name]["value"], 100 * own[name]["stderr"], own[name]["n"])
        for kind, own in kinds.items()})
        for name in (TEACHER_ROW, *ARMS, CUT_ROW, BLIND_ROW, MAJORITY_ROW) if name in kinds["all"]]
    return Table("Held-out questions answered exactly right", columns, rows)


def markdown(table: Table) -> str:
    lines = ["| % right | " + " | ".join(column.label for column in table.columns) + " |",
             "|---" * (1 + len(table.columns)) + "|"]
    counts = table.rows[0].values
    lines.append("| n | " + " | ".join(str(counts[c.key].n) for c in table.columns) + " |")
    for row in table.rows:
        cells = [_cell(row.values[column.key]) for column in table.columns]
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(figure: Figure) -> str:
    """No error where it cannot be known: of one group of questions, or where all scores are one."""
    share = f"{figure.value:.0f}"
    return f"{share} ± {figure.stderr:.0f}" if figure.stderr and figure.stderr > 0 else share


def introduction(document: Mapping[str, Any]) -> str:
    """What was trained on how much, and what the errors are."""
    plan, records, tower = document["plan"], document["records"], document["tower_accuracy"]
    steps, minutes = plan["steps"], sum(document["cpu_seconds"].values()) / 60
    right = ", ".join(f"{kind} {share:.0%}" for kind, share in tower.items())
    return (f"{len(document['finished_seeds'])} seeds of every method; ± is one standard error, "
            "over seeds and questions together, and of one seed over questions alone. The tower "
            "took "
            f"{steps['tower']} steps (labels of new drawings right: {right}), the teacher "
            f"{steps['align']} with tower and language model frozen and {steps['teacher']} with "
            f"everything ({records['train']} conversations, {plan['icons']} icons by name), each "
            f"student of {plan['layers']} layers {steps['student']} ({records['distill']} "
            "conversations). A new icon's name was never shown in training, a statement's "
            f"sentence neither. {minutes:.0f} min of CPU.")


def canary_table(document: Mapping[str, Any]) -> str:
    """Means over seeds, with the errors over records."""
    keys = ("kl_blank", "kl_shuffled", "gain_shuffled")
    lines = ["| nats per answer token | moved by a blank picture | by another's picture | what the "
             "right one adds to the reference over another's |", "|---|---|---|---|"]
    for name, looks in document["canary"].items():
        cells = [f"{_mean(looks, key):.3f} ± {_mean(looks, f'{key}_stderr'):.3f}" for key in keys]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(looks: Sequence[Mapping[str, float]], key: str) -> float:
    return math.fsum(look.get(key, math.nan) for look in looks) / max(1, len(looks))


def _canary(teacher: Distillation | Evaluation, methods: Sequence[Method]) -> dict[str, Any]:
    """How much pictures matter: KL to a blank and to another's picture, and the likelihood that
    the right one adds, in nats per answer token."""
    assert isinstance(teacher, Distillation)
    looks = {TEACHER_ROW: [teacher.results.canary]} | {
        method.name: [run.results.canary for run in method.runs] for method in methods}
    return {name: [one.student.after.model_dump() for one in own if one is not None]
            for name, own in looks.items()}


# ----- pictures -----------------------------------------------------------------------------


def _gallery(work: Work, answers: Mapping[str, list[Rows]]) -> list[Example]:
    task = questions_task(work.held_out(), MOST_QUESTIONS)
    rows = {name: {row["id"]: row for row in seeds[0]} for name, seeds in answers.items()}
    shown: Counter[str] = Counter()
    examples = []
    for question in task.questions:
        kind = question.tags["category"]
        if shown[kind] == SHOWN:
            continue
        shown[kind] += 1
        own = {name: by_id[question.id] for name, by_id in rows.items()}
        examples.append(Example(
            _strip([image.load() for image in question.images]), question.prompt[-1],
            question.answers[0], kind, {name: str(row["answer"]) for name, row in own.items()},
            {name: float(row["score"] or 0) for name, row in own.items()}))
    return sorted(examples, key=lambda example: example.category)


def _strip(pictures: Sequence[Image.Image]) -> bytes:
    """All pictures of a question side by side, twice as large."""
    side = 2 * SIDE
    strip = Image.new("RGB", ((side + 8) * len(pictures) - 8, side), "white")
    for index, picture in enumerate(pictures):
        strip.paste(picture.resize((side, side)), (index * (side + 8), 0))
    buffer = io.BytesIO()
    strip.save(buffer, "PNG")
    return buffer.getvalue()
