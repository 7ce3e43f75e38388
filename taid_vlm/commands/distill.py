"""`taid-vlm distill`: a recipe carried out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taid_vlm.commands.options import option, say_and_part
from taid_vlm.commands.recipes import RecipeOptions, recipe_path

if TYPE_CHECKING:
    from taid_vlm.config.recipe import Recipe
    from taid_vlm.runs.results import Results

INTERRUPTED = "; --resume goes on from the last checkpoint, if there is one"


class DistillOptions(RecipeOptions):
    resume: bool = option("go on from the last whole checkpoint in output_dir", default=False)
    overwrite: bool = option("replace a finished run in output_dir", default=False)

    def error_log(self) -> Path:
        """Where the traceback of an unexpected error goes: beside the results, if they began."""
        output = Path(self.load().output_dir).expanduser()
        return output / "error.log" if output.is_dir() else Path("taid-vlm-error.log")


def distill(
    recipe: Recipe | Mapping[str, Any] | str | Path, resume: bool = False, overwrite: bool = False
) -> Results:
    """Carry out a recipe, with or without stages, and write its report.

    Args:
        recipe: a Recipe, its YAML file, the name of one that comes with the package, or what such
            a file holds.
        resume: go on from the last whole checkpoint in `output_dir`.
        overwrite: replace a finished run there.

    Returns:
        What was written to results.json; on disk: `student/`, `recipe.yaml`,
        `eval_answers.jsonl`, `results.json`, `report.html`.

    Raises:
        TaidError: anything a user can mend, with nothing half-written left behind.

    Example:
        >>> from taid_vlm import distill
        >>> from taid_vlm.demo.demo import data_folder
        >>> data = data_folder()  # two tiny models and conversations, which come with the package
        >>> results = distill({
        ...     "teacher": str(data / "models/words-teacher"),
        ...     "student": str(data / "models/words-student"),
        ...     "data": {"train": str(data / "words/train.jsonl"),
        ...              "eval": {"path": str(data / "words/eval.jsonl"), "max_records": 20}},
        ...     "train": {"max_steps": 2, "use_cpu": True}, "output_dir": "runs/first"})
        >>> results.alignment.case  # same way of splitting text, other ids
        'b'
        >>> before, after = results.eval.before, results.eval.after
        >>> f"{before.kl:.2f} nats a token, {before.n_tokens} tokens, {before.n_answers} answers"
        '0.40 nats a token, 497 tokens, 75 answers'
        >>> after.kl != before.kl
        True
    """
    from taid_vlm.config.recipe import load_recipe, parse_recipe

    if isinstance(recipe, (str, Path)):
        recipe = load_recipe(recipe_path(recipe))
    elif isinstance(recipe, Mapping):
        recipe = parse_recipe(recipe)

    from taid_vlm.report.run import write_run_report
    from taid_vlm.runs.stages import distill_stages

    return distill_stages(recipe, resume, write_run_report, overwrite)


def run(options: DistillOptions) -> None:
    recipe = options.load()
    results = distill(recipe, options.resume, options.overwrite)
    say_and_part(lambda: _closing(results, recipe.output_dir))


def _closing(results: Results, output_dir: str) -> str:
    from taid_vlm.evaluation.answers import FILE, read_answers
    from taid_vlm.report.run import verdict

    before, after = results.eval.before, results.eval.after
    lines = []
    if before and after and "kl" in after.figures:
        first, last = before.figures, after.figures
        answers = read_answers(Path(output_dir).expanduser() / FILE)
        lines += [f"verdict       {text}" for text in verdict(
            first["kl"], last["kl"], answers, results.history)]
        lines.append(f"held-out KL   {first['kl']:.4f} -> {last['kl']:.4f} nats per answer token "
                     f"(n = {after.n_tokens:,})")
        lines.append(f"agreement     {first['agreement']:.4f} -> {last['agreement']:.4f}")
    lines.append(f"student       {output_dir}/student")
    lines.append(f"report        {output_dir}/report.html")
    return "\n".join(lines)
