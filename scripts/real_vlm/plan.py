"""What fits into the minutes: a step of everything is timed once, and the numbers are kept."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from real_vlm.data import LEAST_ICONS, SHARES, SHOWN_AGAIN, Sources, read_sources
from real_vlm.tower import Pretraining, TowerPlan, draw, loss_of
from taid_vlm.config.model import ModelSpec
from taid_vlm.errors import TaidError
from taid_vlm.io.files import read_json, write_json
from taid_vlm.io.hashing import file_sha256
from taid_vlm.models.loading import load_config, load_model

ARMS = {"SFT": "sft", "KL": "forward_kl", "TAID": "taid"}
# of the minutes; the rest is for held-out figures, answers, and models read and written
TOWER, ALIGN, TEACHER, STUDENTS = 0.12, 0.05, 0.38, 0.28
BATCH = 8  # conversations of a step
TOKENS = 150  # of a conversation, about
BESIDE_LAYERS = 1.35  # a step's time over its layers' own: head, tower, optimizer
SAVE_SECONDS = 300  # of training between two checkpoints
HELD_OUT_PER_MINUTE = 4


@dataclass(frozen=True)
class Plan:
    """Numbers that every later call with the same arguments finds again.

    arguments: those of the command that they follow from. steps: of tower, align, teacher, student.
    seconds: of CPU that a step takes, about. icons: learned names. held_out: conversations.
    """

    arguments: dict[str, Any]
    steps: dict[str, int]
    seconds: dict[str, float]
    layers: int
    icons: int
    held_out: int

    @property
    def records(self) -> dict[str, int]:
        """Conversations by split; no drawing is seen twice in one training."""
        return {"train": BATCH * (self.steps["align"] + self.steps["teacher"]),
                "distill": BATCH * self.steps["student"], "eval": self.held_out}

    def save_steps(self, part: str) -> int:
        return max(1, round(SAVE_SECONDS / max(self.seconds[part], 1e-3)))


def arguments_of(args: Any) -> dict[str, Any]:
    """What a run depends on; not the number of seeds, which may grow later."""
    return {"language_model": args.language_model, "minutes": args.minutes, "steps": args.steps,
            **{key: None if path is None else file_sha256(path).hex()
               for key, path in (("icons", args.icons), ("nlvr", args.nlvr))}}


def make_plan(args: Any, say: Callable[[str], None]) -> Plan:
    """The plan that lies in the folder, or a new one; raises TaidError where it is another's."""
    path = args.output_dir / "plan.json"
    arguments = arguments_of(args)
    if path.exists():
        plan = Plan(**read_json(path, "a plan of this script"))
        for key, value in arguments.items():
            if plan.arguments.get(key) != value:
                raise TaidError(
                    f"'{args.output_dir}' was begun with another --{key.replace('_', '-')} "
                    f"({plan.arguments.get(key)}, now {value}): take that again, or choose another "
                    "--output-dir.")
        return plan
    layers = int(load_config(ModelSpec(model_name_or_path=args.language_model),
                             "language_model").get_text_config().num_hidden_layers)
    if layers < 4:
        raise TaidError(f"'{args.language_model}' has {layers} layers, but half of them must be at "
                        "least 2; choose a deeper language model.")
    say("timing a step of everything")
    seconds = time_steps(args.language_model, layers)
    steps = dict(zip(("tower", "align", "teacher", "student"), args.steps, strict=True)) \
        if args.steps else steps_of(args.minutes, args.seeds, seconds)
    shown = BATCH * steps["teacher"] * SHARES["icons"] / SHOWN_AGAIN
    plan = Plan(arguments, steps, seconds, layers // 2, max(LEAST_ICONS, min(500, round(shown))),
                max(16, min(400, round(HELD_OUT_PER_MINUTE * args.minutes))))
    write_json(asdict(plan), path)
    return plan


def steps_of(minutes: float, seeds: int, seconds: dict[str, float]) -> dict[str, int]:
    shares = {"tower": TOWER, "align": ALIGN, "teacher": TEACHER,
              "student": STUDENTS / (seeds * len(ARMS))}
    return {part: max(4, round(60 * minutes * share / seconds[part]))
            for part, share in shares.items()}


def sources_of(args: Any, plan: Plan) -> Sources:
    return read_sources(args.icons, args.nlvr, plan.icons)


# ----- how long a step takes ----------------------------------------------------------------


def time_steps(language_model: str, layers: int) -> dict[str, float]:
    """CPU seconds by part; the weights play no role."""
    tower = TowerPlan(steps=1)
    pretraining, rng = Pretraining(tower, 1), random.Random(0)
    model = load_model(ModelSpec(model_name_or_path=language_model), "language_model").base_model
    ids = torch.ones(BATCH, TOKENS, dtype=torch.long)

    def language() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids, use_cache=False).last_hidden_state.float().sum().backward()

    teacher = BESIDE_LAYERS * _timed(language)
    return {"tower": _timed(lambda: loss_of(pretraining, draw((), tower.batch, rng)).backward()),
            "align": teacher * 0.75, "teacher": teacher,
            "student": teacher * (layers // 2) / layers}


def _timed(step: Callable[[], Any], times: Sequence[int] = range(2)) -> float:
    step()
    started = time.process_time()
    for _ in times:
        step()
    return (time.process_time() - started) / len(times)


