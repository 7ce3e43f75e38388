"""Tasks that an interrupted evaluation had finished, kept until the whole of it is."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from taid_vlm.io.files import read_json, write_json
from taid_vlm.io.hashing import text_hash

logger = logging.getLogger(__name__)


class Unfinished:
    """Beside an output folder that is not there yet, in a hidden one: a file for every task.

    Args:
        output: the folder that the evaluation is for.
        identity: all that every task's figures depend on; what was kept under another one is not
            used.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any]) -> None:
        self.folder = output.with_name(f".{output.name}.unfinished")
        self.identity = identity

    def once(self, task: str, of_task: Any, measure: Callable[[], Any]) -> Any:
        """What `measure` returns, as JSON has it, or had returned before the interruption.

        Args:
            of_task: what this task's figures depend on beside the identity.
        """
        known = json.dumps([self.identity, task, of_task], sort_keys=True, default=str)
        path = self.folder / f"{text_hash(known)}.json"
        if path.exists():
            logger.info("%s: measured before the interruption", task)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(measure(), path)
        return read_json(path, "a finished task")

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
