"""The command line itself: what is said at once, words in any order, nearest names."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from cli.recipes import Outcome

from taid_vlm import __version__
from taid_vlm.cli import distill_script
from taid_vlm.commands import COMMANDS
from taid_vlm.commands.distill import distill
from taid_vlm.commands.options import Options, choices
from taid_vlm.commands.parser import Parser, add_options, command
from taid_vlm.commands.recipes import recipe_path, shipped_recipes
from taid_vlm.config.recipe import Recipe, load_recipe
from taid_vlm.errors import TaidError

Cli = Callable[..., Outcome]
ROOT = Path(__file__).parents[2]
CPU_SECONDS = 0.5
MEASURED = """
import json, sys, time
from taid_vlm.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as stop:
    status = stop.code
heavy = sorted({"torch", "transformers", "numpy"} & set(sys.modules))
print("\\n" + json.dumps([status or 0, heavy, time.process_time()]))
"""


def read(name: str, *words: str) -> dict[str, Any]:
    """The options that a command makes of its words."""
    _, model = command(name)
    return model(**add_options(Parser(prog=name), model).parse(words)).model_dump()


# ----- at once ------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "status"), [
    ("--help", 0), ("--version", 0), ("evaluate --help", 0), ("recipes", 0), ("completion bash", 0),
    ("schema recipe", 0),
    ("", 2), ("distil", 2), ("evaluate --modle x", 2), ("distill a.yaml --resume=1", 2),
    ("distill nowhere.yaml", 2), ("distill qwen3_8b_to_0.6b train.max_stesp=9", 2),
])
def test_what_needs_no_model_is_said_at_once(words: str, status: int) -> None:
    done = subprocess.run([sys.executable, "-c", MEASURED, *words.split()], capture_output=True,
                          text=True, check=True)
    found, heavy, seconds = json.loads(done.stdout.splitlines()[-1])
    assert (found, heavy) == (status, [])
    assert seconds <= CPU_SECONDS
    assert len(done.stderr.splitlines()) == (status == 2)


def test_the_overview_imports_no_command() -> None:
    code = ("import sys; from taid_vlm.commands.parser import overview; overview('0'); "
            "print([n for n in sys.modules if n.startswith('taid_vlm.commands.') or "
            "n == 'pydantic'])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['taid_vlm.commands.parser']"


def test_help_and_version(cli: Cli) -> None:
    shown = cli("--help").out
    assert all(f"\n    {name} " in shown or f"\n    {name}\n" in shown for name in COMMANDS)
    assert cli("--version").out == f"taid-vlm {__version__}\n"
    done = subprocess.run([sys.executable, "-m", "taid_vlm", "--version"], capture_output=True,
                          text=True, check=True)
    assert done.stdout == f"taid-vlm {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_its_help(name: str, cli: Cli) -> None:
    _, model = command(name)
    shown = cli(name, "--help")
    assert shown.status == 0
    assert issubclass(model, Options)
    for field, how in model.model_fields.items():
        label = f"--{field.strip('_').replace('_', '-')}"
        if how.json_schema_extra["positional"]:
            label = how.json_schema_extra["metavar"] or ",".join(choices(how)) or field
        assert label in shown.out
        assert (how.description or "").split(" ")[0].replace("%", "%%") in shown.out


# ----- words in any order, several values behind one option ---------------------------------


@pytest.mark.parametrize(("name", "words", "expected"), [
    ("distill", "r.yaml --resume train.max_steps=9 a.b=1", {"resume": True}),
    ("distill", "train.max_steps=9 r.yaml a.b=1 --resume", {"resume": True}),
    ("distill", "--resume train.max_steps=9 a.b=1 r.yaml", {"resume": True}),
    ("inspect", "r.yaml --all train.max_steps=9 --record 3 a.b=1", {"all": True, "record": 3}),
    ("inspect", "train.max_steps=9 --html p.html r.yaml --json a.b=1",
     {"json_": True, "html": Path("p.html")}),
    ("plan", "train.max_steps=9 --memory 24GB a.b=1 r.yaml", {"memory": "24GB"}),
])
def test_overrides_stand_anywhere(name: str, words: str, expected: dict[str, Any]) -> None:
    result = read(name, *words.split())
    assert (result["recipe"], result["overrides"]) == ("r.yaml", ["train.max_steps=9", "a.b=1"])
    assert expected.items() <= result.items()


def test_an_override_before_the_recipe_counts(cli: Cli) -> None:
    recipe = ROOT / "recipes" / "qwen3_8b_to_0.6b.yaml"
    for words in (["objective.name=tiad", recipe], [recipe, "--all", "objective.name=tiad"]):
        done = cli("inspect", *words)
        assert done.status == 2
        assert "Did you mean 'taid'?" in done.errors[0]


def test_a_path_with_an_equals_sign_is_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read("distill", "x=1", "runs/lr=1.yaml")["recipe"] == "runs/lr=1.yaml"
    monkeypatch.chdir(tmp_path)
    Path("lr=1.yaml").write_text("")
    assert read("distill", "x=1", "lr=1.yaml")["recipe"] == "lr=1.yaml"


def test_several_values_behind_one_option() -> None:
    result = read("evaluate", "--model", "a=P", "b=Q", "--tasks", "x", "y", "--output-dir", "o",
                  "--model", "c", "--seeds", "1", "2", "--rule", "x:r", "y:s")
    assert result["model"] == ["a=P", "b=Q", "c"]
    assert (result["tasks"], result["rule"]) == (["x", "y"], ["x:r", "y:s"])
    assert (result["seeds"], result["output_dir"]) == ((1, 2), Path("o"))
    assert read("compare", "a", "b=c,d", "--base", "f")["runs"] == ["a", "b=c,d"]
    assert read("export", "--output-dir", "o", "x", "y=z")["tasks"] == ["x", "y=z"]


def test_numbers_and_negative_ones() -> None:
    words = ("compose", "t", "l", "--output-dir", "o", "--vision-feature-layer")
    assert read(*words, "-2")["vision_feature_layer"] == [-2]
    assert read(*words[:-1], "--vision-feature-layer=-2,-1")["vision_feature_layer"] == [-2, -1]
    assert read("shrink", "t", "--output-dir", "o", "--keep", "0,1,5")["keep"] == [0, 1, 5]


# ----- mistakes -----------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "expected"), [
    ("distil r.yaml", ("no command 'distil'", "Did you mean 'distill'?")),
    ("", ("a command is missing", "evaluate")),
    ("--verson", ("no option '--verson'", "Did you mean '--version'?")),
    ("inspect r.yaml --recrod 3", ("no option '--recrod'", "Did you mean '--record'?")),
    ("inspect --recrod=3", ("no option '--recrod'",)),  # before the recipe that is missing
    ("distill r.yaml --train.max_steps=3", ("no option", "no dashes: train.max_steps=VALUE.")),
    ("plan r.yaml --learning-rate 1", ("no dashes: learning_rate=VALUE.",)),
    ("distill r.yaml --res", ("no option '--res'", "'--resume'")),  # no abbreviations
    ("inspect r.yaml --record a", ("--record = 'a', but it must be a whole number",)),
    ("inspect r.yaml --record", ("--record", "expected one argument")),
    ("evaluate --model a --tasks b --output-dir c --temperature hot",
     ("--temperature = 'hot', but it must be a number",)),
    ("evaluate --model a --tasks b --output-dir c --choose-by leter",
     ("--choose-by = 'leter'", "Did you mean 'letter'?")),
    ("evaluate --model a --tasks b --output-dir c --seeds 1 b", ("--seeds = 'b'", "whole number")),
    ("evaluate", ("required", "--model, --output-dir")),
    ("evaluate --model a --output-dir b", ("--tasks or --suite is needed",)),
    ("shrink t --output-dir o --choose evn", ("--choose = 'evn'", "Did you mean 'even'?")),
    ("shrink t --output-dir o --keep 1,b", ("--keep = '1,b'", "list of numbers like 0,1,5")),
    ("compose t l --output-dir o --architecture lava", ("Did you mean 'llava'?",)),
    ("schema recip", ("file = 'recip'", "Did you mean 'recipe'?")),
    ("completion bsh", ("shell = 'bsh'", "Did you mean 'bash'?")),
    ("distill train.max_steps=9", ("a recipe is missing", "train.max_steps=9")),
    ("demo x", ("unrecognized arguments: x",)),
])
def test_a_mistake_is_one_line(words: str, expected: tuple[str, ...], cli: Cli) -> None:
    done = cli(*words.split())
    assert done.status == 2
    assert done.err.count("\n") == 1
    (message,) = done.errors
    assert not [text for text in expected if text not in message], message
    name = words.partition(" ")[0]
    assert message.endswith(f"(usage: taid-vlm{f' {name}' * (name in COMMANDS)} --help)")


def test_choices_are_those_of_the_package() -> None:
    from taid_vlm.benchmarks.asking import METHODS
    from taid_vlm.benchmarks.likelihood import CHOOSE_BY, NORMALISE
    from taid_vlm.config.init import RATES
    from taid_vlm.config.model import DTYPES
    from taid_vlm.students.compose import Architecture
    from taid_vlm.students.shrink import CHOICES

    for name, field, valid in (
        ("evaluate", "method", METHODS), ("evaluate", "choose_by", CHOOSE_BY),
        ("evaluate", "normalise", NORMALISE), ("evaluate", "dtype", DTYPES),
        ("shrink", "choose", CHOICES), ("init", "train_what", RATES),
        ("compose", "architecture", ("auto", *get_args(Architecture))),
    ):
        assert set(choices(command(name)[1].model_fields[field])) == set(valid), field


# ----- recipes that come with the package ---------------------------------------------------


def test_shipped_recipes_are_listed_and_known_by_name(cli: Cli) -> None:
    files = {path.stem: path for path in (ROOT / "recipes").glob("*.yaml")}
    assert shipped_recipes() == files
    lines = cli("recipes").out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(files)
    for line, (name, path) in zip(lines, sorted(files.items()), strict=True):
        assert line.split(maxsplit=1)[1] == path.read_text().splitlines()[0].removeprefix("# ")
        assert recipe_path(name) == path


def test_a_file_comes_before_a_shipped_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("paper_schedule").write_text("studnet: x")
    assert recipe_path("paper_schedule") == Path("paper_schedule")
    assert "'studnet'" in cli("distill", "paper_schedule").errors[0]
    done = cli("distill", "paper_schedul")
    assert done.status == 2
    assert "neither as a file nor" in done.errors[0]
    assert "Did you mean 'paper_schedule'?" in done.errors[0]


def test_a_script_has_a_recipe_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr("taid_vlm.cli.main", lambda words: calls.append(words) or 0)
    for words in ([], ["--resume", "a=1"], ["a=1", "r.yaml"]):
        monkeypatch.setattr(sys, "argv", ["script.py", *words])
        assert distill_script("mine") == 0
    assert calls == [["distill", "mine"], ["distill", "mine", "--resume", "a=1"],
                     ["distill", "a=1", "r.yaml"]]


def test_the_wheel_holds_recipes_and_types() -> None:
    tree = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = tree["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"]["recipes"] == "taid_vlm/recipes"
    assert (ROOT / "taid_vlm" / "py.typed").is_file()
    assert "recipes" in tree["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]


# ----- a recipe to begin with ---------------------------------------------------------------


def test_init_writes_a_recipe_that_can_be_loaded(tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "mine.yaml"
    words = ("--teacher", "org/big", "--student", "org/small", "--train", "org/data",
             "--train-what")
    done = cli("init", path, *words, "lora")
    assert done.status == 0, done.err
    assert f"taid-vlm inspect {path}" in done.out
    recipe = load_recipe(path)
    assert recipe.teacher and recipe.teacher.model_name_or_path == "org/big"
    assert (recipe.student.model_name_or_path, recipe.data.train.path) == ("org/small", "org/data")
    assert recipe.student.peft
    before = path.read_text()
    done = cli("init", path, *words, "full")
    assert done.status == 2
    assert "is there already" in done.errors[0]
    assert path.read_text() == before


def test_init_writes_nothing_for_data_that_are_not_there(tmp_path: Path, cli: Cli) -> None:
    done = cli("init", tmp_path / "a.yaml", "--teacher", "org/big", "--student", "org/small",
               "--train", tmp_path / "no.jsonl")
    assert done.status == 2
    assert "train: " in done.errors[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", ["recipe", "benchmark"])
def test_schema_is_what_editors_check_by(file: str, cli: Cli) -> None:
    done = cli("schema", file)
    assert done.status == 0
    schema = json.loads(done.out)
    assert schema["$schema"].endswith("2020-12/schema")
    assert {"recipe": "output_dir", "benchmark": "data"}[file] in schema["required"]


# ----- completion ---------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "expected"), [
    (["dist"], {"distill"}),
    (["evaluate", "--method", ""], {"generate", "likelihood"}),
    (["evaluate", "--api"], {"--api-key-env"}),
    (["completion", "z"], {"zsh"}),
    (["distill", "rec"], {"recipe.yaml"}),
])
@pytest.mark.skipif(shutil.which("bash") is None, reason="bash")
def test_bash_completes(words: list[str], expected: set[str], tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "recipe.yaml").write_text("")
    script = cli("completion", "bash").out
    line = " ".join(f"'{word}'" for word in ("taid-vlm", *words))
    asked = (f"{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words)}\n"
             "$(complete -p taid-vlm | sed 's/.*-F \\([^ ]*\\) .*/\\1/')\n"
             "printf '%s\\n' \"${COMPREPLY[@]}\"")
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, cwd=tmp_path,
                          check=True)
    assert set(done.stdout.split()) == expected


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_all_commands(shell: str, cli: Cli) -> None:
    done = cli("completion", shell)
    assert done.status == 0
    assert all(name in done.out for name in COMMANDS)
    assert "max-new-tokens" in done.out


# ----- from Python --------------------------------------------------------------------------


def test_distill_takes_a_recipe_a_path_a_name_or_a_mapping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Recipe, bool, str]] = []
    monkeypatch.setattr(
        "taid_vlm.runs.stages.distill_stages",
        lambda recipe, resume, report, overwrite: calls.append(
            (recipe, resume, report.__name__)) or {})
    tree = yaml.safe_load((ROOT / "recipes" / "qwen3_8b_to_0.6b.yaml").read_text())
    tree["train"]["learning_rate"], tree["train"]["bf16"] = 2e-5, False  # YAML 1.1 reads text
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    for recipe in (tree, path, str(path), load_recipe(path)):
        assert distill(recipe, resume=True) == {}
    distill("qwen3_8b_to_0.6b")
    assert {(recipe.to_yaml(), resume, report) for recipe, resume, report in calls[:4]} == {
        (load_recipe(path).to_yaml(), True, "write_run_report")}
    assert calls[4][0].output_dir == "runs/qwen3_8b_to_0.6b"
    assert calls[4][1] is False
    with pytest.raises(TaidError, match="does not exist"):
        distill(tmp_path / "nowhere.yaml")
