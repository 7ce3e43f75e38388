"""The report of one run, from what its results.json holds."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from taid_vlm.report.data import Column, Curve, Example, Figure, Report, Row, Section, Table

FIGURES = (
    Column("kl", "KL(teacher ‖ student)", "lower", ".4f", "nats/token",
           "How far the student's next-token law is from the teacher's."),
    Column("reverse_kl", "KL(student ‖ teacher)", "lower", ".4f", "nats/token"),
    Column("agreement", "agreement", "higher", ".3f", "",
           "Share of tokens where both models' most likely token is the same."),
    Column("nll", "NLL of the data", "lower", ".4f", "nats/token"),
    Column("student_entropy", "entropy", "", ".3f", "nats"),
)
Answers = dict[str, list[str]]


def run_report(
    results: dict[str, Any], examples: tuple[Sequence[Any], Answers], recipe_yaml: str
) -> Report:
    """Tables of the held-out figures before and after, curves of the training, a gallery.

    Args:
        results: as in results.json.
        examples: (record, turn) questions, and the answers of "teacher", "before" and "after".
    """
    evaluation = results["eval"]
    section = Section(
        title="Held-out evaluation",
        text=_account(results),
        tables=_tables(evaluation),
        curves=curves(results["history"]),
        examples=gallery(*examples),
    )
    return Report(
        title="Distillation report", summary=_summary(results), sections=[section],
        provenance=provenance(results), recipe=recipe_yaml,
    )


def figure(summary: dict[str, Any] | None, key: str) -> Figure:
    """One figure of an evaluation summary, with its error and number of tokens."""
    if not summary or key not in summary:
        return Figure(None)
    return Figure(summary[key], summary.get(f"{key}_stderr"), summary.get("n_tokens"))


def figures_row(name: str, role: Any, summary: dict[str, Any] | None, columns: Any) -> Row:
    return Row(name, role, {column.key: figure(summary, column.key) for column in columns})


def _tables(evaluation: dict[str, Any]) -> list[Table]:
    before, after = evaluation["before"], evaluation["after"]
    if after is None:
        return []
    columns = [column for column in FIGURES if column.key in after]
    rows = [figures_row("before", "start", before, columns),
            figures_row("after", "main", after, columns)]
    tables = [Table("Student against teacher", columns, rows,
                    "Means per answer token ± standard error over answers.")]
    if len(after["by_category"]) > 1:
        rows = [figures_row(name, "", part, columns)
                for name, part in after["by_category"].items()]
        tables.append(Table("After training, per category", columns, rows))
    return tables


def curves(history: Sequence[dict[str, Any]], name: str = "student") -> list[Curve]:
    """Training and evaluation curves of one run's log history."""
    def points(key: str) -> list[tuple[float, float]]:
        return [(row["step"], row[key]) for row in history if key in row]

    drawn = [
        Curve("Training loss", "step", "nats/token", {name: points("loss")}),
        Curve("Interpolation t", "step", "t", {name: points("t")}),
        Curve("Agreement with the teacher", "step", "share of tokens",
              {name: points("agreement"), "held-out": points("eval_agreement")}),
        Curve("KL(teacher ‖ student)", "step", "nats/token",
              {name: points("kl"), "held-out": points("eval_kl")}),
    ]
    kept = (Curve(c.title, c.x_label, c.y_label, {k: v for k, v in c.series.items() if v})
            for c in drawn)
    return [curve for curve in kept if curve.series]


def gallery(questions: Sequence[Any], answers: Answers) -> list[Example]:
    """One card per question; `questions` are (record, turn)."""
    cards = []
    for index, (record, turn) in enumerate(questions):
        given = {name: texts[index] for name, texts in answers.items() if texts}
        cards.append(Example(
            image=png(record.images[0].load()) if record.images else None,
            prompt=_question(record, turn), reference=record.answers[turn],
            category=record.category(turn), answers=given,
        ))
    return cards


def png(image: Any) -> bytes:
    """PNG bytes, at most 512 pixels wide or high."""
    image = image.copy()
    image.thumbnail((512, 512))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _question(record: Any, turn: int) -> str:
    """The user's last words before the `turn`-th answer."""
    asked = [message for message in record.before(turn) if message.role == "user"]
    return asked[-1].text.strip() if asked else ""


def _summary(results: dict[str, Any]) -> list[str]:
    before, after = results["eval"]["before"], results["eval"]["after"]
    if not before or not after or "kl" not in after:
        return [f"Trained for {results['train']['steps']} steps."]
    return [
        f"Held-out KL(teacher ‖ student) went from {before['kl']:.4f} to {after['kl']:.4f} nats "
        f"per answer token (± {after['kl_stderr'] or 0:.4f}), top-1 agreement from "
        f"{before['agreement']:.1%} to {after['agreement']:.1%}, "
        f"on {after['n_tokens']:,} tokens of {after['n_answers']:,} answers.",
    ]


def _account(results: dict[str, Any]) -> list[str]:
    """What the run did with the data and the pair, in sentences."""
    text, train, alignment = [], results["train"], results["alignment"]
    if alignment:
        after = results["eval"]["after"] or {}
        covered = f" {after['coverage']:.1%} of the held-out answers' tokens are compared." \
            if "coverage" in after else ""
        text.append(f"Alignment, case {alignment['case']}: {alignment['reason']}.{covered}")
        text.extend(alignment["warnings"])
    left_out = ", ".join(f"{n} x {reason}" for reason, n in train["records_left_out"].items())
    text.append(f"Training records left out: {left_out or 'none'}.")
    if train["adaptive_share"] is not None:
        acted = f"acted in {train['adaptive_share']:.0%} of the steps" \
            if train["adaptive_share"] else "never acted: t followed its linear floor"
        text.append(f"TAID's adaptive term {acted} (alpha = {train['alpha']:.3g}).")
    return text


def provenance(results: dict[str, Any]) -> dict[str, str]:
    """What is needed to repeat the run, as label -> text."""
    train, memory = results["train"], results["memory"]
    models = {role.capitalize(): f"{model['name']} ({model['model_type']}, "
              f"{model['parameters']:,} parameters)" for role, model in results["models"].items()}
    return {
        **models,
        "Seed": str(results["seed"]),
        "Recipe hash": results["recipe_hash"],
        "Training": f"{train['steps']} steps, {train['seconds']:.0f} s",
        "Peak memory": f"{memory['peak_rss_bytes'] / 2**30:.2f} GiB",
        "Machine": ", ".join(f"{key} {value}" for key, value in results["machine"].items()),
        "Versions": ", ".join(f"{key} {value}" for key, value in results["versions"].items()),
    }
