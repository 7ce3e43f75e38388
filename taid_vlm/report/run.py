"""The report of one run, from what its results.json holds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taid_vlm.evaluation.pairs import Arm, Paired
from taid_vlm.io.files import write_text
from taid_vlm.io.images import png
from taid_vlm.report.card import model_card, public_name
from taid_vlm.report.columns import AGAINST, ALONE, FIGURES, LOOKS, MASSES
from taid_vlm.report.data import (
    Column,
    Curve,
    Example,
    Figure,
    Report,
    Role,
    Row,
    Section,
    Table,
)
from taid_vlm.report.judge import is_finite
from taid_vlm.report.page import write_report
from taid_vlm.runs import results as of_run
from taid_vlm.runs.results import HeldOut, Means, Model, Results, of_teacher

if TYPE_CHECKING:  # a page needs no torch
    from taid_vlm.evaluation.answers import AnswerPair
    from taid_vlm.records import ImageRef
    from taid_vlm.runs.measure import Outcome

MOVES = ("TAID's loss is against a target that moves with t, so it may rise while the student "
         "learns; what is comparable between steps is the KL.")
SPEED = "answer_tokens_per_second"
RATE = "learning_rate/"  # before a part's name, where parts have learning rates of their own
Named = tuple[str, Role, Means | None]  # a row: its name, its role, and where its figures are


def write_run_report(outcome: Outcome, recipe_yaml: str, path: Path) -> None:
    """`run_report` as a page, see there, and the model card beside the student's weights."""
    student = path.parent / "student"
    if student.is_dir():
        card = model_card(outcome.results.model_dump(by_alias=True), recipe_yaml)
        write_text(card, student / "README.md")
    from taid_vlm.evaluation.answers import FILE, read_answers

    answers = read_answers(path.parent / FILE) if outcome.answers else []
    write_report(run_report(outcome.results, outcome.images, recipe_yaml, answers), path)


def run_report(
    results: Results, images: Sequence[ImageRef | None], recipe_yaml: str,
    answers: Sequence[AnswerPair] = (),
) -> Report:
    """Tables of the held-out figures before and after, curves of the training, a gallery.

    Args:
        images: of `results.examples`, None for text.
        answers: to the held-out records before and after, for the interval of the verdict.
    """
    section = Section(
        title="Held-out evaluation",
        text=_account(results),
        tables=[*_tables(results), *_stages(results), *_looks(results)],
        curves=curves(results.history),
        examples=[_card(*pair) for pair in zip(results.examples, images, strict=True)],
    )
    return Report(
        title=_title(results), summary=_summary(results, answers), sections=[section],
        provenance=provenance(results), recipe=recipe_yaml,
    )


def figures_table(
    title: str, columns: Iterable[Column], rows: Sequence[Named], caption: str = ""
) -> Table:
    """Figures with their errors, in the columns that some row has a figure for."""
    shown = [column for column in columns
             if any(means and column.key in means.figures for _, _, means in rows)]
    return Table(title, shown, [Row(name, role, {
        column.key: _figure(means, column.key) for column in shown})
        for name, role, means in rows], caption)


def _figure(means: Means | None, key: str) -> Figure:
    if means is None or key not in means.figures:
        return Figure(None)
    # moments, categories and teachers of one run are no competitors
    return Figure(means.figures[key], means.figures.get(f"{key}_stderr"), means.n_tokens,
                  verdict="")


def _tables(results: Results) -> list[Table]:
    after = results.eval.after
    if after is None:
        return []
    rows: list[Named] = [("before", "start", results.eval.before), ("after", "main", after)]
    parts: list[Named] = [(name, "", part) for name, part in after.by_category.items()]
    tables = [
        figures_table("Student against teacher", AGAINST, rows,
                      "Means per answer token ± standard error over answers."),
        figures_table("The student alone", ALONE, rows),
        *([figures_table("After training, against each teacher", FIGURES, [
            (name, "", of_teacher(after, name)) for name in results.teachers],
            "Over the tokens of the records that a teacher has a share in.")]
          if results.teachers else []),
        figures_table("Where the probability goes", MASSES, rows),
        *([figures_table(f"After training, per category: {name}", columns, parts)
           for name, columns in (("against the teacher", AGAINST), ("alone", ALONE))]
          if len(parts) > 1 else []),
    ]
    return [table for table in tables if table.columns]


def _looks(results: Results) -> list[Table]:
    """Whether the models look at their images."""
    canary, own = results.canary, results.train.on_policy
    if canary is None:
        return []
    after = canary.student.after
    rows: list[Named] = [("student before", "start", canary.student.before),
                         ("student after", "main", after)]
    if own is not None and own.look is not None:
        rows.append(("student after, in answers of its own", "", own.look))
    if canary.teacher is not None:
        rows.insert(0, ("teacher", "teacher", canary.teacher))
    rows = [*((f"teacher {name}", "teacher", look) for name, look in canary.teachers.items()),
            *rows]
    partners = f"; {after.without_partner} of them have no partner to swap images with" \
        if after.without_partner else ""
    caption = (f"Means per answer token ± standard error over {after.n_records} records with "
               f"images{partners}. Every model is compared with itself.")
    return [figures_table("Does it look?", LOOKS, rows, caption)]


def _stages(results: Results) -> list[Table]:
    """The way through the stages of a run, this one last."""
    if not results.stages or results.eval.after is None:
        return []
    done = [(stage.name, stage.steps, stage.eval.after) for stage in results.stages]
    done.append(("this one", results.train.steps, results.eval.after))
    return [figures_table("Stages", FIGURES, [
        ("start", "start", results.stages[0].eval.before),
        *((f"after {name} ({steps} steps)", "", after) for name, steps, after in done)])]


def curves(history: Sequence[dict[str, Any]]) -> list[Curve]:
    """Training and evaluation curves of one run's log history."""
    def points(key: str) -> list[tuple[float, float]]:
        return [(row["step"], row[key]) for row in history if key in row]

    parts = dict.fromkeys(key.removeprefix(RATE) for row in history for key in row
                          if key.startswith(RATE))
    drawn = [
        Curve("KL(teacher ‖ student)", "step", "nats/token",
              {"student": points("kl"), "held-out": points("eval_kl")}),
        Curve("Agreement with the teacher", "step", "share of tokens",
              {"student": points("agreement"), "held-out": points("eval_agreement")}),
        Curve("Training loss", "step", "nats/token", {"student": points("loss")}, caption=MOVES
              if points("t") else ""),
        Curve("Interpolation t", "step", "t", {"student": points("t")}),
        Curve("Throughput", "step", "answer tokens/s", {"student": points(SPEED)}),
        Curve("Learning rates", "step", "", {part: points(RATE + part) for part in parts}),
    ]
    kept = (Curve(c.title, c.x_label, c.y_label, {k: v for k, v in c.series.items() if v})
            for c in drawn)
    return [curve for curve in kept if curve.series]


def _card(example: of_run.Example, image: ImageRef | None) -> Example:
    return Example(png(image.still()) if image else None, example.prompt, example.reference,
                   example.category, example.answers, progress=example.progress)


def _title(results: Results) -> str:
    """Whom the student learned from, and how."""
    models = results.models | {name: one.model for name, one in results.teachers.items()}
    teachers = [public_name(model.name) for role, model in models.items() if role != "student"]
    objective = results.objective
    terms = objective.get("terms") or [objective] if isinstance(objective, dict) else [objective]
    names = [str(term.get("name") if isinstance(term, dict) else term) for term in terms]
    source = f" distilled from {' and '.join(teachers)}" if teachers else " fine-tuned"
    return f"{public_name(models['student'].name)}{source} by {' + '.join(names)}"


def _summary(results: Results, answers: Sequence[AnswerPair]) -> list[str]:
    before, after = results.eval.before, results.eval.after
    if not before or not after:
        return [f"Trained for {results.train.steps} steps."]
    if "kl" not in after.figures:
        return [_went("NLL of the data", "nll", "token accuracy", "token_accuracy", before, after)]
    return [
        *verdict(before.figures["kl"], after.figures["kl"], answers, results.history),
        _went("KL(teacher ‖ student)", "kl", "top-1 agreement", "agreement", before, after)]


def _went(
    what: str, key: str, share: str, share_key: str, before: HeldOut, after: HeldOut
) -> str:
    first, last = before.figures, after.figures
    stderr = last[f"{key}_stderr"]
    error = f" (± {stderr:.4f})" if is_finite(stderr) else ""
    return (f"Held-out {what} went from {first[key]:.4f} to {last[key]:.4f} nats per answer "
            f"token{error}, {share} from {first[share_key]:.1%} to {last[share_key]:.1%}, on "
            f"{after.n_tokens:,} tokens of {after.n_answers:,} answers.")


def verdict(
    before: float, after: float, answers: Sequence[AnswerPair], history: Sequence[dict[str, Any]]
) -> list[str]:
    """How much of the gap to the teacher was closed, from 0 % (the student at the start) to 100 %
    (the teacher), with a 95 % interval over records; nothing where there was no gap."""
    if not (is_finite(before) and is_finite(after) and before > 0):
        return []
    rows = [(one.before["kl"], one.after["kl"], one.size("kl"), one.key[0]) for one in answers
            if one.after.get("kl") is not None and one.before.get("kl") is not None]
    closed, interval, moved = 1 - after / before, "", True
    if rows:  # as `compare` has it
        first, last, tokens, sources = (list(column) for column in zip(*rows, strict=True))
        paired = Paired({name: Arm([scores], trained=False) for name, scores in (
            ("teacher", [0.0] * len(rows)), ("base", first), ("student", last))}, tokens, sources)
        share_of_gap = paired.recovered("student", "base", "teacher").share
        moved = paired.difference("base", "student").significant
        if share_of_gap is not None and is_finite(share_of_gap.low):
            interval = f" [{100 * share_of_gap.low:.0f}, {100 * share_of_gap.high:.0f}]"
    share = f"{100 * closed:.0f} %{interval} of the gap to the teacher"
    said = (f"{share} closed" if moved and closed > 0 else
            f"The student moved away from its teacher: {share}" if moved else
            f"No gain that stands out from chance: {share} closed")
    return [f"{said}{_trend(history)}. (0 %: the student before, 100 %: its teacher.)"]


def _trend(history: Sequence[dict[str, Any]]) -> str:
    """Where the held-out KL was going at the end; "" for fewer than three evaluations."""
    points = [(row["eval_kl"], row["step"]) for row in history if is_finite(row.get("eval_kl"))]
    if len(points) < 3:
        return ""
    (last, _), (best, step) = points[-1], min(points)
    if last > best * 1.01:
        return f"; best at step {step}, worse since"
    return "; still improving" if last < 0.99 * points[-2][0] else "; levelled off"


def _account(results: Results) -> list[str]:
    """What the run did with the data and the pair, in sentences."""
    text, train, alignment = [], results.train, results.alignment
    text.extend(results.canary.warnings if results.canary else [])
    pairs = {f"Teacher {name}: ": one.alignment for name, one in results.teachers.items()}
    for who, pair in ({"": alignment} if alignment else pairs).items():
        text.append(f"{who}Alignment, case {pair.case}: {pair.reason}."
                    f"{'' if who else _coverage(results.eval.after)}")
        text.extend(who + warning for warning in pair.warnings)
    models = {"The teacher": results.models.get("teacher")} | {
        f"The teacher {name}": one.model for name, one in results.teachers.items()}
    for who, model in models.items():
        if model is not None and (cache := model.cache) is not None:
            text.append(f"{who} was not loaded: what it says is from '{cache.folder}', "
                        f"{cache.bytes_per_token:,.0f} bytes an answer token. Whether it looks at "
                        "its images was not measured.")
    frozen = [f"{part} ({count['parameters']:,})"
              for part, count in results.models["student"].parts.items() if not count["trained"]]
    if frozen:
        text.append(f"Not trained (parameters): {', '.join(frozen)}.")
    left_out = ", ".join(f"{n} x {reason}" for reason, n in train.records_left_out.items())
    text.append(f"Training records left out: {left_out or 'none'}.")
    text.extend(f"In {n} training records: {note}." for note, n in train.without_effect.items())
    if (own := train.on_policy) is not None:
        unused = ", ".join(f"{n} x {reason}" for reason, n in own.unused.items())
        text.append(
            f"On policy: {own.share:.0%} of the rows were learned from answers that the student "
            f"gave itself ({own.sampled:,} answers, {own.reused:,} of them learned again; "
            f"{own.cut:,} cut, {own.repeating:,} repeating). Not learned, but the record's own "
            f"instead: {unused or 'none'}. Sampling took {own.seconds / train.seconds:.0%} of the "
            "time of one process.")
        if (engine := own.engine) is not None:
            text.append(
                f"'{engine.name}' on a server sampled: it was given the student's weights "
                f"{engine.syncs:,} times in {engine.sync_seconds:,.0f} seconds, and its tokens' "
                f"log-probabilities differ by {engine.gap:.2g} nats from the student's here.")
    if train.skipped_steps:
        reasons = ", ".join(f"{n} x {reason}" for reason, n in train.skipped_steps.items())
        text.append(f"Steps not applied: {reasons}.")
    text.extend(f"Source {name}: {rows['read']:,} rows read, {rows['used']:,} used, "
                f"{rows['left_out']:,} left out." for name, rows in train.sources.items())
    if train.unread_columns:
        columns = ", ".join(f"{name} ({n:,} rows)" for name, n in train.unread_columns.items())
        text.append(f"Columns that nothing reads: {columns}.")
    if train.adaptive_share is not None:
        acted = f"acted in {train.adaptive_share:.0%} of the steps" \
            if train.adaptive_share else "never acted: t followed its linear floor"
        text.append(f"TAID's adaptive term {acted} (alpha = {train.alpha:.3g}).")
        text.append(MOVES)
    return text


def _coverage(after: HeldOut | None) -> str:
    return "" if after is None else \
        f" {after.coverage:.1%} of the held-out answers' tokens are compared."


def provenance(results: Results) -> dict[str, str]:
    """What is needed to repeat the run, as label -> text."""
    train, loss = results.train, results.train.loss_implementation
    named = {f"Teacher {name}": one.model for name, one in results.teachers.items()}
    models = {role.capitalize(): f"{model.name} ({model.model_type}, {model.parameters:,} "
              f"parameters{_served(model)})" for role, model in (named | results.models).items()}
    return {
        **models,
        "Seed": str(results.seed),
        "Recipe hash": results.recipe_hash,
        "Training": f"{train.steps} steps, {train.seconds:.0f} s" + (
            "" if (median := speed(results)) is None else
            f", {median:,.0f} answer tokens/s (median)"),
        **({} if loss is None else {"Loss": ", ".join(filter(None, (
            loss.name, *loss.bodies, loss.reason)))}),
        "Peak memory": ", ".join(
            f"{size / 2**30:.2f} GiB{' on the device' if 'device' in kind else ''}"
            for kind, size in results.memory.items()),
        "Machine": listed(results.machine), "Versions": listed(results.versions),
    }


def speed(results: Results) -> float | None:
    """Median answer tokens per second of the training."""
    speeds = [row[SPEED] for row in results.history if is_finite(row.get(SPEED))]
    return statistics.median(speeds) if speeds else None


def _served(model: Model) -> str:
    size = "" if model.bytes_per_token is None else \
        f", {model.bytes_per_token:,.0f} bytes per answer token on the wire"
    return "" if model.top_logprobs is None else \
        f", served: its {model.top_logprobs} most likely tokens and the rest{size}"


def listed(table: dict[str, Any]) -> str:
    """ "python 3.11, torch 2.11": of versions or a machine."""
    return ", ".join(f"{key} {value}" for key, value in table.items())
