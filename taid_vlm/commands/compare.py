"""`taid-vlm compare`: several runs on one page that decides."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from taid_vlm.commands.options import Many, Options, option, positional

if TYPE_CHECKING:
    from taid_vlm.compare import Comparison


class CompareOptions(Options):
    runs: Many = positional(
        "a run of distill or evaluate, or a model's logs of lm-eval, lmms-eval or VLMEvalKit; "
        "several seeds of one method, and evaluations of their students, behind one name",
        "[NAME=]FOLDER[,FOLDER...]", many=True)
    teacher: Path | None = option("evaluation of the teacher", "FOLDER")
    base: Path | None = option("evaluation of the student before training", "FOLDER")
    baseline: str | None = option("whom differences are taken from (default: the first)", "NAME")
    html: Path | None = option("write the page", "FILE")
    markdown: Path | None = option("write it for a model card", "FILE")
    json_: bool = option("print JSON instead of Markdown", default=False)


def compare(**options: Any) -> Comparison:
    """Compare runs with each other, or one with its teacher and base; write the page and the model
    card if their files are named.

    Args:
        options: those of `CompareOptions`, for example `runs=["KD=runs/kd", "TAID=runs/taid"]`.

    Raises:
        TaidError: runs that cannot be compared, with both values of what differs.

    Example:
        The run of the example of `distill`, beside its teacher and the student before:

        >>> from taid_vlm import compare
        >>> comparison = compare(runs=["TAID=runs/first"], html="page.html")
        >>> [kl] = [j for j in comparison.held_out if j.measure.column.key == "kl"]
        >>> {name: f"{figure.value:.2f}, n = {figure.n}" for name, figure in kl.figures.items()}
        {'Teacher': '0.00, n = 75', 'Base': '0.40, n = 75', 'TAID': '0.40, n = 75'}
    """
    told = CompareOptions(**options)

    from taid_vlm.compare import as_markdown, compare_runs, read_method, read_reference, write_page
    from taid_vlm.io.files import write_text

    teacher, base = (None if folder is None else read_reference(name, folder) for name, folder in
                     (("Teacher", told.teacher), ("Base", told.base)))
    comparison = compare_runs([read_method(run) for run in told.runs], teacher, base,
                              told.baseline)
    if told.html is not None:
        write_page(comparison, told.html)
    if told.markdown is not None:
        write_text(as_markdown(comparison), told.markdown)
    return comparison


def run(options: CompareOptions) -> None:
    comparison = compare(**options.model_dump())

    from taid_vlm.compare import as_markdown, plain
    from taid_vlm.io.files import as_json
    from taid_vlm.io.terminal import printable

    print(as_json(plain(comparison)) if options.json_ else printable(as_markdown(comparison)))
