"""`taid-vlm completion`: commands, options and choices completed by the shell."""

from __future__ import annotations

from typing import Literal

from taid_vlm import __version__
from taid_vlm.commands import COMMANDS
from taid_vlm.commands.options import Options, choices, positional
from taid_vlm.commands.parser import add_options, command, overview

PATHS = ("recipe", "output_dir", "teacher", "tower", "language_model", "runs", "MODEL", "FILE",
         "FOLDER", "DATA")  # options and metavars


class CompletionOptions(Options):
    shell: Literal["bash", "zsh", "tcsh"] = positional(
        'for bash: eval "$(taid-vlm completion bash)"')


def run(options: CompletionOptions) -> None:
    import shtab

    parser, parsers = overview(__version__)
    for name in COMMANDS:
        _, model = command(name)
        for action in add_options(parsers[name], model)._actions:
            if action.dest in model.model_fields:
                action.choices = choices(model.model_fields[action.dest]) or None
            if action.dest in PATHS or action.metavar in PATHS:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, options.shell))
