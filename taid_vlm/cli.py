"""The command `taid-vlm`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from taid_vlm import __version__
from taid_vlm.commands import COMMANDS
from taid_vlm.commands.parser import Parser, add_options, command, overview
from taid_vlm.errors import TaidError
from taid_vlm.io.terminal import printable


class _Formatter(logging.Formatter):
    """Log lines quote records; what is in these must not steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))

if TYPE_CHECKING:
    pass


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


def distill_script(default_recipe: str) -> int:
    """`taid-vlm distill` for a script that brings a recipe of its own."""
    from taid_vlm.commands.recipes import is_override

    words = sys.argv[1:]
    named = any(not word.startswith("-") and not is_override(word) for word in words)
    return main(["distill", *([] if named else [default_recipe]), *words])


def _refused(message: str) -> int:
    print(f"error: {printable(message)}", file=sys.stderr)
    return 2


def _prepare() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data-loader workers fork


if __name__ == "__main__":
    sys.exit(main())
