"""The command `taid-vlm`."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from taid_vlm import __version__
from taid_vlm.commands import COMMANDS
from taid_vlm.commands.parser import Parser, add_options, command, overview
from taid_vlm.config.secrets import redact_text
from taid_vlm.errors import TaidError
from taid_vlm.io.terminal import printable

TRACEBACK = "TAID_VLM_TRACEBACK"  # environment variable: let what is unexpected through


class _Formatter(logging.Formatter):
    """Log lines quote records; what is in these must not steer the terminal, or tell secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(redact_text(super().format(record)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake ends with one message on stderr and exit status 2."""
    name, *words = (sys.argv[1:] if argv is None else argv) or [""]
    usage = "taid-vlm"
    try:
        if name.startswith("-"):
            overview(__version__)[0].parse([name])  # prints and exits, or raises
        module, model = command(name)
        usage = f"taid-vlm {name}"
        parser = add_options(Parser(prog=usage, description=COMMANDS[name]), model)
        options = model(**parser.parse(words))
    except TaidError as error:
        return _refused(f"{error} (usage: {usage} --help)")
    _prepare()
    try:
        return module.run(options) or 0
    except TaidError as error:
        return _refused(str(error))
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print(f"interrupted{getattr(module, 'INTERRUPTED', '')}", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno is None or error.filename is None:  # a library's, not the system's
            return _unexpected(error, options)
        return _refused(f"'{error.filename}': {error.strerror}.")
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        return _unexpected(error, options)


def distill_script(default_recipe: str) -> int:
    """`taid-vlm distill` for a script that brings a recipe of its own."""
    from taid_vlm.commands.recipes import is_override

    words = sys.argv[1:]
    named = any(not word.startswith("-") and not is_override(word) for word in words)
    return main(["distill", *([] if named else [default_recipe]), *words])


def _refused(message: str) -> int:
    print(f"error: {printable(redact_text(message))}", file=sys.stderr)
    return 2


def _unexpected(error: Exception, options: Any) -> int:
    """One message; all that is known goes into a file, beside the results where there are some."""
    path = Path("taid-vlm-error.log")
    with contextlib.suppress(Exception):  # what went wrong once may do so again
        path = getattr(options, "error_log", lambda: path)()
    text = redact_text("".join(traceback.format_exception(error)))
    try:
        path.write_text(text, encoding="utf-8")
        where = f"the full traceback is in {path}"
    except OSError:
        where = f"{TRACEBACK}=1 shows the full traceback"
    lines = [line for line in redact_text(str(error)).splitlines() if line.strip()]
    message = ": ".join([type(error).__name__, *lines[:1]])
    print(f"error: {printable(message)} ({where})", file=sys.stderr)
    return 1


class _Handler(logging.StreamHandler[Any]):
    """Lines that do not run into a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        module = sys.modules.get("tqdm")  # without it there is no bar
        with contextlib.nullcontext() if module is None else module.tqdm.external_write_mode(
                file=self.stream):
            super().emit(record)


def _prepare() -> None:
    """The main process says what it does; others, and libraries, say errors only."""
    handler = _Handler()
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.ERROR)
    main_process = os.environ.get("RANK", "0") == "0"
    logging.getLogger("taid_vlm").setLevel(logging.INFO if main_process else logging.ERROR)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning, module="(?!taid_vlm)")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data-loader workers fork
    if not (main_process and sys.stderr.isatty()):  # bars are for who looks at them
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


if __name__ == "__main__":
    sys.exit(main())
