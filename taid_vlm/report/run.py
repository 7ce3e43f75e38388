"""The report of one run, from what its results.json holds."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from taid_vlm.io.files import write_text
from taid_vlm.report.card import model_card
from taid_vlm.report.data import Column, Curve, Example, Figure, Report, Row, Section, Table
from taid_vlm.report.page import write_report
from taid_vlm.runs.results import STUDENT_FOLDER

FIGURES = (
    Column("kl", "KL(teacher ‖ student)", "lower", ".4f", "nats/token",
           "How far the student's next-token law is from the teacher's."),
    Column("reverse_kl", "KL(student ‖ teacher)", "lower", ".4f", "nats/token"),
    Column("jsd", "JSD", "lower", ".4f", "nats/token",
           "Jensen-Shannon divergence, the mean KL of both from their middle; at most log 2."),
    Column("agreement", "agreement", "higher", ".3f", "",
           "Share of tokens where both models' most likely token is the same."),
    Column("nll", "NLL of the data", "lower", ".4f", "nats/token"),
    Column("token_accuracy", "token accuracy", "higher", ".3f", "",
           "Share of the data's tokens that are the student's most likely ones."),
    Column("ece", "calibration error", "lower", ".4f", "",
           "How far the student's confidence in its most likely token is from its accuracy: mean "
           "distance over 15 bins of confidence, weighted by their tokens (ECE)."),
    Column("student_entropy", "entropy", "", ".3f", "nats"),
)
MASSES = (
    Column("head_mass", "head", "", ".4f", "",
           "The student's probability on the teacher's 10 most likely tokens."),
    Column("tail_mass", "tail", "", ".2e", "",
           "The student's probability on the fifth of all tokens that the teacher ranks last."),
    Column("teacher_head_mass", "teacher's head", "", ".4f", "",
           "What the teacher itself puts there."),
    Column("teacher_tail_mass", "teacher's tail", "", ".2e", ""),
)
LOOKS = (
    Column("kl_blank", "KL(real ‖ blank image)", "", ".4f", "nats/token",
           "How far a model's answers are from those with a grey image; 0: it does not look."),
    Column("kl_shuffled", "KL(real ‖ another's image)", "", ".4f", "nats/token",
           "The same against the image of another record."),
    Column("gain_blank", "gain over blank", "", ".4f", "nats/token",
           "Log-likelihood of the reference answer that the real image adds."),
    Column("gain_shuffled", "gain over another's", "", ".4f", "nats/token"),
)
Answers = dict[str, list[str]]
RATE = "learning_rate/"  # before a part's name, where parts have learning rates of their own


def write_run_report(
    results: dict[str, Any], examples: tuple[Sequence[Any], Answers], recipe_yaml: str, path: Path
) -> None:
    """`run_report` as a page, see there, and the model card beside the student's weights."""
    student = path.parent / STUDENT_FOLDER
    if student.is_dir():
        write_text(model_card(results, recipe_yaml), student / "README.md")
    write_report(run_report(results, examples, recipe_yaml), path)


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
        tables=[*_tables(evaluation), *_stages(results), *_looks(results["canary"])],
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
    masses = [column for column in MASSES if column.key in after]
    if masses:
        rows = [figures_row("before", "start", before, masses),
                figures_row("after", "main", after, masses)]
        tables.append(Table("Where the probability goes", masses, rows))
    if len(after["by_category"]) > 1:
        rows = [figures_row(name, "", part, columns)
                for name, part in after["by_category"].items()]
        tables.append(Table("After training, per category", columns, rows))
    return tables


def _looks(canary: dict[str, Any] | None) -> list[Table]:
    """Whether the models look at their images."""
    if canary is None:
        return []
    before, after = (canary["student"][when] for when in ("before", "after"))
    columns = [column for column in LOOKS if column.key in after]
    rows = [figures_row("student before", "start", before, columns),
            figures_row("student after", "main", after, columns)]
    if canary["teacher"]:
        rows.insert(0, figures_row("teacher", "teacher", canary["teacher"], columns))
    partners = f"; {after['without_partner']} of them have no partner to swap images with" \
        if after["without_partner"] else ""
    caption = (f"Means per answer token ± standard error over {after['n_records']} records with "
               f"images{partners}. Every model is compared with itself.")
    return [Table("Does it look?", columns, rows, caption)]


def _stages(results: dict[str, Any]) -> list[Table]:
    """The way through the stages of a run, this one last."""
    earlier, evaluation = results["stages"], results["eval"]
    if not earlier or evaluation["after"] is None:
        return []
    done = [(stage["name"], stage["steps"], stage["eval"]["after"]) for stage in earlier]
    done.append(("this one", results["train"]["steps"], evaluation["after"]))
    columns = [column for column in FIGURES if column.key in evaluation["after"]]
    rows = [figures_row("start", "start", earlier[0]["eval"]["before"], columns)]
    rows += [figures_row(f"after {name} ({steps} steps)", "", after, columns)
             for name, steps, after in done]
    return [Table("Stages", columns, rows)]


def curves(history: Sequence[dict[str, Any]], name: str = "student") -> list[Curve]:
    """Training and evaluation curves of one run's log history."""
    def points(key: str) -> list[tuple[float, float]]:
        return [(row["step"], row[key]) for row in history if key in row]

    parts = dict.fromkeys(key.removeprefix(RATE) for row in history for key in row
                          if key.startswith(RATE))
    drawn = [
        Curve("KL(teacher ‖ student)", "step", "nats/token",
              {name: points("kl"), "held-out": points("eval_kl")}),
        Curve("Agreement with the teacher", "step", "share of tokens",
              {name: points("agreement"), "held-out": points("eval_agreement")}),
        Curve("Training loss", "step", "nats/token", {name: points("loss")}),
        Curve("Interpolation t", "step", "t", {name: points("t")}),
        Curve("Learning rates", "step", "", {part: points(RATE + part) for part in parts}),
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
            prompt=record.question(turn), reference=record.answers[turn],
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
    text.extend((results["canary"] or {}).get("warnings", []))
    if alignment:
        after = results["eval"]["after"] or {}
        covered = f" {after['coverage']:.1%} of the held-out answers' tokens are compared." \
            if "coverage" in after else ""
        text.append(f"Alignment, case {alignment['case']}: {alignment['reason']}.{covered}")
        text.extend(alignment["warnings"])
    parts = results["models"]["student"]["parts"]
    frozen = [f"{part} ({count['parameters']:,})" for part, count in parts.items()
              if not count["trained"]]
    if frozen:
        text.append(f"Not trained (parameters): {', '.join(frozen)}.")
    left_out = ", ".join(f"{n} x {reason}" for reason, n in train["records_left_out"].items())
    text.append(f"Training records left out: {left_out or 'none'}.")
    if train["adaptive_share"] is not None:
        acted = f"acted in {train['adaptive_share']:.0%} of the steps" \
            if train["adaptive_share"] else "never acted: t followed its linear floor"
        text.append(f"TAID's adaptive term {acted} (alpha = {train['alpha']:.3g}).")
        text.append("TAID's loss is against a target that moves with t, so it may rise while the "
                    "student learns; what is comparable between steps is the KL.")
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
