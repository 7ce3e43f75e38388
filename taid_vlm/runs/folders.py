"""A run's folder: what may stand in it, what a new run takes away, and where one goes on.

Only what this program has written is ever removed: checkpoints carry a manifest, and a run's own
files lie beside its `recipe.yaml`.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from taid_vlm.config.data import listed
from taid_vlm.config.recipe import Recipe
from taid_vlm.errors import TaidError
from taid_vlm.evaluation.answers import FILE as ANSWERS
from taid_vlm.io.folders import refuse_file_in_the_way
from taid_vlm.io.manifest import damage, read_manifest

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

STUDENT = "student"  # the model that a run has trained
RESULTS = "results.json"
REPORT = "report.html"
RECIPE = "recipe.yaml"
LOCK = ".lock"
# what may differ between a checkpoint's recipe and the one that goes on from it
MAY_CHANGE = ("output_dir", "evaluate", "train.max_steps", "train.num_train_epochs",
              "train.logging_", "train.save_", "train.eval_", "train.report_to", "train.run_name",
              "train.disable_tqdm", "train.dataloader_", "train.load_best_model_at_end",
              "train.metric_for_best_model", "train.greater_is_better",
              "train.per_device_eval_batch_size", "train.max_nonfinite_steps",
              "train.push_to_hub", "train.hub_", "train.max_left_out",
              "teacher.server.url", "teacher.server.timeout", "teacher.server.retries",
              "teacher.server.concurrency", "teacher.server.api_key_env", "teacher.server.check",
              "teacher.sharding", "teacher.devices",
              *(f"objective.on_policy.engine.{key}" for key in (
                  "url", "timeout", "retries", "concurrency", "api_key_env", "weights_dir")))


def find_checkpoint(recipe: Recipe, resume: bool, overwrite: bool = False) -> Path | None:
    """The checkpoint to go on from, None for a fresh start.

    Args:
        overwrite: a finished run in the folder may be replaced.

    Raises:
        TaidError: something in the folder would be lost, or does not belong to this recipe.
    """
    output = Path(recipe.output_dir)
    refuse_in_the_way(output)
    _refuse_inputs(recipe, output)
    _refuse_foreign(output)
    if resume:
        checkpoint = _newest_whole(output)
        _refuse_other_recipe(checkpoint, recipe)
        return checkpoint
    last = next((c for c in checkpoints(output) if read_manifest(c) is not None), None)
    if is_finished(output):
        if not overwrite:
            raise TaidError(f"'{output}' holds a finished run: give --overwrite to replace it, or "
                            "choose another output_dir.")
    elif last is not None:
        raise TaidError(f"'{output}' holds {last.name} of an unfinished run: continue it with "
                        "--resume, or choose another output_dir.")
    return None


def is_finished(output: Path) -> bool:
    return (output / RESULTS).exists()


def checkpoints(output: Path) -> list[Path]:
    """Folders named as checkpoints are, newest first."""
    named = [folder for folder in output.glob("checkpoint-*")
             if folder.is_dir() and _is_checkpoint_name(folder)]
    return sorted(named, key=lambda folder: -int(folder.name.rsplit("-", 1)[1]))


def _is_checkpoint_name(path: Path) -> bool:
    return path.name.removeprefix("checkpoint-").isdecimal()


def clear_results(output: Path) -> None:
    """Take away what an earlier run of this program left, so that this one cannot pass for
    finished."""
    if is_finished(output):
        logger.warning("'%s' holds a finished run; its results are replaced.", output)
        (output / RESULTS).unlink()
        (output / ANSWERS).unlink(missing_ok=True)
    for folder in checkpoints(output):
        if read_manifest(folder) is not None:
            shutil.rmtree(folder)


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold a run's folder; the lock goes with the process, so that none is ever stale.

    Raises:
        TaidError: another run holds it, or nothing can be written there.
    """
    with contextlib.ExitStack() as held:
        on_main(lambda: held.enter_context(_lock(output)), output)
        yield


@contextlib.contextmanager
def _lock(output: Path) -> Iterator[None]:
    refuse_file_in_the_way(output)
    output.mkdir(parents=True, exist_ok=True)
    with (output / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise TaidError(f"'{output}' is in use by another run (process {file.read().strip()}); "
                            "wait for it, or choose another output_dir.") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # no error of its own hides what ended the run
                (output / LOCK).unlink(missing_ok=True)
                output.rmdir()  # a run that was refused leaves no empty folder


def on_main(look: Callable[[], Result], output: Path) -> Result:
    """What the main process finds in a run's folder, or the error that it finds, in all processes:
    a checkpoint is hashed once, and nobody looks while another one writes.

    Raises:
        TaidError: that of `look`, or of a folder that cannot be read or written.
    """
    state, outcome = PartialState(), list[Any]([None, None])
    if state.is_main_process:
        try:
            outcome[0] = look()
        except TaidError as error:
            outcome[1] = error
        except OSError as error:  # permissions, a full disk, a name that is too long
            outcome[1] = TaidError(f"output_dir = '{output}' cannot be used: {error}. Choose "
                                   "another folder.")
    broadcast_object_list(outcome)
    result, problem = outcome
    if problem is not None:
        raise problem
    return result  # type: ignore[no-any-return]


# ----- what is refused ----------------------------------------------------------------------


def refuse_in_the_way(output: Path) -> None:
    """Where a file is to be stands no folder, and nothing but a folder where one is to be."""
    refuse_file_in_the_way(output)
    for name in (RECIPE, RESULTS, ANSWERS, REPORT, LOCK):
        if (output / name).is_dir():
            raise TaidError(f"'{output / name}' is a folder where a run writes a file: move it "
                            "away, or choose another output_dir.")
    named = [path for path in output.glob("checkpoint-*") if _is_checkpoint_name(path)]
    for folder in (output / STUDENT, *named):
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise TaidError(f"'{folder}' is no folder, but a run writes one there: move it away, "
                            "or choose another output_dir.")


def _refuse_inputs(recipe: Recipe, output: Path) -> None:
    """No input of the run is written over: not a model in `student/`, not data in a checkpoint."""
    specs = {"student": recipe.student, **recipe.teacher_specs}
    inputs = {f"{role}.{key}": getattr(spec, key) for role, spec in specs.items()
              for key in ("model_name_or_path", "processor_name_or_path") if getattr(spec, key)}
    data = [(f"data.{side}", path) for side, sources in recipe.data.sides.items()
            for source in listed(sources) for path in source.paths]
    written = [folder.resolve() for folder in (output / STUDENT, *checkpoints(output))]
    for key, value in [*inputs.items(), *data]:
        path = Path(value).expanduser().resolve()
        if path.exists() and any(folder in (path, *path.parents) for folder in written):
            raise TaidError(f"{key} = '{value}' lies in '{output}' where this run writes its "
                            "student and checkpoints: choose another output_dir.")


def _refuse_foreign(output: Path) -> None:
    """What looks like a run's but was not written by one would be removed in its course."""
    if (output / RECIPE).exists():
        return  # a run's folder; a checkpoint without a manifest was not written to its end
    for folder in checkpoints(output):
        if read_manifest(folder) is None:
            raise TaidError(f"'{folder}' was not written by a run in '{output}': move it away, or "
                            "choose another output_dir.")
    if (output / STUDENT).exists():
        raise TaidError(f"'{output / STUDENT}' belongs to no run, and this one would replace it: "
                        "move it away, or choose another output_dir.")


def _newest_whole(output: Path) -> Path:
    """The newest checkpoint that is as it was written; damaged ones are named."""
    for folder in checkpoints(output):
        problem = damage(folder)
        if problem is None:
            return _resumable(folder)
        logger.warning("'%s' is not whole: %s. An earlier checkpoint is looked for.", folder,
                       problem)
    raise TaidError(f"--resume: '{output}' holds no whole checkpoint.")


def _resumable(folder: Path) -> Path:
    if not (read_manifest(folder) or {}).get("resumable", True):
        raise TaidError(f"--resume: '{folder}' holds no optimizer (train.save_only_model): start a "
                        "new run from its weights with student.model_name_or_path, and leave "
                        "save_only_model out.")
    return folder


def _refuse_other_recipe(checkpoint: Path, recipe: Recipe) -> None:
    before = (read_manifest(checkpoint) or {}).get("recipe")
    if before is None:
        return
    then, now = flat(before), flat(recipe.resolved().tree())
    changed = [key for key in {**then, **now} if then.get(key) != now.get(key)
               and not re.sub(r"^teachers\.[^.]+", "teacher", key).startswith(MAY_CHANGE)]
    if changed:
        told = "; ".join(f"{key} was {then.get(key)!r:.60}, now {now.get(key)!r:.60}"
                         for key in changed[:4])
        raise TaidError(
            f"--resume: '{checkpoint}' was written with another recipe: {told}. Take the change "
            "back, or choose another output_dir (logging, saving, pushing, evaluation, where a "
            "teacher is served and the number of steps may change).")


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A tree's leaves by their path, {"train.learning_rate": 1e-3, "data.train.0.path": ...}."""
    if isinstance(tree, (list, tuple)) and any(isinstance(item, Mapping) for item in tree):
        tree = dict(enumerate(tree))
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return leaves
