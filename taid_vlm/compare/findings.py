"""What the figures say, in sentences; no method gets a favour."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from taid_vlm.compare.compare import AVERAGE, Comparison
from taid_vlm.compare.judging import Difference, Judged
from taid_vlm.compare.measures import AGAINST_TEACHER
from taid_vlm.compare.tables import direction
from taid_vlm.evaluation.pairs import Interval
from taid_vlm.report.page import number

DECISIVE = ("kl", "agreement", "nll")  # without benchmarks
FEW_SEEDS = 3


def findings(comparison: Comparison) -> list[str]:
    """The first sentence decides; then by how much, what ties, and what it does not say."""
    decisive = deciding(comparison)
    if not decisive:
        return ["These runs have no figure in common to be compared by."]
    average = [j for j in comparison.benchmarks if j.measure.column is AVERAGE]
    alone = len(comparison.names) == 1
    first, gap = [*average, *decisive][0], _gap([*average, *decisive], comparison)
    text = [gap, *(_against(j, comparison) for j in [*average, *decisive]),
            _held_out_gap(decisive, comparison)] if alone else [
        _verdict(decisive, comparison), _unequal(comparison), _against(first, comparison), gap,
        _besides(decisive, comparison)]
    return [sentence for sentence in [*text, _seeds(comparison)] if sentence]


def _unequal(comparison: Comparison) -> str:
    """Beside the verdict, since it may be why there is one."""
    return f"Not trained alike: {'; '.join(comparison.unequal)}." if comparison.unequal else ""


def deciding(comparison: Comparison) -> list[Judged]:
    """Benchmarks, where there are any; otherwise the held-out figures that say the most.

    Of all methods: who was not asked is not behind.
    """
    tasks = [j for j in comparison.benchmarks if j.measure.column is not AVERAGE]
    return _complete(tasks, comparison) or _held_out(comparison)


def _complete(judged: Sequence[Judged], comparison: Comparison) -> list[Judged]:
    return [j for j in judged if set(comparison.names) <= j.figures.keys() and (
        j.ranking or (len(comparison.names) == 1 and (j.pairs or j.recovered)))]


def _held_out(comparison: Comparison) -> list[Judged]:
    complete = {j.measure.column.key: j for j in _complete(comparison.held_out, comparison)}
    return [complete[key] for key in (*comparison.first, *DECISIVE) if key in complete]


def _besides(decisive: Sequence[Judged], comparison: Comparison) -> str:
    """What the held-out figures say where benchmarks decide."""
    others = _held_out(comparison)
    return f"On held-out data: {_verdict(others, comparison)}" \
        if others and others[0] is not decisive[0] else ""


def _held_out_gap(decisive: Sequence[Judged], comparison: Comparison) -> str:
    others = _held_out(comparison)
    return "" if others and others[0] is decisive[0] else _gap(others, comparison)


def _verdict(decisive: Sequence[Judged], comparison: Comparison) -> str:
    """A winner is ahead somewhere and behind nowhere. One seed per method speaks for two students
    and not for what they were trained by, so there the sentence is of these."""
    of_methods = all(j.verdicts for j in decisive)
    noun = "student" if any(method.runs for method in comparison.methods) else "model"
    told = "" if of_methods else f"This {noun} against that {noun}, one of each method: "
    wins = "wins: it is" if of_methods else "is"
    every = "every other method" if of_methods else "every other one"
    held_out = any(decisive[0] is j for j in comparison.held_out)
    kind = "held-out figures" if held_out else "benchmarks"
    of = f"{len(decisive)} {kind}" if len(decisive) > 1 else _label(decisive[0])
    ahead = {name: [j for j in decisive if j.ranking.get(name) == "best"]
             for name in comparison.names}
    never_behind = [name for name in comparison.names
                    if all(j.ranking.get(name) for j in decisive)]
    winners = [name for name in never_behind if ahead[name]]
    if winners:
        name = winners[0]
        ties = [j for j in decisive if j not in ahead[name]]
        rest = f" and ties on {_listed(map(_label, ties))}" if ties else ""
        return (f"{told}{name} {wins} significantly better than {every} on "
                f"{_listed(map(_label, ahead[name]))}{rest}.")
    if len(never_behind) > 1 and not any(ahead.values()):
        behind = [_behind(name, decisive) for name in comparison.names
                  if name not in never_behind]
        return (f"{told}{'No significant winner' if of_methods else 'no significant difference'}: "
                f"{_listed(never_behind)} tie on "
                f"{'all ' if len(decisive) > 1 else ''}{'; '.join([of, *behind])}.")
    led = [f"{name} is {'best' if of_methods else 'ahead'} on {_listed(map(_label, best))}"
           for name, best in ahead.items() if best]
    tied = [f"{_listed(j.leaders)} tie on {_label(j)}" for j in decisive
            if "best" not in j.ranking.values()]
    return f"{told}{'No overall winner' if of_methods else 'none is ahead throughout'}: " \
        f"{'; '.join([*led, *tied])}."


def _behind(name: str, decisive: Sequence[Judged]) -> str:
    lost = [_label(j) for j in decisive if not j.ranking.get(name)]
    return f"{name} is behind on {_listed(lost)}"


def _against(first: Judged, comparison: Comparison) -> str:
    """By how much, in the average over benchmarks or else in the first deciding figure."""
    changes = [f"{name} {_change(first, against)}" for name, against in first.against.items()]
    other = comparison.baseline if comparison.baseline in comparison.names else \
        f"the {comparison.baseline.lower()}"
    return f"Against {other}, {_label(first)}: {'; '.join(changes)}." \
        if changes else ""


def _change(judged: Judged, difference: Difference) -> str:
    """The difference with its interval, and whether it stands."""
    column, scale = judged.measure.column, judged.measure.scale
    interval = difference.interval
    value, low, high = (scale * x for x in (interval.value, interval.low, interval.high))
    spec = column.format if column.format.startswith("+") else f"+{column.format}"
    unit = "" if not column.unit else " points" if column.unit == "%" else f" {column.unit}"
    if math.isnan(low):
        return f"{number(value, spec)}{unit}"
    mark = direction(judged, difference)
    verdict = mark if mark != "even" else "not significant after correction" \
        if interval.significant else "not significant"
    return (f"{number(value, spec)}{unit} ({number(low, spec)} to {number(high, spec)}, "
            f"{verdict})")


def _gap(decisive: Sequence[Judged], comparison: Comparison) -> str:
    """How far every method has come from base to teacher, by the first figure that says it; of a
    single one by all of them."""
    having = [j for j in decisive if j.recovered]
    if not having:
        return ""
    shares = [(j, {name: r.share for name, r in j.recovered.items() if r.share is not None})
              for j in (having if len(comparison.names) == 1 else having[:1])]
    some = [(j, own) for j, own in shares if own]
    if not some:
        return (f"On {_label(having[0])}, base and teacher do not differ significantly: there is "
                "no gap to recover.")
    if len(comparison.names) == 1:
        name = comparison.names[0]
        parts = [f"{_closed(own[name])} on {_label(j)}" for j, own in some]
        return f"Of the gap to the teacher, {name} closed {_listed(parts)}."
    judged, own = some[0]
    parts = [f"{name} {_closed(share)}" for name, share in own.items()]
    return f"Of the gap to the teacher on {_label(judged)}, closed: {_listed(parts)}."


def _closed(share: Interval) -> str:
    """18 % [12, 25]"""
    value, low, high = (number(100 * x, ".0f") for x in (share.value, share.low, share.high))
    return f"{value} % [{low}, {high}]"


def _seeds(comparison: Comparison) -> str:
    seeds = comparison.seeds
    if max(seeds.values(), default=0) <= 1:
        return ("One seed each: the intervals are over questions and say nothing about other "
                "seeds.")
    fewest = min(seeds.values())
    few = f" With {_counted(seeds)}, the spread between seeds is itself badly known, which makes " \
          "intervals wide." if fewest < FEW_SEEDS else ""
    return f"Intervals cover other questions and other seeds.{few}"


def _counted(seeds: Mapping[str, int]) -> str:
    counts = sorted(set(seeds.values()))
    if len(counts) == 1:
        return f"{counts[0]} seeds per method"
    return f"{counts[0]} to {counts[-1]} seeds per method"


def _label(judged: Judged) -> str:
    """A figure's name inside a sentence."""
    column = judged.measure.column
    where = "" if column.key in AGAINST_TEACHER or column.unit in ("%", "points") else "held-out "
    names = {"kl": "held-out KL to the teacher", "agreement": "agreement with the teacher",
             "average": "the average"}
    return names.get(column.key, where + column.label)


def _listed(names: object) -> str:
    """a, b and c."""
    *most, last = list(names)  # type: ignore[call-overload]
    return f"{', '.join(most)} and {last}" if most else str(last)
