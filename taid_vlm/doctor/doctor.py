"""`taid-vlm inspect`: a recipe is examined with everything training uses, but no weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from typing import Any

from taid_vlm.adapters import make_adapter
from taid_vlm.alignment import Pairing
from taid_vlm.batch.collator import DistillationCollator
from taid_vlm.config.model import ModelSpec
from taid_vlm.config.recipe import Recipe
from taid_vlm.doctor.checkup import Checked, Listener
from taid_vlm.doctor.diagnosis import Diagnosis, accept, refuse
from taid_vlm.doctor.facts import Facts, collect_facts
from taid_vlm.doctor.preflight import Preflight, check_sized, preflight
from taid_vlm.doctor.rounding import OPTION, Rounding, check_measurable, measure_rounding
from taid_vlm.doctor.streams import Trace, trace
from taid_vlm.errors import TaidError, at_least, with_place
from taid_vlm.io.quiet import quiet
from taid_vlm.models.loading import load_skeleton, read_config, read_processor
from taid_vlm.objectives import parse_objective
from taid_vlm.records import MixedStream, Record, first_rows, parts_of
from taid_vlm.runs.ingredients import Ingredients, gather
from taid_vlm.runs.stages import parts_by_name
from taid_vlm.training.intake import PROBED_RECORDS, check_usable, named_unread, windowed
from taid_vlm.training.pair import length_limit, pair_for_training, seams
from taid_vlm.training.router import check_router
from taid_vlm.training.visual import visual_collator


@dataclass(frozen=True)
class Inspection:
    """All that the doctor found.

    problem: the message training would end with, or why there is no `record`; "" if all is well.
    facts: by role, the teacher first.
    record: None where the pair is refused, or the record never came as far as tokens.
    preflight: of every data set; of its first records unless everything was asked for.
    quantization: what it changes of the teacher, where that was asked for.
    """

    verdict: Diagnosis
    problem: str
    facts: dict[str, Facts]
    record: Trace | None = None
    preflight: tuple[Preflight, ...] = ()
    quantization: Rounding | None = None

    def to_json(self) -> str:
        """The same as strict JSON, without the pictures."""
        plain = asdict(self)
        if plain["record"] is not None:
            plain["record"]["images"] = len(plain["record"]["images"])
        for one, check in zip(plain["preflight"], self.preflight, strict=True):
            one |= {"sentence": check.sentence, "coverage": check.coverage,
                    "stops": str(check.stops or "")}
        if self.quantization is None:
            del plain["quantization"]
        return json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True)
class _Pair:
    """What training would start with; `stage` is "" in a recipe without stages.

    collator: of the training records; plain: of the held-out ones.
    """

    stage: str
    recipe: Recipe
    ingredients: Ingredients
    collator: DistillationCollator
    plain: DistillationCollator
    pairing: Pairing | None


def inspect_recipe(
    recipe: Recipe, record: int = 0, everything: bool = False, measured: int | None = None
) -> Inspection:
    """Examine a recipe; of stages, the pair of the first is shown, and all are checked.

    Args:
        record: which training record is laid out, from 0.
        everything: pass all records through the collator, not only the first.
        measured: on how many training records what quantization changes of the teacher is measured,
            which loads it twice; None: no weights are loaded.

    Raises:
        TaidError: `everything` of a stream without an end, `measured` where nothing is quantized.
            What training would refuse is no error
            here but the verdict.
    """
    at_least(OPTION, measured, 1)
    teacher = None if measured is None else check_measurable(recipe)
    with quiet("taid_vlm"):  # what training would log is part of the account here
        skeletons: dict[str, Any] = {}
        for role, spec in _specs(recipe).items():
            with suppress(TaidError):
                skeletons[role] = load_skeleton(spec, role)
        try:
            pairs = [_pair(stage, part, skeletons) for stage, part in parts_by_name(recipe)]
        except TaidError as error:
            return Inspection(refuse(error), str(error), _facts(recipe, skeletons, None))
        checks = tuple(check for pair in pairs for check in _preflight(pair, everything))
        facts = _facts(recipe, skeletons, pairs[0])
        hint = check_router(parse_objective(pairs[0].ingredients.args.objective).router,
                            skeletons["student"])
        stops = next((stop for stop in (*(check.stops for check in checks),
                                        *map(_too_many, pairs)) if stop), None)
        verdict = refuse(stops) if stops else accept(pairs[0].pairing, facts, checks, hint)
        unread = [f"data.train: {sentence}" for pair in pairs
                  for sentence in named_unread(parts_of(pair.ingredients.train))]
        verdict = replace(verdict, warnings=(*verdict.warnings, *dict.fromkeys(unread),
                                             *_seams(pairs[0])))
        traced, problem = _trace(pairs[0], record)
        rounding = None if measured is None or teacher is None or stops else measure_rounding(
            teacher, pairs[0].ingredients, pairs[0].plain, measured)
        return Inspection(verdict, str(stops or problem), facts, traced, checks, rounding)


def _pair(stage: str, part: Recipe, skeletons: Mapping[str, Any]) -> _Pair:
    """As `run.distill` and `DistillationTrainer` do it, with models that have no weights."""
    try:
        found = gather(part)
        whole = copy.copy(found.args)
        whole.max_left_out = 1.0  # what is left out is shown before it is judged
        for role, spec in _specs(part).items():
            if role not in skeletons:  # its configuration is fine: this says why not the model
                load_skeleton(spec, role)
        student, teacher = skeletons["student"], skeletons.get("teacher")
        pairing, plain = pair_for_training(
            student, found.cache or teacher, found.student_processor, found.teacher_processor,
            whole, [data for data in (found.train, found.eval) if data is not None])
        objective = parse_objective(found.args.objective)
        collator = visual_collator(plain, objective, student, teacher)
    except TaidError as error:
        if not stage:
            raise
        raise with_place(error, f"stages '{stage}'") from error
    return _Pair(stage, part, found, collator, plain, pairing)


def _seams(pair: _Pair) -> Iterator[str]:
    firsts = (row for row in first_rows(pair.ingredients.train, PROBED_RECORDS)
              if isinstance(row, Record))
    return seams(pair.collator.adapters, list(firsts))


def _too_many(pair: _Pair) -> TaidError | None:
    """Why training would not start with what is left of its first records."""
    try:
        check_usable(pair.plain, pair.ingredients.train, pair.ingredients.args.max_left_out)
    except TaidError as error:
        return error
    return None


# ----- the two sides ------------------------------------------------------------------------


def _specs(recipe: Recipe) -> dict[str, ModelSpec]:
    sides = (("teacher", recipe.teacher), ("student", recipe.student))
    return {role: spec for role, spec in sides if spec is not None}


def _facts(recipe: Recipe, skeletons: Mapping[str, Any], pair: _Pair | None) -> dict[str, Facts]:
    """Facts of both sides; of a refused pair as many as can be found."""
    facts = {}
    for role, spec in _specs(recipe).items():
        if pair is None:
            config, processor, adapter = _found(recipe, role, spec)
        else:
            config, adapter = pair.ingredients.configs[role], getattr(pair.collator, role)
            processor = adapter.processor
        facts[role] = collect_facts(role, spec, config, skeletons.get(role), processor, adapter)
    return facts


def _found(recipe: Recipe, role: str, spec: ModelSpec) -> tuple[Any, Any, Any]:
    """Configuration, processor and adapter of one side, None from the first that cannot be had."""
    config = processor = adapter = None
    with suppress(TaidError):
        config = read_config(spec, role)
        processor = read_processor(config, spec, role)
        limit = length_limit(config, recipe.train.get("max_length"))
        adapter = make_adapter(processor, role, limit, spec.chat_template_kwargs)
    return config, processor, adapter


# ----- the records --------------------------------------------------------------------------


def _preflight(pair: _Pair, everything: bool) -> Iterator[Preflight]:
    for side, records, collator in (("train", pair.ingredients.train, pair.collator),
                                    ("eval", pair.ingredients.eval, pair.plain)):
        if records is not None:
            name = f"{pair.stage}: data.{side}" if pair.stage else f"data.{side}"
            if everything:
                check_sized(f"data.{side}", records)
            parts: list[Any] = [records]
            if everything and isinstance(records, MixedStream):
                parts = [*records.parts]  # mixed they have no end
            if side == "train":
                parts = [windowed(part, pair.plain, pair.ingredients.args, passes=1)
                         for part in parts]
            records = parts[0] if len(parts) == 1 else chain.from_iterable(parts)
            yield preflight(name, records, collator, pair.ingredients.args,
                            None if everything else PROBED_RECORDS)


def _trace(pair: _Pair, index: int) -> tuple[Trace | None, str]:
    """One training record laid out, and why it would be left out; or why there is none."""
    records: Any = pair.ingredients.train
    try:
        record = records[index] if hasattr(records, "__len__") else next(
            islice(records, index, None))
    except TaidError as error:
        return None, str(error)
    except (IndexError, StopIteration):
        return None, f"--record {index}: the training data has no such record."
    checked = Listener.of(pair.collator).check(record)
    return trace(record, checked, pair.collator.adapters), _left_out(checked)


def _left_out(checked: Checked) -> str:
    if checked.stops or not checked.reason:
        return str(checked.stops or "")
    lengths = ", ".join(f"{len(row.ids):,} tokens for the {role}"
                        for role, row in checked.whole.items())
    reason = f"{checked.source} would be left out: {checked.detail or checked.reason}"
    return f"{reason} ({lengths})" if lengths else reason
