"""DistillationTrainer: transformers' Trainer with an exact distillation step, and little more.

What is exact: the loss is the sum over the answer tokens of the whole optimizer step (all
micro-batches, all processes) divided once by their number (by the sum of what they count, where
answers have weights); t moves once per optimizer step, from
the mean over those same tokens; evaluation moves nothing; a resumed run goes on bit for bit.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from taid_vlm.adapters import Processor
from taid_vlm.batch.collator import Batch, DistillationCollator
from taid_vlm.errors import TaidError
from taid_vlm.evaluation.canary import Canary, Looks
from taid_vlm.evaluation.held_out import Tally, evaluate_pair, summarise
from taid_vlm.io.manifest import seal
from taid_vlm.models.loading import refuse_nonfinite, restore_weights
from taid_vlm.models.parts import TrainedParts
from taid_vlm.models.published import use_published_names
from taid_vlm.objectives import TaidSchedule, parse_objective
from taid_vlm.teachers import ServedTeacher, TeacherCache, TeacherInStudent, Teachers
from taid_vlm.training.budget import BudgetBatches
from taid_vlm.training.carried import ScheduleCallback, gone_on_from
from taid_vlm.training.config import DistillationConfig
from taid_vlm.training.figures import fused_figures
from taid_vlm.training.guard import StepGuard
from taid_vlm.training.intake import Intake, prepared, windowed
from taid_vlm.training.loss import Step, StepLoss
from taid_vlm.training.on_policy import NOT_LEARNED, OWN, SAMPLED, Rollouts, Rows, without_sync
from taid_vlm.training.packing import Packing
from taid_vlm.training.pair import resolve, with_adapter
from taid_vlm.training.router import ROUTER, RouterTerm
from taid_vlm.training.served import await_signals, kept_if_lost, training_collator
from taid_vlm.training.several import (
    NoTokens,
    SeveralStep,
    placed,
    plain_step_of,
    put_together,
    step_of,
    the_only_one,
    with_all_names,
)
from taid_vlm.training.sums import figure_sums, on_policy_figures, step_counts, token_sums
from taid_vlm.training.visual import VisualTerms
from taid_vlm.training.window import Window

EMPTY_STEPS = 20  # optimizer steps without one usable record, after which a run gives up


class DistillationTrainer(Trainer):
    """Distil `teacher_model` into `model` on records with or without images.

    Args:
        model, teacher_model: transformers models, or names to load; a ServedTeacher is asked over
            the network, a TeacherCache was asked once, a TeacherInStudent is the base model of a
            student with an adapter. The teacher may be left out for objectives that need none
            (`ce`). Several teachers are a mapping, {name: any of these}.
        args: a DistillationConfig.
        train_dataset, eval_dataset: `Records`, or any dataset of rows in the columns that
            `taid_vlm.records` understands; evaluation needs one with a length.
        processing_class, teacher_processing_class: tokenizer or processor of each model; loaded
            along where the model was given by name. Of several teachers by name, too.
        peft_config: train an adapter of the peft library instead of all weights.

    Raises:
        TaidError: a pair, data or objective that cannot work, before any training.

    Example:
        >>> from taid_vlm import DistillationConfig, DistillationTrainer
        >>> from taid_vlm.demo.demo import data_folder
        >>> tiny = str(data_folder() / "models/words-")  # two models, of different vocabularies
        >>> trainer = DistillationTrainer(tiny + "student", tiny + "teacher", DistillationConfig(
        ...     "runs/python", max_steps=1, use_cpu=True, report_to="none"),
        ...     train_dataset=[{"question": "a red circle. is there a square?", "answer": "no"}])
        >>> _ = trainer.train()
        {'train_runtime': ...}
    """

    loss_is_scaled_for_ga = True
    control: TrainerControl

    def __init__(
        self,
        model: str | PreTrainedModel,
        teacher_model: str | PreTrainedModel | ServedTeacher | TeacherCache | TeacherInStudent
        | Mapping[str, Any]
        | None = None,
        args: DistillationConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Processor | None = None,
        teacher_processing_class: Processor | Mapping[str, Processor] | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = args or DistillationConfig(output_dir="distilled")
        self.objective = parse_objective(args.objective)
        student, processing_class = resolve(
            model, processing_class, "student", args.model_init_kwargs)
        teacher, teacher_processing_class = resolve(
            teacher_model, teacher_processing_class, "teacher", args.teacher_model_init_kwargs)
        args = args.without_secrets()
        train_dataset, eval_dataset = (prepared(d, args) for d in (train_dataset, eval_dataset))
        if self.objective.needs_teacher and teacher is None:
            raise TaidError("the objective needs a teacher_model; only 'ce' works without.")
        pairing, collator = put_together(
            student, teacher, processing_class, teacher_processing_class, args, train_dataset,
            eval_dataset)
        teacher = the_only_one(teacher)
        if peft_config is not None:
            student = with_adapter(student, peft_config)
        if isinstance(teacher, TeacherInStudent):
            teacher.enter(student)
        self.parts = TrainedParts(student, args)
        args.use_one_gpu()
        batches, sampling = training_collator(
            collator, self.objective, student, teacher), self.objective.on_policy
        samples: Any = sampling and training_collator(
            replace(collator, left_out=NOT_LEARNED, reported={}),
            self.objective.sampled or self.objective, student, teacher)
        super().__init__(
            model=student, args=args, eval_dataset=eval_dataset,
            train_dataset=windowed(train_dataset, collator, args),
            data_collator=batches if sampling is None else Rows(),
            processing_class=processing_class, callbacks=callbacks, optimizers=optimizers,
        )
        use_published_names(self.model)
        self.collator: DistillationCollator = collator
        self.canary = Canary(args.canary_records)
        self.model_accepts_loss_kwargs = True  # Trainer then counts items over all processes
        self.teacher, self.pairing = placed(teacher, pairing, self.accelerator, args)
        self.visual = VisualTerms(
            self.objective.visual, student, teacher, self.accelerator, args.seed)
        self.router = RouterTerm(self.objective.router, student, self.accelerator)
        self.rollouts = None if sampling is None else Rollouts(
            sampling, collator.student, batches, samples, self.accelerator, args)
        self._begin(train_dataset)
        self._steps, self.behind_head = dict[str, Step | SeveralStep](), dict[str, Any]()
        self.add_callback(ScheduleCallback(self))
        self.add_callback(self.parts)

    def _begin(self, train_dataset: Any) -> None:
        """What is counted and carried from step to step."""
        args = self.args
        self.budget = BudgetBatches.of(self.train_dataset, self.collator, args, self.accelerator)
        self.packing = Packing(args.packing, self.accelerator)
        self.schedule: TaidSchedule | None = None
        self.dropped: Counter[str] = Counter()  # records left out, by reason
        self.notes: Counter[str] = Counter()  # what of the records has no effect
        self.intake = Intake(train_dataset, args.max_left_out)
        self.cut = 0  # plain texts shortened to max_length
        self._step_sums: dict[str, Tensor] = {}
        self._ready: dict[str, list[bool]] = {}  # whether all processes have tokens, by micro-batch
        self._step_counts: list[Tensor] = []  # of the optimizer step: images, tokens it is fed
        self._empty_steps = 0
        self.answer_tokens = 0  # trained on so far, over all processes
        self._window = Window()
        self.recipe: Mapping[str, Any] | None = None  # what checkpoints say they were written with
        self.guard = StepGuard(self.accelerator, args.max_nonfinite_steps, args.spike_factor,
                               args.spike_window)

    @property
    def loss_report(self) -> dict[str, Any] | None:
        """Which implementation of the loss ran, and why; None before the first step."""
        return step.report() if (step := self._step or self._steps.get(SAMPLED)) else None

    @property
    def teacher_model(self) -> Any:
        """The model behind the teacher; None without one in this process."""
        return None if self.teacher is None else self.teacher.model

    # ----- the step -------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        return super().get_train_dataloader() if self.budget is None else self.budget.loader(self)

    def training_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of a micro-batch; of its sampled part first."""
        references = {key: value for key, value in inputs.items() if key != SAMPLED}
        if SAMPLED not in inputs:
            return super().training_step(model, references, num_items_in_batch)
        with without_sync(self.accelerator, model):
            loss = super().training_step(model, inputs[SAMPLED], num_items_in_batch)
        return loss + super().training_step(model, references, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the mean over all answer tokens of the optimizer step, of
        the visual terms' mean over all of its images, and of the router's over all it is fed."""
        t, shown = self.schedule.t if self.schedule else None, self._logs_this_step()
        inputs = self.packing(inputs, model, self.teacher)
        if inputs.get(OWN):
            found = self._loss_step(inputs, SAMPLED)(model, self.teacher, inputs, t, shown)
            self._remember(inputs, found, {}, SAMPLED)
            return found.loss * self.accelerator.num_processes / float(num_items_in_batch or 1)
        step = self._loss_step(inputs)  # which may ask the models, unwatched
        with self.visual.watch(), self.router.watch():
            self.parts.keep_frozen()
            found = step(model, self.teacher, inputs, t, shown)
        seen, routed = self.visual.losses(inputs), self.router.losses(inputs)
        self._remember(inputs, found, seen if routed is None else seen | {ROUTER: routed})
        tokens, images, fed = step_counts(inputs) if num_items_in_batch is None else (
            num_items_in_batch, *self._step_counts)
        # DDP averages gradients over processes; the sum over all tokens must not be averaged
        processes = 1 if num_items_in_batch is None else self.accelerator.num_processes
        loss = found.loss * processes / (float(tokens) or 1.0)
        loss = loss + self.visual.weighted(seen) * processes / max(float(images), 1.0)
        if routed is not None:
            loss = loss + self.router.weight * routed.sum() * processes / max(float(fed), 1.0)
        return (loss, found.losses) if return_outputs else loss

    def _loss_step(self, batch: Batch, part: str = "") -> Step | SeveralStep | NoTokens:
        """The implementation of the loss, chosen when every process has tokens to check it: a
        sharded model is asked by all at once. The count of the step's tokens says when.

        Args:
            part: "" for references, SAMPLED.
        """
        objective = self.objective.sampled if part else self.objective
        assert objective is not None
        ready = self._ready[part].pop(0) if self._ready.get(part) else (
            len(batch["labels"]) > 0 and self.accelerator.num_processes == 1)
        if self._steps.get(part) is None and ready:
            self._steps[part] = step_of(objective, self.pairing, self.model, self.teacher, batch,
                                        self.args, self.accelerator)
        return self._steps.get(part) or plain_step_of(objective, self.pairing, self.teacher)

    @property
    def _step(self) -> Step | SeveralStep | None:
        """That of the references."""
        return self._steps.get("")

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor:
        """What the answer tokens of the optimizer step count, over all micro-batches and processes;
        its images and the tokens it is fed are noted. On the CPU: nothing waits for a device."""
        with kept_if_lost(self):
            if self.rollouts is not None:
                for part in () if self._steps else ("", SAMPLED):  # now, whoever will have tokens
                    probe = self._prepare_inputs(self.rollouts.probe(batch_samples[0]))
                    self._ready[part] = [all(gather_object([len(probe["labels"])]))]
                    self._loss_step(probe, part)
                self.rollouts.fill(batch_samples, self.model, self.state.global_step + 1)
            asked = [*batch_samples, *(b[SAMPLED] for b in batch_samples if SAMPLED in b)]
            await_signals(self.teacher, asked, self.accelerator)
        counts = torch.stack([step_counts(batch) for batch in batch_samples]).sum(0)
        parts = {"": batch_samples, SAMPLED: [b[SAMPLED] for b in batch_samples if SAMPLED in b]}
        full = [len(batch["labels"]) > 0 for part in parts.values() for batch in part]
        counts = torch.cat([counts, counts.new_tensor(full)])
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.gather(counts[None].to(device)).sum(0).cpu()
        tokens, *self._step_counts = counts[: len(counts) - len(full)]
        ready = (counts[len(counts) - len(full):] == self.accelerator.num_processes).tolist()
        self._ready = {part: [ready.pop(0) for _ in batches] for part, batches in parts.items()}
        return tokens

    @torch.no_grad()
    def _remember(
        self, batch: Batch, found: StepLoss, seen: Mapping[str, Tensor], part: str = ""
    ) -> None:
        """Add up this micro-batch, or its sampled part, for the schedule and the log."""
        sums = token_sums(batch, found, seen, apart=self.rollouts is not None)
        sums |= figure_sums(batch, on_policy_figures(batch, found.figures) if part
                            else found.figures)
        sums |= {name: torch.full((), rows, dtype=torch.float64, device=found.loss.device)
                 for name, rows in self.intake.sums(batch).items()}
        for name, value in sums.items():
            self._step_sums[name] = self._step_sums.get(name, 0) + value.double()
        self.guard.note(batch, found.losses)
        counts = batch["counts"]
        self.dropped.update(counts["dropped"])
        self.notes.update(batch["notes"])
        self.cut += counts["cut"]

    def _logs_this_step(self) -> bool:
        step = self.state.global_step + 1
        first = self.args.logging_first_step and step == 1
        return first or (self.state.logging_steps > 0 and step % self.state.logging_steps == 0)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """What stands between the gradient and its step, which may not be applied."""
        norm = super()._get_grad_norm(model, grad_norm)
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        sums, self._step_sums = self._step_sums, {}
        if isinstance(self.teacher, Teachers) and self._logs_this_step():
            sums = with_all_names(sums, self.accelerator)
        self.guard.judge(sums, norm, trained, self.state.global_step + 1, self.objective,
                         self.schedule.t if self.schedule else None)
        return norm

    def finish_step(self) -> None:
        """After an optimizer step: one global mean, one move of t. A step that was not applied
        leaves no trace in either."""
        self.visual.zero_grad()
        sums = self.guard.sums
        self.intake.take(sums, self.dropped)
        self._empty_steps = 0 if sums["tokens"] else self._empty_steps + 1
        self.router.finish_step(self.guard.applied)
        if self.guard.applied:
            self._window.add(sums)
            self.answer_tokens += int(sums["tokens"])
        if self._empty_steps == EMPTY_STEPS:
            told = ", ".join(f"{n} x {reason}" for reason, n in self.dropped.items())
            raise TaidError(f"{EMPTY_STEPS} optimizer steps in a row had no usable record: {told}.")
        if self.schedule is not None:
            counts = sums["tokens"] and self.guard.applied
            term = self.objective.moving_term
            assert term is not None
            name = f"loss/{term.name}"
            tokens = sums.get(f"tokens/{name}", sums["tokens/loss"])
            mean = sums[name] / tokens if counts else float("nan")
            self.schedule.update(mean, self.state.global_step - 1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self._tr_loss.nan_to_num_(0.0, 0.0, 0.0)  # Trainer subtracts, which keeps a NaN
            figures = self._window.take()
            lead = {key: figures[key] for key in ("kl",) if key in figures}
            logs = {**lead, **logs, **figures, **self.parts.rates, **self.intake.logs()}
            if self.rollouts is not None:
                logs |= self.rollouts.logs()
            if self.schedule is not None:
                logs["t"] = self.schedule.t
                logs["adaptive_share"] = self.schedule.active_share
            if self.guard.skipped:
                logs["skipped_steps"] = self.guard.skipped.total()
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        optimizer = self.parts.split_groups(super().create_optimizer(model), model or self.model)
        return self.visual.add_group(optimizer, self.args.learning_rate, self.args.weight_decay)

    def floating_point_ops(self, inputs: Batch) -> int:
        sampled = super().floating_point_ops(inputs[SAMPLED]["student_inputs"]) \
            if SAMPLED in inputs else 0
        return super().floating_point_ops(inputs["student_inputs"]) + sampled

    # ----- evaluation -----------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Held-out figures against the teacher, logged under `metric_key_prefix`."""
        dataset = self.eval_dataset if eval_dataset is None else prepared(eval_dataset, self.args)
        if isinstance(dataset, dict):
            metrics: dict[str, float] = {}
            for name, part in dataset.items():
                metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        if not hasattr(dataset, "__len__"):
            raise TaidError("evaluation needs an eval_dataset with a length.")
        figures = self.held_out(dataset)
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in figures.items()
                   if isinstance(value, (int, float))}
        metrics |= {f"{metric_key_prefix}_canary_{role}_{key}": value
                    for role, found in self.look(dataset).items() for key, value in found.items()}
        metrics[f"{metric_key_prefix}_loss"] = figures.get("kl", figures.get("nll", float("nan")))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics)
        return metrics

    def held_out(self, dataset: Sequence[Any]) -> dict[str, Any]:
        """`taid_vlm.evaluation.held_out.summarise` over all processes."""
        return summarise(self.tally(dataset))

    def tally(self, dataset: Sequence[Any], keep_answers: bool = False) -> Tally:
        """`taid_vlm.evaluation.held_out.evaluate_pair` over all processes."""
        with kept_if_lost(self):
            tally = evaluate_pair(
                self.model, self.teacher, dataset, self.collator, self.pairing,
                keep_answers=keep_answers, measure=fused_figures(self),
                progress=not self.args.disable_tqdm and self.is_world_process_zero(),
                **self.evaluation_options())
        merged = Tally()
        for part in gather_object([tally]):
            merged.merge(part)
        return merged

    def look(self, dataset: Sequence[Any]) -> Looks:
        """`evaluation.canary.canary` of teacher and student, by role; {} without images."""
        teacher = self.teacher.models if isinstance(self.teacher, Teachers) else self.teacher_model
        return self.canary.measure(
            dataset, self.model, teacher, self.collator, **self.evaluation_options())

    def place_student(self) -> None:
        """To its device, to which FSDP and DeepSpeed bring it only when training begins."""
        plain = getattr(self.model, "quantization_method", None) is None
        if self.optimizer is None and plain and not self.place_model_on_device:
            self.model.to(self.args.device)

    def evaluation_options(self) -> dict[str, Any]:
        return {
            "batch_size": self.args.per_device_eval_batch_size, "device": self.args.device,
            "process": (self.accelerator.process_index, self.accelerator.num_processes),
            "autocast": self.accelerator.autocast,
        }

    def all_dropped(self) -> dict[str, int]:
        """Training records left out so far, by reason, over all processes."""
        return dict(sum(gather_object([self.dropped]), Counter()))

    def all_notes(self) -> dict[str, int]:
        """What of the training records had no effect so far, over all processes."""
        return dict(sum(gather_object([self.notes]), Counter()))

    def all_unread(self) -> dict[str, int]:
        """Records used so far that have a column which nothing reads, over all processes."""
        return dict(sum(gather_object([self.intake.unread]), Counter()))

    # ----- checkpoints ----------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Trainer matches parameter names literally, and so misses those of most VLMs."""
        with gone_on_from(resume_from_checkpoint):
            self._load_weights(resume_from_checkpoint, model)

    def _load_weights(self, resume_from_checkpoint: str, model: Any) -> None:
        state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
        self.visual.load(Path(resume_from_checkpoint))
        self.router.restore(Path(resume_from_checkpoint))
        if self.rollouts is not None:
            self.rollouts.load(Path(resume_from_checkpoint), state.global_step)
        target = self.model if model is None else model
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if sharded or not isinstance(target, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            restore_weights(target, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with gone_on_from(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with gone_on_from(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        """As above, for `load_best_model_at_end`."""
        if isinstance(self.model, PreTrainedModel) and self.state.best_model_checkpoint:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint is whole or absent; a full disk must not leave half of one."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        kept = self.args.save_total_limit
        refuse_nonfinite(model, f"the checkpoint '{folder}'")
        try:
            if self.is_world_process_zero():
                shutil.rmtree(folder, ignore_errors=True)  # what an interruption left of one
                self.visual.save(folder)
                self.router.save(folder)
            if self.rollouts is not None:
                self.rollouts.save(folder)
            self.accelerator.wait_for_everyone()
            self.args.save_total_limit = None  # older ones go when this one is whole
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process writes its own random state
            if self.is_world_process_zero():
                seal(folder, {"recipe": self.recipe, "resumable": not self.args.save_only_model})
                rotate_checkpoints(
                    self.args.output_dir, save_total_limit=kept, use_mtime=False,
                    best_model_checkpoint=self.state.best_model_checkpoint)
        except Exception as error:
            if self.is_world_process_zero():
                shutil.rmtree(folder, ignore_errors=True)
            raise TaidError(f"the checkpoint '{folder}' could not be written, nothing of it was "
                            f"kept: {error}") from error
        finally:
            self.args.save_total_limit = kept
