"""The demo's report: what its results say, in tables, curves and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from taid_vlm.demo.arms import CAPTION, EXAMPLES, OBJECTIVES, START, TEACHER, WORLDS
from taid_vlm.records import Record, first_rows, open_records
from taid_vlm.report import Column, Curve, Example, Figure, Report, Row, Section, Table
from taid_vlm.report.run import figure, png

COLUMNS = (
    Column("kl", "KL(teacher ‖ student)", "lower", ".4f", "nats/token"),
    Column("reverse_kl", "KL(student ‖ teacher)", "lower", ".4f", "nats/token"),
    Column("agreement", "agreement", "higher", ".3f", "",
           "Share of tokens where student and teacher would say the same."),
    Column("nll", "NLL of the answers", "lower", ".4f", "nats/token"),
    Column("caption_kl", "caption KL", "lower", ".3f", "nats/caption",
           "KL(truth ‖ model) of whole captions, unbiased: the truth's probabilities are known."),
    Column("accuracy", "accuracy", "higher", ".3f", "",
           "Share of held-out questions answered exactly right."),
)


def demo_report(document: dict[str, Any], data: Path) -> Report:
    """The page of one demo; `data` is where the held-out images are."""
    worlds = document["worlds"]
    return Report(
        title="TAID on two small worlds",
        summary=[sentence for w in worlds.values() for sentence in _findings(w)],
        sections=[_section(name, world, data) for name, world in worlds.items()],
        provenance=_provenance(document),
        recipe=worlds["scenes"]["arms"]["TAID"]["recipe"],
    )


# ----- figures ------------------------------------------------------------------------------


def caption_losses(world: dict[str, Any], arm: str) -> dict[str, float]:
    """log p_truth - log p_model in nats of every held-out caption, by the record's source."""
    source, key = (START, "teacher_nll") if arm == TEACHER else (arm, "nll")
    truth = world["caption_entropies"]
    return {loss["source"]: loss[key] - truth[loss["source"]]
            for loss in world["arms"][source]["losses"] if loss["category"] == CAPTION}


def mean_figure(values: Sequence[float]) -> Figure:
    """Mean with the standard error of independent draws."""
    n, mean = len(values), sum(values) / len(values)
    variance = sum((x - mean) ** 2 for x in values) / max(n - 1, 1)
    return Figure(mean, math.sqrt(variance / n), n)


def paired(world: dict[str, Any], first: str, second: str) -> Figure:
    """Mean difference of the caption losses of two arms on the same captions."""
    a, b = caption_losses(world, first), caption_losses(world, second)
    return mean_figure([a[source] - b[source] for source in a])


def _figures(world: dict[str, Any], arm: str) -> dict[str, Figure]:
    result = world["arms"][arm]
    accuracy = result["accuracy"][""]
    values = {"caption_kl": mean_figure(list(caption_losses(world, arm).values())),
              "accuracy": Figure(accuracy["value"], accuracy["stderr"], accuracy["n"])}
    if arm == TEACHER:
        return values | {"nll": figure(
            _renamed(world["arms"][START]["figures"], "teacher_nll", "nll"), "nll")}
    keys = ("kl", "reverse_kl", "agreement", "nll")
    return values | {key: figure(result["figures"], key) for key in keys}


def _renamed(figures: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return {**figures, new: figures[old], f"{new}_stderr": figures[f"{old}_stderr"]}


def _role(arm: str) -> Any:
    return {TEACHER: "teacher", START: "start", "TAID": "main"}.get(arm, "baseline")


# ----- the page -----------------------------------------------------------------------------


def _section(name: str, world: dict[str, Any], data: Path) -> Section:
    order = [TEACHER, START, *OBJECTIVES]
    rows = [Row(arm, _role(arm), _figures(world, arm)) for arm in order]
    taid = world["arms"]["TAID"]
    return Section(
        title=world["title"],
        text=[
            f"Every arm starts from the same warm start and takes {world['steps']} steps of "
            f"{world['batch_size']} conversations in the same order; only the objective differs. "
            "One seed and one learning rate for all; errors are one standard error over held-out "
            "answers, captions or questions, and say nothing about other seeds.",
            f"Alignment of teacher and student, {taid['alignment']}.",
            f"TAID's adaptive term acted in {taid['adaptive_share']:.0%} of the steps.",
        ],
        tables=[
            Table("Held-out figures", list(COLUMNS), rows,
                  "Likelihood, caption KL and agreement separate the methods; accuracy differences "
                  "within the error are no ranking."),
            _category_table(world, order),
        ],
        curves=_curves(world), examples=_gallery(name, world, data, order),
    )


def _category_table(world: dict[str, Any], order: Sequence[str]) -> Table:
    categories = [c for c in world["arms"][TEACHER]["accuracy"] if c]
    columns = [Column(c, c, "higher", ".3f") for c in categories]
    rows = [Row(arm, _role(arm), {
        c: Figure(**world["arms"][arm]["accuracy"][c]) for c in categories}) for arm in order]
    return Table("Accuracy by category of question", columns, rows)


def _curves(world: dict[str, Any]) -> list[Curve]:
    def series(key: str) -> dict[str, list[tuple[float, float]]]:
        found = {arm: [(row["step"], row[key]) for row in world["arms"][arm]["history"]
                       if key in row] for arm in OBJECTIVES}
        return {arm: points for arm, points in found.items() if points}

    return [
        Curve("KL(teacher ‖ student) in training", "step", "nats/token", series("kl")),
        Curve("Agreement in training", "step", "share of tokens", series("agreement")),
        Curve("Own loss of each objective", "step", "nats/token", series("loss"),
              caption="Losses of different objectives are not comparable with each other."),
        Curve("TAID's interpolation t", "step", "t", series("t")),
    ]


def _gallery(
    name: str, world: dict[str, Any], data: Path, order: Sequence[str]
) -> list[Example]:
    """One card per answered turn of the first held-out records, teacher's answer first."""
    suffix = next(w.suffix for w in WORLDS if w.name == name)
    records = open_records(str(data / name / f"eval.{suffix}"))
    given = {arm: {(a["source"], a["turn"]): a for a in world["arms"][arm]["answers"]}
             for arm in order}
    cards = []
    for record in first_rows(records, EXAMPLES):
        assert isinstance(record, Record)
        image = png(record.images[0].load()) if record.images else None
        asked = [m.text.strip() for m in record.messages if m.role == "user"]
        for turn, reference in enumerate(record.answers):
            answers = {arm: found[record.source, turn]["answer"] for arm, found in given.items()
                       if (record.source, turn) in found}
            if answers:
                cards.append(Example(image, asked[turn], reference, record.category(turn),
                                     answers))
    return cards


def _findings(world: dict[str, Any]) -> list[str]:
    """What is true beyond two standard errors, and what is not; TAID gets no favour."""
    teacher, start = (world["arms"][arm]["accuracy"][""] for arm in (TEACHER, START))
    taid, before = world["arms"]["TAID"]["figures"], world["arms"][START]["figures"]
    told = [
        f"{world['title']}: the teacher answers {teacher['value']:.1%} of {teacher['n']:,} "
        f"held-out questions, the warm start {start['value']:.1%}. TAID brings KL(teacher ‖ "
        f"student) from {before['kl']:.4f} to {taid['kl']:.4f} nats per token and agreement from "
        f"{before['agreement']:.1%} to {taid['agreement']:.1%}.",
    ]
    verdicts = [_verdict(other, paired(world, "TAID", other)) for other in OBJECTIVES
                if other != "TAID"]
    return [*told, "Caption KL, paired over the same captions: TAID is " + "; ".join(verdicts)
            + "."]


def _verdict(other: str, difference: Figure) -> str:
    assert difference.value is not None
    assert difference.stderr is not None
    if abs(difference.value) <= 2 * difference.stderr:
        word = "tied with"
    else:
        word = "better than" if difference.value < 0 else "worse than"
    return f"{word} {other} ({difference.value:+.3f} ± {difference.stderr:.3f} nats)"


def _provenance(document: dict[str, Any]) -> dict[str, str]:
    memory = document["memory"]
    hashes = ", ".join(f"{name}/{arm} {document['worlds'][name]['arms'][arm]['recipe_hash']}"
                       for name in document["worlds"] for arm in OBJECTIVES)
    return {
        "Command": f"taid-vlm demo --seed {document['seed']}",
        "Seed": str(document["seed"]),
        "Time": f"{document['seconds']:.0f} s",
        "Peak memory": f"{memory['largest_worker_rss_bytes'] / 2**30:.2f} GiB in the largest "
                       "worker process",
        "Machine": ", ".join(f"{key} {value}" for key, value in document["machine"].items()),
        "Versions": ", ".join(f"{key} {value}" for key, value in document["versions"].items()),
        "Recipe hashes": hashes,
    }
