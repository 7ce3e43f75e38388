"""Text for a terminal: visible escapes, tables that fit."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from taid_vlm.cli import main
from taid_vlm.io.terminal import printable, table

ROWS = [[("name", "bold"), ("value", "bold")], ["a long name of [bold]some[/bold] model", "1.5"],
        ["b\x1b[2J", ("12.25", "red")]]


def test_control_characters_are_shown() -> None:
    assert printable("\x1b[2J\x07 \x9b2J \r\x7f") == r"\x1b[2J\x07 \x9b2J \r\x7f"
    assert printable("\u202egnp.exe \ud800") == r"\u202egnp.exe \ud800"


def test_what_is_harmless_stays() -> None:
    text = "naïve 日本 👩‍🚀 ü\n\ttab  שלום"
    assert printable(text) == text


def test_a_table_is_as_wide_as_it_needs_where_nobody_looks() -> None:
    expected = [("name", "value"), (ROWS[1][0], "1.5"), (r"b\x1b[2J", "12.25")]
    assert table(ROWS, right=[1]).split("\n") == [
        f"{name:<38}  {value:>5}" for name, value in expected]


@pytest.mark.parametrize("width", [20, 30])
def test_a_table_fits_and_loses_nothing(width: int) -> None:
    narrow = table(ROWS, right=[1], width=width)
    assert max(map(len, narrow.split("\n"))) <= width
    assert sorted(re.sub(r"\s", "", narrow)) == sorted(re.sub(r"\s", "", table(ROWS)))


def test_colours_only_where_asked() -> None:
    coloured = table(ROWS, right=[1], width=60, colour=True)
    assert coloured.startswith("\x1b[1mname\x1b[0m")
    assert re.sub(r"\x1b\[\d+m", "", coloured) == table(ROWS, right=[1], width=60, colour=False)
    assert "\x1b[2J" not in coloured
    long = [["a", ("some words that do not fit into one line", "red")]]
    coloured = table(long, width=12, colour=True)
    assert re.sub(r"\x1b\[\d+m", "", coloured) == table(long, width=12, colour=False)


def test_rich_is_imported_where_a_table_is_printed() -> None:
    code = ("import sys, taid_vlm.io.terminal as t; assert 'rich' not in sys.modules; "
            "t.table([['a']]); assert 'rich' in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_messages_do_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "no\x1b[2J.yaml"]) == 2
    assert capsys.readouterr().err.startswith(r"error: recipe 'no\x1b[2J.yaml'")


def test_log_lines_do_not_steer_the_terminal() -> None:
    code = ("import logging; from taid_vlm import cli; cli._prepare(); "
            "logging.getLogger('taid_vlm').warning('left out: %s', '\\x1b[2J')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "left out: \\x1b[2J\n"
