"""A recipe is read, and a mistake in it told, without torch and in a moment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "accelerate", "datasets", "numpy")
MINIMAL = """\
teacher: big
student: small
data: {train: train.jsonl, eval: eval.jsonl}
objective: {name: taid}
train: {max_steps: 20}
stages: [{name: a}]
output_dir: out
"""
CODE = """\
import sys, time
from taid_vlm.config.recipe import load_recipe
from taid_vlm.errors import RecipeError
try:
    load_recipe(sys.argv[1], sys.argv[2:])
except RecipeError as error:
    print(error)
"""
AFTER = f"""
print([name for name in {HEAVY!r} if name in sys.modules])
print(time.process_time())
"""
MISTAKES = {
    "a missing recipe": ("none.yaml", [], "none.yaml' does not exist."),
    "a key of the recipe": ("recipe.yaml", ["studnet=x"], "Did you mean 'student'?"),
    "a key of train": ("recipe.yaml", ["train.learning_rat=1"], "Did you mean 'learning_rate'?"),
    "a rare key of train": ("recipe.yaml", ["train.torch_compil=true"], "'torch_compile'?"),
    "a kind in train": ("recipe.yaml", ["train.torch_compile=3"], "torch_compile = 3, but it must"),
    "a key of the objective": ("recipe.yaml", ["objective.t_strat=1"], "Did you mean 't_start'?"),
    "a key of a stage": ("recipe.yaml", ["stages=[{name: a, train: {max_step: 3}}]"],
                         "stages 'a': train has no key 'max_step'. Did you mean 'max_steps'?"),
    "no mistake": ("recipe.yaml", [], ""),
}


def run(code: str, *arguments: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_told_without_torch_within_half_a_second(case: str, tmp_path: Path) -> None:
    name, overrides, message = MISTAKES[case]
    (tmp_path / "recipe.yaml").write_text(MINIMAL)
    *told, heavy, seconds = run(CODE + AFTER, str(tmp_path / name), *overrides)
    assert message in "".join(told) and len(told) == (message != "")
    assert heavy == "[]"
    assert float(seconds) <= 0.5  # of processor time, the interpreter's start included


def test_all_of_config_is_light() -> None:
    names = sorted(path.stem for path in (ROOT / "taid_vlm/config").glob("*.py"))
    code = "import sys, time, taid_vlm\n" + "".join(
        f"import taid_vlm.config.{name}\n" for name in names if name != "__init__")
    code += "from taid_vlm.config.schema import recipe_schema\nrecipe_schema()\n"
    code += "from taid_vlm.config.reference import reference_page\nreference_page()\n"
    assert run(code + AFTER)[0] == "[]"


def test_the_package_itself_imports_nothing_and_names_everything() -> None:
    first, names, value, room = run(
        "import sys, time, taid_vlm\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
        "print(set(taid_vlm.__all__) <= set(dir(taid_vlm)))\n"
        "print(taid_vlm.TaidSchedule(1).t, taid_vlm.load_recipe.__name__)\n"
        "import taid_vlm.compare\n"  # the room does not stand in the way of the function
        "print('compare' in vars(taid_vlm))\n")
    assert (first, names, value, room) == ("[]", "True", "0.4 load_recipe", "False")
