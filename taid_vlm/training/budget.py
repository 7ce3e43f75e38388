"""`train.tokens_per_batch`: micro-batches of like lengths, as large as a number of tokens allows.

The records of a pass are shuffled and cut into windows; those of a window are sorted by length, put
into batches, and these are shuffled. Only a window's lengths have to be known, when it is reached.
Every process has as many batches of a window as any other. Passes follow upon each other without a
gap, so an optimizer step is always `gradient_accumulation_steps` batches of every process, and its
loss is divided by what all of them train on, as that of any other split of its records.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch.utils.data
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import seed_worker

from taid_vlm.batch.collator import DistillationCollator
from taid_vlm.batch.lengths import Lengths
from taid_vlm.errors import TaidError
from taid_vlm.training.config import DistillationConfig

logger = logging.getLogger(__name__)

WINDOW = 1024  # records, for each process
Batches = list[list[int]]


def planned(lengths: np.ndarray, budget: int, packing: bool, processes: int,
            generator: np.random.Generator) -> list[Batches]:
    """Rows of a window in groups of `processes` batches, every row in one of them.

    Args:
        lengths: [rows, models] tokens.
        budget: of every model, rows times the longest one are at most so many, with `packing` the
            sum of all. A longer row is alone.
        generator: of the groups' order. Batches of a group are neighbours by length: processes
            wait for each other.
    """
    longest = lengths.max(1)
    batches, cost = Batches(), np.zeros(lengths.shape[1])
    for row in range(len(lengths)) if packing else np.argsort(longest, kind="stable"):
        last = batches[-1] if batches else []
        cost = cost + lengths[row] if packing else (len(last) + 1) * longest[row, None]
        if not last or cost.max() > budget:
            batches.append([])
            cost = lengths[row] if packing else longest[row, None]
        batches[-1].append(int(row))
    while len(batches) % processes:
        place = max(range(len(batches)), key=lambda i: len(batches[i]))
        rows = batches[place]
        batches[place : place + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    groups = [batches[i : i + processes] for i in range(0, len(batches), processes)]
    return [groups[i] for i in generator.permutation(len(groups))]


def check_budget(data: Any) -> None:
    """Raise TaidError for data whose records cannot be drawn in another order."""
    if isinstance(data, torch.utils.data.IterableDataset) or not hasattr(data, "__len__"):
        raise TaidError("train.tokens_per_batch sorts records by length, and data.train is streamed"
                        " or in windows: take train.per_device_train_batch_size, or data with a "
                        "length.")


class BudgetBatches(torch.utils.data.Sampler[list[int]]):
    """One process's batches of rows, without end.

    Args:
        lengths: of the data set's records.
        passes: over the data; behind the last one, empty batches. Without end if None.
        process: its index, and the number of all; gather: what all of them have, one behind the
            other.
    """

    def __init__(
        self, lengths: Lengths, budget: int, packing: bool, seed: int,
        passes: float | None = None, process: tuple[int, int] = (0, 1),
        gather: Callable[[list[Any]], list[Any]] = list,
    ) -> None:
        self.lengths, self.budget, self.packing, self.seed = lengths, budget, packing, seed
        self.passes, self.process, self.gather = passes, process, gather
        self.counts: list[int] = []  # batches of every window so far
        self.skipped = 0  # batches that a run that goes on has trained on

    def __iter__(self) -> Iterator[list[int]]:
        """Of windows that are skipped as many empty batches, without a look at their records."""
        start = 0
        for number, rows in enumerate(self._windows()):
            if number < len(self.counts) and start + self.counts[number] <= self.skipped:
                yield from itertools.repeat([], self.counts[number])
            else:
                yield from self._window(number, rows)
            start += self.counts[number]
        yield from itertools.repeat([])

    @classmethod
    def of(
        cls, data: Any, collator: DistillationCollator, args: DistillationConfig,
        accelerator: Accelerator,
    ) -> BudgetBatches | None:
        """As the arguments of a run say; None where they say nothing of it.

        Raises:
            TaidError: data without a length.
        """
        if args.tokens_per_batch is None or data is None:
            return None
        check_budget(data)
        seed = args.seed if args.data_seed is None else args.data_seed
        return cls(
            Lengths(data, collator), args.tokens_per_batch, args.packing, seed,
            args.num_train_epochs if args.max_steps <= 0 else None,
            (accelerator.process_index, accelerator.num_processes), gather_object)

    def loader(self, trainer: Trainer) -> Any:
        """What the trainer draws its micro-batches from.

        Where the run is so many passes long, all lengths are taken here, as its learning rate goes
        by the number of its steps.
        """
        args = trainer.args
        if args.max_steps <= 0:
            logger.info("The lengths of all records are taken, as the number of steps goes by them "
                        "(train.max_steps would need them only as they come).")
            args.max_steps = self.steps(args.gradient_accumulation_steps)
        loader = DataLoader(
            self.lengths.data, batch_sampler=self, collate_fn=trainer.data_collator,
            num_workers=args.dataloader_num_workers, pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            in_order=args.dataloader_in_order,
            worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers,
                                   rank=args.process_index))
        return prepare_data_loader(
            loader, trainer.accelerator.device, num_processes=1, process_index=0,
            put_on_device=True, dispatch_batches=False,
            non_blocking=trainer.accelerator.non_blocking)

    # ----- checkpoints ----------------------------------------------------------------------

    @property
    def _kind(self) -> list[Any]:
        """What the batches of a window follow from."""
        return [len(self.lengths.data), self.budget, self.packing, self.seed, self.passes,
                self.process[1]]

    def state_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"kind": self._kind, "counts": list(self.counts)}

    def go_on(self, state: Mapping[str, Any] | None, batches: int) -> None:
        """Behind so many batches; with the state of such a run no record of these is looked at."""
        self.skipped = batches
        if state is not None and state["kind"] == self._kind:
            self.counts = list(state["counts"])

    # ----- batches --------------------------------------------------------------------------

    def steps(self, accumulation: int) -> int:
        """Optimizer steps of all passes, for which all lengths have to be known."""
        batches = sum(len(self._window(number, rows))
                      for number, rows in enumerate(self._windows()))
        return max(1, -(-batches // accumulation))

    def passed(self, batches: int) -> float:
        """Passes over the data that so many batches are."""
        number, start = 0, 0
        while number < len(self.counts) and start + self.counts[number] <= batches:
            start, number = start + self.counts[number], number + 1
        inside = (batches - start) / self.counts[number] if number < len(self.counts) else 0.0
        size, rows = self._size, len(self.lengths.data)
        each = -(-rows // size)
        turn, place = divmod(number, each)
        here = min(size, rows - place * size)
        done = turn + (place * size + inside * here) / rows
        return done if self.passes is None else min(done, self.passes)

    @property
    def _size(self) -> int:
        return WINDOW * self.process[1]

    def _windows(self) -> Iterator[np.ndarray]:
        rows = len(self.lengths.data)
        for turn in itertools.count():
            share = 1.0 if self.passes is None else min(1.0, self.passes - turn)
            if share <= 0:
                return
            order = np.random.default_rng((self.seed, turn)).permutation(rows)
            order = order[: math.ceil(share * rows)]
            yield from (order[i : i + self._size] for i in range(0, len(order), self._size))

    def _window(self, number: int, rows: np.ndarray) -> Batches:
        index, processes = self.process
        if missing := self.lengths.missing(rows):
            own = missing[index::processes]
            for row, tokens in self.gather([(row, self.lengths.measure(row)) for row in own]):
                self.lengths.known[row] = tokens
        groups = planned(self.lengths.known[rows], self.budget, self.packing, processes,
                         np.random.default_rng((self.seed, number, 1)))
        self.counts[number:number + 1] = [len(groups)]
        return [rows[group[index]].tolist() for group in groups]
