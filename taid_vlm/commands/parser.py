"""Options models as argparse's parsers: several values behind one option, words in any order."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from importlib import import_module
from itertools import takewhile
from types import ModuleType
from typing import Any, NoReturn

from taid_vlm.commands import COMMANDS
from taid_vlm.errors import TaidError, nearest


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations, and leaves what an error looks like to the caller."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise TaidError(f"{message}.")

    def parse(self, words: Sequence[str]) -> dict[str, Any]:
        """What the words say, options and the rest in any order; unknown options come first."""
        valid = [text for action in self._actions for text in action.option_strings]
        for word in takewhile(lambda word: word != "--", words):
            option = word.partition("=")[0]
            if re.match("--?[A-Za-z]", word) and " " not in option and option not in valid:
                key = option.lstrip("-").replace("-", "_")
                plain = f" A recipe's key has no dashes: {key}=VALUE." if any(
                    action.dest == "overrides" for action in self._actions) else ""
                raise TaidError(f"no option '{option}'.{nearest(option, valid)}{plain}")
        parse = self.parse_args if self._subparsers else self.parse_intermixed_args
        return vars(parse(words))


def overview(version: str) -> tuple[Parser, dict[str, Parser]]:
    """The parser of the whole command line, and its commands', which know no options yet."""
    parser = Parser(prog="taid-vlm", description="Distil large vision-language models and LLMs "
                                                 "into small ones.")
    parser.add_argument("--version", action="version", version=f"taid-vlm {version}")
    commands = parser.add_subparsers(metavar="COMMAND")
    return parser, {name: commands.add_parser(name, help=text) for name, text in COMMANDS.items()}


def command(name: str) -> tuple[ModuleType, Any]:
    """A command's module and the model of its options."""
    if name not in COMMANDS:
        raise TaidError(f"no command '{name}'.{nearest(name, COMMANDS)}" if name else
                        f"a command is missing. Valid: {', '.join(COMMANDS)}.")
    module = import_module(f"taid_vlm.commands.{name}")
    return module, getattr(module, f"{name.capitalize()}Options")


def reference() -> str:
    """docs/reference.md: every key of a recipe, and every option of a command."""
    from taid_vlm.config.reference import reference_page

    return reference_page({name: command(name)[1] for name in COMMANDS})


def add_options(parser: Parser, model: Any) -> Parser:
    """The same with an argument for every field; values stay text, which the model checks."""
    from taid_vlm.commands.options import choices, flag, shown

    group: Any = parser
    for name, field in model.model_fields.items():
        group = parser.add_argument_group(model.groups[name]) if name in model.groups else group
        how, required, valid = shown(field), field.is_required(), ",".join(choices(field))
        keywords: dict[str, Any] = {"help": field.description and field.description.replace(
            "%", "%%"), "default": argparse.SUPPRESS}
        if not how["positional"]:
            keywords |= {"dest": name, "required": required}
        if field.annotation in (bool, bool | None):
            keywords["action"] = "store_true"
        else:
            keywords["metavar"] = how["metavar"] or (f"{{{valid}}}" if valid else None)
        if how["many"]:
            keywords["nargs"] = "*" if how["positional"] and not required else "+"
            keywords["action"] = "extend"
        names = [name] if how["positional"] else [*filter(None, (flag(name), how["also"]))]
        group.add_argument(*names, **keywords)
    return parser
