"""Files that are no recipe end in one message, at once."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import yaml

from taid_vlm.config.recipe import load_recipe
from taid_vlm.config.yaml import DEEPEST, LARGEST_FILE, dump_yaml, parse_yaml
from taid_vlm.errors import RecipeError

ROWS = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
MAPS = "".join(f"a{n}: &a{n} {{{', '.join(f'k{i}: *a{n - 1}' for i in range(9))}}}\n"
               for n in range(1, 30))
MERGED = "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 30))


def refused(path: Path) -> str:
    started = time.process_time()
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert time.process_time() - started < 1
    assert "\n" not in str(caught.value) and path.name in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("text", ["a0: &a0 [x]\n" + ROWS, "a0: &a0 x\n" + MAPS,
                                  "a0: &a0 {x: 1}\n" + MERGED])
def test_aliases_of_aliases(text: str, tmp_path: Path) -> None:
    (tmp_path / "bomb.yaml").write_text(text)
    assert "stands for more than 100,000 values" in refused(tmp_path / "bomb.yaml")


@pytest.mark.parametrize(("text", "message"), [
    (r'path: "a\0b"', "a text holds a null character (line 1)"),
    ("[" * 100_000, "nested more than"),
    ("[" * 200 + "]" * 200, "nested more than"),
    ("{a: " * (DEEPEST + 1) + "1" + "}" * (DEEPEST + 1), "nested more than"),
    ("".join(" " * n + "a:\n" for n in range(300)), "nested more than"),
    ("a: &a [*a]", "a value holds itself (line 1)"),
    ("a: &a {b: *a}", "a value holds itself"),
    ("a: 1\nb: 2\na: 3", "the key 'a' stands twice (line 3)"),
    ("? [a, b]\n: 1", "not valid YAML (line 1): while constructing a mapping: found unhashable"),
    ("a: {b", "not valid YAML (line 1): while parsing a flow mapping"),
    ("a: 2024-13-01", "not valid YAML: month must be in 1..12."),
    (f"a: {'9' * 5000}", "not valid YAML: Exceeds the limit"),
    ("a: !!python/object:os.system x", "not valid YAML"),
    ("a: \0", "not valid YAML"),
    ("", "this file is empty"),
    ("# nothing\n", "this file is empty"),
    ("a: 1\n---\nb: 2", "expected a single document"),
])
def test_texts_that_are_no_recipe(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"r\.yaml") as caught:
        load_recipe(tmp_path / "r.yaml")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes("name: größe".encode("latin-1"))
    assert "not UTF-8 at byte 8" in refused(tmp_path / "r.yaml")


def test_a_folder(tmp_path: Path) -> None:
    assert "is a folder; name the YAML file." in refused(tmp_path)
    (tmp_path / "recipe.yaml").write_text("a: 1")
    assert "is a folder; name the YAML file in it: recipe.yaml." in refused(tmp_path)


def test_a_pipe_and_a_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "is no regular file" in refused(tmp_path / "pipe.yaml")
    assert "is no regular file" in refused(Path("/dev/zero"))


def test_a_file_that_cannot_be_looked_at() -> None:
    assert "cannot be read: File name too long." in refused(Path(f"/tmp/{'x' * 300}.yaml"))


def test_overrides_are_bounded_too(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("a: 1")
    for value, message in (("[" * 9999, "nested"), ("{b: 1, b: 2}", "twice"), ("[1", "not valid")):
        with pytest.raises(RecipeError, match=rf"override 'a=.*': .*{message}"):
            load_recipe(tmp_path / "r.yaml", [f"a={value}"])


def test_data_in_place_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("a: 1\n" * (LARGEST_FILE // 5 + 1))
    assert "is it a file of data?" in refused(tmp_path / "train.yaml")


def test_anchors_may_be_used() -> None:
    assert parse_yaml("a: &x {b: 1}\nc: {<<: *x, d: 2}\ne: *x") == {
        "a": {"b": 1}, "c": {"b": 1, "d": 2}, "e": {"b": 1}}


def test_a_shallow_list_of_many_values_is_fine() -> None:
    assert len(parse_yaml(f"[{', '.join(['1'] * 20_000)}]")) == 20_000


@pytest.mark.parametrize("value", ["12e5", "1e-4", ".5e3", "no", "007", "", "null", "ä: #"])
def test_texts_come_back_as_texts(value: str) -> None:
    assert parse_yaml(dump_yaml({"a": value})) == {"a": value}
    assert yaml.safe_load(dump_yaml({"a": value})) == {"a": value}
