"""A run's folder: what an earlier run left in it, and what a new one takes away."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from taid_vlm.errors import TaidError
from taid_vlm.evaluation.answers import FILE as ANSWERS
from taid_vlm.io.folders import refuse_file_in_the_way

logger = logging.getLogger(__name__)

STUDENT = "student"  # the model that a run has trained
RESULTS = "results.json"
REPORT = "report.html"
RECIPE = "recipe.yaml"


def find_checkpoint(output: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from; a fresh start never walks over an unfinished run."""
    refuse_file_in_the_way(output)
    last = last_checkpoint(output)
    if resume:
        if last is None:
            raise TaidError(f"--resume: '{output}' holds no whole checkpoint.")
        return last
    if last is not None and not is_finished(output):
        raise TaidError(f"'{output}' holds {last.name} of an unfinished run: continue it with "
                        "--resume, or choose another output_dir.")
    return None


def is_finished(output: Path) -> bool:
    return (output / RESULTS).exists()


def clear_results(output: Path) -> None:
    """Take away what an earlier, finished run left, so that this one cannot pass for finished."""
    if is_finished(output):
        logger.warning("'%s' holds a finished run; its results are replaced.", output)
        (output / RESULTS).unlink()
        (output / ANSWERS).unlink(missing_ok=True)
    for folder in output.glob("checkpoint-*"):
        shutil.rmtree(folder)


def last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that was written whole (its trainer state comes last)."""
    whole = [folder for folder in output.glob("checkpoint-*")
             if folder.name.removeprefix("checkpoint-").isdigit()
             and (folder / "trainer_state.json").exists()]
    return max(whole, key=lambda folder: int(folder.name.rsplit("-", 1)[1]), default=None)
