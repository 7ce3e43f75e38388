"""Going on from a checkpoint: what it carries beside weights, and what its files may raise."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from taid_vlm.errors import TaidError
from taid_vlm.training.window import Window

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def gone_on_from(checkpoint: str | None) -> Iterator[None]:
    """Whatever a checkpoint's files raise becomes one message."""
    try:
        yield
    except TaidError:
        raise
    except Exception as error:
        problem = (str(error).splitlines() or [""])[0]
        raise TaidError(f"the checkpoint '{checkpoint}' cannot be gone on from "
                        f"({type(error).__name__}: {problem:.200}).",
                        mend="Remove it, to go on from the one before.") from error


class ScheduleCallback(TrainerCallback, ExportableState):
    """Moves t after every optimizer step and carries the schedule through checkpoints."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        trainer.schedule = trainer.objective.schedule(state.max_steps)
        trainer._window, trainer._empty_steps, trainer.answer_tokens = Window(), 0, 0
        saved = state.stateful_callbacks.get("ScheduleCallback")
        if state.global_step > 0 and saved:
            trainer.answer_tokens = saved["attributes"].get("answer_tokens", 0)
            trainer.guard.load_state_dict(saved["attributes"].get("guard", {}))
            trainer.intake.rows = Counter(saved["attributes"].get("rows", {}))
            if trainer.budget is not None and not args.ignore_data_skip:
                trainer.budget.go_on(saved["attributes"].get("batches"),
                                     state.global_step * args.gradient_accumulation_steps)
            if trainer.schedule is not None:
                trainer.schedule.load_state_dict(saved["attributes"]["schedule"])
        if trainer.schedule is not None and state.is_world_process_zero:
            # a loss that rises beside a KL that falls is no mistake
            logger.info("TAID's loss is against a target that moves with t, so it may rise while "
                        "the student learns; what is comparable between log lines is kl.")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.finish_step()
        if (budget := self.trainer.budget) is not None:
            before = budget.passed((state.global_step - 1) * args.gradient_accumulation_steps)
            state.epoch = budget.passed(state.global_step * args.gradient_accumulation_steps)
            if int(state.epoch) > int(before) and state.global_step < state.max_steps:
                # Trainer knows of one endless pass alone, and of its end
                control.should_evaluate |= args.eval_strategy == "epoch"
                control.should_save |= args.save_strategy == "epoch"
                control.should_log |= args.logging_strategy == "epoch"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        schedule = self.trainer.schedule
        if schedule is None or not schedule.adaptive or schedule.t_start == schedule.t_end:
            return
        if schedule.active_share == 0:
            mend = ("alpha is auto already, so the run is too short for it (steps: "
                    f"{state.max_steps}), or its loss did not fall."
                    if schedule.automatic else
                    "Use alpha: auto to scale it with the run's length.")
            logger.warning(
                "TAID's adaptive term never acted in this run: with alpha = %g the linear floor "
                "was always higher. %s", schedule.alpha, mend)
        if schedule.state.skipped:
            logger.warning("t did not move after %d steps that were not applied or had no finite "
                           "loss.", schedule.state.skipped)

    def state(self) -> dict[str, Any]:
        schedule, budget = self.trainer.schedule, self.trainer.budget
        saved = None if schedule is None else schedule.state_dict()
        return {"args": {}, "attributes": {"answer_tokens": self.trainer.answer_tokens,
                                           "guard": self.trainer.guard.state_dict(),
                                           "rows": dict(self.trainer.intake.rows),
                                           **({"batches": budget.state_dict()} if budget else {}),
                                           **({"schedule": saved} if saved else {})}}
