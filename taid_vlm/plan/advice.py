"""What to change in a recipe that does not fit, and what every change would save.

Every change is a list of overrides, and its figure is the plan of the recipe with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from taid_vlm.config.recipe import Recipe
from taid_vlm.config.training import MEMORY_BUDGET
from taid_vlm.errors import TaidError
from taid_vlm.models.loading import load_config, sees_images, weights_dtype
from taid_vlm.models.parts import HEAD, LANGUAGE_MODEL, PROJECTOR, TOWER
from taid_vlm.plan.plan import EVALUATION, Plan, Seen, fullest, optim_of, plan_recipe

Reload = Callable[[Sequence[str]], Recipe]
EIGHT_BIT = "adamw_bnb_8bit"
HALF = ("bfloat16", "float16")
SMALL_BUDGET = 64 * 2**20  # bytes of a chunk of logits that is still worth a matrix product


@dataclass(frozen=True)
class Change:
    """One way to need less.

    overrides: for the command line. peak: bytes with them. costs: what is given up for it.
    """

    what: str
    overrides: tuple[str, ...]
    costs: str
    peak: int = 0


@dataclass(frozen=True)
class Advice:
    """Whether a recipe fits, and if not, what would help.

    changes: single ones, the largest saving first. together: the first few of them, in the order
    of what they cost, that fit in `memory` (None: not even all of them do).
    """

    memory: int
    fits: bool
    peak: int
    changes: tuple[Change, ...] = ()
    together: Change | None = None


def advise(
    reload: Reload, plans: Sequence[Plan], memory: int, processes: int = 1,
    seen: Seen | None = None, tell: Callable[[str], None] = lambda what: None,
) -> Advice:
    """Compare a plan with the memory there is.

    Args:
        reload: the recipe under more overrides.
        plans: of the recipe as it is.
        memory: bytes of one device.
        seen: what `plan_recipe` noted of the records.
        tell: is called with every change before it is planned, which takes seconds or more.
    """
    peak = fullest(plans).peak
    if peak <= memory:
        return Advice(memory, True, peak)
    planner = _Planner(reload, memory, processes, {} if seen is None else seen, tell)
    found = [planner.best(steps, ()) for steps in candidates(reload(()), plans)]
    helpful = [change for change in found if change is not None and change.peak < peak]
    helpful.sort(key=lambda change: change.peak)
    fitting = bool(helpful) and helpful[0].peak <= memory
    together = None if fitting else planner.together(candidates(reload(()), plans), peak)
    return Advice(memory, False, peak, tuple(helpful), together)


class _Planner:
    """Plans of one recipe under changes."""

    def __init__(
        self, reload: Reload, memory: int, processes: int, seen: Seen, tell: Callable[[str], None]
    ) -> None:
        self.reload, self.memory, self.processes = reload, memory, processes
        self._known: dict[tuple[str, ...], int | None] = {}
        self._seen, self._tell = seen, tell

    def best(self, steps: Sequence[Change], before: Sequence[str]) -> Change | None:
        """The first of a row of ever stronger changes that fits, or the strongest that works."""
        strongest = self._planned(steps[-1], before) if steps else None
        if strongest is not None and strongest.peak > self.memory:
            return strongest  # so that the weaker ones need no plan
        last = None
        for change in steps:
            last = self._planned(change, before) or last
            if last is not None and last.peak <= self.memory:
                break
        return last

    def _planned(self, change: Change, before: Sequence[str]) -> Change | None:
        """A change with its peak; None where the recipe would be refused."""
        peak = self._peak((*before, *change.overrides), change.what)
        return None if peak is None else replace(change, peak=peak)

    def _peak(self, overrides: tuple[str, ...], what: str) -> int | None:
        """Bytes of the recipe with more overrides; None where it would be refused."""
        if overrides not in self._known:
            self._tell(what)
            try:
                plans = plan_recipe(self.reload(overrides), self.processes, self._seen)
                self._known[overrides] = fullest(plans).peak
            except TaidError:  # the model or the machine lacks what it takes
                self._known[overrides] = None
        return self._known[overrides]

    def together(self, rows: Iterator[Sequence[Change]], peak: int) -> Change | None:
        """Change after change, as long as it helps, until all that is done fits."""
        done: list[Change] = []
        for steps in rows:
            before = [text for change in done for text in change.overrides]
            change = self.best(steps, before)
            if change is not None and change.peak < peak:
                done.append(change)
                peak = change.peak
            if peak <= self.memory:
                return Change(
                    ", ".join(one.what for one in done),
                    tuple(text for one in done for text in one.overrides),
                    "; ".join(one.costs for one in done), peak)
        return None


# ----- what can be changed ------------------------------------------------------------------


def candidates(recipe: Recipe, plans: Sequence[Plan]) -> Iterator[Sequence[Change]]:
    """Rows of changes, each row ever stronger; those that cost least stand first."""
    train, plan = recipe.train, fullest(plans)
    if plan.fullest == EVALUATION:
        yield [Change("evaluate one record at a time", ("train.per_device_eval_batch_size=1",),
                      "slower evaluation")]
    for role, spec in (("student", recipe.student), *recipe.teacher_specs.items()):
        if spec.attn_implementation == "eager":
            yield [Change(f"the {role}'s attention without its scores",
                          (f"{role}.attn_implementation=sdpa",), "nothing")]
    yield list(_smaller_losses(recipe))
    yield list(_smaller_batches(recipe))
    if not train.get("gradient_checkpointing") and not train.get("activation_checkpointing"):
        yield [Change("gradient checkpointing", ("train.gradient_checkpointing=true",),
                      "about a third more time")]
    yield list(_half_precision(recipe))
    yield list(_optimizers(recipe, plan))
    yield list(_fewer_trained(recipe))
    yield list(_shorter(plan))


def _smaller_losses(recipe: Recipe) -> Iterator[Change]:
    auto: tuple[str, ...] = ()
    if recipe.train.get("loss_implementation") == "reference":
        auto = ("train.loss_implementation=auto",)
        yield Change("the fused loss", auto, "nothing")
    if int(recipe.train.get("loss_memory_budget", MEMORY_BUDGET)) > SMALL_BUDGET:
        yield Change("a loss in smaller chunks",
                     (*auto, f"train.loss_memory_budget={SMALL_BUDGET}"), "some time")


def _smaller_batches(recipe: Recipe) -> Iterator[Change]:
    """Every smaller batch that leaves the records per optimizer step as they are."""
    if budget := recipe.train.get("tokens_per_batch"):
        for half in (int(budget) // 2, int(budget) // 4):
            yield Change(f"micro-batches of {half} tokens", (f"train.tokens_per_batch={half}",),
                         "smaller steps")
        return
    size = int(recipe.train.get("per_device_train_batch_size", 8))
    steps = int(recipe.train.get("gradient_accumulation_steps", 1))
    for smaller in (n for n in range(size - 1, 0, -1) if size % n == 0):
        yield Change(
            f"micro-batches of {smaller}, as many records per step",
            (f"train.per_device_train_batch_size={smaller}",
             f"train.gradient_accumulation_steps={steps * size // smaller}"), "some time")


def _half_precision(recipe: Recipe) -> Iterator[Change]:
    teacher: list[str] = []
    for key, spec in recipe.teacher_specs.items():
        if spec.server or spec.cache:
            continue
        config = load_config(spec, key)
        kept = weights_dtype(spec, key, config)
        stored = str(getattr(config, "dtype", None)).removeprefix("torch.")
        if (stored if kept == "auto" else kept) not in HALF:
            teacher.append(f"{key}.dtype=bfloat16")
    if teacher:
        who = "the teacher" if recipe.teacher else "the teachers"
        yield Change(f"{who} in bfloat16", tuple(teacher), "rounding of its logits")
    if not recipe.train.get("bf16") and not recipe.train.get("fp16"):
        yield Change("mixed precision", (*teacher, "train.bf16=true"), "rounding")


def _optimizers(recipe: Recipe, plan: Plan) -> Iterator[Change]:
    if plan.device == "gpu" and optim_of(recipe) in ("adamw_torch", "adamw_torch_fused"):
        yield Change("AdamW with 8-bit states (needs bitsandbytes)",
                     (f"train.optim={EIGHT_BIT}",), "rounding of its moments")


def _fewer_trained(recipe: Recipe) -> Iterator[Change]:
    frozen = list(recipe.train.get("freeze") or [])
    if recipe.student.peft is not None or recipe.train.get("learning_rates") or (
            {LANGUAGE_MODEL, HEAD, PROJECTOR} & set(frozen)):
        return
    if TOWER not in frozen and sees_images(load_config(recipe.student, "student")):
        yield Change("the vision tower frozen", ("train.freeze=[tower]",),
                     "the tower stays as it is")
    if not frozen:
        yield Change("a LoRA adapter", ("student.peft={r: 16, target_modules: all-linear}",),
                     "a student that can change less; raise the learning rate")


def _shorter(plan: Plan) -> Iterator[Change]:
    """Without the longest quarter, then half, of the records."""
    lengths: Any = sorted(plan.batch.lengths)
    for share in (0.75, 0.5):
        limit = lengths[int((len(lengths) - 1) * share)]
        lost = sum(length > limit for length in lengths)
        if lost:
            yield Change(f"rows of at most {limit:,} tokens", (f"train.max_length={limit}",),
                         f"{lost} of {len(lengths)} records looked at: conversations are left out, "
                         "plain texts cut")
