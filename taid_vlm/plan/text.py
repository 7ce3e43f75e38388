"""A plan as text for a terminal."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict

from taid_vlm.io.terminal import human, table
from taid_vlm.plan.advice import Advice, Change
from taid_vlm.plan.caches import CacheSize
from taid_vlm.plan.plan import Plan, fullest


def as_text(plans: Sequence[Plan], advice: Advice | None = None) -> str:
    """The fullest stage's table, the other stages in a line each, and what to change."""
    worst = fullest(plans)
    blocks = [_head(worst, advice), [_table(worst)], _notes(worst), _cache(worst.cache)]
    if len(plans) > 1:
        blocks.append([f"stage '{plan.stage}': {human(plan.peak)} ({plan.fullest})"
                       for plan in plans])
    if advice is not None and not advice.fits:
        blocks.append(_changes(advice))
    return "\n\n".join("\n".join(block) for block in blocks if block)


def as_json(plans: Sequence[Plan], advice: Advice | None = None) -> str:
    """The same as strict JSON, in bytes."""
    told = {"peak": fullest(plans).peak, "stages": [asdict(plan) for plan in plans],
            "advice": None if advice is None else asdict(advice)}
    return json.dumps(told, indent=2, ensure_ascii=False, allow_nan=False)


def _head(plan: Plan, advice: Advice | None) -> list[str]:
    verdict = ""
    if advice is not None:
        does = "fits in" if advice.fits else "DOES NOT FIT in"
        verdict = f"; {does} {human(advice.memory)}"
    stage = f", stage '{plan.stage}'" if plan.stage else ""
    each = f" on each of {plan.processes} devices" if plan.processes > 1 else ""
    lines = [f"memory    {human(plan.peak)}{each} ({plan.device}) in the {plan.fullest}{stage}"
             f"{verdict}"]
    lines.append(f"batch     {plan.batch.rows} rows, the longest of the first "
                 f"{plan.batch.records} records; {plan.batch.answer_tokens:,} answer tokens")
    for role, count in plan.batch.tokens.items():
        images = plan.batch.image_tokens[role]
        shown = f", {images:,} of them of images at most" if images else ""
        lines.append(f"          {role}: {count:,} tokens in the longest row{shown}")
    lines += [f"experts   {role}: all {it.parameters:,} parameters are in memory, a token passes "
              f"{it.per_token:,} ({it.chosen} of {it.number} experts)"
              for role, it in plan.experts.items()]
    phases = ", ".join(f"{name} {human(peak)}" for name, peak in plan.phases.items())
    return [*lines, f"phases    {phases}"]


def _table(plan: Plan) -> str:
    rows = [(part.name, human(part.most), human(part.at_peak), part.how)
            for part in plan.components]
    return table([("", "most", "at the peak", ""), *rows, ("total", "", human(plan.peak), "")],
                 right=(1, 2))


def _notes(plan: Plan) -> list[str]:
    return [
        "counted    exactly, from the models' shapes",
        "rehearsed  the real step ran on tensors without values, as it does on a CPU",
        "estimated  a rule of thumb",
        *(f"note: {note}" for note in plan.notes),
    ]


def _cache(size: CacheSize | None) -> list[str]:
    """What the teacher's answers would take on disk, for those who would rather ask it once."""
    if size is None:
        return []
    rows = [(f"taid-vlm cache {form.options}".rstrip(), f"{form.per_token:,}", human(form.bytes),
             "exact" if form.exact else "") for form in size.forms]
    return [f"the teacher asked once instead: about {size.tokens:,} answer tokens of "
            f"{size.records:,} records, on disk (computed)",
            table([("", "bytes a token", "in all", ""), *rows], right=(1, 2)),
            *(f"not for this recipe: {why}" for why in size.refused)]


def _changes(advice: Advice) -> list[str]:
    lines = ["what to change, the largest saving first:"] if advice.changes else []
    for change in advice.changes:
        lines += _change(change, advice)
    if advice.together is not None:
        lines += ["together:", *_change(advice.together, advice)]
    elif not any(change.peak <= advice.memory for change in advice.changes):
        lines.append("nothing of this, nor all of it together, is enough: choose smaller models, "
                     "or a larger device.")
    return lines


def _change(change: Change, advice: Advice) -> list[str]:
    fits = "fits" if change.peak <= advice.memory else "does not fit"
    overrides = " ".join(shlex.quote(text) for text in change.overrides)
    return [f"  {human(advice.peak - change.peak):>9} less, {human(change.peak):>9} in all "
            f"({fits}): {change.what}",
            f"            {overrides}",
            f"            costs: {change.costs}"]
