"""The miniature's page and its Markdown table, made of nothing but what results.json holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from miniature.cut import KEPT
from miniature.exposure import LENGTH
from miniature.intervals import interval
from miniature.pairs import FIGURES as PAIR_FIGURES
from miniature.pairs import START, TEACHER
from taid_vlm.report import Column, Curve, Figure, Report, Row, Section, Table

COLUMNS = (
    Column("jeffreys", "Jeffreys", "lower", ".3f", "nats", "KL(truth ‖ student) + KL(student ‖ "
           "truth): the one figure that favours neither direction; learning rates are chosen by "
           "it."),
    Column("kl", "KL(truth ‖ student)", "lower", ".3f", "nats"),
    Column("reverse_kl", "KL(student ‖ truth)", "lower", ".3f", "nats"),
    Column("tv", "total variation", "lower", ".3f"),
    Column("entropy", "entropy", "", ".3f", "nats"),
    Column("head", "head mass", "", ".3f", "", "On the likeliest symbols of each context, up to "
           "half of its mass and with the symbol that passes it."),
    Column("junk", "junk mass", "", ".3f", "", "On symbols behind 98 % of each context's mass."),
)
OWN_COLUMNS = (
    Column("jeffreys", "Jeffreys, language's texts", "lower", ".3f", "nats"),
    Column("own_jeffreys", "Jeffreys, own texts", "lower", ".3f", "nats", "Learning rates are "
           "chosen by it."),
    Column("excess", "exposure bias", "lower", ".3f", "nats", "The second less the first."),
    Column("kl", "KL(truth ‖ student), language's", "lower", ".3f", "nats"),
    Column("own_kl", "KL(truth ‖ student), own", "lower", ".3f", "nats"),
    Column("reverse_kl", "KL(student ‖ truth), language's", "lower", ".3f", "nats"),
    Column("own_reverse_kl", "KL(student ‖ truth), own", "lower", ".3f", "nats", "Times the "
           "symbols of a text it is the KL of whole texts."),
)
MODEL_COLUMNS = {
    "kl": Column("kl", "KL(teacher ‖ student)", "lower", ".4f", "nats/token"),
    "agreement": Column("agreement", "agreement", "higher", ".3f"),
    "nll": Column("nll", "NLL", "lower", ".4f", "nats/token"),
    "caption_kl": Column("caption_kl", "caption KL", "lower", ".3f", "nats/caption",
                         "KL(truth ‖ model) of whole captions, unbiased."),
    "accuracy": Column("accuracy", "accuracy", "higher", ".3f"),
}
RULE = ("A claim is reproduced if the whole 95 % interval of each of its differences lies on the "
        "claimed side of zero, not reproduced if the whole interval of any lies on the other side, "
        "and a tie otherwise. Differences are paired by seed; nothing is corrected for the number "
        "of claims.")
# drawn over a training; more lines than these cannot be told apart
CURVES = ("KL", "RKL", "JSD", "Skew KL", "TAID", "TAID, t to 0.7")
SHOWN = ("KL", "RKL", "JSD", "Skew KL", "TAID")


Document = Mapping[str, Any]  # results.json, or a part of it


def miniature_report(document: Document) -> Report:
    """The whole page; sections of parts that were not asked for are not there."""
    parts, scale = document["parts"], document["scale"]
    makers = {"language": _language, "gap": _gap, "sweeps": _sweeps, "theory": _theory,
              "since": _since, "cut": _cut, "exposure": _exposure}
    sections = [_claims(document["claims"])]
    sections += [make(parts[name], scale["exact"]) for name, make in makers.items()
                 if name in parts]
    if "scenes" in parts:
        sections.append(_scenes(parts["scenes"], scale["models"]))
    if "pretrain" in parts:
        sections += _pretrain(parts["pretrain"], scale)
    return Report("The TAID paper in miniature", summary(document["claims"]), sections,
                  provenance(document))


def summary(claims: Sequence[Document]) -> list[str]:
    """How many claims came out how, and which did not."""
    ours = [claim for claim in claims if claim["in_the_paper"]]
    counts = Counter(claim["verdict"] for claim in ours)
    told = [f"Of {len(ours)} claims, {counts['reproduced']} are reproduced, {counts['tie']} are "
            f"ties and {counts['not reproduced']} are not reproduced at this size. {RULE}"]
    for verdict in ("reproduced", "tie", "not reproduced"):
        named: dict[str, list[str]] = {}
        for claim in ours:
            if claim["verdict"] == verdict:
                named.setdefault(claim["part"], []).append(claim["claim"].rstrip("."))
        if named:
            told.append(f"{verdict.capitalize()}: " + ". ".join(
                f"{part.capitalize()}: {'; '.join(texts)}" for part, texts in named.items()) + ".")
    return told


def sentence(claim: Document) -> str:
    """A claim, its verdict, and the numbers that decide it."""
    beyond = "" if claim["in_the_paper"] else " (Not a claim of the paper.)"
    numbers = "; ".join(f"{c['name']} {_signed(c['value'])} [{_signed(c['low'])}, "
                        f"{_signed(c['high'])}]" for c in claim["contrasts"])
    return f"{claim['verdict'].upper()}, {claim['part']}: {claim['claim']}{beyond} {numbers}."


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _claims(claims: Sequence[Document]) -> Section:
    return Section("Claim by claim", ["Differences, with their 95 % intervals in brackets.", *(
        sentence(claim) for claim in claims)])


# ----- the exact language ------------------------------------------------------------------------


def _language(part: Document, setup: Document) -> Section:
    facts, methods = part["facts"], part["methods"]
    shares = ", ".join(f"{name} {one['active_share']:.0%}" for name, one in methods.items()
                       if one["active_share"] is not None)
    return Section(
        "Exact language",
        [f"{facts['symbols']} symbols, each drawn from one of {facts['laws']:,} known laws that "
         "the last two symbols choose; a student is a low-rank network of "
         f"{facts['student_parameters']:,} numbers and cannot hold them all. The teacher is the "
         f"truth. {setup['seeds']} seeds; every seed has one warm start "
         f"({setup['warm_steps']} steps of text), which all objectives share, and then "
         f"{setup['steps']:,} steps of {setup['batch']} symbols. Figures are exact sums over "
         "all contexts, not samples.",
         _tuning(methods, setup),
         f"TAID's adaptive term (alpha: auto) decided t in this share of the steps: {shares}."],
        [Table("Figures of the students", list(COLUMNS), [
            Row("The truth", "teacher", _exact(facts["truth"])),
            Row("Warm start", "start", _intervals(_means(facts["warm"]))),
            *_rows(methods)], "Mean ± standard error over seeds.")],
        _training_curves(methods))


def _tuning(methods: Document, setup: Document, criterion: str = "mean Jeffreys") -> str:
    edge = [name for name, one in methods.items() if one["tuning"]["at_the_edge"]]
    rates = ", ".join(f"{name} {one['rate']:g}" for name, one in methods.items())
    return (f"Learning rates: every objective tried {', '.join(map('{:g}'.format, setup['rates']))}"
            f" on {setup['tuning_seeds']} other seeds, and took the one with the lowest "
            f"{criterion}: {rates}. At the edge of the grid: {', '.join(edge) or 'none'}.")


def _training_curves(methods: Document) -> list[Curve]:
    def series(key: str) -> dict[str, Any]:
        return {name: one["curves"][key] for name, one in methods.items()
                if name in CURVES and key in one["curves"]}

    return [Curve("Jeffreys in training", "step", "nats", series("jeffreys"), log_y=True),
            Curve("Entropy in training", "step", "nats", series("entropy")),
            Curve("TAID's t", "step", "t", series("t"))]


def _gap(part: Document, setup: Document) -> Section:
    quality = [teacher["figures"]["jeffreys"] for teacher in part["teachers"]]
    columns = [Column(str(i), f"teacher {i + 1}", "lower", ".3f", "nats",
                      f"A teacher of {t['parameters']:,} numbers.")
               for i, t in enumerate(part["teachers"])]
    teachers = Row(TEACHER, "teacher", {
        str(i): Figure(value, 0.0, 1) for i, value in enumerate(quality)})
    rows = [Row(name, "main" if name == "TAID" else "baseline", {
        str(i): _figure(one["intervals"]["jeffreys"]) for i, one in enumerate(each)})
        for name, each in part["methods"].items()]
    return Section(
        "Capacity gap",
        ["One student, four teachers. Every teacher is a network that has learned the language's "
         "laws, larger each time; all objectives keep the learning rate that was chosen with the "
         "truth as the teacher."],
        [Table("Jeffreys to the truth", columns, [teachers, *rows],
               "Mean ± standard error over seeds; the teachers are one each.")],
        [Curve("Student against teacher", "Jeffreys of the teacher (better to the left)", "nats",
               {name: [(q, one["intervals"]["jeffreys"]["value"])
                       for q, one in zip(quality, part["methods"][name], strict=True)]
                for name in SHOWN})])


def _sweeps(part: Document, setup: Document) -> Section:
    share = Column("share", "adaptive share", "", ".2f", "",
                   "Share of steps in which the adaptive term, not the linear floor, decided t.")
    tables = [Table(f"{kind}", [COLUMNS[0], *COLUMNS[1:5], share], [
        Row(value, "", {**_intervals(one["intervals"]), "share": Figure(one["active_share"])})
        for value, one in values.items()]) for kind, values in part.items()]
    curves = [Curve(f"t by {kind}", "step", "t", {
        value: one["curves"]["t"] for value, one in values.items()})
        for kind, values in part.items()]
    return Section(
        "TAID's schedule",
        ["One setting changed at a time; the others are t from 0.4 to 1, adaptive, alpha: auto. "
         "All have TAID's learning rate. With the paper's constant alpha the adaptive term does "
         f"not act in runs of {setup['steps']:,} steps: see its share."], tables, curves)


def _since(part: Document, setup: Document) -> Section:
    return Section(
        "Objectives since TAID",
        ["As in the exact language, with the same starts, texts and tuning.",
         _tuning(part, setup)],
        [Table("Figures of the students", list(COLUMNS), _rows(part),
               "Mean ± standard error over seeds.")])


def _cut(part: Document, setup: Document) -> Section:
    return Section(
        "A few entries of the teacher's law",
        [f"As in the exact language, but of each law the student is shown the {KEPT} likeliest "
         "entries (alone, or with the mass of the rest), or as many draws from it.",
         _tuning(part, setup)],
        [Table("Figures of the students", list(COLUMNS), _rows(part),
               "Mean ± standard error over seeds.")])


def _exposure(part: Document, setup: Document) -> Section:
    curves = [Curve(f"{label} by position in the student's own texts", "symbol", "nats", {
        name: one["positions"][kind] for name, one in part.items()})
        for kind, label in (("kl", "KL(truth ‖ student)"), ("reverse_kl", "KL(student ‖ truth)"))]
    return Section(
        "Exposure bias, off and on policy",
        [f"Off policy a student learns in texts of the language, on policy in its own (begun with "
         f"a context of the language, gone on with by one symbol a step, {LENGTH} symbols long), "
         "with half in both. It is measured in both kinds of texts; own texts are weighed by how "
         "often the student's laws lead to a context, so that these are sums, too, not samples.",
         _tuning(part, setup, "mean Jeffreys in own texts")],
        [Table("In the language's texts and in the student's own", list(OWN_COLUMNS), _rows(part),
               "Mean ± standard error over seeds.")], curves)


def _theory(part: Document, setup: Document) -> Section:
    def told(name: str, case: Document) -> str:
        ends = [f"{way.replace('_', '-')} collapses at round {case[way]['collapse_at']}"
                if case[way]["collapse_at"] is not None else f"{way.replace('_', '-')} never does"
                for way in ("self_distillation", "taid")]
        return (f"{name.capitalize()} (‖z₀‖ = {case['strength']:.2f} s, sufficient for TAID: "
                f"{case['sufficient_strength']:.2f} s): {', '.join(ends)}. Self-distillation is "
                f"safe for {case['safe_rounds']:.1f} rounds, TAID from round "
                f"{case['taid_safe_after']:.1f} on.").replace("taid", "TAID")

    curves = [Curve(f"Norm of the targets, {name}", "round", "‖z‖", {
        "TAID": list(enumerate(case["taid"]["norms"])),
        "self-distillation": list(enumerate(case["self_distillation"]["norms"])),
        "collapse below s": [(0, case["s"]), (case["rounds"], case["s"])]})
        for name, case in part.items()]
    return Section("Theory: kernel regression in rounds",
                   [told(name, case) for name, case in part.items()], curves=curves)


# ----- small models ------------------------------------------------------------------------------


def _scenes(arms: Document, models: Document) -> Section:
    return Section(
        "Instruction: a small VLM on drawn scenes",
        [f"The demo's LLaVA teaches the demo's InternVL through ordinary recipes: "
         f"{models['seeds']} seeds, {models['steps']} steps of 16 conversations from one warm "
         f"start, {models['records']} held-out records. One learning rate for all objectives: here "
         "it is not tuned. Claims are by caption KL, which compares with the truth."],
        _arm_tables(arms, "scenes"), _arm_curves(arms))


def _pretrain(part: Document, scale: Document) -> list[Section]:
    models, setup, arms = scale["models"], scale["exact"], part["text"]
    return [
        Section(
            "Pre-training: plain text from random weights",
            [f"Texts without chat marks; the teacher is a Qwen3 that has learned them, the student "
             f"a Llama with random weights, another draw for every seed. {models['seeds']} seeds, "
             f"{models['steps']} steps of 16 texts, {models['records']} held-out texts, one "
             "learning rate for all objectives."],
            _arm_tables(arms, "text"), _arm_curves(arms)),
        Section(
            "Pre-training: the exact language from random weights",
            [f"As above with the warm start left out; learning rates chosen anew. "
             f"{setup['seeds']} seeds. {_tuning(part['language'], setup)}"],
            [Table("Figures of the students", list(COLUMNS), _rows(part["language"]),
                   "Mean ± standard error over seeds.")],
            _training_curves(part["language"])),
    ]


def _arm_tables(arms: Document, world: str) -> list[Table]:
    """Twice the same means: with the error over seeds, and with that over records."""
    shown = {START: "Random weights"} if world == "text" else {}

    def rows(names: Sequence[str], error: str, count: str) -> list[Row]:
        return [Row(shown.get(name, name), _role(name), {
            figure: Figure(found["value"], found[error], found[count])
            for figure, found in arms[name]["pooled"].items()}) for name in names]

    columns = [MODEL_COLUMNS[figure] for figure in PAIR_FIGURES[world]]
    return [Table("Held-out figures, ± over seeds", columns,
                  rows(_trained(arms), "over_seeds", "seeds")),
            Table("The same, ± over held-out records", columns,
                  rows([TEACHER, START, *_trained(arms)], "over_records", "records"))]


def _trained(arms: Document) -> list[str]:
    return [name for name in arms if name not in (TEACHER, START)]


def _arm_curves(arms: Document) -> list[Curve]:
    def series(key: str) -> dict[str, Any]:
        rows = {arm: arms[arm]["seeds"][0]["history"] for arm in _trained(arms)}
        found = {arm: [(row["step"], row[key]) for row in history if key in row]
                 for arm, history in rows.items()}
        return {arm: points for arm, points in found.items() if points}

    drawn = [Curve("KL(teacher ‖ student) in training, first seed", "step", "nats/token",
                   series("kl")),
             Curve("TAID's t, first seed", "step", "t", series("t"))]
    return [curve for curve in drawn if curve.series]


# ----- cells -------------------------------------------------------------------------------------


def _rows(methods: Document) -> list[Row]:
    return [Row(name, _role(name), _intervals(one["intervals"])) for name, one in methods.items()]


def _role(name: str) -> Any:
    return {TEACHER: "teacher", START: "start", "TAID": "main"}.get(name, "baseline")


def _figure(found: Mapping[str, Any]) -> Figure:
    return Figure(found["value"], found["stderr"], found["n"])


def _intervals(found: Mapping[str, Any]) -> dict[str, Figure]:
    return {name: _figure(one) for name, one in found.items()}


def _means(values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    return {name: interval(each).as_json() for name, each in values.items()}


def _exact(values: Mapping[str, Sequence[float]]) -> dict[str, Figure]:
    return {name: Figure(each[0], 0.0) for name, each in values.items()}


def provenance(document: Document) -> dict[str, str]:
    """What is needed to repeat it, and what it took."""
    return {
        "Command": document["command"],
        "Time": f"{document['seconds']:.0f} s, {document['cpu_seconds']:.0f} s of CPU, "
                f"{document['workers']} processes",
        "Machine": ", ".join(f"{key} {value}" for key, value in document["machine"].items()),
        "Versions": ", ".join(f"{key} {value}" for key, value in document["versions"].items()),
    }


# ----- Markdown ----------------------------------------------------------------------------------


def markdown(document: Document) -> str:
    """The claims, and tables of the exact language, with the command that made them."""
    lines = [f"`{document['command']}`: {document['seconds']:.0f} s, "
             f"{document['cpu_seconds']:.0f} s of CPU.", "",
             "| claim | measured on | verdict |", "|---|---|---|"]
    lines += [f"| {c['claim'].rstrip('.')} | {c['part']} | {c['verdict']} |"
              for c in document["claims"] if c["in_the_paper"]]
    lines += ["", "Not in the paper:", "", "| claim | measured on | difference, 95 % interval | "
              "verdict |", "|---|---|---|---|"]
    lines += [f"| {c['claim'].rstrip('.')} | {c['part']} | {_differences(c)} | {c['verdict']} |"
              for c in document["claims"] if not c["in_the_paper"]]
    parts = document["parts"]
    if "language" in parts:
        truth = parts["language"]["facts"]["truth"]
        lines += ["", *_method_table(parts["language"]["methods"], _CHOSEN, truth)]
    for name, columns in (("since", _CHOSEN), ("cut", COLUMNS), ("exposure", OWN_COLUMNS)):
        if name in parts:
            lines += ["", *_method_table(parts[name], columns)]
    return "\n".join(lines) + "\n"


_CHOSEN = tuple(column for column in COLUMNS if column.key != "head")


def _differences(claim: Document) -> str:
    return "; ".join(f"{_signed(c['value'])} [{_signed(c['low'])}, {_signed(c['high'])}]"
                     for c in claim["contrasts"])


def _method_table(
    methods: Document, columns: Sequence[Column], truth: Mapping[str, Sequence[float]] | None = None
) -> list[str]:
    labels = " | ".join(c.label + {"lower": " ↓", "": ""}.get(c.better, "") for c in columns)
    lines = [f"| | {labels} |", "|---" * (len(columns) + 1) + "|"]
    if truth is not None:
        lines.append(f"| the truth | {' | '.join(f'{truth[c.key][0]:.3f}' for c in columns)} |")
    for name, one in methods.items():
        cells = " | ".join(f"{_unsigned(one['intervals'][c.key]['value'])} ± "
                           f"{one['intervals'][c.key]['stderr']:.3f}" for c in columns)
        lines.append(f"| {name} | {cells} |")
    return lines


def _unsigned(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")
