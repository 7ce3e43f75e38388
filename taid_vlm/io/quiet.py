"""Libraries that say less: for a while, or in a worker for good."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(*names: str, warn: bool = True) -> Iterator[None]:
    """Inside, the loggers of these libraries say errors only.

    Args:
        warn: whether Python's own warnings are shown.
    """
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            if not warn:
                warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def quiet_worker() -> None:
    """A worker prints nothing but errors: the main process says how far things are, and that Ctrl-C
    ended them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("taid_vlm").setLevel(logging.ERROR)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
