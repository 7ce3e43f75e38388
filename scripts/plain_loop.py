"""The training of DistillationTrainer on one screen: accelerate, no Trainer.

    accelerate launch scripts/plain_loop.py recipe.yaml [train.max_steps=100 ...]

A test asserts that both give equal weights. What it leaves out: logging, checkpoints, evaluation.
"""

from __future__ import annotations

import contextlib
import itertools
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader
from transformers import get_scheduler

from taid_vlm.batch.losses import by_weight, weight_sum
from taid_vlm.config.recipe import load_recipe
from taid_vlm.models.loading import load_model
from taid_vlm.objectives import parse_objective
from taid_vlm.runs.ingredients import gather
from taid_vlm.teachers import LocalTeacher
from taid_vlm.training.loss import choose_step
from taid_vlm.training.pair import pair_for_training


def train(student, teacher, collator, pairing, dataset, args):  # noqa: RET503
    """Train `student` in place; `args` is a DistillationConfig with max_steps."""
    set_seed(args.seed)
    accelerator = Accelerator(
        cpu=args.use_cpu, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    loader = DataLoader(dataset, args.per_device_train_batch_size, shuffle=True,
                        collate_fn=collator)
    optimizer = torch.optim.AdamW(
        student.parameters(), args.learning_rate, (args.adam_beta1, args.adam_beta2),
        args.adam_epsilon, args.weight_decay, fused=True)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(
        args.max_steps), args.max_steps)  # not prepared: one step of it per optimizer step
    student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    teacher = LocalTeacher(teacher.to(accelerator.device))
    pairing = pairing.to(accelerator.device)
    objective = parse_objective(args.objective)
    schedule, step, loss_of = objective.schedule(args.max_steps), 0, None
    student.train()
    for epoch in itertools.count():  # until max_steps
        loader.set_epoch(epoch)
        stream = iter(loader)
        while batches := list(itertools.islice(stream, args.gradient_accumulation_steps)):
            count = torch.tensor(sum(map(weight_sum, batches)), device=accelerator.device)
            tokens = accelerator.reduce(count, "sum")  # of the whole step, over all processes
            taid_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
            for index, batch in enumerate(batches):
                last = index == len(batches) - 1
                loss_of = loss_of or choose_step(args.loss_implementation, objective, pairing,
                                                 student, teacher, batch)
                with contextlib.nullcontext() if last else accelerator.no_sync(student):
                    found = loss_of(student, teacher, batch, schedule and schedule.t, False)
                    accelerator.backward(found.loss * accelerator.num_processes / tokens)
                    if schedule:
                        taid_sum += by_weight(batch, found.losses["taid"]).sum().detach().double()
            accelerator.clip_grad_norm_(student.parameters(), args.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if schedule:  # t moves once per optimizer step, on the global mean
                schedule.update(float(accelerator.reduce(taid_sum, "sum") / tokens), step)
            step += 1
            if step == args.max_steps:
                return accelerator.unwrap_model(student)


def main() -> None:
    recipe = load_recipe(sys.argv[1], sys.argv[2:])
    data = gather(recipe)
    student, teacher = load_model(recipe.student, "student"), load_model(recipe.teacher, "teacher")
    pairing, collator = pair_for_training(
        student, teacher, data.student_processor, data.teacher_processor, data.args,
        [data.train])
    trained = train(student, teacher, collator, pairing, data.train, data.args)
    trained.save_pretrained(recipe.output_dir)
    data.student_processor.save_pretrained(recipe.output_dir)


if __name__ == "__main__":
    main()
